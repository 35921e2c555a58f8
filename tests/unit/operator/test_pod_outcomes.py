"""The outcome of a child, from pods as the API server returns them: disruptions, evictions for a limit of the
pod's own, and containers that others have added.

Reasons and messages are those of Kubernetes 1.36 (pkg/kubelet/eviction, nodeshutdown, preemption, lifecycle;
pkg/controller/podgc, tainteviction; pkg/registry/core/pod/storage/eviction.go).
"""

import asyncio
import json
from typing import Any

import pytest
from distill_operator.connection import Answer
from distill_operator.kube import JOB, PYTORCHJOB, Kube
from distill_operator.observe import (
    EVENTS_OF_OBJECT,
    EXPLAINED_PODS,
    ObservedChild,
    child_state,
    describe_child,
    observe_child,
)
from distill_operator.pod_diagnosis import Failure, failure_cause
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes.fake_api import MemoryConnection, Request, answer
from tests.fakes.simulated_cluster import UID, observed_run

Json = dict[str, Any]
JOB_UID = "5b0d1c52-5b0f-4c5e-9f0e-2a4f6a1f0c11"
OWN = "train"

RUNNING: Json = {"running": {"startedAt": "2026-11-28T09:00:05Z"}}
CREATING: Json = {"waiting": {"reason": "ContainerCreating"}}
BACKED_OFF: Json = {
    "waiting": {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "sidecar:1"'}
}


def ended(code: int, message: str = "", reason: str = "", at: str = "2026-11-28T09:04:00Z") -> Json:
    """State of a container that has ended."""
    terminated = {
        "exitCode": code,
        "reason": reason or ("Completed" if code == 0 else "Error"),
        "startedAt": "2026-11-28T09:00:05Z",
        "finishedAt": at,
        "containerID": "containerd://6f2c…",
    }
    return {"terminated": {**terminated, **({"message": message} if message else {})}}


def reported(code: int, kind: str, message: str = "said by the job") -> Json:
    """State of a job's container that has written its record to the termination message."""
    return ended(code, json.dumps({"class": kind, "rank": 0, "exit": code, "message": message}))


def container(name: str, state: Json, native: bool = False) -> Json:
    """A container's entry in a pod's status. `native`: a restartable init container."""
    return {
        "name": name,
        "image": "vpmoe/trainer:1",
        "imageID": "sha256:0d5c…",
        "ready": "running" in state,
        "restartCount": 0,
        "started": "running" in state,
        "state": state,
        "lastState": {},
        **({"allocatedResources": {"cpu": "10m"}} if native else {}),
    }


def pod(
    own: Json | None,
    phase: str = "Failed",
    name: str = "run-vanilla-a1-0-x7k2p",
    beside: list[Json] | None = None,
    native: list[Json] | None = None,
    disruption: Json | None = None,
    reason: str = "",
    message: str = "",
    job: str = "Job",
) -> Json:
    """A pod of a child. `own`: state of the job's own container; None if the kubelet never made one.

    `beside`: states of old-style sidecars, first in the list. `native`: of native ones.
    """
    named = [container(f"agent-{index}", state) for index, state in enumerate(beside or [])]
    statuses = [*named, *([container(OWN, own)] if own is not None else [])]
    init = [container(f"mesh-{index}", state, native=True) for index, state in enumerate(native or [])]
    ready = phase == "Running" and all("running" in one["state"] for one in [*statuses, *init])
    conditions = [
        {"type": "PodReadyToStartContainers", "status": "True", "lastProbeTime": None},
        {"type": "Initialized", "status": "True", "lastProbeTime": None},
        {"type": "Ready", "status": "True" if ready else "False", "lastProbeTime": None},
        {"type": "ContainersReady", "status": "True" if ready else "False", "lastProbeTime": None},
        {"type": "PodScheduled", "status": "True", "lastProbeTime": None},
        *([disruption] if disruption else []),
    ]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": "team",
            "uid": f"uid-of-{name}",
            "labels": {"batch.kubernetes.io/job-name": "run-vanilla-a1", "vpmoe.dev/step": "vanilla"},
            "ownerReferences": [
                {
                    "apiVersion": "v1",
                    "kind": job,
                    "name": "run-vanilla-a1",
                    "uid": JOB_UID,
                    "controller": True,
                }
            ],
        },
        "spec": {
            "nodeName": "gpu-1",
            "restartPolicy": "Never",
            "initContainers": [{"name": one["name"], "restartPolicy": "Always"} for one in init],
            "containers": [{"name": one["name"]} for one in statuses],
        },
        "status": {
            "phase": phase,
            "qosClass": "Burstable",
            "startTime": "2026-11-28T09:00:00Z",
            "conditions": conditions if own is not None else [*([disruption] if disruption else [])],
            **({"containerStatuses": statuses} if statuses else {}),
            **({"initContainerStatuses": init} if init else {}),
            **({"reason": reason} if reason else {}),
            **({"message": message} if message else {}),
        },
    }


