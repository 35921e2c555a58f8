"""One rank of tests/unit/model/test_ranks.py, which starts two (ranks.py).

It trains some steps and writes the results; the test compares them. FOLDER/one.pt holds the state of one
process after two steps; rank r writes FOLDER/rank-<r>.pt.
"""

from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from tests.fakes.students import documents, learner, ragged, reading, saved, whole
from vpmoe.model import distributed, state
from vpmoe.model.batch import Batch
from vpmoe.model.device import choose
from vpmoe.model.learner import Learner, Outcome
from vpmoe.model.objective import Objective, Weighted
from vpmoe.objectives.vanilla import vanilla

WEIGHTS = {"reasoning": 0.7, "final": 1.6}


def global_batch(step: int) -> list[Batch]:
    """Five uneven microbatches; the last is padding alone."""
    generator = torch.Generator().manual_seed(step)
    return [*ragged(generator, 4), Batch.from_rows(*documents(generator, [], 30))]


def objective_of(batches: list[Batch]) -> tuple[Objective, int]:
    counts = torch.stack([batch.counts for batch in batches]).sum(0)
    return vanilla(counts, WEIGHTS), int(counts[0])


def train(it: Learner, mine: slice, steps: range) -> list[tuple[Outcome, float]]:
    done = []
    for step in steps:
        batches = global_batch(step)
        done.append((it.forward_backward(batches[mine], *objective_of(batches)), it.step(1e-2)))
    return done


def weights(it: Learner) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in it.student.named_parameters()}


def fails(action: Any) -> str:
    try:
        action()
    except (ArithmeticError, ValueError) as error:
        return str(error)
    return "nothing was raised"


def layout(device: torch.device, folder: Path, expert_parallel: int) -> dict[str, Any]:
    """Two steps, a state, a third step; the third step again from that state; a state of one process taken in
    and given out again."""
    rank = distributed.rank()
    # Data parallel ranks may bring different numbers of microbatches (rank 1 here a real one and padding);
    # expert parallel ones may not.
    mine = slice(0, 3) if rank == 0 else slice(3, 5)
    if expert_parallel > 1:
        mine = slice(0, 2) if rank == 0 else slice(2, 4)
    it = learner(device, expert_parallel=expert_parallel)
    told = train(it, mine, range(2))
    state_after_two = saved(it)
    third = train(it, mine, range(2, 3)), weights(it)

    gathered: list[Any] = [None] * distributed.world_size()
    torch.distributed.all_gather_object(gathered, state_after_two)
    again = learner(device, expert_parallel=expert_parallel)
    state.restore(again, reading(whole(gathered, state.sizes(again))), steps=2)
    repeated = train(again, mine, range(2, 3)), weights(again)

    other = learner(device, expert_parallel=expert_parallel)
    state.restore(other, reading(torch.load(folder / "one.pt")), steps=2)
    taken_over = saved(other), weights(other)
    read, sizes = state.copy_weights(other), state.sizes(other)
    exported = (
        {name: read(name, 0, size) for name, size in sizes.items() if name.startswith(("main/", "buffer/"))}
        if rank == 0
        else {}
    )

    before = weights(it)
    broken = global_batch(0)
    objective, positions = objective_of(broken)
    nan = Weighted(lambda batch: lambda logp_t, rows_t: logp_t * torch.nan)
    outcome = it.forward_backward(broken[mine], nan if rank == 1 else objective, positions)
    raised = fails(lambda: it.step(1e-2))
    unmoved = all(torch.equal(before[name], weight) for name, weight in weights(it).items())
    return {
        "told": told,
        "state": state_after_two,
        "steps": again.steps,
        "third": third,
        "repeated": repeated,
        "taken_over": taken_over,
        "exported": exported,
        "broken_loss": outcome.loss,
        "raised": raised,
        "unmoved": unmoved,
    }


def main(folder: Path) -> None:
    """Train in both layouts, as the rank that the environment names."""
    device = choose()
    distributed.start(device)
    results = {1: layout(device, folder, 1)}
    parallel_state.destroy_model_parallel()
    distributed.set_expert_parallel(2)
    results[2] = layout(device, folder, 2)
    torch.save(results, folder / f"rank-{distributed.rank()}.pt")
    distributed.stop()
