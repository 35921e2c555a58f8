"""The rescoring step: a dataset and a teacher in, scores in the bucket out.

Workers never wait for each other.

Worker w of W makes the parts i ≡ w (mod W) of every set of scores that the run's stages train on. It uploads
a part's files, then its record, so a restarted worker continues with its first part without a record. Any
worker that finds all records writes the manifest. The teacher is loaded for the first picked document, and
not at all if there is nothing to do. part.py makes the files of a part.
"""

import json
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vpmoe.api import DistillRun, pod_metrics
from vpmoe.api.metrics import MetricsLine, Sample
from vpmoe.data.dataset import dataset_facts, load_dataset
from vpmoe.data.system_message import EffortSubstitution
from vpmoe.data.tokenizer import Ids
from vpmoe.failure import Permanent
from vpmoe.process.board import ProgressBoard
from vpmoe.process.gpu import GpuUse, ReadGpus, not_read
from vpmoe.process.step_worker import StepWorker, scratch_disk
from vpmoe.provenance import Provenance
from vpmoe.storage import Bucket, manifest, paths
from vpmoe.storage.blocks import in_order
from vpmoe.storage.bucket import json_bytes
from vpmoe.storage.manifest import Manifest
from vpmoe.storage.records import load_record
from vpmoe.teacher import model, subset
from vpmoe.teacher.part import ScoredPart
from vpmoe.teacher.scores import (
    PartScores,
    ScoresRef,
    claim_scores,
    done_parts,
    load_scores,
    resolve_all_scores,
    write_scores_manifest,
)

log = logging.getLogger(__name__)

DISK_NEED = "7 bytes for each of its tokens"
"""Scratch space of a part, in addition to the teacher's files."""

REPORT_SECONDS = 60.0
"""Seconds between reports within a part. A part may take most of an hour."""

THREADS = 8
"""Parts whose labels are downloaded at the same time."""


class Teacher(Protocol):
    """A loaded teacher: inference.teacher_engine.TeacherEngine."""

    def score(
        self, sequences: Iterable[Ids], check_stop: Callable[[], None]
    ) -> Iterator[NDArray[np.float32]]: ...


LoadTeacher = Callable[[Path, int], Teacher]
"""Loads a teacher: (directory, maximum length of a sequence in tokens) → teacher."""


class PartLine(MetricsLine):
    """The step's line of metrics for a part of a set of scores."""

    event: str = "part"
    worker: int
    scores: str
    """Id of the set of scores."""
    part: int
    documents: int
    """Documents that were scored."""
    tokens: int
    """Their tokens with a score."""
    seconds: float
    """Time to score the part and to upload it."""
    tokens_per_second: float
    gpu: GpuUse
    """While the part was scored."""

    def samples(self) -> Iterable[Sample]:
        yield Sample(pod_metrics.TOKENS, self.tokens)
        yield Sample(pod_metrics.RESCORE_PART_SECONDS, self.seconds)
        yield from self.gpu.samples()


@dataclass(frozen=True)
class RescoreWorker(StepWorker):
    """One worker of one attempt at the step."""

    dataset: Manifest
    scores: Sequence[ScoresRef]
    load: LoadTeacher
    scratch: Path
    read_gpus: ReadGpus = not_read

    @property
    def parts(self) -> int:
        """Number of training parts of the dataset; each set of scores has as many."""
        return int(self.dataset.facts["parts"])

    @property
    def total(self) -> int:
        return self.parts * len(self.scores)

    def done(self) -> int:
        """Number of parts of all sets that have a record."""
        return sum(len(done_parts(scores, self.bucket)) for scores in self.scores)

    def complete(self) -> bool:
        """Whether every set of scores has its manifest."""
        return all(self.bucket.exists(scores.manifest) for scores in self.scores)

    @cached_property
    def effort(self) -> EffortSubstitution:
        """Puts teacher.effort into the documents' system messages."""
        return EffortSubstitution(
            self.dataset.facts["settings"]["conversation"], self.run.spec.teacher.effort
        )

    @cached_property
    def teacher(self) -> Teacher:
        """The teacher, downloaded and loaded at the first access."""
        self.report("Loading the teacher", self.done(), self.total)
        directory = model.fetch_teacher(self.scores[0].teacher, self.bucket, self.scratch, self.check_stop)
        return self.load(directory, self.dataset.facts["settings"]["maxLength"] + self.effort.extra_tokens)


