"""The loss heads on a GPU against eager float64: compiled kernels, the real vocabulary."""

import pytest
import torch
from torch import Tensor

from tests.fakes.students import new_seed
from vpmoe.api.stages import LossWeights
from vpmoe.model.head import head_loss, target_logp
from vpmoe.model.spans import NO_TARGET
from vpmoe.objectives import teacher_forced_head, teacher_forced_kernels
from vpmoe.objectives.teacher_forced_head import Teacher, forced_loss

TOKENS, VOCABULARY, HIDDEN = 300, 201_088, 256
LOGP = 5e-3
"""Allowed difference of log p in nats: inputs are exact in bf16, sums are fp32, logits fp16 or fp32."""
GRADIENT = 2e-2
"""Allowed relative error of the norm of a bf16 gradient."""


def random_matrix(device: torch.device, rows: int, columns: int, scale: float) -> Tensor:
    return (scale * torch.randn(rows, columns, device=device)).to(torch.bfloat16).requires_grad_()


def random_targets(device: torch.device) -> Tensor:
    chosen = torch.randint(0, VOCABULARY, (TOKENS,), device=device)
    chosen[torch.rand(TOKENS, device=device) > 0.8] = NO_TARGET
    return chosen


def assert_gradients_near(found: Tensor | None, expected: Tensor | None) -> None:
    assert found is not None and expected is not None
    assert (found.double() - expected).norm() <= GRADIENT * expected.norm()


def test_head_loss_equals_float64(gpu: torch.device) -> None:
    torch.manual_seed(new_seed())
    hidden, weight, chosen = (
        random_matrix(gpu, TOKENS, HIDDEN, 1),
        random_matrix(gpu, VOCABULARY, HIDDEN, 0.1),
        random_targets(gpu),
    )
    coefficients = torch.randn(TOKENS, device=gpu)
    loss, logp = head_loss(hidden, weight, chosen, lambda logp_t, rows_t: coefficients[rows_t])
    loss.backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    rows = (chosen != NO_TARGET).nonzero().squeeze(1)
    expected = (exact[0][rows] @ exact[1].T).log_softmax(1).gather(1, chosen[rows, None]).squeeze(1)
    (-(coefficients.double()[rows] * expected).sum()).backward()
    for found in (logp, target_logp(hidden.detach(), weight.detach(), chosen)):
        assert (found[rows].double() - expected.detach()).abs().max() <= LOGP
        assert found.isnan().sum() == TOKENS - len(rows)
    assert_gradients_near(hidden.grad, exact[0].grad)
    assert_gradients_near(weight.grad, exact[1].grad)


@pytest.mark.parametrize(
    "tokens, vocabulary, width",
    [
        pytest.param(1, 40, 64, id="less-than-a-tile"),
        pytest.param(129, 1001, 192, id="remainders"),
        pytest.param(300, 2056, 2880, id="wide"),
    ],
)
def test_targets_of_any_likelihood(gpu: torch.device, tokens: int, vocabulary: int, width: int) -> None:
    """log p from −1,000 to 0: exponentials of one row have several references. The same bits twice."""
    torch.manual_seed(new_seed())
    scale = width**-0.5
    hidden, weight = random_matrix(gpu, tokens, width, 1), random_matrix(gpu, vocabulary, width, scale)
    with torch.no_grad():
        hidden[::3] *= 100
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logits = exact[0] @ exact[1].T
    chosen = torch.randint(0, vocabulary, (tokens,), device=gpu)
    chosen[:100], chosen[100:200] = logits[:100].argmin(1), logits[100:200].argmax(1)
    coefficients = torch.rand(tokens, device=gpu)
    expected = logits.log_softmax(1).gather(1, chosen[:, None]).squeeze(1)
    (-(coefficients.double() * expected).sum()).backward()
    found = []
    for _ in range(2):
        loss, logp = head_loss(hidden, weight, chosen, lambda logp_t, rows_t: coefficients[rows_t])
        found.append((logp, *torch.autograd.grad(loss, [hidden, weight])))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
    logp, *gradients = found[0]
    # logits of several hundred are sums in fp32 of numbers that are larger than their sum
    assert ((logp.double() - expected).abs() <= LOGP + 1e-5 * expected.abs()).all()
    assert torch.equal(target_logp(hidden.detach(), weight.detach(), chosen), logp)
    for gradient, wanted in zip(gradients, exact, strict=True):
        assert_gradients_near(gradient, wanted.grad)


