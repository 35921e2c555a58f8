"""TeacherForced: towards the teacher's distribution and hidden states, token by token, with some
cross-entropy beside it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vpmoe.api import pod_metrics
from vpmoe.api.metrics import BySpan, Measures, Sample, samples_by_span
from vpmoe.api.stages import LossWeights
from vpmoe.data.spans import SPANS
from vpmoe.model.batch import Batch
from vpmoe.model.spans import coefficient_by_span, means_by_span, values_of_spans
from vpmoe.objectives.teacher_forced_head import Teacher, forced_loss

if TYPE_CHECKING:
    from vpmoe.model.student import Student

SUMS = 3
"""Sums of each span: targets, KL, cosines."""


class TeacherForcedMeasures(Measures):
    """What a step beside the teacher measures."""

    kl: BySpan
    """KL(teacher‖student) at the stage's temperature T, in nats a token, without the factor T² that the loss
    has."""
    cosine: BySpan
    """Cosine of the projected student's hidden states and the teacher's."""

    def samples(self) -> Iterable[Sample]:
        return [
            *samples_by_span(pod_metrics.TEACHER_KL, self.kl),
            *samples_by_span(pod_metrics.TEACHER_COSINE, self.cosine),
        ]


@dataclass
class TeacherForced:
    """Σ over spans w/N · Σ [ce · nll + kl · T² · KL(teacher‖student at T) + hidden · (1 − cosine)]: an
    Objective."""

    terms: LossWeights
    share: list[float]
    """w_span / N_span by span number, N of the GLOBAL batch."""
    output_VG: Tensor
    """The teacher's output matrix."""
    hidden_of: Callable[[Batch], Tensor]
    """The teacher's final hidden states [T, G] of a microbatch, in the order of its positions."""
    _sums: list[Tensor] = field(default_factory=list)

    def loss(
        self, batch: Batch, hidden_TH: Tensor, student: "Student", scale: float
    ) -> tuple[Tensor, Tensor]:
        """See Objective. The share is scaled and not the loss: a factor on bf16 gradients would be
        rounded."""
        share_T = values_of_spans(self.share, batch.span) * scale
        teacher = Teacher(self.hidden_of(batch), self.output_VG)
        found = forced_loss(
            hidden_TH,
            student.output,
            student.projection,
            teacher,
            batch.target,
            share_T,
            self.terms,
            batch.target_rows,
            final=True,
        )
        parts = (torch.ones_like(found.kl_T), found.kl_T, found.cosine_T)
        by_span = torch.stack(
            [
                torch.stack([part.where(batch.span == span, 0).double().sum() for part in parts])
                for span in SPANS.values()
            ]
        )
        self._sums.append(by_span.flatten())
        return found.loss, found.logp_T

    def sums(self) -> Tensor:
        """See Objective."""
        return torch.stack(self._sums).sum(0)

    def measures(self, total: Tensor) -> TeacherForcedMeasures:
        """See Objective."""
        kl, cosine = means_by_span(total, SUMS)
        return TeacherForcedMeasures(kl=kl, cosine=cosine)


def teacher_forced(
    counts: Tensor,
    weights: Mapping[str, float],
    terms: LossWeights,
    output_VG: Tensor,
    hidden_of: Callable[[Batch], Tensor],
) -> TeacherForced:
    """The objective of one step. `counts` is [positions, N_reasoning, N_final] of the GLOBAL batch, as in
    Batch.counts."""
    return TeacherForced(terms, coefficient_by_span(counts, weights), output_VG, hidden_of)
