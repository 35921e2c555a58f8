"""Watches that end or fall silent, in each way, are started again, and the probes know about them."""

import asyncio
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from distill_operator import watch
from distill_operator.connection import Connection
from distill_operator.kube import DISTILLRUN, JOB, PYTORCHJOB, Kind, Kube
from distill_operator.metrics import REGISTRY
from distill_operator.watch import Change, Key, Watches, WatchStuck
from kubernetes.aio.client import Configuration

from tests.fakes.watch_server import FAULTS, Fault, WatchServer


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {
        "SERVER_TIMEOUT": 1, "SILENCE": 8, "PACE": 0.05, "CHECK": 0.05, "SERVED_SECONDS": 0.2,
        "BACKOFF": 0.05, "BACKOFF_LIMIT": 0.2,
    }.items():  # fmt: skip
        monkeypatch.setattr(watch, name, seconds)


class Bench:
    """Watches of namespaces of a WatchServer, and the changes that they have noticed."""

    def __init__(self, server: WatchServer, namespaces: list[str]) -> None:
        self.server, self.namespaces = server, namespaces
        self.changes: list[Change] = []
        self.on_change: Callable[[], object] = lambda: None
        self.kube = Kube(Connection(Configuration(host=server.url)))
        self.watches = Watches(self.kube, self._note, namespaces)

    def _note(self, change: Change) -> None:
        self.on_change()
        self.changes.append(change)

    @property
    def keys(self) -> list[Key]:
        return [change.key for change in self.changes]

    def watch_of(self, kind: Kind) -> watch.Watch:
        return next(found for found in self.watches._all() if found.kind == kind)

    def break_requests(self, fault: Fault, kind: Kind, namespace: str = "") -> list[str]:
        """Break all requests to list or to watch. Returns a list that grows with each."""
        broken = list[str]()

        def break_request(plural: str, where: str) -> Fault | None:
            if (plural, where) != (kind.plural, namespace):
                return None
            broken.append(plural)
            return fault

        self.server.fault = break_request
        return broken

    async def sees(self, kind: Kind, namespace: str = "a") -> None:
        """Add an object, and wait until its event has arrived."""
        run = f"run{len(self.server.objects)}"
        self.server.add(kind, namespace, run)
        await wait_for(lambda: (namespace, run) in self.keys, f"{namespace}/{run}")


async def wait_for(true: Callable[[], bool], what: str) -> None:
    try:
        async with asyncio.timeout(30):
            while not true():
                await asyncio.sleep(0.01)
    except TimeoutError:
        pytest.fail(f"not within 30 s: {what}")


