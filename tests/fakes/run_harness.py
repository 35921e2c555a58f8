"""Applies runs of stand-in jobs to the development cluster and waits for them.

Only the jobs are fake: tests/fakes/standin.
"""

import contextlib
import copy
import json
import secrets
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import httpx2
import pytest
import yaml
from distill_operator.kube import DISTILLRUN, EVENT, JOB, POD, PYTORCHJOB, Kind
from kubernetes.client import Configuration
from kubernetes.config import load_kube_config

from devcluster import ClusterError, install
from devcluster.access import Cluster

ROOT = Path(__file__).parents[2]
IMAGE = "localhost/vpmoe/standin:dev"
IMAGES = ["--set", f"images.trainer={IMAGE}", "--set", f"images.inference={IMAGE}"]
FAST = ["--set", "resyncSeconds=2", "--set", "pollSeconds=2", "--set", "backoff.baseSeconds=1", *IMAGES]
"""Helm values with the stand-in images and short intervals."""


def upgrade_operator(cluster: Cluster, *arguments: str) -> None:
    """Upgrade the installed operator with other values."""
    place = ["distill-operator", "charts/distill-operator", "--namespace", install.NAMESPACE]
    cluster.helm("upgrade", *place, "--reuse-values", *arguments, "--wait", "--timeout", "2m")


def stop_operator(cluster: Cluster) -> None:
    """Upgrade the installed operator to no replica, and wait until its pods are gone."""
    upgrade_operator(cluster, "--set", "replicas=0")
    pods = ["pod", "--selector=app.kubernetes.io/name=distill-operator", f"--namespace={install.NAMESPACE}"]
    cluster.kubectl("wait", "--for=delete", *pods, "--timeout=60s")


@contextlib.contextmanager
def operator_away(cluster: Cluster) -> Iterator[None]:
    """No installed operator runs in this context."""
    stop_operator(cluster)
    try:
        yield
    finally:
        upgrade_operator(cluster, "--set", "replicas=1")


def delete_lease(cluster: Cluster) -> None:
    """Delete the operator's Lease, which a process that was killed may still hold."""
    lease = ["lease", "distill-operator", f"--namespace={install.NAMESPACE}"]
    cluster.kubectl("delete", *lease, "--ignore-not-found")


def restore_operator(cluster: Cluster) -> None:
    """Upgrade the operator to the development values."""
    install.operator(cluster)


def api_client(kubeconfig: Path) -> httpx2.Client:
    """A client of the API server, with the client certificate of the kubeconfig."""
    found = Configuration()
    load_kube_config(str(kubeconfig), client_configuration=found)
    context = ssl.create_default_context(cafile=found.ssl_ca_cert)
    context.load_cert_chain(found.cert_file, found.key_file)
    return httpx2.Client(base_url=found.host, verify=context, timeout=10)


STAGES = [
    {"name": kind.lower(), "kind": kind, "tokens": 6000} for kind in ("Vanilla", "Rescored", "TeacherForced")
]
"""A stage of each kind except OnPolicy."""


