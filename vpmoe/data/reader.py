"""A split's parts: the length of every document, and its tokens and spans, read from the bucket through a bounded cache on local disk.

The unit of the cache is storage's block, 8 MiB that are proved against their hash when they come in: parts are read from their start to
their end (plan.py), so a block serves many documents and no document costs a request. All processes of a pod share the folder. Which
document is wanted when is plan.py's business, making batches of them batch.py's.
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

from vpmoe.data.dataset import UNKNOWN
from vpmoe.data.index import read_index
from vpmoe.data.packing import PackedDocument
from vpmoe.failure import Permanent
from vpmoe.storage import BLOCK, Bucket, Stored, Subject
from vpmoe.storage.manifest import Manifest
from vpmoe.storage.paths import Split

log = logging.getLogger(__name__)

CACHE_BYTES = 16 << 30
"""What a pod keeps on disk. A group of 63 parts has at most 63 × 2 × 2 blocks in use at a time, 2 GiB."""
LOCKS = 64
"""Lock files that the blocks share."""
THREADS = 8


class BlockCache:
    """Blocks of objects in a folder, least recently used first out. Safe among threads and processes; needs no care after a kill."""

    def __init__(self, bucket: Bucket, folder: Path, limit: int = CACHE_BYTES) -> None:
        self._bucket = bucket
        self._folder = folder
        self._limit = limit
        folder.mkdir(parents=True, exist_ok=True)

    def read(self, stored: Stored, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of an object. Raises StorageError where the object is not what its manifest says."""
        pieces = []
        for index in range(start // BLOCK, -(-stop // BLOCK)):
            first = index * BLOCK
            pieces.append(
                self._piece(stored, index, max(start, first) - first, min(stop, first + BLOCK) - first)
            )
        return b"".join(pieces)

    def bring(self, stored: Stored, index: int) -> Path:
        """The file of one block, fetched where it is not there."""
        path = self._folder / f"{stored.sha256}-{index}"
        if path.exists():
            return path
        with self._lock(path.name):
            if not path.exists():
                data = self._bucket.read(stored, index * BLOCK, min((index + 1) * BLOCK, stored.size))
                with tempfile.NamedTemporaryFile(dir=self._folder, prefix=".", delete=False) as file:
                    file.write(data)
                Path(file.name).replace(path)
                self._evict(path)
        return path

    def _piece(self, stored: Stored, index: int, start: int, stop: int) -> bytes:
        while True:
            path = self.bring(stored, index)
            try:
                with path.open("rb") as file:
                    os.utime(file.fileno())
                    return os.pread(file.fileno(), stop - start, start)
            except (
                FileNotFoundError
            ):  # another process evicted it just now: the folder is too small for all, slow but right
                log.warning(
                    "%s was evicted before it was read: the cache of %d bytes is too small",
                    path.name,
                    self._limit,
                )

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        number = hashlib.blake2b(name.encode(), digest_size=1).digest()[0] % LOCKS
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
    """One split of a data set. `lengths[p]` are the lengths in tokens of part p's documents."""

    def __init__(self, dataset: Manifest, split: Split, cache: BlockCache) -> None:
        """Reads every part's index. Raises StorageError where one is not what the manifest says, Permanent where they contradict it."""
        self.split = split
        self._dataset = dataset
        self._cache = cache
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="parts")
        names = sorted(
            name for name in dataset.subjects if name.startswith(f"{split}/") and name.endswith(".tokens.idx")
        )
        self._stems = [name.removesuffix(".tokens.idx") for name in names]
        self._starts = list(self._pool.map(self._read_starts, self._stems))
        self.lengths: Sequence[NDArray[np.int32]] = [
            np.diff(starts).astype(np.int32) for starts in self._starts
        ]
        self.exercises = lru_cache(maxsize=None)(self._read_exercises)

    def read(self, document: PackedDocument) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """(tokens, span of each token) of one document."""
        start, stop = self.tokens_of(document)
        tokens = self._cache.read(self._subject(document.part, "tokens.bin"), 4 * start, 4 * stop)
        spans = self._cache.read(self._subject(document.part, "spans.bin"), start, stop)
        return np.frombuffer(tokens, "<i4"), np.frombuffer(spans, np.uint8)

    def prefetch(self, documents: Iterable[PackedDocument]) -> None:
        """Begin to fetch the blocks that these documents lie in. A block that cannot be had is met again, and reported, when it is read."""
        documents = list(documents)
        self.prefetch_of(documents, lambda part: self._subject(part, "tokens.bin"), 4)
        self.prefetch_of(documents, lambda part: self._subject(part, "spans.bin"), 1)

    def prefetch_of(
        self, documents: Iterable[PackedDocument], file_of: Callable[[int], Subject], width: int
    ) -> None:
        """The same of a file that has `width` bytes for each token of a part, such as the teacher's scores."""
        wanted = set()
        for document in documents:
            start, stop = self.tokens_of(document)
            wanted |= {
                (document.part, index) for index in range(width * start // BLOCK, -(-width * stop // BLOCK))
            }
        for part, index in wanted:
            self._pool.submit(self._cache.bring, file_of(part), index)

    def tokens_of(self, document: PackedDocument) -> tuple[int, int]:
        """[start, stop) of the document's tokens in its part."""
        start, stop = self._starts[document.part][document.number : document.number + 2]
        return int(start), int(stop)

    def stem(self, part: int) -> str:
        """What the names of a part's files begin with, below the data set's folder."""
        return self._stems[part]

    def exercise_shares(self, documents: Iterable[PackedDocument]) -> dict[str, float]:
        """Share of the documents' tokens that belong to each exercise, "unknown" where a row names none."""
        tokens: Counter[str] = Counter()
        for document in documents:
            tokens[self.exercises(document.part)[document.number]] += document.length
        return {name: count / tokens.total() for name, count in sorted(tokens.items())}

    def close(self) -> None:
        """End the threads; what they were to fetch is given up."""
        self._pool.shutdown(cancel_futures=True)

    def _subject(self, part: int, file: str) -> Subject:
        return self._dataset.subjects[f"{self._stems[part]}.{file}"]

    def _whole(self, name: str) -> bytes:
        subject = self._dataset.subjects[name]
        return self._cache.read(subject, 0, subject.size)

    def _read_starts(self, stem: str) -> NDArray[np.int64]:
        """[documents + 1] number of the first token of each document in its part, and of all tokens."""
        with tempfile.NamedTemporaryFile(suffix=".idx") as file:
            file.write(self._whole(f"{stem}.tokens.idx"))
            file.flush()
            index = read_index(Path(file.name))
        starts = np.concatenate([[0], np.cumsum(index.lengths, dtype=np.int64)])
        sizes = {name: self._dataset.subjects[f"{stem}.{name}"].size for name in ("tokens.bin", "spans.bin")}
        if sizes != {"tokens.bin": 4 * starts[-1], "spans.bin": starts[-1]} or not np.array_equal(
            index.offsets, 4 * starts[:-1]
        ):
            raise Permanent(
                f"{self._dataset.key}: {stem}: its index has {starts[-1]} tokens, its files have {sizes} bytes. The data set was not made "
                "by preprocess; delete its folder to have it made again."
            )
        return starts

    def _read_exercises(self, part: int) -> list[str]:
        content = pyarrow.BufferReader(self._whole(f"{self._stems[part]}.documents.parquet"))
        column = pyarrow.parquet.read_table(content, columns=["exercise"])["exercise"].to_pylist()
        return [name or UNKNOWN for name in column]
