"""Where a GPU's time in a training step goes: by part of the step, from events, and by kernel, from the
profiler."""

import contextlib
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd import DeviceType  # type: ignore[attr-defined]  # is not in its __all__
from torch.profiler import ProfilerActivity, profile

from vpmoe.model.objective import Objective

if TYPE_CHECKING:
    from vpmoe.model.learner import Learner

Kernels = dict[str, tuple[int, float]]
"""Name → launches, and their time on the GPU in milliseconds."""
UPDATE_BYTES = 34
"""That an optimizer step moves for a parameter of a rank's share: gradient, fp32 parameter and two moments
are read, the last three and the bf16 weight written, and the gradient read once more for the norm."""


class GpuTimes:
    """When a GPU reaches the parts of a step, by events in its streams. Nothing waits for them."""

    def __init__(self) -> None:
        self._steps: list[list[tuple[str, torch.cuda.Event]]] = []
        self._beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """A forward and backward follows."""
        self._steps.append([])
        self.mark("begin")

    def mark(self, name: str) -> None:
        """The part `name` ends here; the next one begins."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()  # type: ignore[no-untyped-call]
        self._steps[-1].append((name, event))

    def _begin_forward(self) -> None:
        """What ends here is the backward of the microbatch before, if there is one."""
        latest, _ = self._steps[-1][-1]
        self.mark("start" if latest == "begin" else "backward")

    def watched(self, objective: Objective) -> Objective:
        """The objective, whose loss is marked as a part of its own."""
        loss = objective.loss

        def marked(*args: Any) -> tuple[Tensor, Tensor]:
            self.mark("forward")
            result = loss(*args)
            self.mark("head")
            return result

        objective.loss = marked  # type: ignore[method-assign]
        return objective

    @contextlib.contextmanager
    def inside(self, learner: "Learner") -> Iterator[None]:
        """Mark the other parts of the learner's steps."""
        finish, start = learner.ddp.finish_grad_sync, learner.gather.start

        def finish_sums(*args: Any, **kwargs: Any) -> None:
            self.mark("backward")
            finish(*args, **kwargs)
            self.mark("sums")

        def start_gather() -> None:
            self.mark("optimizer")
            start()
            self._beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._beside):
                for work in learner.gather._pending:
                    work.wait()
                self.mark("gather")

        hook = learner.ddp.register_forward_pre_hook(lambda *_: self._begin_forward())
        with (
            patch.object(learner.ddp, "finish_grad_sync", finish_sums),
            patch.object(learner.gather, "start", start_gather),
        ):
            yield
        hook.remove()

    def medians(self, skipped: int) -> dict[str, float]:
        """Of each part in milliseconds, over all of a step's microbatches, without the first `skipped` steps.
        Waits for the GPU."""
        torch.cuda.synchronize()
        found = defaultdict(list)
        for step in self._steps[skipped:]:
            spent: dict[str, float] = defaultdict(float)
            for (_, before), (name, event) in itertools.pairwise(step):
                spent[name] += before.elapsed_time(event)  # type: ignore[no-untyped-call]
            for name, milliseconds in spent.items():
                found[name].append(milliseconds)
        return {name: statistics.median(values) for name, values in found.items()}


def gather_alone(learner: "Learner") -> float:
    """Milliseconds of gathering the weights with nothing beside it. All ranks call it."""
    times = []
    for _ in range(3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        learner.gather.start()
        learner.gather.wait()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def copy_rate(device: torch.device) -> float:
    """Bytes a second that a large copy inside the GPU reads and writes."""
    source = torch.zeros(1 << 28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times, repeats = [], 20
    for _ in range(3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(repeats):
            target.copy_(source)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 2 * source.nbytes * repeats / statistics.median(times)


def kernels_of(call: Callable[[], object]) -> Kernels:
    """The kernels that `call` runs, by the profiler."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    found: Kernels = {}
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA:
            launches, spent = found.get(event.name, (0, 0.0))
            found[event.name] = launches + 1, spent + event.device_time / 1e3
    return found


def print_kernels(kernels: Kernels, rows: int, of_what: str) -> None:
    """The kernels that take most of the time."""
    total = sum(spent for _, spent in kernels.values())
    launches = sum(count for count, _ in kernels.values())
    print(f"\n{total:.1f} ms on the GPU in {launches:,} kernels, {of_what}:")
    for name, (count, spent) in sorted(kernels.items(), key=lambda kernel: -kernel[1][1])[:rows]:
        print(f"{spent:8.2f} ms {100 * spent / total:5.1f} % {count:6,} × {name[:120]}")
