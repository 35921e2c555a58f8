"""A fault of one run, or of one namespace, stops no other: unreadable statuses, exceptions, refused
namespaces."""

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from distill_operator import orphans
from distill_operator.actions import KeepBucket, SetFinalizer
from distill_operator.conditions import RECONCILE_ERROR, STATUS_UNREADABLE
from distill_operator.connection import Answer
from distill_operator.kube import DISTILLRUN, EVENT, JOB, NODE, POD, Json, KubeError
from distill_operator.metrics import NAMESPACE_ERRORS, RUNS
from distill_operator.namespaces import WatchedNamespaces
from distill_operator.observe import parse_run
from distill_operator.orphans import active_keys, delete_orphans, is_orphan, list_children
from distill_operator.plan import plan_unreadable
from distill_operator.pod_progress import PodProgress
from distill_operator.reconcile import Reconciler

from tests.fakes.fake_api import FakeApi, status
from tests.fakes.simulated_cluster import SETTINGS, manifest, training_run
from vpmoe.api import labels
from vpmoe.api.status import MOST_STEPS


def run_object(name: str, namespace: str = "team", **changes: Any) -> Json:
    """A stored DistillRun. Keywords replace top-level fields."""
    obj = {**manifest(), **changes}
    meta = {**obj["metadata"], "name": name, "namespace": namespace, "uid": f"{name:0<8}-uid"}
    return {**obj, "metadata": meta}


RUNNING = training_run().status.dump()
"""Status of a run that trains, as this version writes it."""


def with_steps(number: int) -> Json:
    steps = [{**RUNNING["steps"][0], "name": f"step{i}"} for i in range(number)]
    return {**RUNNING, "steps": steps}


def with_step(**changes: Any) -> Json:
    return {**RUNNING, "steps": [RUNNING["steps"][0], {**RUNNING["steps"][1], **changes}]}


UNREADABLE = {
    "an unknown phase": {**RUNNING, "phase": "Archived"},
    "an unknown phase before its first step": {"phase": "Archived"},
    "an unknown state of a step": with_step(state="Migrating"),
    "one step more than there can be": with_steps(MOST_STEPS + 1),
    "a step that the run does not have": with_step(name="warmup"),
    "a number that is a text": with_step(attempt="second"),
    "a list that is a mapping": {**RUNNING, "steps": {"vanilla": {}}},
    "a child of an unknown kind": with_step(child={"kind": "JobSet", "name": "newer-vanilla-a1"}),
    "an unknown outcome": with_step(outcome={"result": "Preempted", "message": ""}),
    "a time that is none": with_step(progressed="yesterday"),
    "a mapping that is a text": {**RUNNING, "provenance": "a commit"},
    "a phase that is a list": {**RUNNING, "phase": ["Running"]},
    "steps that are a number": {**RUNNING, "steps": 3},
    "steps that are texts": {**RUNNING, "steps": ["vanilla"]},
    "300 KiB in one message": {**RUNNING, "phase": "Archived", "message": "x" * 300 * 1024},
    "an unknown truth of a condition": {**RUNNING, "conditions": [{"type": "Ready", "status": "Maybe"}]},
}


@dataclass
class World:
    """A Reconciler on an API server in memory."""

    api: FakeApi = field(default_factory=FakeApi)
    watched: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        ready = [{"type": "Ready", "status": "True"}]
        node = {
            "metadata": {"name": "n"},
            "status": {"conditions": ready, "allocatable": {"nvidia.com/gpu": "64"}},
        }
        self.api.add(NODE, node)
        self.kube = self.api.client()
        self.namespaces = WatchedNamespaces(self.kube, self.watched)
        progress = PodProgress(lambda key: None, interval=10.0)
        self.reconciler = Reconciler(self.kube, progress, SETTINGS, self.namespaces)

    def add(self, name: str, namespace: str = "team", **changes: Any) -> None:
        self.api.add(DISTILLRUN, run_object(name, namespace, **changes))

    def run(self, name: str, namespace: str = "team") -> Json:
        return self.api.get(DISTILLRUN, namespace, name)

    def reconcile(self, name: str, namespace: str = "team") -> float | None:
        return asyncio.run(self.reconciler.reconcile((namespace, name)))

    def condition(self, name: str, type_: str = "Stalled") -> Json:
        conditions = self.run(name).get("status", {}).get("conditions", [])
        return next((found for found in conditions if found["type"] == type_), {})

    def events(self) -> list[str]:
        found = [obj for obj in self.api.objects.values() if obj.get("kind") == EVENT.name]
        return [event["reason"] for event in found for _ in range(event["count"])]

    def jobs(self) -> list[str]:
        return sorted(
            obj["metadata"]["name"] for obj in self.api.objects.values() if obj.get("kind") == JOB.name
        )


