"""Observation of a run and of the children that its status names: live API objects in, the inputs of plan()
out.

Every object is read from the API server at the time of the call, never from a cache. Nothing is decided here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from distill_operator import pod_diagnosis
from distill_operator.kube import CONFIGMAP, EVENT, JOB, POD, PYTORCHJOB, Json, Kind, Kube
from vpmoe.api import DistillRun, Invalid, labels
from vpmoe.api.status import Status

POD_LABEL = {JOB.name: "batch.kubernetes.io/job-name", PYTORCHJOB.name: "training.kubeflow.org/job-name"}

State = Literal["Waiting", "Running", "Ending", "Succeeded", "Failed"]


@dataclass(frozen=True)
class ObservedRun:
    """A DistillRun as the API server returned it.

    `run` is None if its spec is invalid; `invalid` then says why.
    """

    name: str
    namespace: str
    uid: str
    generation: int
    created: datetime
    deleting: bool
    finalizers: tuple[str, ...]
    status: Status
    run: DistillRun | None
    invalid: str

    @property
    def has_finalizer(self) -> bool:
        """Whether the operator's finalizer is set."""
        return labels.FINALIZER in self.finalizers


@dataclass(frozen=True)
class ObservedChild:
    """A Job or PyTorchJob that the run owns.

    State Waiting: not all of its pods run yet. Ending: it is being deleted, or it has failed and some pods
    are still alive.
    """

    kind: str
    name: str
    uid: str
    state: State
    deleting: bool = False
    suspended: bool = False
    """Kueue or a user has suspended it: it waits without pods."""
    missing_pod: str = ""
    """Of a Waiting PyTorchJob: a pod that does not exist or does not run. If all pods ran before, it was
    deleted."""
    message: str = ""
    """What a Waiting or Ending child waits for."""
    failure: pod_diagnosis.Failure | None = None
    """Set if the state is Failed."""

    @property
    def alive(self) -> bool:
        """Whether it may hold GPUs or write to the bucket."""
        return self.state in ("Waiting", "Running", "Ending")


@dataclass(frozen=True)
class NameConflict:
    """An object that does not belong to this run and has a name that the run needs."""

    message: str
    temporary: bool
    """It will be gone without anybody's help: it is being deleted, or its owner was an earlier run of the
    same name."""


@dataclass(frozen=True)
class ChildObservation:
    """What was found under the name of the child that a step's status records."""

    child: ObservedChild | None = None
    name_conflict: NameConflict | None = None
    create_error: str = ""
    """The API server's last rejection of the child: a quota, an admission webhook, a missing permission."""


@dataclass(frozen=True)
class ObservedChildren:
    """One observation of all children that Running steps name."""

    by_step: Mapping[str, ChildObservation] = field(default_factory=dict)
    backend_missing: bool = False
    """The cluster does not serve the resource type of runtime.backend."""


def parse_run(obj: Json) -> ObservedRun:
    """A DistillRun from the object that the API server returned."""
    meta = obj["metadata"]
    run, invalid = None, ""
    try:
        run = DistillRun.parse(obj)
    except Invalid as error:
        invalid = "; ".join(error.problems)
    return ObservedRun(
        name=meta["name"],
        namespace=meta["namespace"],
        uid=meta["uid"],
        generation=meta["generation"],
        created=datetime.fromisoformat(meta["creationTimestamp"]),
        deleting="deletionTimestamp" in meta,
        finalizers=tuple(meta.get("finalizers", ())),
        status=Status.model_validate(obj.get("status") or {}),
        run=run,
        invalid=invalid,
    )


async def observe_child(
    kube: Kube, observed: ObservedRun, kind: Kind, name: str, config_map: str
) -> ChildObservation:
    """Observe the child `name`.

    If it does not exist, check also that the name `config_map` is not taken. Raises KubeError.
    """
    obj = await kube.get(kind, observed.namespace, name)
    if obj is None:
        existing = await kube.get(CONFIGMAP, observed.namespace, config_map)
        if existing is None or is_controlled_by(existing, observed.uid):
            return ChildObservation()
        return ChildObservation(name_conflict=_name_conflict(existing, observed, CONFIGMAP))
    if not is_controlled_by(obj, observed.uid):
        return ChildObservation(name_conflict=_name_conflict(obj, observed, kind))
    state, condition = child_state(obj)
    if state in ("Running", "Succeeded"):
        return ChildObservation(child=ObservedChild(kind.name, name, obj["metadata"]["uid"], state))
    listed = await kube.list(POD, observed.namespace, labels=f"{POD_LABEL[kind.name]}={name}")
    pods = [pod for pod in listed if is_controlled_by(pod, obj["metadata"]["uid"])]
    uids = {obj["metadata"]["uid"], *(pod["metadata"]["uid"] for pod in pods)}
    warnings = await _warning_events(kube, observed.namespace, uids) if state == "Waiting" else []
    return ChildObservation(child=describe_child(obj, state, condition, pods, warnings))


