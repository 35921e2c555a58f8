"""Observation of a run and of the children that its status names: live API objects in, the inputs of plan()
out.

Every object is read from the API server at the time of the call, never from a cache. Nothing is decided here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal

from pydantic import ValidationError

from distill_operator import pod_diagnosis
from distill_operator.clear_job import STEP as CLEAR_STEP
from distill_operator.clear_job import clear_job_name, is_clear_job_of
from distill_operator.kube import CHILD_KINDS, CONFIGMAP, EVENT, JOB, POD, PYTORCHJOB, Json, Kind, Kube
from distill_operator.pod_records import (
    ImageReports,
    PodAddress,
    find_record,
    on_host_network,
    reported_images,
    serving_pods,
)
from vpmoe.api import DistillRun, Invalid, labels
from vpmoe.api.status import ChildRef, Status
from vpmoe.api.termination import TerminationRecord

POD_LABEL = {JOB.name: "batch.kubernetes.io/job-name", PYTORCHJOB.name: "training.kubeflow.org/job-name"}
EXPLAINED_PODS = 3
"""Starting pods of a child whose Events are read. One that does not start is enough for the message."""
EVENTS_OF_OBJECT = 50
"""Warning Events that are read of one object: one request, however many there are."""

MAX_PROBLEMS = 3
"""Unreadable fields of a status that a message names."""

State = Literal["Waiting", "Running", "Ending", "Succeeded", "Failed"]


@dataclass(frozen=True)
class ObservedRun:
    """A DistillRun as the API server returned it.

    `run` is None if its spec is invalid or its status cannot be read; `invalid` then says why.
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
    unreadable: bool = False
    """The status was written by a version that knows more than this one. `status` is then empty, and must not
    be written: nothing may be decided about the run."""
    failure: tuple[str, str] | None = None
    """Reason and message, if the last reconcile of the run has failed."""

    @property
    def has_finalizer(self) -> bool:
        """Whether the operator's finalizer is set."""
        return labels.FINALIZER in self.finalizers


@dataclass(frozen=True)
class ObservedChild:
    """A Job or PyTorchJob that the run owns.

    State Waiting: not all of its pods run yet. Ending: it is being deleted, or it has failed and some pods
    are still alive. A pod runs, and ends, with the job's own container.
    """

    kind: str
    name: str
    uid: str
    state: State
    version: str = ""
    """Its resourceVersion."""
    deleting: bool = False
    suspended: bool = False
    """Kueue or a user has suspended it: it waits without pods."""
    missing_pod: str = ""
    """Of a PyTorchJob that is not suspended: a pod that does not exist, does not run, or was made when the
    PyTorchJob ran already. If all pods ran before, and it was not suspended and resumed since, one was
    deleted."""
    resumed: datetime | None = None
    """When a PyTorchJob was last resumed after it was suspended."""
    message: str = ""
    """What a Waiting or Ending child waits for."""
    failure: pod_diagnosis.Failure | None = None
    """Set if the state is Failed."""
    lingering: bool = False
    """It has succeeded or failed, but other containers, such as sidecars, keep its pods alive."""
    pods: tuple[PodAddress, ...] | None = None
    """The pods that serve the step's progress now; None if pods were not listed."""
    host_network: str = ""
    """A pod whose address is its node's, which is not asked for progress."""
    record: TerminationRecord | None = None
    """What the pod that got furthest recorded when it ended; None if none has, or if pods were not listed."""
    hidden: bool = False
    """It runs, and its own containers may end without a change of the object."""
    images: ImageReports = frozenset()
    """What its pods run or ran; empty if pods were not listed."""

    @property
    def ref(self) -> ChildRef:
        """As a status names it."""
        return ChildRef(kind=self.kind, name=self.name, uid=self.uid)

    @property
    def alive(self) -> bool:
        """Whether it may hold GPUs or write to the bucket."""
        return self.lingering or self.state in ("Waiting", "Running", "Ending")

    @property
    def changes_silently(self) -> bool:
        """Whether what is observed of it may change without an event of the object: why its pods do not start
        yet, which of them are still alive, or what their own containers do. The progress of pods tells of
        others that run.
        """
        if self.state == "Running" and not self.lingering:
            return self.hidden or self.pods == ()
        return self.alive and not (self.state == "Waiting" and self.suspended)


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
    may_appear: bool = False
    """It does not exist, but may do so yet: a request to create it had no answer, not long ago."""
    namespace_ends: bool = False
    """It was rejected because the namespace is being deleted: nothing can be created there any more."""


