"""Kubernetes Events for what changes about a run. Equal Events are one object with a count, and none ever fails a reconcile."""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from distill_operator.kube import DISTILLRUN, EVENT, Conflict, Json, Kube, KubeError
from vpmoe.api.status import MESSAGE, Condition, Status, StepStatus

log = logging.getLogger(__name__)

COMPONENT = "distill-operator"
TOLD_OF_PHASE = {"Queued": "Queued", "Suspended": "Suspended", "Succeeded": "RunSucceeded"}
EACH_TIME = ("TrainerStarved",)
"""Conditions of jobs of which every new message is an Event: another knob was turned, and it may be the same as the last."""
BASIC = ("Ready", "Progressing", "Suspended", "Failed", "Succeeded")


@dataclass(frozen=True)
class EventSpec:
    """What an Event says."""

    kind: Literal["Normal", "Warning"]
    reason: str
    message: str


def events_between(before: Status, after: Status) -> list[EventSpec]:
    """What has happened between two statuses of a run, in the order in which to tell it. Mere progress is not worth an Event."""
    return [*_of_steps(before, after), *_of_phase(before, after), *_of_conditions(before, after)]


def _of_steps(before: Status, after: Status) -> Iterator[EventSpec]:
    for step in after.steps:
        old = before.step_status(step.name) or StepStatus(name=step.name)
        if step.state in ("Retrying", "Failed") and old.state != step.state:
            yield EventSpec("Warning", f"Step{step.state}", step.message)
        if step.attempt > old.attempt and step.child is not None:
            yield EventSpec(
                "Normal",
                "StepStarted",
                f"step {step.name}: attempt {step.attempt} is {step.child.kind} {step.child.name}",
            )
        if step.state == "Succeeded" and old.state != "Succeeded":
            yield EventSpec("Normal", "StepSucceeded", f"step {step.name} has succeeded: {step.message}")


def _of_phase(before: Status, after: Status) -> Iterator[EventSpec]:
    if after.phase == before.phase:
        return
    ready = after.condition("Ready")
    if after.phase == "Failed":
        of_a_step = any(step.state == "Failed" for step in after.steps)  # which has an Event of its own
        yield EventSpec(
            "Warning",
            "RunFailed",
            f"{ready.reason if ready else ''}: {f'step {after.step}' if of_a_step else after.message}",
        )
    elif after.phase in TOLD_OF_PHASE:
        yield EventSpec("Normal", TOLD_OF_PHASE[after.phase], after.message)
    elif after.phase == "Running" and before.phase == "Suspended":
        yield EventSpec("Normal", "Resumed", after.message)


def _of_conditions(before: Status, after: Status) -> Iterator[EventSpec]:
    """Stalled, StorageReachable, and what jobs report, when they turn. What jobs report also when it has another reason."""
    for new in after.conditions:
        old = before.condition(new.type)
        if new.type in BASIC or (old is not None and old.status == new.status and not _another(old, new)):
            continue
        if new.type == "StorageReachable":
            if new.status == "False":
                yield EventSpec("Warning", "StorageUnreachable", new.message)
            elif old is not None:
                yield EventSpec("Normal", "StorageReachable", "the bucket answers again")
        elif new.status == "True":
            yield EventSpec(
                "Warning", new.reason if new.type == "Stalled" else new.type, new.message or new.reason
            )
        elif new.type == "Stalled" and old is not None:
            yield EventSpec("Normal", "GetsOn", after.message)


def _another(old: Condition, new: Condition) -> bool:
    """Whether a job's condition that still holds says something new. Its message may hold figures that change all the time."""
    if new.type in ("Stalled", "StorageReachable"):
        return False
    return old.reason != new.reason or (new.type in EACH_TIME and old.message != new.message)


def event_name(run: Json, happening: EventSpec) -> str:
    """Equal happenings of one run have one name, so that the API server itself finds the Event to count up."""
    text = "\0".join((run["metadata"]["uid"], happening.kind, happening.reason, happening.message))
    return f"{run['metadata']['name']}.{hashlib.sha256(text.encode()).hexdigest()[:16]}"


async def post(kube: Kube, run: Json, happening: EventSpec, now: datetime) -> None:
    """Tell it, or count it up. What goes wrong is logged: an Event is for people, and the status has said it already."""
    meta, time = run["metadata"], now.strftime("%Y-%m-%dT%H:%M:%SZ")
    name = event_name(run, happening)
    event = {
        "apiVersion": EVENT.api_version,
        "kind": EVENT.name,
        "metadata": {"name": name, "namespace": meta["namespace"]},
        "involvedObject": {
            "apiVersion": DISTILLRUN.api_version,
            "kind": DISTILLRUN.name,
            "namespace": meta["namespace"],
            "name": meta["name"],
            "uid": meta["uid"],
        },
        "type": happening.kind,
        "reason": happening.reason,
        "message": happening.message[:MESSAGE],
        "firstTimestamp": time,
        "lastTimestamp": time,
        "count": 1,
        "source": {"component": COMPONENT},
        "reportingComponent": COMPONENT,
    }
    try:
        try:
            await kube.create(EVENT, event)
        except Conflict:
            known = await kube.get(EVENT, meta["namespace"], name) or {}
            await kube.patch(
                EVENT, meta["namespace"], name, {"count": known.get("count", 1) + 1, "lastTimestamp": time}
            )
    except KubeError as error:
        log.warning(
            "Event %s about %s/%s was not posted: %s",
            happening.reason,
            meta["namespace"],
            meta["name"],
            error,
        )
