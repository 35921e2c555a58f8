"""The preprocess step: builds a dataset in the bucket from input shards, with any number of workers that
never wait for each other.

Worker w of W makes the parts i with i ≡ w (mod W). It writes a part's files and then its record, so a worker
that was killed continues with its first part without a record. Any worker that finds all records writes the
manifest. A part's files are in part_writer.py.
"""

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from vpmoe.api import DistillRun
from vpmoe.api.effort import effort_shares
from vpmoe.data.dataset import (
    DatasetRef,
    completed_parts,
    dataset_facts,
    dataset_id,
    dataset_settings,
    recorded_parts,
    release_inputs,
    resolve_dataset,
)
from vpmoe.data.inputs import InputFault
from vpmoe.data.preprocess import census, sampling
from vpmoe.data.preprocess.dataset_manifest import PartRecord, merge_records, summary, write_manifest
from vpmoe.data.preprocess.duplicates import count_duplicates, hashes_bytes
from vpmoe.data.preprocess.encode import (
    CHUNK_ROWS,
    COLUMNS,
    EncoderPool,
    PreprocessContext,
    RowChunk,
    make_chunk,
)
from vpmoe.data.preprocess.part_writer import PartWriter
from vpmoe.data.preprocess.rows import ShardReader
from vpmoe.data.preprocess.text import UnreadableRows
from vpmoe.failure import Permanent
from vpmoe.process.board import ProgressBoard
from vpmoe.process.step_worker import StepWorker, scratch_disk
from vpmoe.provenance import Provenance
from vpmoe.storage import Bucket, manifest, paths
from vpmoe.storage.blocks import in_order
from vpmoe.storage.bucket import json_bytes
from vpmoe.storage.records import load_record

log = logging.getLogger(__name__)

CENSUS_THREADS = 8
"""Records of the census that are fetched at the same time."""

READ_ROWS = 512
"""Rows per read, some 4 MB. Each read costs the datasets library milliseconds."""

ALWAYS_TOLERATED = 5
"""Unreadable rows that never stop the step. In a small input a few rows already exceed the share: one in
fifty is 2 %."""

SCRATCH_PER_PART = "about three times its tokens' 4 bytes"
"""Space that a part needs on the scratch disk."""


@dataclass(frozen=True)
class PreprocessWorker(StepWorker):
    """One worker's view of the step."""

    dataset: DatasetRef

    @property
    def parts(self) -> int:
        """Parts of the dataset."""
        return len(self.dataset.inputs.shards)

    def own_parts(self) -> range:
        """The parts that this worker makes."""
        return self.share(self.parts, self.run.spec.dataset.workers)


def preprocess(
    run: DistillRun,
    bucket: Bucket,
    provenance: Provenance,
    stopping: threading.Event,
    board: ProgressBoard,
    index: int | None,
    encoders: EncoderPool,
) -> DatasetRef:
    """Do this worker's share of the step. `encoders` encode; this process reads and writes. Returns the
    dataset.

    `index` is the worker's index, None for a single worker that makes all parts. Raises Permanent for a fault
    of the input or the configuration, StorageError, Retriable for a full disk or a killed process, Terminated
    if it was asked to stop.
    """
    worker = PreprocessWorker(run, bucket, provenance, stopping, board, index, resolve_dataset(run, bucket))
    if bucket.exists(worker.dataset.manifest):
        log.info("Reusing dataset %s, which is complete", bucket.url(worker.dataset.folder))
        report_success(worker, "Reused", reused=True)
        return worker.dataset
    check_writer(worker)
    log.info(
        "Building dataset %s: %d parts from %s",
        bucket.url(worker.dataset.folder),
        worker.parts,
        worker.dataset.inputs.source,
    )
    encoders.start()
    try:
        counted = count_rows(worker)
        context = make_context(worker, counted)
        make_parts(worker, encoders, context, allowed_unreadable(run, counted.rows))
        finish(worker, context, counted.rows)
    except InputFault:
        release_inputs(run, bucket, worker.dataset)
        raise
    return worker.dataset


def check_writer(worker: PreprocessWorker) -> None:
    """Raise Permanent if this code would build a dataset with another id than the run's: parts of two
    datasets must not be mixed."""
    ours = dataset_id(dataset_settings(worker.run), worker.dataset.inputs)
    if ours != worker.dataset.id:
        raise Permanent(
            f"{worker.bucket.url(paths.inputs(worker.run))}: the run began dataset {worker.dataset.id}, but "
            "this code "
            f"builds dataset {ours}: its writer or tokenizer has changed. Continue with the image that the "
            "run began with, or start a new run."
        )


