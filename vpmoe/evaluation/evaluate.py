"""The evaluation step: takes the student of a stage's last checkpoint, writes evaluation.json once.

questions.py and vpmoe/data/canary.py decide what is asked, measures.py computes figures from the answers,
student.py exports and loads the student.
"""

import json
import logging
import tempfile
import threading
from collections.abc import Callable, Iterable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from vpmoe.api import DistillRun, Stage
from vpmoe.api.metrics import MetricsLine, Sample
from vpmoe.checkpoint.train_state import load_stage_end
from vpmoe.data import canary
from vpmoe.data.dataset import load_dataset
from vpmoe.data.reader import BlockCache, DatasetReader
from vpmoe.data.tokenizer import Ids
from vpmoe.evaluation import measures, questions
from vpmoe.evaluation.job import EvaluationWorker
from vpmoe.evaluation.student import EvaluatedStudent
from vpmoe.failure import Permanent
from vpmoe.inference.engine_pool import SamplingRequest
from vpmoe.inference.verify import InferenceEngines
from vpmoe.model.stage_end import open_stage_end
from vpmoe.process.board import ProgressBoard
from vpmoe.process.gpu import GpuUse, ReadGpus, not_read
from vpmoe.provenance import Provenance
from vpmoe.rollout import evaluation_record
from vpmoe.rollout.evaluation_record import CanaryResult, EvaluationRecord
from vpmoe.rollout.prompts import PromptBuilder
from vpmoe.rollout.windows import completion_limit
from vpmoe.storage import Bucket, paths
from vpmoe.storage.bucket import json_bytes

log = logging.getLogger(__name__)

SCORED_AT_ONCE = 64
"""Sequences scored between two checks for a stop request and a report."""
SAMPLED_AT_ONCE = 256
"""Completions sampled between two checks. The engine is efficient only with many at the same time."""


class EvaluationLine(MetricsLine):
    """The step's line of metrics; the fields of the EvaluationRecord follow."""

    event: str = "evaluation"
    seconds: dict[str, float]
    """Duration of each thing that the attempt did, by name."""
    gpu: GpuUse
    """During the whole attempt."""

    def samples(self) -> Iterable[Sample]:
        return self.gpu.samples()


def evaluate(
    run: DistillRun,
    stage: Stage,
    bucket: Bucket,
    provenance: Provenance,
    stopping: threading.Event,
    board: ProgressBoard,
    engines: InferenceEngines,
    read_gpus: ReadGpus = not_read,
) -> EvaluationRecord:
    """Measure the student at the end of a stage unless that was done; returns the content of evaluation.json.

    `engines`: as for EvaluatedStudent; started only if something is to be asked. Raises Permanent if the
    stage has not finished, its last checkpoint is damaged, or there is nothing to measure with; StorageError;
    Retriable if the disk is full; Terminated if it was asked to stop.
    """
    wanted = run.spec.evaluation
    parts = bool(wanted.documents) + bool(wanted.completions) + 1  # the canary is always one
    dataset = load_dataset(run, bucket)
    job = EvaluationWorker(run, bucket, provenance, stopping, board, None, stage, dataset, parts)
    if found := evaluation_record.load_evaluation(run, stage.name, bucket):
        check_current(job, found)
        log.info("Reused: %s: %s", bucket.url(paths.evaluation(run, stage.name)), summary(found))
        job.report_measured("Reused", found.valid_share, reused=True)
        return found
    with tempfile.TemporaryDirectory(prefix="vpmoe-evaluate-") as scratch:
        measured = measure_student(job, engines, Path(scratch))
    line = EvaluationLine(attempt=provenance.attempt, seconds=job.seconds, gpu=read_gpus())
    board.metrics.record(line.samples())
    text = json.dumps(line.dump() | measured.dump(), ensure_ascii=False, allow_nan=False) + "\n"
    # create: if the attempt is killed after this, the next one leaves the line of metrics as it is.
    bucket.create(paths.metrics(run, provenance.step, "000000"), text.encode(), provenance.metadata())
    key = paths.evaluation(run, stage.name)
    if not bucket.create(key, json_bytes(measured.dump()), provenance.metadata()):
        raise Permanent(
            f"{bucket.url(key)} was written in the meantime, for another checkpoint. Delete it to have the "
            "stage measured again."
        )
    log.info("Stage %s: %s", stage.name, summary(measured))
    job.report_measured(summary(measured), measured.valid_share)
    return measured


def check_current(job: EvaluationWorker, found: EvaluationRecord) -> None:
    """Raise Permanent if the stage's last checkpoint is not the measured one."""
    end = load_stage_end(job.bucket, paths.checkpoints(job.run, job.stage.name))
    if end is not None and end[0].sha256 != found.checkpoint:
        raise Permanent(
            f"{job.bucket.url(paths.evaluation(job.run, job.stage.name))} is not of "
            f"{job.bucket.url(end[0].key)}: the stage was trained again since. Delete it to have it "
            "measured again."
        )


