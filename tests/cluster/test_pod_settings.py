"""spec.runtime on a real kubelet: variables of Secrets, labels, devices, capabilities, the teacher's claim.

The device is a resource that the node advertises, as it does GPUs.
"""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from distill_operator.kube import POD

from devcluster.access import Cluster
from devcluster.configuration import NODE_NAME
from tests.fakes import run_harness
from tests.fakes.run_harness import RunHarness

DEVICE = "example.com/hca"
CLASS = "test-pod-settings"
RUNTIME: dict[str, Any] = {
    "env": [
        {"name": "FROM_KEY", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "HF_TOKEN"}}},
        {"name": "BOTH", "value": "of env"},
    ],
    "envFrom": [
        {"secretRef": {"name": "hub"}},
        {"configMapRef": {"name": "nccl"}, "prefix": "NCCL_"},
        {"secretRef": {"name": "absent", "optional": True}},
    ],
    "podLabels": {"example.com/team": "a"},
    "podAnnotations": {"example.com/note": "é: anything"},
    "schedulerName": "default-scheduler",
    "runtimeClassName": CLASS,
    "sharedMemory": "64Mi",
    "resources": {"train": {"requests": {"cpu": "100m", DEVICE: 2}}},
    "teacherCache": {"claimName": "teachers"},
}
TEACHER: dict[str, Any] = {
    "teacher": {"model": "s3://models/none", "gpus": 1},
    "stages": [
        {"name": "vanilla", "kind": "Vanilla", "tokens": 6000},
        {"name": "rescored", "kind": "Rescored", "tokens": 6000},
    ],
}
LOOK = """
import json, os
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines() if ":" in line)
disk = os.statvfs("/dev/shm")
cache = os.environ.get("VPMOE_TEACHER_CACHE", "")
print(json.dumps({
    "environment": dict(os.environ), "user": os.getuid(), "capabilities": int(status["CapEff"], 16),
    "shm": disk.f_frsize * disk.f_blocks, "cache": os.access(cache, os.W_OK) if cache else None,
    "tmp": os.access("/tmp", os.W_OK),
}))
"""
IPC_LOCK = 1 << 14


def advertise(cluster: Cluster, operation: str) -> None:
    path = f"/status/{{}}/{DEVICE.replace('/', '~1')}"
    patch = [
        {"op": operation, "path": path.format(of), **({"value": "4"} if operation == "add" else {})}
        for of in ("capacity", "allocatable")
    ]
    cluster.kubectl(
        "patch", "node", NODE_NAME, "--subresource=status", "--type=json", f"--patch={json.dumps(patch)}"
    )


def claim(namespace: str) -> list[dict[str, Any]]:
    """A volume on the node's disk, and the claim that is bound to it."""
    common = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": namespace},
        "spec": {
            **common,
            "capacity": {"storage": "1Gi"},
            "hostPath": {"path": f"/tmp/{namespace}", "type": "DirectoryOrCreate"},
            "claimRef": {"namespace": namespace, "name": "teachers"},
        },
    }
    bound = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "teachers", "namespace": namespace},
        "spec": {**common, "volumeName": namespace, "resources": {"requests": {"storage": "1Gi"}}},
    }
    return [volume, bound]


@pytest.fixture(scope="module")
def harness(cluster: Cluster, namespace: str) -> Iterator[RunHarness]:
    run_harness.upgrade_operator(cluster, *run_harness.FAST)
    harness = RunHarness.create(cluster, namespace)
    harness.kubectl(
        "create", "secret", "generic", "hub", "--from-literal=HF_TOKEN=hf_x", "--from-literal=BOTH=of envFrom"
    )
    harness.kubectl("create", "configmap", "nccl", "--from-literal=DEBUG=INFO")
    harness.kubectl("create", "secret", "generic", "reserved", "--from-literal=AWS_PROFILE=hunter2")
    runtime_class = {
        "apiVersion": "node.k8s.io/v1",
        "kind": "RuntimeClass",
        "metadata": {"name": CLASS},
        "handler": "runc",
    }
    for body in (runtime_class, *claim(namespace)):
        cluster.kubectl("apply", "--filename=-", input=json.dumps(body))
    advertise(cluster, "add")
    yield harness
    cluster.kubectl("delete", "distillruns", "--all", f"--namespace={namespace}", "--timeout=120s")
    advertise(cluster, "remove")
    cluster.kubectl("delete", "runtimeclass", CLASS)
    harness.kubectl("delete", "pvc", "teachers", "--wait=false")
    cluster.kubectl("delete", "pv", namespace, "--wait=false")
    run_harness.restore_operator(cluster)


