"""What is shown of a run, from its DistillRun and its pods. Pure: no I/O and no clock.

The object is read as plain JSON and not as the API's models: a run of a newer operator is shown as well, with
the phases and states that it has. How a view is drawn is in drawing.py and plain_text.py.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from vpmoe.api import labels
from vpmoe.api.quantities import parse_tokens
from vpmoe.api.run import SAMPLER, TEACHER
from vpmoe.follow.remedies import remedy

Json = Mapping[str, Any]

UNSEEN = "The operator has not seen this run yet"
UNSEEN_REMEDY = (
    "If that lasts, look whether the operator runs and watches this namespace: "
    "`kubectl get deployments --all-namespaces --selector=app.kubernetes.io/name=distill-operator`"
)
ENDED = ("Succeeded", "Failed")
ACTIVE = ("Queued", "Running", "Retrying", "Suspended", "Failed")
"""States of a step of which people see the attempt's pods, and what it does or waits for."""
SHOWN_BY_THE_HEADLINE = ("Ready", "Progressing", "Suspended", "Failed", "Succeeded")
"""Conditions that say nothing more than phase and message do."""
STARTING = ("Pending", "ContainerCreating", "PodInitializing", "Running", "Terminating", "Succeeded")
"""States of pods that start by themselves, or have."""
MOST_PODS = 8
"""Pods of a step that are shown one by one."""


@dataclass(frozen=True)
class PodView:
    """A pod of a step's latest attempt."""

    name: str
    state: str
    """Its phase, or what its own container waits for or ended with."""
    node: str


@dataclass(frozen=True)
class StepView:
    """A step of the run."""

    name: str
    unit: Literal["tokens", "windows", ""]
    """What it counts: tokens in the training step of a stage, windows beside it, else parts or files."""
    state: str
    attempt: int
    done: int
    total: int | None
    """The stage's budget of tokens, or the step's parts or files; None if it is not known, and for windows:
    the stage ends by its tokens."""
    started: datetime | None
    """When its first attempt was created."""
    finished: datetime | None
    message: str
    """What it does or waits for."""
    pods: tuple[PodView, ...]

    @property
    def share(self) -> float:
        """Share of its work that is done, from 0 to 1."""
        if self.state == "Succeeded":
            return 1.0
        return min(1.0, self.done / self.total) if self.total else 0.0


@dataclass(frozen=True)
class RunWarning:
    """A condition that a person should know of."""

    reason: str
    message: str
    remedy: str


@dataclass(frozen=True)
class RunView:
    """A run."""

    namespace: str
    name: str
    phase: str
    progress: str
    """Share of the whole run, such as 42%; empty if it is not known."""
    message: str
    remedy: str
    """What a person can do about it; empty if nothing has to be done."""
    warnings: tuple[RunWarning, ...]
    tokens_per_second: float | None
    loss: float | None
    held_out: Mapping[str, float]
    """Latest held-out loss by span."""
    validity: float | None
    eta: datetime | None
    started: datetime | None
    """When the first step started."""
    finished: datetime | None
    folder: str
    model: str
    steps: tuple[StepView, ...]

    @property
    def ended(self) -> bool:
        """Whether the run has succeeded or failed."""
        return self.phase in ENDED


def view_run(run: Json, pods: Sequence[Json]) -> RunView:
    """The view of a run. `pods` are all pods with the run's label, in any order."""
    meta, status = run["metadata"], run.get("status") or {}
    conditions = {each["type"]: each for each in status.get("conditions") or []}
    steps = tuple(_step(each, run, pods) for each in status.get("steps") or [])
    return RunView(
        namespace=meta["namespace"],
        name=meta["name"],
        phase=status.get("phase") or "Pending",
        progress=status.get("progress") or "",
        message=_message(meta, status),
        remedy=_remedy(meta["name"], status, conditions, steps) if status else UNSEEN_REMEDY,
        warnings=tuple(_warnings(meta["name"], status, conditions)),
        tokens_per_second=status.get("tokensPerSecond"),
        loss=status.get("loss"),
        held_out={
            span: value
            for span, value in ((status.get("heldOut") or {}).get("latest") or {}).items()
            if value is not None
        },
        validity=status.get("validity"),
        eta=_time(status.get("eta")),
        started=_time(status.get("started")),
        finished=_time(status.get("finished")),
        folder=(status.get("provenance") or {}).get("folder") or "",
        model=status.get("model") or "",
        steps=steps,
    )


def _printable(text: object) -> str:
    """The text on one line. A message may quote the last line of a log, with commands of a terminal in it."""
    return "".join(letter if letter.isprintable() else " " for letter in str(text or ""))


def _message(meta: Json, status: Json) -> str:
    if not status:
        return UNSEEN
    message = _printable(status.get("message"))
    if meta.get("deletionTimestamp"):
        return f"It is being deleted. {message}".rstrip()
    if status.get("observedGeneration", 0) < meta.get("generation", 0):
        return f"The operator has not seen the last change of its spec yet. {message}".rstrip()
    return message


