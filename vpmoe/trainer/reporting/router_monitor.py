"""Detects a collapsed router: an expert that gets no token for many steps, or one that gets far more than its
share for many steps.

Pure: loads in, findings out. Loads are counted in the model; reporter.py reports the findings, and the
trainer ends a stage by them. Each attempt counts from the start, because only recent steps count.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PATIENCE = 100
"""Steps in a row after which a bad load is a collapse. A young router is uneven for some steps; the expert
bias corrects that."""
BOUND = 16.0
"""Busiest expert's tokens over the mean expert's, above which a layer is bad: at top-4 of 256 no expert can
pass 64."""


@dataclass(frozen=True)
class Collapse:
    """One layer that has been bad for PATIENCE steps, or for as many as end the stage."""

    layer: str
    reason: str
    """DeadExpert or Imbalance: the condition's reason."""
    steps: int
    """Steps in a row, up to the latest, for which it was bad."""
    message: str


class RouterMonitor:
    """Counts the steps in a row for which each expert was dead, and each layer out of balance."""

    def __init__(self, layers: list[str], experts: int, limit: int = 0) -> None:
        """`limit`: steps in a row that end the stage; 0 is none."""
        self.layers = layers
        self.limit = limit
        self._patience = min(PATIENCE, limit or PATIENCE)
        self._dead_LE = np.zeros((len(layers), experts), np.int64)
        self._uneven_L = np.zeros(len(layers), np.int64)

    def over_limit(self, found: Iterable[Collapse]) -> list[Collapse]:
        """Those of a step's findings that end the stage."""
        return [one for one in found if self.limit and one.steps >= self.limit]

    def add_step(self, load_LE: NDArray[np.int64], ratio_L: NDArray[np.float64]) -> list[Collapse]:
        """Count one step's global load and return the layers that are collapsed after it, one reason each.

        load_LE: tokens of each expert; ratio_L: the busiest expert's load over the mean.
        """
        self._dead_LE = np.where(load_LE == 0, self._dead_LE + 1, 0)
        self._uneven_L = np.where(ratio_L > BOUND, self._uneven_L + 1, 0)
        found = []
        for number, layer in enumerate(self.layers):
            dead = np.flatnonzero(self._dead_LE[number] >= self._patience)
            if len(dead):
                steps = int(self._dead_LE[number].max())
                experts = ", ".join(str(expert) for expert in dead[:8]) + (", …" if len(dead) > 8 else "")
                message = f"{layer}: {len(dead)} experts without a token, for up to {steps} steps: {experts}"
                found.append(Collapse(layer, "DeadExpert", steps, message))
            elif self._uneven_L[number] >= self._patience:
                steps = int(self._uneven_L[number])
                load = f"more than {BOUND:g} times the mean load"
                message = f"{layer}: the busiest expert had {load} for {steps} steps"
                found.append(Collapse(layer, "Imbalance", steps, message))
        return found
