"""Diagnosis of live pods and children: why one waits, why one failed, which state it is in."""

import json
from typing import Any

import pytest
from distill_operator.observe import child_state, describe_child, is_controlled_by
from distill_operator.pod_diagnosis import failure_cause, waiting_reason


def pod(
    name: str = "p", phase: str = "Failed", reason: str = "", conditions: Any = (), **containers: Any
) -> dict[str, Any]:
    """A pod. Each keyword is the state of a container."""
    statuses = [{"name": key, "state": state} for key, state in containers.items()]
    status = {
        "phase": phase,
        "conditions": list(conditions),
        "containerStatuses": statuses,
        **({"reason": reason} if reason else {}),
    }
    return {"kind": "Pod", "metadata": {"name": name, "uid": f"uid-{name}"}, "status": status}


def ended(
    code: int, message: str = "", at: str = "2026-01-01T00:00:10Z", reason: str = "Error"
) -> dict[str, Any]:
    return {"terminated": {"exitCode": code, "message": message, "finishedAt": at, "reason": reason}}


def reported(kind: str, code: int, message: str) -> dict[str, Any]:
    return ended(code, json.dumps({"class": kind, "rank": 0, "exit": code, "message": message}))


DRAINED = {
    "type": "DisruptionTarget",
    "status": "True",
    "reason": "EvictionByEvictionAPI",
    "message": "drain of node a",
}


@pytest.mark.parametrize(
    "pods, kind, expected",
    [
        pytest.param(
            [pod(main=reported("Permanent", 65, "no such bucket"))],
            "Permanent",
            'exit 65. Last line: "no',
            id="permanent",
        ),
        pytest.param(
            [pod(main=ended(65, "log line 1\nlast line\n"))],
            "Permanent",
            '"last line"',
            id="exit 65 without a report",
        ),
        pytest.param([pod(main=reported("Retriable", 75, "away"))], "Retriable", "exit 75", id="retriable"),
        pytest.param(
            [pod(main=reported("Internal", 70, "KeyError: x"))], "Error", '"KeyError: x"', id="internal"
        ),
        pytest.param(
            [pod(main=reported("Terminated", 143, "saved"))],
            "Interrupted",
            "exit 143 (terminated)",
            id="stopped by a signal",
        ),
        pytest.param(
            [pod(main=ended(1, 'x\n{"class": "Permanent", "message": "bad"}'))],
            "Permanent",
            "bad",
            id="torchrun's 1",
        ),
        pytest.param([pod(main=ended(137))], "Error", "exit 137 (killed)", id="killed"),
        pytest.param(
            [pod(main=ended(137, reason="OOMKilled"))], "Error", "out of memory", id="out of memory"
        ),
        pytest.param(
            [pod(main=ended(137), conditions=[DRAINED])], "Interrupted", "drain of node a", id="drained"
        ),
        pytest.param(
            [pod(main=ended(137), reason="Evicted")], "Interrupted", "Evicted", id="evicted by the kubelet"
        ),
        pytest.param([pod(reason="NodeLost")], "Interrupted", "NodeLost", id="node lost"),
        pytest.param(
            [pod(reason="UnexpectedAdmissionError")],
            "Interrupted",
            "UnexpectedAdmissionError",
            id="rejected by the kubelet",
        ),
        pytest.param(
            [pod(reason="DeadlineExceeded")], "Error", "DeadlineExceeded", id="failed without a container"
        ),
        pytest.param(
            [],
            "Interrupted",
            "its pods were deleted before the cause was read (BackoffLimitExceeded: …)",
            id="pods deleted",
        ),
    ],
)
def test_why_a_pod_failed(pods: list[dict[str, Any]], kind: str, expected: str) -> None:
    failure = failure_cause(pods, "BackoffLimitExceeded: …")
    assert failure.kind == kind
    assert expected in failure.message