def test_head_loss_of_fp32_equals_float64(gpu: torch.device) -> None:
    """Inputs that the kernels do not take."""
    torch.manual_seed(new_seed())
    hidden, weight = (
        torch.randn(rows, HIDDEN, device=gpu).mul_(scale).requires_grad_()
        for rows, scale in ((TOKENS, 1), (1000, 0.1))
    )
    chosen, coefficients = torch.randint(0, 1000, (TOKENS,), device=gpu), torch.rand(TOKENS, device=gpu)
    loss, logp = head_loss(hidden, weight, chosen, lambda logp_t, rows_t: coefficients[rows_t])
    loss.backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = (exact[0] @ exact[1].T).log_softmax(1).gather(1, chosen[:, None]).squeeze(1)
    (-(coefficients.double() * expected).sum()).backward()
    assert (logp.double() - expected).abs().max() <= LOGP
    assert_gradients_near(hidden.grad, exact[0].grad)
    assert_gradients_near(weight.grad, exact[1].grad)


def test_a_final_loss_adds_to_the_fp32_buffer(gpu: torch.device) -> None:
    """Of two microbatches, what two losses that are not final give as a gradient, but without its rounding to
    bf16. Without gradients the buffer stays as it is."""
    torch.manual_seed(new_seed())
    weight = random_matrix(gpu, VOCABULARY, HIDDEN, 0.1)
    before = 0.01 * torch.randn(VOCABULARY, HIDDEN, device=gpu)
    final = weight.detach().clone().requires_grad_()
    final.main_grad = before.clone()  # type: ignore[attr-defined]
    wanted = before.double()
    for _ in range(2):
        hidden, chosen = random_matrix(gpu, TOKENS, HIDDEN, 1), random_targets(gpu)
        coefficients = torch.randn(TOKENS, device=gpu)
        with torch.no_grad():
            head_loss(hidden, final, chosen, lambda logp_t, rows_t, c=coefficients: c[rows_t], final=True)
        results = []
        for matrix, is_final in ((weight, False), (final, True)):
            loss, logp = head_loss(
                hidden, matrix, chosen, lambda logp_t, rows_t, c=coefficients: c[rows_t], final=is_final
            )
            gradients = torch.autograd.grad(loss, [hidden, matrix])
            results.append((loss, logp, gradients[0]))
        wanted += gradients_of_head(hidden, weight, chosen, coefficients)
        assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(*results, strict=True))
    main: Tensor = final.main_grad  # type: ignore[attr-defined]
    assert final.grad_added_to_main_grad  # type: ignore[attr-defined]
    assert_gradients_near(main - before, wanted - before)


def gradients_of_head(hidden: Tensor, weight: Tensor, chosen: Tensor, coefficients: Tensor) -> Tensor:
    """Of the weight, in float64."""
    exact = weight.detach().double().requires_grad_()
    rows = (chosen != NO_TARGET).nonzero().squeeze(1)
    logp = (hidden.detach().double()[rows] @ exact.T).log_softmax(1).gather(1, chosen[rows, None]).squeeze(1)
    (gradient,) = torch.autograd.grad(-(coefficients.double()[rows] * logp).sum(), exact)
    return gradient


