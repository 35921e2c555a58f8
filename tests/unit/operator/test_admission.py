"""The queue's bookkeeping: what is read and parsed, claims against lists that are older, releases, failures,
and which runs are requeued.

The API server's lists of nodes and pods are plain values here; tests/cluster has them from a real one.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from distill_operator import admission as module
from distill_operator.admission import OFFER_SECONDS, Admission
from distill_operator.gpu_scheduler import Decision
from distill_operator.kube import Kind, Kube, KubeError
from distill_operator.namespaces import WatchedNamespaces
from distill_operator.observe import parse_run
from distill_operator.pod_progress import PodProgress
from distill_operator.reconcile import Reconciler
from distill_operator.settings import Settings
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.fakes.simulated_cluster import SETTINGS, manifest
from vpmoe.api.status import ChildRef, Status, StepStatus

GPU = "nvidia.com/gpu"
Json = dict[str, Any]


def node(name: str = "a", gpus: int = 8, **labels: str) -> Json:
    return {
        "metadata": {"name": name, "labels": labels},
        "spec": {},
        "status": {"allocatable": {GPU: str(gpus)}, "conditions": [{"type": "Ready", "status": "True"}]},
    }


def pod(gpus: int, owner: str = "", namespace: str = "team", at: str = "a") -> Json:
    """A pod of somebody, or of the child `owner`."""
    owners = (
        [{"kind": "PyTorchJob", "name": owner, "uid": f"uid-{owner}", "controller": True}] if owner else []
    )
    return {
        "metadata": {"name": "p", "namespace": namespace, "ownerReferences": owners},
        "spec": {"nodeName": at, "containers": [{"resources": {"requests": {GPU: str(gpus)}}}]},
        "status": {"phase": "Running"},
    }


@dataclass
class Lists:
    """What the API server lists."""

    nodes: list[Json] = field(default_factory=lambda: [node()])
    pods: list[Json] = field(default_factory=list)
    errors: dict[tuple[str, str | None], KubeError] = field(default_factory=dict)
    """By plural name of the kind, and namespace."""
    requests: Counter[str] = field(default_factory=Counter)

    async def pages(
        self, kind: Kind, namespace: str | None = None, labels: str = "", fields: str = ""
    ) -> AsyncIterator[list[Json]]:
        del labels, fields
        self.requests[kind.plural] += 1
        if error := self.errors.get((kind.plural, namespace)):
            raise error
        objects = self.nodes if kind.plural == "nodes" else self.pods
        for obj in objects:
            if namespace in (None, obj["metadata"].get("namespace")):
                yield [obj]


def status(phase: str, gpu_step: str, message: str = "", generation: int = 1, name: str = "first") -> Status:
    """Status of a run that is preprocessed. `gpu_step` is the state of its only stage."""
    started = gpu_step in ("Running", "Suspended", "Failed")
    child = ChildRef(kind="PyTorchJob", name=f"{name}-vanilla-a1", uid=f"uid-{name}-vanilla-a1")
    return Status.model_validate(
        {
            "phase": phase,
            "message": message,
            "observed_generation": generation,
            "steps": (
                StepStatus(name="preprocess", state="Succeeded", attempt=1),
                StepStatus.model_validate(
                    {
                        "name": "vanilla",
                        "state": gpu_step,
                        "attempt": int(started),
                        "child": child if started else None,
                        "failures": 3 if gpu_step == "Failed" else 0,
                    }
                ),
            ),
        }
    )


WAITS, HOLDS, ENDED = status("Queued", "Queued"), status("Running", "Running"), Status(phase="Succeeded")


def run(name: str, state: Status = WAITS, version: int = 1, age: int = 0, gpus: int = 8, **spec: Any) -> Json:
    """A live DistillRun of `gpus` GPUs, one of them the teacher's, `age` seconds older than others."""
    obj = manifest(
        student={"shape": "tiny", "gpus": gpus - 1},
        training={"sequenceLength": 512, "globalBatchTokens": 8192},
        **spec,
    )
    meta = {
        "name": name,
        "uid": f"uid-of-{name}",
        "resourceVersion": str(version),
        "creationTimestamp": f"2026-01-01T00:{59 - age // 60:02}:{59 - age % 60:02}Z",
    }
    return {**obj, "metadata": {**obj["metadata"], **meta}, "status": state.dump()}


