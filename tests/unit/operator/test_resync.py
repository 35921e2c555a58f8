"""What the operator asks of the API server while nothing changes, and that nothing that changes is missed.

Requests are counted on an API server in memory. There are no watches: a test says which events come.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from distill_operator import executor
from distill_operator import reconcile as reconcile_module
from distill_operator import resync as resync_module
from distill_operator.kube import (
    CONFIGMAP,
    DISTILLRUN,
    EVENT,
    JOB,
    NODE,
    POD,
    PYTORCHJOB,
    Json,
    Kind,
    KubeError,
)
from distill_operator.last_reconciles import LastReconciles
from distill_operator.namespaces import WatchedNamespaces
from distill_operator.pod_progress import PodProgress
from distill_operator.pod_records import AttemptId, PodAddress, ProgressReading
from distill_operator.reconcile import Reconciler
from distill_operator.resync import LONGEST_PAUSE, UNCHANGED_REQUESTS, Resync
from distill_operator.settings import Settings
from distill_operator.watch import Change, Key

from tests.fakes.fake_api import FakeApi, status
from tests.fakes.simulated_cluster import SETTINGS, manifest
from vpmoe.api import labels

LISTS = [
    ("GET", DISTILLRUN.path()),
    ("GET", JOB.path()),
    ("GET", PYTORCHJOB.path()),
]
"""The requests of a resync."""
RUNNING: Json = {"running": {}}
CHILD = "first-vanilla-a1"


class SilentPods(PodProgress):
    """Progress of pods that answer once, and never anything new. Without tasks and connections."""

    def __init__(self) -> None:
        super().__init__(lambda key: None, 10.0)

    def follow(
        self,
        run: Key,
        attempt: AttemptId,
        child: str,
        pods: tuple[PodAddress, ...] | None,  # type: ignore[override]
        ending: bool = False,
        always_list: bool = False,
    ) -> ProgressReading:
        super().follow(run, attempt, child, [] if pods else pods, ending, always_list)
        if pods is not None:
            self._steps[run, attempt.step].wants_pods = not pods or always_list
        return ProgressReading(attempted=True)


@dataclass
class World:
    """A Reconciler and a Resync on an API server in memory. `now` is the monotonic clock of their records."""

    watched: tuple[str, ...] = ()
    settings: Settings = SETTINGS
    api: FakeApi = field(default_factory=FakeApi)
    now: float = 1000.0
    put: dict[Key, float] = field(default_factory=dict)
    """What the last resync has queued, with the delay."""

    def __post_init__(self) -> None:
        ready = [{"type": "Ready", "status": "True"}]
        allocatable = {"conditions": ready, "allocatable": {"nvidia.com/gpu": "64"}}
        self.api.add(NODE, {"metadata": {"name": "n"}, "status": allocatable})
        self.start_operator()

    def start_operator(self) -> None:
        """A new process, which knows nothing."""
        kube = self.api.client()
        self.namespaces = WatchedNamespaces(kube, self.watched)
        self.reconciler = Reconciler(kube, SilentPods(), self.settings, self.namespaces)
        self.reconciler.last = self.last = LastReconciles(lambda: self.now)
        admission = self.reconciler.admission
        self.resyncing = Resync(
            kube, self.settings, self.namespaces, admission, self.last, self.put.__setitem__
        )

    def add(self, name: str = "first", namespace: str = "team", **spec: Any) -> None:
        obj = manifest(**spec)
        meta = {**obj["metadata"], "name": name, "namespace": namespace, "uid": f"{name}-{namespace:0<8}-uid"}
        self.api.add(DISTILLRUN, {**obj, "metadata": meta})

    def reconcile(self, name: str = "first", namespace: str = "team") -> float | None:
        self.now += 1
        return asyncio.run(self.reconciler.reconcile((namespace, name)))

    def look(self) -> None:
        """Decide about the runs that wait for GPUs."""
        asyncio.run(self.reconciler.admission.look(0.0))

    def resync(self) -> set[str]:
        """Resync. Returns the names of the runs that are queued."""
        self.now += 1
        self.put.clear()
        self.pause = asyncio.run(self.resyncing.resync())
        return {name for _, name in self.put}

    def run(self, name: str = "first") -> Json:
        return self.api.get(DISTILLRUN, "team", name)

    def change(self, kind: Kind, name: str, namespace: str = "team", **fields: Any) -> None:
        """Change fields of an object, as somebody else would."""
        self.api.add(kind, {**self.api.get(kind, namespace, name), **fields})

    def delete(self, kind: Kind, name: str) -> None:
        del self.api.objects[kind.path("team", name)]

    def set_pod(self, child: Kind, name: str, *containers: str, state: Json = RUNNING) -> None:
        """The only pod of a child, with these containers; the first is the job's own."""
        owner = {"uid": self.api.get(child, "team", name)["metadata"]["uid"], "controller": True}
        meta = {"name": f"{name}-0", "namespace": "team", "uid": f"pod-{name}", "ownerReferences": [owner]}
        states = [{"name": one, "state": state if one == containers[0] else RUNNING} for one in containers]
        phase = "Running" if any("running" in one["state"] for one in states) else "Pending"
        pod_status = {"phase": phase, "podIP": "10.0.0.1", "containerStatuses": states}
        spec = {"containers": [{"name": one} for one in containers]}
        self.api.add(POD, {"metadata": meta, "spec": spec, "status": pod_status})

    def requests_of(self, action: Callable[[], object]) -> list[tuple[str, str]]:
        before = len(self.api.requests)
        action()
        return self.api.requests[before:]