@dataclass(frozen=True)
class ObservedChildren:
    """One observation of all children that Running steps name."""

    by_step: Mapping[str, ChildObservation] = field(default_factory=dict)
    backend_missing: bool = False
    """The cluster does not serve the resource type of runtime.backend."""
    clear: ChildObservation = ChildObservation()
    """The Job that deletes the folder of a run that is being deleted."""


def parse_run(obj: Json) -> ObservedRun:
    """A DistillRun from the object that the API server returned."""
    meta = obj["metadata"]
    run, invalid, status = None, "", Status()
    try:
        run = DistillRun.parse(obj, stored=True)
    except Invalid as error:
        invalid = "; ".join(error.problems)
    unreadable = ""
    try:
        status = read_status(obj, run)
    except ValueError as error:
        run, unreadable = None, str(error)
    return ObservedRun(
        name=meta["name"],
        namespace=meta["namespace"],
        uid=meta["uid"],
        generation=meta["generation"],
        created=datetime.fromisoformat(meta["creationTimestamp"]),
        deleting="deletionTimestamp" in meta,
        finalizers=tuple(meta.get("finalizers", ())),
        status=status,
        run=run,
        invalid=unreadable or invalid,
        unreadable=bool(unreadable),
    )


def stored_status(obj: Json) -> Json:
    """The JSON of the run's status, whose fields may be of any type: another version may have written it."""
    status = obj.get("status")
    return status if isinstance(status, dict) else {}


def read_status(obj: Json, run: DistillRun | None) -> Status:
    """The status of a DistillRun, whose spec is `run` if it is valid.

    Raises ValueError, which names the fields, if this version does not understand all that it may have to
    decide about: an unknown phase, state, step or kind of child. Unknown fields are no problem: they stay as
    they are.
    """
    try:
        status = Status.model_validate(obj.get("status") or {})
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, ('status', *found['loc'])))}: {found['msg']}, not {found['input']!r:.80}"
            for found in error.errors(include_url=False)
        ]
        more = f" and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
        raise ValueError("; ".join(problems[:MAX_PROBLEMS]) + more) from None
    kinds = {step.child.kind for step in status.running if step.child is not None}
    if unknown_kinds := sorted(kinds - CHILD_KINDS.keys()):
        raise ValueError(f"status.steps: this version makes no child of kind {', '.join(unknown_kinds)}")
    if run is not None and status.started is not None and status.phase != "Succeeded":
        known = {*run.steps(), *run.optional_steps}  # runtime.report may be false since it started
        if unknown := [step.name for step in status.steps if step.name not in known]:
            raise ValueError(f"status.steps: {', '.join(unknown)} is no step of the run in this version")
    return status


async def observe_child(
    kube: Kube,
    observed: ObservedRun,
    kind: Kind,
    name: str,
    config_map: str,
    container: str,
    wants_pods: Callable[[str], bool],
    explain: bool = True,
) -> ChildObservation:
    """Observe the child `name`, in whose pods the job's own container is `container`.

    If it does not exist, check also that the name `config_map` is not taken. Pods of a child that runs are
    listed only if `wants_pods` of its uid. Its object shows that they end: a Job counts ready pods, and a pod
    whose own container has ended is not ready; a PyTorchJob counts pods, which end with their own container
    unless they have others (`hidden`). With `explain`, Events are read of pods that do not start and do not
    say why. Raises KubeError.
    """
    obj = await kube.get(kind, observed.namespace, name)
    if obj is None:
        left = await observe_pods_left(kube, observed.namespace, kind, name, config_map, container)
        if left is not None:
            return ChildObservation(child=left)
        existing = await kube.get(CONFIGMAP, observed.namespace, config_map)
        if existing is None or is_controlled_by(existing, observed.uid):
            return ChildObservation()
        return ChildObservation(name_conflict=_name_conflict(existing, observed, CONFIGMAP))
    if not is_controlled_by(obj, observed.uid):
        return ChildObservation(name_conflict=_name_conflict(obj, observed, kind))
    state, _ = child_state(obj)
    meta = obj["metadata"]
    if state == "Running" and not _is_suspended(obj) and not wants_pods(meta["uid"]):
        resumed, version = _resumed(obj), meta.get("resourceVersion", "")
        return ChildObservation(ObservedChild(kind.name, name, meta["uid"], state, version, resumed=resumed))
    return ChildObservation(child=await _describe(kube, observed.namespace, obj, container, explain))


