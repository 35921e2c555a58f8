"""What the operator reads from live pods and children: why one waits, why one failed, which state it is in."""

import json
from typing import Any

import pytest
from distill_operator.observe import child_state, describe, owned
from distill_operator.pod_diagnosis import why_failed, why_waiting


def pod(
    name: str = "p", phase: str = "Failed", reason: str = "", conditions: Any = (), **containers: Any
) -> dict[str, Any]:
    """A pod; each keyword is a container's state."""
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


def said(kind: str, code: int, message: str) -> dict[str, Any]:
    return ended(code, json.dumps({"class": kind, "rank": 0, "exit": code, "message": message}))


DRAINED = {
    "type": "DisruptionTarget",
    "status": "True",
    "reason": "EvictionByEvictionAPI",
    "message": "drain of node a",
}


@pytest.mark.parametrize(
    "pods, kind, words",
    [
        pytest.param(
            [pod(main=said("Permanent", 65, "no such bucket"))],
            "Permanent",
            'exit 65. Last line: "no',
            id="permanent",
        ),
        pytest.param(
            [pod(main=ended(65, "log line 1\nlast words\n"))],
            "Permanent",
            '"last words"',
            id="exit 65 without a last word",
        ),
        pytest.param([pod(main=said("Retriable", 75, "away"))], "Retriable", "exit 75", id="retriable"),
        pytest.param(
            [pod(main=said("Internal", 70, "KeyError: x"))], "Error", '"KeyError: x"', id="internal"
        ),
        pytest.param(
            [pod(main=said("Terminated", 143, "saved"))],
            "Interrupted",
            "exit 143 (terminated)",
            id="asked to stop",
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
            id="refused by the kubelet",
        ),
        pytest.param(
            [pod(reason="DeadlineExceeded")], "Error", "DeadlineExceeded", id="failed without a container"
        ),
        pytest.param(
            [],
            "Interrupted",
            "no pod is left that could say why (BackoffLimitExceeded: …)",
            id="pods deleted",
        ),
    ],
)
def test_why_a_pod_failed(pods: list[dict[str, Any]], kind: str, words: str) -> None:
    failure = why_failed(pods, "BackoffLimitExceeded: …")
    assert failure.kind == kind
    assert words in failure.words


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
                pod("bad", main=said("Permanent", 65, "x")),
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
    assert f"pod {name}" in why_failed(pods, "").words


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
    "pods, events, words",
    [
        pytest.param(
            [pod(phase="Pending", conditions=[UNPLACED])],
            [],
            "pod p cannot be placed: 0/1 nodes: 1 Insufficient",
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
            [], [REFUSED], "job j: FailedCreate: violates PodSecurity", id="refused by pod security"
        ),
        pytest.param(
            [pod(phase="Pending", main=waiting("ContainerCreating"))], [], "pod p is starting", id="starting"
        ),
        pytest.param([], [], "its pods are not there yet", id="nothing yet"),
    ],
)
def test_why_a_pod_waits(pods: list[dict[str, Any]], events: list[dict[str, Any]], words: str) -> None:
    assert words in why_waiting(pods, events)


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
    assert describe(obj, "Failed", "", [pod("master", main=ended(1)), survivor], []).state == "Ending"
    assert describe(obj, "Failed", "", [pod("master", main=ended(1))], []).state == "Failed"


@pytest.mark.parametrize(
    "phases, lost",
    [
        pytest.param({"j-master-0": "Running", "j-worker-0": "Running"}, "", id="all run"),
        pytest.param({"j-master-0": "Succeeded", "j-worker-0": "Running"}, "", id="one has ended"),
        pytest.param({"j-master-0": "Running"}, "j-worker-0", id="one is gone"),
        pytest.param(
            {"j-master-0": "Pending", "j-worker-0": "Running"}, "j-master-0", id="another stands in its place"
        ),
    ],
)
def test_a_pod_of_a_pytorchjob_that_does_not_run_is_named(phases: dict[str, str], lost: str) -> None:
    its_pods = [pod(name, phase) for name, phase in phases.items()]
    assert describe(pytorchjob(("Running", "True"), workers=1), "Waiting", "", its_pods, []).lost == lost


def test_a_child_that_kueue_holds_says_so() -> None:
    held = {**job(), "spec": {"parallelism": 2, "suspend": True}}
    assert describe(held, "Waiting", "", [], []).held


@pytest.mark.parametrize(
    "owners, mine",
    [
        pytest.param([{"uid": "me", "controller": True}], True, id="controller"),
        pytest.param([{"uid": "me"}], False, id="not its controller"),
        pytest.param([{"uid": "other", "controller": True}], False, id="another's"),
        pytest.param([], False, id="nobody's"),
    ],
)
def test_only_what_this_very_run_controls_is_its_own(owners: list[dict[str, Any]], mine: bool) -> None:
    assert owned({"metadata": {"ownerReferences": owners}}, "me") is mine
