"""Packed attention on a GPU: equal to float64, documents apart, repeatable, nothing compiled by lengths."""

import pytest
import torch
import triton

from tests.fakes.attention_cases import (
    KINDS,
    ONE_WEIGHT,
    Case,
    Kind,
    assert_near,
    in_float64,
    random_case,
    random_lengths,
)
from tests.fakes.students import new_seed
from vpmoe.model.attention_gpu import ORDER_BLOCK, _most_work_first
from vpmoe.model.batch import runs_of


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([1, 127, 128, 129, 1000, 1], id="around-the-window"),
        pytest.param([1] * 70, id="single-positions"),
        pytest.param([1], id="one-position"),
        pytest.param([1500], id="one-document"),
        pytest.param([1501, 3000], id="many-tiles"),
        pytest.param(None, id="random"),
    ],
)
def test_output_and_gradients_equal_float64(gpu: torch.device, kind: Kind, lengths: list[int] | None) -> None:
    torch.manual_seed(new_seed())
    case = random_case(gpu, kind, lengths or random_lengths(2000))
    # what the allocator hands out next is not zero
    dirty = [torch.full_like(case.inputs[0], torch.nan) for _ in range(8)]
    del dirty
    assert_near(case.run(), in_float64(case), ONE_WEIGHT if lengths and set(lengths) == {1} else 1e-6)


def test_fp16(gpu: torch.device) -> None:
    torch.manual_seed(new_seed())
    case = random_case(gpu, KINDS["global"], [130, 70], torch.float16)
    assert_near(case.run(), in_float64(case))


@pytest.mark.parametrize("kind", [KINDS["local"], KINDS["global"]], ids=["local", "global"])
def test_extreme_offsets(gpu: torch.device, kind: Kind) -> None:
    """An offset of −100 is none, and one of 100 leaves nothing: both finite."""
    torch.manual_seed(new_seed())
    case = random_case(gpu, kind, [5, 300, 200])
    with torch.no_grad():
        case.inputs[3].copy_(torch.tensor([-100.0] * 4 + [100.0] * 4))
    assert_near(case.run(), in_float64(case))


@pytest.mark.parametrize("kind", [KINDS["local"], KINDS["global"]], ids=["local", "global"])
def test_documents_do_not_see_each_other(gpu: torch.device, kind: Kind) -> None:
    """Bit for bit: other contents of the second document change nothing in the first and the third."""
    torch.manual_seed(new_seed())
    lengths = [150, 77, 301]
    case, other = (random_case(gpu, kind, lengths) for _ in range(2))
    second = slice(150, 227)
    before = case.run()
    with torch.no_grad():
        for x, y in zip((*case.inputs[:3], case.grad_out), (*other.inputs[:3], other.grad_out), strict=True):
            x[second] = y[second]
    for x, y in zip(before[:4], case.run()[:4], strict=True):
        assert not torch.equal(x[second], y[second])
        x[second] = y[second]
        assert torch.equal(x, y)


@pytest.mark.parametrize("positions", [1, 63, 64, 65, 4097, 32_768])
def test_tiles_with_most_work_come_first(gpu: torch.device, positions: int) -> None:
    torch.manual_seed(new_seed())
    ends = [*(torch.rand(20) * positions).int().unique()[1:].tolist(), positions]
    runs = runs_of(torch.tensor([0, *ends], device=gpu))
    tiles = -(-positions // 64)
    order = torch.full((tiles,), -1, dtype=torch.int32, device=gpu)
    _most_work_first[(triton.cdiv(tiles, ORDER_BLOCK),)](runs.int(), order, positions, 64, ORDER_BLOCK)
    first = torch.arange(0, positions, 64, device=gpu)
    work = runs[1, (first + 63).clamp(max=positions - 1)] - first
    assert torch.equal(order.long(), work.argsort(descending=True, stable=True))


@pytest.mark.parametrize("kind", [KINDS["local"], KINDS["global"]], ids=["local", "global"])
def test_results_are_the_same_in_each_call(gpu: torch.device, kind: Kind) -> None:
    torch.manual_seed(new_seed())
    case = random_case(gpu, kind, random_lengths(5000))
    first = case.run()
    for _ in range(5):
        assert all(torch.equal(x, y) for x, y in zip(first, case.run(), strict=True))


def test_other_lengths_compile_nothing(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(new_seed())
    for kind in (KINDS["local"], KINDS["global"]):
        random_case(gpu, kind, [100, 300]).run()
    compiled: list[object] = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **details: compiled.append(details)
    )
    for lengths in ([1], [16], [17] * 16, random_lengths(1000), random_lengths(4096), [4096]):
        for kind in (KINDS["local"], KINDS["global"]):
            random_case(gpu, kind, lengths).run()
    assert not compiled


def test_memory_is_linear_in_positions(gpu: torch.device) -> None:
    """One head's [positions, positions] in bf16 would take 2 GiB; inputs, outputs and gradients take 0.4."""
    case = random_case(gpu, KINDS["global"], [32_768])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    case.run()
    assert torch.cuda.max_memory_allocated() - before < 2**29


def test_strided_inputs(gpu: torch.device) -> None:
    """Queries, keys and values that are views of one tensor, and a transposed gradient."""
    torch.manual_seed(new_seed())
    case = random_case(gpu, KINDS["local"], [100, 200])
    expected = case.run()
    parts = torch.cat([x.detach() for x in case.inputs[:3]], 1).split([8, 2, 2], 1)
    inputs = [*(x.requires_grad_() for x in parts), case.inputs[3]]
    grad_out = case.grad_out.transpose(0, 1).contiguous().transpose(0, 1)
    strided = Case(case.kind, inputs, case.slopes, case.boundaries, grad_out)
    assert all(torch.equal(x, y) for x, y in zip(expected, strided.run(), strict=True))
