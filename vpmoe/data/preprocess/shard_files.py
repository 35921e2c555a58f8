"""An input shard as a file that fsspec can open, which is how the datasets library opens everything.

S3 shards get a file system of their own over vpmoe.storage: one way to reach the store, with its retries, and each range has to
come from the very object that was listed. Files of a Hugging Face data set have fsspec's hf://, at the commit that was resolved.
"""

import uuid
from functools import lru_cache
from typing import Any
from weakref import WeakValueDictionary

import fsspec
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from vpmoe.data.inputs import Shard
from vpmoe.storage import Bucket, Object, paths

PROTOCOL = "vpmoe-input"

FOOTER = 1 << 16
"""Bytes at a file's end that Arrow asks for first, once for each row group that is read."""

BLOCK = 8 << 20
"""Bytes of one request where most of a shard is read: its many small columns and row groups would be a request each."""

KEPT_BLOCKS = 12
"""Blocks of a shard in memory, 96 MB: one for each column that is read, where a row group is longer than a block, and some ahead."""

OPEN: "WeakValueDictionary[str, Source]" = WeakValueDictionary()
"""Open shards by their path. Handing a Source over as an option of the file system would read the wrong shard: the datasets library
opens every file in a process with the options of the data set that was loaded last."""


class Source:
    """Where the bytes of one S3 shard come from, open for fsspec under `url` as long as it lives.

    The shard's end is kept, since every opening begins there. With `in_blocks` everything else is fetched and kept in blocks;
    otherwise a request brings what was asked for.
    """

    def __init__(self, shard: Shard, bucket: Bucket) -> None:
        name, key = paths.split_url(shard.url)
        self.url = f"{PROTOCOL}://{uuid.uuid4().hex}/{name}/{key}"
        OPEN[InputFileSystem._strip_protocol(self.url)] = self
        self.size = shard.size
        self.in_blocks = False
        self._store = bucket.other(name)
        self._object = Object(key, shard.size, shard.etag)
        self._block = lru_cache(KEPT_BLOCKS)(self._fetch_block)
        self._end = b""

    def fetch(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop). Raises StorageError also where the object is no longer the one that was listed."""
        end = max(0, self.size - FOOTER)
        if start >= end:
            self._end = self._end or self._store.fetch_range(self._object, end, self.size)
            return self._end[start - end : stop - end]
        if not self.in_blocks:
            return self._store.fetch_range(self._object, start, stop)
        first = start // BLOCK
        data = b"".join(self._block(number) for number in range(first, (stop - 1) // BLOCK + 1))
        return data[start - first * BLOCK : stop - first * BLOCK]

    def _fetch_block(self, number: int) -> bytes:
        return self._store.fetch_range(self._object, number * BLOCK, min((number + 1) * BLOCK, self.size))


class InputFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """The part of fsspec's interface that reading an open shard needs."""

    protocol = PROTOCOL

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        """Size of an open shard."""
        path = self._strip_protocol(path)
        return {"name": path, "size": OPEN[path].size, "type": "file"}

    def _open(self, path: str, mode: str = "rb", **options: Any) -> "InputFile":
        return InputFile(self, path, OPEN[self._strip_protocol(path)])


class InputFile(AbstractBufferedFile):  # type: ignore[misc]
    """A shard, opened for reading; Arrow buffers, so nothing is buffered here."""

    def __init__(self, filesystem: InputFileSystem, path: str, source: Source) -> None:
        super().__init__(filesystem, path, mode="rb", cache_type="none", size=source.size)
        self._source = source

    def _fetch_range(self, start: int, stop: int) -> bytes:
        return self._source.fetch(start, stop)


fsspec.register_implementation(PROTOCOL, InputFileSystem, clobber=True)
