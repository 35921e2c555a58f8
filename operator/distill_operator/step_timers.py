"""Timers of steps, on the monotonic clock: how long a pause still lasts, and how long a step has made no
progress.

The status has these times by the wall clock, because they must survive the process. A wall clock that jumps
would end a pause at once or a day late, and would make every running step look hung. So the wall clock counts
only once for each of these times: when this process sees it first.
"""

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from distill_operator.observe import ObservedChildren, ObservedRun
from distill_operator.pod_records import ProgressReading
from distill_operator.settings import Settings
from vpmoe.api.status import StepStatus

Key = tuple[str, str]
"""Namespace and name of a DistillRun."""
ZERO = timedelta()
CLEARING = ""
"""In the place of a step: the deletion of the run's folder."""
HELD = "Held"
"""Reason of a step whose child waits in a queue."""


@dataclass(frozen=True)
class StepTimer:
    """Times of one step at one observation."""

    pause_left: timedelta = ZERO
    """Of a Retrying step: time until its next attempt."""
    idle: timedelta = ZERO
    """Time since the step's last progress, by any attempt. Of CLEARING: time since it began."""
    held: timedelta = ZERO
    """How long this process has seen the latest attempt wait in a queue, until now or until it left."""
    unchanged: timedelta = ZERO
    """How long this process has seen the latest attempt run, with all of its pods and with progress that it
    could read, and without any progress. Zero if not all pods run, or if progress cannot be read."""


class StepTimers:
    """The timers of all runs that are being reconciled. `clock` returns monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: dict[Key, dict[str, dict[Hashable, float]]] = {}

    def forget(self, key: Key) -> None:
        """Drop the timers of a run that no longer exists."""
        self._since.pop(key, None)

    def observe(
        self,
        observed: ObservedRun,
        children: ObservedChildren,
        readings: Mapping[str, ProgressReading],
        settings: Settings,
        now: datetime,
    ) -> dict[str, StepTimer]:
        """The timers of the run's Running and Retrying steps, by step, and that of CLEARING if its folder is
        being deleted. `now` is the wall-clock time.
        """
        key = (observed.namespace, observed.name)
        steps = {step.name: step for step in observed.status.steps if step.state in ("Running", "Retrying")}
        known = self._since.get(key, {})
        since: dict[str, dict[Hashable, float]] = {}
        timers = {}
        for name, step in steps.items():
            elapsed = _Elapsed(known.get(name, {}), self._clock())
            timers[name] = StepTimer(
                pause_left=_pause_left(elapsed, observed, step, settings, now),
                idle=_idle(elapsed, observed, step, now),
                held=_held(elapsed, observed, step, children),
                unchanged=_unchanged(
                    elapsed, observed, step, children, readings.get(name, ProgressReading())
                ),
            )
            since[name] = elapsed.since
        if (begun := observed.status.clearing) is not None:
            elapsed = _Elapsed(known.get(CLEARING, {}), self._clock())
            idle = elapsed.get(("clearing", observed.uid, begun), _before(begun, now))
            timers[CLEARING], since[CLEARING] = StepTimer(idle=idle), elapsed.since
        if since:
            self._since[key] = since
        else:
            self.forget(key)
        return timers


class _Elapsed:
    """Time since each of some facts was first seen. Facts that are not asked for again are forgotten."""

    def __init__(self, known: Mapping[Hashable, float], now: float) -> None:
        self._known, self._now = known, now
        self.since: dict[Hashable, float] = {}

    def get(self, fact: Hashable, before: timedelta = ZERO) -> timedelta:
        """Time since `fact` was first seen, plus the time `before` that had passed then."""
        self.since[fact] = self._known.get(fact, self._now - before.total_seconds())
        return timedelta(seconds=self._now - self.since[fact])


def retry_pause(step: StepStatus, settings: Settings) -> timedelta:
    """Pause before the next attempt of a step with these failures and interruptions: none after a first
    interruption; otherwise the backoff's base, twice that, four times that, …, at most its limit.
    """
    pauses = step.failures + step.interruptions
    if pauses < 2 and not step.failures:
        return ZERO
    backoff = settings.backoff
    return timedelta(seconds=min(backoff.base_seconds * 2.0 ** min(pauses - 1, 30), backoff.limit_seconds))


def _pause_left(
    elapsed: _Elapsed, observed: ObservedRun, step: StepStatus, settings: Settings, now: datetime
) -> timedelta:
    """Time until the next attempt: never more than the pause itself, whatever the wall clock says."""
    if step.state != "Retrying" or step.retry_at is None:
        return ZERO
    pause = retry_pause(step, settings)
    left = min(max(step.retry_at - now, ZERO), pause)
    waited = elapsed.get(("pause", observed.uid, step.attempt, step.retry_at), pause - left)
    return max(pause - waited, ZERO)


def _before(time: datetime, now: datetime) -> timedelta:
    """How long ago a time was by the wall clock, when this process sees it first; none if it is to come."""
    return max(now - time, ZERO)


def _idle(elapsed: _Elapsed, observed: ObservedRun, step: StepStatus, now: datetime) -> timedelta:
    if step.progressed is None:
        return ZERO
    return elapsed.get(("idle", observed.uid, step.progressed), _before(step.progressed, now))


def _held(
    elapsed: _Elapsed, observed: ObservedRun, step: StepStatus, children: ObservedChildren
) -> timedelta:
    child = children.by_step[step.name].child if step.name in children.by_step else None
    if step.reason != HELD and (child is None or not child.suspended):
        return ZERO
    return elapsed.get(("held", observed.uid, step.attempt))


def _unchanged(
    elapsed: _Elapsed,
    observed: ObservedRun,
    step: StepStatus,
    children: ObservedChildren,
    reading: ProgressReading,
) -> timedelta:
    child = children.by_step[step.name].child if step.name in children.by_step else None
    known = reading.attempted and not reading.problem
    if child is None or child.state != "Running" or not known or children.backend_missing:
        return ZERO
    report = reading.progress
    work = (
        (report.tokens, report.parts, report.checkpoint, report.held_out, report.validity)
        if report is not None and report.attempt == step.attempt
        else None
    )
    return elapsed.get(("unchanged", observed.uid, step.attempt, child.uid, repr(work)))
