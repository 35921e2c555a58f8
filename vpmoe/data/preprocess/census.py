"""Counts the rows of an input shard by class and hash bin. The sampling thresholds are computed from these
counts (sampling.py).

Only a shard's metadata columns are read, but its footer is checked for all columns. The result is stored next
to the dataset, so each shard is counted once, by any worker, before any part is built.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from vpmoe.data.inputs import InputShard
from vpmoe.data.preprocess.encode import row_identity
from vpmoe.data.preprocess.rows import METADATA, ShardReader
from vpmoe.data.preprocess.sampling import BINS, Histogram, hash_bin, row_class
from vpmoe.data.preprocess.text import UnreadableRows, decode_columns
from vpmoe.storage import Bucket

BATCH_ROWS = 4096


@dataclass(frozen=True)
class Census:
    """Row counts of a shard, or of several."""

    rows: int
    """All rows, including those in damaged row groups."""
    rows_4B: Histogram
    """Readable rows by class and hash bin."""
    absent: Counter[str] = field(default_factory=Counter)
    """Number of files that lack a nullable column, by column."""

    def as_json(self) -> dict[str, Any]:
        """The counts as JSON; only non-empty bins, as [bin, rows] pairs for each class."""
        return {
            "rows": self.rows,
            **({"absent": dict(self.absent)} if self.absent else {}),
            "bins": [[[int(b), int(row[b])] for b in np.flatnonzero(row)] for row in self.rows_4B],
        }


@dataclass(frozen=True)
class StoredCensus:
    """A census as it is stored: `Census.as_json`."""

    rows: Annotated[int, Field(ge=0)]
    bins: Annotated[
        list[list[tuple[Annotated[int, Field(ge=0, lt=BINS)], Annotated[int, Field(ge=0, lt=1 << 53)]]]],
        Field(min_length=4, max_length=4),
    ]
    absent: dict[str, Annotated[int, Field(ge=0)]] = field(default_factory=dict)

    def restored(self) -> Census:
        """The counts."""
        histogram = empty_histogram()
        for number, pairs in enumerate(self.bins):
            for which, count in pairs:
                histogram[number, which] = count
        return Census(self.rows, histogram, Counter(self.absent))


def count_shard(shard: InputShard, bucket: Bucket) -> Census:
    """Count one shard. A row whose metadata is not text counts as class 0. Raises what ShardReader raises."""
    reader = ShardReader(shard, bucket, METADATA)
    histogram = empty_histogram()
    for batch in reader.batches(BATCH_ROWS):
        if isinstance(batch, UnreadableRows):
            continue
        columns = decode_columns(batch.columns, METADATA).columns
        values = zip(*(columns[name] for name in METADATA), strict=True)
        for row, (synth_id, language, exercise) in enumerate(values, batch.first):
            histogram[row_class(language, exercise), hash_bin(row_identity(synth_id, shard.key, row))] += 1
    return Census(reader.rows, histogram, Counter(reader.absent))


def merge_censuses(counted: Iterable[Census]) -> Census:
    """The sum over all shards."""
    rows, histogram, absent = 0, empty_histogram(), Counter[str]()
    for census in counted:
        rows += census.rows
        histogram += census.rows_4B
        absent += census.absent
    return Census(rows, histogram, absent)


def empty_histogram() -> Histogram:
    """All counts 0."""
    return np.zeros((4, BINS), dtype=np.int64)
