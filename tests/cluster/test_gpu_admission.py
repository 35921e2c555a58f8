"""Admission to GPUs on a real control plane: pods of others, taints, preprocessing without GPUs, pods at
once, and objects that are suspended and resumed as Kueue does it.

The cluster has one node with eight GPUs.
"""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from distill_operator.kube import JOB, POD, PYTORCHJOB, Kind

from devcluster import install
from devcluster.access import Cluster
from devcluster.configuration import NODE_NAME
from tests.fakes import run_harness
from tests.fakes.run_harness import RunHarness

EIGHT: dict[str, Any] = {
    "teacher": {"model": "s3://models/none", "gpus": 1},
    "student": {"shape": "tiny", "gpus": 7},
}
FOUR: dict[str, Any] = {"student": {"shape": "tiny", "gpus": 4}}
NINE: dict[str, Any] = {
    "student": {"shape": "tiny", "gpus": 9},
    "training": {"sequenceLength": 512, "globalBatchTokens": 8192},
}


@pytest.fixture(scope="module")
def harness(cluster: Cluster, namespace: str) -> Iterator[RunHarness]:
    run_harness.upgrade_operator(cluster, *run_harness.FAST)
    yield RunHarness.create(cluster, namespace)
    run_harness.restore_operator(cluster)


@pytest.fixture
def other_namespace(cluster: Cluster, harness: RunHarness) -> Iterator[RunHarness]:
    name = f"{harness.namespace}-other"
    cluster.kubectl("create", "namespace", name)
    install.credentials(cluster, name)
    yield RunHarness.create(cluster, name)
    cluster.kubectl("delete", "distillruns", "--all", "--namespace", name, "--timeout=120s")
    cluster.kubectl("delete", "namespace", name, "--timeout=120s")


def take_gpus(harness: RunHarness, gpus: int) -> None:
    """Start somebody's pod with GPUs, and wait until it runs."""
    main = {
        "name": "main",
        "image": run_harness.IMAGE,
        "command": ["sleep", "3600"],
        "resources": {"limits": {"nvidia.com/gpu": gpus}},
    }
    spec = {"restartPolicy": "Never", "terminationGracePeriodSeconds": 0, "containers": [main]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "somebody"}, "spec": spec}
    harness.kubectl("create", "--filename=-", input=json.dumps(pod))
    harness.kubectl("wait", "pod/somebody", "--for=condition=Ready", "--timeout=60s")


def wait_for_message(harness: RunHarness, name: str, text: str) -> None:
    harness.wait_until(name, lambda: text in harness.status(name).get("message", ""), f"{name} says: {text}")


def suspend(harness: RunHarness, kind: Kind, name: str, suspended: bool) -> None:
    """Suspend or resume a child, as Kueue does it."""
    spec = {"suspend": suspended} if kind is JOB else {"runPolicy": {"suspend": suspended}}
    resource = f"{kind.plural}.{kind.group}"
    harness.kubectl("patch", resource, name, "--type=merge", f"--patch={json.dumps({'spec': spec})}")


def test_gpus_of_other_pods_are_counted_and_the_run_starts_when_they_are_free(harness: RunHarness) -> None:
    take_gpus(harness, 6)
    harness.apply("four", "steps=2", **FOUR)
    wait_for_message(harness, "four", "of which 6 are used by other pods: 2 are left.")
    assert harness.status("four")["phase"] == "Queued"
    assert harness.child_names("four") == ["four-preprocess-a1"], "it is preprocessed meanwhile"
    harness.kubectl("delete", "pod", "somebody")
    harness.wait_for_phase("four", "Succeeded")


def test_a_taint_that_the_run_does_not_tolerate_is_explained(harness: RunHarness) -> None:
    take_gpus(harness, 8)
    harness.apply("tainted", "steps=2", **FOUR)
    wait_for_message(harness, "tainted", "0 are left")
    harness.kubectl("taint", "node", NODE_NAME, "reserved=team-b:NoSchedule")
    try:
        wait_for_message(harness, "tainted", "1 node with taint reserved=team-b:NoSchedule")
        assert harness.condition("tainted", "Stalled")["reason"] == "PoolTooSmall"
        harness.kubectl("delete", "pod", "somebody")
    finally:
        harness.kubectl("taint", "node", NODE_NAME, "reserved-")
    harness.wait_for_phase("tainted", "Succeeded")


def test_a_run_that_cannot_be_preprocessed_holds_no_gpus(harness: RunHarness) -> None:
    greedy = {"resources": {"preprocess": {"requests": {"cpu": "640"}}}}
    harness.apply("greedy", "steps=2", **EIGHT, runtime=greedy)
    wait_for_message(harness, "greedy", "Insufficient cpu")
    harness.apply("modest", "steps=2", **EIGHT)
    harness.wait_for_phase("modest", "Succeeded")
    assert harness.status("greedy")["phase"] == "Running"
    harness.kubectl("delete", "distillrun", "greedy")


