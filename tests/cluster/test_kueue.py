"""Runs in the queues of a real Kueue: admission, quota, preemption, deletion. The queues are the guide's.

The cluster has eight GPUs, the queue four. Kueue is installed for this module only.
"""

import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distill_operator.kube import CHILD_KINDS, CONFIGMAP, JOB, POD, PYTORCHJOB

from devcluster import cluster as selected
from devcluster import kueue
from devcluster.access import Cluster
from tests.fakes import run_harness
from tests.fakes.run_harness import RunHarness

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "queue-with-kueue.md"
QUEUE, CLUSTER_QUEUE, URGENT = "runs", "team-a", "urgent"
FOUR: dict[str, Any] = {"student": {"shape": "tiny", "gpus": 4}}
EIGHT: dict[str, Any] = {
    "teacher": {"model": "s3://models/none", "gpus": 1},
    "student": {"shape": "tiny", "gpus": 7},
}
LONG, SHORT = "steps=1000 pause=0.3 every=2", "steps=2"
QUEUED: dict[str, Any] = {"queueName": QUEUE}
BACKENDS = pytest.mark.parametrize("backend", ["PyTorchJob", "Job"])


def queues() -> str:
    """The guide's manifest of queues."""
    blocks = re.findall(r"^ *```yaml\n(.*?)^ *```", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    (manifest,) = [block for block in blocks if "kind: ClusterQueue" in block]
    return textwrap.dedent(manifest)


@pytest.fixture(scope="module")
def harness(cluster: Cluster, namespace: str) -> Iterator[RunHarness]:
    if selected.choice() != "dev":
        pytest.skip("Kueue is installed on the development cluster only")
    kueue.install(cluster)
    run_harness.upgrade_operator(cluster, *run_harness.FAST)
    harness = RunHarness.create(cluster, namespace)
    harness.kubectl("apply", "--filename=-", input=queues())
    yield harness
    harness.kubectl("delete", "distillruns,jobs", "--all", "--timeout=120s")
    harness.kubectl("delete", "localqueues", "--all")
    harness.kubectl("delete", "priorityclass", URGENT)
    kueue.remove(cluster)
    run_harness.restore_operator(cluster)


@pytest.fixture(autouse=True)
def clean(harness: RunHarness) -> Iterator[None]:
    """Each test begins with empty queues."""
    yield
    harness.kubectl("delete", "distillruns,jobs", "--all", "--timeout=120s")


def wait_for_message(harness: RunHarness, name: str, text: str) -> None:
    harness.wait_until(name, lambda: text in harness.status(name).get("message", ""), f"{name} says: {text}")


def wait_until_held(harness: RunHarness, name: str, child: str) -> None:
    wait_for_message(harness, name, f"{child} is suspended until Kueue admits it to queue {QUEUE}")
    assert harness.status(name)["phase"] == "Queued"
    assert harness.condition(name, "Stalled")["status"] == "False"


def wait_until_training(harness: RunHarness, name: str, tokens: int = 0) -> int:
    """Wait until the run has trained on more than `tokens` tokens. Returns their number."""
    harness.wait_until(
        name,
        lambda: harness.step(name).get("tokensDone", 0) > tokens,
        f"{name} trains beyond {tokens} tokens",
    )
    return int(harness.step(name)["tokensDone"])


def workloads(harness: RunHarness) -> list[dict[str, Any]]:
    path = f"/apis/kueue.x-k8s.io/v1beta2/namespaces/{harness.namespace}/workloads"
    return list(harness.api.get(path).raise_for_status().json()["items"])


def workload(harness: RunHarness, child: str) -> dict[str, Any]:
    """Kueue's Workload of a child."""
    (found,) = [
        one for one in workloads(harness) if child in (o["name"] for o in one["metadata"]["ownerReferences"])
    ]
    return found


def is_admitted(found: dict[str, Any]) -> bool:
    conditions = found.get("status", {}).get("conditions", [])
    return any(one["type"] == "Admitted" and one["status"] == "True" for one in conditions)


def place(harness: RunHarness, backend: str, child: str) -> tuple[str, str]:
    """What a child loses if it is made again: its uid, and that of its Workload."""
    obj = harness.get_object(CHILD_KINDS[backend], child)
    return obj["metadata"]["uid"], workload(harness, child)["metadata"]["uid"]


def assert_nothing_was_counted(harness: RunHarness, name: str) -> None:
    step = harness.step(name)
    assert (step["attempt"], step["failures"], step["interruptions"]) == (1, 0, 0)
    assert harness.child_names(name) == [f"{name}-preprocess-a1", f"{name}-vanilla-a1"]
    assert not {"StepRetrying", "StepFailed"} & harness.events(name).keys()
    assert harness.starts(name)[-1][1] > 0, "it went on from a checkpoint"


def preempt(harness: RunHarness, child: str) -> None:
    """Have an urgent Job of somebody take the quota of a child, and wait until its pods are gone."""
    main = {
        "name": "main",
        "image": run_harness.IMAGE,
        "command": ["sleep", "3600"],
        "resources": {"requests": {"cpu": "10m", "memory": "16Mi"}, "limits": {"nvidia.com/gpu": 4}},
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 0,
        "priorityClassName": URGENT,
        "containers": [main],
    }
    metadata = {"name": "somebody", "labels": {"kueue.x-k8s.io/queue-name": QUEUE}}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": {"template": {"spec": pod}}}
    harness.kubectl("create", "--filename=-", input=json.dumps(job))
    run = child.partition("-vanilla")[0]

    def is_preempted() -> bool:
        pods = [pod["metadata"]["name"] for pod in harness.objects(run, POD)]
        return not is_admitted(workload(harness, child)) and not any("vanilla" in pod for pod in pods)

    harness.wait_until(run, is_preempted, f"Kueue preempts {child}")


@BACKENDS
def test_a_run_starts_when_kueue_admits_each_of_its_objects(harness: RunHarness, backend: str) -> None:
    name = f"held-{backend.lower()}"

    def stop_admission(policy: str) -> None:
        patch = json.dumps({"spec": {"stopPolicy": policy}})
        harness.kubectl("patch", "clusterqueue", CLUSTER_QUEUE, "--type=merge", f"--patch={patch}")

    stop_admission("Hold")
    try:
        harness.apply(name, SHORT, **FOUR, runtime={**QUEUED, "backend": backend})
        wait_until_held(harness, name, f"{name}-preprocess-a1")
        assert harness.objects(name, POD) == []
    finally:
        stop_admission("None")
    status = harness.wait_for_phase(name, "Succeeded")
    assert [step["attempt"] for step in status["steps"]] == [1, 1]
    for child in harness.objects(name, JOB, PYTORCHJOB):
        conditions = {one["type"]: one["status"] for one in child["status"]["conditions"]}
        assert conditions["Suspended"] == "False", "it was suspended, and resumed by Kueue"
        assert is_admitted(workload(harness, child["metadata"]["name"]))


def test_a_run_waits_for_quota_and_can_be_deleted_meanwhile(harness: RunHarness) -> None:
    harness.apply("first", LONG, **FOUR, runtime=QUEUED)
    wait_until_training(harness, "first")
    for name in ("second", "third"):
        harness.apply(name, SHORT, **FOUR, runtime=QUEUED)
        wait_until_held(harness, name, f"{name}-vanilla-a1")
    harness.kubectl("delete", "distillrun", "second")

    def is_left() -> bool:
        owners = [one["metadata"]["ownerReferences"][0]["name"] for one in workloads(harness)]
        kept = harness.objects("second", JOB, PYTORCHJOB, POD, CONFIGMAP)
        return bool(kept) or any(owner.startswith("second") for owner in owners)

    harness.wait_until("first", lambda: not is_left(), "nothing of the second run is left")
    assert harness.step("first")["state"] == "Running"
    harness.kubectl("delete", "distillrun", "first")
    harness.wait_for_phase("third", "Succeeded")


def test_gpus_of_runs_that_kueue_admits_count_once(harness: RunHarness) -> None:
    """They count as those of pods, and only while the pods exist."""
    harness.apply("queued", LONG, **FOUR, runtime=QUEUED)
    wait_until_training(harness, "queued")
    harness.apply("large", SHORT, **EIGHT)
    wait_for_message(harness, "large", "of which 4 are used by other pods: 4 are left.")
    harness.kubectl("delete", "distillrun", "large")
    harness.apply("waiting", SHORT, **FOUR, runtime=QUEUED)
    wait_until_held(harness, "waiting", "waiting-vanilla-a1")
    harness.apply("beside", SHORT, **FOUR)
    harness.wait_for_phase("beside", "Succeeded")
    assert harness.step("queued")["state"] == "Running"
    assert harness.status("waiting")["phase"] == "Queued"


@BACKENDS
def test_an_urgent_run_preempts_another_which_goes_on_later(harness: RunHarness, backend: str) -> None:
    name, urgent = f"patient-{backend.lower()}", f"urgent-{backend.lower()}"
    child = f"{name}-vanilla-a1"
    runtime = {**QUEUED, "backend": backend}
    harness.apply(name, LONG, **FOUR, runtime=runtime)
    wait_until_training(harness, name)
    before = place(harness, backend, child)
    harness.apply(urgent, "steps=20 pause=0.3", **FOUR, runtime={**runtime, "priorityClassName": URGENT})
    wait_until_held(harness, name, child)
    tokens = harness.step(name)["tokensDone"]
    harness.wait_for_phase(urgent, "Succeeded")
    wait_until_training(harness, name, tokens)
    assert place(harness, backend, child) == before
    assert_nothing_was_counted(harness, name)


@pytest.mark.parametrize("admitted", [False, True], ids=["still preempted", "admitted again"])
@BACKENDS
def test_a_run_that_is_preempted_while_the_operator_is_away_keeps_its_place(
    harness: RunHarness, cluster: Cluster, backend: str, admitted: bool
) -> None:
    name = f"away-{backend.lower()}-{'admitted' if admitted else 'held'}"
    child = f"{name}-vanilla-a1"
    harness.apply(name, LONG, **FOUR, runtime={**QUEUED, "backend": backend})
    tokens = wait_until_training(harness, name)
    before = place(harness, backend, child)
    with run_harness.operator_away(cluster):
        preempt(harness, child)
        if admitted:
            harness.kubectl("delete", "job", "somebody")
            harness.wait_until(name, lambda: is_admitted(workload(harness, child)), "Kueue admits it again")
    if not admitted:
        wait_until_held(harness, name, child)
        tokens = harness.step(name)["tokensDone"]
        harness.kubectl("delete", "job", "somebody")
    wait_until_training(harness, name, tokens)
    assert place(harness, backend, child) == before
    assert_nothing_was_counted(harness, name)