async def observe_pods_left(
    kube: Kube, namespace: str, kind: Kind, name: str, config_map: str, container: str
) -> ObservedChild | None:
    """A child that was deleted and whose pods are still alive, as one that is Ending; None if it has none.

    `kubectl delete job` deletes the object at once and its pods afterwards: they hold their GPUs and write to
    the bucket while they save a checkpoint. With --cascade=orphan they go on. They are the run's if they
    mount its ConfigMap, whose name no other run has.
    """
    listed = await _list_pods(kube, namespace, kind.name, name, lambda pod: _mounts(pod, config_map))
    pods = [pod for pod in listed if pod_diagnosis.is_alive(pod)]
    if not pods:
        return None
    pod = pods[0]["metadata"]
    doing = pod_diagnosis.TERMINATING if pod_diagnosis.is_terminating(pods[0]) else "is still alive"
    return ObservedChild(
        kind=kind.name,
        name=name,
        uid=controller_uid(pods[0]) or "",
        state="Ending",
        deleting=True,
        message=f"{kind.name} {name} was deleted, and its pod {pod['name']} {doing}",
        pods=serving_pods(pods, container),
        record=find_record(listed, container),
    )


def _mounts(pod: Json, config_map: str) -> bool:
    volumes = pod["spec"].get("volumes") or []
    return any(volume.get("configMap", {}).get("name") == config_map for volume in volumes)


async def _describe(
    kube: Kube, namespace: str, obj: Json, container: str, explain: bool = True
) -> ObservedChild:
    """A Job or PyTorchJob with what its pods tell. Raises KubeError."""
    state, condition = child_state(obj)
    meta = obj["metadata"]
    pods = await _list_pods(
        kube, namespace, obj["kind"], meta["name"], lambda pod: is_controlled_by(pod, meta["uid"])
    )
    unexplained = explain and state == "Waiting" and not _is_suspended(obj)
    if unexplained and not pod_diagnosis.stated_reason(pods, container):
        warnings = await _warning_events(kube, namespace, _unexplained(obj, pods, container))
    else:
        warnings = []
    child = describe_child(obj, state, condition, pods, warnings, container)
    shared = obj["kind"] == PYTORCHJOB.name and any(pod_diagnosis.is_shared(pod, container) for pod in pods)
    return replace(
        child,
        pods=serving_pods(pods, container),
        host_network=next((pod["metadata"]["name"] for pod in pods if on_host_network(pod)), ""),
        record=find_record(pods, container),
        images=reported_images(pods, container),
        hidden=child.state == "Running" and (shared or state != "Running"),
    )


async def _list_pods(
    kube: Kube, namespace: str, kind: str, name: str, is_own: Callable[[Json], bool]
) -> list[Json]:
    """The pods of the child that are its own, without what is not used. Others may have its label: anybody
    may create pods with it, and as many as he likes. Raises KubeError.
    """
    return [
        _without_unused(pod)
        async for page in kube.pages(POD, namespace, labels=f"{POD_LABEL[kind]}={name}")
        for pod in page
        if is_own(pod)
    ]


def _without_unused(pod: Json) -> Json:
    """A pod without its annotations, and of its spec the names and images of its containers: the rest takes
    most of its memory.
    """
    meta = {name: value for name, value in pod["metadata"].items() if name != "annotations"}
    containers = [
        {"name": container["name"], "image": container.get("image", "")}
        for container in pod.get("spec", {}).get("containers", [])
    ]
    return {"metadata": meta, "spec": {"containers": containers}, "status": pod.get("status", {})}


