"""The head of teacher-forced training equals eager float64 and never allocates a tensor
[tokens, vocabulary]."""

import os
import subprocess
import sys
import textwrap
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.fakes.largest_tensor import Largest
from tests.fakes.students import new_seed
from vpmoe.api.stages import LossWeights
from vpmoe.model.batch import Batch
from vpmoe.model.spans import NO_TARGET
from vpmoe.objectives import teacher_forced_head
from vpmoe.objectives.teacher_forced import teacher_forced
from vpmoe.objectives.teacher_forced_head import Forced, Teacher, forced_loss

TOKENS, VOCABULARY, HIDDEN, TEACHER = 57, 131, 19, 23


class HeadInputs(NamedTuple):
    """Arguments of forced_loss except the terms. The first three require gradients."""

    hidden: Tensor
    output: Tensor
    projection: Tensor | None
    teacher: Teacher
    targets: Tensor
    share: Tensor

    def exact(self) -> "HeadInputs":
        leaves = [None if leaf is None else leaf.detach().double().requires_grad_() for leaf in self[:3]]
        return HeadInputs(  # type: ignore[call-arg]
            *leaves, Teacher(*(tensor.double() for tensor in self.teacher)), self.targets, self.share.double()
        )  # type: ignore[arg-type]


def random_inputs(dtype: torch.dtype, seed: int, *, width: int = TEACHER, learned: float = 0.7) -> HeadInputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    chosen = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    chosen[torch.rand(TOKENS, generator=generator) >= learned] = NO_TARGET
    return HeadInputs(
        normal(TOKENS, HIDDEN).requires_grad_(),
        normal(VOCABULARY, HIDDEN).requires_grad_(),
        normal(width, HIDDEN).requires_grad_() if width != HIDDEN else None,
        Teacher(normal(TOKENS, width), normal(VOCABULARY, width)),
        chosen,
        normal(TOKENS).abs(),
    )


def eager_loss(given: HeadInputs, terms: LossWeights) -> Forced:
    """The same with torch's own functions, for all tokens at once."""
    rows, t = (given.targets != NO_TARGET).nonzero().squeeze(1), terms.temperature
    hidden, teacher_hidden = given.hidden[rows], given.teacher.hidden_TG[rows]
    logits, teacher = hidden @ given.output.T, teacher_hidden @ given.teacher.output_VG.T
    nll = functional.cross_entropy(logits, given.targets[rows], reduction="none")
    soft, soft_teacher = (logits / t).log_softmax(1), (teacher / t).log_softmax(1)
    kl = functional.kl_div(soft, soft_teacher, reduction="none", log_target=True).sum(1)
    projected = hidden if given.projection is None else hidden @ given.projection.T
    cosine = functional.cosine_similarity(projected, teacher_hidden, dim=1)
    loss = (given.share[rows] * (terms.ce * nll + terms.kl * t**2 * kl + terms.hidden * (1 - cosine))).sum()

    def at_all_positions(part: Tensor) -> Tensor:
        all_T = torch.full((TOKENS,), torch.nan, dtype=part.dtype)
        all_T[rows] = part.detach()
        return all_T

    return Forced(loss, at_all_positions(-nll), at_all_positions(kl), at_all_positions(cosine))