# Statuses that this version cannot read.


@pytest.mark.parametrize("stored", [pytest.param(found, id=name) for name, found in UNREADABLE.items()])
def test_a_run_with_an_unreadable_status_gets_a_condition_and_stays_as_it_is(stored: Json) -> None:
    world = World()
    world.add("newer", status=stored)
    assert world.reconcile("newer") is None
    found = world.condition("newer")
    assert (found["status"], found["reason"]) == ("True", STATUS_UNREADABLE)
    assert "status." in found["message"] and "Upgrade the operator" in found["message"]
    assert world.condition("newer", "Progressing")["status"] == "False"
    others = {"Stalled", "Progressing"}
    after = {**world.run("newer")["status"]}
    conditions = after.pop("conditions")
    assert after == {key: value for key, value in stored.items() if key != "conditions"}
    assert [one for one in conditions if one["type"] not in others] == [
        one for one in stored.get("conditions", []) if one["type"] not in others
    ]
    assert world.events() == [STATUS_UNREADABLE]
    version = world.run("newer")["metadata"]["resourceVersion"]
    world.reconcile("newer")
    assert world.run("newer")["metadata"]["resourceVersion"] == version, "it says so once"
    assert world.events() == [STATUS_UNREADABLE]


@pytest.mark.parametrize("stored", [pytest.param(found, id=name) for name, found in UNREADABLE.items()])
def test_other_runs_go_on_beside_a_run_with_an_unreadable_status(stored: Json) -> None:
    world = World()
    world.add("newer", status=stored)
    world.add("first")
    world.reconcile("first")
    assert world.run("first")["status"]["phase"] == "Running"
    assert world.jobs() == ["first-preprocess-a1"]


@pytest.mark.parametrize("conditions", [{"Ready": "True"}, ["Ready"], 7, [None]], ids=repr)
def test_conditions_of_another_form_are_replaced_by_one_that_says_so(conditions: Any) -> None:
    world = World()
    world.add("newer", status={**RUNNING, "conditions": conditions})
    world.reconcile("newer")
    assert world.condition("newer")["reason"] == STATUS_UNREADABLE
    assert world.run("newer")["status"]["phase"] == RUNNING["phase"]


@pytest.mark.parametrize("stored", [None, "Running", ["Running"], 7], ids=repr)
def test_a_status_that_is_no_mapping_stops_nobody(stored: Any) -> None:
    world = World()
    world.add("newer", status=stored)
    world.add("first")
    runs = asyncio.run(world.namespaces.list(DISTILLRUN)).complete()
    asyncio.run(world.reconciler.admission.update(runs, world.reconciler.admission.begin_list()))
    assert set(active_keys([orphans.without_unused(run) for run in runs])) == {
        ("team", "newer"),
        ("team", "first"),
    }
    children = asyncio.run(list_children(world.namespaces)).objects
    asyncio.run(delete_orphans(world.kube, runs, children))
    world.reconcile("newer")
    assert world.condition("newer")["reason"] == (STATUS_UNREADABLE if stored else "NotStalled")


def test_a_run_goes_on_when_its_status_can_be_read_again() -> None:
    world = World()
    world.add("first")
    world.reconcile("first")
    readable = world.run("first")["status"]["phase"]
    world.run("first")["status"]["phase"] = "Archived"
    world.reconcile("first")
    assert world.condition("first")["reason"] == STATUS_UNREADABLE
    world.run("first")["status"]["phase"] = readable
    world.reconcile("first")
    assert world.condition("first")["status"] == "False"
    assert world.condition("first", "Progressing")["status"] == "True"
    assert world.events().count("StallCleared") == 1


