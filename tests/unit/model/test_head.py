"""The loss head equals eager float64 and never allocates a tensor [tokens, vocabulary]."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.fakes.largest_tensor import Largest
from tests.fakes.students import new_seed
from vpmoe.model import head
from vpmoe.model.head import Coefficient, head_loss, target_logp
from vpmoe.model.spans import NO_TARGET

TOKENS, VOCABULARY, HIDDEN = 57, 131, 19


def random_inputs(
    dtype: torch.dtype, seed: int, learned: float = 0.7
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden and weight (both require gradients), targets of which some are NO_TARGET, and random numbers
    for the coefficients."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (
        torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    )
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    targets[torch.rand(TOKENS, generator=generator) >= learned] = NO_TARGET
    return hidden, weight, targets, torch.randn(TOKENS, generator=generator, dtype=torch.float64).to(dtype)


def fixed_coefficient(numbers: Tensor) -> Coefficient:
    return lambda logp_t, rows_t: numbers[rows_t]


def onpolicy_coefficient(numbers: Tensor) -> Coefficient:
    """As in on-policy training: a bounded advantage and a truncated ratio, both computed from logp itself."""
    return lambda logp_t, rows_t: (
        (numbers[rows_t] - logp_t).clamp(-2, 2) * (logp_t - numbers[rows_t]).exp().clamp(max=2)
    )


def eager_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, coefficient: Coefficient
) -> tuple[Tensor, Tensor]:
    rows = (targets != NO_TARGET).nonzero().squeeze(1)
    logp = torch.log_softmax(hidden[rows] @ weight.T, dim=1).gather(1, targets[rows].unsqueeze(1)).squeeze(1)
    all_logp = torch.full((len(hidden),), torch.nan, dtype=hidden.dtype)
    all_logp[rows] = logp.detach()
    return -(coefficient(logp.detach(), rows) * logp).sum(), all_logp


@pytest.mark.parametrize(
    "coefficient_of",
    [
        pytest.param(fixed_coefficient, id="coefficients-known"),
        pytest.param(onpolicy_coefficient, id="coefficients-of-logp"),
    ],
)
@pytest.mark.parametrize(
    "chunk",
    [pytest.param(1, id="token-by-token"), pytest.param(10, id="chunks"), pytest.param(1000, id="one-chunk")],
)
@pytest.mark.parametrize(
    "dtype, tolerance",
    [pytest.param(torch.float64, 1e-12, id="fp64"), pytest.param(torch.float32, 2e-5, id="fp32")],
)
def test_loss_and_gradients_equal_eager_float64(
    coefficient_of: Callable[[Tensor], Coefficient],
    chunk: int,
    dtype: torch.dtype,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", chunk * 4 * VOCABULARY)
    hidden, weight, targets, numbers = random_inputs(dtype, new_seed())
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    loss, logp = head_loss(hidden, weight, targets, coefficient_of(numbers))
    wanted, wanted_logp = eager_loss(*exact, targets, coefficient_of(numbers.double()))  # type: ignore[call-arg]
    (loss * 3).backward()  # an incoming gradient other than 1
    (wanted * 3).backward()
    for got, want in [
        (loss, wanted),
        (logp, wanted_logp),
        (hidden.grad, exact[0].grad),
        (weight.grad, exact[1].grad),
    ]:
        assert got is not None and want is not None
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance, equal_nan=True)
    torch.testing.assert_close(
        target_logp(hidden, weight, targets).double(),
        wanted_logp,
        rtol=tolerance,
        atol=tolerance,
        equal_nan=True,
    )


def test_on_the_cpu_a_final_loss_leaves_the_buffer_to_megatrons_hook() -> None:
    hidden, weight, targets, numbers = random_inputs(torch.float32, new_seed())
    weight.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]
    gradients = []
    for final in (False, True):
        loss, _ = head_loss(hidden, weight, targets, fixed_coefficient(numbers), final=final)
        gradients.append(torch.autograd.grad(loss, weight)[0])
    assert torch.equal(*gradients) and (weight.main_grad == 0).all()  # type: ignore[attr-defined]


def test_positions_without_a_target_contribute_nothing() -> None:
    hidden, weight, targets, numbers = random_inputs(torch.float64, new_seed())
    loss, logp = head_loss(hidden, weight, targets, fixed_coefficient(numbers))
    loss.backward()
    kept = targets != NO_TARGET
    fewer = [hidden.detach()[kept].requires_grad_(), weight.detach().clone().requires_grad_()]
    loss_fewer, _ = head_loss(*fewer, targets[kept], fixed_coefficient(numbers[kept]))  # type: ignore[call-arg]
    loss_fewer.backward()
    assert loss == loss_fewer and logp[~kept].isnan().all() and (hidden.grad[~kept] == 0).all()
    assert torch.equal(hidden.grad[kept], fewer[0].grad) and torch.equal(weight.grad, fewer[1].grad)


def test_without_targets_the_loss_is_zero_and_has_zero_gradients() -> None:
    hidden, weight, targets, numbers = random_inputs(torch.float32, 0, learned=0)
    loss, logp = head_loss(hidden, weight, targets, fixed_coefficient(numbers))
    loss.backward()
    assert loss == 0 and logp.isnan().all() and (hidden.grad == 0).all() and (weight.grad == 0).all()


def test_extreme_logits_stay_finite() -> None:
    hidden, weight = (
        torch.full((3, 1), 200.0, requires_grad=True),
        torch.linspace(-200, 200, 7).unsqueeze(1).requires_grad_(),
    )
    loss, logp = head_loss(hidden, weight, torch.tensor([0, 3, 6]), fixed_coefficient(torch.ones(3)))
    loss.backward()
    assert (
        logp.tolist() == [-80000.0, -40000.0, 0.0]
        and hidden.grad.isfinite().all()
        and weight.grad.isfinite().all()
    )


def test_no_tensor_is_as_large_as_tokens_by_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """CHUNK_BYTES holds the logits of 8 tokens, so that the largest result is one chunk of logits; a chunk
    of 9 tokens would exceed it."""
    vocabulary, tokens = 1000, 200
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 8 * 4 * vocabulary)
    hidden, weight = (
        torch.randn(tokens, 4, requires_grad=True),
        torch.randn(vocabulary, 4, requires_grad=True),
    )
    targets = torch.randint(0, vocabulary, (tokens,))
    with Largest() as largest:
        loss, _ = head_loss(hidden, weight, targets, fixed_coefficient(torch.ones(tokens)))
        loss.backward()
        target_logp(hidden, weight, targets)
    assert largest.elements == 8 * vocabulary


def test_the_gpu_kernels_equal_float64() -> None:
    """The kernels in Triton's interpreter, which cuts what a GPU rounds to bf16: several tiles a program,
    remainders in both directions, and rows whose targets are too unlikely for one reference."""
    code = f"""
        import types
        import torch
        from vpmoe.model import kernels
        torch.manual_seed({new_seed()})
        torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(multi_processor_count=4)
        kernels.M, kernels.N, kernels.K, kernels.BLOCK = 16, 32, 16, 4
        hidden, weight = torch.randn(37, 24) * 2, torch.randn(150, 24)
        targets = torch.randint(0, 150, (37,))
        hidden[::3] *= 30
        exact = hidden.double() @ weight.double().T
        targets[:6], targets[6::3] = exact[:6].argmin(1), exact[6::3].argmax(1)
        rows = torch.arange(37)
        wanted = exact.log_softmax(1)[rows, targets]
        softmax = exact.softmax(1)
        softmax[rows, targets] -= 1
        g, z, logp = kernels.gradient(hidden, weight, targets)
        assert torch.equal(logp, kernels.logp(hidden, weight, targets))
        # fp32 sums of 24 products, in other orders: some units in the last place of a row's largest logit
        sums = 1e-5 + 1e-6 * exact.abs().amax(1)
        assert ((logp.double() - wanted).abs() <= sums).all(), (logp.double() - wanted) / sums
        assert (wanted < -128).any() and (wanted > -1e-3).any(), wanted
        error = (g.double() / z.double()[:, None] - softmax).abs()
        allowed = (2**-7 + 1e-3) * softmax.abs() + sums[:, None]  # the interpreter cuts bf16 off
        assert (error <= allowed).all(), (error / allowed).max()
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=True,
        timeout=120,
    )
