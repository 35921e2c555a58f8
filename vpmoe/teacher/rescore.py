"""The rescoring step: a data set and a teacher in, scores in the bucket out, by any number of workers that never wait for one another.

Worker w of W makes the parts i ≡ w (mod W) of every set of scores that the run's stages ask for, each one whole and then its record, so
a killed worker goes on at its first part without a record. Whoever finds all records writes the manifest. The teacher is loaded when the
first picked document is met, and not at all where there is nothing to do. What is in a part is part.py's business.
"""

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

from vpmoe.api import DistillRun
from vpmoe.data.dataset import dataset_facts, load_dataset
from vpmoe.data.system_message import EffortSubstitution
from vpmoe.data.tokenizer import Ids
from vpmoe.failure import Permanent
from vpmoe.process.step_worker import StepWorker, scratch_disk
from vpmoe.provenance import Provenance
from vpmoe.storage import Bucket, manifest, paths
from vpmoe.storage.blocks import in_order
from vpmoe.storage.bucket import json_bytes
from vpmoe.storage.manifest import Manifest
from vpmoe.teacher import model, subset
from vpmoe.teacher.part import ScoredPart
from vpmoe.teacher.scores import (
    ScoresRef,
    claim_scores,
    done_parts,
    load_scores,
    resolve_all_scores,
    write_scores_manifest,
)

log = logging.getLogger(__name__)

DISK_NEED = "7 bytes for each of its tokens"
"""What a part takes of the scratch disk, beside the teacher's own files."""

REPORT_SECONDS = 60.0
"""Seconds between reports within a part, which may take most of an hour."""

THREADS = 8
"""Documents' labels that are fetched at the same time."""


class Teacher(Protocol):
    """A teacher that is loaded: scorer.Scorer."""

    def score(
        self, sequences: Iterable[Ids], check_stop: Callable[[], None]
    ) -> Iterator[NDArray[np.float32]]: ...


LoadTeacher = Callable[[Path, int], Teacher]
"""How a teacher is loaded, from its directory and the longest sequence that it will be given."""


@dataclass(frozen=True)
class RescoreWorker(StepWorker):
    """One worker's view of the step."""

    dataset: Manifest
    scores: Sequence[ScoresRef]
    load: LoadTeacher
    scratch: Path

    @property
    def parts(self) -> int:
        """Training parts of the data set, of which every set of scores has its own."""
        return int(self.dataset.facts["parts"])

    @property
    def total(self) -> int:
        return self.parts * len(self.scores)

    def done(self) -> int:
        """Parts of all sets that have a record."""
        return sum(len(done_parts(scores, self.bucket)) for scores in self.scores)

    def complete(self) -> bool:
        """Whether every set of scores has its manifest."""
        return all(self.bucket.exists(scores.manifest) for scores in self.scores)

    @cached_property
    def effort(self) -> EffortSubstitution:
        """How documents are put to the teacher."""
        return EffortSubstitution(
            self.dataset.facts["settings"]["conversation"], self.run.spec.teacher.effort
        )

    @cached_property
    def teacher(self) -> Teacher:
        """The teacher, fetched and loaded when it is first asked for."""
        self.report("Loading the teacher", self.done(), self.total)
        directory = model.fetch_teacher(self.scores[0].teacher, self.bucket, self.scratch, self.check_stop)
        return self.load(directory, self.dataset.facts["settings"]["maxLength"] + self.effort.extra_tokens)


def rescore(
    run: DistillRun,
    bucket: Bucket,
    provenance: Provenance,
    stopping: threading.Event,
    worker: int | None,
    load_teacher: LoadTeacher,
    scratch: Path,
) -> list[ScoresRef]:
    """Do this worker's share of the step. Returns the sets of scores that the run's stages train on.

    The teacher's files are brought below `scratch`, and stay there for whoever asks next. Raises Permanent where the configuration, the
    teacher or the data set is at fault, StorageError, Retriable for a full disk, Terminated where it was asked to stop.
    """
    dataset = load_dataset(run, bucket)
    job = RescoreWorker(
        run,
        bucket,
        provenance,
        stopping,
        worker,
        dataset,
        resolve_all_scores(run, bucket, dataset),
        load_teacher,
        scratch,
    )
    if job.complete():
        for scores in job.scores:
            load_scores(scores, bucket)
            log.info("Reused: %s is complete", bucket.url(scores.folder))
        job.report_success(
            "Reused" if job.scores else "No stage trains on scores", job.total, dataset_facts(bucket, dataset)
        )
        return list(job.scores)
    for scores in job.scores:
        score_missing_parts(job, scores)
    write_manifests(job)
    return list(job.scores)


def score_missing_parts(job: RescoreWorker, scores: ScoresRef) -> None:
    """Make this worker's parts of a set of scores that have no record."""
    claim_scores(scores, job.bucket, job.provenance)
    done = done_parts(scores, job.bucket)
    missing = [part for part in job.share(job.parts, job.run.spec.teacher.gpus) if part not in done]
    if not missing:
        return
    job.report("Picking documents", job.done(), job.total)
    picked = pick_documents(job, scores)
    for part in missing:
        job.check_stop()
        score_part(job, scores, part, picked[part])


