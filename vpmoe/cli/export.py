"""Write the student of a run's stage into a folder on this machine, as a model for transformers and vLLM.

A model that the run has exported is downloaded; otherwise it is made from the stage's last checkpoint.
Endpoint, region and credentials come from the environment, as for AWS's own tools.
"""

import argparse
import sys
from pathlib import Path

from vpmoe.api.termination import EXIT_CODES

HELP = "write a run's student into a folder, for transformers and vLLM"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "url",
        metavar="RUN_FOLDER",
        help="the run's folder: s3://BUCKET/PREFIX/runs/NAMESPACE/NAME-UID8, as in status.provenance.folder",
    )
    parser.add_argument("--stage", metavar="NAME", help="the stage (default: the last)")
    parser.add_argument("--to", required=True, type=Path, metavar="DIR", help="the new folder")


def run(arguments: argparse.Namespace) -> int:
    """Returns 0, 75 if the store is away or the disk is full, else 65."""
    from vpmoe.export.local import export_to
    from vpmoe.failure import classify_error
    from vpmoe.process.run_folder import choose_stage, open_run

    try:
        distill_run, bucket = open_run(arguments.url)
        stage = choose_stage(distill_run, arguments.stage)
        export_to(arguments.to, distill_run, stage, bucket, say)
    except Exception as error:
        found = classify_error(error)
        if found.kind == "Internal":
            raise
        sys.stderr.write(f"vpmoe export: {found.message}\n")
        return EXIT_CODES[found.kind]
    say(f"{arguments.to} is the student after stage {stage.name}. Ask it: vpmoe chat {arguments.to}")
    return 0


def say(line: str) -> None:
    """Print one line at once, because a large model takes minutes."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
