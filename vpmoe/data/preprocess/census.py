"""How many rows of each class an input shard has, by hash bin: what sampling thresholds follow from.

Only a shard's metadata columns are read. The result lies in the bucket beside the data set, so each shard is counted once, whoever
does it. What thresholds follow from all shards' counts is sampling.py's business.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vpmoe.data.inputs import Shard
from vpmoe.data.preprocess.encode import identity
from vpmoe.data.preprocess.rows import METADATA, ShardReader
from vpmoe.data.preprocess.sampling import BINS, Histogram, hash_bin, row_class
from vpmoe.data.preprocess.text import Unreadable, decode
from vpmoe.storage import Bucket

BATCH_ROWS = 4096


@dataclass(frozen=True)
class Census:
    """Rows of a shard, those in damaged row groups included, and the readable ones by class and hash bin."""

    rows: int
    rows_4B: Histogram

    def as_json(self) -> dict[str, Any]:
        """Bins with rows only: [bin, rows] pairs of each class."""
        return {
            "rows": self.rows,
            "bins": [[[int(b), int(row[b])] for b in np.flatnonzero(row)] for row in self.rows_4B],
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Census":
        histogram = empty()
        for number, pairs in enumerate(found["bins"]):
            for which, count in pairs:
                histogram[number, which] = count
        return cls(found["rows"], histogram)


def take(shard: Shard, bucket: Bucket) -> Census:
    """Count one shard. Raises what ShardReader raises; a row whose metadata is not text counts as of no class, as does its text later."""
    reader = ShardReader(shard, bucket, METADATA)
    histogram = empty()
    for batch in reader.batches(BATCH_ROWS):
        if isinstance(batch, Unreadable):
            continue
        columns = decode(batch.columns, METADATA).columns
        values = zip(*(columns[name] for name in METADATA), strict=True)
        for row, (synth_id, language, exercise) in enumerate(values, batch.first):
            histogram[row_class(language, exercise), hash_bin(identity(synth_id, shard.name, row))] += 1
    return Census(reader.rows, histogram)


def total(counted: Iterable[Census]) -> Census:
    """All shards together."""
    rows, histogram = 0, empty()
    for census in counted:
        rows += census.rows
        histogram += census.rows_4B
    return Census(rows, histogram)


def empty() -> Histogram:
    return np.zeros((4, BINS), dtype=np.int64)