@dataclass
class RunHarness:
    """A namespace with the storage Secret, and a bucket."""

    cluster: Cluster
    namespace: str
    bucket: str
    s3: Any
    api: httpx2.Client
    """For polling: starting kubectl each time takes too long."""
    observers: "dict[str, PodObserver]" = field(default_factory=dict)
    """By run."""

    @classmethod
    def create(cls, cluster: Cluster, namespace: str) -> "RunHarness":
        store = cluster.s3
        client = boto3.client(
            "s3",
            endpoint_url=store.endpoint,
            aws_access_key_id=store.access_key,
            aws_secret_access_key=store.secret_key,
            region_name="us-east-1",
        )
        bucket = f"runs-{secrets.token_hex(4)}"
        client.create_bucket(Bucket=bucket)
        return cls(cluster, namespace, bucket, client, api_client(cluster.kubeconfig))

    def kubectl(self, *arguments: str, input: str | None = None) -> str:
        return self.cluster.kubectl("--namespace", self.namespace, *arguments, input=input)

    def manifest(self, name: str, script: str = "", **changes: Any) -> dict[str, Any]:
        """A run of one GPU.

        `script` is its stand-ins' script (standin/jobs/script.py); `changes` replace fields of its spec.
        It has no reports unless spec.runtime.report says so.
        """
        runtime = {"report": False, **changes.pop("runtime", {})}
        spec = {
            "dataset": {
                "source": f"s3://{self.bucket}/none",
                "maxLength": 512,
                "workers": 1,
                "conversation": {"identity": script or "-"},
            },
            "teacher": {"model": "s3://models/none", "gpus": 0},
            "student": {"shape": "tiny", "gpus": 1},
            "training": {"sequenceLength": 512, "globalBatchTokens": 4096},
            "stages": [{"name": "vanilla", "kind": "Vanilla", "tokens": 6000}],
            "evaluation": {"completions": 0},
            "export": {"stages": []},
            "storage": self.storage(install.SECRET),
            "runtime": copy.deepcopy(runtime),
            **copy.deepcopy(changes),
        }
        return {
            "apiVersion": "vpmoe.dev/v1alpha1",
            "kind": "DistillRun",
            "metadata": {"name": name},
            "spec": spec,
        }

    def apply(self, name: str, script: str = "", **changes: Any) -> None:
        self.kubectl("apply", "--filename", "-", input=yaml.safe_dump(self.manifest(name, script, **changes)))

    def observe_pods(self, name: str) -> None:
        """Start to observe the run's pods."""
        self.observers[name] = PodObserver(self, name)

    def patch(self, name: str, **spec: Any) -> None:
        self.kubectl("patch", "distillrun", name, "--type=merge", "--patch", json.dumps({"spec": spec}))

    def get_object(self, kind: Kind, name: str = "", **query: str) -> dict[str, Any]:
        """An object, or without a name a list; empty if there is no such object."""
        answer = self.api.get(kind.path(self.namespace, name), params=query)
        return {} if answer.status_code == 404 else dict(answer.raise_for_status().json())

    def get(self, name: str) -> dict[str, Any]:
        """The run; empty if there is none."""
        return self.get_object(DISTILLRUN, name)

    def status(self, name: str) -> dict[str, Any]:
        return dict(self.get(name).get("status", {}))

    def step(self, name: str, step: str = "vanilla") -> dict[str, Any]:
        """Status of a step; empty if there is none yet."""
        return next((found for found in self.status(name).get("steps", []) if found["name"] == step), {})

    def condition(self, name: str, kind: str) -> dict[str, Any]:
        return next((found for found in self.status(name).get("conditions", []) if found["type"] == kind), {})

    def wait_until(self, name: str, true: Callable[[], bool], what: str, seconds: float = 240) -> None:
        """Wait until `true()`, or fail with the description of the run."""
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end:
                pytest.fail(
                    f"not within {seconds:g} s: {what}\n{self.kubectl('describe', 'distillrun', name)}"
                )
            time.sleep(0.3)

    def wait_for_phase(self, name: str, *phases: str, seconds: float = 240) -> dict[str, Any]:
        """Wait for one of the phases. Returns the status."""
        self.wait_until(
            name,
            lambda: self.status(name).get("phase") in phases,
            f"{name} is {' or '.join(phases)}",
            seconds,
        )
        return self.status(name)

    def wait_for_checkpoint(self, name: str) -> None:
        """Wait until the step vanilla has reported a checkpoint."""
        self.wait_until(
            name,
            lambda: self.step(name).get("checkpoint", {}).get("iteration", 0) > 0,
            f"{name} has a checkpoint",
        )

    def create_secret(self, name: str) -> dict[str, Any]:
        """Create another Secret with the credentials. Returns a spec.storage that uses it."""
        store = self.cluster.s3
        keys = [
            f"--from-literal=AWS_ACCESS_KEY_ID={store.access_key}",
            f"--from-literal=AWS_SECRET_ACCESS_KEY={store.secret_key}",
        ]
        self.kubectl("create", "secret", "generic", name, *keys)
        return self.storage(name)

    def storage(self, secret: str, endpoint: str = "") -> dict[str, Any]:
        """A spec.storage with this Secret and endpoint."""
        return {
            "endpoint": endpoint or self.cluster.s3.pod_endpoint,
            "bucket": self.bucket,
            "credentialsSecret": secret,
        }

    def objects(self, name: str, *kinds: Kind) -> list[dict[str, Any]]:
        """Objects with the run's label, without the Job that deletes its folder and the pods of that Job."""
        selector = f"vpmoe.dev/run={name},vpmoe.dev/step!=clear"
        return [found for kind in kinds for found in self.get_object(kind, labelSelector=selector)["items"]]

    def clear_jobs(self, name: str) -> list[dict[str, Any]]:
        """The Job that deletes the run's folder; empty if there is none."""
        selector = f"vpmoe.dev/run={name},vpmoe.dev/step=clear"
        return list(self.get_object(JOB, labelSelector=selector)["items"])

    def child_names(self, name: str) -> list[str]:
        """Names of all Jobs and PyTorchJobs of a run."""
        return sorted(found["metadata"]["name"] for found in self.objects(name, JOB, PYTORCHJOB))

    def events(self, name: str) -> dict[str, str]:
        """Messages of the Events about a run, by reason."""
        listed = self.get_object(
            EVENT, fieldSelector=f"involvedObject.kind=DistillRun,involvedObject.name={name}"
        )["items"]
        return {event["reason"]: event["message"] for event in listed}

    def create_event(self, name: str, kind: str) -> None:
        """Create an Event of this kind, Normal or Warning, about an object that does not exist."""
        about = {"kind": "Pod", "namespace": self.namespace, "name": name, "uid": f"uid-of-{name}"}
        metadata = {"name": f"{name}.{secrets.token_hex(4)}", "namespace": self.namespace}
        event = {"metadata": metadata, "involvedObject": about, "type": kind, "reason": "Other"}
        self.api.post(EVENT.path(self.namespace), json=event).raise_for_status()

    def starts(self, name: str, step: str = "vanilla") -> list[tuple[int, int]]:
        """(attempt, step or number of parts that it started from) of each process of a step, in order."""
        folder = f"{self.run_folder(name)}/standin/{step}/"
        keys = [
            found["Key"]
            for found in self.s3.list_objects_v2(Bucket=self.bucket, Prefix=folder).get("Contents", [])
        ]
        found = [json.loads(self.s3.get_object(Bucket=self.bucket, Key=key)["Body"].read()) for key in keys]
        return sorted((one["attempt"], one["from"]) for one in found)

    def run_folder(self, name: str) -> str:
        """The run's folder in the bucket."""
        return str(self.status(name)["provenance"]["folder"]).removeprefix(f"s3://{self.bucket}/")

    def has_objects(self, folder: str) -> bool:
        """Whether a folder of the bucket has objects."""
        return bool(self.s3.list_objects_v2(Bucket=self.bucket, Prefix=folder + "/").get("Contents"))