def disrupted(reason: str, message: str, status: str = "True") -> Json:
    return {
        "type": "DisruptionTarget",
        "status": status,
        "reason": reason,
        "message": message,
        "lastProbeTime": None,
        "lastTransitionTime": "2026-11-28T09:04:00Z",
    }


LOW = (
    "The node was low on resource: ephemeral-storage. Threshold quantity: 2Gi, available: 1Gi. "
    "Container train was using 9Gi, request is 0, has larger consumption of ephemeral-storage. "
)
SHUTDOWN = "Pod was terminated in response to imminent node shutdown."

INTERRUPTED = {
    "drained": pod(
        reported(143, "Terminated"), disruption=disrupted("EvictionByEvictionAPI", "Eviction API")
    ),
    "preempted by the scheduler": pod(
        ended(137), disruption=disrupted("PreemptionByScheduler", "default-scheduler: preempting to …")
    ),
    "evicted under node pressure": pod(
        ended(137),
        reason="Evicted",
        message=LOW,
        disruption=disrupted("TerminationByKubelet", LOW),
    ),
    "node shut down": pod(
        ended(143),
        reason="Terminated",
        message=SHUTDOWN,
        disruption=disrupted("TerminationByKubelet", SHUTDOWN),
    ),
    "preempted by the kubelet": pod(
        ended(137),
        reason="Preempting",
        message="Preempted in order to admit critical pod",
        disruption=disrupted("TerminationByKubelet", "Pod was preempted by Kubelet to …"),
    ),
    "node tainted": pod(
        ended(137), disruption=disrupted("DeletionByTaintManager", "Taint manager: deleting due to NoExecute")
    ),
    "device tainted": pod(
        ended(137), disruption=disrupted("DeletionByDeviceTaintManager", "Device Taint manager: deleting …")
    ),
    "node deleted": pod(RUNNING, disruption=disrupted("DeletionByPodGC", "PodGC: node no longer exists")),
    "node lost": pod(RUNNING, reason="NodeLost", message="Node gpu-1 which was running pod is unresponsive"),
    "node restarted, by the kubelet": pod(
        ended(137, "The container could not be located when the pod was terminated", "ContainerStatusUnknown")
    ),
    "node restarted, by containerd": pod(ended(255, reason="Unknown")),
    "rejected under node pressure": pod(
        None, reason="Evicted", message="Pod was rejected: The node had condition: [DiskPressure]. "
    ),
    "rejected for a GPU that is gone": pod(
        None,
        reason="OutOfnvidia.com/gpu",
        message="Pod was rejected: Node didn't have enough resource: nvidia.com/gpu, requested: 1, used: 0",
    ),
    "rejected by a device plugin": pod(
        None, reason="UnexpectedAdmissionError", message="Pod was rejected: Allocate failed due to …"
    ),
    "rejected by a changed label": pod(
        None, reason="NodeAffinity", message="Pod was rejected: Predicate NodeAffinity failed: …"
    ),
    "rejected in a node shutdown": pod(
        None,
        reason="NodeShutdown",
        message="Pod was rejected: Pod was rejected as the node is shutting down.",
    ),
    "stopped by a signal, as the job says": pod(reported(143, "Terminated")),
}
OWN_LIMIT = {
    "container's ephemeral storage": 'Container train exceeded its local ephemeral storage limit "4Ki". ',
    "pod's ephemeral storage": (
        "Pod ephemeral local storage usage exceeds the total limit of containers 4Ki. "
    ),
    "size of an emptyDir": 'Usage of EmptyDir volume "tmp" exceeds the limit "1Gi". ',
}
FAILED = {
    "no longer a target of a disruption": pod(
        ended(70), disruption=disrupted("EvictionByEvictionAPI", "Eviction API", "False")
    ),
    "deadline": pod(
        ended(137), reason="DeadlineExceeded", message="Pod was active on the node longer than …"
    ),
    "killed": pod(ended(137)),
    "out of memory": pod(ended(137, reason="OOMKilled")),
    "rejected for what its node never offers": pod(
        None, reason="SysctlForbidden", message="Pod was rejected: forbidden sysctl: …"
    ),
}


