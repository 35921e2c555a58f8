"""From a pod's progress to the run's status: reconciles on an API server in memory, with pods that really
serve."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from distill_operator import pod_progress, pod_records
from distill_operator.kube import DISTILLRUN, JOB, NODE, POD, Json
from distill_operator.namespaces import WatchedNamespaces
from distill_operator.pod_progress import PodProgress
from distill_operator.pod_records import PodAddress, PodImage
from distill_operator.reconcile import Reconciler
from distill_operator.watch import Key

from tests.fakes.fake_api import FakeApi
from tests.fakes.pods import Pods, report
from tests.fakes.simulated_cluster import SETTINGS, manifest
from vpmoe.failure import success_record


@pytest.fixture(autouse=True)
def loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pods of these tests have addresses that no pod has."""
    monkeypatch.setattr(pod_records, "_is_pod_address", lambda text: True)


class World:
    """A Reconciler, and runs named `first`, one in each namespace."""

    def __init__(self, port: int) -> None:
        self.api, self.queued = FakeApi(), asyncio.Queue[Key]()
        ready = [{"type": "Ready", "status": "True"}]
        status = {"conditions": ready, "allocatable": {"nvidia.com/gpu": "512"}}
        self.api.add(NODE, {"metadata": {"name": "n"}, "status": status})
        kube = self.api.client()
        self.progress = PodProgress(self.queued.put_nowait, 0.02, port)
        self.reconciler = Reconciler(kube, self.progress, SETTINGS, WatchedNamespaces(kube, ()))

    async def preprocess(self, namespace: str, *pods: PodAddress) -> None:
        """A run whose Job preprocess runs in these pods."""
        obj = manifest()
        meta = {**obj["metadata"], "namespace": namespace, "uid": f"{namespace:0<8}-uid"}
        self.api.add(DISTILLRUN, {**obj, "metadata": meta})
        await self.reconcile(namespace)
        self.change_job(namespace, ready=2)
        for pod in pods:
            self.set_pod(namespace, pod, {"running": {}})

    def job(self, namespace: str) -> Json:
        return self.api.get(JOB, namespace, "first-preprocess-a1")

    def change_job(self, namespace: str, **status: Any) -> None:
        self.api.add(JOB, {**self.job(namespace), "status": status})

    def set_pod(self, namespace: str, pod: PodAddress, state: Json) -> None:
        owner = {"uid": self.job(namespace)["metadata"]["uid"], "controller": True}
        meta = {"name": pod.name, "namespace": namespace, "uid": pod.name, "ownerReferences": [owner]}
        image = pod.image or PodImage("r.example.com/vpmoe/trainer:1")
        container = {"name": "preprocess", "state": state, "imageID": f"r.example.com/x@{image.digest}"}
        phase = "Running" if "running" in state else "Succeeded"
        status = {"phase": phase, "podIP": pod.ip, "containerStatuses": [container]}
        spec = {"containers": [{"name": "preprocess", "image": image.image}]}
        self.api.add(POD, {"metadata": meta, "spec": spec, "status": status})

    async def reconcile(self, namespace: str) -> None:
        await self.reconciler.reconcile((namespace, "first"))

    async def reconcile_until(self, namespace: str, true: Callable[[Json], bool]) -> Json:
        """Reconcile what is queued until that is true of the step preprocess."""
        async with asyncio.timeout(60):
            while not true(self.step(namespace)):
                await self.reconcile((await self.queued.get())[0])
        return self.step(namespace)

    def step(self, namespace: str) -> Json:
        step: Json = self.api.get(DISTILLRUN, namespace, "first")["status"]["steps"][0]
        return step

    def lists_of_pods(self, namespace: str) -> int:
        return self.api.requests.count(("GET", f"/api/v1/namespaces/{namespace}/pods"))


def run_with_pods(test: Callable[[Pods, World], Awaitable[None]]) -> None:
    async def main() -> None:
        async with Pods() as pods:
            world = World(pods.port)
            await test(pods, world)
            for run, step in list(world.progress._steps):
                world.progress._drop(run, step)

    asyncio.run(main())


