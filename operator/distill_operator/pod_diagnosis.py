"""Explains pods: why one does not run yet, and why one has failed.

Pure functions over live Pod objects.

An outcome is that of the job's own container, which is known by name. An admission policy may have added
others: their exit codes mean nothing, and a pod that only they keep alive has ended.

The messages are those that people read in the run's status. What a failure implies for the step is in
step_logic.py.
"""

import json
from dataclasses import dataclass
from typing import Any, Literal

from distill_operator.kube import Json
from vpmoe.api.termination import EXIT_CODES

NODE_LOST = "NodeLost"
"""A pod's status.reason if the kubelet of its node does not answer."""
REJECTED = "Pod was rejected"
"""Start of a pod's status.message if the kubelet did not admit the pod, so that no container of it ran."""
NODE_REJECTIONS = ("Evicted", "NodeAffinity", "NodeShutdown", "UnexpectedAdmissionError")
"""Values of a rejected pod's status.reason for which the node's state is the cause. OutOf<resource> is
another: the node had less than the scheduler knew."""
LOST_CONTAINER = ("ContainerStatusUnknown", "Unknown")
"""Reasons of a container that the kubelet or containerd no longer found: its node was restarted."""
EVICTED = "Evicted"
"""A pod's status.reason if the kubelet evicted it. For pressure on the node there is a DisruptionTarget
condition beside it; without one the pod exceeded a limit of its own."""
TERMINATING = "is terminating"
"""End of the message about a child of which a pod is being deleted."""

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


def is_terminating(pod: Json) -> bool:
    """Whether the pod is being deleted. On a lost node it stays so, whatever its containers' states say."""
    return is_alive(pod) and "deletionTimestamp" in pod["metadata"]


def is_running(pod: Json, container: str) -> bool:
    """Whether the job's own container runs in the pod."""
    return "running" in _state(pod, container) and not is_terminating(pod)


def exit_code(pod: Json, container: str) -> int | None:
    """Exit code of the job's own container; None if it has not ended."""
    code: int | None = _state(pod, container).get("terminated", {}).get("exitCode")
    return code


def is_held_by_others(pod: Json, container: str) -> bool:
    """Whether the job's own container has ended and the pod is alive only because another one has not.

    Native sidecars are no such container: the kubelet ends them itself. Nor does it hold a pod that is being
    deleted.
    """
    others = [c for c in pod.get("status", {}).get("containerStatuses", []) if c["name"] != container]
    return (
        is_alive(pod)
        and not is_terminating(pod)
        and exit_code(pod, container) is not None
        and any("terminated" not in other.get("state", {}) for other in others)
    )


def is_shared(pod: Json, container: str) -> bool:
    """Whether the pod has other containers beside the job's own, which may keep it alive or make it fail."""
    return any(found["name"] != container for found in pod.get("spec", {}).get("containers", []))


def starting(pods: list[Json], container: str) -> list[Json]:
    """The pods whose own container has not started."""
    return [
        pod
        for pod in pods
        if is_alive(pod)
        and not is_terminating(pod)
        and not is_running(pod, container)
        and exit_code(pod, container) is None
    ]


def stated_reason(pods: list[Json], container: str) -> str:
    """What the pods of a child say themselves about why they do not run: one is being deleted, no node fits,
    or a container waits for its image or its Secret. Empty if they say nothing.
    """
    for pod in filter(is_terminating, pods):
        why = _disruption(pod, container)
        return f"{why} and {TERMINATING}" if why else f"pod {pod['metadata']['name']} {TERMINATING}"
    for pod in starting(pods, container):
        name, status = pod["metadata"]["name"], pod.get("status", {})
        for condition in status.get("conditions", []):
            if condition["type"] == "PodScheduled" and condition["status"] == "False":
                message = condition.get("message") or condition.get("reason", "")
                return f"pod {name} cannot be scheduled: {_clip(message)}"
        for any_of_it in _containers(status):
            waiting = any_of_it.get("state", {}).get("waiting", {})
            if waiting.get("reason") not in (None, "PodInitializing", "ContainerCreating"):
                message = _clip(waiting.get("message", ""))
                return f"pod {name}, container {any_of_it['name']}: {waiting['reason']}: {message}"
    return ""


