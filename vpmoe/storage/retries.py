"""Retries of storage: one loop for every request, body included. boto3's retries end at the headers."""

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from vpmoe.storage.connections import closed_early
from vpmoe.storage.errors import FAULTS, Request, StorageError, explain, in_short, is_transient
from vpmoe.storage.port import greeting_fault

log = logging.getLogger(__name__)

CHANCE = random.SystemRandom()
"""Its own generator, because a retry must not advance the random state that training saves."""


@dataclass(frozen=True)
class Patience:
    """Bounds of one operation: attempts, and seconds to wait for a connection, for an answer, and between
    attempts."""

    attempts: int
    connect: float
    read: float
    first_pause: float = 0.5
    longest_pause: float = 30.0

    def pause(self, failures: int) -> float:
        """Seconds to wait after so many failures: exponential up to the longest, the upper half random.

        Without jitter the many processes of a run that lost the store together would retry together.
        """
        return min(self.first_pause * 2.0 ** (failures - 1), self.longest_pause) * CHANCE.uniform(0.5, 1.0)


JOB = Patience(attempts=10, connect=10, read=60)
"""For jobs: about a minute and a half, less than a restart of a training pod costs."""


def persist[T](call: Callable[[], T], patience: Patience, request: Request) -> T:
    """The result of `call`, retried after each temporary fault until the attempts end.

    Raises StorageError, at once for a permanent fault.
    """
    started = time.monotonic()
    attempt = 0
    while True:
        attempt += 1
        try:
            return call()
        except FAULTS as error:
            if not is_transient(error) or attempt >= patience.attempts:
                times = "once" if attempt == 1 else f"{attempt} times"
                raise explain(error, request, f"{times} in {time.monotonic() - started:.0f} s") from error
            if attempt == 1 and closed_early(error):
                fault = greeting_fault(request.endpoint)
                if fault:
                    raise StorageError(f"{request.start}: {fault.what}. {fault.remedy}", "Refused") from error
            pause = patience.pause(attempt)
            log.warning(
                "%s: %s failed (%s), attempt %d of %d; again in %.1f s",
                request.url,
                request.operation,
                in_short(error),
                attempt,
                patience.attempts,
                pause,
            )
            time.sleep(pause)
