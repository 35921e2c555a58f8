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

CHOICE = (1, 1, 16)
"""Positions of a row that a program of the choice holds at a time, its warps, and how often it does. In a
single warp no step needs shared memory. Each program has a row in the sums of the load."""
GRADIENT = (4, 4, 8)
"""The same of a program of the gradients, and the sums of the bias."""
TAKEN, OUTSIDE = tl.constexpr(-(2**31)), tl.constexpr(1 - 2**31)
"""Keys of experts that were chosen before and that are in no chosen group: below those of all numbers."""


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
    coefficient: float | None,
) -> tuple[Tensor, Tensor]:
    """(weights of each token's choices [N, K] fp32, their experts [N, K] int32).

    The N = S·b tokens are in the order of `padding_Sb`. bf16; `selection_bias_E` is fp32. Without `load`
    nothing is counted. With `coefficient`, which needs `load`, the backward also adds the gradients of
    coefficient · balance loss, as if it were a part of the loss. Raises ValueError for another dtype, or
    numbers of experts, groups or choices that are not powers of 2.
    """
    if hidden_NH.dtype != torch.bfloat16 or weight_EH.dtype != torch.bfloat16:
        raise ValueError(
            f"hidden states are {hidden_NH.dtype}, the router's weight {weight_EH.dtype}; on a GPU both have "
            "to be bf16. Cast them."
        )
    for name, number in zip(Rule._fields[:4], rule[:4], strict=True):
        if number & (number - 1):
            raise ValueError(f"{name} of the router is {number}; on a GPU it has to be a power of 2.")
    routed: tuple[Tensor, Tensor] = _Route.apply(  # type: ignore[no-untyped-call]
        hidden_NH, weight_EH, bias_E, selection_bias_E, padding_Sb, rule, load, coefficient
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
        coefficient: float | None,
    ) -> tuple[Tensor, Tensor]:
        logits_NE = torch.mm(hidden_NH, weight_EH.T, out_dtype=torch.float32)
        padding_Sb = padding_Sb.contiguous()
        weight_NK, expert_NK, share_bE = choose(
            logits_NE, bias_E, selection_bias_E, padding_Sb, rule, load, balanced=coefficient is not None
        )
        ctx.save_for_backward(hidden_NH, weight_EH, bias_E, padding_Sb, logits_NE, expert_NK, share_bE)
        ctx.rule, ctx.coefficient = rule, coefficient or 0.0
        ctx.mark_non_differentiable(expert_NK)
        ctx.set_materialize_grads(False)  # the experts' would be zeros
        return weight_NK, expert_NK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_weight_NK: Tensor, _: None) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_EH, bias_E, padding_Sb, logits_NE, expert_NK, share_bE = ctx.saved_tensors
        halves_N2E, grad_bias_E = gradient_of_logits(
            logits_NE, bias_E, padding_Sb, expert_NK, grad_weight_NK, share_bE, ctx.coefficient, ctx.rule
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
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`route` from logits without their bias, in fp32. Also returns, if `balanced`, the derivative of the
    balance loss by each row's sum of normalised scores [b, E]."""
    positions, rows = padding_Sb.shape
    block, warps, steps = CHOICE
    programs = triton.cdiv(positions, block * steps)
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
        block,
        steps,
        num_warps=warps,
    )
    if sums is None or load is None:
        return weight_NK, expert_NK, None
    share_bE = weight_NK.new_empty(rows, experts) if balanced else None
    _total[(1,)](sums.sum(1), *load, share_bE, rows, experts, rule.choices, balanced)
    return weight_NK, expert_NK, share_bE


