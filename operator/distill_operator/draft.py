"""A plan in the making: what is known, what has been decided so far, and how it becomes a status.

Nothing is decided here: plan.py and steps.py do that, by calling these few verbs.
"""

from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from distill_operator import conditions
from distill_operator.actions import Action
from distill_operator.gpus import Verdict
from distill_operator.observe import Live, Observed
from distill_operator.progress import Reading
from distill_operator.settings import Settings
from vpmoe.api.status import Phase, Status, Step


@dataclass(frozen=True)
class Plan:
    """The status to write, what to do once it is written, in order, and when to look again if nothing stirs (None: no need)."""

    status: Status
    actions: tuple[Action, ...]
    again: datetime | None


@dataclass
class Draft:
    """A plan in the making: what is known, and what has been decided so far."""

    live: Live
    seen: Observed
    reading: Reading
    verdict: Verdict | None
    settings: Settings
    now: datetime
    status: Status = field(init=False)
    said: conditions.Said = field(init=False)
    actions: list[Action] = field(default_factory=list)
    wakes: list[datetime] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.status = self.live.status
        self.said = conditions.Said("Pending", "")

    def set(self, **changes: Any) -> None:
        self.status = changed(self.status, **changes)

    def step(self, name: str, **changes: Any) -> Step:
        """Change a step, and return it."""
        steps = tuple(changed(step, **changes) if step.name == name else step for step in self.status.steps)
        self.set(steps=steps)
        return next(step for step in steps if step.name == name)

    def say(self, phase: Phase, reason: str, message: str) -> None:
        """The headline: what the run is doing, or what it waits for."""
        self.set(phase=phase, message=message)
        self.said = replace(self.said, reason=reason, message=message)

    def stall(self, reason: str, message: str) -> None:
        self.said = replace(self.said, stalled=(reason, message))

    def seal(self) -> Plan:
        status = changed(self.status, observed_generation=self.live.generation)
        status = conditions.update(status, self.live.status, self.said, self.reading, self.now)
        return Plan(status, tuple(self.actions), min(self.wakes, default=None))


def changed[Record: (Status, Step)](record: Record, **changes: Any) -> Record:
    """A changed copy, validated: model_copy would let a message through that the API server then refuses."""
    return type(record).model_validate({**dict(record), **changes})
