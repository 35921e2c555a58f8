"""Time and memory of one optimizer step of a student. Floors: the step's own matrix products at the device's
rate; the memory that `vpmoe plan` predicts.

    python -m benchmarks.step [--shape tiny] [--layers N] [--tokens 2048] [--microbatches 2] [--recompute N]
    python -m benchmarks.step --shape vpmoe-6b --sweep [--steps 3]
    python -m benchmarks.step --shape vpmoe-6b --gpus 2 --card 79 --tokens 32768 --recompute 74 --sharded

Prints the median time of a Vanilla step, tokens per second, and the ratio to the floor: 6 floating-point
operations per token and active parameter, 2 more in recomputed layers, at the rate measured for a large
square product. Peak memory of PyTorch stands beside its prediction by vpmoe/api/memory.py, and beside what
the process has outside PyTorch and what the allocator holds unused. Then prints the time of a Rescored step
on the same batches; the two alternate. A step's time is from the end of a forward and backward to the end
of the next, as in training: weights are gathered beside the forward. On a GPU a line splits it by events:
forward and backward; sums over the ranks that did not hide beside it; optimizer; and the gather of the
weights.

--sweep measures the cases of SWEEP one after the other, each with the shape's first layers, and prints a line
for each, with the difference of the prediction to the peak in per cent. --sharded divides the sums of
gradients over the ranks. --no-graphs runs layers without CUDA graphs, which the trainer uses where it can
(vpmoe/model/layer_graphs.py). --card gives PyTorch what it would have on a smaller card: the third command is
what `vpmoe plan` chooses for two of 80 GB.

On the CPU if CUDA_VISIBLE_DEVICES is set and empty (shape tiny; its
memory is not PyTorch's alone and is not compared). Documents (200 to 1,200 tokens) and scores are random, so
the loss has no meaning beyond being finite.
"""

import argparse
import contextlib
import gc
import itertools
import os
import resource
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

from vpmoe.api.card import GIB
from vpmoe.api.memory import TrainingMemory, training_memory
from vpmoe.api.stages import Confidence
from vpmoe.model import device as devices
from vpmoe.model import distributed
from vpmoe.model.batch import Batch
from vpmoe.model.objective import Objective
from vpmoe.model.shapes import SHAPES, Shape
from vpmoe.objectives.rescored import rescored
from vpmoe.objectives.vanilla import vanilla
from vpmoe.process.launcher import Placement, free_port, launch_workers

if TYPE_CHECKING:
    from vpmoe.model.learner import Learner


def active_parameters(shape: Shape) -> int:
    """Number of parameters that a token is multiplied with: without the other experts and the embeddings."""
    return shape.active_parameters() - shape.vocabulary * shape.hidden


