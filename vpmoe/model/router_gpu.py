"""The router on a GPU: a product and two kernels forward, one kernel and two products backward.

megatron's router takes some sixty kernels for the same, most of them passes over [tokens, experts] in fp32,
and sorts each row four times. The definition, which the CPU computes, is in router.py.

The products have the meaning of fp32 but run on tensor cores. Forward, both factors are bf16, whose products
are exact in fp32, and so are their sums, up to the order of adding. Backward, a gradient of logits is the sum
of two bf16 numbers, which hold 16 of its 24 bits: an error of 2⁻¹⁷, where the results are rounded to bf16
(2⁻⁹). No atomic additions, so results are the same in each call.
"""

from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from torch.autograd.function import once_differentiable

from vpmoe.model.main_gradient import add_to_main_gradient
from vpmoe.model.sums_gpu import gradient_of_vector

POSITIONS = 16
"""Positions of a row that a program holds at a time."""
WARPS = 4


class Rule(NamedTuple):
    """How a token's experts are chosen. All numbers but `scaling` are powers of 2."""

    experts: int
    choices: int
    groups: int
    chosen_groups: int
    scaling: float


class Load(NamedTuple):
    """Sums that a router keeps, to which a forward adds."""

    tokens_E: Tensor
    """Tokens of each expert, fp32, without padding."""
    balance: Tensor
    """The balance loss without its coefficient, a scalar in fp32."""