def preprocess(world: World) -> None:
    """A run that has just created its Job."""
    world.add()
    world.reconcile()


def train(world: World, backend: str = "Job", *sidecars: str, **spec: Any) -> None:
    """A run that trains in one pod."""
    world.add(**{"runtime": {"backend": backend, **spec.pop("runtime", {})}, **spec})
    world.reconcile()
    world.change(JOB, "first-preprocess-a1", status={"conditions": [{"type": "Complete", "status": "True"}]})
    world.reconcile()
    world.resync()
    world.look()
    world.reconcile()
    kind, container = (JOB, "train") if backend == "Job" else (PYTORCHJOB, "pytorch")
    started = (
        {"active": 1, "ready": 1} if backend == "Job" else {"replicaStatuses": {"Master": {"active": 1}}}
    )
    world.change(kind, CHILD, status=started)
    world.set_pod(kind, CHILD, container, *sidecars)
    world.reconcile()
    step = world.run()["status"]["steps"][1]
    assert (step["state"], step["reason"]) == ("Running", "Running")


def train_pytorchjob(world: World) -> None:
    train(world, "PyTorchJob")


def wait_in_kueue(world: World) -> None:
    train(world, runtime={"queueName": "q"})
    world.change(JOB, CHILD, spec={"parallelism": 1, "suspend": True}, status={})
    world.reconcile()


def suspended(world: World) -> None:
    world.add(suspend=True)
    world.reconcile()


def finished(world: World, how: str = "Complete", **spec: Any) -> None:
    train(world, **spec)
    world.change(JOB, CHILD, status={"conditions": [{"type": how, "status": "True"}]})
    world.delete(POD, f"{CHILD}-0")
    world.reconcile()


def failed(world: World) -> None:
    finished(world, "Failed", runtime={"attempts": 1, "interruptions": 1})


def expiring(world: World) -> None:
    finished(world, ttlAfterFinished="1h")


def unreadable(world: World) -> None:
    world.add()
    world.change(DISTILLRUN, "first", status={"phase": "Archived"})
    world.reconcile()
    world.reconcile()


QUIET: dict[str, Callable[[World], None]] = {
    "trains in a Job": train,
    "trains in a PyTorchJob": train_pytorchjob,
    "waits in Kueue's queue": wait_in_kueue,
    "suspended": suspended,
    "succeeded": finished,
    "failed": failed,
    "finished, and expires": expiring,
    "has a status that cannot be read": unreadable,
}


@pytest.mark.parametrize("state", QUIET)
def test_a_run_that_does_not_change_is_listed_and_nothing_else(state: str) -> None:
    world = World()
    QUIET[state](world)
    delay = world.reconcile()
    assert delay is None or delay > 600
    for _ in range(3):
        assert world.requests_of(world.resync) == LISTS
        assert world.put == {}


@pytest.mark.parametrize("state", QUIET)
def test_each_run_that_is_not_finished_is_reconciled_once_by_a_new_process(state: str) -> None:
    world = World()
    QUIET[state](world)
    world.start_operator()
    done = state in ("succeeded", "failed")
    assert world.resync() == (set() if done else {"first"})
    world.reconcile()
    assert world.resync() == set()