@pytest.mark.parametrize("case", INTERRUPTED)
def test_only_disruptions_and_lost_nodes_are_interruptions(case: str) -> None:
    assert failure_cause([INTERRUPTED[case]], "", OWN).kind == "Interrupted"


@pytest.mark.parametrize("case", FAILED)
def test_everything_else_that_stops_a_pod_is_the_runs_failure(case: str) -> None:
    assert failure_cause([FAILED[case]], "", OWN).kind == "Error"


@pytest.mark.parametrize("own", [ended(137), reported(143, "Terminated"), reported(65, "Permanent"), None])
@pytest.mark.parametrize("limit", OWN_LIMIT)
def test_an_eviction_for_the_pods_own_limit_is_the_runs_failure_and_says_what_to_raise(
    limit: str, own: Json | None
) -> None:
    evicted = pod(own, reason="Evicted", message=OWN_LIMIT[limit])
    later = pod(ended(70, at="2026-11-28T09:03:00Z"), name="run-vanilla-a1-1-zzzzz")
    for pods in ([evicted], [later, evicted]):
        cause = failure_cause(pods, "", OWN)
        assert cause.kind == "Error"
        assert OWN_LIMIT[limit].strip() in cause.message
        assert "raise runtime.resources" in cause.message


def test_a_termination_message_of_any_form_is_read() -> None:
    for message in (
        '{"message": "x", "class": []}',
        '{"message": 1}',
        "[1]",
        '{"class": {}, "message": "x"}',
    ):
        assert failure_cause([pod(ended(70, message))], "", OWN).kind == "Error"


OTHER_STATE = st.one_of(
    st.just(RUNNING),
    st.just(CREATING),
    st.just(BACKED_OFF),
    st.builds(
        ended, st.sampled_from([0, 1, 65, 75, 137, 143, 255]), reason=st.sampled_from(["", "OOMKilled"])
    ),
)
SIDECARS = st.lists(OTHER_STATE, max_size=3)
OWN_ENDS = st.one_of(
    st.builds(ended, st.integers(1, 255)),
    st.builds(
        reported, st.integers(1, 255), st.sampled_from(["Permanent", "Retriable", "Terminated", "Internal"])
    ),
)


@settings(max_examples=200, derandomize=True)
@given(own=OWN_ENDS, beside=SIDECARS, native=SIDECARS, phase=st.sampled_from(["Running", "Failed"]))
def test_no_container_that_others_added_hides_an_exit_code(
    own: Json, beside: list[Json], native: list[Json], phase: str
) -> None:
    alone = failure_cause([pod(own)], "", OWN)
    assert failure_cause([pod(own, phase, beside=beside, native=native)], "", OWN) == alone


def job(status: Json, kind: str = "Job", pods: int = 1) -> Json:
    """A child of so many pods."""
    spec = (
        {"parallelism": pods, "completions": pods, "backoffLimit": 0}
        if kind == "Job"
        else {
            "pytorchReplicaSpecs": {
                "Master": {"replicas": 1},
                **({"Worker": {"replicas": pods - 1}} if pods > 1 else {}),
            }
        }
    )
    return {
        "apiVersion": "batch/v1" if kind == "Job" else "kubeflow.org/v1",
        "kind": kind,
        "metadata": {
            "name": "run-vanilla-a1",
            "namespace": "team",
            "uid": JOB_UID,
            "resourceVersion": "1",
            "ownerReferences": [{"kind": "DistillRun", "name": "first", "uid": UID, "controller": True}],
        },
        "spec": spec,
        "status": status,
    }


def condition(kind: str) -> Json:
    return {"type": kind, "status": "True", "reason": "BackoffLimitExceeded", "message": "Job has failed"}


