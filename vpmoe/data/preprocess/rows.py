"""Reads the rows of an input shard with the datasets library: batches of the requested columns, and the rows
that cannot be read.

A shard is streamed one row group at a time, so a damaged row group costs only its own rows. Columns are
decoded in text.py and encoded in encode.py.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import datasets
import pyarrow as pa
import pyarrow.dataset as pads

from vpmoe.data.inputs import REMEDY, InputFault, InputShard
from vpmoe.data.preprocess import footer
from vpmoe.data.preprocess.columns import NULLABLE, check_columns
from vpmoe.data.preprocess.shard_files import OpenShard
from vpmoe.data.preprocess.text import UnreadableRows
from vpmoe.storage import Bucket

# Otherwise the library imports torch when a dataset is streamed.
datasets.config.TORCH_AVAILABLE = False
# Otherwise opening a shard sends a request, and waits for the timeout without a network.
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
# We raise or count the errors that it would log.
datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)

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
    """Reads one shard. The constructor reads the footer and checks all columns of SYNTH that the file has.

    Raises InputFault if the file is not parquet, lacks a required column or has a column that is not text;
    StorageError (for the Hugging Face hub Retriable) if it cannot be fetched.
    """

    def __init__(self, shard: InputShard, bucket: Bucket, columns: Sequence[str]) -> None:
        self.shard = shard
        self._source = OpenShard(shard, bucket)
        found = self._footer()
        check_columns(shard.url, found)
        self.absent = [name for name in NULLABLE if name not in {field.name for field in found.fields}]
        types = {field.name: field.type for field in found.fields}
        self._types = {
            name: "string" if types[name] == "string" else "large_string" for name in columns if name in types
        }
        self._source.in_blocks = 2 * sum(found.sizes.get(name, 0) for name in self._types) > shard.size
        self._groups = found.rows
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
            if row < stop:
                raise pa.ArrowInvalid(f"it ends after {row - first} of {stop - first} rows")
        except (pa.ArrowException, OSError) as error:
            if not is_damage(error):
                raise
            yield UnreadableRows(row, stop, f"row group {group} is damaged: {error}")

    def _stream(self, size: int, cache: str) -> datasets.IterableDataset:
        """This file as a streaming dataset with one shard per row group. `cache` holds only the library's
        lock files."""
        stream = datasets.load_dataset(
            "parquet",
            data_files=[self._source.url],
            split="train",
            streaming=True,
            columns=list(self._types),
            features=datasets.Features({name: datasets.Value(kind) for name, kind in self._types.items()}),
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

    def _footer(self) -> footer.Footer:
        try:
            return footer.PARSER.parse(footer.footer_bytes(self.shard.size, self._source.fetch))
        except footer.DamagedFooter as error:
            raise InputFault(f"{self.shard.url}: not a parquet file: {error}. {REMEDY}") from error


def is_damage(error: Exception) -> bool:
    """Whether Arrow could not decode the data, and the network or the disk has not failed.

    Arrow reports damaged data with its own exceptions or with a plain OSError without errno.
    """
    return isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None)
