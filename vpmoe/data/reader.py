"""Reads documents of a dataset from the bucket: lengths, tokens and spans, through a bounded cache on local
disk.

The cache holds blocks of vpmoe.storage, 8 MiB each, whose hash is verified when they are fetched. Parts are
read from start to end (packing.py), so a block serves many documents. All processes of a pod share the cache
folder.
"""

import fcntl
import hashlib
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow.parquet
from numpy.typing import NDArray

from vpmoe.data.dataset import UNKNOWN, clean_label
from vpmoe.data.index import read_index
from vpmoe.data.packing import PackedDocument
from vpmoe.failure import Permanent
from vpmoe.storage import BLOCK, Bucket, Stored, Subject
from vpmoe.storage.manifest import Manifest
from vpmoe.storage.paths import Split

log = logging.getLogger(__name__)

CACHE_BYTES = 16 << 30
"""Default size of the cache. A group of 63 parts uses at most 63 × 2 × 2 blocks at a time, 2 GiB."""
LOCK_FILES = 64
"""Lock files in the cache folder; each serves many blocks."""
FETCH_THREADS = 8
UNFINISHED = ".unfinished"
"""Suffix of a block's file while its process writes it, holding the block's lock."""


class BlockCache:
    """An LRU cache of object blocks in a folder. Safe across threads and processes, and after a kill."""

    def __init__(self, bucket: Bucket, folder: Path, limit: int = CACHE_BYTES) -> None:
        self._bucket = bucket
        self._folder = folder
        self._limit = limit
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f".*{UNFINISHED}"):
            with self._lock(path.name[1:].removesuffix(UNFINISHED)):
                path.unlink(missing_ok=True)  # its process is dead, or has renamed it

    def read_range(self, stored: Stored, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of an object. Raises StorageError if the object differs from its manifest."""
        pieces = []
        for index in range(start // BLOCK, -(-stop // BLOCK)):
            first = index * BLOCK
            pieces.append(
                self._read_block(stored, index, max(start, first) - first, min(stop, first + BLOCK) - first)
            )
        return b"".join(pieces)

    def fetch_block(self, stored: Stored, index: int) -> Path:
        """The file of one block; fetches it if it is not cached."""
        path = self._folder / f"{stored.sha256}-{index}"
        if path.exists():
            return path
        with self._lock(path.name):
            if not path.exists():
                data = self._bucket.block(stored, index)
                unfinished = self._folder / f".{path.name}{UNFINISHED}"
                unfinished.write_bytes(data)
                unfinished.replace(path)
                self._evict(path)
        return path

    def _read_block(self, stored: Stored, index: int, start: int, stop: int) -> bytes:
        while True:
            path = self.fetch_block(stored, index)
            try:
                with path.open("rb") as file:
                    os.utime(file.fileno())
                    return os.pread(file.fileno(), stop - start, start)
            except (
                FileNotFoundError
            ):  # another process evicted the block; fetching it again is slow but correct
                log.warning(
                    "Block %s was evicted before it was read: the cache of %d bytes is too small",
                    path.name,
                    self._limit,
                )

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        number = hashlib.blake2b(name.encode(), digest_size=1).digest()[0] % LOCK_FILES
        with (self._folder / f".lock-{number:02d}").open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _evict(self, newest: Path) -> None:
        """Remove the least recently read blocks until the folder is within its limit."""
        blocks = []
        for entry in os.scandir(self._folder):
            try:
                found = entry.stat()
            except FileNotFoundError:
                continue
            if not entry.name.startswith("."):
                blocks.append((found.st_mtime_ns, found.st_size, Path(entry.path)))
        total = sum(size for _, size, _ in blocks)
        for _, size, path in sorted(blocks):
            if total <= self._limit:
                break
            if path != newest:
                path.unlink(missing_ok=True)
                total -= size


class DatasetReader:
    """Reads one split of a dataset. `lengths[p]` holds the length in tokens of each document of part p."""

    def __init__(self, dataset: Manifest, split: Split, cache: BlockCache) -> None:
        """Read every part's index. Raises StorageError if an index differs from the manifest, Permanent if it
        contradicts its files."""
        self.split = split
        self._dataset = dataset
        self._cache = cache
        self._pool = ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="dataset-reader")
        names = sorted(
            name for name in dataset.subjects if name.startswith(f"{split}/") and name.endswith(".tokens.idx")
        )
        self._stems = [name.removesuffix(".tokens.idx") for name in names]
        self._starts = list(self._pool.map(self._read_starts, self._stems))
        self.lengths: Sequence[NDArray[np.int32]] = [
            np.diff(starts).astype(np.int32) for starts in self._starts
        ]
        self.exercises = lru_cache(maxsize=None)(self._read_exercises)

    def read_document(self, document: PackedDocument) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """(token ids [T], span of each token [T]) of one document."""
        start, stop = self.token_range(document)
        tokens = self._cache.read_range(self._subject(document.part, "tokens.bin"), 4 * start, 4 * stop)
        spans = self._cache.read_range(self._subject(document.part, "spans.bin"), start, stop)
        return np.frombuffer(tokens, "<i4"), np.frombuffer(spans, np.uint8)

    def prefetch(self, documents: Iterable[PackedDocument]) -> None:
        """Start to fetch the blocks of these documents in the background. Errors are raised when a document
        is read."""
        documents = list(documents)
        self.prefetch_file(documents, lambda part: self._subject(part, "tokens.bin"), 4)
        self.prefetch_file(documents, lambda part: self._subject(part, "spans.bin"), 1)

    def prefetch_file(
        self, documents: Iterable[PackedDocument], file_of: Callable[[int], Subject], width: int
    ) -> None:
        """Prefetch from a file with `width` bytes for each token of a part, such as the teacher's scores."""
        wanted = set()
        for document in documents:
            start, stop = self.token_range(document)
            wanted |= {
                (document.part, index) for index in range(width * start // BLOCK, -(-width * stop // BLOCK))
            }
        for part, index in wanted:
            self._pool.submit(self._cache.fetch_block, file_of(part), index)

    def token_range(self, document: PackedDocument) -> tuple[int, int]:
        """[start, stop) of the document's tokens in its part."""
        start, stop = self._starts[document.part][document.number : document.number + 2]
        return int(start), int(stop)

    def stem(self, part: int) -> str:
        """The common prefix of the names of a part's files, relative to the dataset's folder."""
        return self._stems[part]

    def exercise_shares(self, documents: Iterable[PackedDocument]) -> dict[str, float]:
        """Share of the documents' tokens by exercise; "unknown" for rows without one."""
        tokens: Counter[str] = Counter()
        for document in documents:
            tokens[self.exercises(document.part)[document.number]] += document.length
        return {name: count / tokens.total() for name, count in sorted(tokens.items())}

    def numbers_by_part(self, documents: Iterable[PackedDocument]) -> dict[str, tuple[int, ...]]:
        """The documents' numbers in their parts, ascending, by the part's stem."""
        found: dict[str, set[int]] = {}
        for document in documents:
            found.setdefault(self.stem(document.part), set()).add(document.number)
        return {stem: tuple(sorted(numbers)) for stem, numbers in sorted(found.items())}

    def close(self) -> None:
        """Stop the threads and cancel pending prefetches."""
        self._pool.shutdown(cancel_futures=True)

    def _subject(self, part: int, file: str) -> Subject:
        return self._dataset.subjects[f"{self._stems[part]}.{file}"]

    def _read_file(self, name: str) -> bytes:
        subject = self._dataset.subjects[name]
        return self._cache.read_range(subject, 0, subject.size)

    def _read_starts(self, stem: str) -> NDArray[np.int64]:
        """[documents + 1] First token of each document in its part; the last entry is the number of all
        tokens."""
        with tempfile.NamedTemporaryFile(suffix=".idx") as file:
            file.write(self._read_file(f"{stem}.tokens.idx"))
            file.flush()
            index = read_index(Path(file.name))
        starts = np.concatenate([[0], np.cumsum(index.lengths, dtype=np.int64)])
        sizes = {name: self._dataset.subjects[f"{stem}.{name}"].size for name in ("tokens.bin", "spans.bin")}
        if sizes != {"tokens.bin": 4 * starts[-1], "spans.bin": starts[-1]} or not np.array_equal(
            index.offsets, 4 * starts[:-1]
        ):
            raise Permanent(
                f"{self._dataset.key}: {stem}: its index has {starts[-1]} tokens, its files have {sizes} "
                "bytes. The dataset was not written by preprocess; delete its folder to have it built again."
            )
        return starts

    def _read_exercises(self, part: int) -> list[str]:
        content = pyarrow.BufferReader(self._read_file(f"{self._stems[part]}.documents.parquet"))
        column = pyarrow.parquet.read_table(content, columns=["exercise"])["exercise"].to_pylist()
        return [clean_label(name) or UNKNOWN for name in column]