def test_a_finished_run_is_as_before_when_its_status_can_be_read_again() -> None:
    world = World()
    done = {**RUNNING, "phase": "Succeeded", "message": "All 2 steps have succeeded"}
    world.add("done", status={**done, "phase": "Archived"})
    world.reconcile("done")
    world.run("done")["status"]["phase"] = "Succeeded"
    world.reconcile("done")
    assert world.condition("done")["status"] == "False"
    assert world.condition("done", "Succeeded")["reason"] != STATUS_UNREADABLE


def test_fields_of_a_newer_version_are_kept_by_a_reconcile() -> None:
    """An operator that was rolled back goes on with a run if it understands enough of its status."""
    world = World()
    world.add("first")
    world.reconcile("first")
    stored = world.run("first")["status"]
    stored["energy"] = {"joules": 5}
    stored["steps"][0] |= {"paused": True}
    stored["provenance"]["signature"] = "x"
    world.run("first")["metadata"]["generation"] += 1
    world.reconcile("first")
    after = world.run("first")["status"]
    assert after["observedGeneration"] == 2, "the status was written"
    assert after["energy"] == {"joules": 5}
    assert after["steps"][0]["paused"] is True
    assert after["provenance"]["signature"] == "x"


def test_the_deletion_of_a_run_with_an_unreadable_status_ends_and_keeps_its_folder() -> None:
    world = World()
    world.add("newer", status=UNREADABLE["an unknown phase"])
    world.run("newer")["metadata"] |= {
        "deletionTimestamp": "2026-01-02T00:00:00Z",
        "finalizers": ["other/finalizer", labels.FINALIZER],
    }
    world.reconcile("newer")
    assert world.run("newer")["metadata"]["finalizers"] == ["other/finalizer"]
    assert world.run("newer")["status"] == UNREADABLE["an unknown phase"]
    assert world.events() == ["BucketKept"]


@pytest.mark.parametrize("deleting, finalizer", [(False, True), (True, False), (False, False), (True, True)])
def test_only_the_deletion_of_an_unreadable_run_has_actions(deleting: bool, finalizer: bool) -> None:
    obj = run_object("newer", status=UNREADABLE["an unknown phase"])
    obj["metadata"] |= {"finalizers": [labels.FINALIZER] if finalizer else []}
    obj["metadata"] |= {"deletionTimestamp": "2026-01-02T00:00:00Z"} if deleting else {}
    actions = plan_unreadable(parse_run(obj))
    assert [type(action) for action in actions] == (
        [KeepBucket, SetFinalizer] if deleting and finalizer else []
    )


def test_a_status_that_an_older_version_wrote_is_readable() -> None:
    """It may have fewer steps; a finished one may have others, which nobody decides about any more."""
    older = {**RUNNING, "steps": RUNNING["steps"][:1]}
    assert not parse_run(run_object("older", status=older)).unreadable
    finished = {**with_step(name="report"), "phase": "Succeeded"}
    assert not parse_run(run_object("finished", status=finished)).unreadable


# The resync.


@pytest.mark.parametrize("stored", [pytest.param(found, id=name) for name, found in UNREADABLE.items()])
def test_the_resync_survives_an_unreadable_status_and_deletes_none_of_its_children(stored: Json) -> None:
    world = World()
    world.add("newer", status=stored)
    world.add("first")
    child = {
        "metadata": {
            "name": "newer-unheard-a1",
            "namespace": "team",
            "uid": "c",
            "labels": {labels.RUN: "newer"},
            "ownerReferences": [{"uid": world.run("newer")["metadata"]["uid"], "controller": True}],
        },
        "spec": {"parallelism": 1},
        "kind": JOB.name,
    }
    world.api.add(JOB, child)
    runs = asyncio.run(world.namespaces.list(DISTILLRUN)).complete()
    assert set(active_keys(runs)) == {("team", "newer"), ("team", "first")}
    children = asyncio.run(list_children(world.namespaces)).complete()
    asyncio.run(delete_orphans(world.kube, runs, children))
    if stored is UNREADABLE["a step that the run does not have"]:
        return  # what is Running is known, and this child is not
    assert not is_orphan(world.run("newer"), child)
    assert world.jobs() == ["newer-unheard-a1"]