def pick_documents(job: RescoreWorker, scores: ScoresRef) -> list[NDArray[np.bool_]]:
    """For each part, which of its documents are scored. Raises Permanent where none is."""
    parts = list(in_order(lambda part: read_labels(job, part), range(job.parts), THREADS))
    picked = subset.pick_documents(parts, scores.subset, scores.dataset)
    documents = sum(int(of_part.sum()) for of_part in picked)
    tokens = sum(
        int(part.assistant_D[of_part].sum(dtype=np.int64))
        for part, of_part in zip(parts, picked, strict=True)
    )
    if not documents:
        raise Permanent(
            f"subset: no document is picked. There is none of the exercises and languages listed, or the first of each is longer than its "
            f"share of min(tokens {scores.subset.tokens}, fraction {scores.subset.fraction:g} of all). Raise these, or correct the lists; "
            f"{job.bucket.url(job.dataset.key)} has the names."
        )
    log.info(
        f"Scores {job.bucket.url(scores.folder)}: {documents:,} documents picked, {tokens:,} tokens of reasoning and answers"
    )
    return picked


def read_labels(job: RescoreWorker, part: int) -> subset.DocumentLabels:
    """What picking looks at of one part."""
    job.check_stop()
    content = b"".join(job.bucket.blocks(job.dataset.subjects[f"train/part-{part:05d}.documents.parquet"]))
    return subset.document_labels(
        pq.read_table(pa.BufferReader(content), columns=["language", "exercise", "reasoning", "final"])
    )


def score_part(job: RescoreWorker, scores: ScoresRef, number: int, picked_D: NDArray[np.bool_]) -> None:
    """Score a part's picked documents, upload its files, then its record: with that it is done."""
    bucket, metadata, started = (
        job.bucket,
        {**job.provenance.metadata(), "dataset": scores.dataset},
        time.monotonic(),
    )
    with tempfile.TemporaryDirectory(prefix=f"vpmoe-scores-{number:05d}-") as folder:
        with scratch_disk("rescore", DISK_NEED):
            part = ScoredPart(job.dataset, number, picked_D, bucket, Path(folder))
            if picked_D.any():
                score_documents(job, part)
            files = part.write()
        entries = []
        for file, path in files.items():
            stored = bucket.put_file(paths.scores_part(scores.id, number, file), path, metadata)
            entries.append(manifest.entry(stored.subject(scores.folder)))
    record = {"part": number, "content": scores.content, **part.facts(), "files": entries}
    if not bucket.create(paths.scores_record(scores.id, number), json_bytes(record), metadata):
        raise Permanent(
            f"{bucket.url(paths.scores_record(scores.id, number))}: another writer scored the same part with other bits, on another kind "
            "of machine or with another version of vLLM. Delete this record and run the step again: only that part is made anew."
        )
    tokens, seconds = sum(record["tokens"].values()), time.monotonic() - started
    log.info(
        f"Part {number}: {record['documents']:,} of {len(picked_D):,} documents scored, {tokens:,} supervised tokens, {seconds:,.0f} s"
    )
    job.report(f"Part {number} done", job.done(), job.total, tokens / seconds if tokens else None)


def score_documents(job: RescoreWorker, part: ScoredPart) -> None:
    """Score the part's picked documents, in its order, and say from time to time how far that is."""
    teacher, documents = job.teacher, part.picked
    sent = (job.effort.to_teacher(part.ids(document)) for document in documents)
    tokens, since, reported = 0, time.monotonic(), time.monotonic()
    for count, (document, logp_S) in enumerate(
        zip(documents, teacher.score(sent, job.check_stop), strict=True), 1
    ):
        part.add(document, job.effort.from_teacher(logp_S))
        tokens += len(logp_S)
        if time.monotonic() - reported > REPORT_SECONDS:
            reported = time.monotonic()
            job.report(
                f"Part {part.number}: {count:,} of {len(documents):,} documents",
                job.done(),
                job.total,
                tokens / (reported - since),
            )


def write_manifests(job: RescoreWorker) -> None:
    """Write the manifests of the sets whose records are all there; of the others another worker will."""
    for scores in job.scores:
        if len(done_parts(scores, job.bucket)) == job.parts and not job.bucket.exists(scores.manifest):
            records = [job.bucket.get_json(paths.scores_record(scores.id, part)) for part in range(job.parts)]
            made = write_scores_manifest(scores, job.dataset, records, job.provenance, job.bucket)
            means = ", ".join(
                f"{span} {mean:.3f}" for span, mean in made.facts["mean"].items() if mean is not None
            )
            log.info("Complete: %s; mean log-probability: %s", job.bucket.url(scores.folder), means)
    missing = job.total - job.done()
    if missing:
        log.info("This worker's parts are done; others make %d more", missing)
        job.report(f"{missing} parts missing", job.total - missing, job.total)
    if job.complete():
        job.report_success("Complete", job.total, dataset_facts(job.bucket, job.dataset))