@pytest.mark.parametrize(
    "tokens, vocabulary, width, teacher_width, temperature",
    [
        pytest.param(1, 40, 64, 64, 2.0, id="less-than-a-tile"),
        pytest.param(1000, 1001, 192, 320, 2.5, id="remainders"),
        pytest.param(900, VOCABULARY, 1024, 2880, 2.0, id="projected"),
        pytest.param(900, VOCABULARY, 2880, 2880, 1.0, id="as-wide"),
    ],
)
def test_forced_loss_equals_float64(
    gpu: torch.device,
    tokens: int,
    vocabulary: int,
    width: int,
    teacher_width: int,
    temperature: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two chunks in several parts, all terms; the teacher's logits are bf16. Final losses have the same
    bits, and their gradients of matrices are in the fp32 buffers."""
    torch.manual_seed(new_seed())
    monkeypatch.setattr(teacher_forced_kernels, "SPARE", 128)
    monkeypatch.setitem(
        teacher_forced_head.CHUNK_BYTES, "cuda", 2 * vocabulary * (128 + max(1, tokens * 4 // 9))
    )
    hidden, output = (
        random_matrix(gpu, tokens, width, 1),
        random_matrix(gpu, vocabulary, width, 1.5 * width**-0.5),
    )
    projection = random_matrix(gpu, teacher_width, width, width**-0.5) if width != teacher_width else None
    teacher = Teacher(
        random_matrix(gpu, tokens, teacher_width, 1).detach(),
        random_matrix(gpu, vocabulary, teacher_width, 1.5 * teacher_width**-0.5).detach(),
    )
    chosen = torch.randint(0, vocabulary, (tokens,), device=gpu)
    chosen[1:][torch.rand(tokens - 1, device=gpu) > 0.8] = NO_TARGET
    share = torch.rand(tokens, device=gpu)
    terms = LossWeights(ce=0.3, kl=0.5, hidden=0.7, temperature=temperature)
    leaves = [leaf for leaf in (hidden, output, projection) if leaf is not None]
    found = forced_loss(hidden, output, projection, teacher, chosen, share, terms)
    gradients = torch.autograd.grad(found.loss, leaves)
    for matrix in leaves[1:]:
        matrix.main_grad = torch.zeros(matrix.shape, device=gpu)  # type: ignore[attr-defined]
    final = forced_loss(hidden, output, projection, teacher, chosen, share, terms, final=True)
    of_hidden, *_ = torch.autograd.grad(final.loss, leaves)
    for x, y in zip((*found, gradients[0]), (*final, of_hidden), strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())

    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    rows = (chosen != NO_TARGET).nonzero().squeeze(1)
    of_teacher = teacher.hidden_TG.double()[rows]
    logits = exact[0][rows] @ exact[1].T
    teacher_logits = (of_teacher @ teacher.output_VG.double().T).to(torch.bfloat16).double()
    q, p = ((x / temperature).log_softmax(1) for x in (logits, teacher_logits))
    kl = (p.exp() * (p - q)).sum(1)
    logp = logits.log_softmax(1).gather(1, chosen[rows, None]).squeeze(1)
    projected = exact[0][rows] if projection is None else exact[0][rows] @ exact[2].T
    cosine = torch.nn.functional.cosine_similarity(projected, of_teacher, dim=1)
    losses = terms.kl * temperature**2 * kl - terms.ce * logp + terms.hidden * (1 - cosine)
    wanted = torch.autograd.grad((share.double()[rows] * losses).sum(), exact)
    for got, want in ((found.logp_T, logp), (found.kl_T, kl), (found.cosine_T, cosine)):
        assert (got[rows].double() - want.detach()).abs().max() <= LOGP
        assert got.isnan().sum() == tokens - len(rows)
    for gradient, want in zip(gradients, wanted, strict=True):
        assert_gradients_near(gradient, want)
    for matrix, want in zip(leaves[1:], wanted[1:], strict=True):
        assert_gradients_near(matrix.main_grad, want)  # type: ignore[attr-defined]
