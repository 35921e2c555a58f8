"""The step validity: samples completions of a stage's checkpoints while the stage trains, for its `stop`.

Checkpoints are measured when they pass a multiple of evaluation.everyTokens, each multiple once, with the
questions of the evaluation after the stage. If several have passed since the last measurement, the newest is
measured and the others are not: there is no queue. The trainer reads the records when it evaluates
(vpmoe/trainer/stages/validity.py).
"""

import json
import logging
import shutil
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from vpmoe.api import DistillRun, Stage
from vpmoe.checkpoint.format import CheckpointRejected, Weights, open_weights
from vpmoe.checkpoint.train_state import list_iterations
from vpmoe.data.dataset import load_dataset
from vpmoe.data.reader import BlockCache, DatasetReader
from vpmoe.evaluation.evaluate import EvaluationLine, sample_completions, summary
from vpmoe.evaluation.job import EvaluationWorker
from vpmoe.evaluation.student import EvaluatedStudent
from vpmoe.failure import Permanent
from vpmoe.inference.verify import InferenceEngines
from vpmoe.process.board import ProgressBoard
from vpmoe.process.gpu import ReadGpus, not_read
from vpmoe.process.step_worker import step_succeeded
from vpmoe.provenance import Provenance
from vpmoe.rollout import evaluation_record
from vpmoe.rollout.evaluation_record import EvaluationRecord
from vpmoe.storage import Bucket, StorageError, paths
from vpmoe.storage.bucket import json_bytes

log = logging.getLogger(__name__)

POLL_SECONDS = 10.0
"""Seconds between two checks for a checkpoint."""
REPORT_SECONDS = 30.0
"""Seconds between reports while waiting for a checkpoint."""


def measure_while_training(
    run: DistillRun,
    stage: Stage,
    bucket: Bucket,
    provenance: Provenance,
    stopping: threading.Event,
    board: ProgressBoard,
    engines: InferenceEngines,
    read_gpus: ReadGpus = not_read,
) -> None:
    """Measure the validity of the stage's checkpoints until the stage has finished.

    It has no state: it continues with what has no record. `engines`: as for EvaluatedStudent. Raises
    Permanent if there is nothing to sample from; StorageError; Retriable if the disk is full; Terminated if
    it was asked to stop.
    """
    planned = stage.tokens // run.spec.evaluation.every_tokens
    dataset = load_dataset(run, bucket)
    job = EvaluationWorker(run, bucket, provenance, stopping, board, None, stage, dataset, planned)
    measured = evaluation_record.measured_validities(run, stage.name, bucket)
    job.measured.extend(map(str, measured))
    latest = None
    if measured:
        latest = evaluation_record.load_validity(run, stage.name, bucket, measured[-1]).valid_share
    passed, reported = -1, -REPORT_SECONDS
    with (
        tempfile.TemporaryDirectory(prefix="vpmoe-validity-") as scratch,
        closing(DatasetReader(dataset, "valid", BlockCache(bucket, Path(scratch) / "blocks"))) as valid,
    ):
        if not sum(map(len, valid.lengths)):
            raise Permanent(
                f"{bucket.url(dataset.key)}: the dataset's valid split is empty. Raise "
                f"dataset.validFraction, or set stages[{stage.name}].stop.minValidity to 0."
            )
        while not step_succeeded(run, bucket, stage.name):
            newest = next(iter(list_iterations(bucket, paths.checkpoints(run, stage.name))), -1)
            if newest > passed:
                passed = newest
                if found := _measure(job, engines, valid, Path(scratch) / "student", newest, read_gpus):
                    latest = found.valid_share
                continue  # a newer one may exist already
            if time.monotonic() - reported > REPORT_SECONDS:
                reported = time.monotonic()
                job.report_running("Waiting for a checkpoint", latest)
            with board.metrics.waiting("checkpoint"):
                job.pause(POLL_SECONDS)
    job.report_measured("The stage has ended", latest)


def _measure(
    job: EvaluationWorker,
    engines: InferenceEngines,
    valid: DatasetReader,
    folder: Path,
    iteration: int,
    read_gpus: ReadGpus,
) -> EvaluationRecord | None:
    """Measure a checkpoint and write its record. None if it is not due, or cannot be read."""
    run, bucket, stage = job.run, job.bucket, job.stage.name
    try:
        checkpoint = open_weights(bucket, paths.checkpoint(run, stage, iteration))
        number = checkpoint.train_state.tokens // run.spec.evaluation.every_tokens
        key = paths.validity(run, stage, number)
        # The last checkpoint is the evaluation's after the stage.
        if not number or checkpoint.train_state.finished or bucket.exists(key):
            return None
        shutil.rmtree(folder, ignore_errors=True)
        read_gpus()  # what they did before is not the measurement's
        job.seconds.clear()
        found = sample_completions(job, EvaluatedStudent(job, engines, folder, checkpoint), valid)
    except (CheckpointRejected, StorageError) as error:
        if isinstance(error, StorageError) and error.reason not in ("Altered", "Missing"):
            raise
        # It was pruned meanwhile, because the trainer is faster. A damaged one is the trainer's to reject.
        log.warning("Checkpoint %d is passed over: %s", iteration, error)
        return None
    record = evaluation_record.parse_evaluation(
        _fields(job, checkpoint, found), stage, bucket.url(key), "validity"
    )
    line = EvaluationLine(attempt=job.provenance.attempt, seconds=job.seconds, gpu=read_gpus())
    job.board.metrics.record(line.samples())
    text = json.dumps(line.dump() | record.dump(), ensure_ascii=False, allow_nan=False) + "\n"
    metrics = paths.metrics(run, job.provenance.step, f"{number:06d}")
    bucket.create(metrics, text.encode(), job.provenance.metadata())
    if not bucket.create(key, json_bytes(record.dump()), job.provenance.metadata()):
        record = evaluation_record.load_validity(run, stage, bucket, number)  # another attempt was faster
    job.measured.append(str(number))
    message = f"Checkpoint {record.iteration}: {summary(record)}"
    log.info("%s", message)
    job.report_running(message, record.valid_share)
    return record


def _fields(job: EvaluationWorker, checkpoint: Weights, found: dict[str, Any]) -> dict[str, Any]:
    return {
        "run": job.provenance.run,
        "config": job.provenance.config,
        "stage": job.stage.name,
        "iteration": checkpoint.train_state.iteration,
        "checkpoint": checkpoint.manifest.sha256,
        **found,
    }
