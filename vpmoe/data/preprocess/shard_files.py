"""An fsspec file system for input shards, because the datasets library opens all files with fsspec.

It reads S3 through vpmoe.storage, with its retries, and each range must come from the object that was listed;
a file of a Hugging Face dataset is read at the resolved commit. fsspec and the datasets library see a made-up
name instead of the file's own, which they would take for a glob, a chain of URLs (`::`) or a compressed file.
"""

import uuid
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any
from weakref import WeakValueDictionary

import fsspec
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from vpmoe.data.inputs import InputShard
from vpmoe.storage import Bucket, Object, paths

PROTOCOL = "vpmoe-input"

FOOTER = 1 << 16
"""Bytes at a file's end that Arrow reads first, once per row group."""

BLOCK = 8 << 20
"""Bytes of one request when most of a shard is read; otherwise each small column of each row group would be a
request."""

CACHED_BLOCKS = 12
"""Blocks of a shard in memory, 96 MB: one per column that is read, for row groups longer than a block, and
some ahead."""

OPEN_SHARDS: "WeakValueDictionary[str, OpenShard]" = WeakValueDictionary()
"""Open shards by path. They cannot be passed as an option of the file system: the datasets library opens
every file in a process with the options of the dataset that was loaded last."""


class OpenShard:
    """One shard, available to fsspec under `url` as long as this object lives.

    The end of the file is cached, because every open reads it. If `in_blocks` is set, all other bytes are
    fetched and cached in blocks; otherwise each request fetches exactly its range.
    """

    def __init__(self, shard: InputShard, bucket: Bucket) -> None:
        self.url = f"{PROTOCOL}://{uuid.uuid4().hex}.parquet"
        OPEN_SHARDS[InputFileSystem._strip_protocol(self.url)] = self
        self.size = shard.size
        self.in_blocks = False
        self._read_range = range_reader(shard, bucket)
        self._block = lru_cache(CACHED_BLOCKS)(self._fetch_block)
        self._end = b""

    def fetch(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop). Raises StorageError, also if the object is no longer the one that was
        listed; Retriable or Permanent from the hub."""
        end = max(0, self.size - FOOTER)
        if start >= end:
            self._end = self._end or self._read_range(end, self.size)
            return self._end[start - end : stop - end]
        if not self.in_blocks:
            return self._read_range(start, stop)
        first = start // BLOCK
        data = b"".join(self._block(number) for number in range(first, (stop - 1) // BLOCK + 1))
        return data[start - first * BLOCK : stop - first * BLOCK]

    def _fetch_block(self, number: int) -> bytes:
        return self._read_range(number * BLOCK, min((number + 1) * BLOCK, self.size))


def range_reader(shard: InputShard, bucket: Bucket) -> Callable[[int, int], bytes]:
    """A function that fetches bytes [start, stop) of exactly this shard."""
    if shard.url.startswith("hf://"):
        from vpmoe.data import hub  # imported only if needed: the hub's client takes seconds to import

        return partial(hub.read_range, shard.url)
    name, key = paths.split_url(shard.url)
    store, pinned = bucket.other(name, "dataset.source"), Object(key, shard.size, shard.etag)
    return lambda start, stop: store.fetch_range(pinned, start, stop)


class InputFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """The part of fsspec's interface that is needed to read an open shard."""

    protocol = PROTOCOL

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        """Size of an open shard."""
        path = self._strip_protocol(path)
        return {"name": path, "size": OPEN_SHARDS[path].size, "type": "file"}

    def _open(self, path: str, mode: str = "rb", **options: Any) -> "InputFile":
        return InputFile(self, path, OPEN_SHARDS[self._strip_protocol(path)])


class InputFile(AbstractBufferedFile):  # type: ignore[misc]
    """A shard, opened for reading. Unbuffered, because Arrow buffers."""

    def __init__(self, filesystem: InputFileSystem, path: str, shard: OpenShard) -> None:
        super().__init__(filesystem, path, mode="rb", cache_type="none", size=shard.size)
        self._shard = shard

    def _fetch_range(self, start: int, stop: int) -> bytes:
        return self._shard.fetch(start, stop)


fsspec.register_implementation(PROTOCOL, InputFileSystem, clobber=True)
