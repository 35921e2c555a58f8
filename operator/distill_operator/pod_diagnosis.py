"""What pods say about themselves: why one does not run yet, and why one has failed. Pure functions over live Pod objects.

The formats of the answers are those that a person reads in status; what follows from them is plan.py's business.
"""

import json
from dataclasses import dataclass
from typing import Any, Literal

from distill_operator.kube import Json
from vpmoe.failure import EXIT

DISRUPTED = {
    "Evicted",
    "Preempting",
    "NodeLost",
    "NodeShutdown",
    "NodeAffinity",
    "Shutdown",
    "Terminated",
    "UnexpectedAdmissionError",
}
"""Values of a pod's status.reason with which the kubelet or the control plane ends a pod that did nothing wrong."""

SIGNALS = {137: "killed", 143: "terminated"}
LONGEST_LINE = 300


@dataclass(frozen=True)
class Failure:
    """Why a child failed. Permanent: another attempt cannot mend it. Interrupted: it was stopped from outside and may just go on.

    Retriable: it could not reach something outside. Error: anything else.
    """

    kind: Literal["Permanent", "Interrupted", "Retriable", "Error"]
    words: str


def alive(pod: Json) -> bool:
    """Whether it may still run a process, and so hold its GPUs."""
    return pod.get("status", {}).get("phase") not in ("Succeeded", "Failed")


def ready(pod: Json) -> bool:
    """Whether all of its containers run."""
    return any(
        c["type"] == "Ready" and c["status"] == "True" for c in pod.get("status", {}).get("conditions", [])
    )


def why_waiting(pods: list[Json], warnings: list[Json]) -> str:
    """What keeps pods from running: the scheduler's word, an image, a volume, or (no pod at all) what `warnings` say of their maker.

    `warnings` are live Event objects of the child or of its pods, oldest first.
    """
    for pod in pods:
        name, status = pod["metadata"]["name"], pod.get("status", {})
        for condition in status.get("conditions", []):
            if condition["type"] == "PodScheduled" and condition["status"] == "False":
                return f"pod {name} cannot be placed: {_clip(condition.get('message') or condition.get('reason', ''))}"
        for container in _containers(status):
            waiting = container.get("state", {}).get("waiting", {})
            if waiting.get("reason") not in (None, "PodInitializing", "ContainerCreating"):
                return f"pod {name}, container {container['name']}: {waiting['reason']}: {_clip(waiting.get('message', ''))}"
    if warnings:
        about = warnings[-1]["involvedObject"]
        return f"{about['kind'].lower()} {about['name']}: {warnings[-1].get('reason', '')}: {_clip(warnings[-1].get('message', ''))}"
    starting = [pod["metadata"]["name"] for pod in pods if not ready(pod)]
    return f"pod {starting[0]} is starting" if starting else "its pods are not there yet"


def why_failed(pods: list[Json], otherwise: str) -> Failure:
    """The first cause among the pods of a failed child. When one fails, others are stopped for it: those are not the cause.

    `otherwise` is what the child's own condition says, for when no pod is left to ask: then somebody removed it.
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
    gone = Failure("Interrupted", f"no pod is left that could say why ({otherwise})")
    return [*permanent, *disrupted, *others, gone][0]


def _failure(pod: Json) -> Failure | None:
    name, status = pod["metadata"]["name"], pod.get("status", {})
    disruption = _disruption(pod)
    ended = [
        c for c in _containers(status) if c.get("state", {}).get("terminated", {}).get("exitCode", 0) != 0
    ]
    if disruption:
        return Failure("Interrupted", f"pod {name} was stopped from outside ({disruption})")
    if not ended:
        if status.get("phase") != "Failed":
            return None
        return Failure(
            "Error", f"pod {name}: {status.get('reason', 'Failed')}: {_clip(status.get('message', ''))}"
        )
    container, state = ended[0], ended[0]["state"]["terminated"]
    code, said = state["exitCode"], _last_word(state.get("message", ""))
    words = f"pod {name}, container {container['name']}, exit {code}{_meaning(code, state.get('reason', ''))}"
    if said["message"]:
        words += f". Last line: {json.dumps(_clip(said['message']), ensure_ascii=False)}"
    return Failure(_kind(code, said), words)


def _kind(code: int, said: Json) -> Literal["Permanent", "Interrupted", "Retriable", "Error"]:
    stated = said.get("class") or next(
        (kind for kind, exit_code in EXIT.items() if exit_code == code), "Internal"
    )
    kinds: dict[str, Literal["Permanent", "Interrupted", "Retriable"]] = {
        "Permanent": "Permanent",
        "Terminated": "Interrupted",
        "Retriable": "Retriable",
    }
    return kinds.get(stated, "Error")


def _last_word(message: str) -> Json:
    """A job's own last line {class, rank, exit, message}, or the last line of its log as the message."""
    lines = [line for line in message.splitlines() if line.strip()]
    if not lines:
        return {"message": ""}
    try:
        said: Any = json.loads(lines[-1])
    except ValueError:
        said = None
    return (
        said
        if isinstance(said, dict) and isinstance(said.get("message"), str)
        else {"message": lines[-1].strip()}
    )


def _disruption(pod: Json) -> str:
    """Why a pod was ended from outside; empty where it was not."""
    status = pod.get("status", {})
    for condition in status.get("conditions", []):
        if condition["type"] == "DisruptionTarget" and condition["status"] == "True":
            return f"{condition.get('reason', '')}: {_clip(condition.get('message', ''))}"
    if status.get("reason") in DISRUPTED:
        return f"{status['reason']}: {_clip(status.get('message', ''))}"
    return ""


def _meaning(code: int, reason: str) -> str:
    if reason == "OOMKilled":
        return " (out of memory: raise runtime.resources of this role)"
    return f" ({SIGNALS[code]})" if code in SIGNALS else ""


def _containers(status: Json) -> list[Json]:
    return [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]


def _ended(pod: Json) -> str:
    """When its first failed container ended, as text that sorts; pods without one come last."""
    times = [
        c.get("state", {}).get("terminated", {}).get("finishedAt", "")
        for c in _containers(pod.get("status", {}))
    ]
    return min((time for time in times if time), default="~")


def _clip(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_LINE else text[: LONGEST_LINE - 1] + "…"
