"""Write the report of a run: one HTML page that says what happened in it, finished or not.

Endpoint, region and credentials come from the environment, as for AWS's own tools. The page needs no network;
its links lead to the manifests in the bucket.
"""

import argparse
import sys
from pathlib import Path

from vpmoe.api.termination import EXIT_CODES

HELP = "write a page with the plots, costs and provenance of a run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "url",
        metavar="RUN_FOLDER",
        help="the run's folder: s3://BUCKET/PREFIX/runs/NAMESPACE/NAME-UID8, as in status.provenance.folder",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the page; replaced if it exists (default: NAME.html)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Returns 0, 75 if the store is away or the disk is full, else 65."""
    from vpmoe.failure import Permanent, classify_error
    from vpmoe.process.run_folder import open_run
    from vpmoe.report.page import page
    from vpmoe.report.run_data import read_run_data

    try:
        distill_run, bucket = open_run(arguments.url)
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
    return 0
