"""Explains pods: why one does not run yet, and why one has failed.

Pure functions over live Pod objects.

The messages are those that people read in the run's status. What a failure implies for the step is in
step_logic.py.
"""

import json
from dataclasses import dataclass
from typing import Any, Literal

from distill_operator.kube import Json
from vpmoe.failure import EXIT_CODES

DISRUPTION_REASONS = {
    "Evicted",
    "Preempting",
    "NodeLost",
    "NodeShutdown",
    "NodeAffinity",
    "Shutdown",
    "Terminated",
    "UnexpectedAdmissionError",
}
"""Values of a pod's status.reason with which the kubelet or the control plane ends a healthy pod."""

SIGNALS = {137: "killed", 143: "terminated"}
MAX_MESSAGE = 300


@dataclass(frozen=True)
class Failure:
    """Why a child failed.

    Permanent: another attempt would fail too. Interrupted: it was stopped from outside, and may resume at
    once. Retriable: it could not reach a service. Error: anything else.
    """

    kind: Literal["Permanent", "Interrupted", "Retriable", "Error"]
    message: str


def is_alive(pod: Json) -> bool:
    """Whether the pod may still run a process, and so hold its GPUs."""
    return pod.get("status", {}).get("phase") not in ("Succeeded", "Failed")


def is_ready(pod: Json) -> bool:
    """Whether all containers of the pod run."""
    return any(
        c["type"] == "Ready" and c["status"] == "True" for c in pod.get("status", {}).get("conditions", [])
    )


def waiting_reason(pods: list[Json], warnings: list[Json]) -> str:
    """What keeps the pods of a child from running: the scheduler, an image, a volume, or the rejection of the
    pods themselves.

    `warnings` are Warning Events of the child and of its pods, oldest first.
    """
    for pod in pods:
        name, status = pod["metadata"]["name"], pod.get("status", {})
        for condition in status.get("conditions", []):
            if condition["type"] == "PodScheduled" and condition["status"] == "False":
                message = condition.get("message") or condition.get("reason", "")
                return f"pod {name} cannot be scheduled: {_clip(message)}"
        for container in _containers(status):
            waiting = container.get("state", {}).get("waiting", {})
            if waiting.get("reason") not in (None, "PodInitializing", "ContainerCreating"):
                message = _clip(waiting.get("message", ""))
                return f"pod {name}, container {container['name']}: {waiting['reason']}: {message}"
    if warnings:
        about = warnings[-1]["involvedObject"]
        message = _clip(warnings[-1].get("message", ""))
        return f"{about['kind'].lower()} {about['name']}: {warnings[-1].get('reason', '')}: {message}"
    starting = [pod["metadata"]["name"] for pod in pods if not is_ready(pod)]
    return f"pod {starting[0]} is starting" if starting else "its pods have not been created yet"


def failure_cause(pods: list[Json], condition: str) -> Failure:
    """The cause of a failed child: the first failure among its pods.

    When one pod fails the others are stopped, which is not the cause.

    `condition` is the child's own condition. It is all that is known if the pods were deleted.
    """
    ended = sorted(pods, key=_ended)
    failures = [failure for pod in ended if (failure := _failure(pod)) is not None]
    permanent = [failure for failure in failures if failure.kind == "Permanent"]
    disrupted = [failure for pod in ended if _disruption(pod) and (failure := _failure(pod)) is not None]
    others = [
        failure
        for kind in ("Error", "Retriable", "Interrupted")
        for failure in failures
        if failure.kind == kind
    ]
    gone = Failure("Interrupted", f"its pods were deleted before the cause was read ({condition})")
    return [*permanent, *disrupted, *others, gone][0]


def _failure(pod: Json) -> Failure | None:
    name, status = pod["metadata"]["name"], pod.get("status", {})
    disruption = _disruption(pod)
    ended = [
        c for c in _containers(status) if c.get("state", {}).get("terminated", {}).get("exitCode", 0) != 0
    ]
    if disruption:
        return Failure("Interrupted", f"pod {name} was disrupted ({disruption})")
    if not ended:
        if status.get("phase") != "Failed":
            return None
        return Failure(
            "Error", f"pod {name}: {status.get('reason', 'Failed')}: {_clip(status.get('message', ''))}"
        )
    container, state = ended[0], ended[0]["state"]["terminated"]
    code, report = state["exitCode"], _termination_message(state.get("message", ""))
    message = (
        f"pod {name}, container {container['name']}, exit {code}{_meaning(code, state.get('reason', ''))}"
    )
    if report["message"]:
        message += f". Last line: {json.dumps(_clip(report['message']), ensure_ascii=False)}"
    return Failure(_failure_kind(code, report), message)


def _failure_kind(code: int, report: Json) -> Literal["Permanent", "Interrupted", "Retriable", "Error"]:
    stated = report.get("class") or next(
        (kind for kind, exit_code in EXIT_CODES.items() if exit_code == code), "Internal"
    )
    kinds: dict[str, Literal["Permanent", "Interrupted", "Retriable"]] = {
        "Permanent": "Permanent",
        "Terminated": "Interrupted",
        "Retriable": "Retriable",
    }
    return kinds.get(stated, "Error")


def _termination_message(message: str) -> Json:
    """The {class, rank, exit, message} that a job writes when it ends, or else the last line of its log as
    the message.
    """
    lines = [line for line in message.splitlines() if line.strip()]
    if not lines:
        return {"message": ""}
    try:
        report: Any = json.loads(lines[-1])
    except ValueError:
        report = None
    return (
        report
        if isinstance(report, dict) and isinstance(report.get("message"), str)
        else {"message": lines[-1].strip()}
    )


def _disruption(pod: Json) -> str:
    """Why a pod was stopped from outside; empty if it was not."""
    status = pod.get("status", {})
    for condition in status.get("conditions", []):
        if condition["type"] == "DisruptionTarget" and condition["status"] == "True":
            return f"{condition.get('reason', '')}: {_clip(condition.get('message', ''))}"
    if status.get("reason") in DISRUPTION_REASONS:
        return f"{status['reason']}: {_clip(status.get('message', ''))}"
    return ""


def _meaning(code: int, reason: str) -> str:
    if reason == "OOMKilled":
        return " (out of memory: raise runtime.resources of this role)"
    return f" ({SIGNALS[code]})" if code in SIGNALS else ""


def _containers(status: Json) -> list[Json]:
    return [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]


def _ended(pod: Json) -> str:
    """When the pod's first container ended, as text that sorts. Pods without such a container sort last."""
    times = [
        c.get("state", {}).get("terminated", {}).get("finishedAt", "")
        for c in _containers(pod.get("status", {}))
    ]
    return min((time for time in times if time), default="~")


def _clip(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 1] + "…"
