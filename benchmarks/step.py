"""Time and memory of one optimizer step of a student. Floors: the step's own matrix products at the device's
rate; the memory that `vpmoe plan` predicts.

    python -m benchmarks.step [--shape tiny] [--layers N] [--tokens 2048] [--microbatches 2] [--recompute N]
    python -m benchmarks.step --shape vpmoe-6b --sweep [--steps 3]
    python -m benchmarks.step --shape vpmoe-6b --gpus 2 --card 79 --tokens 32768 --recompute 70 --sharded

Prints the median time of a Vanilla step, tokens per second, and the ratio to the floor: 6 floating-point
operations per token and active parameter, 2 more in recomputed layers, at the rate measured for a large
square product. Peak memory of PyTorch stands beside its prediction by vpmoe/api/memory.py, and beside what
the process has outside PyTorch and what the allocator holds unused. Then prints the time of a Rescored step
on the same batches; the two alternate. A step's time is from the end of a forward and backward to the end
of the next, as in training: weights are gathered beside the forward. On a GPU also MFU, which counts 6
operations per token and active parameter as a share of 989 TFLOP/s, and a table of the parts of a step on
rank 0, by events, beside floors; --kernels 20 adds the kernels that take most time.

--sweep measures the cases of SWEEP one after the other, each with the shape's first layers, and prints a line
for each, with the difference of the prediction to the peak in per cent. --sharded divides the sums of
gradients over the ranks, --expert-parallel the experts. --no-graphs runs layers without CUDA graphs, which
the trainer uses where it can (vpmoe/model/layer_graphs.py). --card gives PyTorch what it would have on a
smaller card: the third command is what `vpmoe plan` chooses for two of 80 GB.

On the CPU if CUDA_VISIBLE_DEVICES is set and empty (shape tiny; its
memory is not PyTorch's alone and is not compared). Documents (200 to 1,200 tokens) and scores are random, so
the loss has no meaning beyond being finite.
"""

import argparse
import contextlib
import gc
import os
import resource
import statistics
import sys
import threading
import time
from dataclasses import asdict, dataclass, field, replace

import torch

from benchmarks.gpu_times import (
    UPDATE_BYTES,
    GpuTimes,
    Kernels,
    copy_rate,
    gather_alone,
    kernels_of,
    print_kernels,
)
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

PEAK = 989e12
"""Floating-point operations of an H100 or H200 in a second in bf16, by their data sheet."""


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
    expert_parallel: int = 1
    """Ranks that share one set of experts."""


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
    targets: int = 0
    """Of all ranks in a step."""
    parts: dict[str, float] = field(default_factory=dict)
    """Medians of GPU time by part of a step, in milliseconds; empty on the CPU."""
    gather: float = 0.0
    """Milliseconds of gathering the weights, with nothing beside it."""
    kernels: Kernels = field(default_factory=dict)
    """Of one step; empty if they were not asked for."""


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


