"""A child is gone only if the API server says so. An answer that is cut short, or a gateway's, starts no
second attempt beside pods that are alive, and clears no bucket that they write to."""

import asyncio
import json
from typing import Any

import pytest
from distill_operator.attempt import config_map_name
from distill_operator.connection import Answer
from distill_operator.kube import CONFIGMAP, DISTILLRUN, JOB, POD, PYTORCHJOB, Json, Kind, KubeError
from distill_operator.namespaces import WatchedNamespaces
from distill_operator.observe import POD_LABEL
from distill_operator.pod_progress import PodProgress
from distill_operator.reconcile import Reconciler

from tests.fakes.fake_api import FakeApi, status
from tests.fakes.simulated_cluster import SETTINGS, manifest, training_run
from vpmoe.api import DistillRun, labels

NOT_FOUND = status(404, 'jobs.batch "first-vanilla-a1" not found', "first-vanilla-a1").body
NO_ANSWERS = {
    "half of a Status": Answer(404, "application/json", NOT_FOUND[: len(NOT_FOUND) // 2]),
    "nothing": Answer(404, "application/json", b""),
    "a gateway's JSON": Answer(404, "application/json", b'{"message": "no route matched"}'),
    "a gateway's page": Answer(404, "text/html", b"<html><h1>404 Not Found</h1></html>"),
    "half of the API server's page": Answer(404, "text/plain; charset=utf-8", b"404 page n"),
}
NOT_SERVED = Answer(404, "text/plain; charset=utf-8", b"404 page not found\n")
"""What the API server says of a path that it does not serve."""
BACKENDS = [pytest.param(kind, id=kind.name) for kind in (JOB, PYTORCHJOB)]


class World:
    """A run whose child of the step vanilla was deleted. A pod of it is still alive. `answer` is given to
    requests for the path `broken`."""

    def __init__(self, backend: Kind, **meta: Any) -> None:
        spec = {"runtime": {"backend": backend.name}, "deletionPolicy": "Delete"}
        obj = manifest(**spec)
        obj["metadata"] |= {"finalizers": [labels.FINALIZER], **meta}
        self.api = FakeApi()
        self.api.add(DISTILLRUN, {**obj, "status": training_run(**spec).status.dump()})
        self.config_map = config_map_name(DistillRun.parse(obj, stored=True))
        self.child = backend.path("team", "first-vanilla-a1")
        self.api.add(POD, self._pod(backend))
        self.broken, self.answer = "", NOT_SERVED
        self.api.fault = lambda method, path: self.answer if path == self.broken else None
        kube = self.api.client()
        progress = PodProgress(lambda key: None, interval=10.0)
        self._reconciler = Reconciler(kube, progress, SETTINGS, WatchedNamespaces(kube, ()))

    def _pod(self, backend: Kind) -> Json:
        return {
            "metadata": {
                "namespace": "team",
                "name": "first-vanilla-a1-x",
                "labels": {POD_LABEL[backend.name]: "first-vanilla-a1"},
                "deletionTimestamp": "2026-01-01T00:00:00Z",
            },
            "spec": {
                "containers": [{"name": "main"}],
                "volumes": [{"name": "run", "configMap": {"name": self.config_map}}],
            },
            "status": {"phase": "Running"},
        }

    def reconcile(self) -> None:
        asyncio.run(self._reconciler.reconcile(("team", "first")))

    def step(self) -> Json:
        run = self.api.get(DISTILLRUN, "team", "first")
        return next(dict(step) for step in run["status"]["steps"] if step["name"] == "vanilla")

    def created(self) -> list[str]:
        """Names of the children and of the Job that clears the folder, as far as they were created."""
        folders = tuple(f"{kind.path('team')}/" for kind in (JOB, PYTORCHJOB))
        return [path.rpartition("/")[2] for path in self.api.objects if path.startswith(folders)]

    def remove_pod(self) -> None:
        del self.api.objects[POD.path("team", "first-vanilla-a1-x")]

    def path(self, what: str) -> str:
        """The path of the child, of the pods, or of the run's ConfigMap, which is read if no pod is left."""
        if what == "ConfigMap":
            self.remove_pod()
        paths = {
            "child": self.child,
            "pods": POD.path("team"),
            "ConfigMap": CONFIGMAP.path("team", self.config_map),
        }
        return paths[what]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", ["child", "pods", "ConfigMap"])
@pytest.mark.parametrize("answer", NO_ANSWERS)
def test_an_answer_that_is_not_the_api_servers_ends_no_attempt(answer: str, what: str, backend: Kind) -> None:
    world = World(backend)
    world.broken, world.answer = world.path(what), NO_ANSWERS[answer]
    before = world.step()
    for _ in range(3):
        with pytest.raises(KubeError, match="404 that is no complete answer of the API server"):
            world.reconcile()
    assert (world.step(), world.created()) == (before, [])


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_attempt_whose_child_was_deleted_ends_with_its_last_pod(backend: Kind) -> None:
    """What the cases above would otherwise do."""
    world = World(backend)
    for _ in range(3):
        world.reconcile()
    assert world.step()["message"].endswith("was deleted, and its pod first-vanilla-a1-x is terminating")
    assert (world.step()["attempt"], world.created()) == (1, [])
    world.remove_pod()
    for _ in range(3):
        world.reconcile()
    assert (world.step()["attempt"], world.created()) == (2, ["first-vanilla-a2"])


@pytest.mark.parametrize("what", ["child", "pods"])
def test_jobs_and_pods_that_are_not_served_end_no_attempt(what: str) -> None:
    """Only PyTorchJobs may be missing in a cluster."""
    world = World(JOB)
    world.broken = world.path(what)
    before = world.step()
    for _ in range(3):
        with pytest.raises(KubeError, match="404 page not found"):
            world.reconcile()
    assert (world.step(), world.created()) == (before, [])


def test_pytorchjobs_that_are_not_served_end_no_attempt() -> None:
    world = World(PYTORCHJOB)
    world.broken = world.child
    for _ in range(3):
        world.reconcile()
    assert (world.step()["state"], world.step()["attempt"], world.created()) == ("Running", 1, [])
    conditions = world.api.get(DISTILLRUN, "team", "first")["status"]["conditions"]
    assert "KubeflowMissing" in {condition["reason"] for condition in conditions}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("answer", ["not served", *NO_ANSWERS])
def test_no_bucket_is_cleared_while_a_pod_of_an_unknown_child_is_alive(answer: str, backend: Kind) -> None:
    world = World(backend, deletionTimestamp="2026-01-01T00:00:00Z")
    world.broken, world.answer = world.child, NO_ANSWERS.get(answer, NOT_SERVED)
    if (answer, backend) == ("not served", PYTORCHJOB):  # its CRD was deleted, and with it all PyTorchJobs
        world.reconcile()
        assert world.created() == []
        world.remove_pod()
        world.reconcile()
        (clears,) = world.created()
        assert clears.startswith("first-clear-")
        return
    with pytest.raises(KubeError, match="404"):
        world.reconcile()
    assert world.created() == []
    assert labels.FINALIZER in world.api.get(DISTILLRUN, "team", "first")["metadata"]["finalizers"]


def test_the_half_of_a_status_is_no_json() -> None:
    """Otherwise the cases are not what their names say."""
    with pytest.raises(ValueError):
        json.loads(NO_ANSWERS["half of a Status"].body)
