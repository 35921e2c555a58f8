"""How long storage keeps trying. One loop for every request, body included, in place of boto3's, which ends
at the headers."""

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from vpmoe.storage.errors import FAULTS, explain, in_short, is_transient

log = logging.getLogger(__name__)

CHANCE = random.SystemRandom()
"""Not the random module's own numbers: a retry would move on the state that training saves and resumes
from."""


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
        """Seconds to wait after so many failures: doubling up to the longest, the upper half of it by chance.

        Without the chance, the many processes of a run that lost the store together would all come back
        together.
        """
        return min(self.first_pause * 2.0 ** (failures - 1), self.longest_pause) * CHANCE.uniform(0.5, 1.0)


JOB = Patience(attempts=10, connect=10, read=60)
"""Rides out a store that is away for about a minute and a half: less than a restart of a training pod
costs."""

OPERATOR = Patience(attempts=2, connect=3, read=10)
"""Gives up within seconds: the operator asks again at its next look."""


def persist[T](call: Callable[[], T], patience: Patience, operation: str, url: str, endpoint: str) -> T:
    """The result of `call`, tried again after each temporary fault until patience ends.

    Raises StorageError, at once for what trying again cannot mend.
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
                raise explain(
                    error, operation, url, endpoint, f"{times} in {time.monotonic() - started:.0f} s"
                ) from error
            pause = patience.pause(attempt)
            log.warning(
                "%s: %s failed (%s), attempt %d of %d; again in %.1f s",
                url,
                operation,
                in_short(error),
                attempt,
                patience.attempts,
                pause,
            )
            time.sleep(pause)