@pytest.mark.parametrize(
    "pods, name",
    [
        pytest.param(
            [
                pod("late", main=ended(1, at="2026-01-01T00:00:20Z")),
                pod("first", main=ended(1, at="2026-01-01T00:00:10Z")),
            ],
            "first",
            id="the first to fail",
        ),
        pytest.param(
            [pod("stopped", main=ended(143)), pod("cause", main=ended(70, at="2026-01-01T00:00:30Z"))],
            "cause",
            id="not the stopped",
        ),
        pytest.param(
            [pod("fails", main=ended(1)), pod("drained", main=ended(137), conditions=[DRAINED])],
            "drained",
            id="the drained",
        ),
        pytest.param(
            [
                pod("drained", main=ended(137), conditions=[DRAINED]),
                pod("bad", main=reported("Permanent", 65, "x")),
            ],
            "bad",
            id="permanent",
        ),
        pytest.param(
            [pod("fine", "Succeeded", main=ended(0)), pod("bad", main=ended(2))],
            "bad",
            id="not the succeeded",
        ),
    ],
)
def test_which_of_several_pods_is_the_cause(pods: list[dict[str, Any]], name: str) -> None:
    assert f"pod {name}" in failure_cause(pods, "").message


def waiting(reason: str, message: str = "") -> dict[str, Any]:
    return {"waiting": {"reason": reason, "message": message}}


UNPLACED = {
    "type": "PodScheduled",
    "status": "False",
    "reason": "Unschedulable",
    "message": "0/1 nodes: 1 Insufficient nvidia.com/gpu",
}
REFUSED = {
    "involvedObject": {"kind": "Job", "name": "j"},
    "reason": "FailedCreate",
    "message": "violates PodSecurity restricted",
}
MOUNT = {
    "involvedObject": {"kind": "Pod", "name": "p"},
    "reason": "FailedMount",
    "message": "secret vpmoe-s3 not found",
}


@pytest.mark.parametrize(
    "pods, events, expected",
    [
        pytest.param(
            [pod(phase="Pending", conditions=[UNPLACED])],
            [],
            "pod p cannot be scheduled: 0/1 nodes: 1 Insufficient",
            id="no room",
        ),
        pytest.param(
            [pod(phase="Pending", main=waiting("ImagePullBackOff", "no image"))],
            [],
            "ImagePullBackOff: no image",
            id="image",
        ),
        pytest.param(
            [pod(phase="Pending", main=waiting("CreateContainerConfigError", "secret s not found"))],
            [],
            "secret s not found",
            id="secret",
        ),
        pytest.param(
            [pod(phase="Pending", main=waiting("ContainerCreating"))],
            [MOUNT],
            "pod p: FailedMount: secret",
            id="volume",
        ),
        pytest.param(
            [], [REFUSED], "job j: FailedCreate: violates PodSecurity", id="rejected by pod security"
        ),
        pytest.param(
            [pod(phase="Pending", main=waiting("ContainerCreating"))], [], "pod p is starting", id="starting"
        ),
        pytest.param([], [], "its pods have not been created yet", id="nothing yet"),
    ],
)
def test_why_a_pod_waits(pods: list[dict[str, Any]], events: list[dict[str, Any]], expected: str) -> None:
    assert expected in waiting_reason(pods, events)


def job(*true: str, deleting: bool = False, **status: Any) -> dict[str, Any]:
    meta = {"name": "j", "uid": "u", **({"deletionTimestamp": "x"} if deleting else {})}
    conditions = [{"type": kind, "status": "True", "reason": "R", "message": "m"} for kind in true]
    return {
        "kind": "Job",
        "metadata": meta,
        "spec": {"parallelism": 2},
        "status": {"conditions": conditions, **status},
    }


def pytorchjob(*conditions: tuple[str, str], workers: int = 0, **active: int) -> dict[str, Any]:
    replicas = {"Master": {"replicas": 1}, **({"Worker": {"replicas": workers}} if workers else {})}
    status = {
        "conditions": [{"type": kind, "status": truth} for kind, truth in conditions],
        "replicaStatuses": {role: {"active": count} for role, count in active.items()},
    }
    return {
        "kind": "PyTorchJob",
        "metadata": {"name": "j", "uid": "u"},
        "spec": {"pytorchReplicaSpecs": replicas},
        "status": status,
    }


