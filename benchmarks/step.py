"""Time of one optimizer step of a student. Floor: the step's own matrix products at the device's rate.

    python -m benchmarks.step [--shape tiny] [--sequence 2048] [--sequences 2] [--steps 5]

Prints the median time of a Vanilla step, tokens per second, peak memory and the ratio to the floor: 6
floating-point operations per token and active parameter (8 with activation recomputation), at the rate
measured for a large square product. Then prints the time of a Rescored step on the same batches; the two
alternate. One process, on one GPU, or on the CPU if CUDA_VISIBLE_DEVICES is set and empty (shape tiny).
Documents (200 to 1,200 tokens) and scores are random, so the loss has no meaning beyond being finite.
"""

import argparse
import resource
import statistics
import time

import torch

from vpmoe.api.stages import Confidence
from vpmoe.model import device as devices
from vpmoe.model import distributed
from vpmoe.model.batch import Batch
from vpmoe.model.objective import Objective
from vpmoe.model.shapes import SHAPES, Shape
from vpmoe.objectives.rescored import rescored
from vpmoe.objectives.vanilla import vanilla


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--sequence", type=int, default=2048, help="positions of a packed sequence")
    parser.add_argument("--sequences", type=int, default=2, help="sequences per step, each a microbatch")
    parser.add_argument(
        "--steps", type=int, default=5, help="steps to measure, after one that is not counted"
    )
    given = parser.parse_args()
    shape = SHAPES[given.shape]
    device = devices.choose()
    distributed.start(device)
    from vpmoe.model.learner import Learner

    learner = Learner.build(
        shape, device, sequence_length=given.sequence, seed=1, weight_decay=0.1, gradient_clip=1.0
    )
    batches = random_rows(shape, given.sequences, given.sequence, torch.Generator().manual_seed(1))
    counts = torch.stack([batch.counts for batch in batches]).sum(0)
    tokens, even = int(counts[0]), {"reasoning": 1.0, "final": 1.0}

    def objective(kind: str) -> Objective:
        return (
            vanilla(counts, even)
            if kind == "Vanilla"
            else rescored(counts, even, Confidence(), {"reasoning": -1.0, "final": -1.0})
        )

    times: dict[str, list[float]] = {"Vanilla": [], "Rescored": []}
    losses = []
    for _ in range(given.steps + 1):
        for kind, seconds in times.items():
            synchronize(device)
            start = time.perf_counter()
            losses.append(learner.forward_backward(batches, objective(kind), positions=tokens).loss)
            learner.step(3e-4)
            synchronize(device)
            seconds.append(time.perf_counter() - start)
    rate = product_rate(device)
    step, rescored_step = (statistics.median(seconds[1:]) for seconds in times.values())
    floor = (8 if shape.recompute else 6) * active_parameters(shape) * tokens / rate
    peak = (
        torch.cuda.max_memory_allocated()
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    print(
        f"{shape.name} on {device}: {shape.parameters():,} parameters, "
        f"{active_parameters(shape):,} active; {tokens:,} tokens per step"
    )
    print(f"step {step * 1e3:,.0f} ms, {tokens / step:,.0f} tokens/s; peak memory {peak / 2**30:.1f} GiB")
    print(f"loss {losses[0]:.2f} → {losses[-2]:.2f}")
    print(f"floor of its products {floor * 1e3:,.0f} ms at {rate / 1e12:,.1f} TFLOP/s: {step / floor:.1f}×")
    print(f"Rescored step {rescored_step * 1e3:,.0f} ms: {rescored_step / step:.3f}× the Vanilla step")
    distributed.stop()


if __name__ == "__main__":
    main()
