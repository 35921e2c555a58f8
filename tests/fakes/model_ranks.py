"""One rank of tests/unit/model/test_ranks.py, which starts two (ranks.py).

It trains a few steps and writes the results, which the test compares. FOLDER/one.pt holds the state of one
process after two steps; rank r writes FOLDER/rank-<r>.pt.
"""

from functools import partial
from pathlib import Path
from time import sleep
from typing import Any
from unittest.mock import patch

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig

from tests.fakes.students import (
    COMPLETE,
    SMALL,
    copy_slices,
    documents,
    join_slices,
    learner,
    ragged_batches,
    read_from,
)
from vpmoe.model import distributed, state
from vpmoe.model.batch import Batch
from vpmoe.model.device import choose
from vpmoe.model.learner import Learner, Outcome
from vpmoe.model.objective import Objective, Weighted
from vpmoe.model.sharded_gradients import ShardedGradients
from vpmoe.objectives.vanilla import vanilla

WEIGHTS = {"reasoning": 0.7, "final": 1.6}


def global_batch(step: int) -> list[Batch]:
    """Five uneven microbatches, the third and fourth with the shapes of the first two; the last is padding
    alone."""
    generator = torch.Generator().manual_seed(step)
    return [*ragged_batches(generator, 4, shapes=2), Batch.from_rows(*documents(generator, [], 30))]


def objective_of(batches: list[Batch]) -> tuple[Objective, int]:
    counts = torch.stack([batch.counts for batch in batches]).sum(0)
    return vanilla(counts, WEIGHTS), int(counts[0])


def train(learner: Learner, own_batches: slice, steps: range) -> list[tuple[Outcome, float]]:
    outcomes = []
    for step in steps:
        batches = global_batch(step)
        outcomes.append(
            (learner.forward_backward(batches[own_batches], *objective_of(batches)), learner.step(1e-2))
        )
    return outcomes


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in learner.student.named_parameters()}


def kept_gradients(learner: Learner) -> int:
    """Bytes of this rank's gradients between two steps."""
    learner.ddp.zero_grad_buffer()
    sums = [parameter.main_grad for parameter in learner.student.parameters()]  # type: ignore[attr-defined]
    if isinstance(learner.ddp, ShardedGradients):
        sums += [shard.sum for shard in learner.ddp._shards]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in sums}
    return sum(storages.values())


