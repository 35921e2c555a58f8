"""Engine processes for tests of a pool whose engines share devices on the CPU, in place of
vpmoe.inference.engine.

`python -m tests.fakes.shared_engine` runs the real engine; only the memory of a GPU, which there is none of,
is a number. With SHARED_ENGINES, such as 2,1, device n holds the n-th of these numbers of engines, and
nothing is computed: QuickEngine.
"""

import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vpmoe.api.card import GIB
from vpmoe.data.tokenizer import Ids
from vpmoe.failure import Permanent
from vpmoe.inference.engine import StudentEngine, serve
from vpmoe.inference.engine_pool import Completion, SamplingRequest
from vpmoe.model.shapes import SHAPES
from vpmoe.plan.sampling import EngineMemory, divide_card

CARD = 139 * GIB
BROKEN = "13"
"""The version that one device cannot load."""


class SharedEngine(StudentEngine):
    """The student in vLLM on the CPU, as one of several on a card."""

    def divide(self, most: int) -> EngineMemory:
        return divide_card(self.size, CARD, self.max_length, most)


class QuickEngine:
    """An engine without a student: it answers with what tells where it runs and what it has loaded."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[int, SamplingRequest]] = deque()
        self.growing: set[int] = set()
        self.device = int(os.environ["CUDA_VISIBLE_DEVICES"])
        self.loaded = self.engines = 0

    def divide(self, most: int) -> EngineMemory:
        engines = int(os.environ["SHARED_ENGINES"].split(",")[self.device])
        return EngineMemory(80 * GIB, min(most, engines), 11 * GIB, 0, 0, 0, 24 * GIB, 150)

    def load(self, folder: Path, engines: int = 1) -> None:
        """The name of `folder` is a number. Raises Permanent for BROKEN on device 1."""
        if folder.name == BROKEN and self.device == 1:
            raise Permanent(f"{folder} is not a complete checkpoint")
        self.loaded, self.engines = int(folder.name), engines

    def score(self, sequences: Sequence[Ids]) -> list[NDArray[np.float32]]:
        """[device, version, engines that share the device] of each sequence."""
        return [np.float32([self.device, self.loaded, self.engines]) for _ in sequences]

    def add(self, numbered: Sequence[tuple[int, SamplingRequest]]) -> None:
        self.waiting.extend(numbered)

    def step(self) -> list[tuple[int, Completion]]:
        """Finishes the oldest request: one token, the process's number."""
        number, _ = self.waiting.popleft()
        return [(number, Completion(np.int32([os.getpid()]), np.float32([-1.0])))]

    def drop(self) -> None:
        self.waiting.clear()


if __name__ == "__main__":
    if "SHARED_ENGINES" in os.environ:
        serve(lambda shape, max_length: QuickEngine())  # type: ignore[arg-type, return-value]
    else:
        serve(lambda shape, max_length: SharedEngine(SHAPES[shape], max_length))