def waiting_reason(pods: list[Json], warnings: list[Json], container: str) -> str:
    """What keeps the pods of a child from running: the scheduler, an image, a volume, or the rejection of the
    pods themselves.

    `warnings` are Warning Events of the child and of its pods, oldest first.
    """
    if reason := stated_reason(pods, container):
        return reason
    if warnings:
        last = warnings[-1]  # whoever may create Events in the namespace may have left out anything
        about, message = last.get("involvedObject", {}), _clip(last.get("message", ""))
        where = f"{about.get('kind', '').lower()} {about.get('name', '')}"
        return f"{where}: {last.get('reason', '')}: {message}"
    names = [pod["metadata"]["name"] for pod in starting(pods, container)]
    return f"pod {names[0]} is starting" if names else "its pods have not been created yet"


def failure_cause(pods: list[Json], condition: str, container: str) -> Failure:
    """The cause of a failed child: the first failure among its pods.

    When one pod fails the others are stopped, which is not the cause.

    `condition` is the child's own condition. It is all that is known if the pods were deleted. `container`
    is the name of the job's own container.
    """
    ended = sorted(
        (pod for pod in pods if exit_code(pod, container) != 0), key=lambda pod: _ended(pod, container)
    )
    failures = [failure for pod in ended if (failure := _failure(pod, container)) is not None]
    ranked = [
        *(failure for failure in failures if failure.kind == "Permanent"),
        *(Failure("Interrupted", text) for pod in ended if (text := _disruption(pod, container))),
        *(Failure("Error", text) for pod in ended if (text := _limit_exceeded(pod))),
        *(failure for failure in failures if failure.kind == "Error"),
        *(failure for failure in failures if failure.kind == "Retriable"),
        *(Failure("Error", text) for pod in pods if (text := _failure_of_others(pod, container))),
        *(failure for failure in failures if failure.kind == "Interrupted"),
        Failure("Interrupted", f"its pods were deleted before the cause was read ({condition})"),
    ]
    return ranked[0]


def _failure(pod: Json, container: str) -> Failure | None:
    """The failure of a pod by its own container, or of a pod that failed before that container ran."""
    name, status, state = pod["metadata"]["name"], pod.get("status", {}), _state(pod, container)
    if disruption := _disruption(pod, container):
        return Failure("Interrupted", disruption)
    if exceeded := _limit_exceeded(pod):
        return Failure("Error", exceeded)
    if "terminated" not in state:
        if status.get("phase") != "Failed" or _failure_of_others(pod, container):
            return None
        return Failure(
            "Error", f"pod {name}: {status.get('reason', 'Failed')}: {_clip(status.get('message', ''))}"
        )
    ended = state["terminated"]
    code, report = ended["exitCode"], _termination_message(ended.get("message", ""))
    message = f"pod {name}, container {container}, exit {code}{_meaning(code, ended.get('reason', ''))}"
    if report["message"]:
        message += f". Last line: {json.dumps(_clip(report['message']), ensure_ascii=False)}"
    return Failure(_failure_kind(code, report), message)


def _failure_of_others(pod: Json, container: str) -> str:
    """Which container made a pod fail whose own container did not; empty if none did."""
    status = pod.get("status", {})
    if status.get("phase") != "Failed" or status.get("reason") or exit_code(pod, container) not in (None, 0):
        return ""
    for other in _containers(status):
        code = other.get("state", {}).get("terminated", {}).get("exitCode", 0)
        if other["name"] != container and code != 0:
            own = "had succeeded" if exit_code(pod, container) == 0 else "did not run"
            name = pod["metadata"]["name"]
            return f"pod {name}, container {other['name']}, exit {code}: container {container} {own}"
    return ""


