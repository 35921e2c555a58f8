"""The rows of an input shard, read through the datasets library: batches of wanted columns, and the rows that cannot be read.

A shard is streamed a row group at a time, so one that is damaged costs only its own rows. Which columns a row needs is said here,
how they become text is text.py's business, and what is made of them encode.py's.
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

from vpmoe.data.inputs import Shard
from vpmoe.data.preprocess.shard_files import Source
from vpmoe.data.preprocess.text import Unreadable
from vpmoe.failure import Permanent, Retriable
from vpmoe.storage import Bucket

datasets.config.TORCH_AVAILABLE = (
    False  # otherwise the library imports torch as soon as a data set is streamed
)
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = (
    False  # otherwise opening a shard sends a request, and waits for it without a network
)
datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # what it would log, we raise or count

REQUIRED = ("synth_id", "query", "synthetic_reasoning", "synthetic_answer")
"""Columns without which a file is not SYNTH's."""

NULLABLE = ("query_seed_text", "constraints", "language", "exercise")
"""Columns whose values may be null, and that may therefore be missing as a whole."""

METADATA = ("synth_id", "language", "exercise")
"""What sampling looks at: a small part of a shard."""

BUFFER = 8 << 20
"""Bytes of one range read from a column. It bounds memory: a SYNTH shard may be a single row group of half a gigabyte."""


@dataclass(frozen=True)
class Batch:
    """Consecutive rows as Arrow columns, not yet decoded; `first` is the number of the first in the file, from 0."""

    first: int
    columns: pa.RecordBatch


class ShardReader:
    """One shard, opened: its footer is read and its columns are proved at once.

    Raises Permanent where the file is no parquet, lacks a required column or has one that is not text; StorageError, or Retriable
    for the Hugging Face hub, where it cannot be fetched.
    """

    def __init__(self, shard: Shard, bucket: Bucket, columns: Sequence[str]) -> None:
        self.shard = shard
        self._source = None if shard.url.startswith("hf://") else Source(shard, bucket)
        self._url = shard.url if self._source is None else self._source.url
        footer = self._footer()
        self._columns = _present(shard, footer.schema.to_arrow_schema(), columns)
        if self._source is not None:
            self._source.in_blocks = 2 * _bytes(footer, self._columns) > shard.size
        self._groups = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
        self.rows = sum(self._groups)

    def batches(self, size: int) -> Iterator[Batch | Unreadable]:
        """The rows in order, at most `size` in a batch; what comes out covers every row exactly once.

        A nullable column that the file lacks is left out of the batches. Raises StorageError or Retriable where the shard cannot be
        fetched to its end.
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
    ) -> Iterator[Batch | Unreadable]:
        """The rows of one row group, the first of which is row `first` of the file."""
        row, stop = first, first + self._groups[group]
        try:
            for table in stream.shard(len(self._groups), group).iter(batch_size=size):
                for batch in table.combine_chunks().to_batches():
                    yield Batch(row, batch)
                    row += batch.num_rows
        except (pa.ArrowException, OSError, httpx2.HTTPError) as error:
            self._raise_unless_damage(error)
            yield Unreadable(row, stop, f"row group {group} is damaged: {error}")

    def _stream(self, size: int, cache: str) -> datasets.IterableDataset:
        """The data set that is this one file, with one shard for each row group; `cache` is for the library's lock files, not for rows."""
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
                f"{self.shard.url}: not a parquet file: {error}. Write it again, or narrow dataset.source."
            ) from error

    def _raise_unless_damage(self, error: Exception) -> None:
        """Return where Arrow could not decode what it was given; an error of the network or of a disk is raised on.

        Arrow says it by its own exceptions, and by OSError itself without a number.
        """
        if isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None):
            return
        if self.shard.url.startswith("hf://"):
            raise Retriable(
                f"{self.shard.url} cannot be fetched from the Hugging Face hub ({type(error).__name__}: {error})."
            ) from error
        raise error


def _bytes(footer: pq.FileMetaData, columns: Sequence[str]) -> int:
    """Bytes that some columns take of a file."""
    chunks = (
        footer.row_group(group).column(number)
        for group in range(footer.num_row_groups)
        for number in range(footer.num_columns)
    )
    return sum(chunk.total_compressed_size for chunk in chunks if chunk.path_in_schema in columns)


def _present(shard: Shard, schema: pa.Schema, columns: Sequence[str]) -> list[str]:
    """Those of `columns` that the file has, proved to be text."""
    missing = [name for name in columns if name in REQUIRED and name not in schema.names]
    if missing:
        raise Permanent(
            f"{shard.url}: no column {', '.join(missing)}; the file has {', '.join(schema.names) or 'none'}. dataset.source must name "
            f"files with the columns of PleIAs/SYNTH, of which {', '.join(REQUIRED)} are needed."
        )
    present = [name for name in columns if name in schema.names]
    for name in present:
        kind = schema.field(name).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
            raise Permanent(
                f"{shard.url}: column {name} is of type {kind}, not text. Write it as plain strings."
            )
    return present
