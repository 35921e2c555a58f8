"""Work queue: deduplicates keys, runs each key at most once at a time, supports delayed requeue and
exponential backoff.

All methods belong to one event loop.
"""

import asyncio
import heapq
import itertools
import random
import time
from collections.abc import Callable, Hashable

BACKOFF_SECONDS = 0.5
BACKOFF_LIMIT_SECONDS = 60.0
SPARE_ENTRIES = 100
"""Entries of the heap that may be outdated, beside as many as there are keys."""


class WorkQueue[Key: Hashable]:
    """Keys, each with the time at which it is due.

    `clock` returns monotonic seconds, `jitter` a number from 0 to 1.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, jitter: Callable[[], float] = random.random
    ) -> None:
        self._clock = clock
        self._jitter = jitter
        self._due: dict[Key, float] = {}
        self._heap: list[tuple[float, int, Key]] = []  # of _due, and entries that no longer hold
        self._order = itertools.count()
        self._in_progress: dict[Key, float] = {}  # start time by key
        self._failures: dict[Key, int] = {}
        self._changed = asyncio.Event()

    def put(self, key: Key, delay: float = 0.0) -> None:
        """Request that the key is due in `delay` seconds.

        Of several requests for one key the earliest counts.
        """
        due = self._clock() + delay
        if due < self._due.get(key, float("inf")):
            self._due[key] = due
            self._push(key, due)

    async def get(self) -> Key:
        """Wait for the key that has been due longest and is not in progress.

        It is in progress until `done` or `failed`.
        """
        while True:
            self._changed.clear()
            wait = None
            while self._heap:
                due, _, key = self._heap[0]
                if self._due.get(key) != due or key in self._in_progress:  # `_finish` adds it again
                    heapq.heappop(self._heap)
                    continue
                wait = due - self._clock()
                if wait > 0:
                    break
                heapq.heappop(self._heap)
                del self._due[key]
                self._in_progress[key] = self._clock()
                self._changed.set()  # several workers wait on one event: wake the next
                return key
            try:
                async with asyncio.timeout(wait):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def done(self, key: Key) -> None:
        """The key was processed. A request made meanwhile makes it due again."""
        self._failures.pop(key, None)
        self._finish(key)

    def failed(self, key: Key) -> float:
        """Processing failed: requeue with a delay that doubles with each failure in a row.

        Returns the delay in seconds.
        """
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        delay = min(BACKOFF_SECONDS * 2.0 ** min(failures - 1, 16), BACKOFF_LIMIT_SECONDS) * (
            0.5 + 0.5 * self._jitter()
        )
        self._finish(key)
        self.put(key, delay)
        return delay

    def oldest_age(self) -> float:
        """Seconds that the oldest due key has waited, or that the longest in progress has taken; else 0."""
        now = self._clock()
        return max(
            [
                0.0,
                *(now - due for due in self._due.values()),
                *(now - start for start in self._in_progress.values()),
            ]
        )

    def __len__(self) -> int:
        """Number of keys that are due or in progress."""
        now = self._clock()
        return len({key for key, due in self._due.items() if due <= now} | self._in_progress.keys())

    def _finish(self, key: Key) -> None:
        del self._in_progress[key]
        if key in self._due:
            self._push(key, self._due[key])
        self._changed.set()

    def _push(self, key: Key, due: float) -> None:
        heapq.heappush(self._heap, (due, next(self._order), key))
        if len(self._heap) > 2 * len(self._due) + SPARE_ENTRIES:  # outdated ones may be due in hours
            self._heap = [(due, next(self._order), key) for key, due in self._due.items()]
            heapq.heapify(self._heap)
        self._changed.set()
