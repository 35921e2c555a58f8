"""Pods on the development cluster: GPUs, exit codes, environment, DNS, the store and PyTorchJobs, as on any
cluster with eight GPUs."""

import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest

from devcluster import ClusterError, configuration, dev, image
from devcluster.access import Cluster
from tests.fakes.waiting import wait_until
from vpmoe.provenance import git_sha

pytestmark = pytest.mark.cluster

FOREVER = ["sleep", "infinity"]
RESTRICTED = {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}}
LOCKED_DOWN = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


@dataclass(frozen=True)
class Namespace:
    """The namespace of this module, with the restricted pod security standard."""

    cluster: Cluster
    name: str

    def kubectl(self, *arguments: str, input: str | None = None) -> str:
        return self.cluster.kubectl("--namespace", self.name, *arguments, input=input)

    def start(self, name: str, command: list[str], gpus: int = 0, **metadata: Any) -> None:
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, **metadata},
            "spec": pod_spec(command, gpus),
        }
        self.kubectl("create", "--filename=-", input=json.dumps(pod))

    def wait(self, name: str, path: str, value: str) -> None:
        self.kubectl("wait", f"pod/{name}", f"--for=jsonpath={path}={value}", "--timeout=60s")

    def delete(self, *names: str) -> None:
        self.kubectl("delete", "pod", *names, "--grace-period=0", "--force", "--wait=false")


def pod_spec(command: list[str], gpus: int = 0, container: str = "main") -> dict[str, Any]:
    limits = {"nvidia.com/gpu": gpus} if gpus else {}
    main = {
        "name": container,
        "image": "localhost/vpmoe/trainer:dev",
        "command": command,
        "securityContext": LOCKED_DOWN,
        "resources": {"limits": limits},
    }
    return {"restartPolicy": "Never", "securityContext": RESTRICTED, "containers": [main]}


@pytest.fixture(scope="module")
def pods() -> Iterator[Namespace]:
    namespace = Namespace(dev.up(), f"devcluster-{secrets.token_hex(4)}")
    namespace.cluster.kubectl("create", "namespace", namespace.name)
    namespace.cluster.kubectl(
        "label", "namespace", namespace.name, "pod-security.kubernetes.io/enforce=restricted"
    )
    yield namespace
    namespace.cluster.kubectl("delete", "namespace", namespace.name, "--wait=false")


def test_a_pod_waits_until_its_gpus_are_free(pods: Namespace) -> None:
    pods.start("first", FOREVER, gpus=7)
    pods.wait("first", "{.status.phase}", "Running")
    pods.start("second", FOREVER, gpus=7)
    pods.wait("second", '{.status.conditions[?(@.type=="PodScheduled")].reason}', "Unschedulable")
    events = pods.kubectl(
        "get",
        "events",
        "--field-selector=involvedObject.name=second,reason=FailedScheduling",
        "--output=name",
    )
    message = pods.kubectl(
        "get", "pod", "second", '--output=jsonpath={.status.conditions[?(@.type=="PodScheduled")].message}'
    )
    assert events
    assert "Insufficient nvidia.com/gpu" in message
    pods.delete("first")
    pods.wait("second", "{.status.phase}", "Running")
    pods.delete("second")


def test_exit_code_and_log_of_a_failed_pod_are_kept(pods: Namespace) -> None:
    pods.start("fails", ["sh", "-c", "echo what it said; exit 75"])
    pods.wait("fails", "{.status.phase}", "Failed")
    assert (
        pods.kubectl(
            "get",
            "pod",
            "fails",
            "--output=jsonpath={.status.containerStatuses[0].state.terminated.exitCode}",
        )
        == "75"
    )
    # containerd may still copy the output when it reports the exit
    wait_until(lambda: pods.kubectl("logs", "fails") == "what it said\n", "the log has its output")


def test_a_deleted_pod_gets_sigterm_and_its_grace_period(pods: Namespace) -> None:
    saves = "trap 'sleep 1; echo saved > /dev/termination-log; exit 143' TERM; while true; do sleep 0.1; done"
    pods.start("saves", ["sh", "-c", saves], finalizers=["vpmoe.dev/test"])  # keeps the pod after its exit
    pods.wait("saves", "{.status.phase}", "Running")
    pods.kubectl("delete", "pod", "saves", "--grace-period=30", "--wait=false")
    pods.wait("saves", "{.status.containerStatuses[0].state.terminated.exitCode}", "143")
    assert (
        pods.kubectl(
            "get", "pod", "saves", "--output=jsonpath={.status.containerStatuses[0].state.terminated.message}"
        )
        == "saved\n"
    )
    pods.kubectl("patch", "pod", "saves", "--type=merge", '--patch={"metadata":{"finalizers":null}}')


@pytest.fixture(scope="module")
def shell(pods: Namespace) -> str:
    """A running pod for `kubectl exec`."""
    pods.start("shell", FOREVER)
    pods.wait("shell", "{.status.phase}", "Running")
    return "shell"


