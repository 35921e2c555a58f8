"""Rescored: cross-entropy on the dataset's own tokens, each weighted by how likely the teacher found it.

The batch holds the teacher's log-probabilities. The centre of the weights is computed in confidence.py. Which
documents have scores is decided by vpmoe.teacher.
"""

from collections.abc import Iterable, Mapping

import torch
from pydantic import ConfigDict
from torch import Tensor

from vpmoe.api import pod_metrics
from vpmoe.api.base import Record
from vpmoe.api.metrics import BySpan, Measures, Sample, samples_by_span
from vpmoe.api.stages import Confidence
from vpmoe.data.spans import SPANS
from vpmoe.model.batch import Batch
from vpmoe.model.head import Coefficient
from vpmoe.model.objective import Weighted
from vpmoe.model.spans import coefficient_by_span, means_by_span, values_of_spans

SUMS = 5
"""Sums of each span: tokens, weights, weights at the lower bound, weights at the upper bound, the teacher's
log-probabilities."""


class ConfidenceWeights(Record):
    """The confidence weights of a step's tokens, by span."""

    model_config = ConfigDict(allow_inf_nan=True)

    mean: BySpan
    """Mean weight."""
    saturation_low: BySpan
    """Share of the weights at confidence.min."""
    saturation_high: BySpan
    """Share of the weights at confidence.max."""


class RescoredMeasures(Measures):
    """What a step on scored documents measures."""

    weight: ConfidenceWeights
    teacher_logp: BySpan
    """The teacher's mean log-probability, in nats."""

    def samples(self) -> Iterable[Sample]:
        yield from samples_by_span(pod_metrics.TEACHER_LOGP, self.teacher_logp)
        yield from samples_by_span(pod_metrics.WEIGHT_MEAN, self.weight.mean)
        for span, share in self.weight.saturation_low.items():
            yield Sample(pod_metrics.WEIGHT_SATURATION, share, {"span": span, "bound": "min"})
        for span, share in self.weight.saturation_high.items():
            yield Sample(pod_metrics.WEIGHT_SATURATION, share, {"span": span, "bound": "max"})


def rescored(
    counts: Tensor, weights: Mapping[str, float], confidence: Confidence, centre: Mapping[str, float]
) -> Weighted:
    """Coefficients c = w_span / N_span · clip(exp((logp_teacher − m_span) / T), min, max).

    `counts` is [positions, N_reasoning, N_final] of the GLOBAL batch, `centre` m by span in nats. The batch
    has the teacher's log p of every target.
    """
    by_span = coefficient_by_span(counts, weights)
    m_by_span = [0.0, *(centre[name] for name in SPANS)]

    def weight(batch: Batch) -> Tensor:
        """[T] fp32; undefined without a target."""
        m_T = values_of_spans(m_by_span, batch.span)
        return (
            ((teacher_logp(batch) - m_T) / confidence.temperature).exp().clamp(confidence.min, confidence.max)
        )

    def coefficient_of(batch: Batch) -> Coefficient:
        c_T = values_of_spans(by_span, batch.span)
        c_T = torch.where(batch.span > 0, c_T * weight(batch), 0)
        return lambda logp_t, rows_t: c_T[rows_t]

    def sums_of(batch: Batch, logp_T: Tensor) -> Tensor:
        """[spans · SUMS] float64 sums over the microbatch."""
        w_T = weight(batch)
        found_5T = torch.stack(
            [
                torch.ones_like(w_T),
                w_T,
                (w_T <= confidence.min).float(),
                (w_T >= confidence.max).float(),
                teacher_logp(batch),
            ]
        ).double()
        return torch.cat([found_5T.where(batch.span == span, 0).sum(1) for span in SPANS.values()])

    return Weighted(coefficient_of, sums_of, _measures)


def teacher_logp(batch: Batch) -> Tensor:
    """The teacher's log p of each position's target [T] fp32. Raises ValueError for a batch without
    scores."""
    if batch.teacher_logp is None:
        raise ValueError("a Rescored step needs a batch with the teacher's log-probabilities")
    return batch.teacher_logp


def _measures(total: Tensor) -> RescoredMeasures:
    """Means by span, from the ranks' total of the sums."""
    mean, low, high, logp = means_by_span(total, SUMS)
    return RescoredMeasures(
        weight=ConfidenceWeights(mean=mean, saturation_low=low, saturation_high=high), teacher_logp=logp
    )
