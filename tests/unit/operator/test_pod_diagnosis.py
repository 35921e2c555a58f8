"""Diagnosis of pods and children: state, reason for waiting, cause of failure."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from distill_operator.observe import State, child_state, describe_child, is_controlled_by
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


def terminated(
    code: int, message: str = "", at: str = "2026-01-01T00:00:10Z", reason: str = "Error"
) -> dict[str, Any]:
    return {"terminated": {"exitCode": code, "message": message, "finishedAt": at, "reason": reason}}


def reported(kind: str, code: int, message: str) -> dict[str, Any]:
    return terminated(code, json.dumps({"class": kind, "rank": 0, "exit": code, "message": message}))


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
            [pod(main=terminated(65, "log line 1\nlast line\n"))],
            "Permanent",
            '"last line"',
            id="exit 65 without a report",
        ),
        pytest.param([pod(main=reported("Retriable", 75, "away"))], "Retriable", "exit 75", id="retriable"),
        pytest.param(
            [pod(main=terminated(75, '{"class": "Retriable", "reason": "Unreachable", "message": "away"}'))],
            "Interrupted",
            "exit 75",
            id="the store is away",
        ),
        pytest.param(
            [pod(main=terminated(75, '{"class": "Retriable", "reason": "Local", "message": "disk full"}'))],
            "Retriable",
            "exit 75",
            id="the disk is full",
        ),
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
            [pod(main=terminated(1, 'x\n{"class": "Permanent", "message": "bad"}'))],
            "Permanent",
            "bad",
            id="torchrun's 1",
        ),
        pytest.param([pod(main=terminated(137))], "Error", "exit 137 (killed)", id="killed"),
        pytest.param(
            [pod(main=terminated(137, reason="OOMKilled"))], "Error", "out of memory", id="out of memory"
        ),
        pytest.param(
            [pod(main=terminated(137), conditions=[DRAINED])], "Interrupted", "drain of node a", id="drained"
        ),
        pytest.param([pod(reason="NodeLost")], "Interrupted", "NodeLost", id="node lost"),
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
def test_the_cause_of_a_failed_child(pods: list[dict[str, Any]], kind: str, expected: str) -> None:
    failure = failure_cause(pods, "BackoffLimitExceeded: …", "main")
    assert failure.kind == kind
    assert expected in failure.message


@pytest.mark.parametrize(
    "pods, name",
    [
        pytest.param(
            [
                pod("late", main=terminated(1, at="2026-01-01T00:00:20Z")),
                pod("first", main=terminated(1, at="2026-01-01T00:00:10Z")),
            ],
            "first",
            id="the first to fail",
        ),
        pytest.param(
            [
                pod("stopped", main=terminated(143)),
                pod("cause", main=terminated(70, at="2026-01-01T00:00:30Z")),
            ],
            "cause",
            id="not the terminated one",
        ),
        pytest.param(
            [pod("fails", main=terminated(1)), pod("drained", main=terminated(137), conditions=[DRAINED])],
            "drained",
            id="the drained one",
        ),
        pytest.param(
            [
                pod("drained", main=terminated(137), conditions=[DRAINED]),
                pod("bad", main=reported("Permanent", 65, "x")),
            ],
            "bad",
            id="the permanent failure",
        ),
        pytest.param(
            [pod("fine", "Succeeded", main=terminated(0)), pod("bad", main=terminated(2))],
            "bad",
            id="not the succeeded one",
        ),
    ],
)
def test_the_pod_that_caused_the_failure(pods: list[dict[str, Any]], name: str) -> None:
    assert f"pod {name}" in failure_cause(pods, "", "main").message


def waiting(reason: str, message: str = "") -> dict[str, Any]:
    return {"waiting": {"reason": reason, "message": message}}


UNSCHEDULABLE = {
    "type": "PodScheduled",
    "status": "False",
    "reason": "Unschedulable",
    "message": "0/1 nodes: 1 Insufficient nvidia.com/gpu",
}
FORBIDDEN = {
    "involvedObject": {"kind": "Job", "name": "j"},
    "reason": "FailedCreate",
    "message": "violates PodSecurity restricted",
}
MOUNT_FAILED = {
    "involvedObject": {"kind": "Pod", "name": "p"},
    "reason": "FailedMount",
    "message": "secret vpmoe-s3 not found",
}


@pytest.mark.parametrize(
    "pods, events, expected",
    [
        pytest.param(
            [pod(phase="Pending", conditions=[UNSCHEDULABLE])],
            [],
            "pod p cannot be scheduled: 0/1 nodes: 1 Insufficient",
            id="no free GPU",
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
            [MOUNT_FAILED],
            "pod p: FailedMount: secret",
            id="volume",
        ),
        pytest.param(
            [], [FORBIDDEN], "job j: FailedCreate: violates PodSecurity", id="rejected by pod security"
        ),
        pytest.param([], [{"reason": "Odd"}], ": Odd: ", id="an Event that somebody else has made"),
        pytest.param(
            [pod(phase="Pending", main=waiting("ContainerCreating"))], [], "pod p is starting", id="starting"
        ),
        pytest.param([], [], "its pods have not been created yet", id="no pods yet"),
    ],
)
def test_the_reason_why_a_child_waits(
    pods: list[dict[str, Any]], events: list[dict[str, Any]], expected: str
) -> None:
    assert expected in waiting_reason(pods, events, "main")


def job(*conditions_true: str, deleting: bool = False, **status: Any) -> dict[str, Any]:
    meta = {"name": "j", "uid": "u", **({"deletionTimestamp": "x"} if deleting else {})}
    conditions = [{"type": kind, "status": "True", "reason": "R", "message": "m"} for kind in conditions_true]
    return {
        "kind": "Job",
        "metadata": meta,
        "spec": {"parallelism": 2},
        "status": {"conditions": conditions, **status},
    }


def pytorchjob(*conditions: tuple[str, str], workers: int = 0, **active: int) -> dict[str, Any]:
    replicas = {"Master": {"replicas": 1}, **({"Worker": {"replicas": workers}} if workers else {})}
    status = {
        "conditions": [
            {"type": kind, "status": status_of_condition} for kind, status_of_condition in conditions
        ],
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
        pytest.param(job(active=2, ready=1), "Waiting", id="job: one of two is running"),
        pytest.param(job(active=2, ready=2), "Running", id="job: running"),
        pytest.param(job(active=1, ready=1, succeeded=1), "Running", id="job: one has finished"),
        pytest.param(job("SuccessCriteriaMet", "Complete"), "Succeeded", id="job: complete"),
        pytest.param(job("FailureTarget"), "Ending", id="job: failed, pods terminating"),
        pytest.param(job("FailureTarget", "Failed"), "Failed", id="job: failed"),
        pytest.param(job(deleting=True, active=2, ready=2), "Ending", id="job: being deleted"),
        pytest.param(job("Failed", deleting=True), "Ending", id="job: failed and being deleted"),
        pytest.param(job("Complete", deleting=True), "Succeeded", id="job: complete and being deleted"),
        pytest.param(pytorchjob(("Created", "True")), "Waiting", id="pytorchjob: created"),
        pytest.param(
            pytorchjob(("Created", "True"), ("Running", "True"), Master=1),
            "Running",
            id="pytorchjob: running",
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


def test_a_failed_child_with_pods_alive_is_ending() -> None:
    obj = pytorchjob(("Failed", "True"))
    alive = pod("worker", "Running", main={"running": {}})
    failed = pod("master", main=terminated(1))
    assert describe_child(obj, "Failed", "", [failed, alive], [], "main").state == "Ending"
    assert describe_child(obj, "Failed", "", [failed], [], "main").state == "Failed"


@pytest.mark.parametrize(
    "phases, missing",
    [
        pytest.param({"j-master-0": "Running", "j-worker-0": "Running"}, "", id="all running"),
        pytest.param({"j-master-0": "Succeeded", "j-worker-0": "Running"}, "", id="one has finished"),
        pytest.param({"j-master-0": "Running"}, "j-worker-0", id="one is gone"),
        pytest.param(
            {"j-master-0": "Pending", "j-worker-0": "Running"}, "j-master-0", id="one has been replaced"
        ),
    ],
)
def test_a_pod_of_a_running_pytorchjob_that_is_not_running_is_missing(
    phases: dict[str, str], missing: str
) -> None:
    pods = [pod(name, phase) for name, phase in phases.items()]
    obj = pytorchjob(("Running", "True"), workers=1)
    assert describe_child(obj, "Waiting", "", pods, [], "main").missing_pod == missing


@pytest.mark.parametrize("state", ["Running", "Waiting"])
@pytest.mark.parametrize(
    "created, workers, missing",
    [
        pytest.param("2026-01-01T00:00:10Z", 0, "", id="older than the condition"),
        pytest.param("2026-01-01T00:00:12Z", 0, "", id="of its second"),
        pytest.param("2026-01-01T00:00:13Z", 0, "j-master-0", id="made in the place of another"),
        pytest.param("2026-01-01T00:00:13Z", 1, "", id="made later, as a worker for want of quota"),
    ],
)
def test_a_pod_made_after_its_pytorchjob_ran_has_replaced_another(
    state: State, created: str, workers: int, missing: str
) -> None:
    """The training operator replaces a pod that was deleted by force within milliseconds."""
    pods = [pod("j-master-0", "Running"), *(pod(f"j-worker-{i}", "Running") for i in range(workers))]
    for one in pods:
        one["metadata"]["creationTimestamp"] = created
    obj = pytorchjob(("Running", "True"), workers=workers)
    obj["status"]["conditions"][0]["lastTransitionTime"] = "2026-01-01T00:00:12Z"
    assert describe_child(obj, state, "", pods, [], "main").missing_pod == missing


def test_a_child_suspended_by_kueue_is_suspended() -> None:
    suspended = {**job(), "spec": {"parallelism": 2, "suspend": True}}
    assert describe_child(suspended, "Waiting", "", [], [], "main").suspended


def suspended_pytorchjob(suspend: bool, since: str, condition: bool | None = None) -> dict[str, Any]:
    """A PyTorchJob that ran before it was suspended, and perhaps resumed.

    Its condition is `condition`, if its controller has not seen the change yet.
    """
    condition = suspend if condition is None else condition
    obj = pytorchjob(("Running", "False"), ("Suspended", str(condition)), workers=1)
    obj["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "team"}
    obj["spec"]["runPolicy"] = {"suspend": suspend}
    for condition in obj["status"]["conditions"]:
        condition["lastTransitionTime"] = since
    return obj


@pytest.mark.parametrize("pods", [[], [pod("j-master-0", "Running")]], ids=["gone", "ending"])
def test_a_preempted_pytorchjob_is_held_and_no_pod_is_missing(pods: list[dict[str, Any]]) -> None:
    found = describe_child(
        suspended_pytorchjob(True, "2026-01-01T00:00:10Z"), "Waiting", "", pods, [], "main"
    )
    assert (found.suspended, found.missing_pod, found.resumed) == (True, "", None)
    assert found.message == "PyTorchJob j is suspended until Kueue admits it to queue team"


def test_a_pod_that_the_controller_of_a_resumed_pytorchjob_will_still_make_is_not_missing() -> None:
    obj = suspended_pytorchjob(False, "2026-01-01T00:00:10Z", condition=True)
    found = describe_child(obj, "Waiting", "", [], [], "main")
    assert (found.suspended, found.missing_pod, found.resumed) == (False, "", None)


def test_the_time_at_which_a_pytorchjob_was_resumed_is_observed() -> None:
    found = describe_child(suspended_pytorchjob(False, "2026-01-01T00:00:10Z"), "Waiting", "", [], [], "main")
    assert (found.suspended, found.missing_pod) == (False, "j-master-0")
    assert found.resumed == datetime(2026, 1, 1, 0, 0, 10, tzinfo=UTC)


@pytest.mark.parametrize(
    "owners, controlled",
    [
        pytest.param([{"uid": "me", "controller": True}], True, id="controller"),
        pytest.param([{"uid": "me"}], False, id="not its controller"),
        pytest.param([{"uid": "other", "controller": True}], False, id="another's"),
        pytest.param([], False, id="no owner"),
    ],
)
def test_an_object_belongs_to_a_run_only_if_the_run_is_its_controller(
    owners: list[dict[str, Any]], controlled: bool
) -> None:
    assert is_controlled_by({"metadata": {"ownerReferences": owners}}, "me") is controlled