def described(obj: Json, pods: list[Json]) -> ObservedChild:
    """The child as observe_child describes it."""
    state, message = child_state(obj)
    return describe_child(obj, state, message, pods, [], OWN)


def pytorch_pods(*pods: Json) -> list[Json]:
    names = ["run-vanilla-a1-master-0", *(f"run-vanilla-a1-worker-{index}" for index in range(len(pods) - 1))]
    return [
        {**one, "metadata": {**one["metadata"], "name": name, "uid": f"uid-of-{name}"}}
        for name, one in zip(names, pods, strict=True)
    ]


def alive_job(kind: str, pods: int) -> Json:
    """A child whose pods are in phase Running and are not all ready, because a container has ended."""
    if kind == "Job":
        return job({"active": pods, "ready": 0}, pods=pods)
    active = {"Master": {"active": 1}, "Worker": {"active": pods - 1}}
    return job({"conditions": [{"type": "Running", "status": "True"}], "replicaStatuses": active}, kind, pods)


@pytest.mark.parametrize("kind", ["Job", "PyTorchJob"])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("other", [RUNNING, BACKED_OFF], ids=["does not end", "never starts"])
def test_a_child_has_succeeded_when_all_of_its_own_containers_have_whatever_others_do(
    kind: str, count: int, other: Json
) -> None:
    pods = pytorch_pods(*[pod(ended(0), "Running", beside=[other], job=kind)] * count)
    child = described(alive_job(kind, count), pods)
    assert (child.state, child.lingering, child.alive, child.failure) == ("Succeeded", True, True, None)
    if count > 1:
        pods[-1] = pytorch_pods(*[pod(RUNNING, "Running", beside=[RUNNING], job=kind)] * count)[-1]
        child = described(alive_job(kind, count), pods)
        assert (child.state, child.lingering) == ("Running", False), "its other pods work"


@pytest.mark.parametrize("kind", ["Job", "PyTorchJob"])
def test_a_child_has_failed_when_one_of_its_own_containers_has_whatever_others_do(kind: str) -> None:
    refused = pod(reported(65, "Permanent"), "Running", beside=[RUNNING], job=kind)
    works = pod(RUNNING, "Running", beside=[RUNNING], job=kind)
    child = described(alive_job(kind, 2), pytorch_pods(works, refused))
    assert (child.state, child.lingering, child.alive) == ("Failed", True, True)
    assert child.failure is not None
    assert child.failure.kind == "Permanent"
    assert "container train, exit 65" in child.failure.message


@pytest.mark.parametrize("kind", ["Job", "PyTorchJob"])
@pytest.mark.parametrize("own", [ended(0), reported(143, "Terminated"), ended(137)])
def test_a_pod_that_is_being_deleted_is_not_held_by_its_sidecar(kind: str, own: Json) -> None:
    """Its sidecar has its grace period. Why it is deleted, the child says, or its being gone."""
    stopping = pod(own, "Running", beside=[RUNNING], job=kind)
    stopping["metadata"]["deletionTimestamp"] = "2026-11-28T09:05:00Z"
    child = described(alive_job(kind, 1), pytorch_pods(stopping))
    assert (child.state, child.lingering) == ("Waiting" if kind == "Job" else "Running", False)
    suspended = alive_job(kind, 1)
    suspended["spec"] |= {"suspend": True} if kind == "Job" else {"runPolicy": {"suspend": True}}
    suspended["status"]["replicaStatuses"] = {}
    child = described(suspended, pytorch_pods(pod(own, "Running", beside=[RUNNING], job=kind)))
    assert (child.state, child.suspended, child.lingering) == ("Waiting", True, False), "Kueue takes it back"


def test_a_pod_on_a_lost_node_does_not_run_although_its_container_is_said_to() -> None:
    tainted = disrupted("DeletionByTaintManager", "Taint manager: deleting due to NoExecute taint")
    lost = pod(RUNNING, "Running", disruption=tainted)
    lost["metadata"]["deletionTimestamp"] = "2026-11-28T09:05:00Z"
    child = described(job({"active": 1, "ready": 0}), [lost])
    assert child.state == "Waiting"
    assert child.message == (
        "pod run-vanilla-a1-0-x7k2p was disrupted "
        "(DeletionByTaintManager: Taint manager: deleting due to NoExecute taint) and is terminating"
    )


