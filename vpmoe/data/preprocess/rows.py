"""Reads the rows of an input shard with the datasets library: batches of the requested columns, and the rows
that cannot be read.

A shard is streamed one row group at a time, so a damaged row group costs only its own rows. Columns are
decoded in text.py and encoded in encode.py.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import datasets
import fsspec
import httpx2
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from vpmoe.data.inputs import InputShard
from vpmoe.data.preprocess.shard_files import OpenShard
from vpmoe.data.preprocess.text import UnreadableRows
from vpmoe.failure import Permanent, Retriable
from vpmoe.storage import Bucket

# Otherwise the library imports torch when a dataset is streamed.
datasets.config.TORCH_AVAILABLE = False
# Otherwise opening a shard sends a request, and waits for the timeout without a network.
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
# We raise or count the errors that it would log.
datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)

REQUIRED = ("synth_id", "query", "synthetic_reasoning", "synthetic_answer")
"""Columns that every file must have."""

NULLABLE = ("query_seed_text", "constraints", "language", "exercise")
"""Columns whose values may be null. A file may lack them."""

METADATA = ("synth_id", "language", "exercise")
"""Columns that sampling needs: a small part of a shard."""

BUFFER = 8 << 20
"""Bytes of one range read of a column. Bounds memory: a SYNTH shard may be a single row group of half a
gigabyte."""


@dataclass(frozen=True)
class RowBatch:
    """Consecutive rows as Arrow columns, not yet decoded. `first` is the number of the first row in the file,
    from 0."""

    first: int
    columns: pa.RecordBatch


class ShardReader:
    """Reads one shard. The constructor reads the footer and checks the columns.

    Raises Permanent if the file is not parquet, lacks a required column or has a column that is not text;
    StorageError (for the Hugging Face hub Retriable) if it cannot be fetched.
    """

    def __init__(self, shard: InputShard, bucket: Bucket, columns: Sequence[str]) -> None:
        self.shard = shard
        self._source = None if shard.url.startswith("hf://") else OpenShard(shard, bucket)
        self._url = shard.url if self._source is None else self._source.url
        footer = self._footer()
        self._columns = _check_columns(shard, footer.schema.to_arrow_schema(), columns)
        if self._source is not None:
            self._source.in_blocks = 2 * _column_bytes(footer, self._columns) > shard.size
        self._groups = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
        self.rows = sum(self._groups)

    def batches(self, size: int) -> Iterator[RowBatch | UnreadableRows]:
        """All rows in order, at most `size` per batch. The results cover every row exactly once.

        Batches lack the nullable columns that the file lacks. Raises StorageError or Retriable if the shard
        cannot be fetched.
        """
        if not self.rows:
            return
        with tempfile.TemporaryDirectory(prefix="vpmoe-datasets-") as cache:
            stream = self._stream(size, cache)
            first = 0
            for group, rows in enumerate(self._groups):
                yield from self._group(stream, group, first, size)
                first += rows

    def _group(
        self, stream: datasets.IterableDataset, group: int, first: int, size: int
    ) -> Iterator[RowBatch | UnreadableRows]:
        """The rows of one row group, which begins at row `first` of the file."""
        row, stop = first, first + self._groups[group]
        try:
            for table in stream.shard(len(self._groups), group).iter(batch_size=size):
                for batch in table.combine_chunks().to_batches():
                    yield RowBatch(row, batch)
                    row += batch.num_rows
        except (pa.ArrowException, OSError, httpx2.HTTPError) as error:
            self._raise_unless_damage(error)
            yield UnreadableRows(row, stop, f"row group {group} is damaged: {error}")

    def _stream(self, size: int, cache: str) -> datasets.IterableDataset:
        """This file as a streaming dataset with one shard per row group. `cache` holds only the library's
        lock files."""
        stream = datasets.load_dataset(
            "parquet",
            data_files=[self._url],
            split="train",
            streaming=True,
            columns=self._columns,
            batch_size=size,
            fragment_scan_options=pads.ParquetFragmentScanOptions(
                use_buffered_stream=True,
                buffer_size=BUFFER,
                pre_buffer=False,
                page_checksum_verification=True,
            ),
            cache_dir=cache,
        )
        return stream.reshard().with_format("arrow")

    def _footer(self) -> pq.FileMetaData:
        try:
            with fsspec.open(self._url, "rb") as file:
                return pq.read_metadata(file)
        except (pa.ArrowException, OSError, httpx2.HTTPError) as error:
            self._raise_unless_damage(error)
            raise Permanent(
                f"{self.shard.url}: not a parquet file: {error}. Replace the file or exclude it from "
                "dataset.source."
            ) from error

    def _raise_unless_damage(self, error: Exception) -> None:
        """Return if Arrow could not decode the data; raise an error of the network or disk.

        Arrow reports damaged data with its own exceptions or with a plain OSError without errno.
        """
        if isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None):
            return
        if self.shard.url.startswith("hf://"):
            raise Retriable(
                f"{self.shard.url} could not be fetched from the Hugging Face hub ({type(error).__name__}: "
                f"{error})."
            ) from error
        raise error


def _column_bytes(footer: pq.FileMetaData, columns: Sequence[str]) -> int:
    """Compressed size of some columns of a file, in bytes."""
    chunks = (
        footer.row_group(group).column(number)
        for group in range(footer.num_row_groups)
        for number in range(footer.num_columns)
    )
    return sum(chunk.total_compressed_size for chunk in chunks if chunk.path_in_schema in columns)


def _check_columns(shard: InputShard, schema: pa.Schema, columns: Sequence[str]) -> list[str]:
    """Those of `columns` that the file has. Raises Permanent if a required one is missing or one is not
    text."""
    missing = [name for name in columns if name in REQUIRED and name not in schema.names]
    if missing:
        raise Permanent(
            f"{shard.url}: no column {', '.join(missing)}; the file has {', '.join(schema.names) or 'none'}. "
            "dataset.source must name files with the columns of PleIAs/SYNTH; "
            f"{', '.join(REQUIRED)} are required."
        )
    present = [name for name in columns if name in schema.names]
    for name in present:
        kind = schema.field(name).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
            raise Permanent(
                f"{shard.url}: column {name} has type {kind}, not text. Write it as plain strings."
            )
    return present