async def observe_clear_job(kube: Kube, observed: ObservedRun, run: DistillRun) -> ChildObservation:
    """Observe the Job that deletes the run's folder. Raises KubeError."""
    name = clear_job_name(run)
    obj = await kube.get(JOB, observed.namespace, name)
    if obj is None:
        return ChildObservation()
    if not is_clear_job_of(obj, observed.uid):
        conflict = NameConflict(f"Job {name} was not created by the operator", False)
        return ChildObservation(name_conflict=conflict)
    return ChildObservation(child=await _describe(kube, observed.namespace, obj, CLEAR_STEP))


def is_controlled_by(obj: Json, uid: str) -> bool:
    """Whether the object of that uid is its controller, by ownerReferences."""
    return controller_uid(obj) == uid


def controller_uid(obj: Json) -> str | None:
    """Uid of its controller, of which it has at most one."""
    owners = obj["metadata"].get("ownerReferences", [])
    return next((owner["uid"] for owner in owners if owner.get("controller")), None)


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
    obj: Json, state: State, condition: str, pods: list[Json], warnings: list[Json], container: str
) -> ObservedChild:
    """A child, with what its pods and `warnings` (Events, oldest first) explain.

    `state` and `condition` are those of the object, `container` is the job's own container. The result's
    state is that of the own containers.
    """
    meta, suspended = obj["metadata"], _is_suspended(obj)
    message, missing, failure, lingering = "", "", None, False
    if state in ("Waiting", "Running", "Failed") and not suspended:
        state, lingering = _state_of_own_containers(obj, state, pods, container)
    if state == "Succeeded":
        pass
    elif lingering:
        failure = pod_diagnosis.failure_cause(pods, condition, container)
    elif state == "Waiting" and suspended:
        queue = meta.get("labels", {}).get(labels.KUEUE_QUEUE)
        until = f"Kueue admits it to queue {queue}" if queue else "its suspend is false again"
        message = f"{obj['kind']} {meta['name']} is suspended until {until}"
    elif state == "Waiting":
        missing = _missing_pod(obj, pods) or _replaced_pod(obj, pods)
        message = pod_diagnosis.waiting_reason(pods, warnings, container)
    elif state == "Running":
        missing = _replaced_pod(obj, pods)
    elif state == "Failed" and any(pod_diagnosis.is_alive(pod) for pod in pods):
        state = "Ending"  # a PyTorchJob is Failed before all of its pods end: the others may still write
    elif state == "Failed":
        failure = pod_diagnosis.failure_cause(pods, condition, container)
    if state == "Ending":
        alive = [pod["metadata"]["name"] for pod in pods if pod_diagnosis.is_alive(pod)]
        message = f"pod {alive[0]} {pod_diagnosis.TERMINATING}" if alive else condition
    return ObservedChild(
        kind=obj["kind"],
        name=meta["name"],
        uid=meta["uid"],
        state=state,
        version=meta.get("resourceVersion", ""),
        deleting="deletionTimestamp" in meta,
        suspended=suspended,
        missing_pod=missing,
        resumed=_resumed(obj),
        message=message,
        failure=failure,
        lingering=lingering,
    )


def _state_of_own_containers(obj: Json, state: State, pods: list[Json], container: str) -> tuple[State, bool]:
    """The child's state by its own containers, and whether only other containers keep its pods alive.

    Other containers make the state of the object that of whole pods: one that does not end hides that the
    step has, one that fails makes the object fail, one that is not ready hides that the step runs.
    """
    codes = [pod_diagnosis.exit_code(pod, container) for pod in pods]
    phases = [pod.get("status", {}).get("phase") for pod in pods]
    held = any(pod_diagnosis.is_held_by_others(pod, container) for pod in pods)
    alive = any(pod_diagnosis.is_alive(pod) for pod in pods)
    succeeded = codes.count(0)
    if obj["kind"] == JOB.name:  # it has counted its succeeded pods, of which some may be deleted
        counted = sum(code == 0 and phase == "Succeeded" for code, phase in zip(codes, phases, strict=True))
        succeeded += obj.get("status", {}).get("succeeded", 0) - counted
    if succeeded >= _pods_wanted(obj) and (held or not alive):
        return "Succeeded", held
    if state == "Failed":
        return state, False
    if held and any(
        code not in (None, 0) and pod_diagnosis.is_held_by_others(pod, container)
        for pod, code in zip(pods, codes, strict=True)
    ):
        return "Failed", True
    if any(pod_diagnosis.is_terminating(pod) for pod in pods):
        return state, False
    running = sum(pod_diagnosis.is_running(pod, container) for pod in pods)
    failed = sum(code not in (None, 0) for code in codes)
    if state == "Waiting" and running + failed + succeeded >= _pods_wanted(obj):
        return "Running", False  # if all have ended: until the controller has seen it
    return state, False


