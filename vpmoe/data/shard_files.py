"""An input shard as a file that fsspec can open, which is how the datasets library opens everything.

S3 shards get a file system of their own over vpmoe.storage: one way to reach the store, with its retries, and each range has to
come from the very object that was listed. Files of a Hugging Face data set have fsspec's hf://, at the commit that was resolved.
"""

from typing import Any

import fsspec
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from vpmoe.data.inputs import Shard
from vpmoe.storage import Bucket, Object, paths

PROTOCOL = "vpmoe-input"

FOOTER = 1 << 16
"""Bytes at a file's end that Arrow asks for first, once for each row group that is read."""


class Source:
    """Where the ranges of one S3 shard come from. Its end is kept, since every opening of the shard begins there."""

    def __init__(self, shard: Shard, bucket: Bucket) -> None:
        name, key = paths.split_url(shard.url)
        self.size = shard.size
        self._store = bucket.other(name)
        self._object = Object(key, shard.size, shard.etag)
        self._end = b""

    def fetch(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop). Raises StorageError also where the object is no longer the one that was listed."""
        if start < self.size - FOOTER:
            return self._store.fetch_range(self._object, start, stop)
        first = max(0, self.size - FOOTER)
        if not self._end:
            self._end = self._store.fetch_range(self._object, first, self.size)
        return self._end[start - first:stop - first]


class InputFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """The part of fsspec's interface that reading a known object needs."""

    protocol = PROTOCOL
    cachable = False  # instances hold a Source

    def __init__(self, source: Source, **options: Any) -> None:
        super().__init__(**options)
        self._source = source

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        return {"name": self._strip_protocol(path), "size": self._source.size, "type": "file"}

    def _open(self, path: str, mode: str = "rb", **options: Any) -> "InputFile":
        return InputFile(self, path, self._source)


class InputFile(AbstractBufferedFile):  # type: ignore[misc]
    """A shard, opened for reading; Arrow buffers, so nothing is buffered here."""

    def __init__(self, filesystem: InputFileSystem, path: str, source: Source) -> None:
        super().__init__(filesystem, path, mode="rb", cache_type="none", size=source.size)
        self._source = source

    def _fetch_range(self, start: int, stop: int) -> bytes:
        return self._source.fetch(start, stop)


fsspec.register_implementation(PROTOCOL, InputFileSystem, clobber=True)


def address(shard: Shard, bucket: Bucket) -> tuple[str, dict[str, Any]]:
    """What fsspec opens for a shard: a URL, and the options of that URL's protocol."""
    if shard.url.startswith("hf://"):
        return shard.url, {}
    return f"{PROTOCOL}://{shard.url.removeprefix('s3://')}", {"source": Source(shard, bucket)}
