"""Delete a run's folder from its bucket. The operator starts it for a deleted run with deletionPolicy Delete.

It deletes what is below runs/<namespace>/<name>-<uid8>/ and nothing else: datasets and scores stay. It may be
repeated.
"""

import logging
import os

from jobs.entrypoint import job_parser, prepare_process, read_run, record_success
from vpmoe.api.progress import Amount, Progress
from vpmoe.clock import now
from vpmoe.process.board import ProgressBoard
from vpmoe.storage import Bucket

log = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> None:
    """Delete the folder, and record how many objects it had."""
    board = ProgressBoard()
    prepare_process(board)
    run = read_run(job_parser("clear").parse_args(arguments).run, os.environ.get("VPMOE_CONFIG_HASH", ""))
    bucket = Bucket.open(run.spec.storage)
    count = bucket.delete_prefix(run.folder)
    message = f"Deleted {count} objects of {bucket.url(run.folder)}"
    log.info(message)
    board.progress = Progress(
        run=run.identity,
        step="clear",
        attempt=1,
        state="Succeeded",
        message=message,
        updated=now(),
        parts=Amount(done=count, total=count),
    )
    record_success(board)


if __name__ == "__main__":
    main()