def rescore(
    run: DistillRun,
    bucket: Bucket,
    provenance: Provenance,
    stopping: threading.Event,
    board: ProgressBoard,
    worker: int | None,
    load_teacher: LoadTeacher,
    scratch: Path,
    read_gpus: ReadGpus = not_read,
) -> list[ScoresRef]:
    """Do this worker's share of the step. Returns the sets of scores that the run's stages train on.

    The teacher's files are downloaded below `scratch` and stay there for later steps. Raises Permanent if the
    configuration, the teacher or the dataset is invalid, StorageError, Retriable if the disk is full,
    Terminated if it was asked to stop.
    """
    dataset = load_dataset(run, bucket)
    job = RescoreWorker(
        run,
        bucket,
        provenance,
        stopping,
        board,
        worker,
        dataset,
        resolve_all_scores(run, bucket, dataset),
        load_teacher,
        scratch,
        read_gpus,
    )
    if job.complete():
        for scores in job.scores:
            load_scores(scores, bucket)
            log.info("Reused: %s is complete", bucket.url(scores.folder))
        job.report_success(
            "Reused" if job.scores else "No stage trains on scores",
            job.total,
            dataset_facts(bucket, dataset),
            reused=bool(job.scores),
        )
        return list(job.scores)
    for scores in job.scores:
        score_missing_parts(job, scores)
    write_manifests(job)
    return list(job.scores)


def score_missing_parts(job: RescoreWorker, scores: ScoresRef) -> None:
    """Make those of this worker's parts of a set of scores that have no record."""
    claim_scores(scores, job.bucket, job.provenance)
    done = done_parts(scores, job.bucket)
    missing = [part for part in job.share(job.parts, job.run.spec.rescoring_gpus) if part not in done]
    if not missing:
        return
    job.report("Picking documents", job.done(), job.total)
    picked = pick_documents(job, scores)
    for part in missing:
        job.check_stop()
        score_part(job, scores, part, picked[part])


def pick_documents(job: RescoreWorker, scores: ScoresRef) -> list[NDArray[np.bool_]]:
    """For each part, which of its documents are scored, [D] bool. Raises Permanent if none is."""
    parts = list(in_order(lambda part: read_labels(job, part), range(job.parts), THREADS))
    picked = subset.pick_documents(parts, scores.subset, scores.dataset)
    documents = sum(int(of_part.sum()) for of_part in picked)
    tokens = sum(
        int(part.assistant_D[of_part].sum(dtype=np.int64))
        for part, of_part in zip(parts, picked, strict=True)
    )
    if not documents:
        raise Permanent(
            "subset: no document is picked. There are no documents of the listed exercises and languages, "
            f"or the first of each group is longer than its share of min(tokens {scores.subset.tokens}, "
            f"fraction {scores.subset.fraction:g} of all). Raise these, or correct the lists; "
            f"{job.bucket.url(job.dataset.key)} has the names."
        )
    log.info(
        f"Scores {job.bucket.url(scores.folder)}: {documents:,} documents picked, {tokens:,} tokens of "
        "reasoning and answers"
    )
    return picked


def read_labels(job: RescoreWorker, part: int) -> subset.DocumentLabels:
    """The labels and lengths of the documents of a part; a part without training documents has no files."""
    job.check_stop()
    subject = job.dataset.subjects.get(f"train/part-{part:05d}.documents.parquet")
    if subject is None:
        return subset.NO_DOCUMENTS
    content = b"".join(job.bucket.blocks(subject))
    return subset.document_labels(
        pq.read_table(pa.BufferReader(content), columns=["language", "exercise", "reasoning", "final"])
    )


