"""A hollow node plays pods on a real control plane."""

import json
import math
import secrets
import socket
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from distill_operator.pod_records import AttemptId, find_record, progress_problem, serving_pods
from distill_operator.pod_template import POD_PORT

from tests.fakes.control_plane import ControlPlane
from tests.fakes.hollow_node import Behavior, HollowNode, parse_script
from tests.fakes.waiting import wait_until
from vpmoe.api import labels
from vpmoe.api.progress import Progress

NODE = "hollow-of-tests"


@pytest.fixture(scope="module")
def node(control_plane: ControlPlane) -> Iterator[HollowNode]:
    with HollowNode(control_plane.kubeconfig, NODE) as running:
        yield running


def start(plane: ControlPlane, script: str, pods: int = 1, step: str = "preprocess") -> str:
    """Create a Job whose pods follow the script. Returns its name."""
    name = f"run-{secrets.token_hex(3)}"
    own = {labels.RUN: name, labels.STEP: step, labels.ATTEMPT: "1"}
    container = {
        "name": step,
        "image": "none",
        "command": ["python", "-m", f"jobs.{step}"],
        "env": [{"name": "HOLLOW", "value": script}],
        "ports": [{"containerPort": POD_PORT}],
    }
    volume = {"name": "config", "configMap": {"name": f"{name}-config-0123abcd"}}
    pod = {"restartPolicy": "Never", "containers": [container], "volumes": [volume]}
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {
            "completions": pods,
            "parallelism": pods,
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            "template": {"metadata": {"labels": own}, "spec": pod},
        },
    }
    plane.kubectl("create", "--filename", "-", input=json.dumps(job))
    return name


def pods_of(plane: ControlPlane, job: str) -> list[dict[str, Any]]:
    selector = f"--selector=batch.kubernetes.io/job-name={job}"
    return list(json.loads(plane.kubectl("get", "pods", selector, "--output=json"))["items"])


def conditions(plane: ControlPlane, job: str) -> list[str]:
    found = json.loads(plane.kubectl("get", "job", job, "--output=json"))["status"].get("conditions", [])
    return [condition["type"] for condition in found]


def wait_for_running(plane: ControlPlane, job: str, count: int = 1) -> list[dict[str, Any]]:
    def run() -> bool:
        return [pod["status"]["phase"] for pod in pods_of(plane, job)] == ["Running"] * count

    wait_until(run, f"the pods of {job} run")
    return pods_of(plane, job)


def test_pods_run_and_end_with_a_record_that_the_operator_reads(
    control_plane: ControlPlane, node: HollowNode
) -> None:
    job = start(control_plane, "seconds=0.2", pods=3)
    wait_until(lambda: "Complete" in conditions(control_plane, job), f"{job} is complete")
    found = pods_of(control_plane, job)
    record = find_record(found, "preprocess")
    assert len({pod["status"]["podIP"] for pod in found}) == 3
    assert record is not None
    assert record.kind == "Succeeded"
    assert record.progress is not None
    assert record.progress.run == f"default/{job}-0123abcd"


def test_pods_fail_as_they_are_told(control_plane: ControlPlane, node: HollowNode) -> None:
    scripted = start(control_plane, "seconds=0.1; preprocess@1: exit=75 message=away")
    chosen = start(control_plane, "seconds=inf")
    wait_for_running(control_plane, chosen)
    assert len(node.fail(lambda pod: pod.run == chosen, exit=65, message="broken")) == 1
    for job, kind, message in ((scripted, "Retriable", "away"), (chosen, "Permanent", "broken")):
        wait_until(lambda job=job: "Failed" in conditions(control_plane, job), f"{job} has failed")
        record = find_record(pods_of(control_plane, job), "preprocess")
        assert record is not None
        assert (record.kind, record.message) == (kind, message)


def test_the_operator_reads_the_progress_of_pods_that_serve_it(
    control_plane: ControlPlane, node: HollowNode
) -> None:
    readable = start(control_plane, "seconds=inf")
    none_yet = start(control_plane, "seconds=inf progress=none")

    def read(job: str) -> tuple[int, bytes]:
        (pod,) = serving_pods(wait_for_running(control_plane, job), "preprocess")
        with urllib.request.urlopen(f"http://{pod.ip}:{POD_PORT}/progress", timeout=10) as answer:
            return answer.status, answer.read()

    status, body = read(readable)
    progress = Progress.model_validate_json(body)
    assert status == 200
    assert progress_problem(progress, AttemptId(f"default/{readable}-0123abcd", "preprocess", 1)) == ""
    assert read(none_yet) == (204, b"")


