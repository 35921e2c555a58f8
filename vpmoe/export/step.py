"""The export step: writes a stage's student to the bucket as a model folder, once.

The folder is made on local disk, then uploaded file by file, the manifest last. Each uploaded file has a
record with its hashes. The next attempt makes the same files again and uploads only those that have no record
of their content.
"""

import logging
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from vpmoe.api import DistillRun, Stage
from vpmoe.api.progress import Amount
from vpmoe.export.stage_model import StageModel, load_exported, open_stage_model
from vpmoe.process.board import ProgressBoard
from vpmoe.process.step_worker import StepWorker
from vpmoe.provenance import Provenance
from vpmoe.storage import Bucket, Subject, manifest, paths
from vpmoe.storage.blocks import hash_file
from vpmoe.storage.bucket import json_bytes
from vpmoe.storage.errors import StorageError
from vpmoe.storage.manifest import Manifest

log = logging.getLogger(__name__)

REPORT_SECONDS = 5.0
"""Seconds between two reports while the files are written."""


@dataclass(frozen=True)
class ExportWorker(StepWorker):
    """One attempt at exporting a stage."""

    stage: Stage

    @property
    def folder(self) -> str:
        return paths.model(self.run, self.stage.name)

    def report_exported(self, message: str, parts: Amount | None, *, reused: bool = False) -> None:
        """Report success: the model is in the bucket. `reused`: an earlier attempt has written all of it, and
        this one knows of no parts."""
        url = self.bucket.url(self.folder)
        self.publish_progress(message, "Succeeded", parts=parts, model=url, reused=reused)


def export_stage(
    run: DistillRun,
    stage: Stage,
    bucket: Bucket,
    provenance: Provenance,
    stopping: threading.Event,
    board: ProgressBoard,
) -> Manifest:
    """Export the student at the end of a stage unless that was done; returns the model's manifest.

    Raises Permanent if the stage has not finished, its last checkpoint is damaged, or the exported model is
    of another one; StorageError, also if the local disk is full; Terminated if it was asked to stop.
    """
    job = ExportWorker(run, bucket, provenance, stopping, board, None, stage)
    if found := load_exported(run, stage.name, bucket):
        log.info("Reused: %s", bucket.url(found.key))
        job.report_exported("Reused", None, reused=True)
        return found
    started = time.monotonic()
    model = open_stage_model(run, stage, bucket)
    with tempfile.TemporaryDirectory(prefix="vpmoe-export-") as scratch:
        folder = Path(scratch) / "model"
        model.write(folder, ReportingReader(job, model))
        subjects = upload(job, sorted(folder.rglob("*")), folder)
    remove_others(job, subjects)
    written = manifest.write(bucket, paths.manifest(job.folder), model.statement(subjects, provenance))
    size = sum(subject.size for subject in subjects)
    message = f"Exported {len(subjects)} files, {size / 1e6:,.1f} MB, to {bucket.url(job.folder)}"
    log.info("%s in %.1f s", message, time.monotonic() - started)
    job.report_exported(message, Amount(done=len(subjects), total=len(subjects)))
    return written


class ReportingReader:
    """Reads the checkpoint's tensors for the export, reports how many it has read, and stops on request.
    Threads may share it."""

    def __init__(self, job: ExportWorker, model: StageModel) -> None:
        self._job = job
        self._read = model.checkpoint.read
        self._lock = threading.Lock()
        self._bytes = 4 * sum(model.checkpoint.sizes.values())
        self._done = 0
        self._reported = 0.0

    def __call__(self, name: str, start: int, stop: int) -> Tensor:
        """As Weights.read. Raises Terminated if the process was asked to stop."""
        self._job.check_stop()
        with self._lock:
            if time.monotonic() - self._reported > REPORT_SECONDS:
                self._reported = time.monotonic()
                read, total = self._done / 1e6, self._bytes / 1e6
                self._job.publish_progress(f"Writing the model: {read:,.0f} of {total:,.0f} MB read")
            self._done += 4 * (stop - start)
        return self._read(name, start, stop)


def upload(job: ExportWorker, found: Sequence[Path], folder: Path) -> list[Subject]:
    """Upload the files of a folder that an earlier attempt has not uploaded. Returns all of them."""
    files = [path for path in found if path.is_file()]
    subjects: list[Subject] = []
    for path in files:
        job.check_stop()
        name = path.relative_to(folder).as_posix()
        job.publish_progress(f"Uploading {name}", parts=Amount(done=len(subjects), total=len(files)))
        key = f"{job.folder}/{name}"
        record = paths.export_part(job.run, job.stage.name, name)
        subject = hash_file(key, path).subject(job.folder)
        if not is_uploaded(job, record, subject):
            job.bucket.delete(record)  # of other content
            stored = job.bucket.put_file(key, path, job.provenance.metadata())
            subject = stored.subject(job.folder)
            job.bucket.put_bytes(record, json_bytes(manifest.entry(subject)), job.provenance.metadata())
        subjects.append(subject)
    return subjects


def is_uploaded(job: ExportWorker, record: str, subject: Subject) -> bool:
    """Whether an earlier attempt has uploaded this content."""
    try:
        known = manifest.subject_of(job.bucket.get_json(record), job.folder)
        return known == subject and job.bucket.head(subject.key).size == subject.size
    except ValueError:
        return False
    except StorageError as error:
        if error.reason not in ("Missing", "Altered"):
            raise
        return False


def remove_others(job: ExportWorker, subjects: Sequence[Subject]) -> None:
    """Delete what an attempt with another checkpoint has left in the model's folder."""
    named = {subject.key for subject in subjects}
    for found in list(job.bucket.list(job.folder + "/")):
        if found.key not in named and found.key != paths.manifest(job.folder):
            job.bucket.delete(found.key)