def _remedy(run: str, status: Json, conditions: Mapping[str, Json], steps: Sequence[StepView]) -> str:
    """What to do about why the run is stalled, or else about what it waits for."""
    concerned = next(
        (step.name for step in steps if step.state in ("Failed", "Retrying")), status.get("step")
    )
    stalled, ready = conditions.get("Stalled") or {}, conditions.get("Ready") or {}
    if stalled.get("status") == "True":
        return remedy(stalled["reason"], run, concerned or "")
    reason = ready.get("reason", "")
    if reason == "PodPending" and all(pod.state in STARTING for step in steps for pod in step.pods):
        return ""
    return remedy(reason, run, concerned or "")


def _warnings(run: str, status: Json, conditions: Mapping[str, Json]) -> Iterator[RunWarning]:
    """What conditions say beside the headline: why the run is stalled, and what jobs report."""
    step = status.get("step") or ""
    for kind, each in conditions.items():
        reason, message = each.get("reason", ""), _printable(each.get("message"))
        # ProgressReadable, StorageReachable and their like warn if they are False
        bad = "False" if kind.endswith(("Readable", "Reachable")) else "True"
        if (
            kind in SHOWN_BY_THE_HEADLINE
            or each.get("status") != bad
            or message == _printable(status.get("message"))
        ):
            continue
        # the remedy of a stalled run is the run's own
        help_ = "" if kind == "Stalled" else remedy(kind, run, step) or remedy(reason, run, step)
        yield RunWarning(kind if kind == reason else f"{kind}: {reason}", message, help_)


def _step(step: Json, run: Json, pods: Sequence[Json]) -> StepView:
    name, state, attempt = step["name"], step.get("state") or "Pending", step.get("attempt") or 0
    budgets = {stage["name"]: stage.get("tokens") for stage in run["spec"].get("stages") or []}
    unit: Literal["tokens", "windows", ""] = ""
    done, total = step.get("partsDone"), step.get("partsTotal")
    if name in budgets:
        unit, done, total = (
            "tokens",
            step.get("tokensDone"),
            step.get("tokensTotal") or _tokens(budgets[name]),
        )
    elif name.endswith((f"-{SAMPLER}", f"-{TEACHER}")):
        unit, total = "windows", None
    return StepView(
        name=name,
        unit=unit,
        state=state,
        attempt=attempt,
        done=done or 0,
        total=total,
        started=_time(step.get("started")),
        finished=_time(step.get("finished")),
        message=_printable(step.get("message")),
        pods=tuple(map(_pod, pods_of(pods, name, attempt))) if state in ACTIVE else (),
    )


def pods_of(pods: Sequence[Json], step: str, attempt: int) -> list[Json]:
    """The pods of one attempt of a step, by their number."""
    found = [
        pod for pod in pods if label(pod, labels.STEP) == step and label(pod, labels.ATTEMPT) == str(attempt)
    ]
    return sorted(found, key=lambda pod: (number_of(pod), pod["metadata"]["name"]))


def label(pod: Json, key: str) -> str:
    """Value of a label; empty without it."""
    return str((pod["metadata"].get("labels") or {}).get(key) or "")


def number_of(pod: Json) -> int:
    """Number of a pod within its attempt: its index in an Indexed Job; in a PyTorchJob 0 is the Master, and
    the Workers follow."""
    index = label(pod, "training.kubeflow.org/replica-index")
    if index:
        return int(index) + (label(pod, "training.kubeflow.org/replica-type").lower() == "worker")
    return int(label(pod, "batch.kubernetes.io/job-completion-index") or 0)


def own_container(pod: Json) -> str:
    """Name of the job's own container: an admission policy may have added others."""
    containers = pod["spec"]["containers"]
    for each in containers:
        command = each.get("command") or []
        if command[1:2] == ["-m"] and str(command[2]).startswith("jobs."):
            return str(each["name"])
    return str(containers[0]["name"])


def pod_state(pod: Json) -> str:
    """Phase of a pod, or what its own container waits for or ended with, as kubectl shows it."""
    status = pod.get("status") or {}
    if pod["metadata"].get("deletionTimestamp"):
        return "Terminating"
    for each in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        state = each.get("state") or {}
        waiting, ended = state.get("waiting") or {}, state.get("terminated") or {}
        if waiting.get("reason") not in (None, "PodInitializing"):
            return str(waiting["reason"])
        if ended.get("exitCode") and each["name"] == own_container(pod):
            return f"{ended.get('reason') or 'Error'}, exit {ended['exitCode']}"
    for condition in status.get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return str(condition.get("reason") or "Unschedulable")
    return str(status.get("reason") or status.get("phase") or "Unknown")


def pod_lines(pods: Sequence[PodView]) -> list[tuple[str, str]]:
    """State and name of each pod; of many pods their number by state."""
    if len(pods) <= MOST_PODS:
        return [(pod.state, f"{pod.name} on {pod.node}" if pod.node else pod.name) for pod in pods]
    return [
        (state, f"{number} of {len(pods)} pods")
        for state, number in Counter(pod.state for pod in pods).items()
    ]


def _pod(pod: Json) -> PodView:
    return PodView(
        pod["metadata"]["name"], _printable(pod_state(pod)), (pod.get("spec") or {}).get("nodeName") or ""
    )


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def _tokens(budget: object) -> int | None:
    try:
        return parse_tokens(budget)
    except ValueError:
        return None
