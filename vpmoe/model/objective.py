"""The interface of objectives, and the form that all of them but TeacherForced's have: one coefficient for
each token.

A training step gives an objective hidden states, takes back a loss to differentiate, and sums over the ranks
what the objective measured. The coefficients are in vpmoe/objectives: vanilla.py, rescored.py and
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
    """What one optimizer step minimises. Each step has a new one, which holds the denominators of the global
    batch."""

    def loss(
        self, batch: Batch, hidden_TH: Tensor, student: "Student", scale: float
    ) -> tuple[Tensor, Tensor]:
        """(`scale` · this microbatch's share of the loss, log p of its targets [T] detached, NaN where there
        is no target)."""

    def sums(self) -> Tensor:
        """[M] float64: what this rank measured in the step, to be summed over the ranks. M is the same on all
        ranks."""

    def measures(self, total: Tensor) -> Measures | None:
        """The measures of the global batch, from the sum of all ranks' `sums`; None where the objective
        measures nothing."""


def _no_sums(batch: Batch, logp_T: Tensor) -> Tensor:
    return torch.zeros(0, dtype=torch.float64)


@dataclass
class Weighted:
    """Σ c·(−log p): an Objective."""

    coefficient_of: Callable[[Batch], Coefficient]
    """A batch's coefficients c."""
    sums_of: Callable[[Batch, Tensor], Tensor] = _no_sums
    """A microbatch's sums [M] float64, from the batch and the student's log p of its targets [T], NaN where
    there is no target."""
    measures_of: Callable[[Tensor], Measures | None] = lambda total: None
    """The step's measures, from the total of the sums."""
    _sums: list[Tensor] = field(default_factory=list)

    def loss(
        self, batch: Batch, hidden_TH: Tensor, student: "Student", scale: float
    ) -> tuple[Tensor, Tensor]:
        """See Objective. The coefficient is scaled and not the loss: a factor on bf16 gradients would be
        rounded."""
        coefficient = self.coefficient_of(batch)
        loss, logp_T = head_loss(
            hidden_TH,
            student.output,
            batch.target,
            lambda logp_t, rows_t: coefficient(logp_t, rows_t) * scale,
        )
        self._sums.append(self.sums_of(batch, logp_T))
        return loss, logp_T

    def sums(self) -> Tensor:
        """See Objective."""
        return torch.stack(self._sums).sum(0)

    def measures(self, total: Tensor) -> Measures | None:
        """See Objective."""
        return self.measures_of(total)
