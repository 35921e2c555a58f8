"""Which keys want a reconcile, and when: each key once, one flight a key, later again on request, slower again after failures.

It knows nothing of what a key means or what a flight does. All methods belong to one event loop; `put_from_thread` alone may be
called from elsewhere.
"""

import asyncio
import random
import time
from collections.abc import Callable, Hashable

BACKOFF_SECONDS = 0.5
BACKOFF_LIMIT_SECONDS = 60.0


class KeyQueue[Key: Hashable]:
    """Keys that are due at a time. `clock` gives monotonic seconds, `jitter` a number from 0 to 1."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, jitter: Callable[[], float] = random.random
    ) -> None:
        self._clock = clock
        self._jitter = jitter
        self._due: dict[Key, float] = {}
        self._flying: dict[Key, float] = {}
        self._failures: dict[Key, int] = {}
        self._changed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def put(self, key: Key, delay: float = 0.0) -> None:
        """Ask for a flight `delay` seconds from now; an earlier wish for the same key stands, a later one is forgotten."""
        due = self._clock() + delay
        if due < self._due.get(key, float("inf")):
            self._due[key] = due
            self._changed.set()

    def put_from_thread(self, key: Key) -> None:
        """Like `put`, from a thread with another event loop. Nothing happens before the first `take`: a resync follows anyway."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.put, key)

    async def take(self) -> Key:
        """Wait for the key that has been due longest and is not in flight; it is in flight until `done` or `failed`."""
        self._loop = asyncio.get_running_loop()
        while True:
            self._changed.clear()
            ready = {key: due for key, due in self._due.items() if key not in self._flying}
            if ready:
                key, due = min(ready.items(), key=lambda item: item[1])
                wait = due - self._clock()
                if wait <= 0:
                    del self._due[key]
                    self._flying[key] = self._clock()
                    self._wake_next()
                    return key
            else:
                wait = None
            try:
                async with asyncio.timeout(wait):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def done(self, key: Key) -> None:
        """The flight has landed; what was put meanwhile flies next."""
        self._failures.pop(key, None)
        self._land(key)

    def failed(self, key: Key) -> float:
        """The flight has failed: again after a delay that doubles from failure to failure. Returns the delay in seconds."""
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        delay = min(BACKOFF_SECONDS * 2.0 ** min(failures - 1, 16), BACKOFF_LIMIT_SECONDS) * (
            0.5 + 0.5 * self._jitter()
        )
        self._land(key)
        self.put(key, delay)
        return delay

    def oldest_age(self) -> float:
        """Seconds that the longest-waiting due key has waited, or the longest flight has flown; 0 where there is neither."""
        now = self._clock()
        return max(
            [
                0.0,
                *(now - due for due in self._due.values()),
                *(now - start for start in self._flying.values()),
            ]
        )

    def __len__(self) -> int:
        return len(self._due) + len(self._flying)

    def _land(self, key: Key) -> None:
        del self._flying[key]
        self._changed.set()

    def _wake_next(self) -> None:
        """Several workers wait on one event: whoever takes a key lets the next one look."""
        self._changed.set()
