"""A namespace and a bucket for runs of stand-in jobs: apply, look, wait. The jobs are tests/fakes/standin's, everything else is real."""

import copy
import json
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import httpx2
import pytest
import yaml
from distill_operator.kube import DISTILLRUN, EVENT, JOB, POD, PYTORCHJOB, Kind
from lightkube.config import client_adapter
from lightkube.config.kubeconfig import KubeConfig

from devcluster import ClusterError, install
from devcluster.access import Cluster

ROOT = Path(__file__).parents[2]
IMAGE = "vpmoe/standin:dev"
IMAGES = ["--set", f"images.trainer={IMAGE}", "--set", f"images.inference={IMAGE}"]
FAST = ["--set", "resyncSeconds=2", "--set", "backoff.baseSeconds=1", *IMAGES]
"""Helm values with which the operator runs stand-ins, and users do not wait."""


def operator(cluster: Cluster, *arguments: str) -> None:
    """The installed operator with other values."""
    place = ["distill-operator", "charts/distill-operator", "--namespace", install.NAMESPACE]
    cluster.helm("upgrade", *place, "--reuse-values", *arguments, "--wait", "--timeout", "2m")


def restore(cluster: Cluster) -> None:
    """The operator as its users install it."""
    install.operator(cluster)


STAGES = [
    {"name": kind.lower(), "kind": kind, "tokens": 6000} for kind in ("Vanilla", "Rescored", "TeacherForced")
]
"""One stage of each kind that can be carried out."""


