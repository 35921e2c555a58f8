"""Time and memory of the loss head, forward and backward, compared with eager torch and other fused heads.

    python -m benchmarks.head [--tokens 8192] [--hidden 1024] [--vocabulary 201088] [--repeats 10]
        [--device cuda]

Floor: the head's three matrix products alone (logits, gradient of hidden, gradient of the matrix). Peers that
cannot be imported are skipped. Times are medians. Memory is what is allocated beyond the inputs: on a GPU the
allocator's peak, on a CPU the largest single result. On a GPU in bf16; with --device cpu in fp32, where
the default size takes minutes (try --tokens 256).
"""

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vpmoe.model.head import head_loss

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    share = torch.full((len(targets),), 1 / len(targets), device=targets.device)
    rows = torch.arange(len(targets), device=targets.device)
    return head_loss(hidden, weight, targets, lambda logp_t, rows_t: share[rows_t], rows)[0]


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy((hidden @ weight.T).float(), targets)


def peers() -> dict[str, Loss]:
    """The fused heads of other packages by name, if installed."""
    found: dict[str, Loss] = {}
    for name, module, function in (
        ("Liger", "liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"),
        ("cut-cross-entropy", "cut_cross_entropy", "linear_cross_entropy"),
        ("quack", "quack.linear_cross_entropy", "chunked_linear_cross_entropy"),
    ):
        try:
            peer = getattr(importlib.import_module(module), function)
        except ImportError:
            continue
        found[name] = lambda hidden, weight, targets, peer=peer: peer(hidden, weight, targets)
    return found


class Largest(TorchDispatchMode):
    """Records the size in bytes of the largest result of any operation."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        self.bytes = max(
            [self.bytes, *(leaf.nbytes for leaf in tree_leaves(result) if isinstance(leaf, Tensor))]
        )
        return result


def milliseconds(action: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median milliseconds of `repeats` calls, after one that is not counted. On a GPU by events, with each
    call queued behind the one before, as in training: time of the host counts where the GPU waits for it."""
    action()
    if device.type != "cuda":
        starts = [time.perf_counter()]
        for _ in range(repeats):
            action()
            starts.append(time.perf_counter())
        return statistics.median(1000 * (stop - start) for start, stop in pairwise(starts))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        action()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in pairwise(events))


def mebibytes(action: Callable[[], object], device: torch.device) -> float:
    """Memory of a call in MiB: on a GPU the peak beyond what is allocated before, else the largest result."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with Largest() as largest:
        action()
    return largest.bytes / 2**20


def products(hidden: Tensor, weight: Tensor, repeats: int) -> float:
    """Milliseconds of the three matrix products that every head needs."""
    gradient = torch.randn(len(hidden), len(weight), device=hidden.device, dtype=hidden.dtype)

    def step() -> None:
        torch.mm(hidden, weight.T)
        torch.mm(gradient, weight)
        torch.mm(gradient.T, hidden)

    return milliseconds(step, repeats, hidden.device)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in {"tokens": 8192, "hidden": 1024, "vocabulary": 201_088, "repeats": 10}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    hidden = torch.randn(args.tokens, args.hidden, device=device, dtype=dtype, requires_grad=True)
    weight = (0.02 * torch.randn(args.vocabulary, args.hidden, device=device)).to(dtype).requires_grad_()
    targets = torch.randint(0, args.vocabulary, (args.tokens,), device=device)
    floor = products(hidden.detach(), weight.detach(), args.repeats)
    print(
        f"{args.tokens} tokens, hidden {args.hidden}, vocabulary {args.vocabulary}, "
        f"{dtype}, {device}; floor {floor:.1f} ms"
    )
    for name, loss in {"head_loss": ours, "eager torch": eager, **peers()}.items():

        def step(loss: Loss = loss) -> None:
            torch.autograd.grad(loss(hidden, weight, targets), (hidden, weight))

        took = milliseconds(step, args.repeats, device)
        print(
            f"{name:20} {took:9.1f} ms  {took / floor:5.2f} × the floor  {mebibytes(step, device):9.0f} MiB"
        )


if __name__ == "__main__":
    main()
