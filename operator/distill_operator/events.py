"""Kubernetes Events for the changes of a run.

Equal Events are one object with a count. A failure to post never fails a reconcile.
"""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from distill_operator.conditions import PROGRESS_READABLE
from distill_operator.kube import DISTILLRUN, EVENT, Conflict, Json, Kube, KubeError
from distill_operator.pod_template import COMMIT_FILE
from distill_operator.step_images import describe_image, images_of, is_another
from vpmoe.api.status import MESSAGE, Condition, Status, StepStatus

log = logging.getLogger(__name__)

COMPONENT = "distill-operator"
PHASE_REASONS = {"Queued": "Queued", "Suspended": "Suspended", "Succeeded": "RunSucceeded"}
"""Event reason of a run that enters the phase."""
REPEATED = ("TrainerStarved", "StepSkipped")
"""Conditions of jobs of which every new message is an Event: another setting was adjusted, with the same
or another reason; another step was skipped."""
WITHOUT_EVENTS = ("Ready", "Progressing", "Suspended", "Failed", "Succeeded")
"""Conditions that the phase or a step reports already."""


@dataclass(frozen=True)
class EventSpec:
    """Content of an Event."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


def events_between(before: Status, after: Status) -> list[EventSpec]:
    """The Events for the difference between two statuses of a run, in the order in which to post them.

    Progress is not an Event.
    """
    return [
        *_step_events(before, after),
        *_image_events(before, after),
        *_phase_events(before, after),
        *_condition_events(before, after),
    ]


def _step_events(before: Status, after: Status) -> Iterator[EventSpec]:
    for step in after.steps:
        old = before.step_status(step.name) or StepStatus(name=step.name)
        if step.state in ("Retrying", "Failed") and old.state != step.state:
            yield EventSpec("Warning", f"Step{step.state}", step.message)
        if step.attempt > old.attempt and step.child is not None:
            yield EventSpec(
                "Normal",
                "StepStarted",
                f"step {step.name}: creating {step.child.kind} {step.child.name} (attempt {step.attempt})",
            )
        if step.state == "Succeeded" and old.state != "Succeeded":
            yield EventSpec("Normal", "StepSucceeded", f"step {step.name} has succeeded: {step.message}")


def _image_events(before: Status, after: Status) -> Iterator[EventSpec]:
    """Events for images that do not hold their commit, each once a run, and for steps whose attempts or pods
    ran different images.
    """
    unknown = {
        (image.image, image.digest)
        for step in before.steps
        for image in step.images or ()
        if image.commit == ""
    }
    for step in after.steps:
        for image in step.images or ():
            if image.commit == "" and (image.image, image.digest) not in unknown:
                unknown.add((image.image, image.digest))
                yield EventSpec(
                    "Warning",
                    "CommitUnknown",
                    f"step {step.name}: image {describe_image(image)} does not hold its commit in "
                    f"{COMMIT_FILE}, so what ran is recorded without it. Write it to this file when you "
                    "build the image.",
                )
        old = before.step_status(step.name) or StepStatus(name=step.name)
        for attempt in sorted({old.attempt, step.attempt}):
            yield from _differences(step, attempt, known=len(images_of(old.images or (), attempt)))


def _differences(step: StepStatus, attempt: int, known: int) -> Iterator[EventSpec]:
    """The Event for what this attempt ran, if it differs among its pods or from the attempt before. `known`:
    number of its images that were known already.
    """
    found = images_of(step.images or (), attempt)
    if len(found) > max(known, 1):
        listed = "; ".join(describe_image(image) for image in found)
        yield EventSpec(
            "Warning",
            "ImagesDiffer",
            f"step {step.name}: pods of attempt {attempt} run different images: {listed}",
        )
    elif len(found) > known and found[0].first_attempt == attempt:
        earlier = [image for image in step.images or () if image.last_attempt < attempt]
        last = max(earlier, key=lambda image: image.last_attempt, default=None)
        if last is not None and is_another(last, found[0]):
            moved = last.image == found[0].image
            yield EventSpec(
                "Warning" if moved else "Normal",
                "ImageChanged",
                f"step {step.name}: attempt {attempt} runs {describe_image(found[0])}; "
                f"attempt {last.last_attempt} ran {describe_image(last)}"
                + (": the tag was moved" if moved else ""),
            )


def _phase_events(before: Status, after: Status) -> Iterator[EventSpec]:
    if after.phase == before.phase:
        return
    ready = after.condition("Ready")
    if after.phase == "Failed":
        step_failed = any(
            step.state == "Failed" for step in after.steps
        )  # its message has an Event of its own
        yield EventSpec(
            "Warning",
            "RunFailed",
            f"{ready.reason if ready else ''}: {f'step {after.step}' if step_failed else after.message}",
        )
    elif after.phase in PHASE_REASONS:
        yield EventSpec("Normal", PHASE_REASONS[after.phase], after.message)
    elif after.phase == "Running" and before.phase == "Suspended":
        yield EventSpec("Normal", "Resumed", after.message)


def _condition_events(before: Status, after: Status) -> Iterator[EventSpec]:
    """Events for Stalled, ProgressReadable and conditions of jobs whose status changed, and for what else
    stalls the run since then, and new reasons of conditions of jobs.
    """
    for new in after.conditions:
        old = before.condition(new.type)
        same = old is not None and old.status == new.status and not _has_news(old, new)
        if new.type in WITHOUT_EVENTS or same:
            continue
        if new.type == PROGRESS_READABLE:
            if new.status == "False":
                yield EventSpec("Warning", "ProgressUnreadable", new.message)
            elif old is not None:
                yield EventSpec("Normal", PROGRESS_READABLE, "the progress can be read again")
        elif new.status == "True":
            yield EventSpec(
                "Warning", new.reason if new.type == "Stalled" else new.type, new.message or new.reason
            )
        elif new.type == "Stalled" and old is not None and after.phase != "Failed":
            yield EventSpec("Normal", "StallCleared", after.message)


def _has_news(old: Condition, new: Condition) -> bool:
    """Whether a condition that still holds needs another Event.

    Messages may hold figures that change all the time.
    """
    if new.type == PROGRESS_READABLE:
        return False
    if new.type == "Stalled":
        return _what_stalls(old) != _what_stalls(new)
    return old.reason != new.reason or (new.type in REPEATED and old.message != new.message)


def _what_stalls(condition: Condition) -> str:
    """What the condition Stalled is about: its reason, or which step makes no progress, and since when. What
    such a step does or waits for changes with each of its attempts.
    """
    step_makes_none = condition.reason in ("NoProgress", "PodPending")
    return condition.message.partition(": ")[0] if step_makes_none else condition.reason


def event_name(run: Json, event: EventSpec) -> str:
    """Equal Events of one run have one name, so that creating a second one is a Conflict."""
    text = "\0".join((run["metadata"]["uid"], event.type, event.reason, event.message))
    return f"{run['metadata']['name']}.{hashlib.sha256(text.encode()).hexdigest()[:16]}"


async def post_event(kube: Kube, run: Json, event: EventSpec, now: datetime) -> None:
    """Create the Event, or raise its count.

    A KubeError is logged, not raised: the status has the same facts.
    """
    meta, name, time = run["metadata"], event_name(run, event), f"{now:%Y-%m-%dT%H:%M:%SZ}"
    body = {
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
        "type": event.type,
        "reason": event.reason,
        "message": event.message[:MESSAGE],
        "firstTimestamp": time,
        "lastTimestamp": time,
        "count": 1,
        "source": {"component": COMPONENT},
        "reportingComponent": COMPONENT,
    }
    try:
        try:
            await kube.create(EVENT, body)
        except Conflict:
            known = await kube.get(EVENT, meta["namespace"], name) or {}
            await kube.patch(
                EVENT, meta["namespace"], name, {"count": known.get("count", 1) + 1, "lastTimestamp": time}
            )
    except KubeError as error:
        log.warning(
            "%s/%s: Event %s was not posted: %s", meta["namespace"], meta["name"], event.reason, error
        )