def _failure_kind(code: int, report: Json) -> Literal["Permanent", "Interrupted", "Retriable", "Error"]:
    stated = report.get("class") or next(
        (kind for kind, exit_code in EXIT_CODES.items() if exit_code == code), "Internal"
    )
    if stated == "Retriable" and report.get("reason") == "Unreachable":
        return "Interrupted"  # the store is away, which is not the job's doing
    kinds: dict[str, Literal["Permanent", "Interrupted", "Retriable"]] = {
        "Permanent": "Permanent",
        "Terminated": "Interrupted",
        "Retriable": "Retriable",
    }
    return kinds.get(stated, "Error")


def _termination_message(message: str) -> Json:
    """The class and message that a job writes when it ends, or else the last line of its log as the
    message.
    """
    lines = [line for line in message.split("\n") if line.strip()]
    if not lines:
        return {"message": ""}
    try:
        report: Any = json.loads(lines[-1])
    except ValueError:
        report = None
    if not isinstance(report, dict) or not isinstance(report.get("message"), str):
        return {"message": lines[-1].strip()}
    return {name: value for name, value in report.items() if isinstance(value, str)}


def _disruption(pod: Json, container: str) -> str:
    """How a pod was stopped from outside; empty if it was not.

    Kubernetes marks drains, preemptions, pressure on the node, node shutdowns, taints and deleted nodes with
    the condition DisruptionTarget. It has no such mark for a node that is lost or that refuses the pod.
    """
    name, status = pod["metadata"]["name"], pod.get("status", {})
    reason, message = status.get("reason", ""), status.get("message", "")
    for condition in status.get("conditions", []):
        if condition["type"] == "DisruptionTarget" and condition["status"] == "True":
            text = f"{condition.get('reason', '')}: {_clip(condition.get('message', ''))}"
            return f"pod {name} was disrupted ({text})"
    if reason == NODE_LOST:
        return f"pod {name} was lost with its node ({reason}: {_clip(message)})"
    if message.startswith(REJECTED) and (reason in NODE_REJECTIONS or reason.startswith("OutOf")):
        return f"pod {name} was rejected by its node ({reason}: {_clip(message)})"
    ended = _state(pod, container).get("terminated", {})
    if ended.get("reason") in LOST_CONTAINER and reason != EVICTED:
        return f"pod {name}, container {container}, was lost when its node restarted ({ended['reason']})"
    return ""


def _limit_exceeded(pod: Json) -> str:
    """Why the kubelet evicted a pod although its node had no pressure: a limit of the pod's own, such as that
    of its ephemeral storage. Empty if it did not.
    """
    status = pod.get("status", {})
    if status.get("reason") != EVICTED or _disruption(pod, ""):
        return ""
    return (
        f"pod {pod['metadata']['name']} was evicted because it exceeded its own limit: "
        f"{_clip(status.get('message', ''))} (raise runtime.resources of this role)"
    )


def _meaning(code: int, reason: str) -> str:
    if reason == "OOMKilled":
        return " (out of memory: raise runtime.resources of this role)"
    return f" ({SIGNALS[code]})" if code in SIGNALS else ""


def _state(pod: Json, container: str) -> Json:
    """State of the job's own container: waiting, running or terminated; empty if it is not known yet."""
    statuses = pod.get("status", {}).get("containerStatuses", [])
    return next((dict(c.get("state", {})) for c in statuses if c["name"] == container), {})


def _containers(status: Json) -> list[Json]:
    return [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]


def _ended(pod: Json, container: str) -> str:
    """When the pod's own container ended, as text that sorts. Pods without a time sort last."""
    return _state(pod, container).get("terminated", {}).get("finishedAt") or "~"


def _clip(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 1] + "…"