def test_a_reconcile_of_a_steady_step_reads_the_run_and_its_child_alone() -> None:
    for backend, kind in (("Job", JOB), ("PyTorchJob", PYTORCHJOB)):
        world = World()
        train(world, backend)
        own = [("GET", DISTILLRUN.path("team", "first")), ("GET", kind.path("team", CHILD))]
        assert world.requests_of(world.reconcile) == own, backend


# What no event told.


def edit_run(world: World) -> None:
    world.change(DISTILLRUN, "first", status={**world.run()["status"], "message": "edited"})


def change_child(world: World) -> None:
    world.change(JOB, CHILD, status={"active": 1})


def delete_child(world: World) -> None:
    world.delete(JOB, CHILD)


def replace_child(world: World) -> None:
    world.delete(JOB, CHILD)
    world.api.add(JOB, {"metadata": {"name": CHILD, "namespace": "team", "uid": "another"}, "spec": {}})


def delete_run(world: World) -> None:
    world.delete(DISTILLRUN, "first")


@pytest.mark.parametrize("change", [edit_run, change_child, delete_child, replace_child, delete_run])
def test_a_resync_queues_a_run_whose_event_was_lost(change: Callable[[World], None]) -> None:
    world = World()
    train(world)
    world.add("second")
    world.reconcile("second")
    world.reconcile("second")
    assert world.resync() == set()
    change(world)
    assert world.resync() == {"first"}
    assert world.put == {("team", "first"): 0.0}
    assert world.resync() == {"first"}, "until it was reconciled"
    world.reconcile()
    assert world.resync() == set()


def test_a_resync_queues_a_run_whose_child_was_created_without_an_event() -> None:
    world = World()
    preprocess(world)
    assert world.resync() == {"first"}
    world.reconcile()
    assert world.resync() == set()


@pytest.mark.parametrize(
    "method, path", [("GET", "/distillruns/first"), ("PUT", "/status"), ("POST", "/jobs")]
)
def test_a_resync_queues_a_run_whose_reconcile_has_failed(method: str, path: str) -> None:
    world = World()
    world.add()
    world.api.fault = lambda m, p: status(503, "away") if m == method and p.endswith(path) else None
    with pytest.raises(KubeError):
        world.reconcile()
    world.api.fault = lambda method, path: None
    assert world.resync() == {"first"}
    world.reconcile()
    world.reconcile()
    assert world.resync() == set()


def test_a_list_that_was_begun_before_a_reconcile_does_not_queue_its_run() -> None:
    """The list may be older than what the reconcile has seen. If it is not, the next list says so."""
    world = World()
    train(world)
    seen = {("Job", CHILD): world.api.get(JOB, "team", CHILD)["metadata"]["resourceVersion"]}
    version = world.run()["metadata"]["resourceVersion"]
    listed = world.now + 0.5
    assert not world.last.differs(("team", "first"), version, seen, listed, complete=True)
    assert world.last.differs(("team", "first"), "older", seen, listed, complete=True)
    world.reconcile()
    assert not world.last.differs(("team", "first"), "older", seen, listed, complete=True)