class PodObserver:
    """Polls a run's pods in a thread until `result` is called, to learn which were alive at the same time."""

    def __init__(self, harness: RunHarness, name: str) -> None:
        self._harness, self._name, self._stop = harness, name, threading.Event()
        self._together: set[frozenset[str]] = set()
        self._gpus = 0
        self._thread = threading.Thread(target=self._observe, daemon=True)
        self._thread.start()

    def result(self) -> tuple[set[frozenset[str]], int]:
        """Stop polling.

        Returns the sets of steps whose containers ran at once, and the most GPUs that pods held at once.
        """
        self._stop.set()
        self._thread.join()
        return self._together, self._gpus

    def _observe(self) -> None:
        while not self._stop.wait(0.3):
            alive = [
                pod
                for pod in self._harness.objects(self._name, POD)
                if pod["status"].get("phase") in ("Pending", "Running")
            ]
            ready = [
                pod
                for pod in alive
                if any("running" in one["state"] for one in pod["status"].get("containerStatuses", []))
            ]
            self._together.add(frozenset(pod["metadata"]["labels"]["vpmoe.dev/step"] for pod in ready))
            limits = [pod["spec"]["containers"][0]["resources"].get("limits", {}) for pod in alive]
            self._gpus = max(self._gpus, sum(int(limit.get("nvidia.com/gpu", 0)) for limit in limits))


def rejection(command: Callable[[], object]) -> str:
    """The error of a command that must fail."""
    try:
        command()
    except ClusterError as error:
        return str(error)
    raise AssertionError("the command succeeded")
