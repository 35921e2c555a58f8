"""benchmarks.gpu_times: each part of a step has its own time and no other part's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.gpu_times import GpuTimes
from tests.fakes import students
from vpmoe.objectives.vanilla import vanilla


class Gpu:
    """A GPU whose clock stands still but for `spend`; its events and streams have torch's methods."""

    milliseconds = 0.0

    def spend(self, milliseconds: float, after: Callable[..., Any] = lambda *_: None) -> Callable[..., Any]:
        """What calls `after`, and takes so long."""

        def timed(*args: Any) -> Any:
            found = after(*args)
            self.milliseconds += milliseconds
            return found

        return timed

    def event(self, enable_timing: bool) -> "Event":
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def record(self) -> None:
        self.at = self.gpu.milliseconds

    def elapsed_time(self, end: "Event") -> float:
        return end.at - self.at


class Stream:
    def wait_stream(self, other: "Stream") -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """In place of CUDA's."""
    found = Gpu()
    for name in ("Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: Stream())
    monkeypatch.setattr(torch.cuda, "Event", found.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return found


def test_each_part_of_a_step_has_its_own_time(
    device: torch.device, card: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of steps of two microbatches. What comes before the first forward is no backward."""
    it = students.learner(device)
    for owner, name, milliseconds in (
        (it, "_begin_gradients", 1),
        (it.student, "forward", 20),
        (it.ddp, "finish_grad_sync", 50_000),
        (it._update, "step", 600_000),
        (it.gather, "start", 7_000_000),
    ):
        monkeypatch.setattr(owner, name, card.spend(milliseconds, getattr(owner, name)))
    it.student.output.register_hook(card.spend(4000))
    batches = students.ragged_batches(torch.Generator().manual_seed(students.new_seed()), 2)
    counts = torch.stack([batch.counts for batch in batches]).sum(0)
    times = GpuTimes()
    with times.inside(it):
        for _ in range(3):
            objective = vanilla(counts, {"reasoning": 1.0, "final": 1.0})
            monkeypatch.setattr(objective, "loss", card.spend(300, objective.loss))
            times.begin()
            it.forward_backward(batches, times.watched(objective), int(counts[0]))
            it.step(1e-3)
    assert times.medians(1) == {
        "start": 1,
        "forward": 40,
        "head": 600,
        "backward": 8000,
        "sums": 50_000,
        "optimizer": 600_000,
        "gather": 7_000_000,
    }