def test_silent_pods_accept_connections_and_refusing_ones_do_not(
    control_plane: ControlPlane, node: HollowNode
) -> None:
    silent = start(control_plane, "seconds=inf progress=silent")
    refusing = start(control_plane, "seconds=inf progress=refused")
    (accepting,) = wait_for_running(control_plane, silent)
    with socket.create_connection((accepting["status"]["podIP"], POD_PORT), timeout=5) as connection:
        connection.settimeout(0.2)
        connection.sendall(b"GET /progress HTTP/1.1\r\n\r\n")
        with pytest.raises(TimeoutError):
            connection.recv(1)
    (closed,) = wait_for_running(control_plane, refusing)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((closed["status"]["podIP"], POD_PORT), timeout=5)


def test_deleted_pods_end_and_are_gone_and_their_addresses_are_free(
    control_plane: ControlPlane, node: HollowNode
) -> None:
    job = start(control_plane, "seconds=inf", pods=2)
    names = [pod["metadata"]["name"] for pod in wait_for_running(control_plane, job, 2)]
    control_plane.kubectl("delete", "pod", names[0])
    wait_until(lambda: names[0] not in json.dumps(pods_of(control_plane, job)), f"{names[0]} is gone")
    control_plane.kubectl("delete", "job", job, "--cascade=foreground")
    assert not pods_of(control_plane, job)
    wait_until(lambda: all(pod.run != job for pod in node.pods.values()), "the node has forgotten them")


def test_pods_are_played_on_after_a_watch_was_lost(control_plane: ControlPlane, node: HollowNode) -> None:
    """Deleted, ended and new pods are all found by the list that follows."""
    gone, ends = (start(control_plane, script) for script in ("seconds=inf", "seconds=2"))
    for job in (gone, ends):
        wait_for_running(control_plane, job)
    lists = node.lists
    node.lose_watch()
    control_plane.kubectl("delete", "job", gone, "--wait=false")
    new = start(control_plane, "seconds=0")
    for job in (ends, new):
        wait_until(lambda job=job: "Complete" in conditions(control_plane, job), f"{job} is complete")
    wait_until(lambda: not pods_of(control_plane, gone), f"the pods of {gone} are gone")
    assert node.lists > lists


def test_a_node_binds_pods_where_there_is_no_scheduler(control_plane: ControlPlane) -> None:
    names = [f"unscheduled-{secrets.token_hex(3)}" for _ in range(3)]
    for name in names:
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name},
            "spec": {"schedulerName": "none", "containers": [{"name": "main", "image": "none"}]},
        }
        control_plane.kubectl("create", "--filename", "-", input=json.dumps(pod))
    phase = ("get", "pods", *names, "--output=jsonpath={.items[*].status.phase}")
    with HollowNode(control_plane.kubeconfig, f"{NODE}-binding", binds=True):
        wait_until(lambda: control_plane.kubectl(*phase) == "Succeeded Succeeded Succeeded", "they ran")


@pytest.mark.parametrize(
    ("script", "step", "attempt", "expected"),
    [
        ("", "train", 1, Behavior()),
        ("seconds=inf progress=silent", "train", 2, Behavior(seconds=math.inf, progress="silent")),
        ("seconds=2; train: exit=1", "train", 1, Behavior(seconds=2, exit=1)),
        ("seconds=2; train: exit=1", "rescore", 1, Behavior(seconds=2)),
        ("@1: exit=1 record=false; train@2: exit=2", "train", 1, Behavior(exit=1, record=False)),
        ("@1: exit=1 record=false; train@2: exit=2", "train", 2, Behavior(exit=2)),
    ],
)
def test_scripts(script: str, step: str, attempt: int, expected: Behavior) -> None:
    assert parse_script(script, step, attempt) == expected


def test_a_script_with_an_unknown_field_is_refused() -> None:
    with pytest.raises(ValueError, match="HOLLOW: colour is no field"):
        parse_script("colour=red", "train", 1)
