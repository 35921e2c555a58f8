"""The report step: writes the page to the bucket, as report/index.html, in the place of an earlier one.

The page is of the moment: a later stage's step writes it again.
"""

import logging
import posixpath
import threading

from vpmoe.api import DistillRun
from vpmoe.process.board import ProgressBoard
from vpmoe.process.step_worker import StepWorker
from vpmoe.provenance import Provenance
from vpmoe.report.facts import data_size
from vpmoe.report.page import page
from vpmoe.report.run_data import read_run_data
from vpmoe.storage import Bucket, paths

log = logging.getLogger(__name__)

HTML = "text/html; charset=utf-8"


def write_report(
    run: DistillRun,
    bucket: Bucket,
    provenance: Provenance,
    stopping: threading.Event,
    board: ProgressBoard,
) -> None:
    """Write the run's report. Its links are relative, so that they work wherever the bucket is served.

    Raises Permanent if an object of the run is malformed, StorageError, Terminated if it was asked to stop.
    """
    job = StepWorker(run, bucket, provenance, stopping, board, None)
    job.publish_progress("Reading the run")
    data = read_run_data(run, bucket)
    job.check_stop()
    key = paths.report(run)
    text = page(data, lambda of: posixpath.relpath(of, posixpath.dirname(key))).encode()
    bucket.put_bytes(key, text, provenance.metadata(), content_type=HTML)
    message = f"Wrote {bucket.url(key)}, {data_size(len(text))}"
    log.info("%s", message)
    job.publish_progress(message, "Succeeded")
