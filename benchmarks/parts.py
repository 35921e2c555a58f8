"""Time of a training step with each part of the student, beside the step without parts and a floor.

    python -m benchmarks.parts [--shape vpmoe-6b] [--layers 20] [--tokens 32768] [--steps 12] [--kernels 25]
    python -m benchmarks.parts --only "no part" all "all, with graphs"

Trains the shape's first layers at full width, from random weights, on one packed row of random documents of
300 to 4,000 tokens: without parts, with each part alone, with all. These steps run their layers without CUDA
graphs, which not every part allows; the last row has all parts and graphs, as in the trainer. "forward,
backward" and "optimizer" are medians; "GPU" is the time of the kernels of one forward and backward, by the
profiler. After the step and the kernels, the cost beside the step without parts, if that is measured; that of
the kernels varies less. MFU counts 6 floating-point operations per token and multiplied parameter (not the
attention's), as a share of 989 TFLOP/s; the floor is the same operations at the rate of a large square
product. GiB: PyTorch's peak. Then the kernels of a forward and backward of the last row that take most time.
Needs a GPU.
"""

import argparse
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.gpu_times import Kernels, kernels_of, print_kernels
from benchmarks.step import (
    PEAK,
    active_parameters,
    free_students,
    memory_of_graphs,
    product_rate,
    random_rows,
)
from vpmoe.model import device as devices
from vpmoe.model import distributed
from vpmoe.model.shapes import LOCKED_PARTS, PARTS, SHAPES, Shape
from vpmoe.objectives.vanilla import vanilla

GLOBAL = {"global_every": LOCKED_PARTS["global_every"]}
CASES: dict[str, dict[str, Any]] = {
    "no part": {},
    "all": LOCKED_PARTS,
    "window": GLOBAL | {"local_window": LOCKED_PARTS["local_window"]},
    "ALiBi": GLOBAL | {"alibi": True},
    "softmax offset": {"softmax_offset": True},
    "window, ALiBi, offset": GLOBAL
    | {"local_window": LOCKED_PARTS["local_window"], "alibi": True, "softmax_offset": True},
    "tensor products": GLOBAL | {"tensor_product_ranks": LOCKED_PARTS["tensor_product_ranks"]},
    "learned frequencies": {"learned_frequencies": True},
    "value residual": {"value_residual": True},
    "biases": {"linear_biases": True},
    "router's bias": {"router_bias": True},
}
"""Name of a row → the parts that are on. In global layers a part of local layers is off, and the other way
round."""
GRAPHS = "all, with graphs"
ROWS = CASES | {GRAPHS: LOCKED_PARTS}


@dataclass
class Cost:
    """Of one step, in milliseconds."""

    forward_backward: float
    optimizer: float
    kernels: Kernels
    """Of one forward and backward."""
    peak: int
    """Bytes that PyTorch had allocated, those of the graphs among them."""

    @property
    def total(self) -> float:
        return self.forward_backward + self.optimizer

    @property
    def on_gpu(self) -> float:
        return sum(time for _, time in self.kernels.values())


def measure(shape: Shape, device: torch.device, tokens: int, steps: int, graphs: bool) -> Cost:
    """Medians of `steps` steps after two that are not counted."""
    from vpmoe.model.learner import Learner

    free_students(device)
    learner = Learner.build(
        shape,
        device,
        sequence_length=tokens,
        seed=1,
        weight_decay=0.1,
        gradient_clip=1.0,
        graphs=graphs,
    )
    batches = random_rows(shape, 1, tokens, torch.Generator().manual_seed(1), (300, 4000))
    counts = batches[0].counts
    times = []

    def forward_backward() -> None:
        learner.forward_backward(batches, vanilla(counts, {"reasoning": 1.0, "final": 1.0}), int(counts[0]))
        torch.cuda.synchronize()

    for number in range(2 + steps):
        if number < 2:  # a capture has no head
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        forward_backward()
        middle = time.perf_counter()
        learner.step(3e-4)
        torch.cuda.synchronize()
        times.append((1e3 * (middle - start), 1e3 * (time.perf_counter() - middle)))
    peak = torch.cuda.max_memory_allocated() + memory_of_graphs()
    kernels = kernels_of(forward_backward)
    learner.step(3e-4)  # waits for the sums of gradients: see free_students
    passes, updates = (statistics.median(part) for part in zip(*times[2:], strict=True))
    return Cost(passes, updates, kernels, peak)


def beside(found: float, without: float | None) -> str:
    """The cost beside the row without parts; blank if that row is not measured."""
    return 7 * " " if without is None else f"{100 * (found / without - 1):+5.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="vpmoe-6b")
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=32768, help="positions of the microbatch")
    parser.add_argument("--steps", type=int, default=12, help="steps to measure, after two not counted")
    parser.add_argument("--kernels", type=int, default=25, help="rows of the table of kernels")
    parser.add_argument(
        "--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="measure these rows alone"
    )
    given = parser.parse_args()
    device = devices.choose()
    distributed.start(device)
    rate = product_rate(device)
    off = {name: getattr(Shape, name) for name in PARTS}
    plain = replace(SHAPES[given.shape], layers=given.layers, **off)
    print(f"{'':22} forward, backward  optimizer    step             GPU  tokens/s    MFU  floor  GiB")
    least: tuple[float | None, float | None] = (None, None)
    for row in [row for row in ROWS if row in given.only]:
        shape = replace(plain, **ROWS[row])
        cost = measure(shape, device, given.tokens, given.steps, row == GRAPHS)
        if row == "no part":
            least = cost.total, cost.on_gpu
        operations, seconds = 6 * active_parameters(shape) * given.tokens, cost.total / 1e3
        print(
            f"{row:22} {cost.forward_backward:14.1f} ms {cost.optimizer:7.1f} ms "
            f"{beside(cost.total, least[0])} {cost.on_gpu:6.1f} ms "
            f"{beside(cost.on_gpu, least[1])} {given.tokens / seconds:9,.0f} "
            f"{100 * operations / seconds / PEAK:4.1f} % {seconds * rate / operations:5.1f}× "
            f"{cost.peak / 2**30:4.0f}",
            flush=True,
        )
    print_kernels(cost.kernels, given.kernels, row)
    distributed.stop()


if __name__ == "__main__":
    main()