def route(
    hidden_NH: Tensor,
    weight_EH: Tensor,
    bias_E: Tensor | None,
    selection_bias_E: Tensor,
    padding_Sb: Tensor,
    rule: Rule,
    load: Load | None,
    *,
    balanced: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(weights of each token's choices [N, K] fp32, their experts [N, K] int32, balance loss without its
    coefficient: a scalar, None unless `balanced`).

    The N = S·b tokens are in the order of `padding_Sb`. bf16; `selection_bias_E` is fp32. Without `load`
    nothing is counted. Raises ValueError for another dtype, or numbers of experts, groups or choices that are
    not powers of 2.
    """
    if hidden_NH.dtype != torch.bfloat16 or weight_EH.dtype != torch.bfloat16:
        raise ValueError(
            f"hidden states are {hidden_NH.dtype}, the router's weight {weight_EH.dtype}; on a GPU both have "
            "to be bf16. Cast them."
        )
    for name, number in zip(Rule._fields[:4], rule[:4], strict=True):
        if number & (number - 1):
            raise ValueError(f"{name} of the router is {number}; on a GPU it has to be a power of 2.")
    routed: tuple[Tensor, Tensor, Tensor | None] = _Route.apply(  # type: ignore[no-untyped-call]
        hidden_NH, weight_EH, bias_E, selection_bias_E, padding_Sb, rule, load, balanced
    )
    return routed


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_EH: Tensor,
        bias_E: Tensor | None,
        selection_bias_E: Tensor,
        padding_Sb: Tensor,
        rule: Rule,
        load: Load | None,
        balanced: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        logits_NE = torch.mm(hidden_NH, weight_EH.T, out_dtype=torch.float32)
        padding_Sb = padding_Sb.contiguous()
        weight_NK, expert_NK, balance, share_bE = choose(
            logits_NE, bias_E, selection_bias_E, padding_Sb, rule, load, balanced=balanced
        )
        ctx.save_for_backward(hidden_NH, weight_EH, bias_E, padding_Sb, logits_NE, expert_NK, share_bE)
        ctx.rule = rule
        ctx.mark_non_differentiable(expert_NK)
        return weight_NK, expert_NK, balance

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_weight_NK: Tensor, _: None, grad_balance: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_EH, bias_E, padding_Sb, logits_NE, expert_NK, share_bE = ctx.saved_tensors
        halves_N2E, grad_bias_E = gradient_of_logits(
            logits_NE, bias_E, padding_Sb, expert_NK, grad_weight_NK, share_bE, grad_balance, ctx.rule
        )
        grad_hidden_NH = halves_N2E @ torch.cat([weight_EH, weight_EH])
        grad_weight_2EH = torch.mm(halves_N2E.T, hidden_NH, out_dtype=torch.float32)
        of_high, of_low = grad_weight_2EH.view(2, *weight_EH.shape)

        def add(main_EH: Tensor) -> None:
            main_EH.add_(of_low).add_(of_high)

        grad_weight_EH = add_to_main_gradient(weight_EH, add)
        if grad_weight_EH is None:
            grad_weight_EH = (of_high + of_low).to(weight_EH.dtype)
        return grad_hidden_NH, grad_weight_EH, grad_bias_E, None, None, None, None, None


def choose(
    logits_NE: Tensor,
    bias_E: Tensor | None,
    selection_bias_E: Tensor,
    padding_Sb: Tensor,
    rule: Rule,
    load: Load | None,
    *,
    balanced: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """`route` from logits without their bias, in fp32. Also returns, if `balanced`, the derivative of the
    balance loss by each row's sum of normalised scores [b, E]."""
    positions, rows = padding_Sb.shape
    programs = triton.cdiv(positions, POSITIONS)
    tokens, experts = logits_NE.shape
    weight_NK = torch.empty(tokens, rule.choices, dtype=torch.float32, device=logits_NE.device)
    expert_NK = torch.empty(tokens, rule.choices, dtype=torch.int32, device=logits_NE.device)
    sums = None
    if load is not None:
        sums = weight_NK.new_empty(rows, programs, 3 if balanced else 1, experts)
    _choose[(programs, rows)](
        logits_NE,
        bias_E,
        selection_bias_E,
        padding_Sb.view(torch.uint8),
        weight_NK,
        expert_NK,
        sums,
        positions,
        rows,
        *rule,
        bias_E is not None,
        sums is not None,
        balanced,
        POSITIONS,
        num_warps=WARPS,
    )
    if sums is None or load is None:
        return weight_NK, expert_NK, None, None
    balance = weight_NK.new_empty(()) if balanced else None
    share_bE = weight_NK.new_empty(rows, experts) if balanced else None
    _total[(1,)](sums.sum(1), *load, balance, share_bE, rows, experts, rule.choices, balanced)
    return weight_NK, expert_NK, balance, share_bE


def gradient_of_logits(
    logits_NE: Tensor,
    bias_E: Tensor | None,
    padding_Sb: Tensor,
    expert_NK: Tensor,
    grad_weight_NK: Tensor,
    share_bE: Tensor | None,
    grad_balance: Tensor | None,
    rule: Rule,
) -> tuple[Tensor, Tensor | None]:
    """(two bf16 numbers for each logit, whose sum is its gradient [N, 2·E]: first all of the larger ones; the
    gradient of the bias). `share_bE` as `choose` returned it."""
    positions, rows = padding_Sb.shape
    programs = triton.cdiv(positions, POSITIONS)
    tokens, experts = logits_NE.shape
    halves_N2E = torch.empty(tokens, 2 * experts, dtype=torch.bfloat16, device=logits_NE.device)
    sums = None if bias_E is None else logits_NE.new_empty(rows, programs, experts)
    _gradient[(programs, rows)](
        logits_NE,
        bias_E,
        padding_Sb.view(torch.uint8),
        expert_NK,
        grad_weight_NK.contiguous(),
        share_bE,
        grad_balance,
        halves_N2E,
        sums,
        positions,
        rows,
        *rule,
        bias_E is not None,
        share_bE is not None,
        POSITIONS,
        num_warps=WARPS,
    )
    if sums is None or bias_E is None:
        return halves_N2E, None
    return halves_N2E, gradient_of_vector(bias_E, sums.view(-1, experts))


@triton.jit  # type: ignore[untyped-decorator]
def _scores(logits, bias, n, inside, E: tl.constexpr, BIASED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sigmoids [T, E] of the tokens n [T]."""
    e = tl.arange(0, E)
    x = tl.load(logits + n[:, None] * E + e[None, :], mask=inside[:, None], other=0.0)
    if BIASED:
        x += tl.load(bias + e).to(tl.float32)[None, :]
    return tl.sigmoid(x)


@triton.jit  # type: ignore[untyped-decorator]
def _in_best_groups(  # type: ignore[no-untyped-def]
    key, E: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, CHOSEN: tl.constexpr, T: tl.constexpr
):
    """`key` [T, E], but −∞ outside the best groups. A group's score is the sum of its K / CHOSEN best
    experts; of equal groups the first is better."""
    left = tl.reshape(key, (T, GROUPS, E // GROUPS))
    member = tl.arange(0, E // GROUPS)[None, None, :]
    score = tl.zeros((T, GROUPS), tl.float32)
    for _ in tl.static_range(K // CHOSEN):
        score += tl.max(left, 2)
        left = tl.where(member == tl.argmax(left, 2)[:, :, None], float("-inf"), left)
    group = tl.arange(0, GROUPS)
    one, other = score[:, :, None], score[:, None, :]
    better = (other > one) | ((other == one) & (group[None, None, :] < group[None, :, None]))
    among = tl.sum(better.to(tl.int32), 2) < CHOSEN
    grouped = tl.reshape(key, (T, GROUPS, E // GROUPS))
    return tl.reshape(tl.where(among[:, :, None], grouped, float("-inf")), (T, E))


@triton.jit(do_not_specialize=["positions", "rows"])  # type: ignore[untyped-decorator]
def _choose(  # type: ignore[no-untyped-def]
    logits,
    bias,
    selection_bias,
    padding,
    weights,
    experts,
    sums,
    positions,
    rows,
    E: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    CHOSEN: tl.constexpr,
    SCALING: tl.constexpr,
    BIASED: tl.constexpr,
    COUNTED: tl.constexpr,
    BALANCED: tl.constexpr,
    T: tl.constexpr,
):
    """`sums` [rows, programs, 1 or 3, E] over the program's positions that are not padding: tokens of each
    expert; how often it is among the K highest scores of all, without groups and bias; normalised scores."""
    row = tl.program_id(1)
    s = tl.program_id(0) * T + tl.arange(0, T)
    inside = s < positions
    n = s.to(tl.int64) * rows + row
    e = tl.arange(0, E)
    k = tl.arange(0, K)
    score = _scores(logits, bias, n, inside, E, BIASED)
    key = _in_best_groups(score + tl.load(selection_bias + e)[None, :], E, K, GROUPS, CHOSEN, T)
    value = tl.zeros((T, K), tl.float32)
    expert = tl.zeros((T, K), tl.int32)
    used = tl.zeros((T, E), tl.float32)
    for i in tl.static_range(K):
        at = tl.argmax(key, 1)
        hit = e[None, :] == at[:, None]
        value = tl.where(k[None, :] == i, tl.sum(tl.where(hit, score, 0.0), 1)[:, None], value)
        expert = tl.where(k[None, :] == i, at[:, None], expert)
        used += tl.where(hit, 1.0, 0.0)
        key = tl.where(hit, float("-inf"), key)
    value = value / (tl.sum(value, 1) + 1e-20)[:, None] * SCALING
    place = n[:, None] * K + k[None, :]
    tl.store(weights + place, value, mask=inside[:, None])
    tl.store(experts + place, expert, mask=inside[:, None])
    if COUNTED:
        real = (tl.load(padding + n, mask=inside, other=1) == 0)[:, None]
        A: tl.constexpr = 3 if BALANCED else 1
        part = sums + (row * tl.num_programs(0) + tl.program_id(0)) * A * E + e
        tl.store(part, tl.sum(tl.where(real, used, 0.0), 0))
        if BALANCED:
            key = score
            picked = tl.zeros((T, E), tl.float32)
            for _ in tl.static_range(K):
                hit = e[None, :] == tl.argmax(key, 1)[:, None]
                picked += tl.where(hit, 1.0, 0.0)
                key = tl.where(hit, float("-inf"), key)
            normal = score / (tl.sum(score, 1) + 1e-20)[:, None]
            tl.store(part + E, tl.sum(tl.where(real, picked, 0.0), 0))
            tl.store(part + 2 * E, tl.sum(tl.where(real, normal, 0.0), 0))


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _total(  # type: ignore[no-untyped-def]
    sums, tokens, balance_sum, balance, share, rows, E: tl.constexpr, K: tl.constexpr, BALANCED: tl.constexpr
):
    """From `sums` of whole rows [rows, 1 or 3, E]: adds to the router's sums, and stores the balance loss
    n·E·Σ f·p of all rows (Router._apply_seq_aux_loss) and its derivative by the sum of a row's p."""
    e = tl.arange(0, E)
    used = tl.zeros((E,), tl.float32)
    total = 0.0
    A: tl.constexpr = 3 if BALANCED else 1
    for row in range(rows):
        part = sums + row * A * E + e
        used += tl.load(part)
        if BALANCED:
            picked = tl.load(part + E)
            by_score = picked * E / (K * tl.maximum(tl.sum(picked, 0) / K, 1.0))
            tl.store(share + row * E + e, by_score)
            total += tl.sum(by_score * tl.load(part + 2 * E), 0)
    tl.store(tokens + e, tl.load(tokens + e) + used)
    if BALANCED:
        tl.store(balance, total)
        tl.store(balance_sum, tl.load(balance_sum) + total)


@triton.jit(do_not_specialize=["positions", "rows"])  # type: ignore[untyped-decorator]
def _gradient(  # type: ignore[no-untyped-def]
    logits,
    bias,
    padding,
    experts,
    grad_weights,
    share,
    grad_balance,
    halves,
    sums,
    positions,
    rows,
    E: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    CHOSEN: tl.constexpr,
    SCALING: tl.constexpr,
    BIASED: tl.constexpr,
    BALANCED: tl.constexpr,
    T: tl.constexpr,
):
    """`sums` [rows, programs, E]: each program's part of the gradient of the bias."""
    row = tl.program_id(1)
    s = tl.program_id(0) * T + tl.arange(0, T)
    inside = s < positions
    n = s.to(tl.int64) * rows + row
    e = tl.arange(0, E)
    score = _scores(logits, bias, n, inside, E, BIASED)
    chosen = tl.zeros((T, E), tl.int32)
    gradient = tl.zeros((T, E), tl.float32)
    total = tl.zeros((T,), tl.float32) + 1e-20
    product = tl.zeros((T,), tl.float32)
    for i in tl.static_range(K):
        at = tl.load(experts + n * K + i, mask=inside, other=0)
        grad = tl.load(grad_weights + n * K + i, mask=inside, other=0.0)
        hit = e[None, :] == at[:, None]
        value = tl.sum(tl.where(hit, score, 0.0), 1)
        total += value
        product += grad * value
        gradient += tl.where(hit, grad[:, None], 0.0)
        chosen += hit.to(tl.int32)
    gradient = (gradient - (product / total)[:, None]) / total[:, None] * SCALING
    gradient = tl.where(chosen > 0, gradient, 0.0)
    if BALANCED:
        real = tl.load(padding + n, mask=inside, other=1) == 0
        by_normal = (tl.load(share + row * E + e) * tl.load(grad_balance))[None, :]
        mass = (tl.sum(score, 1) + 1e-20)[:, None]
        mean = tl.sum(by_normal * score, 1)[:, None] / mass
        gradient += tl.where(real[:, None], (by_normal - mean) / mass, 0.0)
    gradient *= score * (1 - score)
    high = gradient.to(tl.bfloat16)
    low = (gradient - high.to(tl.float32)).to(tl.bfloat16)
    place = halves + n[:, None] * (2 * E) + e[None, :]
    tl.store(place, high, mask=inside[:, None])
    tl.store(place + E, low, mask=inside[:, None])
    if BIASED:
        part = sums + (row * tl.num_programs(0) + tl.program_id(0)) * E + e
        tl.store(part, tl.sum(tl.where(inside[:, None], gradient, 0.0), 0))