def test_progress_is_read_in_the_background_and_the_outcome_from_the_pods_record() -> None:
    async def test(pods: Pods, world: World) -> None:
        served = [report("preprocess", done=number, message=f"part {number}") for number in (1, 2)]
        pod = await pods.healthy(*served)
        await world.preprocess("team", pod)
        await world.reconcile("team")
        step = await world.reconcile_until("team", lambda step: step.get("partsDone") == 2)
        assert (step["state"], step["message"]) == ("Running", "part 2")
        for _ in range(5):
            await world.reconcile("team")
        assert world.lists_of_pods("team") == 1, "the addresses are known"
        record = success_record(report("preprocess", done=9, state="Succeeded", message="Complete"))
        ended = {"terminated": {"exitCode": 0, "message": record.to_json_line().decode()}}
        world.set_pod("team", pod, ended)
        world.change_job("team", succeeded=2, conditions=[{"type": "Complete", "status": "True"}])
        await world.reconcile("team")
        step = world.step("team")
        assert (step["state"], step["message"], step["partsDone"]) == ("Succeeded", "Complete", 9)

    run_with_pods(test)


def test_the_status_has_the_image_of_the_pods_and_the_commit_that_they_serve() -> None:
    """As soon as they serve it: a process that is killed records nothing."""
    digest = f"sha256:{'a' * 64}"

    async def test(pods: Pods, world: World) -> None:
        pod = await pods.healthy(report("preprocess", commit="1" * 40))
        await world.preprocess("team", replace(pod, image=PodImage("r.example.com/trainer:1", digest)))
        await world.reconcile("team")
        found = {"firstAttempt": 1, "lastAttempt": 1, "image": "r.example.com/trainer:1", "digest": digest}
        assert world.step("team")["images"] == [found]
        step = await world.reconcile_until("team", lambda step: step.get("partsDone") == 1)
        assert step["images"] == [{**found, "commit": "1" * 40}]

    run_with_pods(test)


def test_no_reconcile_waits_for_a_pod_and_no_run_for_the_pods_of_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pod_progress, "TIMEOUT_SECONDS", 3600.0)

    async def test(pods: Pods, world: World) -> None:
        silent = await pods.black_hole()
        namespaces = [f"silent-{number}" for number in range(24)]
        for namespace in namespaces:
            await world.preprocess(namespace, silent, pods.unreachable())
        await world.preprocess("team", await pods.healthy(report("preprocess", done=3)))
        async with asyncio.timeout(60):
            for _ in range(3):
                for namespace in [*namespaces, "team"]:
                    await world.reconcile(namespace)
                    await asyncio.sleep(0)
        step = await world.reconcile_until("team", lambda step: step.get("partsDone") == 3)
        assert step["state"] == "Running"
        assert {world.step(namespace)["state"] for namespace in namespaces} == {"Running"}

    run_with_pods(test)


def test_the_addresses_of_pods_that_stop_answering_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pod_progress, "STARTING_SECONDS", 0.0)

    async def test(pods: Pods, world: World) -> None:
        await world.preprocess("team", PodAddress("moved", pods.refusing().ip))
        await world.reconcile("team")
        new = await pods.healthy(report("preprocess", done=3), name="moved")
        world.set_pod("team", new, {"running": {}})
        await world.reconcile_until("team", lambda step: step.get("partsDone") == 3)
        assert world.lists_of_pods("team") > 1

    run_with_pods(test)


def test_the_pods_of_a_run_that_is_gone_are_not_read_any_more() -> None:
    async def test(pods: Pods, world: World) -> None:
        pod = await pods.healthy(report("preprocess"))
        await world.preprocess("team", pod)
        await world.reconcile("team")
        await world.queued.get()
        del world.api.objects[DISTILLRUN.path("team", "first")]
        await world.reconcile("team")
        assert world.progress._steps == {}

    run_with_pods(test)


def test_a_pod_on_the_host_network_is_not_asked_and_the_condition_says_so() -> None:
    async def test(pods: Pods, world: World) -> None:
        pod = await pods.counting("on-host")
        await world.preprocess("team", pod)
        stored = world.api.get(POD, "team", pod.name)
        world.api.add(POD, {**stored, "status": {**stored["status"], "hostIP": pod.ip}})
        for _ in range(3):
            await world.reconcile("team")
        conditions = world.api.get(DISTILLRUN, "team", "first")["status"]["conditions"]
        found = next(one for one in conditions if one["type"] == "ProgressReadable")
        assert (found["status"], found["reason"]) == ("False", "HostNetwork")
        assert "pod on-host is on the host network" in found["message"]
        assert world.step("team")["state"] == "Running"
        assert pods.requests == []

    run_with_pods(test)
