"""Builder of a Plan: the inputs of a reconcile, the decisions made so far, and how they become a status.

Decisions are in plan.py and step_logic.py. PlanBuilder is about the whole run, StepContext about one of its
steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from distill_operator import conditions
from distill_operator.actions import Action
from distill_operator.gpu_scheduler import Decision
from distill_operator.observe import ChildObservation, ObservedChildren, ObservedRun
from distill_operator.pod_records import AttemptId, ProgressReading, advance, progress_problem
from distill_operator.settings import Settings
from distill_operator.step_timers import StepTimer
from vpmoe.api import DistillRun
from vpmoe.api.progress import Progress
from vpmoe.api.status import RunPhase, Status, StepStatus


@dataclass(frozen=True)
class Plan:
    """The status to write, the actions to execute in order once it is written, and when to requeue the run at
    the latest.

    `requeue_at` is None if only an event of the cluster needs another reconcile. `poll`: the run waits for
    something of which no event tells, so it is reconciled again soon as well.
    """

    status: Status
    actions: tuple[Action, ...]
    requeue_at: datetime | None
    poll: bool = False


@dataclass(frozen=True)
class StepSummary:
    """What one step contributes to the run's status: a phase, a headline, and whether it is stalled."""

    phase: RunPhase
    reason: str
    message: str
    stalled: tuple[str, str] | None = None
    """Reason and message, if the step cannot continue without help."""


@dataclass
class PlanBuilder:
    """Inputs of plan() and the decisions made so far."""

    observed: ObservedRun
    children: ObservedChildren
    readings: Mapping[str, ProgressReading]
    """By step."""
    decision: Decision | None
    settings: Settings
    now: datetime
    timers: Mapping[str, StepTimer]
    """By step. Without a timer the wall clock counts."""
    status: Status = field(init=False)
    headline: conditions.Headline = field(init=False)
    summaries: dict[str, StepSummary] = field(default_factory=dict)
    """By step, of the steps that run or could run."""
    actions: list[Action] = field(default_factory=list)
    requeue_times: list[datetime] = field(default_factory=list)
    polls: bool = False
    """The run waits for something of which no event tells."""

    def __post_init__(self) -> None:
        self.status = self.observed.status
        self.headline = conditions.Headline("Pending", "")

    def update(self, **changes: Any) -> None:
        """Change fields of the run's status."""
        self.status = updated(self.status, **changes)

    def set_headline(self, phase: RunPhase, reason: str, message: str) -> None:
        """Set what the run does, or what it waits for."""
        self.update(phase=phase, message=message)
        self.headline = replace(self.headline, reason=reason, message=message)

    def set_stalled(self, reason: str, message: str) -> None:
        self.headline = replace(self.headline, stalled=(reason, message))

    def requeue_at(self, time: datetime) -> None:
        """Reconcile again at this time, or earlier."""
        self.requeue_times.append(time)

    def build(self) -> Plan:
        if self.observed.failure is not None:  # it stays until a whole reconcile has succeeded
            self.set_stalled(*self.observed.failure)
        status = updated(self.status, observed_generation=self.observed.generation)
        status = conditions.update_conditions(
            status, self.observed.status, self.headline, list(self.readings.values()), self.now
        )
        return Plan(
            status, tuple(self.actions), min(self.requeue_times, default=None), self._waits_without_events()
        )

    def _waits_without_events(self) -> bool:
        """Whether something may change that the run waits for, and no watch shows it."""
        if self.polls:
            return True
        if self.status.phase in ("Succeeded", "Failed", "Suspended") and not self.observed.deleting:
            return False
        found = [*self.children.by_step.values(), self.children.clear]
        return self.children.backend_missing or any(
            one.name_conflict is not None or (one.child is not None and one.child.changes_silently)
            for one in found
        )


