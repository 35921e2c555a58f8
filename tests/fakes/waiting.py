"""Waiting for another process, with a deadline."""

import time
import urllib.error
import urllib.request
from collections.abc import Callable

import pytest


def answers(url: str) -> bool:
    """Whether an HTTP server responds there, with any status."""
    try:
        urllib.request.urlopen(url, timeout=1).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def wait_until(true: Callable[[], bool], what: str, seconds: float = 30, every: float = 0.05) -> None:
    """Poll `true` until it holds. Fails the test with `what` after `seconds`."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            pytest.fail(f"not within {seconds:g} s: {what}")
        time.sleep(every)
