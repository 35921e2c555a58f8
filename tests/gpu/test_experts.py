"""The routed experts on a GPU, from tokens to their sums, and the exported model's grouped product: equal to
float64, with experts that get no token.

Compiling takes most of the time: a kernel anew for each width, with and without bias or buffers. So the cases
have each of these, and not each with each.
"""

import pytest
import torch
import triton

from tests.fakes.expert_cases import mixtures, no_rows, other_ranks_choices, tiles
from tests.fakes.students import new_seed
from vpmoe.model import experts_gpu
from vpmoe.model.grouped import grouped_product


@pytest.mark.parametrize("rows", [[162, 0, 2577, 446, 0, 83], [0, 0, 0, 7], [0, 0, 0, 0]], ids=str)
def test_empty_experts_have_gradient_zero(gpu: torch.device, rows: list[int]) -> None:
    torch.manual_seed(new_seed())
    inputs = torch.randn(sum(rows), 256, device=gpu, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(len(rows), 128, 256, device=gpu, dtype=torch.bfloat16, requires_grad=True)
    direction = torch.randn(sum(rows), 128, device=gpu, dtype=torch.bfloat16)
    # what the allocator hands out next for the gradient is not zero
    dirty = [torch.full_like(weight, torch.nan) for _ in range(4)]
    del dirty
    ends = torch.tensor(rows, device=gpu).cumsum(0, dtype=torch.int32)
    grouped_product(inputs, weight, ends).backward(direction)
    exact = [x.detach().double().requires_grad_() for x in (inputs, weight)]
    wanted = torch.cat([x @ w.T for x, w in zip(exact[0].split(rows), exact[1], strict=True)])
    wanted.backward(direction.double())
    assert weight.grad is not None and exact[1].grad is not None
    assert (weight.grad[torch.tensor(rows) == 0] == 0).all()
    assert (weight.grad.double() - exact[1].grad).norm() <= 2e-2 * exact[1].grad.norm()


@pytest.mark.parametrize(
    "tokens, hidden, width, biased, buffered",
    [
        pytest.param(1, 64, 16, True, False, id="one-token"),
        pytest.param(333, 64, 32, False, False, id="no-bias"),
        pytest.param(333, 64, 32, False, True, id="no-bias-buffers"),
        pytest.param(1000, 1024, 128, True, False, id="real-widths"),
        pytest.param(1000, 1024, 128, True, True, id="real-widths-buffers"),
    ],
)
def test_mixtures_equal_float64(
    gpu: torch.device, tokens: int, hidden: int, width: int, biased: bool, buffered: bool
) -> None:
    """Outputs and every gradient; the first of four chosen experts has half of the choices. With buffers,
    those of the weights are added in two calls."""
    torch.manual_seed(new_seed())
    beside = 2 if biased else int(buffered)
    mixtures(gpu, torch.bfloat16, tokens, hidden, width, biased=biased, buffered=buffered, beside=beside)


def test_gradients_are_stored_in_empty_buffers(gpu: torch.device) -> None:
    torch.manual_seed(new_seed())
    mixtures(gpu, torch.bfloat16, 1000, 1024, 128, buffered=True, stored=True)


@pytest.mark.parametrize("choices", [1, 4])
def test_many_experts_equal_float64(gpu: torch.device, choices: int) -> None:
    """The real widths and numbers."""
    torch.manual_seed(new_seed())
    chosen = [expert for expert in range(256) if expert % 7]
    mixtures(gpu, torch.bfloat16, 8192, 1024, 128, choices=choices, chosen=chosen, experts=256)


@pytest.mark.parametrize("tokens", [[0, 300, 128, 0, 1, 129], [20_000, 3], [512] * 256], ids=len)
def test_tiles_have_every_row_once(gpu: torch.device, tokens: list[int]) -> None:
    tiles(gpu, tokens)


def test_choices_of_other_ranks_experts_add_nothing(device: torch.device) -> None:
    torch.manual_seed(new_seed())
    other_ranks_choices(device, torch.bfloat16, 1000)


def test_a_rank_without_rows_has_gradient_zero(gpu: torch.device) -> None:
    no_rows(gpu, torch.bfloat16)


def test_results_are_the_same_in_each_call(gpu: torch.device) -> None:
    seed = new_seed()
    runs = []
    for buffered in (False, False, True, True):
        torch.manual_seed(seed)
        runs.append(mixtures(gpu, torch.bfloat16, 5000, 1024, 128, buffered=buffered))
    for first, second in (runs[:2], runs[2:]):
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_other_numbers_of_tokens_compile_nothing(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    mixtures(gpu, torch.bfloat16, 100, 1024, 128)
    compiled: list[object] = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **details: compiled.append(details)
    )
    for tokens in (1, 16, 17, 4096):
        mixtures(gpu, torch.bfloat16, tokens, 1024, 128)
    assert not compiled


def test_forward_and_backward_are_captured_in_a_graph(gpu: torch.device) -> None:
    """Other tokens and other choices give what they give without a graph."""
    torch.manual_seed(new_seed())
    up, down = (torch.randn(8, *size, device=gpu).bfloat16() / 8 for size in ((32, 64), (64, 32)))
    x, share = torch.randn(200, 64, device=gpu).bfloat16(), torch.rand(800, device=gpu)
    leaves = [leaf.requires_grad_() for leaf in (x, share, up, down)]
    expert = torch.randint(0, 8, (800,), device=gpu)

    def step() -> list[torch.Tensor]:
        order = expert.argsort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(800, device=gpu))
        tokens = (expert[:, None] == torch.arange(8, device=gpu)).sum(0)
        out = experts_gpu.mixture(x, share, up, down, None, None, order, inverse, tokens, 4)
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for experts in (8, 3):
        expert.copy_(torch.randint(0, experts, (800,), device=gpu))
        with torch.no_grad():
            x.normal_()
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(captured, step(), strict=True))