def key(name: str) -> tuple[str, str]:
    return "team", name


async def serving() -> bool:
    return False


def made(lists: Lists, chart: Settings = SETTINGS, missing: Callable[[], Any] = serving) -> Admission:
    kube = cast(Kube, lists)
    return Admission(kube, chart, WatchedNamespaces(kube, chart.watch_namespaces), missing)


def update(admission: Admission, *runs: Json) -> None:
    asyncio.run(admission.update(runs, admission.begin_list()))


def look(admission: Admission, now: float = 0.0) -> set[str]:
    """Names of the runs that the look requeues."""
    return {name for _, name in asyncio.run(admission.look(now))}


def observe(admission: Admission, obj: Json) -> None:
    admission.observe(parse_run(obj), obj["metadata"]["resourceVersion"])


def arithmetic(admission: Admission, name: str) -> str:
    """Message of the decision about a run that is not admitted."""
    found = admission.decision(key(name))
    assert found is not None
    assert not found.admitted
    return found.arithmetic


def admitted(admission: Admission, obj: Json) -> bool:
    """Whether a reconcile of the run would be admitted. It does not write, so its claim ends."""
    found = admission.decision((obj["metadata"]["namespace"], obj["metadata"]["name"]))
    observe(admission, obj)
    return found is not None and found.admitted