def _pods_wanted(obj: Json) -> int:
    """Number of pods that a Job or PyTorchJob has when all of its pods run."""
    if obj["kind"] == JOB.name:
        return int(obj["spec"].get("parallelism", 1))
    return sum(spec.get("replicas", 1) for spec in obj["spec"]["pytorchReplicaSpecs"].values())


def _is_suspended(obj: Json) -> bool:
    """Whether Kueue or a user has suspended the Job or PyTorchJob."""
    spec = obj.get("spec", {})
    return bool(spec.get("suspend") or spec.get("runPolicy", {}).get("suspend"))


def _missing_pod(obj: Json, pods: list[Json]) -> str:
    """The first pod of a PyTorchJob that should run and does not.

    A Job counts its deleted pods as failed by itself. While a PyTorchJob has the condition Suspended, its
    controller has not made the pods again yet, although Kueue has resumed it.
    """
    if obj["kind"] != PYTORCHJOB.name or _condition(obj, "Suspended").get("status") == "True":
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


def _replaced_pod(obj: Json, pods: list[Json]) -> str:
    """The only pod of a PyTorchJob if it is younger than the condition Running: its controller has made it in
    the place of one that was deleted, which it may do faster than the operator looks.

    Of several pods one may have been made later for want of quota. If one of them is replaced, the others
    lose their connection to it and fail.
    """
    since = _since(obj, "Running", "True")
    if obj["kind"] != PYTORCHJOB.name or _pods_wanted(obj) > 1 or since is None:
        return ""
    made = {pod["metadata"]["name"]: pod["metadata"]["creationTimestamp"] for pod in pods}
    return next((name for name, time in made.items() if datetime.fromisoformat(time) > since), "")


def _resumed(obj: Json) -> datetime | None:
    """When the PyTorchJob was resumed; None if it never was, or is suspended."""
    return _since(obj, "Suspended", "False")


def _since(obj: Json, name: str, status: str) -> datetime | None:
    """Since when the condition has this status; None if it has another one or does not exist."""
    condition = _condition(obj, name)
    time = condition.get("lastTransitionTime")
    return datetime.fromisoformat(time) if time and condition["status"] == status else None


def _condition(obj: Json, name: str) -> Json:
    """The condition of that type of a Job or PyTorchJob; empty if it does not exist."""
    conditions = obj.get("status", {}).get("conditions", [])
    return next((found for found in conditions if found["type"] == name), {})


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


def _unexplained(obj: Json, pods: list[Json], container: str) -> list[str]:
    """Uids of the objects whose Events may explain why a child waits: the child if pods of it are missing,
    and its first pods that do not start.
    """
    starting = [pod["metadata"]["uid"] for pod in pod_diagnosis.starting(pods, container)]
    child = [obj["metadata"]["uid"]] if len(pods) < _pods_wanted(obj) else []
    return [*child, *starting[:EXPLAINED_PODS]]


async def _warning_events(kube: Kube, namespace: str, uids: list[str]) -> list[Json]:
    """Warning Events about these objects, oldest first, at most EVENTS_OF_OBJECT of each.

    The number of other Events of the namespace does not matter: they are not transferred.
    """
    events = []
    for uid in uids:
        fields = f"involvedObject.uid={uid},type=Warning"
        events += await kube.list_first(EVENT, namespace, EVENTS_OF_OBJECT, fields)
    return sorted(events, key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "")
