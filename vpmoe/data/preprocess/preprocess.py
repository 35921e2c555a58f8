"""The preprocessing step: input shards in, a data set in the bucket out, by any number of workers that never wait for one another.

Worker w of W makes the parts i ≡ w (mod W), each one whole and then its record, so a killed worker goes on at its first part
without a record. Whoever finds all records there writes the manifest. What is in a part is part.py's business.
"""

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from vpmoe.api import DistillRun
from vpmoe.data.dataset import DatasetRef, dataset_facts, dataset_id, done_parts, resolve, settings
from vpmoe.data.harmony import SystemMessage
from vpmoe.data.preprocess import census, sampling
from vpmoe.data.preprocess.dataset_manifest import merge, write_manifest
from vpmoe.data.preprocess.encode import CHUNK_ROWS, COLUMNS, Chunk, Encoders, Recipe, chunk
from vpmoe.data.preprocess.part import Part
from vpmoe.data.preprocess.rows import ShardReader
from vpmoe.data.preprocess.text import Unreadable
from vpmoe.failure import Permanent
from vpmoe.process.step_worker import StepWorker, scratch_disk
from vpmoe.provenance import Provenance
from vpmoe.storage import Bucket, manifest, paths
from vpmoe.storage.bucket import json_bytes

log = logging.getLogger(__name__)

READ_ROWS = 512
"""Rows that are read at once, some 4 MB; each reading costs the datasets library milliseconds."""

TOLERATED = 5
"""Unreadable rows that never stop preprocessing, however small the input: one in a sample of fifty is already 2 %."""


NEEDS = "about three times its tokens' 4 bytes"
"""What a part takes of the scratch disk."""


@dataclass(frozen=True)
class Job(StepWorker):
    """One worker's view of the step."""

    dataset: DatasetRef

    @property
    def parts(self) -> int:
        return len(self.dataset.inputs.shards)

    def mine(self) -> range:
        """The parts that are this worker's to make."""
        return self.share(self.parts, self.run.spec.dataset.workers)


def preprocess(
    run: DistillRun,
    bucket: Bucket,
    provenance: Provenance,
    stopping: threading.Event,
    worker: int | None,
    encoders: Encoders,
) -> DatasetRef:
    """Do this worker's share of the step; the processes of `encoders` encode, this one reads and writes. Returns the data set.

    Raises Permanent where the input or the configuration is at fault, StorageError, Retriable for a full disk or a killed process,
    Terminated where it was asked to stop.
    """
    job = Job(run, bucket, provenance, stopping, worker, resolve(run, bucket))
    if bucket.exists(job.dataset.manifest):
        log.info("Reused: %s is complete", bucket.url(job.dataset.folder))
        report_success(job, "Reused")
        return job.dataset
    check_writer(job)
    log.info(
        "Data set %s: %d parts from %s", bucket.url(job.dataset.folder), job.parts, job.dataset.inputs.source
    )
    encoders.start()
    counted = count(job)
    recipe = make_recipe(job, counted)
    make_parts(job, encoders, recipe, allowed_unreadable(run, counted.rows))
    finish(job, recipe, counted.rows)
    return job.dataset


def check_writer(job: Job) -> None:
    """Raise Permanent where this code would make another data set of the input than the run was resolved to, and so mix two in one."""
    ours = dataset_id(settings(job.run), job.dataset.inputs)
    if ours != job.dataset.id:
        raise Permanent(
            f"{job.bucket.url(paths.inputs(job.run))}: the run began the data set {job.dataset.id}, of which this code would make {ours}: "
            "its writer or tokenizer changed since. Go on with the image that the run began with, or start a new run."
        )


def count(job: Job) -> census.Census:
    """The census of all shards: this worker's own first, then what no other worker has counted yet."""
    report(job, "Counting rows")
    order = [*job.mine(), *(part for part in range(job.parts) if part not in job.mine())]
    counted = []
    for part in order:
        job.check_stop()
        key = paths.census(job.dataset.id, part)
        if job.bucket.exists(key):
            counted.append(census.Census.from_json(job.bucket.get_json(key)))
            continue
        counted.append(census.take(job.dataset.inputs.shards[part], job.bucket))
        job.bucket.create(key, json_bytes(counted[-1].as_json()), job.provenance.metadata())
    return census.total(counted)


def make_recipe(job: Job, counted: census.Census) -> Recipe:
    """What all workers make the parts by, the same for each of them. Raises Permanent where sampling would keep nothing."""
    spec = job.run.spec.dataset
    bounds = spec.sampling
    thresholds = sampling.thresholds(
        counted.rows_4B, bounds.keep, bounds.memorization_max, bounds.non_english_max
    )
    kept = ", ".join(f"{name} {share:.1%}" for name, share in thresholds.facts().items())
    log.info("%d rows; kept are: %s", counted.rows, kept)
    said = spec.conversation
    setting = SystemMessage(said.identity, said.knowledge_cutoff, said.date, said.effort)
    return Recipe(job.dataset.id, setting, spec.max_length, spec.valid_fraction, thresholds)


def make_parts(job: Job, encoders: Encoders, recipe: Recipe, allowed: int) -> None:
    """Make this worker's parts that have no record. Encoding never pauses: the chunks of one part follow those of another, and a
    part is written and uploaded while the next are encoded. Raises Permanent above `allowed` unreadable rows in one shard.
    """
    done = done_parts(job.dataset, job.bucket)
    missing = [part for part in job.mine() if part not in done]
    opened: dict[
        int, Part
    ] = {}  # read from or encoded, in order; few, since reading is only some chunks ahead
    with ThreadPoolExecutor(1) as storing:
        stored = storing.submit(lambda: None)
        mark = time.monotonic()

        def store(number: int) -> None:
            nonlocal stored, mark
            stored.result()
            seconds, mark = time.monotonic() - mark, time.monotonic()
            stored = storing.submit(store_part, job, number, opened.pop(number), seconds)

        try:
            for encoded in encoders.encode(read_parts(job, missing, opened, allowed), recipe):
                for number in [number for number in opened if number < encoded.part]:
                    store(number)
                with scratch_disk("preprocess", NEEDS):
                    opened[encoded.part].add(encoded)
                name_unreadable(job, encoded.part, opened[encoded.part], allowed)
            for number in list(opened):
                store(number)
            stored.result()
        finally:
            for part in opened.values():
                part.discard()