def gradient_of_logits(
    logits_NE: Tensor,
    bias_E: Tensor | None,
    padding_Sb: Tensor,
    expert_NK: Tensor,
    grad_weight_NK: Tensor,
    share_bE: Tensor | None,
    coefficient: float,
    rule: Rule,
) -> tuple[Tensor, Tensor | None]:
    """(two bf16 numbers for each logit, whose sum is its gradient [N, 2·E]: first all of the larger ones; the
    gradient of the bias). `share_bE` as `choose` returned it; `coefficient` of the balance loss."""
    positions, rows = padding_Sb.shape
    block, warps, steps = GRADIENT
    programs = triton.cdiv(positions, block * steps)
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
        coefficient,
        halves_N2E,
        sums,
        positions,
        rows,
        *rule,
        bias_E is not None,
        share_bE is not None,
        block,
        steps,
        num_warps=warps,
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
def _scores_of(logits, bias, n, expert, inside, E: tl.constexpr, BIASED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sigmoids [T] of one expert of each token: the bits of _scores, read again from the cache."""
    x = tl.load(logits + n * E + expert, mask=inside, other=0.0)
    if BIASED:
        x += tl.load(bias + expert).to(tl.float32)
    return tl.sigmoid(x)


@triton.jit  # type: ignore[untyped-decorator]
def _chosen_groups(  # type: ignore[no-untyped-def]
    key, E: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, CHOSEN: tl.constexpr, T: tl.constexpr
):
    """Whether an expert is in one of the best groups [T, E]. A group's score is the sum of the K / CHOSEN
    largest `key` [T, E] of its experts; of equal groups the first is better."""
    left = tl.reshape(key, (T, GROUPS, E // GROUPS))
    member = tl.arange(0, E // GROUPS)[None, None, :]
    score = tl.max(left, 2)
    for _ in tl.static_range(1, K // CHOSEN):
        left = tl.where(member == tl.argmax(left, 2)[:, :, None], float("-inf"), left)
        score += tl.max(left, 2)
    group = tl.arange(0, GROUPS)
    one, other = score[:, :, None], score[:, None, :]
    better = (other > one) | ((other == one) & (group[None, None, :] < group[None, :, None]))
    rank = tl.sum(better.to(tl.int32), 2)
    ranks = tl.broadcast_to(rank[:, :, None], (T, GROUPS, E // GROUPS))
    return tl.reshape(ranks, (T, E)) < CHOSEN


@triton.jit
def _ordered(x):  # type: ignore[no-untyped-def]
    """Integers in the order of the fp32 numbers: the hardware finds the largest of a warp's in one step."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit  # type: ignore[untyped-decorator]
def _take(key, E: tl.constexpr):  # type: ignore[no-untyped-def]
    """(the first of the experts with the largest key [T], `key` [T, E] with that expert TAKEN)."""
    e = tl.arange(0, E)[None, :]
    first = tl.min(tl.where(key == tl.max(key, 1)[:, None], e, E), 1)
    return first, tl.where(e == first[:, None], TAKEN, key)


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
    STEPS: tl.constexpr,
):
    """`sums` [rows, programs, 1 or 3, E] over the program's positions that are not padding: tokens of each
    expert; how often it is among the K highest scores of all, without groups and bias; normalised scores."""
    row = tl.program_id(1)
    e = tl.arange(0, E)
    beside = tl.load(selection_bias + e)[None, :]
    used = tl.zeros((T, E), tl.int32)
    picked = tl.zeros((T, E), tl.int32)
    normal = tl.zeros((T, E), tl.float32)
    for step in range(STEPS):
        s = (tl.program_id(0) * STEPS + step) * T + tl.arange(0, T)
        inside = s < positions
        n = s.to(tl.int64) * rows + row
        score = _scores(logits, bias, n, inside, E, BIASED)
        key = score + beside
        key = tl.where(_chosen_groups(key, E, K, GROUPS, CHOSEN, T), _ordered(key), OUTSIDE)
        expert, key = _take(key, E)
        tl.store(experts + n * K, expert, mask=inside)
        total = _scores_of(logits, bias, n, expert, inside, E, BIASED)
        values = (total,)
        for i in tl.static_range(1, K):
            expert, key = _take(key, E)
            tl.store(experts + n * K + i, expert, mask=inside)
            value = _scores_of(logits, bias, n, expert, inside, E, BIASED)
            total += value
            values = values + (value,)  # type: ignore[assignment]  # noqa: RUF005  # Triton has no *
        for i in tl.static_range(K):
            tl.store(weights + n * K + i, values[i] / (total + 1e-20) * SCALING, mask=inside)
        if COUNTED:
            real = (tl.load(padding + n, mask=inside, other=1) == 0)[:, None]
            used += (real & (key == TAKEN)).to(tl.int32)
            if BALANCED:
                key = _ordered(score)
                for _ in tl.static_range(K):
                    _first, key = _take(key, E)
                picked += (real & (key == TAKEN)).to(tl.int32)
                share = 1 / (tl.sum(score, 1) + 1e-20)
                normal += tl.where(real, score * share[:, None], 0.0)
    if COUNTED:
        A: tl.constexpr = 3 if BALANCED else 1
        part = sums + (row * tl.num_programs(0) + tl.program_id(0)) * A * E + e
        tl.store(part, tl.sum(used, 0).to(tl.float32))
        if BALANCED:
            tl.store(part + E, tl.sum(picked, 0).to(tl.float32))
            tl.store(part + 2 * E, tl.sum(normal, 0))


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _total(  # type: ignore[no-untyped-def]
    sums, tokens, balance, share, rows, E: tl.constexpr, K: tl.constexpr, BALANCED: tl.constexpr
):
    """From `sums` of whole rows [rows, 1 or 3, E]: adds to the router's sums the tokens and the balance loss
    n·E·Σ f·p of all rows (Router._apply_seq_aux_loss), and stores its derivative by the sum of a row's p."""
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
        tl.store(balance, tl.load(balance) + total)