def test_the_resync_keeps_no_annotations() -> None:
    noted = run_object("noted", status=RUNNING)
    plain = parse_run(noted)
    noted["metadata"]["annotations"] = {"note": "x" * 2**18}
    kept = orphans.without_unused(noted)
    assert "annotations" not in kept["metadata"] and "annotations" in noted["metadata"]
    assert parse_run(kept) == plain


@pytest.mark.parametrize("status", [RUNNING, {**RUNNING, "steps": "none"}, {}, {"phase": "Succeeded"}])
def test_of_a_run_that_need_not_be_parsed_the_resync_keeps_what_it_uses(status: Json) -> None:
    whole = run_object("known", status=status)
    kept = orphans.without_unused(whole, known=True)
    assert len(str(kept)) < len(str(whole)) / 2 and "stages" not in kept["spec"]
    assert orphans.is_active(kept) == orphans.is_active(whole)
    for known in ("namespace", "name", "uid", "resourceVersion"):
        assert kept["metadata"][known] == whole["metadata"][known]
    for name in ("known-preprocess-a1", "known-vanilla-a9"):
        child = {"kind": JOB.name, "metadata": {"name": name}, "spec": {}}
        assert is_orphan(kept, child) == is_orphan(whole, child)


def test_an_unknown_phase_is_counted_as_unknown() -> None:
    active_keys([run_object("a", status={"phase": "Archived"}), run_object("b", status={"phase": "Running"})])
    phases = {sample.labels["phase"]: sample.value for metric in RUNS.collect() for sample in metric.samples}
    assert (phases[orphans.UNKNOWN], phases["Running"], phases["Failed"]) == (1, 1, 0)


def test_an_orphan_that_cannot_be_deleted_does_not_keep_others() -> None:
    world = World()
    for name in ("a", "b"):
        world.add(name, status=RUNNING)
        owner = {"uid": world.run(name)["metadata"]["uid"], "controller": True}
        meta = {"name": f"{name}-x-a9", "namespace": "team", "uid": name, "ownerReferences": [owner]}
        world.api.add(JOB, {"metadata": meta, "spec": {}, "kind": JOB.name})
    world.api.fault = lambda method, path: (
        status(403, "no") if method == "DELETE" and path.endswith("/a-x-a9") else None
    )
    runs = asyncio.run(world.namespaces.list(DISTILLRUN)).complete()
    children = asyncio.run(list_children(world.namespaces)).complete()
    asyncio.run(delete_orphans(world.kube, runs, children))
    assert world.jobs() == ["a-x-a9"]


def test_a_child_whose_step_has_ended_before_its_controller_says_so_is_no_orphan() -> None:
    """A step ends with its own containers; a busy controller of PyTorchJobs notices seconds later."""
    for known in (False, True):
        world = World()
        ended = {"name": "preprocess", "kind": "Preprocess", "state": "Succeeded", "attempt": 1}
        named = {"kind": JOB.name, "name": "quick-preprocess-a1", "uid": "c"}
        world.add("quick", status={**RUNNING, "steps": [{**ended, "child": named}]})
        owner = {"uid": world.run("quick")["metadata"]["uid"], "controller": True}
        meta = {"namespace": "team", "ownerReferences": [owner]}
        own = {"metadata": {**meta, "name": named["name"], "uid": "c"}, "spec": {}, "kind": JOB.name}
        late = {"metadata": {**meta, "name": "quick-vanilla-a1", "uid": "d"}, "spec": {}, "kind": JOB.name}
        world.api.add(JOB, own)
        world.api.add(JOB, late)
        runs = asyncio.run(world.namespaces.list(DISTILLRUN)).complete()
        children = asyncio.run(list_children(world.namespaces)).complete()
        kept = [orphans.without_unused(run, known) for run in runs]
        asyncio.run(delete_orphans(world.kube, kept, children))
        assert world.jobs() == [named["name"]]