def pod_of(harness: RunHarness, name: str, step: str) -> dict[str, Any]:
    """The pod of a step, when its container runs."""

    def running() -> list[dict[str, Any]]:
        return [
            pod
            for pod in harness.objects(name, POD)
            if pod["metadata"]["labels"]["vpmoe.dev/step"] == step
            and any("running" in found["state"] for found in pod["status"].get("containerStatuses", []))
        ]

    harness.wait_until(name, lambda: bool(running()), f"{step} runs")
    return running()[0]


def look(harness: RunHarness, pod: dict[str, Any]) -> dict[str, Any]:
    """What a process in the pod finds."""
    name = pod["metadata"]["name"]
    found: dict[str, Any] = json.loads(harness.kubectl("exec", name, "--", "python", "-c", LOOK))
    return found


@pytest.mark.parametrize("backend", ["PyTorchJob", "Job"])
def test_pods_have_what_the_run_says(harness: RunHarness, backend: str) -> None:
    name = f"settings-{backend.lower()}"
    harness.apply(name, "steps=40 pause=0.5", runtime={**RUNTIME, "backend": backend}, **TEACHER)
    rescore = look(harness, pod_of(harness, name, "rescore"))["environment"]  # first: it ends first
    assert (rescore["VPMOE_TEACHER_CACHE"], rescore["HF_TOKEN"]) == ("/var/cache/vpmoe/teacher", "hf_x")
    pod = pod_of(harness, name, "vanilla")
    found, spec = look(harness, pod), pod["spec"]
    environment = found["environment"]
    assert (environment["HF_TOKEN"], environment["FROM_KEY"]) == ("hf_x", "hf_x")
    assert (environment["NCCL_DEBUG"], environment["BOTH"]) == ("INFO", "of env")
    assert environment["HOME"] == "/tmp" and "VPMOE_TEACHER_CACHE" not in environment
    assert (found["user"], found["capabilities"], found["shm"]) == (65532, 0, 64 * 2**20)
    assert pod["metadata"]["labels"]["example.com/team"] == "a"
    assert pod["metadata"]["annotations"]["example.com/note"] == "é: anything"
    assert (spec["runtimeClassName"], spec["schedulerName"]) == (CLASS, "default-scheduler")
    resources = spec["containers"][0]["resources"]
    assert resources["limits"][DEVICE] == resources["requests"][DEVICE] == "2"
    harness.wait_for_phase(name, "Succeeded")
    harness.kubectl("delete", "distillrun", name)


def test_a_capability_works_in_pods_that_train_and_they_save_their_work(harness: RunHarness) -> None:
    runtime = {"capabilities": ["IPC_LOCK"], "resources": {"train": {"requests": {"cpu": "100m"}}}}
    harness.apply("locked", "steps=40 pause=0.5", runtime=runtime)
    found = look(harness, pod_of(harness, "locked", "vanilla"))
    assert (found["user"], found["capabilities"], found["tmp"]) == (0, IPC_LOCK, True)
    harness.wait_for_phase("locked", "Succeeded")


def test_a_capability_without_root_would_have_no_effect(harness: RunHarness) -> None:
    """Why such pods run as root."""
    security = {"runAsUser": 65532, "capabilities": {"drop": ["ALL"], "add": ["IPC_LOCK"]}}
    main = {
        "name": "main",
        "image": run_harness.IMAGE,
        "command": ["sleep", "600"],
        "securityContext": security,
    }
    spec = {"terminationGracePeriodSeconds": 0, "containers": [main]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "rootless"}, "spec": spec}
    harness.kubectl("create", "--filename=-", input=json.dumps(pod))
    harness.kubectl("wait", "pod/rootless", "--for=condition=Ready", "--timeout=60s")
    assert look(harness, pod)["capabilities"] == 0
    harness.kubectl("delete", "pod", "rootless")


def test_a_reserved_variable_of_a_secret_fails_the_run_with_its_name(harness: RunHarness) -> None:
    harness.apply("reserved", "steps=2", runtime={"envFrom": [{"secretRef": {"name": "reserved"}}]})
    message = harness.wait_for_phase("reserved", "Failed", "Succeeded")["message"]
    assert "runtime.envFrom sets AWS_PROFILE: reserved" in message
    assert "hunter2" not in json.dumps(harness.get("reserved"))


def test_a_secret_that_is_missing_is_named(harness: RunHarness) -> None:
    harness.apply("missing", "steps=2", runtime={"envFrom": [{"secretRef": {"name": "nowhere"}}]})
    harness.wait_until(
        "missing",
        lambda: 'secret "nowhere" not found' in harness.status("missing").get("message", ""),
        "its message names the Secret",
    )
    harness.kubectl("delete", "distillrun", "missing")
