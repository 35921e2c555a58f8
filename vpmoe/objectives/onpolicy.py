"""OnPolicy: each token that the student sampled is moved by how much likelier the teacher finds it than the student does.

In expectation over the student's own samples the gradient is that of the reverse KL, KL(student‖teacher), one token at a time. Nothing is
normalised over the batch: what a token is worth follows from its own three log-probabilities. Sampling and scoring are vpmoe.rollout's and
vpmoe.teacher's business; the stage's anchor steps are Vanilla (vanilla.py), with counts of their own.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vpmoe.data.spans import SPANS
from vpmoe.model.batch import Batch
from vpmoe.model.head import Coefficient
from vpmoe.model.objective import Weighted
from vpmoe.model.spans import coefficient_by_span

MOST_ADVANTAGE = 20.0
"""Nats by which the teacher's opinion of one token may count, either way."""
MOST_RATIO = 2.0
"""Most that a token may count for having become likelier since it was sampled."""
MEASURED = 5
"""Numbers that are summed for each span: tokens, logp_s − logp_teacher, KL(sampler‖trainer), advantages and ratios that were bounded."""


def on_policy(counts: Tensor, weights: Mapping[str, float]) -> Weighted:
    """Coefficients c = w_span / N_span · ρ · a, all of it detached and always applied, with

        a = logp_teacher − logp_s              bounded to ±MOST_ADVANTAGE
        ρ = exp(logp_s − logp_sampler)         at most MOST_RATIO

    logp_s is the student's log p in this very forward, the one that the gradient is taken of: not the sampler's, not one kept from before.
    `counts` is [positions, N_reasoning, N_final] of the GLOBAL batch; in rollouts every target is a sampled token, so N counts those. The
    batch has the teacher's and the sampler's log p of every target; one that is NaN makes the loss NaN, and the step is not taken.
    """
    by_span = coefficient_by_span(counts, weights)

    def of(batch: Batch) -> Coefficient:
        share_T = torch.tensor(by_span, dtype=torch.float32, device=batch.span.device)[batch.span.long()]
        teacher_T, sampler_T = stored(batch)

        def coefficient(logp_t: Tensor, rows_t: Tensor) -> Tensor:
            advantage_t = (teacher_T[rows_t] - logp_t).clamp(-MOST_ADVANTAGE, MOST_ADVANTAGE)
            ratio_t = (logp_t - sampler_T[rows_t]).exp().clamp(max=MOST_RATIO)
            return share_T[rows_t] * ratio_t * advantage_t

        return coefficient

    return Weighted(of, _measure, _told)


def stored(batch: Batch) -> tuple[Tensor, Tensor]:
    """The teacher's and the sampler's log p of each position's target, both [T] fp32. Raises ValueError for a batch without them."""
    if batch.teacher_logp is None or batch.sampler_logp is None:
        raise ValueError(
            "an OnPolicy step wants a batch with the teacher's and the sampler's log-probabilities"
        )
    return batch.teacher_logp, batch.sampler_logp


def _measure(batch: Batch, logp_T: Tensor) -> Tensor:
    """[spans · MEASURED] float64 sums over the microbatch.

    KL(sampler‖trainer) is estimated by r − 1 − log r with r = p_s / p_sampler (Schulman, "Approximating KL divergence", k3): never
    negative, and 0 only where the two agree on every token.
    """
    teacher_T, sampler_T = (logp.double() for logp in stored(batch))
    gap_T, log_ratio_T = logp_T.double() - teacher_T, logp_T.double() - sampler_T
    bounded = (gap_T.abs() > MOST_ADVANTAGE, log_ratio_T.exp() > MOST_RATIO)
    found_5T = torch.stack(
        [
            torch.ones_like(gap_T),
            gap_T,
            log_ratio_T.expm1() - log_ratio_T,
            *(which.double() for which in bounded),
        ]
    )
    return torch.cat([found_5T.where(batch.span == span, 0).sum(1) for span in SPANS.values()])


def _told(total: Tensor) -> dict[str, Any]:
    """The step's measures by span, for its line of metrics; null where the batch has no such token. In nats a token, and shares.

    reverseKl is mean(logp_s − logp_teacher), over sampled tokens an estimate of KL(student‖teacher). samplerKl also holds what the student
    has learned since the version that was sampled from.
    """
    names = ("reverseKl", "samplerKl", "advantage", "ratio")
    found: dict[str, dict[str, float | None]] = {name: {} for name in names}
    for span, (tokens, *sums) in zip(SPANS, total.view(-1, MEASURED).tolist(), strict=True):
        for name, value in zip(names, sums, strict=True):
            found[name][span] = value / tokens if tokens else None
    return {name: found[name] for name in names[:2]} | {"bounded": {name: found[name] for name in names[2:]}}