def test_a_native_sidecar_is_left_to_the_kubelet() -> None:
    """The kubelet ends native sidecars when the other containers have: the pod's logs need not be lost."""
    for own in (ended(0), ended(70)):
        child = described(alive_job("Job", 1), [pod(own, "Running", native=[RUNNING])])
        assert (child.state, child.lingering) == ("Running", False)
    refused = pod(reported(65, "Permanent"), native=[ended(143)])
    cause = described(job({"failed": 1, "conditions": [condition("Failed")]}), [refused]).failure
    assert cause is not None
    assert cause.kind == "Permanent"


def test_a_child_that_failed_only_because_a_sidecar_did_has_succeeded() -> None:
    failed = job({"failed": 1, "conditions": [condition("Failed")]})
    child = described(failed, [pod(ended(0), beside=[ended(1)])])
    assert (child.state, child.lingering, child.failure) == ("Succeeded", False, None)
    counted = job({"succeeded": 1, "failed": 1, "conditions": [condition("Failed")]}, pods=2)
    assert described(counted, [pod(ended(0), beside=[ended(1)])]).state == "Succeeded", "one pod is deleted"


def test_the_failure_of_a_sidecar_is_the_cause_if_it_stopped_the_other_pods() -> None:
    failed = job({"failed": 2, "conditions": [condition("Failed")]}, pods=2)
    pods = [pod(ended(0), beside=[ended(1)]), pod(reported(143, "Terminated"), name="other")]
    cause = described(failed, pods).failure
    assert cause is not None
    assert (cause.kind, "container agent-0, exit 1: container train had succeeded" in cause.message) == (
        "Error",
        True,
    )


def test_an_init_container_of_others_that_fails_is_named() -> None:
    failed = job({"failed": 1, "conditions": [condition("Failed")]})
    cause = described(failed, [pod({"waiting": {"reason": "PodInitializing"}}, native=[ended(65)])]).failure
    assert cause is not None
    assert (cause.kind, "container mesh-0, exit 65: container train did not run" in cause.message) == (
        "Error",
        True,
    )


@pytest.mark.parametrize("kind", ["Job", "PyTorchJob"])
def test_a_child_runs_when_its_own_containers_do_although_a_sidecar_is_not_ready(kind: str) -> None:
    pods = pytorch_pods(*[pod(RUNNING, "Running", beside=[BACKED_OFF], job=kind)] * 2)
    assert described(alive_job(kind, 2), pods).state == "Running"
    starts = pytorch_pods(
        pod(RUNNING, "Running", beside=[BACKED_OFF], job=kind), pod(CREATING, "Pending", job=kind)
    )
    child = described(job({"active": 2, "ready": 0}, pods=2), starts)
    assert (child.state, child.message) == ("Waiting", "pod run-vanilla-a1-worker-0 is starting")


@settings(max_examples=200, derandomize=True)
@given(
    owns=st.lists(st.one_of(st.just(RUNNING), st.just(ended(0)), OWN_ENDS), min_size=1, max_size=3),
    beside=SIDECARS,
)
def test_the_state_of_a_child_follows_from_its_own_containers(owns: list[Json], beside: list[Json]) -> None:
    """A child of pods that others keep alive is what it would be without them."""
    held = [RUNNING, *beside]
    pods = [pod(own, "Running", name=f"p-{index}", beside=held) for index, own in enumerate(owns)]
    child = described(alive_job("Job", len(owns)), pods)
    codes = [own.get("terminated", {}).get("exitCode") for own in owns]
    if any(code not in (None, 0) for code in codes):
        alone = [pod(own, name=f"p-{index}") for index, own in enumerate(owns) if "terminated" in own]
        assert (child.state, child.failure) == ("Failed", failure_cause(alone, "", OWN))
    else:
        assert child.state == ("Succeeded" if all(code == 0 for code in codes) else "Running")
    assert child.lingering == (child.state != "Running")
    assert child.alive