def test_a_child_that_has_finished_since_the_list_is_no_orphan() -> None:
    """Its step has finished too, so that the status does not name it any more."""
    world = World()
    world.add("quick", status=RUNNING)
    owner = {"uid": world.run("quick")["metadata"]["uid"], "controller": True}
    meta = {"name": "quick-x-a1", "namespace": "team", "uid": "c", "ownerReferences": [owner]}
    child = {"metadata": meta, "spec": {}, "kind": JOB.name}
    world.api.add(JOB, child)
    runs = asyncio.run(world.namespaces.list(DISTILLRUN)).complete()
    children = asyncio.run(list_children(world.namespaces)).complete()
    world.api.add(JOB, {**child, "status": {"conditions": [{"type": "Complete", "status": "True"}]}})
    asyncio.run(delete_orphans(world.kube, runs, children))
    assert world.jobs() == ["quick-x-a1"]


@pytest.mark.parametrize("edited", [False, True])
def test_an_expired_run_is_deleted_unless_somebody_edits_it_at_the_same_time(edited: bool) -> None:
    world = World()
    done = {**RUNNING, "phase": "Succeeded", "finished": "2026-01-01T00:00:00Z"}
    world.add("old", spec=manifest(ttlAfterFinished="1s")["spec"], status=done)

    def edit(method: str, path: str) -> None:
        if method == "DELETE" and path.endswith("/old") and edited:
            run = world.run("old")
            world.api.add(DISTILLRUN, {**run, "spec": {**run["spec"], "ttlAfterFinished": "7d"}})

    world.api.fault = edit
    world.reconcile("old")
    assert (DISTILLRUN.path("team", "old") in world.api.objects) == edited


# Exceptions of any kind.

EXCEPTIONS: list[BaseException] = [
    ValueError("no such thing"),
    KeyError("spec"),
    RecursionError("too deep"),
    MemoryError(),
    TimeoutError(),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    ExceptionGroup("several", [ValueError("one")]),
    SystemExit(3),
    KeyboardInterrupt(),
    asyncio.CancelledError("stray"),
]


@pytest.mark.parametrize("error", EXCEPTIONS, ids=lambda error: type(error).__name__)
def test_an_exception_of_any_kind_becomes_a_condition_and_an_exception(error: BaseException) -> None:
    """Not the end of the task's loop, which a SystemExit would be."""
    world = World()
    world.add("broken")

    async def fail(*_: Any) -> Any:
        raise error

    world.reconciler._observe_children = fail  # type: ignore[method-assign]
    with pytest.raises(Exception) as raised:
        world.reconcile("broken")
    assert raised.value is error or type(error).__name__ in str(raised.value)
    found = world.condition("broken")
    assert (found["status"], found["reason"]) == ("True", RECONCILE_ERROR)
    assert type(error).__name__ in found["message"]
    assert world.events() == [RECONCILE_ERROR]


def test_a_reconcile_that_is_cancelled_ends() -> None:
    """The process stops: nothing is written any more."""
    world = World()
    world.add("first")

    async def wait(*_: Any) -> Any:
        await asyncio.sleep(60)

    world.reconciler._observe_children = wait  # type: ignore[method-assign]

    async def cancel() -> None:
        task = asyncio.create_task(world.reconciler.reconcile(("team", "first")))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()

    asyncio.run(cancel())
    assert world.api.writes() == []


def failing_writes(ending: str, code: int) -> Callable[[str, str], Answer | None]:
    """A fault: writes of paths with this ending are refused, always with another message."""
    return lambda method, path: (
        status(code, f"refused {random.random()}") if method != "GET" and path.endswith(ending) else None
    )