def measure_student(job: EvaluationWorker, engines: InferenceEngines, scratch: Path) -> EvaluationRecord:
    """Measure all that the run asks for. `scratch`: for the exported student and the documents."""
    checkpoint = open_stage_end(job.run, job.stage.name, job.bucket, "evaluated")
    student, found = EvaluatedStudent(job, engines, scratch / "student", checkpoint), dict[str, Any]()
    with closing(DatasetReader(job.dataset, "valid", BlockCache(job.bucket, scratch / "blocks"))) as valid:
        parts = measurements(job, student, valid)
        for name, part in parts.items():
            found |= job.measure_part(name, checkpoint.manifest, part)
    fields = {
        "run": job.provenance.run,
        "config": job.provenance.config,
        "stage": job.stage.name,
        "iteration": checkpoint.train_state.iteration,
        "checkpoint": checkpoint.manifest.sha256,
        **found,
    }
    return evaluation_record.parse_evaluation(
        fields, job.stage.name, job.bucket.url(paths.evaluation_parts(job.run, job.stage.name))
    )


def measurements(
    job: EvaluationWorker, student: EvaluatedStudent, valid: DatasetReader
) -> dict[str, Callable[[], dict[str, Any]]]:
    """The functions that measure the parts of the evaluation, by name.

    Raises Permanent if there are no documents.
    """
    wanted = job.run.spec.evaluation
    if not sum(map(len, valid.lengths)) and wanted.documents + wanted.completions:
        raise Permanent(
            f"{job.bucket.url(job.dataset.key)}: the dataset's valid split is empty. Raise "
            "dataset.validFraction, or set evaluation.documents and completions to 0."
        )
    parts: dict[str, Callable[[], dict[str, Any]]] = {}
    if wanted.documents:
        parts["heldOut"] = partial(score_documents, job, student, valid)
    if wanted.completions:
        parts["completions"] = partial(sample_completions, job, student, valid)
    parts["canary"] = partial(score_texts, job, student, wanted.canary)
    return parts


def score_documents(job: EvaluationWorker, student: EvaluatedStudent, valid: DatasetReader) -> dict[str, Any]:
    """Measure the held-out loss by span."""
    documents = questions.held_out_documents(
        valid.lengths, job.run.spec.evaluation.documents, job.run.spec.training.seed
    )
    valid.prefetch(documents)
    sums = measures.SpanSums()
    student.load()
    with job.timed("heldOut"):
        for some in job.batches(documents, SCORED_AT_ONCE, "Scoring held-out documents"):
            read = [valid.read_document(document) for document in some]
            for (_, span_T), logp in zip(read, student.score([ids_T for ids_T, _ in read]), strict=True):
                sums.add(logp, span_T[1:])
    return {"documents": len(documents), "heldOut": sums.loss().dump()}


def sample_completions(
    job: EvaluationWorker, student: EvaluatedStudent, valid: DatasetReader
) -> dict[str, Any]:
    """Measure validity and lengths of completions, by effort."""
    training = job.run.spec.training
    wanted = questions.sampling_questions(valid.lengths, job.run.spec.evaluation.completions, training.seed)
    prompts = PromptBuilder(job.dataset.facts["settings"]["conversation"])
    bounds = questions.completion_limits(job.run, job.stage.name)
    answers: list[tuple[str, Ids]] = []
    student.load()
    with job.timed("completions"):
        for some in job.batches(wanted, SAMPLED_AT_ONCE, "Sampling completions"):
            requests = []
            for one in some:
                ids_P = prompts.build(*valid.read_document(one.document), one.effort)
                requests.append(
                    SamplingRequest(
                        ids_P,
                        one.seed,
                        completion_limit(len(ids_P), one.effort, bounds, training.sequence_length),
                    )
                )
            answers += zip([one.effort for one in some], student.sample(requests), strict=True)
    efforts = measures.measure_efforts(answers)
    of_effort = {effort: found.dump() for effort, found in efforts.items()}
    return {
        "completions": len(wanted),
        "validity": measures.total_validity(efforts.values()),
        "efforts": of_effort,
    }


def score_texts(job: EvaluationWorker, student: EvaluatedStudent, url: str | None) -> dict[str, Any]:
    """Measure bits per byte of the canary at an address, or of the packaged one."""
    texts, length = canary.load_texts(url, job.bucket), job.run.spec.training.sequence_length
    windows = [
        (text.ids_T, window) for text in texts for window in canary.split_windows(len(text.ids_T), length)
    ]
    bits, size = 0.0, sum(text.size for text in texts)
    student.load()
    with job.timed("canary"):
        for some in job.batches(windows, SCORED_AT_ONCE, "Scoring windows of the canary"):
            found = student.score([ids_T[window.start : window.stop] for ids_T, window in some])
            bits += sum(
                measures.total_bits(logp[window.first - window.start - 1 :])
                for (_, window), logp in zip(some, found, strict=True)
            )
    return {
        "canary": CanaryResult(
            bits_per_byte=bits / size, bytes=size, sha256=canary.texts_digest(texts)
        ).dump()
    }


def summary(found: EvaluationRecord) -> str:
    """The figures, for a log line and the step's message."""
    figures = []
    if found.held_out:
        spans = {name: loss for name, loss in found.held_out.dump().items() if loss is not None}
        figures.append("held-out loss " + ", ".join(f"{name} {loss:.3f}" for name, loss in spans.items()))
    if found.valid_share is not None:
        by_effort = ", ".join(
            f"{effort} {share:.1%}" for effort, share in found.valid_share_by_effort().items()
        )
        figures.append(f"{found.valid_share:.1%} of {found.completions} completions valid ({by_effort})")
    if found.canary:
        figures.append(f"canary {found.canary.bits_per_byte:.3f} bits per byte")
    return "; ".join(figures)
