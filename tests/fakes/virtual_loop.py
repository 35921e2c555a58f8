"""An event loop whose time passes only when every task waits: hours of timeouts in a moment."""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any


class VirtualLoop(asyncio.SelectorEventLoop):
    """`time()` starts at 0 and jumps to the next timer."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_Selector(self))

    def time(self) -> float:
        return self.now


class _Selector(selectors.SelectSelector):
    """Does not wait."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("every task waits, and no timer is set")
        self._loop.now += max(timeout, 0)
        return super().select(0)


def run_virtual[T](work: Coroutine[Any, Any, T]) -> T:
    """asyncio.run() in virtual time."""
    return asyncio.run(work, loop_factory=VirtualLoop)
