"""Rescored: cross-entropy on the data set's own tokens, each weighed by how likely the teacher found it.

The scores were made beforehand and stand in the batch; where they are centred is confidence.py's business, which batches hold them
vpmoe.training's.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vpmoe.api.stages import Confidence
from vpmoe.data.spans import SPANS
from vpmoe.model.batch import Batch
from vpmoe.model.head import Coefficient
from vpmoe.model.objective import Weighted
from vpmoe.model.spans import coefficient_by_span

MEASURED = 5
"""Numbers that are summed for each span: tokens, weights, weights at the lower and at the upper bound, the teacher's log-probabilities."""


def rescored(
    counts: Tensor, weights: Mapping[str, float], confidence: Confidence, centre: Mapping[str, float]
) -> Weighted:
    """Coefficients c = w_span / N_span · clip(exp((logp_teacher − m_span) / T), min, max).

    `counts` is [positions, N_reasoning, N_final] of the GLOBAL batch, `centre` m by span in nats. The batch has the teacher's log p of
    every target.
    """
    by_span = coefficient_by_span(counts, weights)
    m_by_span = [0.0, *(centre[name] for name in SPANS)]

    def weight(batch: Batch) -> Tensor:
        """[T] fp32; what stands where there is no target means nothing."""
        m_T = torch.tensor(m_by_span, dtype=torch.float32, device=batch.span.device)[batch.span.long()]
        return (
            ((teacher_logp(batch) - m_T) / confidence.temperature).exp().clamp(confidence.min, confidence.max)
        )

    def of(batch: Batch) -> Coefficient:
        c_T = torch.tensor(by_span, dtype=torch.float32, device=batch.span.device)[batch.span.long()]
        c_T = torch.where(batch.span > 0, c_T * weight(batch), 0)
        return lambda logp_t, rows_t: c_T[rows_t]

    def measure(batch: Batch, logp_T: Tensor) -> Tensor:
        """[spans · MEASURED] float64 sums over the microbatch."""
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

    return Weighted(of, measure, _told)


def teacher_logp(batch: Batch) -> Tensor:
    """The teacher's log p of each position's target [T] fp32. Raises ValueError for a batch that came without."""
    if batch.teacher_logp is None:
        raise ValueError("a Rescored step wants a batch with the teacher's log-probabilities")
    return batch.teacher_logp


def _told(total: Tensor) -> dict[str, Any]:
    """The step's measures by span, for its line of metrics; null where the batch has no such token."""
    names = ("mean", "saturationLow", "saturationHigh")
    weight: dict[str, dict[str, float | None]] = {name: {} for name in names}
    logp: dict[str, float | None] = {}
    for span, (tokens, *sums) in zip(SPANS, total.view(-1, MEASURED).tolist(), strict=True):
        means = [value / tokens if tokens else None for value in sums]
        for name, value in zip(names, means[:3], strict=True):
            weight[name][span] = value
        logp[span] = means[3]
    return {"weight": weight, "teacherLogp": logp}