@pytest.mark.parametrize(
    "command, expected",
    [
        pytest.param(["id", "-un"], "nonroot", id="not root"),
        pytest.param(["pwd"], "/opt/vpmoe", id="working folder"),
        pytest.param(
            ["ls", "-A", "/opt/vpmoe"],
            ".venv commit jobs operator tests vpmoe",
            id="only the part of the checkout that jobs need",
        ),
        pytest.param(["cat", "/opt/vpmoe/commit"], git_sha() or "", id="the commit of the image"),
        pytest.param(
            ["sh", "-c", "echo ${CUDA_VISIBLE_DEVICES-unset}"], "", id="no visible GPU: jobs run on the CPU"
        ),
        pytest.param(
            ["sh", "-c", "touch /opt/vpmoe/vpmoe/x 2>&1 || true"],
            "Read-only file system",
            id="code is read-only",
        ),
        pytest.param(
            ["python", "-c", "import vpmoe.api, sys; print(sys.version_info[:2])"],
            "(3, 12)",
            id="the checkout's interpreter and code",
        ),
        pytest.param(
            [
                "python",
                "-c",
                "import ssl; print(ssl.create_default_context().cert_store_stats()['x509_ca'] > 0)",
            ],
            "True",
            id="CA bundle",
        ),
        pytest.param(["getent", "hosts", "kubernetes.default"], "10.96.0.1", id="cluster DNS, short name"),
        pytest.param(
            ["getent", "hosts", "kube-dns.kube-system.svc.cluster.local"],
            configuration.DNS,
            id="cluster DNS, full name",
        ),
    ],
)
def test_the_environment_of_a_pod(pods: Namespace, shell: str, command: list[str], expected: str) -> None:
    assert expected in " ".join(pods.kubectl("exec", shell, "--", *command).split())


def test_pods_that_start_after_a_commit_have_it_and_others_keep_theirs(pods: Namespace, shell: str) -> None:
    """Neither is the cluster another one then, nor must it be started again."""
    loaded = (dev.STATE / "config" / configuration.IMAGES_FILE).read_bytes()
    folders, _ = dev.sources()
    commit = secrets.token_hex(20)
    try:
        dev.update_images(image.archive(Path(folders.kube, "pause").read_bytes(), commit))
        pods.start("later", ["cat", "/opt/vpmoe/commit"])
        pods.wait("later", "{.status.phase}", "Succeeded")
        wait_until(lambda: pods.kubectl("logs", "later").strip() == commit, "the log has the commit")
        assert pods.kubectl("exec", shell, "--", "cat", "/opt/vpmoe/commit").strip() == git_sha()
    finally:
        dev.update_images(loaded)
    dev.up()


def test_a_name_outside_the_cluster_is_an_error(pods: Namespace, shell: str) -> None:
    with pytest.raises(ClusterError, match="exit code 2"):
        pods.kubectl("exec", shell, "--", "getent", "hosts", "huggingface.co")


def test_host_and_pods_reach_the_store_at_the_same_address(pods: Namespace, shell: str) -> None:
    store = pods.cluster.s3
    client = boto3.client(
        "s3",
        endpoint_url=store.endpoint,
        aws_access_key_id=store.access_key,
        aws_secret_access_key=store.secret_key,
    )
    bucket = pods.name
    client.create_bucket(Bucket=bucket)
    client.put_object(Bucket=bucket, Key="from-host", Body=b"written on the host")
    copy = (
        f"import boto3; s3 = boto3.client('s3', endpoint_url='{store.endpoint}', "
        f"aws_access_key_id='{store.access_key}', aws_secret_access_key='{store.secret_key}'); "
        f"body = s3.get_object(Bucket='{bucket}', Key='from-host')['Body'].read(); "
        f"s3.put_object(Bucket='{bucket}', Key='from-pod', Body=body + b', read in a pod')"
    )
    pods.kubectl("exec", shell, "--", "python", "-c", copy)
    assert (
        client.get_object(Bucket=bucket, Key="from-pod")["Body"].read()
        == b"written on the host, read in a pod"
    )
    for key in ("from-host", "from-pod"):
        client.delete_object(Bucket=bucket, Key=key)
    client.delete_bucket(Bucket=bucket)


MASTER = """
import os, socket
with socket.create_server(("", int(os.environ["MASTER_PORT"]))) as server:
    connection, _ = server.accept()
    print(connection.makefile().readline().strip(), "of", os.environ["WORLD_SIZE"])
"""
WORKER = """
import os, socket, time
master = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
while True:
    try:
        socket.create_connection(master).sendall(f"rank {os.environ['RANK']}\\n".encode())
        break
    except ConnectionRefusedError:
        time.sleep(0.1)
"""


def test_master_and_worker_of_a_pytorchjob_connect_and_succeed(pods: Namespace) -> None:
    replicas = {
        role: {
            "replicas": 1,
            "restartPolicy": "Never",
            "template": {"spec": pod_spec(["python", "-c", code], gpus=1, container="pytorch")},
        }
        for role, code in (("Master", MASTER), ("Worker", WORKER))
    }
    job = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": "pair"},
        "spec": {"pytorchReplicaSpecs": replicas},
    }
    pods.kubectl("create", "--filename=-", input=json.dumps(job))
    pods.kubectl("wait", "pytorchjob/pair", "--for=condition=Succeeded", "--timeout=60s")
    wait_until(
        lambda: pods.kubectl("logs", "pair-master-0") == "rank 1 of 2\n", "the log has the pod's output"
    )
