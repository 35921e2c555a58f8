"""The copy of a student's state on a GPU: what the device does after it has begun is not in it."""

from dataclasses import replace

import torch

from tests.fakes.students import WITHOUT, documents, new_seed
from vpmoe.model import state
from vpmoe.model.batch import Batch
from vpmoe.model.learner import Learner
from vpmoe.model.shapes import SHAPES
from vpmoe.objectives.vanilla import vanilla
from vpmoe.trainer.checkpoint.state_copy import StateCopy, rank_file

SHAPE = replace(SHAPES["tiny"], **WITHOUT)
"""26 M parameters, 0.3 GB: the copy takes longer than it takes the host to launch what follows."""


def test_a_copy_that_runs_beside_training_has_the_state_of_its_begin(device: torch.device) -> None:
    """Three steps, each with a copy before it: each copy is the state between the steps, bit for bit."""
    learner = Learner.build(SHAPE, device, sequence_length=256, seed=1, weight_decay=0.1, gradient_clip=1.0)
    generator = torch.Generator().manual_seed(new_seed())
    batch = Batch.from_rows(*documents(generator, [100, 60, 90], 256, SHAPE.vocabulary))
    copy = StateCopy(learner)
    assert copy.memory.is_pinned()
    for _ in range(3):
        expected = {key: tensor.clone() for key, tensor in live(learner).items()}
        torch.cuda.synchronize()
        copy.take(learner)
        objective = vanilla(batch.counts, {"reasoning": 1.0, "final": 1.0})
        learner.forward_backward([batch], objective, positions=int(batch.counts[0]))
        copy.hold_changes()
        learner.step(1e-2)
        copy.wait()
        assert any(not torch.equal(copy.views[key].cpu(), held.cpu()) for key, held in live(learner).items())
        for key, tensor in expected.items():
            assert torch.equal(copy.views[key], tensor.cpu()), key
    assert copy.files[rank_file(0)].size > 12 * SHAPE.parameters()
    copy.close()


def live(learner: Learner) -> dict[str, torch.Tensor]:
    """The state as it is now, by the keys of a checkpoint."""
    return {f"{held.name}[{held.start}:{held.stop}]": held.tensor for held in state.slices(learner)}