def test_a_list_parses_only_runs_that_changed_and_finished_ones_never(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parsed = list[str]()

    def counted(obj: Json) -> Any:
        parsed.append(obj["metadata"]["name"])
        return parse_run(obj)

    monkeypatch.setattr(module, "parse_run", counted)
    queued = [run(f"q{i}", age=i % 60) for i in range(1000)]
    failed = status("Failed", "Failed")
    finished = [run(f"f{i}", failed if i % 2 else ENDED) for i in range(3000)]
    lists = Lists()
    admission = made(lists)
    update(admission, *queued, *finished)
    assert Counter(parsed) == Counter(f"q{i}" for i in range(1000))
    assert len(look(admission)) == 1000
    assert lists.requests == {"nodes": 1, "pods": 1}, "one list of each, however many runs wait"
    parsed.clear()
    update(admission, *queued[:-1], run("q999", version=2), *finished, run("new"))
    assert parsed == ["q999", "new"]
    update(admission, *queued, *finished)
    observe(admission, run("q5", version=7))
    parsed.clear()
    update(admission, *queued[:5], run("q5", version=7), *queued[6:], *finished)
    assert parsed == [], "a reconcile has parsed it"


def test_a_look_without_runs_that_need_gpus_reads_nothing() -> None:
    lists = Lists()
    admission = made(lists)
    assert look(admission) == set()
    update(admission, run("a", HOLDS), run("b", ENDED), run("c", suspend=True))
    assert look(admission) == set()
    assert lists.requests == {}
    update(admission, run("d", Status()))
    assert (look(admission), lists.requests) == (set(), {"nodes": 1}), "its pods do not matter yet"


def test_a_run_is_decided_by_the_first_look_that_knows_it_and_requeued() -> None:
    admission = made(Lists())
    observe(admission, run("a"))
    assert admission.is_waiting(key("a"))
    assert (admission.decision(key("a")), look(admission)) == (None, set()), (
        "the other runs are not known yet"
    )
    update(admission, run("a"), run("b", age=9))
    assert look(admission) == {"a", "b"}
    for name, age, first in (("a", 0, False), ("b", 9, True)):
        assert admitted(admission, run(name, age=age)) is first


def test_a_queued_run_is_requeued_only_if_its_status_lacks_the_decision() -> None:
    lists = Lists(pods=[pod(1)])
    admission = made(lists)
    update(admission, run("a"))
    assert look(admission) == {"a"}
    message = arithmetic(admission, "a")
    observe(admission, run("a", status("Queued", "Queued", message), 2))
    assert look(admission) == {"a"}, "this operator has not reconciled it yet"
    admission.reconciled(key("a"))
    assert look(admission) == set()
    lists.pods.append(pod(1))
    assert look(admission) == {"a"}, "the numbers have changed"
    assert admission.is_waiting(key("a")), "the resync leaves it to looks"
    update(admission, run("a", status("Queued", "Queued", message, generation=0), 3))
    lists.pods.pop()
    assert look(admission) == {"a"}, "its status is about an older specification"


def test_an_edited_run_is_decided_again() -> None:
    admission = made(Lists())
    update(admission, run("a", gpus=8))
    look(admission)
    edited = run("a", gpus=9, version=2)
    edited["metadata"]["generation"] = 2
    observe(admission, edited)
    assert admission.decision(key("a")) is None
    look(admission)
    assert "can never start" in arithmetic(admission, "a")


def test_a_claim_that_does_not_fit_any_more_waits_for_another_look() -> None:
    admission = made(Lists())
    update(admission, run("a", gpus=4), run("b", gpus=4))
    look(admission)
    observe(admission, run("c", HOLDS, gpus=5))  # an object restored from a backup, status included
    assert admission.decision(key("a")) is None
    look(admission)
    assert not admitted(admission, run("a"))


def test_a_list_that_was_begun_before_a_claim_does_not_release_it() -> None:
    admission = made(Lists())
    update(admission, run("a", age=1), run("b"))
    look(admission)
    begun = admission.begin_list()
    assert admission.decision(key("a")) == Decision(
        True, "Needs 8 GPUs (1 teacher + 7 student); the pool has 8 on 1 ready node, 8 of them free."
    )
    asyncio.run(admission.update([run("a", age=1), run("b")], begun))
    assert look(admission) == {"b"}
    observe(admission, run("a", HOLDS, 2))
    asyncio.run(admission.update([run("a", age=1), run("b")], begun))
    assert not admission.is_waiting(key("a"))
    look(admission)
    assert "held by a (8): 0 are left" in arithmetic(admission, "b")


def test_runs_of_a_namespace_that_does_not_answer_keep_their_gpus() -> None:
    admission = made(Lists())
    asyncio.run(admission.update([run("b")], admission.begin_list(), complete=False))
    assert look(admission) == set(), "nobody knows who holds GPUs"
    update(admission, run("a", HOLDS), run("b"), run("c", HOLDS, gpus=2))
    asyncio.run(admission.update([run("b"), run("c", ENDED, 9)], admission.begin_list(), complete=False))
    look(admission)
    assert "of which 8 are held by a (8)" in arithmetic(admission, "b")


async def finish(admission: Admission) -> None:
    observe(admission, run("a", ENDED, 9))


async def suspend(admission: Admission) -> None:
    observe(admission, run("a", status("Suspended", "Suspended"), 9, suspend=True))


async def delete(admission: Admission) -> None:
    admission.forget(key("a"))


async def miss_its_deletion(admission: Admission) -> None:
    await admission.update([run("b")], admission.begin_list())


@pytest.mark.parametrize("release", [finish, suspend, delete, miss_its_deletion])
def test_released_gpus_start_a_look_that_admits_the_next_run(
    release: Callable[[Admission], Awaitable[None]],
) -> None:
    async def put_after_release() -> set[tuple[str, str]]:
        put, done = set[tuple[str, str]](), asyncio.Event()
        looking = asyncio.create_task(admission.run(lambda name: (put.add(name), done.set())[0]))
        await release(admission)
        await done.wait()
        looking.cancel()
        return put

    admission = made(Lists())
    update(admission, run("a", HOLDS), run("b"))
    look(admission)
    assert not admitted(admission, run("b"))
    assert asyncio.run(put_after_release()) == {key("b")}
    assert admitted(admission, run("b"))


def test_pods_of_a_holder_count_once_and_all_others_count() -> None:
    mine = pod(4, "a-vanilla-a1")
    for pods, left in (
        ([mine], 2),
        ([mine, pod(1)], 1),
        ([mine, pod(1, "gone-vanilla-a1")], 1),
        ([mine, pod(1, "a-vanilla-a1", namespace="elsewhere")], 1),
    ):
        admission = made(Lists(pods=pods))
        update(admission, run("a", status("Running", "Running", name="a"), gpus=6), run("b", gpus=8))
        look(admission)
        assert arithmetic(admission, "b").endswith(f": {left} are left.")


def test_runs_of_kueue_and_immediate_ones_are_counted_by_their_pods() -> None:
    for runtime in ({"queueName": "team"}, {"scheduling": "Immediate"}):
        lists = Lists(pods=[pod(4, "a-vanilla-a1")])
        admission = made(lists)
        update(admission, run("a", status("Running", "Running", name="a"), runtime=runtime), run("b", gpus=4))
        look(admission)
        assert admitted(admission, run("b", gpus=4))


def test_a_failed_look_is_reported_to_the_runs_that_have_no_decision() -> None:
    lists = Lists(errors={("nodes", None): KubeError("GET /api/v1/nodes: 403 forbidden", 403)})
    admission = made(lists)
    update(admission, run("a"))
    assert look(admission) == {"a"}
    observe(admission, run("a"))
    told = Decision(False, "The free GPUs could not be counted: GET /api/v1/nodes: 403 forbidden")
    assert admission.decision(key("a")) == told
    observe(admission, run("a", status("Queued", "Queued", told.arithmetic), 2))
    admission.reconciled(key("a"))
    assert look(admission) == set()
    lists.errors.clear()
    assert look(admission) == {"a"}
    lists.errors[("pods", None)] = KubeError("POST: ConnectError")
    assert look(admission) == {"a"}
    assert admitted(admission, run("a")), "the last decision stays"


def test_a_node_that_cannot_be_understood_does_not_end_the_process() -> None:
    admission = made(Lists([{"metadata": {"name": "a"}, "status": {"allocatable": {GPU: "eight"}}}]))
    update(admission, run("a"))
    assert look(admission) == {"a"}
    assert "is not a quantity" in arithmetic(admission, "a")


def test_pods_are_read_in_the_watched_namespaces_and_one_that_is_gone_is_left_out() -> None:
    errors = {("pods", "b"): KubeError("403 forbidden", 403), ("pods", None): KubeError("403 forbidden", 403)}
    lists = Lists(pods=[pod(1, namespace="a"), pod(2, namespace="c"), pod(4, namespace="d")], errors=errors)
    admission = made(lists, SETTINGS.model_copy(update={"watch_namespaces": ["a", "b", "c"]}))
    update(admission, run("a"))
    look(admission)
    assert "3 are used by other pods" in arithmetic(admission, "a")


def test_a_run_that_this_version_cannot_read_keeps_nobody_waiting() -> None:
    unreadable = run("a", age=9)
    unreadable["status"] = {"phase": "Running", "steps": [{"name": "vanilla", "state": "Hibernating"}]}
    admission = made(Lists())
    update(admission, unreadable, run("b"))
    look(admission)
    assert admitted(admission, run("b"))


def test_a_run_that_waits_for_kubeflow_keeps_nobody_waiting() -> None:
    async def missing() -> bool:
        return True

    admission = made(Lists(), missing=missing)
    update(admission, run("a", age=9), run("b", runtime={"backend": "Job"}))
    assert look(admission) == {"a", "b"}
    assert admitted(admission, run("b"))
    assert not admitted(admission, run("a", age=9)), "plan() says why"


def test_a_run_whose_reconcile_fails_keeps_free_gpus_from_others_for_a_minute() -> None:
    admission = made(Lists())
    update(admission, run("broken", age=9), run("b", age=5))
    for now, offered in ((0.0, {"broken"}), (59.0, {"broken"}), (OFFER_SECONDS, {"broken", "b"})):
        look(admission, now)
        runs = (run("broken", age=9), run("b", age=5))
        assert {obj["metadata"]["name"] for obj in runs if admitted(admission, obj)} == offered
    assert admission.decision(key("b")) is not None
    assert admission.decision(key("broken")) is None, "they are taken"
    admission.forget(key("b"))
    look(admission, 100.0)
    admission.reconciled(key("broken"))
    look(admission, 101.0)
    observe(admission, run("c"))
    look(admission, 102.0)
    assert not admitted(admission, run("c")), "the older one's reconcile works again: it goes first"


def test_that_a_run_keeps_gpus_from_others_no_longer_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    admission = made(Lists())
    update(admission, run("broken"))
    for now in (0.0, OFFER_SECONDS, OFFER_SECONDS + 1, OFFER_SECONDS + 2):
        look(admission, now)
    assert [record.getMessage() for record in caplog.records] == [
        "team/broken has not started since its GPUs were free: others may take them"
    ]


def test_a_run_that_preprocesses_hears_only_that_it_can_never_start() -> None:
    admission = made(Lists())
    update(admission, run("small", Status()), run("large", Status(), gpus=9))
    look(admission)
    assert admission.decision(key("small")) is None
    assert "can never start" in arithmetic(admission, "large")
    assert not admission.is_waiting(key("large")), "reconciles of it go on"


async def looks_while(admission: Admission, lists: Lists, seconds: float) -> int:
    """How often nodes are read in that time, with pollSeconds of 0.05. Ends after the second."""
    looking = asyncio.create_task(admission.run(lambda name: None))
    end = asyncio.get_running_loop().time() + seconds
    while lists.requests["nodes"] < 2 and asyncio.get_running_loop().time() < end:
        await asyncio.sleep(0.01)
    looking.cancel()
    return lists.requests["nodes"]


OFTEN = SETTINGS.model_copy(update={"poll_seconds": 0.05})


@pytest.mark.parametrize(
    "state, looks",
    [
        pytest.param(WAITS, 2, id="waits"),
        pytest.param(HOLDS, 0, id="holds its GPUs"),
        pytest.param(ENDED, 0, id="finished"),
        pytest.param(Status(), 1, id="prepares"),
    ],
)
def test_gpus_are_counted_again_and_again_only_while_a_run_waits(state: Status, looks: int) -> None:
    """Nodes and pods change without an event for the operator."""
    lists = Lists(pods=[pod(1)])
    admission = made(lists, OFTEN)
    update(admission, run("a", state))
    assert asyncio.run(looks_while(admission, lists, 30 if looks == 2 else 0.5)) == looks


def test_a_run_that_begins_to_prepare_is_looked_at_once_and_soon() -> None:
    """Without a look for each of many runs that are created together."""
    lists = Lists()
    admission = made(lists, OFTEN)
    update(admission)
    for name in "abc":
        for version in range(3):
            observe(admission, run(name, Status(), version))
    assert asyncio.run(looks_while(admission, lists, 0.5)) == 1


def test_a_run_that_prepares_is_requeued_when_it_becomes_unschedulable_and_when_it_is_not_any_more() -> None:
    lists = Lists()
    admission = made(lists)
    update(admission, run("a", Status(), gpus=8))
    assert look(admission) == set()
    lists.nodes = [node(gpus=4)]
    assert look(admission) == {"a"}
    assert look(admission) == set()
    lists.nodes = [node(gpus=6)]
    assert look(admission) == {"a"}, "the numbers have changed"
    lists.nodes = [node()]
    assert look(admission) == {"a"}
    assert look(admission) == set()


@dataclass
class Api(Lists):
    """An API server with runs whose status may fail to be written."""

    runs: dict[str, Json] = field(default_factory=dict)
    failure: Exception | None = None

    async def get(self, kind: Kind, namespace: str, name: str) -> Json | None:
        del kind, namespace
        return self.runs.get(name)

    async def replace(self, kind: Kind, obj: Json, subresource: str) -> Json:
        del kind, subresource
        if self.failure:
            raise self.failure
        name = obj["metadata"]["name"]
        self.runs[name] = {**obj, "metadata": {**obj["metadata"], "resourceVersion": "2"}}
        return self.runs[name]

    async def create(self, kind: Kind, obj: Json) -> Json:
        del kind
        return obj


@pytest.mark.parametrize(
    "failure, kept",
    [
        pytest.param(KubeError("422 invalid", 422), False, id="rejected"),
        pytest.param(KubeError("409 changed", 409), False, id="a conflict"),
        pytest.param(ZeroDivisionError("a bug"), False, id="nothing was sent"),
        pytest.param(KubeError("ReadTimeout"), True, id="no answer"),
        pytest.param(KubeError("503 unavailable", 503), True, id="a server's error"),
        pytest.param(KubeError("cut JSON", 200), True, id="half an answer"),
    ],
)
def test_a_claim_ends_if_the_status_was_certainly_not_written(failure: Exception, kept: bool) -> None:
    async def scenario() -> None:
        job = {"runtime": {"backend": "Job"}}
        api = Api(runs={"a": run("a", age=9, **job), "b": run("b", **job)})
        kube = cast(Kube, api)
        progress = PodProgress(lambda key: None, interval=10.0)
        reconciler = Reconciler(kube, progress, SETTINGS, WatchedNamespaces(kube, []))
        admission = reconciler.admission
        await admission.update(list(api.runs.values()), admission.begin_list())
        assert await reconciler.reconcile(key("a")) is None
        assert api.runs["a"]["metadata"]["resourceVersion"] == "1", "nothing is decided, and nothing written"
        assert set(await admission.look(0.0)) == {key("a"), key("b")}
        api.failure = failure
        with pytest.raises(type(failure)):
            await reconciler.reconcile(key("a"))
        assert admission.is_waiting(key("a")) is not kept
        api.failure = None
        await admission.look(1.0)
        await reconciler.reconcile(key("b"))
        assert api.runs["b"]["status"]["phase"] == "Queued", "the older one goes first in any case"
        for _ in range(1 + kept):  # a kept claim ends with the next reconcile, which finds what was written
            await admission.look(2.0)
            await reconciler.reconcile(key("a"))
        assert parse_run(api.runs["a"]).status.holds_gpus
        assert not admission.is_waiting(key("a"))
        del api.runs["a"]
        await reconciler.reconcile(key("a"))
        await admission.look(4.0)
        await reconciler.reconcile(key("b"))
        assert parse_run(api.runs["b"]).status.holds_gpus

    asyncio.run(scenario())


class Interleavings(RuleBasedStateMachine):
    """Lists that are used late, reconciles whose writes are applied, rejected or of unknown outcome, ends and
    deletions, in any order: the runs that hold GPUs in the API server never have more than there are.
    """

    GPUS = 8

    def __init__(self) -> None:
        super().__init__()
        self.server: dict[str, Json] = {}
        self.version = 0
        self.listed: tuple[int, list[Json]] | None = None
        self.writing: dict[str, Json] = {}
        self.lists = Lists([node(gpus=self.GPUS)])

    @initialize()
    def start(self) -> None:
        self.admission = made(self.lists)
        update(self.admission)

    def put(self, name: str, state: Status, **changes: Any) -> Json:
        self.version += 1
        known = self.server.get(name)
        obj = {**known, "status": state.dump()} if known else run(name, state, **changes)
        obj["metadata"] = {**obj["metadata"], "resourceVersion": str(self.version)}
        self.server[name] = obj
        return obj

    def some(self, data: st.DataObject, phases: tuple[str, ...]) -> str | None:
        names = [name for name, obj in self.server.items() if obj["status"]["phase"] in phases]
        return data.draw(st.sampled_from(names)) if names else None

    @rule(gpus=st.integers(2, 9))
    def create(self, gpus: int) -> None:
        self.put(f"r{self.version}", WAITS, gpus=gpus, age=max(0, 3000 - self.version))

    @rule()
    def begin_list(self) -> None:
        self.listed = self.admission.begin_list(), list(self.server.values())

    @precondition(lambda self: self.listed is not None)
    @rule()
    def end_list(self) -> None:
        assert self.listed is not None
        asyncio.run(self.admission.update(self.listed[1], self.listed[0]))
        self.listed = None

    @rule()
    def look(self) -> None:
        look(self.admission)

    @rule(data=st.data())
    def begin_reconcile(self, data: st.DataObject) -> None:
        name = self.some(data, ("Queued", "Running", "Succeeded"))
        if name is None or name in self.writing:
            return
        observe(self.admission, self.server[name])
        found = self.admission.decision(key(name))
        if found is not None and found.admitted:
            self.writing[name] = self.server[name]

    @rule(data=st.data(), outcome=st.sampled_from(["written", "rejected", "applied, not answered", "lost"]))
    def end_reconcile(self, data: st.DataObject, outcome: str) -> None:
        if not self.writing:
            return
        name = data.draw(st.sampled_from(sorted(self.writing)))
        read = self.writing.pop(name)
        if self.server.get(name) is not read:  # deleted or changed: a conflict
            observe(self.admission, read)
        elif outcome == "written":
            observe(self.admission, self.put(name, HOLDS))
        elif outcome == "rejected":
            observe(self.admission, read)
        elif outcome == "applied, not answered":
            self.put(name, HOLDS)

    @rule(data=st.data(), seen=st.booleans())
    def end_run(self, data: st.DataObject, seen: bool) -> None:
        if (name := self.some(data, ("Running",))) is not None and name not in self.writing:
            obj = self.put(name, ENDED)
            if seen:
                observe(self.admission, obj)

    @rule(data=st.data(), seen=st.booleans())
    def delete(self, data: st.DataObject, seen: bool) -> None:
        if (name := self.some(data, ("Queued", "Running"))) is not None and name not in self.writing:
            del self.server[name]
            if seen:
                self.admission.forget(key(name))

    @invariant()
    def gpus_are_not_overcommitted(self) -> None:
        held = [obj for obj in self.server.values() if obj["status"]["phase"] == "Running"]
        assert sum(1 + obj["spec"]["student"]["gpus"] for obj in held) <= self.GPUS

    def teardown(self) -> None:
        """Left alone, every run that fits into the pool starts."""
        if not hasattr(self, "admission"):
            return
        self.writing.clear()
        fits = [name for name, obj in self.server.items() if obj["spec"]["student"]["gpus"] < self.GPUS]
        for _ in range(2 * len(fits) + 1):
            update(self.admission, *self.server.values())
            for name, obj in list(self.server.items()):
                observe(self.admission, obj)
                if obj["status"]["phase"] == "Running":
                    observe(self.admission, self.put(name, ENDED))
            for name in sorted(look(self.admission)):
                found = self.admission.decision(key(name))
                if found is not None and found.admitted:
                    observe(self.admission, self.put(name, HOLDS))
                    self.gpus_are_not_overcommitted()
        assert all(self.server[name]["status"]["phase"] in ("Running", "Succeeded") for name in fits)


Interleavings.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestInterleavings = Interleavings.TestCase