def random_rows(
    shape: Shape,
    sequences: int,
    length: int,
    generator: torch.Generator,
    sizes: tuple[int, int] = (200, 1200),
) -> list[Batch]:
    """`sequences` batches of one packed row of random documents, whose lengths are in `sizes`."""
    batches = []
    for _ in range(sequences):
        tokens = torch.randint(0, shape.vocabulary, (1, length), generator=generator)
        spans, documents = (
            torch.ones((1, length), dtype=torch.uint8),
            torch.full((1, length), -1, dtype=torch.int32),
        )
        start = number = 0
        while start < length:
            size = int(torch.randint(*sizes, (), generator=generator))
            documents[0, start : start + size] = number
            spans[0, start : start + size // 4] = 0
            spans[0, start + size // 2 : start + size] = 2
            start, number = start + size, number + 1
        logp = -4 * torch.rand((1, length), generator=generator)
        batches.append(Batch.from_rows(tokens, spans, documents, logp))
    return batches


def product_rate(device: torch.device) -> float:
    """Floating-point operations per second of a large square product in the training type; median of five."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        left @ right
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[1:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Case:
    """What is measured."""

    layers: int
    tokens: int
    """Positions of a microbatch, one packed row."""
    recomputed: int
    sharded: bool = False
    graphs: bool = True


SWEEP = (
    Case(20, 8192, 0),
    Case(20, 16_384, 0),
    Case(20, 32_768, 0),
    Case(20, 32_768, 10),
    Case(20, 32_768, 20),
    Case(20, 16_384, 20),
    Case(20, 65_536, 20),
    Case(40, 16_384, 20),
    Case(40, 32_768, 0),
    Case(20, 16_384, 20, sharded=True),
)
"""Of vpmoe-6b on a card of 141 GB: each term of the arithmetic decides one of them, and pairs show what a
microbatch costs beside its tokens (FIXED of vpmoe/api/microbatch.py)."""


LEFT = GIB // 2
"""Bytes that may be allocated before a student is built: workspaces of products."""


@dataclass
class Cost:
    """Medians, in seconds, and bytes."""

    vanilla: float
    rescored: float
    forward_backward: float
    peak: int
    """Most that PyTorch had allocated. With graphs: in a step after the capture, and with what is the graphs'
    alone."""
    unused: int
    """What its allocator held beside that at its peak."""
    outside: int
    """What this process and others have on the GPU beside PyTorch's."""
    losses: list[float]
    tokens: int
    parts: dict[str, float] = field(default_factory=dict)
    """Medians of GPU time by part of a step, in milliseconds; empty on the CPU."""


class GpuTimes:
    """When a GPU reaches the parts of a step, by events in its streams. Nothing waits for them."""

    def __init__(self) -> None:
        self._steps: list[dict[str, torch.cuda.Event]] = []
        self._beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """A forward and backward follows."""
        self._steps.append({})
        self.mark("begin")

    def mark(self, name: str) -> None:
        event = self._steps[-1][name] = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def inside(self, learner: "Learner") -> Iterator[None]:
        """Mark the parts of the learner's steps."""
        finish, start = learner.ddp.finish_grad_sync, learner.gather.start

        def finish_sums(*args: Any, **kwargs: Any) -> None:
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

        with (
            patch.object(learner.ddp, "finish_grad_sync", finish_sums),
            patch.object(learner.gather, "start", start_gather),
        ):
            yield

    def medians(self, skipped: int) -> dict[str, float]:
        """In milliseconds, without the first `skipped` steps. Waits for the GPU."""
        torch.cuda.synchronize()
        names = ("begin", "passes", "sums", "optimizer", "gather")
        return {
            name: statistics.median(
                step[before].elapsed_time(step[name])  # type: ignore[no-untyped-call]
                for step in self._steps[skipped:]
            )
            for before, name in itertools.pairwise(names)
        }


def free_students(device: torch.device) -> None:
    """Free the students of earlier measurements, so that a peak is this one's alone. Raises RuntimeError if
    more than LEFT stays allocated.

    A student, its DDP and its hooks refer to each other, so a collection has to free them. NCCL refers to
    gradients until their sum is waited for, or until a later collective: an optimizer step must be last.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        if (held := torch.cuda.memory_allocated(device)) > LEFT:
            raise RuntimeError(
                f"{held / GIB:.1f} GiB are still allocated before a student is built, which its peak would "
                "include. Something refers to an earlier one."
            )


def memory_of_graphs() -> int:
    """Bytes in which captured graphs keep activations and temporary tensors. PyTorch counts them as reserved,
    but not as allocated."""
    segments = torch.cuda.memory_snapshot()
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in segments
        if segment["segment_pool_id"] != (0, 0)
    )


def measure(shape: Shape, case: Case, device: torch.device, microbatches: int, steps: int) -> Cost:
    """Medians of `steps` steps after one that is not counted, in which layers are captured."""
    from vpmoe.model.learner import Learner

    on_gpu = device.type == "cuda"
    free_students(device)
    learner = Learner.build(
        shape,
        device,
        sequence_length=case.tokens,
        seed=1,
        weight_decay=0.1,
        gradient_clip=1.0,
        recomputed_layers=case.recomputed,
        sharded_gradients=case.sharded,
        graphs=case.graphs,
    )
    generator = torch.Generator().manual_seed(1 + distributed.rank())
    batches = random_rows(shape, microbatches, case.tokens, generator)
    counts = distributed.sum_over_ranks(torch.stack([batch.counts for batch in batches]).sum(0))
    tokens, even = int(counts[0]), {"reasoning": 1.0, "final": 1.0}

    def objective(kind: str) -> Objective:
        return (
            vanilla(counts, even)
            if kind == "Vanilla"
            else rescored(counts, even, Confidence(), {"reasoning": -1.0, "final": -1.0})
        )

    times: dict[str, list[float]] = {"Vanilla": [], "Rescored": []}
    passes, losses = [], []
    marks = GpuTimes() if on_gpu else None
    with marks.inside(learner) if marks else contextlib.nullcontext():
        synchronize(device)
        ended = time.perf_counter()
        for number in range(steps + 1):
            if on_gpu and number < 2:  # building holds weights twice for a moment, and a capture has no head
                torch.cuda.reset_peak_memory_stats()
            for kind, seconds in times.items():
                start = time.perf_counter()
                if marks:
                    marks.begin()
                # it reads its sums, so the backward has ended when it returns
                losses.append(learner.forward_backward(batches, objective(kind), positions=tokens).loss)
                if marks:
                    marks.mark("passes")
                before_this, ended = ended, time.perf_counter()
                seconds.append(ended - before_this)
                if kind == "Vanilla":
                    passes.append(ended - start)
                learner.step(3e-4)
    synchronize(device)
    parts = marks.medians(2) if marks else {}
    step, rescored_step, passed = (statistics.median(x[1:]) for x in (*times.values(), passes))
    if marks:
        passed = parts["passes"] / 1e3
    if not on_gpu:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return Cost(step, rescored_step, passed, peak, 0, 0, losses, tokens)
    free, total = torch.cuda.mem_get_info()
    peak = torch.cuda.max_memory_allocated() + memory_of_graphs()
    return Cost(
        step,
        rescored_step,
        passed,
        peak,
        torch.cuda.max_memory_reserved() - peak,
        total - free - torch.cuda.memory_reserved(),
        losses,
        tokens,
        parts,
    )


def limit_memory(card: int, device: torch.device) -> None:
    """Let PyTorch allocate as much as it could on a card of `card` bytes, on which CUDA and NCCL have as much
    as here."""
    distributed.sum_over_ranks(torch.ones(1))  # NCCL allocates its buffers
    free, total = torch.cuda.mem_get_info(device)
    outside = total - free - torch.cuda.memory_reserved(device)
    torch.cuda.set_per_process_memory_fraction((card - outside) / total, device)


def predicted(shape: Shape, case: Case) -> TrainingMemory:
    """By the plan's arithmetic, for this shape's layers and these ranks."""
    return training_memory(
        shape.size(),
        distributed.world_size(),
        1,
        case.tokens,
        case.recomputed,
        case.sharded,
        graphs=case.graphs,
    )


def operations(shape: Shape, case: Case) -> float:
    """Floating-point operations of a token, forward and backward."""
    inside = active_parameters(shape) - shape.vocabulary * shape.hidden
    return 6 * active_parameters(shape) + 2 * inside * case.recomputed / shape.layers


def describe(case: Case) -> str:
    text = f"{case.layers} layers, {case.tokens:,} positions, {case.recomputed} recomputed"
    text += ", sharded gradients" if case.sharded else ""
    return text + ("" if case.graphs else ", no graphs")


def sweep(name: str, device: torch.device, steps: int) -> None:
    """A line for each case of SWEEP."""
    print(
        "layers  positions  recomputed  gradients  predicted  measured     off  outside  unused  "
        "pass, ms  step, ms  tokens/s"
    )
    for case in SWEEP:
        shape = replace(SHAPES[name], layers=case.layers)
        cost, memory = measure(shape, case, device, 1, steps), predicted(shape, case)
        expected = memory.total - memory.context
        gradients = "sharded" if case.sharded else "whole"
        print(
            f"{case.layers:6} {case.tokens:10,} {case.recomputed:11}  {gradients:>9} "
            f"{expected / GIB:10.1f} {cost.peak / GIB:9.1f} {100 * (expected / cost.peak - 1):+6.1f} % "
            f"{cost.outside / GIB:8.1f} {cost.unused / GIB:7.1f} {cost.forward_backward * 1e3:9,.0f} "
            f"{cost.vanilla * 1e3:9,.0f} {cost.tokens / cost.vanilla:9,.0f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--layers", type=int, help="the shape's first layers alone (default: all)")
    parser.add_argument("--tokens", type=int, default=2048, help="positions of a microbatch, one row")
    parser.add_argument("--microbatches", type=int, default=2, help="microbatches of a rank in a step")
    parser.add_argument("--recompute", type=int, default=0, help="layers that are recomputed")
    parser.add_argument("--sharded", action="store_true", help="each rank keeps its share of the gradients")
    parser.add_argument("--no-graphs", dest="graphs", action="store_false", help="layers without CUDA graphs")
    parser.add_argument("--sweep", action="store_true", help="measure the cases of SWEEP instead")
    parser.add_argument(
        "--steps", type=int, default=5, help="steps to measure, after one that is not counted"
    )
    parser.add_argument("--gpus", type=int, default=1, help="processes, one a GPU")
    parser.add_argument(
        "--card", type=int, metavar="GIB", help="give PyTorch what it would have on a card of so many GiB"
    )
    given = parser.parse_args()
    if given.gpus > 1 and "RANK" not in os.environ:
        placement = Placement(given.gpus, 0, given.gpus, "127.0.0.1", free_port())
        command = [sys.executable, "-m", "benchmarks.step", *sys.argv[1:]]
        sys.exit(launch_workers(placement, command, [], threading.Event()))
    device = devices.choose()
    distributed.start(device)
    if given.card is not None:
        limit_memory(given.card * GIB, device)
    if given.sweep:
        sweep(given.shape, device, given.steps)
        distributed.stop()
        return
    layers = given.layers or SHAPES[given.shape].layers
    shape = replace(SHAPES[given.shape], layers=layers)
    case = Case(layers, given.tokens, given.recompute, given.sharded, given.graphs)
    cost, memory = measure(shape, case, device, given.microbatches, given.steps), predicted(shape, case)
    rate = product_rate(device)
    floor = operations(shape, case) * cost.tokens / rate / distributed.world_size()
    if distributed.rank() == 0:
        print(
            f"{shape.name} on {device}, {distributed.world_size()} ranks, {describe(case)}: "
            f"{shape.parameters():,} parameters, {active_parameters(shape):,} active; {cost.tokens:,} tokens "
            "per step"
        )
        print(
            f"step {cost.vanilla * 1e3:,.0f} ms, of which forward and backward "
            f"{cost.forward_backward * 1e3:,.0f}; {cost.tokens / cost.vanilla:,.0f} tokens/s"
        )
        if parts := cost.parts:
            print(
                f"on the GPU: forward and backward {parts['passes']:,.1f} ms, then sums over ranks that did "
                f"not hide beside it {parts['sums']:.1f}, optimizer {parts['optimizer']:.1f}; gather of "
                f"weights {parts['gather']:.1f}, beside the next forward"
            )
        expected = memory.total - memory.context
        print(f"peak memory {cost.peak / GIB:.1f} GiB", end="")
        if device.type == "cuda":
            print(
                f", predicted {expected / GIB:.1f} ({100 * (expected / cost.peak - 1):+.1f} %); beside it "
                f"{cost.outside / GIB:.1f} GiB outside PyTorch and {cost.unused / GIB:.1f} unused, together "
                f"{(cost.outside + cost.unused) / GIB:.1f} of {memory.context / GIB:.0f} predicted",
                end="",
            )
        items = ", ".join(f"{name} {value / GIB:.1f}" for name, value in asdict(memory).items())
        print(f"\npredicted by part, GiB: {items}")
        print(f"loss {cost.losses[0]:.2f} → {cost.losses[-2]:.2f}")
        print(
            f"floor of its products {floor * 1e3:,.0f} ms at {rate / 1e12:,.1f} TFLOP/s: "
            f"{cost.vanilla / floor:.1f}×"
        )
        beside = cost.rescored / cost.vanilla
        print(f"Rescored step {cost.rescored * 1e3:,.0f} ms: {beside:.3f}× the Vanilla step")
    distributed.stop()


if __name__ == "__main__":
    main()
