"""OnPolicy: each token that the student sampled becomes more or less likely by as much as the teacher's
opinion of it differs.

In expectation over the student's own samples the gradient is that of the reverse KL, KL(student‖teacher), one
token at a time. Nothing is normalised over the batch: a token's coefficient follows from its own three
log-probabilities. Sampling is in vpmoe.sampler, scoring in vpmoe.teacher. The stage's anchor steps are
Vanilla (vanilla.py), with counts of their own.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from vpmoe.api import pod_metrics
from vpmoe.api.base import Record
from vpmoe.api.metrics import BySpan, Measures, Sample, samples_by_span
from vpmoe.data.spans import SPANS
from vpmoe.model.batch import Batch
from vpmoe.model.head import Coefficient
from vpmoe.model.objective import Weighted
from vpmoe.model.spans import coefficient_by_span, means_by_span, values_of_spans

MOST_ADVANTAGE = 20.0
"""Bound on the advantage of one token, in nats, either way."""
MOST_RATIO = 2.0
"""Bound on the factor by which a token counts more because it became likelier since it was sampled."""
SUMS = 5
"""Sums of each span: tokens, logp_s − logp_teacher, KL(sampler‖trainer), advantages and ratios that were
bounded."""


class BoundedShares(Record):
    """Shares of a step's tokens, by span."""

    advantage: BySpan
    """Whose advantage was at MOST_ADVANTAGE."""
    ratio: BySpan
    """Whose ratio was at MOST_RATIO."""


class OnPolicyMeasures(Measures):
    """What the step of a window measures."""

    reverse_kl: BySpan
    """mean(logp_s − logp_teacher) in nats a token: over sampled tokens an estimate of KL(student‖teacher)."""
    sampler_kl: BySpan
    """KL(sampler‖trainer) in nats a token, including what the student has learned since the version that was
    sampled from."""
    bounded: BoundedShares

    def samples(self) -> Iterable[Sample]:
        return [
            *samples_by_span(pod_metrics.REVERSE_KL, self.reverse_kl),
            *samples_by_span(pod_metrics.SAMPLER_KL, self.sampler_kl),
        ]


def on_policy(counts: Tensor, weights: Mapping[str, float]) -> Weighted:
    """Coefficients c = w_span / N_span · ρ · a, all of it detached and always applied, with

        a = logp_teacher − logp_s              bounded to ±MOST_ADVANTAGE
        ρ = exp(logp_s − logp_sampler)         at most MOST_RATIO

    logp_s is the student's log p in the forward whose gradient is taken: neither the sampler's nor an earlier
    one. `counts` is [positions, N_reasoning, N_final] of the GLOBAL batch; in rollouts every target is a
    sampled token, so N counts those. The batch has the teacher's and the sampler's log p of every target. One
    that is NaN makes the loss NaN, and the step is not taken.
    """
    by_span = coefficient_by_span(counts, weights)

    def coefficient_of(batch: Batch) -> Coefficient:
        share_T = values_of_spans(by_span, batch.span)
        teacher_T, sampler_T = stored_logp(batch)

        def coefficient(logp_t: Tensor, rows_t: Tensor) -> Tensor:
            advantage_t = (teacher_T[rows_t] - logp_t).clamp(-MOST_ADVANTAGE, MOST_ADVANTAGE)
            ratio_t = (logp_t - sampler_T[rows_t]).exp().clamp(max=MOST_RATIO)
            return share_T[rows_t] * ratio_t * advantage_t

        return coefficient

    return Weighted(coefficient_of, _sums, _measures)


def stored_logp(batch: Batch) -> tuple[Tensor, Tensor]:
    """The teacher's and the sampler's log p of each position's target, both [T] fp32. Raises ValueError for a
    batch without them."""
    if batch.teacher_logp is None or batch.sampler_logp is None:
        raise ValueError(
            "an OnPolicy step needs a batch with the teacher's and the sampler's log-probabilities"
        )
    return batch.teacher_logp, batch.sampler_logp


def _sums(batch: Batch, logp_T: Tensor) -> Tensor:
    """[spans · SUMS] float64 sums over the microbatch.

    KL(sampler‖trainer) is estimated by r − 1 − log r with r = p_s / p_sampler (Schulman, "Approximating KL
    divergence", k3): never negative, and 0 only if the two agree on every token.
    """
    teacher_T, sampler_T = (logp.double() for logp in stored_logp(batch))
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


def _measures(total: Tensor) -> OnPolicyMeasures:
    """Means by span, from the ranks' total of the sums."""
    reverse_kl, sampler_kl, advantage, ratio = means_by_span(total, SUMS)
    return OnPolicyMeasures(
        reverse_kl=reverse_kl, sampler_kl=sampler_kl, bounded=BoundedShares(advantage=advantage, ratio=ratio)
    )