class ApiServer:
    """Answers GET requests with objects, and keeps the requests: what a real one does not tell."""

    def __init__(self, obj: Json, pods: list[Json], events: dict[str, list[Json]] | None = None) -> None:
        self.obj, self.pods, self.events = obj, pods, events or {}
        self.event_requests: list[tuple[str, int]] = []

    def __call__(self, request: Request) -> Answer:
        path, query = request.path, request.query
        if path.endswith("/pods"):
            items = self.pods
        elif path.endswith("/events"):
            selector = dict(pair.split("=") for pair in query["fieldSelector"].split(","))
            assert selector["type"] == "Warning"
            uid, limit = selector["involvedObject.uid"], int(query["limit"])
            self.event_requests.append((uid, limit))
            items = self.events.get(uid, [])[:limit]
            more = "next" if len(self.events.get(uid, [])) > limit else ""
            return answer(200, {"items": items, "metadata": {"continue": more}})
        else:
            return answer(200, self.obj)
        return answer(200, {"items": items, "metadata": {}})

    def observe(self) -> ObservedChild:
        async def call() -> ObservedChild:
            kind = JOB if self.obj["kind"] == "Job" else PYTORCHJOB
            found = await observe_child(
                Kube(MemoryConnection(self)),
                observed_run(),
                kind,
                "run-vanilla-a1",
                "config",
                OWN,
                lambda uid: True,
            )
            assert found.child is not None
            return found.child

        return asyncio.run(call())


def warning(about: str, message: str, at: str) -> Json:
    return {
        "type": "Warning",
        "reason": "FailedMount",
        "message": message,
        "lastTimestamp": at,
        "involvedObject": {"kind": "Pod", "name": about, "uid": f"uid-of-{about}"},
    }


def test_events_are_read_only_of_objects_that_do_not_explain_themselves_and_bounded() -> None:
    unscheduled = pod(None, "Pending")
    unscheduled["status"]["conditions"] = [
        {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes"}
    ]
    api = ApiServer(job({"active": 1}), [unscheduled])
    assert api.observe().message == "pod run-vanilla-a1-0-x7k2p cannot be scheduled: 0/1 nodes"
    assert api.event_requests == []

    names = [f"p-{index}" for index in range(20)]
    pods = [pod(CREATING, "Pending", name=name) for name in names]
    events = {
        f"uid-of-{name}": [warning(name, f"{n} of {name}", f"2026-11-28T09:00:{n:02}Z") for n in range(60)]
        for name in names
    }
    api = ApiServer(job({"active": 20}, pods=20), pods, events)
    assert api.observe().message == f"pod p-2: FailedMount: {EVENTS_OF_OBJECT - 1} of p-2"
    assert api.event_requests == [(f"uid-of-p-{n}", EVENTS_OF_OBJECT) for n in range(EXPLAINED_PODS)]


def test_events_of_the_child_are_read_while_pods_of_it_are_missing() -> None:
    forbidden = {
        "involvedObject": {"kind": "Job", "name": "run-vanilla-a1", "uid": JOB_UID},
        "reason": "FailedCreate",
        "message": 'pods "run-vanilla-a1-1-" is forbidden: exceeded quota',
        "lastTimestamp": "2026-11-28T09:00:01Z",
    }
    api = ApiServer(job({}), [], {JOB_UID: [forbidden]})
    assert "job run-vanilla-a1: FailedCreate: pods" in api.observe().message
    suspended = job({})
    suspended["spec"]["suspend"] = True
    api = ApiServer(suspended, [])
    assert api.observe().suspended
    assert api.event_requests == []


def test_a_pytorchjob_that_counts_its_pods_as_active_has_ended_with_its_own_containers() -> None:
    pods = pytorch_pods(pod(ended(0), "Running", beside=[RUNNING], job="PyTorchJob"))
    obj = job(
        {
            "conditions": [{"type": "Running", "status": "True"}],
            "replicaStatuses": {"Master": {"active": 1}},
        },
        "PyTorchJob",
    )
    assert child_state(obj)[0] == "Running"
    child = ApiServer(obj, pods).observe()
    assert (child.state, child.lingering) == ("Succeeded", True)


def test_a_cause_is_kept_when_pods_of_a_failed_child_are_gone() -> None:
    assert failure_cause([], "BackoffLimitExceeded: …", OWN) == Failure(
        "Interrupted", "its pods were deleted before the cause was read (BackoffLimitExceeded: …)"
    )