@pytest.mark.parametrize(
    "obj, state",
    [
        pytest.param(job(), "Waiting", id="job: new"),
        pytest.param(job(active=2, ready=1), "Waiting", id="job: one of two runs"),
        pytest.param(job(active=2, ready=2), "Running", id="job: runs"),
        pytest.param(job(active=1, ready=1, succeeded=1), "Running", id="job: one has finished"),
        pytest.param(job("SuccessCriteriaMet", "Complete"), "Succeeded", id="job: complete"),
        pytest.param(job("FailureTarget"), "Ending", id="job: has failed, pods still end"),
        pytest.param(job("FailureTarget", "Failed"), "Failed", id="job: failed"),
        pytest.param(job(deleting=True, active=2, ready=2), "Ending", id="job: being deleted"),
        pytest.param(job("Failed", deleting=True), "Ending", id="job: failed and being deleted"),
        pytest.param(job("Complete", deleting=True), "Succeeded", id="job: complete and being deleted"),
        pytest.param(pytorchjob(("Created", "True")), "Waiting", id="pytorchjob: created"),
        pytest.param(
            pytorchjob(("Created", "True"), ("Running", "True"), Master=1), "Running", id="pytorchjob: runs"
        ),
        pytest.param(
            pytorchjob(("Running", "True"), workers=1, Master=1),
            "Waiting",
            id="pytorchjob: a worker is missing",
        ),
        pytest.param(
            pytorchjob(("Running", "True"), ("Suspended", "False"), Master=1),
            "Running",
            id="pytorchjob: just resumed",
        ),
        pytest.param(
            pytorchjob(("Running", "False"), ("Succeeded", "True")), "Succeeded", id="pytorchjob: succeeded"
        ),
        pytest.param(pytorchjob(("Failed", "True"), ("Running", "False")), "Failed", id="pytorchjob: failed"),
    ],
)
def test_the_state_of_a_child(obj: dict[str, Any], state: str) -> None:
    assert child_state(obj)[0] == state


def test_a_failed_child_whose_pods_still_live_is_ending() -> None:
    obj = pytorchjob(("Failed", "True"))
    survivor = pod("worker", "Running", main={"running": {}})
    assert describe_child(obj, "Failed", "", [pod("master", main=ended(1)), survivor], []).state == "Ending"
    assert describe_child(obj, "Failed", "", [pod("master", main=ended(1))], []).state == "Failed"


@pytest.mark.parametrize(
    "phases, missing",
    [
        pytest.param({"j-master-0": "Running", "j-worker-0": "Running"}, "", id="all run"),
        pytest.param({"j-master-0": "Succeeded", "j-worker-0": "Running"}, "", id="one has ended"),
        pytest.param({"j-master-0": "Running"}, "j-worker-0", id="one is gone"),
        pytest.param(
            {"j-master-0": "Pending", "j-worker-0": "Running"}, "j-master-0", id="replaced by another"
        ),
    ],
)
def test_a_pod_of_a_pytorchjob_that_does_not_run_is_missing(phases: dict[str, str], missing: str) -> None:
    its_pods = [pod(name, phase) for name, phase in phases.items()]
    assert (
        describe_child(pytorchjob(("Running", "True"), workers=1), "Waiting", "", its_pods, []).missing_pod
        == missing
    )


def test_a_child_that_kueue_suspends_is_suspended() -> None:
    held = {**job(), "spec": {"parallelism": 2, "suspend": True}}
    assert describe_child(held, "Waiting", "", [], []).suspended


@pytest.mark.parametrize(
    "owners, mine",
    [
        pytest.param([{"uid": "me", "controller": True}], True, id="controller"),
        pytest.param([{"uid": "me"}], False, id="not its controller"),
        pytest.param([{"uid": "other", "controller": True}], False, id="another's"),
        pytest.param([], False, id="no owner"),
    ],
)
def test_only_an_object_that_this_run_controls_belongs_to_it(
    owners: list[dict[str, Any]], mine: bool
) -> None:
    assert is_controlled_by({"metadata": {"ownerReferences": owners}}, "me") is mine
