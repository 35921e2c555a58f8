"""Copy the metrics of a run into TensorBoard, Weights & Biases or MLflow, once or while it runs.

Started again, it continues: no point is written twice. Endpoint, region and credentials of the bucket come
from the environment, as for AWS's own tools; those of W&B and MLflow from their own variables.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vpmoe.api.termination import EXIT_CODES, WRONG_USAGE

if TYPE_CHECKING:
    from vpmoe.trackers.sync import Tracker

HELP = "copy a run's metrics into TensorBoard, Weights & Biases or MLflow"

OPTIONS = {"tensorboard": ("dir",), "wandb": ("dir", "project"), "mlflow": ("uri", "project")}
"""Options that each tracker takes."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as of a shell."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    sync = commands.add_parser("sync", help="write what the tracker does not have", description=__doc__)
    sync.add_argument(
        "url",
        metavar="RUN_FOLDER",
        help="the run's folder: s3://BUCKET/PREFIX/runs/NAMESPACE/NAME-UID8, as in status.provenance.folder",
    )
    sync.add_argument("--to", required=True, choices=OPTIONS, help="the tracker")
    sync.add_argument(
        "--dir",
        type=Path,
        metavar="DIR",
        help="tensorboard: the log directory (default: runs); wandb: folder of its files (default: .)",
    )
    sync.add_argument(
        "--project", metavar="NAME", help="wandb: the project; mlflow: the experiment (default: vpmoe)"
    )
    sync.add_argument(
        "--uri", metavar="URI", help="mlflow: its store or server (default: MLFLOW_TRACKING_URI, as MLflow)"
    )
    sync.add_argument("--follow", action="store_true", help="go on until the run has finished")


def run(arguments: argparse.Namespace) -> int:
    """Returns 0, 64 for an option that the tracker has not, 75 if the store is away, 130 after Ctrl-C, else
    65."""
    for option in ("dir", "project", "uri"):
        if getattr(arguments, option) is not None and option not in OPTIONS[arguments.to]:
            takes = " and ".join(f"--{name}" for name in OPTIONS[arguments.to])
            sys.stderr.write(f"vpmoe metrics sync: {arguments.to} has no --{option}; it takes {takes}\n")
            return WRONG_USAGE
    from vpmoe.failure import classify_error
    from vpmoe.process.run_folder import open_run
    from vpmoe.trackers.reader import MetricsReader
    from vpmoe.trackers.sync import sync

    try:
        distill_run, bucket = open_run(arguments.url)
        written = sync(MetricsReader(distill_run, bucket), tracker(arguments), say, follow=arguments.follow)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        found = classify_error(error)
        if found.kind == "Internal":
            raise
        sys.stderr.write(f"vpmoe metrics sync: {found.message}\n")
        return EXIT_CODES[found.kind]
    say(f"{written} rows were new." if written else "Nothing was new.")
    return 0


def tracker(arguments: argparse.Namespace) -> "Tracker":
    """The tracker of a command line. Raises ModuleNotFoundError without its package."""
    project = arguments.project or "vpmoe"
    if arguments.to == "tensorboard":
        from vpmoe.trackers.tensorboard import TensorBoard

        return TensorBoard(arguments.dir or Path("runs"))
    if arguments.to == "wandb":
        from vpmoe.trackers.wandb import WandB

        return WandB(arguments.dir or Path(), project)
    from vpmoe.trackers.mlflow import MLflow

    return MLflow(arguments.uri, project)


def say(line: str) -> None:
    """Print one line at once, because a run is followed for days."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
