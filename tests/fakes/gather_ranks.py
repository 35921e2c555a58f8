"""One rank of tests/gpu/test_gather.py: trains a few steps on its GPU and writes losses and weights."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import sleep
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.distributed import DistributedDataParallelConfig

from tests.fakes.students import documents
from vpmoe.model import distributed
from vpmoe.model.batch import Batch
from vpmoe.model.device import choose
from vpmoe.model.learner import Learner
from vpmoe.model.shapes import SHAPES
from vpmoe.objectives.vanilla import vanilla

SHAPE = replace(SHAPES["tiny"], router_bias=True, vocabulary=2048)
ROW = 512
STEPS = 4
LATE = 0.05
"""Seconds by which rank 1's share of the weights comes later than rank 0's, on its GPU."""
CASES: dict[str, dict[str, bool]] = {
    "graphs": {"graphs": True},
    "no graphs": {"graphs": False},
    "sharded": {"graphs": False, "sharded_gradients": True},
}


def microbatches(step: int) -> list[Batch]:
    """This rank's, two."""
    generator = torch.Generator().manual_seed(10 * step + distributed.rank())
    return [Batch.from_rows(*documents(generator, [200, 120, 150], ROW, SHAPE.vocabulary)) for _ in range(2)]


def train(device: torch.device, options: dict[str, bool], beside: bool) -> dict[str, Any]:
    """`beside`: weights are gathered beside the next forward, and rank 1's come late. Otherwise everything
    waits for them after each step."""
    buckets = partial(DistributedDataParallelConfig, bucket_size=50_000)
    with patch("vpmoe.model.learner.DistributedDataParallelConfig", buckets):
        it = Learner.build(
            SHAPE, device, sequence_length=ROW, seed=7, weight_decay=0.1, gradient_clip=1.0, **options
        )
    start = it.gather.start

    def late() -> None:
        if beside and distributed.rank() == 1:
            torch.cuda._sleep(int(LATE * 2e9))  # cycles of about 2 GHz
            sleep(LATE)
        start()
        if not beside:
            it.gather.wait()
            torch.cuda.synchronize()

    with patch.object(it.gather, "start", late):
        losses = []
        for step in range(STEPS):
            batches = microbatches(step)
            counts = torch.stack([batch.counts for batch in batches]).sum(0).to(device)
            counts = distributed.sum_over_ranks(counts).cpu()
            weights = vanilla(counts, {"reasoning": 1.0, "final": 1.0})
            losses.append(it.forward_backward(batches, weights, int(counts[0])).loss)
            it.step(1e-2)
    return {
        "losses": losses,
        "buckets": len(it.gather._buckets),
        "weights": {name: x.detach().cpu() for name, x in it.student.named_parameters()},
    }


def main(folder: Path) -> None:
    device = choose()
    distributed.start(device)
    found = {
        (name, beside): train(device, options, beside)
        for name, options in CASES.items()
        for beside in (False, True)
    }
    torch.save(found, folder / f"rank-{distributed.rank()}.pt")
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