def read_parts(job: Job, numbers: list[int], opened: dict[int, Part], allowed: int) -> Iterator[Chunk]:
    """The chunks of some shards, one shard after the other; each is entered into `opened` when its reading begins."""
    for number in numbers:
        shard = job.dataset.inputs.shards[number]
        reader = ShardReader(shard, job.bucket, COLUMNS)
        with scratch_disk("preprocess", NEEDS):
            opened[number] = part = Part(number)
        for batch in reader.batches(READ_ROWS):
            job.check_stop()
            if isinstance(batch, Unreadable):
                part.skip(batch)
                name_unreadable(job, number, part, allowed)
                continue
            for first in range(0, batch.columns.num_rows, CHUNK_ROWS):
                yield chunk(number, shard.name, batch.first + first, batch.columns.slice(first, CHUNK_ROWS))


def name_unreadable(job: Job, number: int, part: Part, allowed: int) -> None:
    """Log a part's unreadable rows that have not been logged yet. Raises Permanent where there are more than `allowed`."""
    shard = job.dataset.inputs.shards[number]
    for found in part.unnamed():
        log.warning(
            "%s: rows [%d, %d) (from 0) cannot be read: %s", shard.url, found.first, found.stop, found.why
        )
    if part.unreadable_rows > allowed:
        raise too_many_unreadable(
            part.unreadable_rows, allowed, f"{shard.url}, last row {part.unreadable[-1].first}"
        )


def store_part(job: Job, number: int, part: Part, seconds: float) -> None:
    """Write a part's files, upload them, then its record: with that it is done. `seconds` is what its encoding took."""
    dataset, bucket, metadata = (
        job.dataset,
        job.bucket,
        {**job.provenance.metadata(), "dataset": job.dataset.id},
    )
    try:
        entries = []
        with scratch_disk("preprocess", NEEDS):
            written = part.write()
        for split, files in written.items():
            for file, path in files.items():
                stored = bucket.put_file(paths.dataset_part(dataset.id, split, number, file), path, metadata)
                entries.append(manifest.entry(stored.subject(dataset.folder)))
    finally:
        part.discard()
    record = {"part": number, "shard": dataset.inputs.shards[number].url, **part.facts(), "files": entries}
    if not bucket.create(paths.part_record(dataset.id, number), json_bytes(record), metadata):
        raise Permanent(
            f"{bucket.url(paths.part_record(dataset.id, number))}: another writer made different bytes of the same input. The libraries' "
            "versions differ between the two; delete the data set's folder and build it with one image."
        )
    tokens = sum(facts["tokens"] for facts in record["splits"].values())
    kept = sum(facts["documents"] for facts in record["splits"].values())
    log.info(
        f"Part {number}: {kept:,} of {part.rows:,} rows kept, {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s"
    )
    report(job, f"Part {number} done", tokens / seconds)


def allowed_unreadable(run: DistillRun, rows: int) -> int:
    """Unreadable rows above which the input is refused."""
    return max(TOLERATED, int(run.spec.dataset.unreadable_max * rows))


def too_many_unreadable(found: int, allowed: int, where: str) -> Permanent:
    return Permanent(
        f"dataset.source: {found} rows cannot be read ({where}), more than the {allowed} that dataset.unreadableMax allows. "
        "Repair or leave out the files, or raise dataset.unreadableMax."
    )


def finish(job: Job, recipe: Recipe, rows: int) -> None:
    """Write the manifest where all records are there; otherwise another worker will."""
    dataset, bucket = job.dataset, job.bucket
    missing = job.parts - len(done_parts(dataset, bucket))
    if missing:
        log.info("This worker's parts are done; others make %d more", missing)
        report(job, f"{missing} parts missing")
        if bucket.exists(dataset.manifest):
            report_success(job, "Complete")
        return
    records = [bucket.get_json(paths.part_record(dataset.id, part)) for part in range(job.parts)]
    facts = merge(records, dataset.inputs.shards)
    if facts["unreadable"]["rows"] > allowed_unreadable(job.run, rows):
        raise too_many_unreadable(
            facts["unreadable"]["rows"], allowed_unreadable(job.run, rows), "in all shards together"
        )
    if not facts["documents"]:
        raise Permanent(f"dataset.source: none of {facts['rows']} rows is left. Dropped: {facts['dropped']}.")
    write_manifest(dataset, settings(job.run), recipe.thresholds, records, job.provenance, bucket)
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in facts["dropped"].items()) or "none"
    log.info(
        f"Complete: {facts['documents']:,} documents, {facts['tokens']:,} tokens; rows dropped: {dropped}"
    )
    report_success(job, "Complete")


def report(job: Job, message: str, speed: float | None = None) -> None:
    """Say how far the step is."""
    job.report(message, len(done_parts(job.dataset, job.bucket)), job.parts, speed)


def report_success(job: Job, message: str) -> None:
    """Say that the data set is complete, and which it is."""
    made = manifest.load(job.bucket, job.dataset.manifest)
    facts = dataset_facts(job.bucket, made)
    job.report_success(message, job.parts, facts)
