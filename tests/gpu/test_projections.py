"""A layer's kernels on a GPU but attention, router and products of experts: equal to float64, repeatable.

Compiling takes most of the time: a kernel anew for each width, with and without bias or rotation. So the
cases have each of these, and not each with each.
"""

import pytest
import torch
import triton

from tests.fakes.projection_cases import (
    embedded,
    gradient_of_mix_in_its_buffer,
    gradients_are_added_to_those_so_far,
    in_buffers,
    linear_maps,
    mixed_values,
    norm_of_which_only_some_is_read,
    normed,
    normed_projections,
    squared_relus,
    tensor_products,
    totals,
)
from tests.fakes.students import new_seed


@pytest.mark.parametrize("width, biased, mixes", [(16, False, False), (128, True, True), (128, True, False)])
@pytest.mark.parametrize("positions", [1, 7, 3000])
def test_tensor_products_equal_float64(
    gpu: torch.device, positions: int, width: int, biased: bool, mixes: bool
) -> None:
    torch.manual_seed(new_seed())
    tensor_products(gpu, torch.bfloat16, positions, width, biased=biased, mixes=mixes)


@pytest.mark.parametrize("apart", [True, False], ids=["apart", "among others"])
@pytest.mark.parametrize("positions", [1, 31, 3000])
def test_mixed_values_equal_float64(gpu: torch.device, positions: int, apart: bool) -> None:
    torch.manual_seed(new_seed())
    mixed_values(gpu, torch.bfloat16, positions, apart=apart)


def test_the_gradient_of_mixed_values_share_is_added_to_its_buffer(gpu: torch.device) -> None:
    torch.manual_seed(new_seed())
    gradient_of_mix_in_its_buffer(gpu, torch.bfloat16)


def test_gradients_are_added_to_those_of_other_layers(gpu: torch.device) -> None:
    torch.manual_seed(new_seed())
    gradients_are_added_to_those_so_far(gpu, torch.bfloat16, 3001)


@pytest.mark.parametrize("width, rotates", [(16, True), (128, False), (128, True)])
@pytest.mark.parametrize("positions", [1, 31, 3000])
def test_norms_and_rotation_of_projections_equal_float64(
    gpu: torch.device, positions: int, width: int, rotates: bool
) -> None:
    torch.manual_seed(new_seed())
    normed_projections(gpu, torch.bfloat16, positions, width, rotates=rotates)


@pytest.mark.parametrize(
    "rows, width, addends, readers", [(1, 64, 1, 1), (777, 96, 2, 1), (777, 96, 1, 2), (1000, 1024, 2, 3)]
)
def test_sums_and_norms_equal_float64(
    gpu: torch.device, rows: int, width: int, addends: int, readers: int
) -> None:
    torch.manual_seed(new_seed())
    normed(gpu, torch.bfloat16, rows, width, addends, readers)


def test_a_norm_of_which_only_some_is_read_has_the_right_gradient(gpu: torch.device) -> None:
    torch.manual_seed(new_seed())
    norm_of_which_only_some_is_read(gpu, torch.bfloat16)


@pytest.mark.parametrize("rows, width", [(1, 64), (1001, 1024)])
def test_totals_equal_float64(gpu: torch.device, rows: int, width: int) -> None:
    torch.manual_seed(new_seed())
    totals(gpu, torch.bfloat16, rows, width)


@pytest.mark.parametrize("rows, width, biased", [(1, 64, True), (1001, 512, True), (1001, 512, False)])
def test_squared_relus_equal_float64(gpu: torch.device, rows: int, width: int, biased: bool) -> None:
    torch.manual_seed(new_seed())
    squared_relus(gpu, torch.bfloat16, rows, width, biased=biased)


@pytest.mark.parametrize("positions, inputs, outputs", [(1, 64, 64), (3000, 256, 512), (777, 128, 96)])
def test_linear_maps_equal_float64(gpu: torch.device, positions: int, inputs: int, outputs: int) -> None:
    torch.manual_seed(new_seed())
    linear_maps(gpu, torch.bfloat16, positions, inputs, outputs)


@pytest.mark.parametrize("positions, vocabulary, width", [(1, 5, 64), (3000, 700, 1024), (777, 90, 96)])
def test_embeddings_equal_float64(gpu: torch.device, positions: int, vocabulary: int, width: int) -> None:
    torch.manual_seed(new_seed())
    embedded(gpu, torch.bfloat16, positions, vocabulary, width)


@pytest.mark.parametrize("positions, width", [(1, 48), (777, 48), (3000, 512)])
def test_gradients_are_added_to_fp32_buffers(gpu: torch.device, positions: int, width: int) -> None:
    torch.manual_seed(new_seed())
    in_buffers(gpu, torch.bfloat16, positions, width)


def test_other_numbers_of_positions_compile_nothing(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def everything(positions: int) -> None:
        tensor_products(gpu, torch.bfloat16, positions, 128, biased=True, mixes=True)
        normed_projections(gpu, torch.bfloat16, positions, 128, rotates=False)
        normed(gpu, torch.bfloat16, positions, 1024)
        normed(gpu, torch.bfloat16, positions, 1024, addends=2, readers=3)
        totals(gpu, torch.bfloat16, positions, 1024)
        squared_relus(gpu, torch.bfloat16, positions, 512, biased=True)
        linear_maps(gpu, torch.bfloat16, positions, 64, 512)
        in_buffers(gpu, torch.bfloat16, positions, 512)

    everything(100)
    compiled: list[object] = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **details: compiled.append(details)
    )
    for positions in (1, 16, 17, 4096):
        everything(positions)
    assert not compiled


def test_results_are_the_same_in_each_call(gpu: torch.device) -> None:
    seed = new_seed()
    runs = []
    for _ in range(2):
        torch.manual_seed(seed)
        runs.append(
            [
                *tensor_products(gpu, torch.bfloat16, 5000, 128, biased=True, mixes=True),
                *mixed_values(gpu, torch.bfloat16, 5000),
                *normed_projections(gpu, torch.bfloat16, 5000, 128, rotates=False),
                *normed(gpu, torch.bfloat16, 5000, 1024, addends=2, readers=3),
                *totals(gpu, torch.bfloat16, 5000, 1024),
                *squared_relus(gpu, torch.bfloat16, 5000, 512, biased=True),
                *linear_maps(gpu, torch.bfloat16, 5000, 256, 512),
                *embedded(gpu, torch.bfloat16, 5000, 700, 1024),
                *in_buffers(gpu, torch.bfloat16, 5000, 512),
            ]
        )
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))