def equal(one: Any, other: Any) -> bool:
    """Whether two states, of the same structure, have the same bits."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def error_message(action: Any) -> str:
    try:
        action()
    except (ArithmeticError, ValueError) as error:
        return str(error)
    return "nothing was raised"


def layout(
    device: torch.device, folder: Path, expert_parallel: int, sharded_gradients: bool = False
) -> dict[str, Any]:
    """Results of one layout.

    Two steps, a copy of the state, and a third step; the third step again from that copy; the state of one
    process, loaded and copied again; two steps that are not finite on rank 1 alone, the loss of one and the
    gradient of the other, and a fourth step after them.
    """
    rank = distributed.rank()
    # Data-parallel ranks may have different numbers of microbatches (rank 1: one of documents, one of
    # padding). Expert-parallel ranks may not, and neither may those that shard gradients. The shapes of
    # expert-parallel ranks are the same.
    own_batches = slice(0, 3) if rank == 0 else slice(3, 5)
    if expert_parallel > 1 or sharded_gradients:
        own_batches = slice(0, 2) if rank == 0 else slice(2, 4)
    trained = learner(device, COMPLETE, expert_parallel=expert_parallel, sharded_gradients=sharded_gradients)
    outcomes = train(trained, own_batches, range(2))
    state_after_two = copy_slices(trained)
    third = train(trained, own_batches, range(2, 3)), weights(trained)

    gradient_bytes = kept_gradients(trained)

    gathered: list[Any] = [None] * distributed.world_size()
    torch.distributed.all_gather_object(gathered, state_after_two)
    restored = learner(device, COMPLETE, expert_parallel=expert_parallel, sharded_gradients=sharded_gradients)
    state.restore(restored, read_from(join_slices(gathered, state.sizes(restored))), steps=2)
    repeated = train(restored, own_batches, range(2, 3)), weights(restored)

    converted = learner(device, COMPLETE, expert_parallel=expert_parallel)
    state.restore(converted, read_from(torch.load(folder / "one.pt")), steps=2)
    converted_state = copy_slices(converted), weights(converted)
    read, sizes = state.copy_weights(converted), state.sizes(converted)
    exported = (
        {name: read(name, 0, size) for name, size in sizes.items() if name.startswith(("main/", "buffer/"))}
        if rank == 0
        else {}
    )

    before = copy_slices(trained), weights(trained)
    batches = global_batch(0)
    objective, positions = objective_of(batches)
    nan = Weighted(lambda batch: lambda logp_t, rows_t: logp_t * torch.nan)
    outcome = trained.forward_backward(batches[own_batches], nan if rank == 1 else objective, positions)
    raised = [error_message(lambda: trained.step(1e-2))]
    spoiled = trained.student.output.register_hook(lambda gradient: gradient * (torch.inf if rank else 1))
    finite = trained.forward_backward(batches[own_batches], objective_of(batches)[0], positions)
    spoiled.remove()
    raised.append(error_message(lambda: trained.step(1e-2)))
    unchanged = equal(before, (copy_slices(trained), weights(trained)))
    other_shapes = ""
    if expert_parallel > 1:
        uneven = batches[slice(0, 2) if rank == 0 else slice(1, 3)]
        other_shapes = error_message(lambda: trained.forward_backward(uneven, objective, positions))
    steps = restored.steps
    fourth = train(trained, own_batches, range(3, 4)), weights(trained)
    undisturbed = train(restored, own_batches, range(3, 4)), weights(restored)
    return {
        "outcomes": outcomes,
        "gradient_bytes": gradient_bytes,
        "state": state_after_two,
        "steps": steps,
        "third": third,
        "repeated": repeated,
        "converted": converted_state,
        "exported": exported,
        "broken_loss": (outcome.loss, outcome.loss_by_rank),
        "finite_loss": (finite.loss, finite.loss_by_rank),
        "fourth": fourth,
        "undisturbed": undisturbed,
        "raised": raised,
        "other_shapes": other_shapes,
        "unchanged": unchanged,
    }


def forward_beside_gather(device: torch.device) -> dict[str, Any]:
    """A forward that begins while the weights are being gathered in many buckets, and cannot end before rank
    1 has given its share."""
    batch = global_batch(0)[0].to(device)
    buckets = partial(DistributedDataParallelConfig, bucket_size=5000)
    with patch("vpmoe.model.learner.DistributedDataParallelConfig", buckets):
        it = learner(device, SMALL)
    with torch.no_grad():
        return _forward_beside_gather(it, batch)


def _forward_beside_gather(it: Learner, batch: Batch) -> dict[str, Any]:
    rank = distributed.rank()
    kept, gather = it.student, it.gather
    stale = kept(batch)
    for shard in state.shards(it):
        shard.weight.add_(0.01)
    if rank == 1:
        torch.distributed.barrier()
        sleep(0.2)
    gather.start()
    complete = [work.is_completed() for work in gather._pending]
    if rank == 0:
        torch.distributed.barrier()
    left = []
    for part in (kept, *kept.decoder.layers, kept.decoder.final_layernorm):
        part.register_forward_pre_hook(lambda *_: left.append(len(gather._pending)))
    hidden = kept(batch)
    given = it.student
    return {
        "complete": complete,
        "left": [*left, len(gather._pending)],
        "moved": not torch.equal(hidden, stale),
        "same": torch.equal(hidden, given(batch)),
        "weights": weights(it),
    }


def main(folder: Path) -> None:
    """Train in both layouts, as the rank that the environment names."""
    device = choose()
    distributed.start(device)
    results: dict[int | str, dict[str, Any]] = {"gather": forward_beside_gather(device)}
    results[1] = layout(device, folder, 1)
    results["sharded"] = layout(device, folder, 1, sharded_gradients=True)
    parallel_state.destroy_model_parallel()
    distributed.set_expert_parallel(2)
    results[2] = layout(device, folder, 2)
    results["sharded experts"] = layout(device, folder, 2, sharded_gradients=True)
    torch.save(results, folder / f"rank-{distributed.rank()}.pt")
    distributed.stop()