def test_an_immediate_run_makes_pods_that_an_autoscaler_sees(harness: RunHarness) -> None:
    for name, scheduling in (("immediate", "Immediate"), ("patient", "Queued")):
        harness.apply(name, "steps=2", **NINE, runtime={"scheduling": scheduling})
    wait_for_message(harness, "immediate", "Insufficient nvidia.com/gpu")
    wait_for_message(harness, "patient", "set runtime.scheduling to Immediate")
    (pod,) = [pod for pod in harness.objects("immediate", POD) if "vanilla" in pod["metadata"]["name"]]
    assert pod["status"]["phase"] == "Pending"
    assert harness.condition("patient", "Stalled")["reason"] == "PoolTooSmall"
    assert harness.child_names("patient") == ["patient-preprocess-a1"]
    harness.patch("patient", runtime={"scheduling": "Immediate"})
    harness.wait_until("patient", lambda: len(harness.child_names("patient")) == 2, "its pods are made too")
    harness.kubectl("delete", "distillrun", "immediate", "patient")


def test_messages_name_no_runs_of_other_namespaces(harness: RunHarness, other_namespace: RunHarness) -> None:
    other_namespace.apply("secret", "steps=3000 pause=0.3", **EIGHT)
    other_namespace.wait_until(
        "secret", lambda: other_namespace.step("secret").get("state") == "Running", "it holds the GPUs"
    )
    harness.apply("curious", "steps=2", **FOUR)
    wait_for_message(harness, "curious", "of which 8 are held by 1 run of other namespaces: 0 are left.")
    described = harness.kubectl("describe", "distillrun", "curious")
    assert "secret" not in described.replace(install.SECRET, "").replace("Credentials Secret", "")
    other_namespace.kubectl("delete", "distillrun", "secret")
    harness.wait_for_phase("curious", "Succeeded")


def test_children_with_a_queue_wait_for_kueue_and_keep_their_place_when_preempted(
    harness: RunHarness, cluster: Cluster
) -> None:
    """The test is Kueue. It preempts the PyTorchJob once with the operator up, and once while it is down."""

    def child(kind: Kind, name: str) -> Any:
        return harness.get_object(kind, name)

    def vanilla_pods() -> list[str]:
        pods = harness.objects("queued", POD)
        return [pod["metadata"]["name"] for pod in pods if "vanilla" in pod["metadata"]["name"]]

    def wait_until_training(tokens: int) -> int:
        harness.wait_until(
            "queued", lambda: harness.step("queued").get("tokensDone", 0) > tokens, "it trains again"
        )
        return int(harness.step("queued")["tokensDone"])

    training = "queued-vanilla-a1"
    harness.apply("queued", "steps=150 pause=0.3 every=2", **FOUR, runtime={"queueName": "team"})
    wait_for_message(harness, "queued", "is suspended until Kueue admits it to queue team")
    assert harness.status("queued")["phase"] == "Queued"
    assert child(JOB, "queued-preprocess-a1")["spec"]["suspend"] is True
    suspend(harness, JOB, "queued-preprocess-a1", False)
    harness.wait_until("queued", lambda: bool(child(PYTORCHJOB, training)), "preprocessing has ended")
    assert child(PYTORCHJOB, training)["spec"]["runPolicy"]["suspend"] is True
    assert vanilla_pods() == []
    suspend(harness, PYTORCHJOB, training, False)
    tokens = wait_until_training(0)

    harness.apply("beside", "steps=2", **EIGHT)
    wait_for_message(harness, "beside", "of which 4 are used by other pods: 4 are left.")

    suspend(harness, PYTORCHJOB, training, True)
    wait_for_message(harness, "queued", "is suspended until Kueue admits it to queue team")
    harness.wait_for_phase("beside", "Succeeded")
    suspend(harness, PYTORCHJOB, training, False)
    tokens = wait_until_training(tokens)

    for resumed in (False, True):
        with run_harness.operator_away(cluster):
            suspend(harness, PYTORCHJOB, training, True)
            harness.wait_until("queued", lambda: vanilla_pods() == [], "its pods are gone")
            if resumed:
                suspend(harness, PYTORCHJOB, training, False)
        if not resumed:
            wait_for_message(harness, "queued", "is suspended until Kueue admits it to queue team")
            suspend(harness, PYTORCHJOB, training, False)
        tokens = wait_until_training(tokens)
    harness.wait_for_phase("queued", "Succeeded")
    assert harness.child_names("queued") == ["queued-preprocess-a1", training]
    step = harness.step("queued")
    assert (step["attempt"], step["failures"], step["interruptions"]) == (1, 0, 0)