@triton.jit(do_not_specialize=["positions", "rows"])  # type: ignore[untyped-decorator]
def _gradient(  # type: ignore[no-untyped-def]
    logits,
    bias,
    padding,
    experts,
    grad_weights,
    share,
    coefficient,
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
    STEPS: tl.constexpr,
):
    """`sums` [rows, programs, E]: each program's part of the gradient of the bias."""
    row = tl.program_id(1)
    e = tl.arange(0, E)
    of_bias = tl.zeros((T, E), tl.float32)
    for step in range(STEPS):
        s = (tl.program_id(0) * STEPS + step) * T + tl.arange(0, T)
        inside = s < positions
        n = s.to(tl.int64) * rows + row
        score = _scores(logits, bias, n, inside, E, BIASED)
        gradient = tl.zeros((T, E), tl.float32)
        chosen = tl.zeros((T, E), tl.int1)
        total = tl.zeros((T,), tl.float32) + 1e-20
        product = tl.zeros((T,), tl.float32)
        for i in tl.static_range(K):
            expert = tl.load(experts + n * K + i, mask=inside, other=0)
            grad = tl.load(grad_weights + n * K + i, mask=inside, other=0.0)
            value = _scores_of(logits, bias, n, expert, inside, E, BIASED)
            total += value
            product += grad * value
            hit = e[None, :] == expert[:, None]
            gradient = tl.where(hit, grad[:, None], gradient)
            chosen |= hit
        scale = SCALING / total
        gradient = tl.where(chosen, (gradient - (product / total)[:, None]) * scale[:, None], 0.0)
        if BALANCED:
            real = tl.load(padding + n, mask=inside, other=1) == 0
            by_normal = (tl.load(share + row * E + e) * coefficient)[None, :]
            mass = tl.sum(score, 1) + 1e-20
            mean = tl.sum(by_normal * score, 1) / mass
            # of padding 0, as a factor of a token
            gradient += (by_normal - mean[:, None]) * tl.where(real, 1 / mass, 0.0)[:, None]
        gradient *= score * (1 - score)
        high = gradient.to(tl.bfloat16)
        low = (gradient - high.to(tl.float32)).to(tl.bfloat16)
        place = halves + n[:, None] * (2 * E) + e[None, :]
        tl.store(place, high, mask=inside[:, None])
        tl.store(place + E, low, mask=inside[:, None])
        if BIASED:
            of_bias += tl.where(inside[:, None], gradient, 0.0)
    if BIASED:
        part = sums + (row * tl.num_programs(0) + tl.program_id(0)) * E + e
        tl.store(part, tl.sum(of_bias, 0))