def count_rows(worker: PreprocessWorker) -> census.Census:
    """The census of all shards. Counts this worker's own shards first, then those that no other worker has
    counted. Raises InputFault for the first shard that cannot be used."""
    report(worker, "Counting rows")
    bucket, dataset, own = worker.bucket, worker.dataset, worker.own_parts()
    others = [part for part in range(worker.parts) if part not in own]
    for parts, shared in ((own, False), (others, True)):
        counted = recorded_parts(bucket, paths.census(dataset.id, 0))
        for part in parts:
            worker.check_stop()
            key = paths.census(dataset.id, part)
            if part in counted or (shared and bucket.exists(key)):
                continue
            found = census.count_shard(dataset.inputs.shards[part], bucket)
            bucket.create(key, json_bytes(found.as_json()), worker.provenance.metadata())

    def stored(part: int) -> census.Census:
        worker.check_stop()
        return load_record(bucket, paths.census(dataset.id, part), census.StoredCensus).restored()

    merged = census.merge_censuses(in_order(stored, range(worker.parts), CENSUS_THREADS))
    for name, files in merged.absent.items():
        if files < worker.parts:
            log.warning(
                "%d of %d files have no column %s: it is null in all their rows", files, worker.parts, name
            )
    return merged


def make_context(worker: PreprocessWorker, counted: census.Census) -> PreprocessContext:
    """The settings for all parts, the same in each worker. Raises Permanent if sampling would keep no row."""
    spec = worker.run.spec.dataset
    bounds = spec.sampling
    thresholds = sampling.choose_thresholds(
        counted.rows_4B, bounds.keep, bounds.memorization_max, bounds.non_english_max
    )
    kept = ", ".join(f"{name} {share:.1%}" for name, share in thresholds.shares().items())
    log.info("The input has %d rows. Kept shares: %s", counted.rows, kept)
    return PreprocessContext(
        worker.dataset.id, spec.conversation, spec.max_length, spec.valid_fraction, thresholds
    )


def make_parts(
    worker: PreprocessWorker, encoders: EncoderPool, context: PreprocessContext, allowed: int
) -> None:
    """Make this worker's parts that have no record. A part is written and uploaded while the next ones are
    encoded.

    Raises Permanent if a shard has more than `allowed` unreadable rows.
    """
    done = completed_parts(worker.dataset, worker.bucket)
    missing = [part for part in worker.own_parts() if part not in done]
    # Parts that are being read or encoded, in order. Few, because reading is only some chunks ahead.
    opened: dict[int, PartWriter] = {}
    with ThreadPoolExecutor(1) as storing:
        stored = storing.submit(lambda: None)
        mark = time.monotonic()

        def store(number: int) -> None:
            nonlocal stored, mark
            stored.result()
            seconds, mark = time.monotonic() - mark, time.monotonic()
            stored = storing.submit(store_part, worker, number, opened.pop(number), seconds)

        try:
            for encoded in encoders.encode(read_parts(worker, missing, opened, allowed), context):
                for number in [number for number in opened if number < encoded.part]:
                    store(number)
                with scratch_disk("preprocess", SCRATCH_PER_PART):
                    opened[encoded.part].add(encoded)
                log_unreadable(worker, encoded.part, opened[encoded.part], allowed)
            for number in list(opened):
                store(number)
            stored.result()
        finally:
            for part in opened.values():
                part.discard()


def read_parts(
    worker: PreprocessWorker, numbers: list[int], opened: dict[int, PartWriter], allowed: int
) -> Iterator[RowChunk]:
    """The chunks of some shards, one shard after the other. Each part is added to `opened` before its shard
    is read."""
    drawn_efforts = len(effort_shares(worker.run.spec.dataset.conversation.effort)) > 1
    for number in numbers:
        shard = worker.dataset.inputs.shards[number]
        reader = ShardReader(shard, worker.bucket, COLUMNS)
        with scratch_disk("preprocess", SCRATCH_PER_PART):
            opened[number] = part = PartWriter(number, drawn_efforts=drawn_efforts)
        for batch in reader.batches(READ_ROWS):
            worker.check_stop()
            if isinstance(batch, UnreadableRows):
                part.skip_rows(batch)
                log_unreadable(worker, number, part, allowed)
                continue
            for first in range(0, batch.columns.num_rows, CHUNK_ROWS):
                yield make_chunk(
                    number, shard.key, batch.first + first, batch.columns.slice(first, CHUNK_ROWS)
                )


def log_unreadable(worker: PreprocessWorker, number: int, part: PartWriter, allowed: int) -> None:
    """Log the unreadable rows of a part that are not logged yet. Raises Permanent if the part has more than
    `allowed`."""
    shard = worker.dataset.inputs.shards[number]
    for rows in part.take_unlogged():
        log.warning(
            "%s: rows [%d, %d) (from 0) cannot be read: %s", shard.url, rows.first, rows.stop, rows.reason
        )
    if part.unreadable_rows > allowed:
        last = part.unreadable[-1]
        raise too_many_unreadable(
            part.unreadable_rows,
            allowed,
            f"{shard.url}, the last of them row {last.stop - 1}, from 0: {last.reason}",
        )


