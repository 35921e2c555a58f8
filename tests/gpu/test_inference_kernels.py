"""The kernels of inference on a GPU: equal to float64, and repeatable."""

from collections.abc import Iterator

import pytest
import torch

from tests.fakes.inference_cases import (
    COMPLETE,
    decoding_attention,
    experts_are_sorted,
    feed_forward_layers,
    queries_keys_and_values,
)
from tests.fakes.policy_versions import COMPLETE_TINY
from tests.fakes.students import new_seed
from vpmoe.inference import gpu_kernels
from vpmoe.model.shapes import Shape

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    torch.manual_seed(new_seed())
    with torch.no_grad():
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", [0, 2, 3])
@pytest.mark.parametrize("shape", [COMPLETE_TINY, COMPLETE], ids=["tiny", "vpmoe-6b"])
def test_queries_keys_and_values_equal_float64(
    gpu: torch.device, shape: Shape, layer: int, dtype: torch.dtype
) -> None:
    queries_keys_and_values(shape, layer, gpu, dtype, 70)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", [0, 3], ids=["local", "global"])
@pytest.mark.parametrize("shape", [COMPLETE_TINY, COMPLETE], ids=["tiny", "vpmoe-6b"])
def test_attention_of_decoding_equals_float64(
    gpu: torch.device, shape: Shape, layer: int, dtype: torch.dtype
) -> None:
    decoding_attention(shape, layer, gpu, dtype, 130, 700)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer, tokens", [(0, 70), (1, 1), (1, 130), (1, 700)])
@pytest.mark.parametrize("shape", [COMPLETE_TINY, COMPLETE], ids=["tiny", "vpmoe-6b"])
def test_feed_forward_layers_equal_float64(
    gpu: torch.device, shape: Shape, layer: int, tokens: int, dtype: torch.dtype
) -> None:
    feed_forward_layers(shape, layer, gpu, dtype, tokens)


@pytest.mark.parametrize("tokens", [1, 256, 5000])
def test_choices_are_sorted_by_expert(gpu: torch.device, tokens: int) -> None:
    experts_are_sorted(gpu, tokens)


def test_results_are_the_same_in_each_call(gpu: torch.device) -> None:
    hidden_NH = torch.randn(300, 1024, device=gpu, dtype=torch.bfloat16)
    up, down = torch.randn(2, 64 * 128 * 1024, device=gpu, dtype=torch.bfloat16) / 32
    logits_NE, selection_E = torch.randn(300, 64, device=gpu), torch.zeros(64, device=gpu)
    runs = []
    for _ in range(2):
        chosen = gpu_kernels.choose_experts(
            logits_NE, None, selection_E, choices=4, groups=8, chosen_groups=4, scaling=2.5
        )
        experts = up.view(64, 128, 1024), None, down.view(64, 1024, 128), None
        runs.append(gpu_kernels.apply_experts(hidden_NH, *chosen, *experts))
    assert torch.equal(*runs)
