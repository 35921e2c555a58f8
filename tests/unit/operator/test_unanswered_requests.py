"""Requests to create a Job that have no answer, and are carried out later than the operator goes on.

An API server in memory, because a real one does so only when it is overloaded.
"""

import asyncio
from dataclasses import dataclass, field

import pytest
from distill_operator import executor
from distill_operator.actions import DeleteChild
from distill_operator.kube import DISTILLRUN, JOB, NODE, Json, KubeError
from distill_operator.namespaces import WatchedNamespaces
from distill_operator.observe import parse_run
from distill_operator.pod_progress import PodProgress
from distill_operator.reconcile import Reconciler

from tests.fakes.fake_api import FakeApi, status
from tests.fakes.simulated_cluster import SETTINGS, manifest
from vpmoe.api.status import ChildRef

FIRST, SECOND = "first-preprocess-a1", "first-preprocess-a2"


@dataclass
class World:
    """The run `first`, whose requests to create Jobs have no answer while `silent`."""

    api: FakeApi = field(default_factory=FakeApi)
    silent: bool = True

    def __post_init__(self) -> None:
        ready = [{"type": "Ready", "status": "True"}]
        nodes = {"conditions": ready, "allocatable": {"nvidia.com/gpu": "64"}}
        self.api.add(NODE, {"metadata": {"name": "n"}, "status": nodes})
        self.api.add(DISTILLRUN, manifest(deletionPolicy="Retain"))
        self.api.breaks = lambda method, path: self.silent and method == "POST" and path.endswith("/jobs")
        self.restart_operator()

    def restart_operator(self) -> None:
        kube = self.api.client()
        progress = PodProgress(lambda key: None, interval=10.0)
        self.reconciler = Reconciler(kube, progress, SETTINGS, WatchedNamespaces(kube, ()))

    def reconcile(self, times: int = 1) -> Json:
        """Reconcile as often as this; return the status of the step preprocess."""

        async def repeat() -> None:
            for _ in range(times):
                try:
                    await self.reconciler.reconcile(("team", "first"))
                except KubeError as error:
                    assert error.code in (0, 403, 500), error

        asyncio.run(repeat())
        step: Json = self.api.get(DISTILLRUN, "team", "first")["status"]["steps"][0]
        return step

    def suspend(self, suspend: bool = True) -> None:
        run = self.api.get(DISTILLRUN, "team", "first")
        self.api.add(DISTILLRUN, {**run, "spec": {**run["spec"], "suspend": suspend}})

    def jobs(self) -> list[str]:
        return sorted(
            obj["metadata"]["name"] for obj in self.api.objects.values() if obj.get("kind") == "Job"
        )


def test_a_run_is_suspended_only_when_no_late_job_can_appear(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    assert world.reconcile()["state"] == "Running"
    world.suspend()
    step = world.reconcile(3)
    assert (step["state"], world.jobs()) == ("Running", [])
    assert f"waiting until Job {FIRST} cannot appear any more" in step["message"]
    monkeypatch.setattr(executor, "UNANSWERED_SECONDS", 0.0)
    assert world.reconcile()["state"] == "Suspended"


def test_a_job_that_appears_late_is_deleted_before_the_next_attempt_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    world.reconcile()
    world.suspend()
    world.reconcile()
    world.api.deliver()
    assert world.jobs() == [FIRST]
    step = world.reconcile(3)
    assert (step["state"], world.jobs()) == ("Running", []), "which request has made it is not known"
    monkeypatch.setattr(executor, "UNANSWERED_SECONDS", 0.0)
    assert world.reconcile()["state"] == "Suspended"
    world.silent = False
    world.suspend(False)
    step = world.reconcile(3)
    assert (step["state"], step["attempt"], world.jobs()) == ("Running", 2, [SECOND])


def test_a_job_that_was_requested_twice_is_missed_only_when_no_late_one_can_appear(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    world.reconcile()
    world.silent = False
    assert world.reconcile(2)["child"]["uid"] and world.jobs() == [FIRST]
    del world.api.objects[JOB.path("team", FIRST)]  # by hand
    step = world.reconcile(3)
    assert (step["state"], step["attempt"], world.jobs()) == ("Running", 1, [])
    world.api.deliver()
    step = world.reconcile(2)
    assert (step["attempt"], world.jobs()) == (1, [FIRST]), "it carries on the attempt"
    del world.api.objects[JOB.path("team", FIRST)]
    monkeypatch.setattr(executor, "UNANSWERED_SECONDS", 0.0)
    step = world.reconcile(2)
    assert (step["state"], step["attempt"], world.jobs()) == ("Running", 2, [SECOND])


def test_the_requests_of_a_process_that_is_gone_may_be_carried_out_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    world.reconcile()
    world.suspend()
    world.restart_operator()
    assert world.reconcile(2)["state"] == "Running"
    world.api.deliver()
    step = world.reconcile(3)
    assert (step["state"], world.jobs()) == ("Running", [])
    monkeypatch.setattr(executor, "UNANSWERED_SECONDS", 0.0)
    assert world.reconcile()["state"] == "Suspended"


@pytest.mark.parametrize(
    "code, message, state",
    [
        pytest.param(403, "exceeded quota", "Suspended", id="rejected"),
        pytest.param(500, "failed calling webhook: connection refused", "Suspended", id="webhook"),
        pytest.param(500, "etcdserver: request timed out", "Running", id="etcd may store it yet"),
    ],
)
def test_a_request_that_was_answered_delays_nothing(code: int, message: str, state: str) -> None:
    world = World(silent=False)
    world.api.fault = lambda method, path: (
        status(code, message) if method == "POST" and path.endswith("/jobs") else None
    )
    assert world.reconcile(4)["reason"] == "ChildRefused"
    world.suspend()
    assert world.reconcile()["state"] == state


def test_an_old_child_keeps_its_name_while_a_request_to_create_it_may_be_carried_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Old children are deleted, and nothing waits for one: a late request would make it again."""
    world = World()
    world.reconcile()
    world.silent = False
    world.reconcile(2)
    delete = DeleteChild(ChildRef(kind=JOB.name, name=FIRST))
    acting, run = world.reconciler._executor, world.api.get(DISTILLRUN, "team", "first")

    def execute() -> None:
        observed = parse_run(run)
        asyncio.run(acting.execute(delete, observed, observed.status, run))

    execute()
    assert world.jobs() == [FIRST]
    monkeypatch.setattr(executor, "UNANSWERED_SECONDS", 0.0)
    execute()
    assert world.jobs() == []