def test_an_action_that_is_refused_is_reported_without_a_write_each_time() -> None:
    """Each write is an event that reconciles the run again: it would never end."""
    world = World()
    world.add("first")
    spec = world.run("first")["spec"]
    spec["deletionPolicy"] = "Delete"
    world.api.fault = failing_writes("/distillruns/first", 403)  # the finalizer
    for _ in range(3):
        with pytest.raises(KubeError):
            world.reconcile("first")
    assert world.condition("first")["reason"] == RECONCILE_ERROR
    assert "403 refused" in world.condition("first")["message"]
    version = world.run("first")["metadata"]["resourceVersion"]
    for _ in range(5):
        with pytest.raises(KubeError):
            world.reconcile("first")
    assert world.run("first")["metadata"]["resourceVersion"] == version
    assert world.events().count(RECONCILE_ERROR) == 1
    world.api.fault = lambda method, path: None
    assert world.reconcile("first") == 0.0, "once more, to clear the condition"
    world.reconcile("first")
    assert world.condition("first")["status"] == "False"
    assert world.events().count("StallCleared") == 1


@pytest.mark.parametrize("code", [409, 429, 500, 503])
def test_an_error_that_ends_by_itself_is_not_reported(code: int) -> None:
    world = World()
    world.add("first")
    world.api.fault = failing_writes("/first/status", code)
    with pytest.raises(KubeError):
        world.reconcile("first")
    world.api.fault = lambda method, path: None
    assert "status" not in world.run("first")
    world.reconcile("first")
    assert RECONCILE_ERROR not in world.events()


def test_a_child_that_is_refused_is_reported_by_the_plan_alone() -> None:
    world = World()
    world.add("first")
    world.api.fault = failing_writes("/jobs", 403)
    for _ in range(3):
        with pytest.raises(KubeError):
            world.reconcile("first")
    assert world.condition("first")["reason"] == "ChildRefused"
    assert RECONCILE_ERROR not in world.events()


@pytest.mark.parametrize("code", [429, 500, 503])
def test_a_child_that_is_refused_again_and_again_is_reported_whatever_the_error(code: int) -> None:
    """A webhook that does not answer is an internal error of the API server."""
    world = World()
    world.add("first")
    world.api.fault = failing_writes("/jobs", code)
    for _ in range(2):
        with pytest.raises(KubeError):
            world.reconcile("first")
        assert world.condition("first")["status"] == "False", "it may end by itself"
    for _ in range(2):
        with pytest.raises(KubeError):
            world.reconcile("first")
    found = world.condition("first")
    assert (found["status"], found["reason"]) == ("True", "ChildRefused")
    assert f"{code} refused" in found["message"]
    version = world.run("first")["metadata"]["resourceVersion"]
    for _ in range(5):
        with pytest.raises(KubeError):
            world.reconcile("first")
    assert world.run("first")["metadata"]["resourceVersion"] == version, "a new text is no reason to write"
    world.api.fault = lambda method, path: None
    world.reconcile("first")
    world.reconcile("first")
    assert world.condition("first")["status"] == "False"
    assert world.jobs() == ["first-preprocess-a1"]


def test_a_status_that_is_refused_is_an_event() -> None:
    """A newer CRD may refuse what this version writes."""
    world = World()
    world.add("first")
    world.api.fault = failing_writes("/first/status", 422)
    with pytest.raises(KubeError):
        world.reconcile("first")
    assert world.events() == [RECONCILE_ERROR]


# Namespaces.


def refuses(*namespaces: str, code: int = 403) -> Callable[[str, str], Answer | None]:
    """A fault: every request in these namespaces is answered with this code."""
    return lambda method, path: (
        status(code, "refused", "x") if any(f"/namespaces/{one}/" in path for one in namespaces) else None
    )