def is_controlled_by(obj: Json, uid: str) -> bool:
    """Whether the object of that uid is its controller, by ownerReferences."""
    return any(
        owner["uid"] == uid and owner.get("controller")
        for owner in obj["metadata"].get("ownerReferences", [])
    )


def child_state(obj: Json) -> tuple[State, str]:
    """State of a Job or PyTorchJob, and reason and message of the condition that decides it.

    The conditions' order is irrelevant.
    """
    status = obj.get("status", {})
    true = {
        c["type"]: f"{c.get('reason', '')}: {c.get('message', '')}"
        for c in status.get("conditions", [])
        if c["status"] == "True"
    }
    for condition in ("Complete", "Succeeded"):
        if condition in true:
            return "Succeeded", true[condition]
    if "deletionTimestamp" in obj["metadata"]:
        return "Ending", "it is being deleted"
    if "Failed" in true:
        return "Failed", true["Failed"]
    if "FailureTarget" in true:  # a Job that has failed and waits for its last pods to terminate
        return "Ending", true["FailureTarget"]
    return ("Running" if _all_pods_run(obj) else "Waiting"), ""


def describe_child(
    obj: Json, state: State, condition: str, pods: list[Json], warnings: list[Json]
) -> ObservedChild:
    """A child that neither runs nor has succeeded, with what its pods and `warnings` (Events, oldest first)
    explain.
    """
    meta, spec = obj["metadata"], obj.get("spec", {})
    suspended = bool(spec.get("suspend") or spec.get("runPolicy", {}).get("suspend"))
    message, missing, failure = "", "", None
    if state == "Waiting":
        missing = _missing_pod(obj, pods)
        message = (
            f"{obj['kind']} {meta['name']} is suspended by its queue"
            if suspended
            else pod_diagnosis.waiting_reason(pods, warnings)
        )
    elif state == "Failed" and any(pod_diagnosis.is_alive(pod) for pod in pods):
        state = "Ending"  # a PyTorchJob is Failed before all of its pods end: the others may still write
    elif state == "Failed":
        failure = pod_diagnosis.failure_cause(pods, condition)
    if state == "Ending":
        alive = [pod["metadata"]["name"] for pod in pods if pod_diagnosis.is_alive(pod)]
        message = f"pod {alive[0]} is terminating" if alive else condition
    return ObservedChild(
        kind=obj["kind"],
        name=meta["name"],
        uid=meta["uid"],
        state=state,
        deleting="deletionTimestamp" in meta,
        suspended=suspended,
        missing_pod=missing,
        message=message,
        failure=failure,
    )


def _missing_pod(obj: Json, pods: list[Json]) -> str:
    """The first pod of a PyTorchJob that should run and does not.

    A Job counts its deleted pods as failed by itself.
    """
    if obj["kind"] != PYTORCHJOB.name:
        return ""
    started = {
        pod["metadata"]["name"]
        for pod in pods
        if pod.get("status", {}).get("phase") in ("Running", "Succeeded", "Failed")
    }
    replicas = obj["spec"]["pytorchReplicaSpecs"].items()
    names = [
        f"{obj['metadata']['name']}-{role.lower()}-{index}"
        for role, spec in replicas
        for index in range(spec.get("replicas", 1))
    ]
    return next((name for name in names if name not in started), "")


def _all_pods_run(obj: Json) -> bool:
    status = obj.get("status", {})
    if obj["kind"] == JOB.name:
        done = status.get("succeeded", 0)
        return bool(status.get("ready", 0) + done >= obj["spec"].get("parallelism", 1))
    replicas = obj["spec"]["pytorchReplicaSpecs"]
    counts: Any = status.get("replicaStatuses") or {}
    return all(
        (counts.get(role) or {}).get("active", 0) + (counts.get(role) or {}).get("succeeded", 0)
        >= spec.get("replicas", 1)
        for role, spec in replicas.items()
    )


def _name_conflict(obj: Json, observed: ObservedRun, kind: Kind) -> NameConflict:
    meta = obj["metadata"]
    owners = [owner for owner in meta.get("ownerReferences", []) if owner.get("controller")]
    predecessor = any(owner["kind"] == "DistillRun" and owner["name"] == observed.name for owner in owners)
    if predecessor:
        origin = "belongs to a deleted run of the same name"
    elif owners:
        origin = f"belongs to {owners[0]['kind']} {owners[0]['name']}"
    else:
        origin = "was not created by the operator"
    return NameConflict(f"{kind.name} {meta['name']} {origin}", predecessor or "deletionTimestamp" in meta)


async def _warning_events(kube: Kube, namespace: str, uids: set[str]) -> list[Json]:
    """Warning Events about any of these objects, oldest first."""
    events = await kube.list(EVENT, namespace, fields="type=Warning")
    about = [event for event in events if event.get("involvedObject", {}).get("uid") in uids]
    return sorted(about, key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "")