def test_children_that_could_not_be_listed_have_not_vanished(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    train(world)
    world.api.fault = lambda method, path: status(403, "no") if path == JOB.path() else None
    assert world.resync() == set()
    assert "could not list children" in caplog.text
    assert world.pause == min(SETTINGS.poll_seconds, SETTINGS.resync_seconds), "sooner again"
    edit_run(world)
    assert world.resync() == {"first"}, "runs are compared all the same"


def test_children_of_a_namespace_that_does_not_answer_have_not_vanished() -> None:
    world = World(watched=("team", "other"))
    train(world)
    away = JOB.path("team")
    world.api.fault = lambda method, path: status(500, "away") if path == away else None
    assert world.resync() == set()
    world.api.fault = lambda method, path: status(500, "away") if path == DISTILLRUN.path("team") else None
    assert world.resync() == set(), "nor have its runs"


def test_a_run_in_a_refused_namespace_is_reconciled_when_it_can_be_read_again() -> None:
    world = World(watched=("team", "other"))
    train(world)
    world.api.fault = lambda method, path: status(403, "no") if "/namespaces/team/" in path else None
    assert world.resync() == {"first"}, "it may be gone"
    assert world.reconcile() is None
    assert world.resync() == set()
    world.api.fault = lambda method, path: None
    assert world.resync() == {"first"}


def test_a_resync_that_fails_is_repeated_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one lets admission begin."""
    world, pauses = World(), list[float]()

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            raise asyncio.CancelledError

    monkeypatch.setattr(asyncio, "sleep", sleep)
    world.api.fault = lambda method, path: status(503, "away") if len(pauses) == 0 else None
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(world.resyncing.run())
    assert pauses == [SETTINGS.poll_seconds, SETTINGS.resync_seconds]


# Polls.


def unscheduled(world: World) -> None:
    train(world)
    world.change(JOB, CHILD, status={"active": 1})
    world.set_pod(JOB, CHILD, "train", state={"waiting": {"reason": "ImagePullBackOff"}})


def ending(world: World) -> None:
    train(world)
    meta = world.api.get(JOB, "team", CHILD)["metadata"]
    world.change(JOB, CHILD, metadata={**meta, "deletionTimestamp": "2026-01-01T00:00:00Z"})


def failed_with_pods_alive(world: World) -> None:
    train(world, "PyTorchJob")
    world.change(PYTORCHJOB, CHILD, status={"conditions": [{"type": "Failed", "status": "True"}]})


def name_taken(world: World) -> None:
    world.add()
    world.api.add(
        JOB, {"metadata": {"name": "first-preprocess-a1", "namespace": "team", "uid": "x"}, "spec": {}}
    )
    with pytest.raises(KubeError):
        world.reconcile()


def config_map_taken(world: World) -> None:
    world.add()
    name = f"first-config-{world.run()['metadata']['uid'][:8]}"
    world.api.add(CONFIGMAP, {"metadata": {"name": name, "namespace": "team", "uid": "x"}})
    with pytest.raises(KubeError):
        world.reconcile()


def without_kubeflow(world: World) -> None:
    world.api.fault = lambda method, path: status(404) if path.startswith("/apis/kubeflow.org") else None
    world.add(runtime={"backend": "PyTorchJob"})
    world.reconcile()


def sidecar_is_not_ready(world: World) -> None:
    """The Job counts its pod as not ready, so the end of its own container changes nothing of the Job."""
    train(world, "Job", "mesh")
    world.change(JOB, CHILD, status={"active": 1})


def pytorchjob_with_sidecar(world: World) -> None:
    train(world, "PyTorchJob", "mesh")


def lingering(world: World) -> None:
    train(world, "PyTorchJob", "mesh")
    world.set_pod(PYTORCHJOB, CHILD, "pytorch", "mesh", state={"terminated": {"exitCode": 0}})
    world.api.fault = lambda method, path: status(500, "later") if method == "DELETE" else None
    with pytest.raises(KubeError):
        world.reconcile()
    world.api.fault = lambda method, path: status(200) if method == "DELETE" else None


POLLED = [
    unscheduled,
    ending,
    failed_with_pods_alive,
    name_taken,
    config_map_taken,
    without_kubeflow,
    sidecar_is_not_ready,
    pytorchjob_with_sidecar,
    lingering,
]


@pytest.mark.parametrize("state", POLLED)
def test_a_run_that_waits_for_what_no_event_tells_is_polled(state: Callable[[World], None]) -> None:
    world = World()
    state(world)
    assert world.reconcile() == SETTINGS.poll_seconds
    if state is without_kubeflow:
        world.api.fault = lambda method, path: None
        world.reconcile()
        assert world.run()["status"]["steps"][0]["state"] == "Running"
    world.resync()
    assert world.put in ({}, {("team", "first"): 0.0})


def test_the_end_of_an_own_container_beside_a_sidecar_is_seen_although_no_object_changes() -> None:
    """The pods of a PyTorchJob are in phase Running as long as the sidecar runs."""
    world = World()
    pytorchjob_with_sidecar(world)
    world.set_pod(PYTORCHJOB, CHILD, "pytorch", "mesh", state={"terminated": {"exitCode": 65}})
    world.reconcile()
    assert "exit 65" in world.run()["status"]["steps"][1]["outcome"]["message"]


def test_the_more_runs_are_polled_the_longer_each_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconcile_module, "POLLS", 0.1)  # reconciles a second
    world = World()
    names = [f"r{number}" for number in range(4)]
    for name in names:
        world.add(name)
        world.reconcile(name)
    delays = [world.reconcile(name) for name in names]
    assert delays == [10.0, 20.0, 30.0, 40.0]
    world.delete(DISTILLRUN, "r0")
    world.change(DISTILLRUN, "r1", spec={**world.run("r1")["spec"], "stages": []})
    for name in ("r0", "r1"):
        world.reconcile(name)
    assert world.reconcile("r3") == 20.0, "a run that is gone, or not polled any more, does not count"


# The safety net.


def trained(world: World, number: int) -> list[str]:
    names = [f"r{index}" for index in range(number)]
    for name in names:
        world.add(name, suspend=True)
        world.reconcile(name)
        world.reconcile(name)
    return names


def test_runs_that_do_not_change_are_reconciled_from_time_to_time_a_few_at_once() -> None:
    world = World()
    names = trained(world, 40)
    assert world.resync() == set()
    world.now += SETTINGS.reconcile_seconds
    queued = world.resync()
    spare = int(SETTINGS.resync_seconds * UNCHANGED_REQUESTS)
    assert (len(queued), queued) == (spare, set(names[:spare])), "the oldest, one request each"
    assert sorted(world.put.values()) == [index / UNCHANGED_REQUESTS for index in range(spare)]
    for name in queued:
        world.reconcile(name)
    assert world.resync() == set(names[spare : 2 * spare]), "then others"


def test_a_run_with_children_counts_for_as_many_requests() -> None:
    world = World()
    train(world)
    world.reconcile()
    last = world.last.oldest(0.0)[0][1]
    assert last.requests == len(world.requests_of(world.reconcile)) == 2


@pytest.mark.parametrize("state", ["succeeded", "failed", "finished, and expires"])
def test_finished_runs_are_never_reconciled_without_a_reason(state: str) -> None:
    world = World()
    QUIET[state](world)
    world.now += 100 * SETTINGS.reconcile_seconds
    assert world.resync() == (set() if state != "finished, and expires" else {"first"})


@pytest.mark.parametrize(
    "requests, pause", [(1, 60.0), (13, 60.0), (15, 60.0), (50, 200.0), (10_000, LONGEST_PAUSE)]
)
def test_a_list_of_many_pages_is_made_less_often(
    monkeypatch: pytest.MonkeyPatch, requests: int, pause: float
) -> None:
    """1,000 runs and 5,000 children are 13 pages of 500."""
    world = World()

    async def list_children(namespaces: WatchedNamespaces) -> Any:
        listing = await namespaces.list(JOB)
        return type(listing)(listing.objects, [], requests - 1)

    monkeypatch.setattr(resync_module, "list_children", list_children)
    world.resync()
    assert world.pause == pause


def test_an_idle_operator_makes_less_than_one_request_a_second() -> None:
    """The figures of resync.py, with 1,000 runs and 5,000 children."""
    pages = 1000 / 500 + 5000 / 500 + 1
    renewals, watches = 4 / SETTINGS.lease.seconds, 3 / 30
    assert renewals + watches + pages / SETTINGS.resync_seconds + UNCHANGED_REQUESTS < 0.9


# Bookkeeping.


def test_what_is_known_of_a_run_is_forgotten_with_it() -> None:
    world = World()
    for name in ("a", "b"):
        world.add(name)
        world.reconcile(name)
        world.reconcile(name)
    assert len(world.last) == len(world.reconciler._polled) == 2
    for name in ("a", "b"):
        world.delete(DISTILLRUN, name)
    assert world.resync() == {"a", "b"}
    for name in ("a", "b"):
        world.reconcile(name)
    assert len(world.last) == len(world.reconciler._polled) == 0
    assert world.resync() == set()


# Events.


def event(world: World, kind: Kind, name: str, version: str | None = None) -> Change:
    """An event about an object as it is now, or in another version."""
    found = world.api.get(kind, "team", name)["metadata"]["resourceVersion"]
    return Change(("team", "first"), kind.name, name, found if version is None else version)


def test_events_of_objects_that_the_last_reconcile_saw_are_left_out() -> None:
    world = World()
    train(world)
    assert world.last.covers(event(world, DISTILLRUN, "first")), "the operator's own write"
    assert world.last.covers(event(world, JOB, CHILD))
    assert world.last.covers(event(world, JOB, "first-preprocess-a1", "99")), "no reconcile reads it any more"
    for kind, name in ((DISTILLRUN, "first"), (JOB, CHILD)):
        assert not world.last.covers(event(world, kind, name, "99")), "another version"
        assert not world.last.covers(event(world, kind, name, "")), "deleted"
    assert not world.last.covers(Change(("team", "second"), DISTILLRUN.name, "second", "1")), "not known"


def test_the_event_of_a_child_that_was_just_created_is_not_left_out() -> None:
    """Its uid is not in the status yet."""
    world = World()
    preprocess(world)
    created = event(world, JOB, "first-preprocess-a1")
    assert not world.last.covers(created)
    world.reconcile()
    assert world.last.covers(created)


def test_the_write_of_a_finalizer_is_the_operators_own() -> None:
    world = World()
    world.add(deletionPolicy="Delete", suspend=True)
    world.reconcile()
    assert world.run()["metadata"]["finalizers"]
    assert world.last.covers(event(world, DISTILLRUN, "first"))


def test_no_event_is_left_out_after_a_failure_or_while_the_run_is_deleted() -> None:
    world = World()
    train(world, deletionPolicy="Delete")
    world.api.fault = lambda method, path: status(503, "away") if path.endswith(CHILD) else None
    with pytest.raises(KubeError):
        world.reconcile()
    assert not world.last.covers(event(world, DISTILLRUN, "first"))
    world.api.fault = lambda method, path: None
    world.reconcile()
    assert world.last.covers(event(world, DISTILLRUN, "first"))
    meta = {**world.run()["metadata"], "deletionTimestamp": "2026-01-01T00:00:00Z"}
    world.change(DISTILLRUN, "first", metadata=meta)
    world.reconcile()
    assert not world.last.covers(event(world, DISTILLRUN, "first"))
    assert not world.last.covers(event(world, JOB, "first-preprocess-a1"))
    assert world.resync() == {"first"}


def test_an_event_during_a_reconcile_is_left_out_only_if_the_reconcile_has_read_that_version() -> None:
    world = World()
    train(world)
    before, child = event(world, DISTILLRUN, "first"), event(world, JOB, CHILD)
    change_child(world)
    read = list[tuple[bool, bool, bool]]()

    def fault(method: str, path: str) -> None:
        if path.endswith(CHILD):
            later = event(world, JOB, CHILD)
            read.append((world.last.covers(before), world.last.covers(child), world.last.covers(later)))

    world.api.fault = fault  # type: ignore[assignment]
    world.reconcile()
    assert read == [(True, False, False)]
    assert world.last.covers(event(world, JOB, CHILD))


def test_a_whole_run_takes_few_requests(caplog: pytest.LogCaptureFixture) -> None:
    """With the events that a real API server sends: each change of an object once."""
    caplog.set_level(logging.WARNING)
    world = World()
    skipped = 0

    def changed(kind: Kind, name: str) -> None:
        nonlocal skipped
        if world.last.covers(event(world, kind, name)):
            skipped += 1
        else:
            world.reconcile()
            if kind is not DISTILLRUN:
                changed(DISTILLRUN, "first")

    world.add(runtime={"backend": "Job"})
    world.resync()
    before = len(world.api.requests)
    changed(DISTILLRUN, "first")
    changed(DISTILLRUN, "first")
    for name, container in (("first-preprocess-a1", "preprocess"), (CHILD, "train")):
        changed(JOB, name)
        pods = world.api.get(JOB, "team", name)["spec"]["parallelism"]
        world.set_pod(JOB, name, container)
        for child_status in (
            {"active": pods},
            {"active": pods, "ready": pods},
            {"conditions": [{"type": "Complete", "status": "True"}]},
        ):
            world.change(JOB, name, status=child_status)
            changed(JOB, name)
        if name != CHILD:
            world.look()
            world.reconcile()
    assert world.run()["status"]["phase"] == "Succeeded"
    assert len(world.api.requests) - before <= 45
    assert skipped >= 8


def test_events_of_a_child_are_read_only_if_its_pods_have_not_started_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def reads_events(world: World) -> bool:
        return ("GET", EVENT.path("team")) in world.requests_of(world.reconcile)

    world = World()
    preprocess(world)
    assert not reads_events(world)
    monkeypatch.setattr(executor, "STARTING_SECONDS", 0.0)
    assert reads_events(world)
    monkeypatch.undo()
    world.start_operator()
    assert reads_events(world), "a new process does not know when the child was created"


def test_objects_of_other_runs_do_not_count() -> None:
    """A child belongs to the run that controls it, whatever its label says."""
    world = World()
    train(world)
    stranger = {"name": "first-vanilla-a7", "namespace": "team", "uid": "x", "labels": {labels.RUN: "first"}}
    world.api.add(JOB, {"metadata": stranger, "spec": {"parallelism": 1}})
    assert world.resync() == set()