@pytest.mark.parametrize("code", [403, 404])
@pytest.mark.parametrize("refused", [("a",), ("b",), ("a", "b")])
def test_a_namespace_that_is_gone_stops_no_other(refused: tuple[str, ...], code: int) -> None:
    world = World(watched=("a", "b", "c"))
    for namespace in world.watched:
        world.add("first", namespace)
    world.api.fault = refuses(*refused, code=code)
    listing = asyncio.run(world.namespaces.list(DISTILLRUN))
    others = [namespace for namespace in world.watched if namespace not in refused]
    assert [run["metadata"]["namespace"] for run in listing.complete()] == others
    assert {namespace for namespace in world.watched if world.namespaces.refuses(namespace)} == set(refused)
    for namespace in world.watched:
        assert (world.reconcile("first", namespace) is None) is (namespace in refused)
    assert [ns for ns in world.watched if world.run("first", ns).get("status")] == others
    children = asyncio.run(list_children(world.namespaces))
    assert {child["metadata"]["namespace"] for child in children.complete()} <= set(others)


def test_a_namespaces_problem_is_logged_once_when_it_changes_and_when_it_has_gone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "distill_operator")
    world = World(watched=("b", "a"))
    counter = NAMESPACE_ERRORS.labels("b", "403")
    before = counter._value.get()

    def look(times: int, fault: Callable[[str, str], Answer | None]) -> list[str]:
        world.api.fault = fault
        caplog.clear()
        for _ in range(times):
            for kind in (DISTILLRUN, JOB):
                asyncio.run(world.namespaces.list(kind))
        return [
            f"{record.levelname} {record.getMessage()}"
            for record in caplog.records
            if "distill" in record.name
        ]

    (line,) = look(3, refuses("b"))
    assert line.startswith("WARNING namespace b cannot be read: GET ") and "watchNamespaces" in line
    (line,) = look(3, refuses("b", code=404))
    assert "404" in line
    (line,) = look(3, refuses())
    assert line == "INFO namespace b can be read again"
    assert look(3, refuses()) == []
    assert counter._value.get() == before + 6


def test_a_namespace_can_be_read_again_although_not_all_of_its_kinds_have_been_read_since() -> None:
    """Pods are listed only while a run waits."""
    world = World(watched=("b", "a"))
    world.api.fault = refuses("b")
    for kind in (DISTILLRUN, POD):
        asyncio.run(world.namespaces.list(kind))
    assert world.namespaces.refuses("b")
    world.api.fault = refuses()
    asyncio.run(world.namespaces.list(DISTILLRUN))
    assert not world.namespaces.refuses("b")


def test_a_run_that_alone_may_not_be_read_is_an_error() -> None:
    """Nothing else would tell: its namespace can be listed."""
    world = World(watched=("a",))
    world.add("first", "a")
    world.api.fault = lambda method, path: status(403, "no get") if path.endswith("/first") else None
    asyncio.run(world.namespaces.list(DISTILLRUN))
    with pytest.raises(KubeError, match="no get"):
        world.reconcile("first", "a")


@pytest.mark.parametrize("code", [429, 500, 503])
def test_runs_of_a_namespace_that_does_not_answer_are_missed_by_nobody_who_counts(code: int) -> None:
    """They may hold GPUs. The resync requeues the others meanwhile."""
    world = World(watched=("a", "b"))
    world.add("first", "a")
    world.add("first", "b")
    world.api.fault = refuses("b", code=code)
    listing = asyncio.run(world.namespaces.list(DISTILLRUN))
    assert [run["metadata"]["namespace"] for run in listing.objects] == ["a"]
    with pytest.raises(KubeError, match=str(code)):
        listing.complete()
    world.api.fault = refuses("a", "b", code=code)
    with pytest.raises(KubeError, match=str(code)):
        asyncio.run(world.namespaces.list(DISTILLRUN))


def test_a_missing_crd_is_no_problem_of_a_namespace() -> None:
    world = World(watched=("a", "b"))
    world.api.fault = lambda method, path: Answer(404, "text/plain", b"404 page not found")
    with pytest.raises(KubeError, match="404"):
        asyncio.run(world.namespaces.list(DISTILLRUN))


def test_without_watched_namespaces_a_refusal_is_an_error() -> None:
    world = World()
    world.api.fault = lambda method, path: status(403, "no rights at all")
    with pytest.raises(KubeError, match="no rights at all"):
        asyncio.run(world.namespaces.list(DISTILLRUN))
