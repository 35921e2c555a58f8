"""The interface of objectives, and the form of all objectives but TeacherForced's: one coefficient per token.

A training step passes hidden states to an objective, differentiates the loss that it returns, and sums the
objective's measurements over the ranks. The coefficients are in vpmoe/objectives: vanilla.py, rescored.py and
onpolicy.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from vpmoe.api.metrics import Measures
from vpmoe.model.batch import Batch
from vpmoe.model.head import Coefficient, head_loss

if TYPE_CHECKING:
    from vpmoe.model.student import Student


class Objective(Protocol):
    """The loss of one optimizer step. Each step needs a new one: it has the global batch's denominators."""

    def loss(
        self, batch: Batch, hidden_TH: Tensor, student: "Student", scale: float
    ) -> tuple[Tensor, Tensor]:
        """(`scale` · this microbatch's share of the loss, log p of its targets [T] detached).

        log p is NaN without a target. The caller differentiates the loss once, as it is: on a GPU the
        gradient of the output matrix may be in its fp32 buffer already.
        """

    def sums(self) -> Tensor:
        """This rank's measurements of the step, [M] float64; the caller sums them over the ranks. M is the
        same on all ranks."""

    def measures(self, total: Tensor) -> Measures | None:
        """The measures of the global batch, from the sum of all ranks' `sums`; None if the objective
        measures nothing."""


def _no_sums(batch: Batch, logp_T: Tensor) -> Tensor:
    return torch.zeros(0, dtype=torch.float64)


@dataclass
class Weighted:
    """Σ c·(−log p): an Objective."""

    coefficient_of: Callable[[Batch], Coefficient]
    """A batch's coefficients c."""
    sums_of: Callable[[Batch, Tensor], Tensor] = _no_sums
    """A microbatch's sums [M] float64, from the batch and the student's log p of its targets [T], NaN without
    a target."""
    measures_of: Callable[[Tensor], Measures | None] = lambda total: None
    """The step's measures, from the total of the sums."""
    _sums: list[Tensor] = field(default_factory=list)

    def loss(
        self, batch: Batch, hidden_TH: Tensor, student: "Student", scale: float
    ) -> tuple[Tensor, Tensor]:
        """See Objective. `scale` multiplies the coefficients, not the loss: multiplying bf16 gradients would
        round them once more."""
        coefficient = self.coefficient_of(batch)
        loss, logp_T = head_loss(
            hidden_TH,
            student.output,
            batch.target,
            lambda logp_t, rows_t: coefficient(logp_t, rows_t) * scale,
            batch.target_rows,
            final=True,
        )
        self._sums.append(self.sums_of(batch, logp_T))
        return loss, logp_T

    def sums(self) -> Tensor:
        """See Objective."""
        return torch.stack(self._sums).sum(0)

    def measures(self, total: Tensor) -> Measures | None:
        """See Objective."""
        return self.measures_of(total)
