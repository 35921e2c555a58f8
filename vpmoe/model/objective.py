"""What a training step asks of an objective, and the one form that all objectives but TeacherForced's have: a coefficient for each token.

The trainer is blind to the algorithm: it brings hidden states, takes back a loss to go backward from, and adds up over the ranks what
the objective has measured on the way. Which coefficients those are stands in vanilla.py, rescored.py and onpolicy.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from vpmoe.model.batch import Batch
from vpmoe.model.head import Coefficient, head_loss

if TYPE_CHECKING:
    from vpmoe.model.student import Student


class Objective(Protocol):
    """What one optimizer step minimises. Made anew for each step, with the global batch's denominators in it."""

    def loss(
        self, batch: Batch, hidden_TH: Tensor, student: "Student", scale: float
    ) -> tuple[Tensor, Tensor]:
        """(`scale` · this microbatch's share of the loss, log p of its targets [T] detached, NaN where there is none)."""

    def sums(self) -> Tensor:
        """[M] float64: what this rank has measured since the step began, to be added up over the ranks. M is the same on all of them."""

    def facts(self, total: Tensor) -> dict[str, Any]:
        """What the ranks' sums say, for the step's line of metrics."""


def _nothing(batch: Batch, logp_T: Tensor) -> Tensor:
    return torch.zeros(0, dtype=torch.float64)


@dataclass
class Weighted:
    """Σ c·(−log p), where `of` gives a batch's coefficients c."""

    of: Callable[[Batch], Coefficient]
    measure: Callable[[Batch, Tensor], Tensor] = _nothing
    """A microbatch's sums [M] float64, from the batch and the student's log p of its targets [T], NaN where there is none."""
    told: Callable[[Tensor], dict[str, Any]] = lambda total: {}
    _sums: list[Tensor] = field(default_factory=list)

    def __call__(self, batch: Batch) -> Coefficient:
        return self.of(batch)

    def loss(
        self, batch: Batch, hidden_TH: Tensor, student: "Student", scale: float
    ) -> tuple[Tensor, Tensor]:
        """See Objective. The coefficient is scaled and not the loss: a factor on gradients that are bf16 already would be rounded to it."""
        coefficient = self.of(batch)
        loss, logp_T = head_loss(
            hidden_TH,
            student.output,
            batch.target,
            lambda logp_t, rows_t: coefficient(logp_t, rows_t) * scale,
        )
        self._sums.append(self.measure(batch, logp_T))
        return loss, logp_T

    def sums(self) -> Tensor:
        """See Objective."""
        return torch.stack(self._sums).sum(0)

    def facts(self, total: Tensor) -> dict[str, Any]:
        """See Objective."""
        return self.told(total)
