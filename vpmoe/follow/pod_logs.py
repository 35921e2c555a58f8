"""Which pods' logs are shown of a step, and why there is none. Pure.

Reading and printing them is in log_streams.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vpmoe.api import labels
from vpmoe.follow.cluster_error import ClusterError
from vpmoe.follow.run_view import ENDED, label, number_of, own_container, pod_state, pods_of

Json = Mapping[str, Any]


@dataclass(frozen=True)
class LogSource:
    """A container with a log."""

    pod: str
    container: str


def choose_pods(
    run: Json, pods: Sequence[Json], step: str | None, attempt: int | None, number: int | None
) -> list[Json]:
    """The pods of an attempt of a step: by default of the step that runs or ran last, and of its latest
    attempt; only the one with a number, if it is given. `pods` are all pods of the run.

    Raises ClusterError, which says why there is none and what to do.
    """
    name, status = run["metadata"]["name"], run.get("status") or {}
    steps = {each["name"]: each for each in status.get("steps") or []}
    if not steps:
        raise ClusterError(
            f"run {name} has no steps yet, because the operator has not seen it. "
            f"`vpmoe status {name}` says more."
        )
    chosen = step or status.get("step") or next(iter(steps))
    if chosen not in steps:
        raise ClusterError(f"run {name} has no step {chosen}. It has {', '.join(steps)}.")
    latest = steps[chosen].get("attempt") or 0
    if not latest:
        state, message = steps[chosen].get("state") or "Pending", steps[chosen].get("message") or ""
        why = f": {message.rstrip('.')}" if message else ""
        raise ClusterError(
            f"step {chosen} of run {name} has not started ({state}{why}). "
            f"`vpmoe status {name} --watch` shows when it does."
        )
    wanted = attempt or latest
    if wanted > latest:
        raise ClusterError(
            f"step {chosen} of run {name} has no attempt {wanted}: the latest is {latest}. "
            "Leave --attempt out for it."
        )
    found = pods_of(pods, chosen, wanted)
    if not found:
        raise _gone(run, pods, chosen, wanted, steps[chosen])
    if number is None:
        return found
    with_number = [pod for pod in found if number_of(pod) == number]
    if not with_number:
        numbers = ", ".join(str(number_of(pod)) for pod in found)
        raise ClusterError(f"attempt {wanted} of step {chosen} has no pod {number}. It has {numbers}.")
    return with_number


def _gone(run: Json, pods: Sequence[Json], step: str, attempt: int, status: Json) -> ClusterError:
    """Why an attempt has no pods."""
    name = run["metadata"]["name"]
    left = sorted({int(label(pod, labels.ATTEMPT) or 0) for pod in pods if label(pod, labels.STEP) == step})
    others = f" Attempts with pods: {', '.join(map(str, left))}; choose one with --attempt." if left else ""
    if attempt == status.get("attempt") and status.get("state") not in ENDED:
        why = f" ({str(status['message']).rstrip('.')})" if status.get("message") else ""
        return ClusterError(
            f"attempt {attempt} of step {step} of run {name} has no pods now{why}. "
            f"`vpmoe status {name} --watch` shows when it has.{others}"
        )
    folder = (run.get("status") or {}).get("provenance", {}).get("folder") or "the run's folder"
    return ClusterError(
        f"the pods of attempt {attempt} of step {step} of run {name} are gone, and their logs with them: "
        "the last three attempts are kept, until somebody or their node deletes them."
        f"{others} Its metrics are in {folder}/steps/{step}."
    )


def has_started(pod: Json) -> bool:
    """Whether the job's own container of the pod has a log."""
    own = own_container(pod)
    for each in (pod.get("status") or {}).get("containerStatuses") or []:
        if each["name"] == own:
            return bool({"running", "terminated"} & set(each.get("state") or {}))
    return False


def has_ended(pod: Json) -> bool:
    """Whether the pod will never start any more."""
    return (pod.get("status") or {}).get("phase") in ENDED


def not_started(pod: Json) -> ClusterError:
    """Why a pod has no log."""
    status, name = pod.get("status") or {}, pod["metadata"]["name"]
    messages = [
        *(
            (each.get("state") or {}).get("waiting", {}).get("message")
            for each in status.get("containerStatuses") or []
        ),
        *(each.get("message") for each in status.get("conditions") or [] if each.get("status") == "False"),
        status.get("message"),
    ]
    why = next((f": {' '.join(message.split()).rstrip('.')}" for message in messages if message), "")
    return ClusterError(
        f"pod {name} has no log, because its container has not started ({pod_state(pod)}{why}). "
        f"`kubectl describe pod {name}` shows its events"
        + ("." if has_ended(pod) else "; --follow waits for it.")
    )


def source(pod: Json) -> LogSource:
    """The job's own container of a pod."""
    return LogSource(pod["metadata"]["name"], own_container(pod))
