"""Write the report of a run: one HTML page that says what happened in it, finished or not.

The run is named as in the cluster, or by its folder. The page is made of what is in the bucket. Endpoint,
region and credentials come from the environment, as for AWS's own tools; endpoint and region that it does not
name are those of the run in the cluster. The page needs no network; its links lead to the manifests in the
bucket.
"""

import argparse
import sys
import webbrowser
from pathlib import Path

from vpmoe.api import DistillRun
from vpmoe.api.storage import StorageSpec
from vpmoe.api.termination import EXIT_CODES
from vpmoe.cli.in_cluster import add_cluster_arguments, open_cluster, run_in_cluster

HELP = "write a page with the plots, costs and provenance of a run"
FOLDER = "s3://"
"""Start of a run's folder; no run has such a name."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run",
        metavar="NAME|RUN_FOLDER",
        help="the DistillRun in the cluster; or, without a cluster, the run's folder: "
        "s3://BUCKET/PREFIX/runs/NAMESPACE/NAME-UID8",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the page; replaced if it exists (default: NAME.html)"
    )
    parser.add_argument("--open", action="store_true", help="show the page in the browser")
    add_cluster_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Returns 0, 1 if the cluster has no such run, 75 if the store is away or the disk is full, else 65."""
    if arguments.run.startswith(FOLDER):
        return write_page(arguments, arguments.run, None)
    return run_in_cluster("report", lambda: write_page(arguments, *find_folder(arguments)))


def find_folder(arguments: argparse.Namespace) -> tuple[str, StorageSpec]:
    """The folder of a run in the cluster, and its store. Raises ClusterError, or Invalid if this version
    cannot read the run."""
    from vpmoe.follow.cluster_error import ClusterError

    found = open_cluster(arguments).run(arguments.run)
    folder = ((found.get("status") or {}).get("provenance") or {}).get("folder")
    if not folder:
        raise ClusterError(
            f"run {arguments.run} has no folder yet, because no step of it has started. "
            f"`vpmoe status {arguments.run}` says what it waits for."
        )
    return str(folder), DistillRun.parse(found, f"DistillRun {arguments.run}", stored=True).spec.storage


def write_page(arguments: argparse.Namespace, folder: str, store: StorageSpec | None) -> int:
    """Write the page of the run in this folder."""
    from vpmoe.failure import Permanent, classify_error
    from vpmoe.process.run_folder import open_run
    from vpmoe.report.page import page
    from vpmoe.report.run_data import read_run_data

    try:
        distill_run, bucket = open_run(folder, store)
        output = arguments.output or Path(f"{distill_run.metadata.name}.html")
        text = page(read_run_data(distill_run, bucket), bucket.url)
        try:
            output.write_text(text, encoding="utf-8")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
            raise Permanent(
                f"--output {output}: {error.strerror}. Name a file that can be written."
            ) from None
    except Exception as error:
        found = classify_error(error)
        if found.kind == "Internal":
            raise
        sys.stderr.write(f"vpmoe report: {found.message}\n")
        return EXIT_CODES[found.kind]
    sys.stdout.write(f"{output.resolve()}\n")
    if arguments.open and not webbrowser.open(output.resolve().as_uri()):
        sys.stderr.write("vpmoe report: there is no browser here: open the file on a machine that has one.\n")
    return 0
