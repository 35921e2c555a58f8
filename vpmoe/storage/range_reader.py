"""Reads ranges that lie beside each other, as tensors do in a file, and fetches what they share once."""

import threading
from collections import OrderedDict

from vpmoe.storage.blocks import BLOCK, Stored, read_range
from vpmoe.storage.bucket import THREADS, Bucket

KEPT = 32
"""Blocks that are kept in memory, 256 MiB. The small tensors of vpmoe-6b's layers share blocks: without any
kept, an export of four files at a time would fetch 1.6 times the bytes of its weights; with 8 it is 1.17
times, with 32 1.04."""


class RangeReader:
    """Ranges of a bucket's objects. Keeps the first and the last block of the latest ranges, which their
    neighbours share. Threads may share a reader."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, int], bytes] = OrderedDict()

    def read(self, stored: Stored, start: int, stop: int) -> bytearray:
        """As Bucket.read."""
        self._bucket.check_range(stored.key, start, stop, stored.size)
        if start == stop:
            return bytearray()
        ends = (start // BLOCK, (stop - 1) // BLOCK)

        def block(index: int) -> bytes:
            return self._shared(stored, index) if index in ends else self._bucket.block(stored, index)

        return read_range(block, start, stop, THREADS)

    def _shared(self, stored: Stored, index: int) -> bytes:
        """A block that other ranges may need too."""
        key = stored.key, index
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        data = self._bucket.block(stored, index)  # two threads may fetch it at the same time: no harm
        with self._lock:
            self._kept[key] = data
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return data
