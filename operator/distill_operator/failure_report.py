"""Reports in a run's status why the operator cannot reconcile it, and changes nothing else of the status.

The status may be of a version that knows more than this one, so it is handled as plain JSON.
"""

from datetime import datetime

from distill_operator.events import EventSpec, post_event
from distill_operator.kube import DISTILLRUN, Conflict, Json, Kube, KubeError
from distill_operator.observe import stored_status
from vpmoe.api.status import MESSAGE


async def report_failure(kube: Kube, obj: Json, reason: str, message: str, now: datetime) -> None:
    """Set the run's condition Stalled and post an Event, unless the condition says the same already.

    Raises KubeError; Conflict if the run was changed since `obj` was read.
    """
    conditions = conditions_with_failure(obj, reason, message, now)
    if conditions is None:
        return
    changed = {**obj, "status": {**stored_status(obj), "conditions": conditions}}
    try:
        await kube.replace(DISTILLRUN, changed, "status")
    except Conflict:
        raise
    except KubeError:
        await post_event(kube, obj, EventSpec("Warning", reason, message), now)
        raise
    await post_event(kube, obj, EventSpec("Warning", reason, message), now)


def conditions_with_failure(obj: Json, reason: str, message: str, now: datetime) -> list[Json] | None:
    """The run's conditions with Stalled=True for this reason, and Progressing=False. All others, and fields
    that this version does not know, stay as they are.

    Something else than conditions in their place is replaced.

    None if they say so already. They are what plan() writes for an ObservedRun with this failure, so the two
    never overwrite each other.
    """
    before = stored_status(obj).get("conditions")
    if not isinstance(before, list) or not all(isinstance(known, dict) for known in before):
        before = []  # nobody could read them
    after: list[Json] = list(before)
    for type_, status, text in (("Progressing", "False", ""), ("Stalled", "True", message[:MESSAGE])):
        place = next((i for i, known in enumerate(before) if known.get("type") == type_), len(after))
        known = after[place] if place < len(after) else {}
        since = known.get("lastTransitionTime") if known.get("status") == status else None
        why = known["reason"] if type_ == "Progressing" and known.get("reason") else reason
        changed = {
            **known,
            "type": type_,
            "status": status,
            "reason": why,
            "message": text,
            "observedGeneration": obj["metadata"]["generation"],
            "lastTransitionTime": since or f"{now:%Y-%m-%dT%H:%M:%SZ}",
        }
        after[place : place + 1] = [changed]
    return after if after != before else None
