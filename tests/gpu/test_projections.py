"""Tensor products and mixed values on a GPU: equal to float64, and repeatable."""

import pytest
import torch

from tests.fakes.projection_cases import mixed_values, tensor_products
from tests.fakes.students import new_seed


@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("width", [16, 128])
@pytest.mark.parametrize("positions", [1, 7, 1000])
def test_tensor_products_equal_float64(gpu: torch.device, positions: int, width: int, biased: bool) -> None:
    torch.manual_seed(new_seed())
    tensor_products(gpu, torch.bfloat16, positions, width, biased)


@pytest.mark.parametrize("positions", [1, 31, 3000])
def test_mixed_values_equal_float64(gpu: torch.device, positions: int) -> None:
    torch.manual_seed(new_seed())
    mixed_values(gpu, torch.bfloat16, positions)


def test_results_are_the_same_in_each_call(gpu: torch.device) -> None:
    seed = new_seed()
    runs = []
    for _ in range(2):
        torch.manual_seed(seed)
        runs.append(
            [*tensor_products(gpu, torch.bfloat16, 5000, 128, True), *mixed_values(gpu, torch.bfloat16, 5000)]
        )
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))