@dataclass
class Team:
    """A namespace with the storage Secret, and a bucket of its own."""

    cluster: Cluster
    namespace: str
    bucket: str
    s3: Any
    api: httpx2.Client
    """For looks at the cluster: kubectl, which tests act with, costs too much to be asked all the time."""
    witnesses: "dict[str, Witness]" = field(default_factory=dict)
    """By the run that they look at."""

    @classmethod
    def create(cls, cluster: Cluster, namespace: str) -> "Team":
        store = cluster.s3
        client = boto3.client(
            "s3",
            endpoint_url=store.endpoint,
            aws_access_key_id=store.access_key,
            aws_secret_access_key=store.secret_key,
            region_name="us-east-1",
        )
        bucket = f"team-{secrets.token_hex(4)}"
        client.create_bucket(Bucket=bucket)
        api = client_adapter.Client(
            KubeConfig.from_file(cluster.kubeconfig).get(), client_adapter.ConnectionParams()
        )
        return cls(cluster, namespace, bucket, client, api)

    def kubectl(self, *arguments: str, input: str | None = None) -> str:
        return self.cluster.kubectl("--namespace", self.namespace, *arguments, input=input)

    def manifest(self, name: str, words: str = "", **changes: Any) -> dict[str, Any]:
        """A run of one GPU; `words` are its stand-ins' script, `changes` replace parts of its spec."""
        spec = {
            "dataset": {
                "source": f"s3://{self.bucket}/none",
                "maxLength": 512,
                "workers": 1,
                "conversation": {"identity": words or "-"},
            },
            "teacher": {"model": "s3://models/none", "gpus": 0},
            "student": {"shape": "tiny", "gpus": 1},
            "training": {"sequenceLength": 512, "globalBatchTokens": 4096},
            "stages": [{"name": "vanilla", "kind": "Vanilla", "tokens": 6000}],
            "evaluation": {"completions": 0},
            "storage": self.storage(install.SECRET),
            **copy.deepcopy(changes),
        }
        return {
            "apiVersion": "vpmoe.dev/v1alpha1",
            "kind": "DistillRun",
            "metadata": {"name": name},
            "spec": spec,
        }

    def apply(self, name: str, words: str = "", **changes: Any) -> None:
        self.kubectl("apply", "--filename", "-", input=yaml.safe_dump(self.manifest(name, words, **changes)))

    def watch(self, name: str) -> None:
        """Have a witness of that run from now on."""
        self.witnesses[name] = Witness(self, name)

    def patch(self, name: str, **spec: Any) -> None:
        self.kubectl("patch", "distillrun", name, "--type=merge", "--patch", json.dumps({"spec": spec}))

    def read(self, kind: Kind, name: str = "", **query: str) -> dict[str, Any]:
        """An object, or a list; empty where there is no such object."""
        answer = self.api.get(kind.path(self.namespace, name), params=query)
        return {} if answer.status_code == 404 else dict(answer.raise_for_status().json())

    def get(self, name: str) -> dict[str, Any]:
        """The run; empty where there is none."""
        return self.read(DISTILLRUN, name)

    def status(self, name: str) -> dict[str, Any]:
        return dict(self.get(name).get("status", {}))

    def step(self, name: str, step: str = "vanilla") -> dict[str, Any]:
        """Status of a step; empty before there is one."""
        return next((found for found in self.status(name).get("steps", []) if found["name"] == step), {})

    def condition(self, name: str, kind: str) -> dict[str, Any]:
        return next((found for found in self.status(name).get("conditions", []) if found["type"] == kind), {})

    def until(self, name: str, true: Callable[[], bool], what: str, seconds: float = 240) -> None:
        """Wait until it is so, or fail with what the run says."""
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end:
                pytest.fail(
                    f"not within {seconds:g} s: {what}\n{self.kubectl('describe', 'distillrun', name)}"
                )
            time.sleep(0.3)

    def phase(self, name: str, *phases: str, seconds: float = 240) -> dict[str, Any]:
        """Wait for one of the phases; the status then."""
        self.until(
            name,
            lambda: self.status(name).get("phase") in phases,
            f"{name} is {' or '.join(phases)}",
            seconds,
        )
        return self.status(name)

    def trains(self, name: str) -> None:
        """Wait until training has reported a checkpoint of its latest attempt."""
        self.until(
            name,
            lambda: self.step(name).get("checkpoint", {}).get("iteration", 0) > 0,
            f"{name} has a checkpoint",
        )

    def secret(self, name: str) -> dict[str, Any]:
        """The storage of a run whose credentials are in another Secret, which is made."""
        store = self.cluster.s3
        keys = [
            f"--from-literal=AWS_ACCESS_KEY_ID={store.access_key}",
            f"--from-literal=AWS_SECRET_ACCESS_KEY={store.secret_key}",
        ]
        self.kubectl("create", "secret", "generic", name, *keys)
        return self.storage(name)

    def storage(self, secret: str, endpoint: str = "") -> dict[str, Any]:
        """A run's storage with those credentials, at that address."""
        return {
            "endpoint": endpoint or self.cluster.s3.endpoint,
            "bucket": self.bucket,
            "credentialsSecret": secret,
        }

    def objects(self, name: str, *kinds: Kind) -> list[dict[str, Any]]:
        """Objects of a run by its label."""
        return [
            found
            for kind in kinds
            for found in self.read(kind, labelSelector=f"vpmoe.dev/run={name}")["items"]
        ]

    def children(self, name: str) -> list[str]:
        """Names of all Jobs and PyTorchJobs of a run."""
        return sorted(found["metadata"]["name"] for found in self.objects(name, JOB, PYTORCHJOB))

    def events(self, name: str) -> dict[str, str]:
        """Messages of the Events about a run, by reason."""
        listed = self.read(EVENT, fieldSelector=f"involvedObject.kind=DistillRun,involvedObject.name={name}")[
            "items"
        ]
        return {event["reason"]: event["message"] for event in listed}

    def starts(self, name: str, step: str = "vanilla") -> list[tuple[int, int]]:
        """(attempt, first step or parts found) of each process of a step that started, in order."""
        folder = f"{self.folder(name)}/standin/{step}/"
        keys = [
            found["Key"]
            for found in self.s3.list_objects_v2(Bucket=self.bucket, Prefix=folder).get("Contents", [])
        ]
        found = [json.loads(self.s3.get_object(Bucket=self.bucket, Key=key)["Body"].read()) for key in keys]
        return sorted((one["attempt"], one["from"]) for one in found)

    def folder(self, name: str) -> str:
        """The run's folder in the bucket."""
        return str(self.status(name)["provenance"]["folder"]).removeprefix(f"s3://{self.bucket}/")

    def kept(self, folder: str) -> bool:
        """Whether there is anything in a folder of the bucket."""
        return bool(self.s3.list_objects_v2(Bucket=self.bucket, Prefix=folder + "/").get("Contents"))


class Witness:
    """Looks at a run's pods over and over, from now until it is asked: what was alive at the same time is history by then."""

    def __init__(self, team: Team, name: str) -> None:
        self._team, self._name, self._over = team, name, threading.Event()
        self._together: set[frozenset[str]] = set()
        self._gpus = 0
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def told(self) -> tuple[set[frozenset[str]], int]:
        """Which steps' containers ran at once, and how many GPUs the pods that were alive had at most. It looks no more."""
        self._over.set()
        self._thread.join()
        return self._together, self._gpus

    def _look(self) -> None:
        while not self._over.wait(0.3):
            alive = [
                pod
                for pod in self._team.objects(self._name, POD)
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


def refused(command: Callable[[], object]) -> str:
    """What is said against a command that must not succeed."""
    try:
        command()
    except ClusterError as error:
        return str(error)
    raise AssertionError("it was accepted")
