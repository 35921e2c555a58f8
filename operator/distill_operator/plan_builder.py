"""A plan in the making: what is known, what has been decided so far, and how it becomes a status.

Nothing is decided here: plan.py and steps.py do that, by calling these few verbs. A Draft is about the whole run, a Work about one step.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from distill_operator import conditions
from distill_operator.actions import Action
from distill_operator.gpu_scheduler import Decision
from distill_operator.observe import ChildObservation, Observed, ObservedRun
from distill_operator.settings import Settings
from distill_operator.step_progress import ProgressReading
from vpmoe.api import DistillRun
from vpmoe.api.status import RunPhase, Status, StepStatus


@dataclass(frozen=True)
class Plan:
    """The status to write, what to do once it is written, in order, and when to look again if nothing stirs (None: no need)."""

    status: Status
    actions: tuple[Action, ...]
    again: datetime | None


@dataclass(frozen=True)
class StepSummary:
    """What one step has to say about the run: the phase and the headline that it asks for, and whether it is stalled."""

    phase: RunPhase
    reason: str
    message: str
    stalled: tuple[str, str] | None = None
    """Reason and message, where the step does not get on without help."""


@dataclass
class PlanBuilder:
    """A plan in the making: what is known, and what has been decided so far."""

    live: ObservedRun
    seen: Observed
    readings: Mapping[str, ProgressReading]
    verdict: Decision | None
    settings: Settings
    now: datetime
    status: Status = field(init=False)
    said: conditions.Headline = field(init=False)
    words: dict[str, StepSummary] = field(default_factory=dict)
    """By step, of those that are at work or could be."""
    actions: list[Action] = field(default_factory=list)
    wakes: list[datetime] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.status = self.live.status
        self.said = conditions.Headline("Pending", "")

    def set(self, **changes: Any) -> None:
        self.status = changed(self.status, **changes)

    def say(self, phase: RunPhase, reason: str, message: str) -> None:
        """The headline: what the run is doing, or what it waits for."""
        self.set(phase=phase, message=message)
        self.said = replace(self.said, reason=reason, message=message)

    def stall(self, reason: str, message: str) -> None:
        self.said = replace(self.said, stalled=(reason, message))

    def seal(self) -> Plan:
        status = changed(self.status, observed_generation=self.live.generation)
        status = conditions.update(
            status, self.live.status, self.said, list(self.readings.values()), self.now
        )
        return Plan(status, tuple(self.actions), min(self.wakes, default=None))


@dataclass(frozen=True)
class StepContext:
    """One step of a draft: what is known of it, and what is decided about it."""

    draft: PlanBuilder
    run: DistillRun
    name: str

    @property
    def step(self) -> StepStatus:
        """Its status as decided so far."""
        return next(step for step in self.draft.status.steps if step.name == self.name)

    @property
    def before(self) -> StepStatus:
        """Its status as this look found it."""
        return self.draft.live.status.step_status(self.name) or StepStatus(name=self.name)

    @property
    def sight(self) -> ChildObservation:
        return self.draft.seen.children.get(self.name, ChildObservation())

    @property
    def reading(self) -> ProgressReading:
        return self.draft.readings.get(self.name, ProgressReading())

    @property
    def lacking(self) -> list[str]:
        """The steps that must succeed before it may start."""
        done = {step.name for step in self.draft.status.steps if step.state == "Succeeded"}
        return [name for name in self.run.needs(self.name) if name not in done]

    @property
    def dispensable(self) -> bool:
        """Whether it works beside training, as an OnPolicy stage's sampler and teacher do, and that has succeeded."""
        stage = self.run.stage_of(self.name)
        trained = self.draft.status.step_status(stage.name) if stage is not None else None
        return self.beside and trained is not None and trained.state == "Succeeded"

    @property
    def beside(self) -> bool:
        """Whether it is the sampler or the teacher of an OnPolicy stage."""
        return self.run.role(self.name) in ("sampler", "teacher")

    def set(self, **changes: Any) -> StepStatus:
        """Change its status, and return it."""
        steps = self.draft.status.steps
        self.draft.set(
            steps=tuple(changed(step, **changes) if step.name == self.name else step for step in steps)
        )
        return self.step

    def say(self, reason: str, message: str, phase: RunPhase = "Running") -> None:
        """What it would have the run say."""
        self.set(reason=reason)
        self.draft.words[self.name] = StepSummary(phase, reason, message)

    def stall(self, reason: str, message: str) -> None:
        """Said already, and that it needs help."""
        self.draft.words[self.name] = replace(self.draft.words[self.name], stalled=(reason, message))

    def ask(self, action: Action) -> None:
        self.draft.actions.append(action)


def changed[Record: (Status, StepStatus)](record: Record, **changes: Any) -> Record:
    """A changed copy, validated: model_copy would let a message through that the API server then refuses."""
    return type(record).model_validate({**dict(record), **changes})