def run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    work: Callable[[Bench], Awaitable[None]],
    namespaces: list[str],
    server: WatchServer | None = None,
    at_end: Callable[[], None] = lambda: None,
) -> None:
    """Run `work` beside the tasks of the watches, which must not end."""

    async def all_of_it() -> None:
        async with server or WatchServer() as running:
            config = {
                "current-context": "it",
                "clusters": [{"name": "it", "cluster": {"server": running.url}}],
                "users": [{"name": "it", "user": {"token": "secret"}}],
                "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
            }
            (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
            monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
            bench = Bench(running, namespaces)
            tasks = [asyncio.create_task(task, name=name) for name, task in bench.watches.tasks()]
            try:
                working = asyncio.create_task(work(bench))
                ended, _ = await asyncio.wait({working, *tasks}, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    task.result()
            finally:
                at_end()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await bench.kube.close()
                await asyncio.to_thread(join_kopf_threads)

    asyncio.run(all_of_it())


def join_kopf_threads() -> None:
    """Wait for all of kopf's threads: none may hang when it is told to end."""
    for thread in threading.enumerate():
        if thread.name.startswith("watch-"):
            thread.join(20)
            assert not thread.is_alive(), thread.name


def restarts(namespace: str) -> float:
    return sum(
        sample.value
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name == "vpmoe_operator_watch_restarts_total"
        and sample.labels["run_namespace"] == namespace
    )


@pytest.mark.parametrize("namespaces", [[], ["a"]], ids=["all namespaces", "a namespace"])
def test_every_kind_of_object_puts_the_key_of_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, namespaces: list[str]
) -> None:
    async def work(bench: Bench) -> None:
        bench.server.add(JOB, "a", "")  # somebody's, with an empty label
        for kind in (DISTILLRUN, JOB, PYTORCHJOB):
            await bench.sees(kind)
            change, meta = bench.changes[-1], bench.server.objects[-1]["metadata"]
            assert (change.kind, change.name, change.version) == (
                kind.name,
                meta["name"],
                meta["resourceVersion"],
            )
        assert ("a", "") not in bench.keys

    run(tmp_path, monkeypatch, work, namespaces)


FAILED, COMPLETE = ({"conditions": [{"type": type_, "status": "True"}]} for type_ in ("Failed", "Complete"))


@pytest.mark.parametrize(
    "brief, status",
    [
        (True, {}),
        pytest.param(True, {"active": 1, "ready": 0}, id="its pod starts"),
        pytest.param(False, {"active": 1, "ready": 1}, id="its pod runs"),
        pytest.param(
            True,
            {"active": 0, "ready": 0, "uncountedTerminatedPods": {"succeeded": ["u"]}},
            id="its pod has ended",
        ),
        pytest.param(False, COMPLETE, id="complete"),
        pytest.param(False, FAILED, id="failed"),
        pytest.param(False, {"conditions": [{"type": "FailureTarget", "status": "True"}]}, id="failing"),
        pytest.param(False, {"conditions": "none"}, id="of another form"),
    ],
)
def test_a_child_that_is_about_to_change_again_is_brief(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, brief: bool, status: dict[str, Any]
) -> None:
    async def work(bench: Bench) -> None:
        bench.server.add(JOB, "a", "first", spec={}, status=status)
        name = bench.server.objects[-1]["metadata"]["name"]
        await wait_for(lambda: name in [change.name for change in bench.changes], name)
        assert [change.brief for change in bench.changes if change.name == name] == [brief]

    run(tmp_path, monkeypatch, work, ["a"])


def test_watches_that_break_in_each_way_work_again_and_leave_another_namespace_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each fault breaks the watch of one kind in a namespace of its own, again and again, and then ends."""
    faults = {fault.lower().replace(" ", "-"): fault for fault in FAULTS}
    kinds = {namespace: watch.KINDS[number % 3] for number, namespace in enumerate(faults)}

    async def work(bench: Bench) -> None:
        for namespace in bench.namespaces:
            await bench.sees(JOB, namespace)
        before = restarts("intact")
        broken = Counter[str]()

        def break_request(plural: str, namespace: str) -> Fault | None:
            if namespace not in kinds or plural != kinds[namespace].plural:
                return None
            broken[namespace] += 1
            return faults[namespace]

        bench.server.fault = break_request
        await wait_for(lambda: all(broken[namespace] > 1 for namespace in kinds), f"requests: {broken}")
        for kind in watch.KINDS:
            await bench.sees(kind, "intact")
        bench.server.fault = lambda plural, namespace: None
        for namespace, kind in kinds.items():
            await bench.sees(kind, namespace)
        assert restarts("intact") == before
        lists = [bench.server.requests.count(kind.path("intact")) for kind in watch.KINDS]
        assert lists == [1, 1, 1], "nothing was listed again"
        assert bench.watches.health_problem() == bench.watches.readiness_problem() == ""

    run(tmp_path, monkeypatch, work, ["intact", *faults])


def test_a_server_that_ends_each_connection_at_once_is_not_flooded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "PACE", 0.5)

    async def work(bench: Bench) -> None:
        await bench.sees(JOB)
        began = asyncio.get_running_loop().time()
        broken = bench.break_requests("watch closed at once", JOB)
        await wait_for(lambda: len(broken) > 5, "it connects again and again")
        assert asyncio.get_running_loop().time() - began > 4 * watch.PACE

    run(tmp_path, monkeypatch, work, [])


def test_refused_credentials_are_tried_once_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kopf itself would try them again without a pause."""

    async def work(bench: Bench) -> None:
        broken = bench.break_requests("list 401", DISTILLRUN)
        await wait_for(lambda: len(broken) > 3, "it is tried again")
        assert restarts("") - before >= 3

    before = restarts("")
    run(tmp_path, monkeypatch, work, [])


def test_a_kind_is_watched_when_the_cluster_begins_to_serve_it_and_not_when_it_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "SILENCE", 4)

    async def work(bench: Bench) -> None:
        await bench.sees(JOB)
        await asyncio.sleep(watch.SILENCE + 1)
        assert restarts("") == before, "a kind that is not served is not silent"
        for _ in range(2):
            bench.server.kinds.append(PYTORCHJOB)
            await bench.sees(PYTORCHJOB)
            bench.server.kinds.remove(PYTORCHJOB)
            await wait_for(lambda: not bench.watch_of(PYTORCHJOB).served, "the kind is known to be missing")
            await bench.sees(JOB)
        assert bench.watches.health_problem() == ""

    before = restarts("")
    run(tmp_path, monkeypatch, work, [], WatchServer(kinds=[DISTILLRUN, JOB]))


def test_probes_and_metrics_know_how_long_a_watch_has_been_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not answered fails the liveness probe. An error does not: a new process would get it too."""
    monkeypatch.setattr(watch, "UNANSWERED", 4)

    def age(bench: Bench, kind: Kind) -> float:
        bench.watches.refresh_gauges()
        labels = {"run_namespace": "", "resource": kind.plural}
        return REGISTRY.get_sample_value("vpmoe_operator_watch_age_seconds", labels) or 0.0

    async def work(bench: Bench) -> None:
        for kind in watch.KINDS:
            await bench.sees(kind)
        bench.break_requests("list 403", DISTILLRUN)
        await wait_for(lambda: bool(bench.watches.readiness_problem()), "not ready")
        assert "the API server answers 403" in bench.watches.readiness_problem()
        assert bench.watches.health_problem() == ""
        assert age(bench, DISTILLRUN) > 4
        bench.server.fault = lambda plural, namespace: None
        await wait_for(lambda: not bench.watches.readiness_problem(), "ready")
        bench.break_requests("watch never answered", JOB)
        await wait_for(lambda: bool(bench.watches.health_problem()), "not healthy")
        assert "jobs in all namespaces has not been answered for" in bench.watches.health_problem()
        assert bench.watches.readiness_problem() == ""

    run(tmp_path, monkeypatch, work, [])


def test_a_kopf_that_does_not_end_when_it_is_told_to_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is blocked in a handler, so it neither reads its watches nor does it heed its stop flag."""
    monkeypatch.setattr(watch, "STOP_TIMEOUT", 1)
    monkeypatch.setattr(watch, "SILENCE", 1)
    release = threading.Event()

    async def work(bench: Bench) -> None:
        await bench.sees(JOB)
        bench.on_change = lambda: release.wait(30)
        bench.server.add(JOB, "a", "last")
        await asyncio.sleep(30)

    with pytest.raises(WatchStuck, match=r"kopf has not ended within 1 s"):
        run(tmp_path, monkeypatch, work, [], at_end=release.set)
