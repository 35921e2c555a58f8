"""status.conditions of a run (KEP-1623).

All six condition types of the API are always present, each with its reason.
"""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from distill_operator.pod_records import ProgressReading
from vpmoe.api.status import Condition, Status

PROGRESS_READABLE = "ProgressReadable"
REMOVED = ("StorageReachable",)
"""Conditions that an older operator has set and that this one removes."""
CONDITION_TYPES = ("Ready", "Progressing", "Suspended", "Stalled", "Failed", "Succeeded")
STATUS_UNREADABLE = "StatusUnreadable"
"""Reason of Stalled: a newer version has written the status."""
RECONCILE_ERROR = "ReconcileError"
"""Reason of Stalled: the last reconcile has failed."""
MAX_JOB_CONDITIONS = 6
"""Conditions that jobs may add; the status has room for 16 in all."""

Truth = Literal["True", "False", "Unknown"]


@dataclass(frozen=True)
class Headline:
    """Reason and message of the run, from which its conditions are made."""

    reason: str
    message: str
    stalled: tuple[str, str] | None = None
    """Reason and message, if the run cannot continue without help."""


def unchanged(status: Status) -> Headline:
    """The headline that the status has already, without a failure of the operator itself."""
    ready, stalled = status.condition("Ready"), status.condition("Stalled")
    if stalled is not None and stalled.reason in (STATUS_UNREADABLE, RECONCILE_ERROR):
        stalled = None
    return Headline(
        ready.reason if ready else status.phase,
        status.message,
        (stalled.reason, stalled.message) if stalled and stalled.status == "True" else None,
    )


def update_conditions(
    status: Status, before: Status, headline: Headline, readings: Collection[ProgressReading], now: datetime
) -> Status:
    """`status` with its conditions.

    A condition whose status is the same as `before` keeps lastTransitionTime.

    `readings` has one entry a running step.
    """
    phase, stalled = status.phase, headline.stalled
    truth: dict[str, bool] = {
        "Ready": phase == "Succeeded",
        "Progressing": phase in ("Pending", "Running") and stalled is None,
        "Suspended": phase == "Suspended",
        "Failed": phase == "Failed",
        "Succeeded": phase == "Succeeded",
    }
    new: list[tuple[str, Truth, str, str]] = []
    for type_ in CONDITION_TYPES:
        if type_ == "Stalled":
            new.append((type_, "True", *stalled) if stalled else (type_, "False", "NotStalled", ""))
        else:  # the message is long: Ready has it, the others do not repeat it
            message = headline.message if type_ == "Ready" or (type_ == "Failed" and truth[type_]) else ""
            new.append((type_, "True" if truth[type_] else "False", headline.reason, message))
    new += _progress_condition(status, before, readings)
    new += _job_conditions(before, readings)
    old = {condition.type: condition for condition in before.conditions}
    return Status.model_validate(
        {
            **dict(status),
            "conditions": tuple(
                _condition(*one, old.get(one[0]), status.observed_generation, now) for one in new
            ),
        }
    )


def _condition(
    type_: str, truth: Truth, reason: str, message: str, old: Condition | None, generation: int, now: datetime
) -> Condition:
    since = old.last_transition_time if old is not None and old.status == truth else now
    return Condition(
        type=type_,
        status=truth,
        reason=reason,
        message=message,
        observed_generation=generation,
        last_transition_time=since,
    )


def _progress_condition(
    status: Status, before: Status, readings: Collection[ProgressReading]
) -> list[tuple[str, Truth, str, str]]:
    """Whether the pods of all running steps serve their progress. A run without pods has no such
    condition."""
    old = before.condition(PROGRESS_READABLE)
    if status.phase in ("Suspended", "Succeeded", "Failed"):
        return []
    for reading in readings:
        if reading.problem:
            return [(PROGRESS_READABLE, "False", reading.reason, reading.problem)]
    if any(reading.attempted for reading in readings):
        return [(PROGRESS_READABLE, "True", "Answered", "")]
    return [(PROGRESS_READABLE, old.status, old.reason, old.message)] if old else []


def _job_conditions(
    before: Status, readings: Collection[ProgressReading]
) -> list[tuple[str, Truth, str, str]]:
    """Conditions that jobs have reported. Each stays until a job reports it again."""
    known = {c.type: (c.type, c.status, c.reason, c.message) for c in before.conditions}
    for reading in readings:
        known |= {
            c.type: (c.type, c.status, c.reason, c.message)
            for c in (reading.progress.conditions if reading.progress else ())
        }
    ours = (*CONDITION_TYPES, PROGRESS_READABLE, *REMOVED)
    reported = [found for type_, found in known.items() if type_ not in ours]
    return reported[-MAX_JOB_CONDITIONS:]