def store_part(worker: PreprocessWorker, number: int, part: PartWriter, seconds: float) -> None:
    """Write a part's files, upload them, then write its record, which completes the part. `seconds` is its
    encoding time."""
    dataset, bucket, metadata = (
        worker.dataset,
        worker.bucket,
        {**worker.provenance.metadata(), "dataset": worker.dataset.id},
    )
    try:
        entries = []
        with scratch_disk("preprocess", SCRATCH_PER_PART):
            written = part.write()
        for split, files in written.items():
            for file, path in files.items():
                stored = bucket.put_file(paths.dataset_part(dataset.id, split, number, file), path, metadata)
                entries.append(manifest.entry(stored.subject(dataset.folder)))
    finally:
        part.discard()
    bucket.put_bytes(paths.document_hashes(dataset.id, number), hashes_bytes(part.hashes_2D()), metadata)
    record = {"part": number, "shard": dataset.inputs.shards[number].url, **part.counts(), "files": entries}
    if not bucket.create(paths.part_record(dataset.id, number), json_bytes(record), metadata):
        raise Permanent(
            f"{bucket.url(paths.part_record(dataset.id, number))}: another worker wrote different bytes for "
            "the same "
            "input, so the versions of the libraries differ. Delete the dataset's folder and build it with "
            "one image."
        )
    tokens = sum(facts["tokens"] for facts in record["splits"].values())
    kept = sum(facts["documents"] for facts in record["splits"].values())
    log.info(
        f"Part {number}: {kept:,} of {part.rows:,} rows kept, {tokens:,} tokens, {tokens / seconds:,.0f} "
        "tokens/s"
    )
    report(worker, f"Part {number} done", tokens / seconds)


def allowed_unreadable(run: DistillRun, rows: int) -> int:
    """Maximum number of unreadable rows; with more, the input is rejected."""
    return max(ALWAYS_TOLERATED, int(run.spec.dataset.unreadable_max * rows))


def too_many_unreadable(found: int, allowed: int, where: str) -> InputFault:
    return InputFault(
        f"dataset.source: {found} rows cannot be read ({where}), more than the {allowed} that "
        "dataset.unreadableMax allows. Write the files again or remove them, and start the step again (in a "
        "cluster raise runtime.attempts): it then lists dataset.source again, and makes all parts again. Or "
        "exclude the files from dataset.source or raise dataset.unreadableMax in a new run."
    )


def finish(worker: PreprocessWorker, context: PreprocessContext, rows: int) -> None:
    """Write the manifest if all parts have a record; otherwise another worker will."""
    dataset, bucket = worker.dataset, worker.bucket
    missing = worker.parts - len(completed_parts(dataset, bucket))
    if missing:
        log.info("All parts of this worker are done; %d parts of other workers are missing", missing)
        report(worker, f"Waiting for {missing} parts of other workers")
        if bucket.exists(dataset.manifest):
            report_success(worker, "Complete")
        return
    records = [
        load_record(bucket, paths.part_record(dataset.id, part), PartRecord) for part in range(worker.parts)
    ]
    facts = merge_records(records, dataset.inputs.shards)
    if facts["unreadable"]["rows"] > allowed_unreadable(worker.run, rows):
        raise too_many_unreadable(
            facts["unreadable"]["rows"], allowed_unreadable(worker.run, rows), "in all shards together"
        )
    if not facts["documents"]:
        raise InputFault(
            f"dataset.source: all {facts['rows']} rows were dropped: {facts['dropped']}, "
            f"{facts['unreadable']['rows']} unreadable."
        )
    with scratch_disk("preprocess", SCRATCH_PER_PART):
        facts["duplicates"] = count_duplicates(dataset.id, worker.parts, bucket, worker.check_stop)
    write_manifest(
        dataset, dataset_settings(worker.run), context.thresholds, facts, records, worker.provenance, bucket
    )
    log.info("The dataset is complete: %s", summary(facts))
    unreadable = facts["unreadable"]["rows"]
    report_success(worker, f"Complete; unreadable rows: {unreadable:,}" if unreadable else "Complete")


def report(worker: PreprocessWorker, message: str, speed: float | None = None) -> None:
    """Report the step's progress."""
    worker.report(message, len(completed_parts(worker.dataset, worker.bucket)), worker.parts, speed)


def report_success(worker: PreprocessWorker, message: str, reused: bool = False) -> None:
    """Report that the dataset is complete, with its id and manifest."""
    made = manifest.load(worker.bucket, worker.dataset.manifest)
    facts = dataset_facts(worker.bucket, made)
    worker.report_success(message, worker.parts, facts, reused=reused)
