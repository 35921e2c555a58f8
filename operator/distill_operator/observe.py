"""From live objects to what plan.py decides by: the run as it stands, and the children that its status names.

Everything is read from the API server at the time of asking, never from a cache; nothing is decided here.
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
    """A DistillRun as it was read. `run` is None where its spec is `invalid`, which then says why."""

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
    def finalizer(self) -> bool:
        """Whether our finalizer holds it."""
        return labels.FINALIZER in self.finalizers


@dataclass(frozen=True)
class Child:
    """A child of ours. Waiting: not all of its pods run yet. Ending: it is being stopped, or has failed with pods still alive.

    `why` is for people: what a Waiting child waits for. `failure` is there where it is Failed.
    """

    kind: str
    name: str
    uid: str
    state: State
    deleting: bool = False
    held: bool = False
    """Kueue, or somebody else, has suspended it: it waits without pods."""
    lost: str = ""
    """A Waiting PyTorchJob's pod that is not there, or not running yet: where all have run before, somebody removed it."""
    why: str = ""
    failure: pod_diagnosis.Failure | None = None

    @property
    def alive(self) -> bool:
        """Whether it may hold GPUs or write to the bucket."""
        return self.state in ("Waiting", "Running", "Ending")


@dataclass(frozen=True)
class NameConflict:
    """An object that has a name which we need, and does not belong to this run."""

    words: str
    ending: bool
    """It goes away by itself: it is being deleted, or it belonged to an earlier run of the same name."""


@dataclass(frozen=True)
class ChildObservation:
    """What has become of the child that one step names."""

    child: Child | None = None
    stranger: NameConflict | None = None
    refused: str = ""
    """What the API server said when the child was last to be made: a quota, a webhook, a right that is missing."""


@dataclass(frozen=True)
class Observed:
    """One look at the cluster."""

    children: Mapping[str, ChildObservation] = field(default_factory=dict)
    """By step, of the steps that are Running."""
    backend_missing: bool = False
    """The resource type of runtime.backend is not installed."""


def read_run(obj: Json) -> ObservedRun:
    """A DistillRun from what the API server returned."""
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


async def look(kube: Kube, live: ObservedRun, kind: Kind, name: str, config_map: str) -> ChildObservation:
    """See what has become of the child `name`. Before it was ever made, also whether `config_map` is free for it."""
    obj = await kube.get(kind, live.namespace, name)
    if obj is None:
        taken = await kube.get(CONFIGMAP, live.namespace, config_map)
        foreign = taken is not None and not owned(taken, live.uid)
        return ChildObservation(
            stranger=_stranger(taken, live, CONFIGMAP) if taken is not None and foreign else None
        )
    if not owned(obj, live.uid):
        return ChildObservation(stranger=_stranger(obj, live, kind))
    state, said = child_state(obj)
    if state in ("Running", "Succeeded"):
        return ChildObservation(child=Child(kind.name, name, obj["metadata"]["uid"], state))
    listed = await kube.list(POD, live.namespace, labels=f"{POD_LABEL[kind.name]}={name}")
    its_pods = [pod for pod in listed if owned(pod, obj["metadata"]["uid"])]
    uids = {obj["metadata"]["uid"], *(pod["metadata"]["uid"] for pod in its_pods)}
    warnings = await _warnings(kube, live.namespace, uids) if state == "Waiting" else []
    return ChildObservation(child=describe(obj, state, said, its_pods, warnings))


def owned(obj: Json, uid: str) -> bool:
    """Whether the object of that uid is its controller."""
    return any(
        owner["uid"] == uid and owner.get("controller")
        for owner in obj["metadata"].get("ownerReferences", [])
    )


def child_state(obj: Json) -> tuple[State, str]:
    """A Job's or PyTorchJob's state by its conditions that are True, whatever their order, and what the telling one says."""
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
    if "FailureTarget" in true:  # a Job that has failed and waits for its last pods to end
        return "Ending", true["FailureTarget"]
    return ("Running" if _all_run(obj) else "Waiting"), ""


def describe(obj: Json, state: State, said: str, its_pods: list[Json], warnings: list[Json]) -> Child:
    """A child that does not simply run or has not simply succeeded."""
    meta, spec = obj["metadata"], obj.get("spec", {})
    held = bool(spec.get("suspend") or spec.get("runPolicy", {}).get("suspend"))
    why, lost, failure = "", "", None
    if state == "Waiting":
        lost = _lost(obj, its_pods)
        why = (
            f"{obj['kind']} {meta['name']} is suspended by its queue"
            if held
            else pod_diagnosis.why_waiting(its_pods, warnings)
        )
    elif state == "Failed" and any(pod_diagnosis.alive(pod) for pod in its_pods):
        state = (
            "Ending"  # the survivors may still be writing: a PyTorchJob says Failed before they have ended
        )
    elif state == "Failed":
        failure = pod_diagnosis.why_failed(its_pods, said)
    if state == "Ending":
        last = [pod["metadata"]["name"] for pod in its_pods if pod_diagnosis.alive(pod)]
        why = f"pod {last[0]} is ending" if last else said
    return Child(
        obj["kind"], meta["name"], meta["uid"], state, "deletionTimestamp" in meta, held, lost, why, failure
    )


def _lost(obj: Json, its_pods: list[Json]) -> str:
    """The first pod of a PyTorchJob that should run and does not. A Job counts its lost pods as failed by itself."""
    if obj["kind"] != PYTORCHJOB.name:
        return ""
    begun = {
        pod["metadata"]["name"]
        for pod in its_pods
        if pod.get("status", {}).get("phase") in ("Running", "Succeeded", "Failed")
    }
    replicas = obj["spec"]["pytorchReplicaSpecs"].items()
    names = [
        f"{obj['metadata']['name']}-{role.lower()}-{index}"
        for role, spec in replicas
        for index in range(spec.get("replicas", 1))
    ]
    return next((name for name in names if name not in begun), "")


def _all_run(obj: Json) -> bool:
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


def _stranger(obj: Json, live: ObservedRun, kind: Kind) -> NameConflict:
    meta = obj["metadata"]
    owners = [owner for owner in meta.get("ownerReferences", []) if owner.get("controller")]
    predecessor = any(owner["kind"] == "DistillRun" and owner["name"] == live.name for owner in owners)
    whose = (
        f"belongs to {owners[0]['kind']} {owners[0]['name']}" if owners else "was not made by the operator"
    )
    if predecessor:
        whose = "belongs to a deleted run of the same name"
    return NameConflict(f"{kind.name} {meta['name']} {whose}", predecessor or "deletionTimestamp" in meta)


async def _warnings(kube: Kube, namespace: str, uids: set[str]) -> list[Json]:
    """Warning Events about any of these objects, the latest last."""
    events = await kube.list(EVENT, namespace, fields="type=Warning")
    about = [event for event in events if event.get("involvedObject", {}).get("uid") in uids]
    return sorted(about, key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "")