ALL = LossWeights(ce=0.3, kl=0.5, hidden=0.7, temperature=2.5)
TERMS = [
    pytest.param(ALL, id="all-terms"),
    pytest.param(LossWeights(ce=1, kl=0, hidden=0), id="ce"),
    pytest.param(LossWeights(ce=0, kl=1, hidden=0, temperature=1), id="kl-at-1"),
    pytest.param(LossWeights(ce=0, kl=1, hidden=0, temperature=4), id="kl-at-4"),
    pytest.param(LossWeights(ce=0, kl=0, hidden=1), id="cosine"),
]


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("width", [pytest.param(TEACHER, id="projected"), pytest.param(HIDDEN, id="as-wide")])
@pytest.mark.parametrize(
    "chunk",
    [pytest.param(1, id="token-by-token"), pytest.param(10, id="chunks"), pytest.param(1000, id="one-chunk")],
)
# fp32: the rounding of sums over 131 logits of size 4 and over 57 tokens.
@pytest.mark.parametrize(
    "dtype, tolerance",
    [pytest.param(torch.float64, 1e-12, id="fp64"), pytest.param(torch.float32, 5e-5, id="fp32")],
)
def test_loss_parts_and_gradients_equal_eager_float64(
    terms: LossWeights,
    width: int,
    chunk: int,
    dtype: torch.dtype,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = random_inputs(dtype, new_seed(), width=width)
    monkeypatch.setitem(
        teacher_forced_head.CHUNK_BYTES, "cpu", chunk * given.output.element_size() * VOCABULARY
    )
    exact = given.exact()
    found, wanted = forced_loss(*given, terms), eager_loss(exact, terms)
    (found.loss * 3).backward()  # an incoming gradient other than 1
    (wanted.loss * 3).backward()
    pairs = [*zip(found, wanted, strict=True)]
    for got, want in zip(given[:3], exact[:3], strict=True):
        if got is not None and want is not None:
            pairs.append((got.grad, torch.zeros_like(want) if want.grad is None else want.grad))  # type: ignore[arg-type]
    for got, want in pairs:
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_a_student_equal_to_its_teacher_has_no_divergence() -> None:
    given = random_inputs(torch.float32, new_seed(), width=HIDDEN)
    own_teacher = given._replace(teacher=Teacher(given.hidden.detach(), given.output.detach()))
    found = forced_loss(*own_teacher, LossWeights(ce=0, kl=1, hidden=0, temperature=2))
    found.loss.backward()
    supervised = own_teacher.targets != NO_TARGET
    assert found.loss == 0 and (found.kl_T[supervised] == 0).all()
    assert (own_teacher.hidden.grad == 0).all() and (own_teacher.output.grad == 0).all()  # type: ignore[union-attr]
    # 1 up to the rounding of a sum of 19 squares
    torch.testing.assert_close(
        found.cosine_T[supervised], torch.ones(int(supervised.sum())), rtol=0, atol=1e-6
    )


def test_positions_without_a_target_contribute_nothing() -> None:
    given = random_inputs(torch.float64, new_seed())
    found = forced_loss(*given, ALL)
    found.loss.backward()
    supervised = given.targets != NO_TARGET
    unsupervised = random_inputs(torch.float64, 0, learned=0)
    without_targets = forced_loss(*unsupervised, ALL)
    without_targets.loss.backward()
    assert (given.hidden.grad[~supervised] == 0).all() and all(
        part[~supervised].isnan().all() for part in found[1:]
    )  # type: ignore[index]
    assert without_targets.loss == 0 and all((leaf.grad == 0).all() for leaf in unsupervised[:3])  # type: ignore[union-attr]


def test_zero_hidden_states_give_a_finite_loss() -> None:
    given = random_inputs(torch.float32, new_seed())
    zero_hidden = given._replace(hidden=torch.zeros_like(given.hidden).requires_grad_())
    found = forced_loss(*zero_hidden, ALL)
    found.loss.backward()
    assert (
        found.loss.isfinite()
        and zero_hidden.hidden.grad.isfinite().all()
        and zero_hidden.projection.grad.isfinite().all()
    )  # type: ignore[union-attr]


def test_a_missing_projection_is_rejected() -> None:
    given = random_inputs(torch.float32, 0)
    with pytest.raises(ValueError, match="19 wide, the teacher's 23: a projection is missing"):
        forced_loss(*given._replace(projection=None), ALL)


def test_no_tensor_is_as_large_as_tokens_by_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """CHUNK_BYTES holds the logits of 8 tokens, so that the largest result is one chunk of logits; a chunk
    of 9 tokens would exceed it."""
    vocabulary, tokens = 1000, 200
    monkeypatch.setitem(teacher_forced_head.CHUNK_BYTES, "cpu", 8 * 4 * vocabulary)
    hidden, output = (
        torch.randn(tokens, 4, requires_grad=True),
        torch.randn(vocabulary, 4, requires_grad=True),
    )
    projection = torch.randn(6, 4, requires_grad=True)
    teacher = Teacher(torch.randn(tokens, 6), torch.randn(vocabulary, 6))
    with Largest() as largest:
        found = forced_loss(
            hidden,
            output,
            projection,
            teacher,
            torch.randint(0, vocabulary, (tokens,)),
            torch.ones(tokens),
            ALL,
        )
        found.loss.backward()
    assert largest.elements == 8 * vocabulary


class StudentWeights(NamedTuple):
    """The attributes of a student that the objective uses."""

    output: Tensor
    projection: Tensor | None


def test_each_span_has_its_own_mean_over_the_global_batch() -> None:
    """The loss of two microbatches of different sizes equals eager means over all of their tokens, and the
    measures are these means."""
    generator = torch.Generator().manual_seed(new_seed())
    given = random_inputs(torch.float32, new_seed())
    student = StudentWeights(given.output, given.projection)
    batches = []
    for length in (9, 40):
        tokens = torch.randint(0, VOCABULARY, (1, length), generator=generator)
        spans = torch.randint(0, 3, (1, length), generator=generator, dtype=torch.uint8)
        batches.append(Batch.from_rows(tokens, spans, torch.zeros((1, length), dtype=torch.int32)))
    counts = torch.stack([batch.counts for batch in batches]).sum(0)
    weights = {"reasoning": 0.7, "final": 1.6}
    hidden = dict(zip((9, 40), given.hidden.detach()[:49].split([9, 40]), strict=True))
    teacher_hidden = dict(zip((9, 40), given.teacher.hidden_TG[:49].split([9, 40]), strict=True))
    objective = teacher_forced(
        counts, weights, ALL, given.teacher.output_VG, lambda batch: teacher_hidden[batch.tokens.numel()]
    )
    loss = sum(
        float(objective.loss(batch, hidden[batch.tokens.numel()], student, 10.0)[0].detach())
        for batch in batches
    )  # type: ignore[arg-type]

    exact, wanted, means = given.exact(), 0.0, objective.measures(objective.sums())
    for number, (name, weight) in enumerate(weights.items(), start=1):
        found = []
        for batch in batches:
            size = batch.tokens.numel()
            chosen = torch.full((TOKENS,), NO_TARGET)
            offset = 0 if size == 9 else 9
            chosen[offset : offset + size] = batch.target.where(batch.span == number, NO_TARGET)
            found.append(
                eager_loss(exact._replace(targets=chosen, share=torch.ones(TOKENS, dtype=torch.float64)), ALL)
            )
        n = sum(int((batch.span == number).sum()) for batch in batches)
        wanted += weight / n * sum(float(part.loss.detach()) for part in found)
        kl = sum(float(part.kl_T.nansum()) for part in found) / n
        assert means.kl[name] == pytest.approx(kl, rel=1e-5)
        assert means.cosine[name] == pytest.approx(
            sum(float(part.cosine_T.nansum()) for part in found) / n, abs=1e-6
        )
    assert loss / 10 == pytest.approx(wanted, rel=1e-5)


def test_the_gpu_kernels_equal_float64() -> None:
    """The kernels in Triton's interpreter: several parts of a chunk, several tiles and remainders in both
    directions, extreme logits, different shares, a length of 0. Hidden states and matrices are whole numbers,
    so that no logit is rounded. The interpreter has no inline assembly, so `_rounded` is another one here."""
    code = f"""
        import types
        import torch
        import triton.language as tl
        from vpmoe.api.stages import LossWeights
        from vpmoe.model import kernels
        from vpmoe.objectives import teacher_forced_head, teacher_forced_kernels as kernels_of_forced
        torch.manual_seed({new_seed()})
        torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(multi_processor_count=4)
        kernels.M, kernels.N, kernels.K = 16, 32, 16
        kernels._rounded = lambda x, dtype: (x.to(dtype), x.to(dtype).to(tl.float32))
        kernels_of_forced.BLOCK, kernels_of_forced.SPARE = 64, 20
        rows = torch.arange(75)
        assert [*kernels_of_forced._parts(75)] == [(0, 32), (32, 48), (48, 64), (64, 75)]
        hidden, output = (torch.randint(-3, 4, (n, 40)).float() for n in (75, 70))
        teacher, teacher_output = (torch.randint(-2, 3, (n, 24)).float() for n in (75, 70))
        targets, share = torch.randint(0, 70, (75,)), torch.rand(75)
        hidden[1] *= 10
        hidden[2], targets[1], targets[2] = 0, 69, 0
        y = teacher.double() @ teacher_output.double().T
        assert y.abs().max() <= 256  # a whole number in bf16
        for t in (2.0, 2.5):
            terms = LossWeights(ce=0.3, kl=0.5, hidden=0.0, temperature=t)
            x = (hidden.double() @ output.double().T).requires_grad_()
            q, p = (x / t).log_softmax(1), (y / t).log_softmax(1)
            want_kl, want = (p.exp() * (p - q)).sum(1), x.log_softmax(1)[rows, targets]
            (share.double() * (0.5 * t**2 * want_kl - 0.3 * want)).sum().backward()
            logp, kl, grad = kernels_of_forced.compare(
                hidden, output, teacher, teacher_output, targets, share, terms
            )
            # sums in fp32 of numbers up to 1,000; the interpreter cuts off what a GPU rounds to bf16
            torch.testing.assert_close(logp.double(), want.detach(), rtol=1e-6, atol=1e-5)
            torch.testing.assert_close(kl.double(), want_kl.detach(), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(grad.double(), x.grad, rtol=2**-7, atol=1e-6)
        again = kernels_of_forced.compare(hidden, output, teacher, teacher_output, targets, share, terms)
        assert all(torch.equal(x, y) for x, y in zip((logp, kl, grad), again, strict=True))
        u = torch.randn(75, 24)
        u[0], teacher[1], share[2] = 0, 0, 0
        exact = u.double().requires_grad_()
        want = torch.nn.functional.cosine_similarity(exact, teacher.double(), dim=1)
        (share.double() * want).sum().backward()
        found, grad = kernels_of_forced.cosine(u, teacher, share, teacher_forced_head.EPSILON)
        torch.testing.assert_close(found.double(), want.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(grad.double()[1:], exact.grad[1:], rtol=1e-5, atol=1e-6)
        assert grad.isfinite().all()
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=True,
        timeout=120,
    )