@dataclass(frozen=True)
class StepContext:
    """One step of the run that a PlanBuilder is about: its inputs, and the decisions about it."""

    builder: PlanBuilder
    run: DistillRun
    name: str

    @property
    def step(self) -> StepStatus:
        """The step's status with the decisions made so far."""
        return next(step for step in self.builder.status.steps if step.name == self.name)

    @property
    def before(self) -> StepStatus:
        """The step's status at the start of this reconcile."""
        return self.builder.observed.status.step_status(self.name) or StepStatus(name=self.name)

    @property
    def observation(self) -> ChildObservation:
        return self.builder.children.by_step.get(self.name, ChildObservation())

    @property
    def reading(self) -> ProgressReading:
        return self.builder.readings.get(self.name, ProgressReading())

    @property
    def report(self) -> Progress | None:
        """The latest attempt's newest progress: what its pods serve, or recorded when they ended. None if
        neither is known.
        """
        child = self.observation.child
        recorded = child.record.progress if child is not None and child.record is not None else None
        known = [found for found in (self.reading.progress, recorded) if found is not None]
        attempt = AttemptId(self.run.identity, self.name, self.step.attempt)
        own = [found for found in known if not progress_problem(found, attempt)]
        return max(own, key=advance, default=None)

    @property
    def may_appear(self) -> bool:
        """Whether its child does not exist, and may do so yet: then it must neither end nor start again."""
        return self.observation.may_appear

    @property
    def progress_is_known(self) -> bool:
        """Whether the step's pods have answered, so that no progress means that there is none."""
        return self.reading.attempted and not self.reading.problem

    @property
    def timer(self) -> StepTimer | None:
        return self.builder.timers.get(self.name)

    @property
    def idle(self) -> timedelta:
        """Time since the step's last progress."""
        progressed, timer = self.step.progressed, self.timer
        if timer is None or progressed is None or progressed != self.before.progressed:
            return self.builder.now - (progressed or self.builder.now)
        return timer.idle

    @property
    def unmet_dependencies(self) -> list[str]:
        """The steps that must succeed before this one may start, and have not."""
        done = {step.name for step in self.builder.status.steps if step.state == "Succeeded"}
        return [name for name in self.run.needs(self.name) if name not in done]

    @property
    def serves_trainer(self) -> bool:
        """Whether it runs beside a trainer: the sampler or the teacher of an OnPolicy stage, or the step that
        measures the validity of a stage's checkpoints.
        """
        return self.run.serves_trainer(self.name)

    @property
    def trainer(self) -> "StepContext":
        """The training step of this step's stage; itself if it belongs to none."""
        stage = self.run.stage_of(self.name)
        return self if stage is None else replace(self, name=stage.name)

    @property
    def obsolete(self) -> bool:
        """Whether it serves a trainer that has succeeded."""
        return self.serves_trainer and self.trainer.step.state == "Succeeded"

    def update(self, **changes: Any) -> StepStatus:
        """Change fields of the step's status, and return it."""
        steps = self.builder.status.steps
        self.builder.update(
            steps=tuple(updated(step, **changes) if step.name == self.name else step for step in steps)
        )
        return self.step

    def summarize(self, reason: str, message: str, phase: RunPhase = "Running") -> None:
        """Set what the step contributes to the run's status."""
        self.update(reason=reason)
        self.builder.summaries[self.name] = StepSummary(phase, reason, message)

    def set_stalled(self, reason: str, message: str) -> None:
        """Mark the step stalled, after summarize()."""
        self.builder.summaries[self.name] = replace(
            self.builder.summaries[self.name], stalled=(reason, message)
        )

    def requeue_after(self, left: timedelta) -> None:
        """Reconcile again after this time, if any is left."""
        if left > timedelta():
            self.builder.requeue_at(self.builder.now + left)

    def add(self, action: Action) -> None:
        self.builder.actions.append(action)


def updated[Record: (Status, StepStatus)](record: Record, **changes: Any) -> Record:
    """A changed and validated copy. model_copy does not validate: the API server would reject a message that
    is too long.
    """
    return type(record).model_validate({**dict(record), **changes})
