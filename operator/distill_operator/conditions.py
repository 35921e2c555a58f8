"""From what was decided to status.conditions (KEP-1623): all six kinds always stand there, and say why they are as they are."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from distill_operator.step_progress import ProgressReading
from vpmoe.api.status import Condition, Status

REACHABLE = "StorageReachable"
KINDS = ("Ready", "Progressing", "Suspended", "Stalled", "Failed", "Succeeded")
MOST_OF_JOBS = 6
"""Conditions that jobs may add; the status has room for 16."""

Truth = Literal["True", "False", "Unknown"]


@dataclass(frozen=True)
class Headline:
    """The headline of a plan, and what else the conditions need."""

    reason: str
    message: str
    stalled: tuple[str, str] | None = None
    """Reason and message, where the run does not get on without help."""


def kept(status: Status) -> Headline:
    """The headline as it stands: nothing new is to be said."""
    ready, stalled = status.condition("Ready"), status.condition("Stalled")
    return Headline(
        ready.reason if ready else status.phase,
        status.message,
        (stalled.reason, stalled.message) if stalled and stalled.status == "True" else None,
    )


def update(
    status: Status, before: Status, said: Headline, readings: Collection[ProgressReading], now: datetime
) -> Status:
    """`status` with its conditions; a condition whose truth is as `before` keeps its time of transition. `readings`: a step each."""
    phase, stalled = status.phase, said.stalled
    moving = phase in ("Pending", "Running") and stalled is None
    truth: dict[str, bool] = {
        "Ready": phase == "Succeeded",
        "Progressing": moving,
        "Suspended": phase == "Suspended",
        "Failed": phase == "Failed",
        "Succeeded": phase == "Succeeded",
    }
    new: list[tuple[str, Truth, str, str]] = []
    for kind in KINDS:
        if kind == "Stalled":
            new.append((kind, "True", *stalled) if stalled else (kind, "False", "NotStalled", ""))
        else:
            told = kind == "Ready" or (kind == "Failed" and truth[kind])  # once is enough for the others
            new.append((kind, "True" if truth[kind] else "False", said.reason, said.message if told else ""))
    new += _storage(before, readings)
    new += _jobs(before, readings)
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
    kind: str, truth: Truth, reason: str, message: str, old: Condition | None, generation: int, now: datetime
) -> Condition:
    since = old.last_transition_time if old is not None and old.status == truth else now
    return Condition(
        type=kind,
        status=truth,
        reason=reason,
        message=message,
        observed_generation=generation,
        last_transition_time=since,
    )


def _storage(before: Status, readings: Collection[ProgressReading]) -> list[tuple[str, Truth, str, str]]:
    old = before.condition(REACHABLE)
    for reading in readings:
        if reading.problem:
            return [(REACHABLE, "False", reading.reason, reading.problem)]
    if any(reading.asked for reading in readings):
        return [(REACHABLE, "True", "Answered", "")]
    return [(REACHABLE, old.status, old.reason, old.message)] if old else []


def _jobs(before: Status, readings: Collection[ProgressReading]) -> list[tuple[str, Truth, str, str]]:
    """What jobs said last stays until they say otherwise."""
    known = {c.type: (c.type, c.status, c.reason, c.message) for c in before.conditions}
    for reading in readings:
        known |= {
            c.type: (c.type, c.status, c.reason, c.message)
            for c in (reading.progress.conditions if reading.progress else ())
        }
    return [said for kind, said in known.items() if kind not in (*KINDS, REACHABLE)][-MOST_OF_JOBS:]
