"""The GPU's AdamW: equal to torch's in float64, at any alignment, the same bits in each call."""

import pytest
import torch

from tests.fakes.adamw_cases import BETAS, EPSILON, assert_equal_to_float64, parameters
from tests.fakes.students import new_seed
from vpmoe.model.adamw_gpu import AdamW


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "one element further"])
def test_steps_equal_float64(gpu: torch.device, shift: int) -> None:
    assert_equal_to_float64(gpu, shift, new_seed())


def test_two_updates_of_the_same_have_the_same_bits(gpu: torch.device) -> None:
    found = []
    for _ in range(2):
        updated = parameters(gpu, 0, torch.Generator().manual_seed(1))
        it = AdamW(updated, BETAS, EPSILON)
        squares = it.squares()
        it.step(1, 0.5, 1e-2, 0.1)
        found.append([squares, *(one.main for one in updated)])
    assert all(map(torch.equal, *found))
