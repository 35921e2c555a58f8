"""One rank of tests/gpu/test_expert_parallel.py: the same student with experts divided over two ranks and
with all experts on each; losses, gradients and weights."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch import distributed as dist

from tests.fakes.students import documents
from vpmoe.model import distributed
from vpmoe.model.batch import Batch
from vpmoe.model.device import choose
from vpmoe.model.learner import Learner
from vpmoe.model.objective import Objective
from vpmoe.model.shapes import SHAPES, Shape
from vpmoe.objectives.vanilla import vanilla

EVERY_LAYER = replace(SHAPES["tiny"], router_bias=True, vocabulary=2048)
ONE_MIXTURE = replace(EVERY_LAYER, layers=2)
"""Its only routers read the same bits in both layouts, so they choose the same experts."""
ROW = 512
STEPS = 3
ALIVE: list[Learner] = []
"""Learners that outlive the process groups, as a trainer's does."""


def microbatches(step: int, number: int) -> list[Batch]:
    """This rank's. The second half of a row of rank 1 is padding."""
    rank = distributed.rank()
    generator = torch.Generator().manual_seed(10 * step + rank)
    lengths = [120, 100] if rank else [200, 120, 1, 150]
    return [Batch.from_rows(*documents(generator, lengths, ROW, 2048)) for _ in range(number)]


def objective_of(batches: list[Batch], device: torch.device) -> tuple[Objective, int]:
    counts = distributed.sum_over_ranks(torch.stack([batch.counts for batch in batches]).sum(0).to(device))
    return vanilla(counts, {"reasoning": 1.0, "final": 1.0}), int(counts[0])


def learner(shape: Shape, device: torch.device, expert_parallel: int, graphs: bool) -> Learner:
    return Learner.build(
        shape,
        device,
        sequence_length=ROW,
        seed=7,
        weight_decay=0.1,
        gradient_clip=1.0,
        expert_parallel=expert_parallel,
        graphs=graphs,
    )


def is_divided(weight: Tensor) -> bool:
    """Whether this rank has its experts' part only: megatron's name for it."""
    return not getattr(weight, "allreduce", True)


@torch.no_grad()
def perturb(it: Learner) -> None:
    """Give every parameter values with which it matters, the same in every layout."""
    for name, weight in it.student.named_parameters():
        if name == "log_frequency":
            continue
        parts = distributed.world_size() if is_divided(weight) else 1
        generator = torch.Generator().manual_seed(crc32(name.encode()))
        drawn = torch.randn(parts * weight.numel(), generator=generator).chunk(parts)
        own = drawn[distributed.rank() if parts > 1 else 0].view_as(weight).to(weight)
        weight.copy_(weight + 0.3 * own if weight.dim() == 1 else 0.15 * own)


def gradients(shape: Shape, device: torch.device, expert_parallel: int) -> dict[str, Any]:
    """Of a global batch of a microbatch a rank: the loss, and the gradient of every parameter, whole."""
    it = learner(shape, device, expert_parallel, graphs=False)
    perturb(it)
    batches = microbatches(0, 1)
    with it.ddp.no_sync():  # sums stay this rank's
        outcome = it.forward_backward(batches, *objective_of(batches, device))
    found = {}
    for name, weight in it.student.named_parameters():
        own = weight.main_grad.clone()
        if is_divided(weight):
            parts = [torch.empty_like(own) for _ in range(distributed.world_size())]
            dist.all_gather(parts, own)
            own = torch.cat(parts)
        else:
            dist.all_reduce(own)
        found[name] = own.cpu()
    assert outcome.load is not None
    return {"loss": outcome.loss, "load": outcome.load.tokens, "gradients": found}


def train(device: torch.device, graphs: bool) -> dict[str, Any]:
    """Steps of two microbatches with experts divided. Raises RuntimeError if the forward and backward of a
    microbatch waits for the GPU, which both ranks do, or none."""
    it = learner(EVERY_LAYER, device, 2, graphs)
    ALIVE.append(it)
    losses = []
    for step in range(STEPS):
        batches = microbatches(step, 2)
        objective, positions = objective_of(batches, device)
        losses.append(it.forward_backward(batches, objective, positions).loss)
        losses.append(it.step(1e-2))
    weights = {name: weight.detach().cpu() for name, weight in it.student.named_parameters()}
    here = batches[0].to(device)
    with forbidden_waits(device), it.ddp.no_sync():
        loss, _ = objective.loss(here, it.ddp(here, it._graphs), it.student, 1.0)
        loss.backward()  # type: ignore[no-untyped-call]
    it.close()
    return {"losses": losses, "weights": weights}


@contextmanager
def forbidden_waits(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def main(folder: Path) -> None:
    device = choose()
    distributed.start(device)
    found: dict[Any, Any] = {}
    for parallel in (1, 2):
        if parallel > 1:
            parallel_state.destroy_model_parallel()
            distributed.set_expert_parallel(parallel)
        for name, shape in (("one mixture", ONE_MIXTURE), ("every layer", EVERY_LAYER)):
            found[name, parallel] = gradients(shape, device, parallel)
    for graphs in (False, True):
        found["graphs", graphs] = train(device, graphs)
    torch.save(found, folder / f"rank-{distributed.rank()}.pt")
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