def measure(
    shape: Shape, case: Case, device: torch.device, microbatches: int, steps: int, kernels: bool = False
) -> Cost:
    """Medians of `steps` steps after one that is not counted, in which layers are captured. `kernels`: then
    one more step is profiled."""
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
        expert_parallel=case.expert_parallel,
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
                weighted = marks.watched(objective(kind)) if marks else objective(kind)
                # it reads its sums, so the backward has ended when it returns
                losses.append(learner.forward_backward(batches, weighted, positions=tokens).loss)
                before_this, ended = ended, time.perf_counter()
                seconds.append(ended - before_this)
                if kind == "Vanilla":
                    passes.append(ended - start)
                learner.step(3e-4)
    synchronize(device)
    parts = marks.medians(2) if marks else {}
    step, rescored_step, passed = (statistics.median(x[1:]) for x in (*times.values(), passes))
    if not on_gpu:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return Cost(step, rescored_step, passed, peak, 0, 0, losses, tokens)
    free, total = torch.cuda.mem_get_info()
    peak = torch.cuda.max_memory_allocated() + memory_of_graphs()
    reserved = torch.cuda.max_memory_reserved()
    outside = total - free - torch.cuda.memory_reserved()

    def one_step() -> None:
        learner.forward_backward(batches, objective("Vanilla"), positions=tokens)
        learner.step(3e-4)

    found = kernels_of(one_step) if kernels else {}
    gathered = gather_alone(learner)
    learner.close()
    return Cost(
        step,
        rescored_step,
        passed,
        peak,
        reserved - peak,
        outside,
        losses,
        tokens,
        int(counts[1:].sum()),
        parts,
        gathered,
        found,
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
        case.expert_parallel,
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
    text += f", expert-parallel over {case.expert_parallel}" if case.expert_parallel > 1 else ""
    return text + ("" if case.graphs else ", no graphs")


def print_parts(shape: Shape, case: Case, cost: Cost, rate: float, device: torch.device) -> None:
    """A line for each part of a step on this rank's GPU, beside its floor."""
    ranks = distributed.world_size()
    inside = (active_parameters(shape) - shape.vocabulary * shape.hidden) * cost.tokens / ranks
    head = shape.vocabulary * shape.hidden * cost.targets / ranks
    again = case.recomputed / shape.layers
    update = shape.parameters() / ranks * UPDATE_BYTES / copy_rate(device)
    floors = {
        "start": ("before the first forward", 0.0, ""),
        "forward": ("forward of the layers", 2e3 * inside / rate, "their products"),
        "head": ("loss head", 6e3 * head / rate, "three products of its targets"),
        "backward": ("backward of the layers", (4 + 2 * again) * 1e3 * inside / rate, "their products"),
        "sums": ("sums over ranks, not hidden", 0.0, ""),
        "optimizer": ("optimizer", 1e3 * update, f"{UPDATE_BYTES} bytes a parameter, as fast as a copy"),
        "gather": ("weights, beside the forward", cost.gather, "gathered alone"),
    }
    print("part of a step                    ms   floor")
    for name, (text, floor, what) in floors.items():
        spent = cost.parts.get(name, 0.0)
        times = f"{spent / floor:6.1f}×  {what}" if floor > 0.1 else ""
        print(f"{text:28} {spent:8.1f} {floor:7.1f} {times}")


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
    parser.add_argument(
        "--expert-parallel", type=int, default=1, metavar="N", help="ranks that share one set of experts"
    )
    parser.add_argument("--no-graphs", dest="graphs", action="store_false", help="layers without CUDA graphs")
    parser.add_argument("--sweep", action="store_true", help="measure the cases of SWEEP instead")
    parser.add_argument(
        "--steps", type=int, default=5, help="steps to measure, after one that is not counted"
    )
    parser.add_argument("--gpus", type=int, default=1, help="processes, one a GPU")
    parser.add_argument(
        "--kernels", type=int, default=0, metavar="N", help="profile a step; its N longest kernels"
    )
    parser.add_argument(
        "--card", type=int, metavar="GIB", help="give PyTorch what it would have on a card of so many GiB"
    )
    given = parser.parse_args()
    if given.sweep and given.expert_parallel > 1:
        parser.error("--sweep: its cases have no expert parallelism. Leave out --expert-parallel.")
    if given.gpus > 1 and "RANK" not in os.environ:
        placement = Placement(given.gpus, 0, given.gpus, "127.0.0.1", free_port())
        command = [sys.executable, "-m", "benchmarks.step", *sys.argv[1:]]
        sys.exit(launch_workers(placement, command, [], threading.Event()))
    device = devices.choose()
    distributed.start(device, given.expert_parallel)
    if given.card is not None:
        limit_memory(given.card * GIB, device)
    if given.sweep:
        sweep(given.shape, device, given.steps)
        distributed.stop()
        return
    layers = given.layers or SHAPES[given.shape].layers
    shape = replace(SHAPES[given.shape], layers=layers)
    case = Case(layers, given.tokens, given.recompute, given.sharded, given.graphs, given.expert_parallel)
    cost = measure(shape, case, device, given.microbatches, given.steps, given.kernels > 0)
    memory = predicted(shape, case)
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
            f"{cost.forward_backward * 1e3:,.0f}; {cost.tokens / cost.vanilla:,.0f} tokens/s",
            end="",
        )
        per_rank = cost.tokens / cost.vanilla / distributed.world_size()
        mfu = 6 * active_parameters(shape) * per_rank / PEAK
        print(f", {per_rank:,.0f} a GPU, {100 * mfu:.1f} % MFU" if device.type == "cuda" else "")
        if cost.parts:
            print_parts(shape, case, cost, rate, device)
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
        if cost.kernels:
            print_kernels(cost.kernels, given.kernels, "one step of this rank")
    distributed.stop()


if __name__ == "__main__":
    main()