def score_part(job: RescoreWorker, scores: ScoresRef, number: int, picked_D: NDArray[np.bool_]) -> None:
    """Score a part's picked documents, upload its files, then its record, which marks the part as done."""
    bucket, metadata, started = (
        job.bucket,
        {**job.provenance.metadata(), "dataset": scores.dataset},
        time.monotonic(),
    )
    with tempfile.TemporaryDirectory(prefix=f"vpmoe-scores-{number:05d}-") as folder:
        with scratch_disk("rescore", DISK_NEED):
            part = ScoredPart(job.dataset, number, picked_D, bucket, Path(folder))
            job.read_gpus()  # what they did before is not the part's
            if picked_D.any():
                score_documents(job, part)
            gpu = job.read_gpus()
            files = part.write()
        entries = []
        for file, path in files.items():
            stored = bucket.put_file(paths.scores_part(scores.id, number, file), path, metadata)
            entries.append(manifest.entry(stored.subject(scores.folder)))
    record = {"part": number, "content": scores.content, **part.counts(), "files": entries}
    tokens, seconds = sum(record["tokens"].values()), time.monotonic() - started
    line = PartLine(
        attempt=job.provenance.attempt,
        worker=job.worker or 0,
        scores=scores.id,
        part=number,
        documents=record["documents"],
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        gpu=gpu,
    )
    write_part_metrics(job, line)  # before the record, after which no attempt comes back to this part
    if not bucket.create(paths.scores_record(scores.id, number), json_bytes(record), metadata):
        raise Permanent(
            f"{bucket.url(paths.scores_record(scores.id, number))}: another writer scored the same part "
            "with other bits, on another kind of machine or with another version of vLLM. Delete this "
            "record and run the step again: only that part is scored again."
        )
    log.info(
        f"Scored part {number}: {record['documents']:,} of {len(picked_D):,} documents scored, {tokens:,} "
        f"supervised tokens, {seconds:,.0f} s"
    )
    job.report(f"Scored part {number}", job.done(), job.total, tokens / seconds if tokens else None)


def write_part_metrics(job: RescoreWorker, line: PartLine) -> None:
    """Write a part's line of metrics."""
    key = paths.metrics(job.run, job.provenance.step, f"{line.scores[:16]}-{line.part:05d}")
    text = json.dumps(line.dump(), allow_nan=False) + "\n"
    job.bucket.put_bytes(key, text.encode(), job.provenance.metadata())
    job.board.metrics.record(line.samples())


def score_documents(job: RescoreWorker, part: ScoredPart) -> None:
    """Score the part's picked documents in order, and report progress every REPORT_SECONDS."""
    teacher, documents = job.teacher, part.picked
    sent = (job.effort.to_teacher(part.ids(document)) for document in documents)
    tokens, since, reported = 0, time.monotonic(), time.monotonic()
    for count, (document, logp_S) in enumerate(
        zip(documents, teacher.score(sent, job.check_stop), strict=True), 1
    ):
        part.add(document, job.effort.from_teacher(part.ids(document), logp_S))
        tokens += len(logp_S)
        if time.monotonic() - reported > REPORT_SECONDS:
            reported = time.monotonic()
            job.report(
                f"Scoring part {part.number}, {count:,} of {len(documents):,} documents",
                job.done(),
                job.total,
                tokens / (reported - since),
            )


def write_manifests(job: RescoreWorker) -> None:
    """Write the manifest of every set that has all records.

    The worker that makes the last part of a set writes its manifest.
    """
    for scores in job.scores:
        if len(done_parts(scores, job.bucket)) == job.parts and not job.bucket.exists(scores.manifest):
            records = [
                load_record(job.bucket, paths.scores_record(scores.id, part), PartScores)
                for part in range(job.parts)
            ]
            made = write_scores_manifest(scores, job.dataset, records, job.provenance, job.bucket)
            means = ", ".join(
                f"{span} {mean:.3f}" for span, mean in made.facts["mean"].items() if mean is not None
            )
            log.info("Complete: %s; mean log-probability: %s", job.bucket.url(scores.folder), means)
    missing = job.total - job.done()
    if missing:
        log.info("This worker has made its parts; %d parts of other workers are missing", missing)
        job.report(f"Waiting for {missing} parts of other workers", job.total - missing, job.total)
    if job.complete():
        job.report_success("Complete", job.total, dataset_facts(job.bucket, job.dataset))
