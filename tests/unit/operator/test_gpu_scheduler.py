"""Admission to the pool of GPUs: which nodes and pods count, which runs fit together, their order, and the
messages of queued runs."""

import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import combinations
from typing import Any

import pytest
from distill_operator.gpu_scheduler import (
    Decision,
    GpuRequest,
    Node,
    Placement,
    Pool,
    Taint,
    decide,
    fits,
    gpu_request,
    holds_gpus,
    never_fits,
    parse_node,
    parse_pod,
    used_by_others,
    waits_for_gpus,
    whole_number,
    will_need_gpus,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes.simulated_cluster import (
    ALL_KINDS,
    ONPOLICY,
    SETTINGS,
    observed_run,
    training_run,
    waiting_run,
)
from vpmoe.api.runtime import Toleration
from vpmoe.api.status import MESSAGE, ChildRef, Status

START = datetime(2026, 1, 1, tzinfo=UTC)
GPU = "nvidia.com/gpu"
NODES = [Node("a", {"pool": "x"}, 8)]
SPOT = Taint("spot", "", "NoSchedule")


def request(
    name: str,
    gpus: int = 8,
    age: int = 0,
    largest_pod: int | None = None,
    namespace: str = "team",
    tolerations: tuple[Toleration, ...] = (),
    **selector: str,
) -> GpuRequest:
    """A request of `gpus` GPUs, one of them the teacher's, created `age` seconds before START."""
    return GpuRequest(
        namespace,
        name,
        START - timedelta(seconds=age),
        1,
        gpus - 1,
        largest_pod or max(gpus - 1, 1),
        Placement(frozenset(selector.items()), frozenset(tolerations)),
    )


def decision(
    mine: GpuRequest,
    *others: GpuRequest,
    holders: tuple[GpuRequest, ...] = (),
    nodes: list[Node] = NODES,
    used: dict[str, int] | None = None,
) -> Decision:
    """The decision about `mine`, while `others` wait too."""
    return decide([*others, mine], list(holders), Pool(nodes, used))[mine.key]


@pytest.mark.parametrize(
    "mine, others, holders, admitted",
    [
        pytest.param(request("a"), [], [], True, id="alone"),
        pytest.param(request("a", 4), [], [request("b", 4)], True, id="fits beside another"),
        pytest.param(request("a"), [], [request("b", 1)], False, id="one GPU short"),
        pytest.param(request("a"), [request("b", age=9)], [], False, id="an older one takes them"),
        pytest.param(request("a", 4), [request("b", 4, age=9)], [], True, id="both fit"),
        pytest.param(request("a"), [request("b", age=-9)], [], True, id="younger one queued"),
        pytest.param(request("a"), [request("b")], [], True, id="same age: by name"),
        pytest.param(request("b"), [request("a")], [], False, id="same age: by name, reversed"),
        pytest.param(
            request("a", 2),
            [request("b", age=9)],
            [request("c", 6)],
            False,
            id="a small younger one does not overtake an older one",
        ),
        pytest.param(
            request("a"),
            [request("b", 16, age=9)],
            [],
            True,
            id="an older one that can never fit does not block",
        ),
        pytest.param(
            request("a"),
            [request("b", age=9, pool="elsewhere")],
            [],
            True,
            id="an older one of another pool does not block",
        ),
    ],
)
def test_the_oldest_runs_are_admitted_as_far_as_gpus_are_free(
    mine: GpuRequest, others: list[GpuRequest], holders: list[GpuRequest], admitted: bool
) -> None:
    assert decision(mine, *others, holders=tuple(holders)).admitted is admitted


def test_runs_on_other_nodes_are_not_counted() -> None:
    nodes = [Node("a", {"pool": "x"}, 8), Node("b", {"pool": "y"}, 8)]
    other = request("other", pool="y")
    for mine, admitted in (
        (request("mine", pool="x"), True),
        (request("anywhere", 8), True),
        (request("mine", pool="y"), False),
    ):
        assert decision(mine, holders=(other,), nodes=nodes).admitted is admitted


def test_a_run_that_did_not_start_although_its_gpus_were_free_keeps_none_from_younger_ones() -> None:
    broken, large, small = request("broken", 8, age=9), request("large", 8, age=8), request("small", 1)
    for holders, passed_over, admitted in (
        ([], {}, {broken}),
        ([], {broken.key}, {broken, large}),
        ([request("x", 8)], {broken.key}, set()),
        ([request("x", 7)], {broken.key, large.key}, {small}),
    ):
        found = decide([broken, large, small], list(holders), Pool(NODES), passed_over)
        assert {one for one in (broken, large, small) if found[one.key].admitted} == admitted


# --- which nodes and pods count


def node(name: str, gpus: str | None = "8", ready: str = "True", **spec: Any) -> dict[str, Any]:
    allocatable = {GPU: gpus} if gpus else {}
    status = {"allocatable": allocatable, "conditions": [{"type": "Ready", "status": ready}]}
    return {"metadata": {"name": name, "labels": {}}, "spec": spec, "status": status}


def share(*objects: dict[str, Any], tolerations: tuple[Toleration, ...] = ()) -> tuple[int, int, str]:
    """Number of nodes, GPUs and excluded nodes of a pool of these live objects."""
    pool = Pool([parse_node(obj, GPU) for obj in objects])
    found = pool.share(Placement(frozenset(), frozenset(tolerations)))
    return found.count, found.capacity, found.excluded


def test_only_ready_schedulable_nodes_with_gpus_are_in_the_pool() -> None:
    objects = [
        node("good"),
        node("cordoned", unschedulable=True),
        node("lost", ready="Unknown"),
        node("cpu", None),
        {"metadata": {"name": "new"}, "spec": {}},
    ]
    assert share(*objects) == (1, 8, "2 nodes cordoned or not ready")


@pytest.mark.parametrize(
    "taint, tolerations, counted",
    [
        pytest.param({"effect": "NoSchedule"}, [], False, id="NoSchedule"),
        pytest.param({"effect": "NoExecute"}, [], False, id="NoExecute"),
        pytest.param({"effect": "PreferNoSchedule"}, [], True, id="PreferNoSchedule keeps nothing away"),
        pytest.param({}, [{"key": "k", "operator": "Exists"}], True, id="key exists"),
        pytest.param({"value": "v"}, [{"key": "k", "value": "v"}], True, id="equal is the default"),
        pytest.param({"value": "v"}, [{"key": "k", "operator": "Equal", "value": "w"}], False, id="value"),
        pytest.param({}, [{"key": "k"}], True, id="both without a value"),
        pytest.param({}, [{"operator": "Exists"}], True, id="everything is tolerated"),
        pytest.param({}, [{"key": "k", "operator": "Exists", "effect": "NoExecute"}], False, id="effect"),
        pytest.param({}, [{"key": "j", "operator": "Exists"}], False, id="another key"),
        pytest.param(
            {"effect": "NoExecute"},
            [{"key": "k", "operator": "Exists", "tolerationSeconds": 5}],
            True,
            id="for a time",
        ),
    ],
)
def test_a_node_counts_if_the_runs_pods_tolerate_its_taints(
    taint: dict[str, str], tolerations: list[dict[str, Any]], counted: bool
) -> None:
    tainted = node("a", taints=[{"key": "k", "effect": "NoSchedule", **taint}])
    found = share(tainted, tolerations=tuple(Toleration.model_validate(one) for one in tolerations))
    assert found[:2] == ((1, 8) if counted else (0, 0))
    assert counted or f"1 node with taint k{'=v' if 'value' in taint else ''}:" in found[2]


def test_runs_tolerate_the_taint_with_the_name_of_the_gpu_resource() -> None:
    observed = observed_run()
    assert observed.run is not None
    pool = Pool([parse_node(node("a", taints=[{"key": GPU, "value": "x", "effect": "NoSchedule"}]), GPU)])
    assert pool.share(gpu_request(observed.run, observed, SETTINGS).placement).capacity == 8


def pod(
    gpus: Any = "4",
    node: str | None = "a",
    phase: str = "Running",
    owner: ChildRef | None = None,
    namespace: str = "team",
    **spec: Any,
) -> dict[str, Any]:
    container = {
        "name": "main",
        "resources": {"requests": {GPU: gpus}, "limits": {GPU: gpus}} if gpus else {},
    }
    owners = [{**owner.dump(), "controller": True}] if owner else []
    return {
        "metadata": {"name": "p", "namespace": namespace, "ownerReferences": owners},
        "spec": {"containers": [container], **({"nodeName": node} if node else {}), **spec},
        "status": {"phase": phase},
    }


def container(gpus: int, **more: Any) -> dict[str, Any]:
    return {"name": "c", "resources": {"limits": {GPU: str(gpus)}}, **more}


@pytest.mark.parametrize(
    "obj, gpus",
    [
        pytest.param(pod(), 4, id="running"),
        pytest.param(pod(phase="Pending"), 4, id="bound, not running yet"),
        pytest.param(pod(phase="Unknown"), 4, id="on a lost node"),
        pytest.param(pod(node=None, phase="Pending"), 0, id="not bound"),
        pytest.param(pod(phase="Succeeded"), 0, id="succeeded"),
        pytest.param(pod(phase="Failed"), 0, id="failed"),
        pytest.param(pod(None), 0, id="without GPUs"),
        pytest.param(pod(containers=[container(1), container(2)]), 3, id="two containers"),
        pytest.param(pod(containers=[{"name": "no resources"}]), 0, id="no resources"),
        pytest.param(pod(initContainers=[container(6)]), 6, id="an init container needs more"),
        pytest.param(pod(initContainers=[container(1)]), 4, id="an init container needs less"),
        pytest.param(
            pod(initContainers=[container(1, restartPolicy="Always")]), 5, id="a sidecar runs beside it"
        ),
        pytest.param(
            pod(initContainers=[container(2, restartPolicy="Always"), container(5)]),
            7,
            id="an init container beside a sidecar",
        ),
        pytest.param(pod("1k"), 1000, id="a quantity with a suffix"),
    ],
)
def test_gpus_of_bound_pods_that_have_not_ended_are_counted(obj: dict[str, Any], gpus: int) -> None:
    found = parse_pod(obj, GPU)
    assert (found.gpus if found else 0) == gpus


@pytest.mark.parametrize(
    "quantity, number",
    [(0, 0), (8, 8), ("8", 8), ("2k", 2000), ("1Ki", 1024), ("1e3", 1000), ("1E3", 1000), ("2500m", 2)],
)
def test_quantities_of_gpus(quantity: str | int, number: int) -> None:
    assert whole_number(quantity) == number


CHILD = ChildRef(kind="Job", name="first-vanilla-a1", uid="uid-1")


@pytest.mark.parametrize(
    "owner, namespace, known, counted",
    [
        pytest.param(CHILD, "team", CHILD, False, id="of a run that holds GPUs"),
        pytest.param(CHILD, "team", ChildRef(kind="Job", name=CHILD.name), False, id="its uid is not known"),
        pytest.param(CHILD, "elsewhere", CHILD, True, id="same name in another namespace"),
        pytest.param(
            ChildRef(kind="Job", name=CHILD.name, uid="uid-0"), "team", CHILD, True, id="of an earlier run"
        ),
        pytest.param(
            ChildRef(kind="ReplicaSet", name=CHILD.name, uid="uid-1"),
            "team",
            CHILD,
            True,
            id="of another kind",
        ),
        pytest.param(None, "team", CHILD, True, id="without a controller"),
    ],
)
def test_pods_of_runs_that_hold_gpus_are_not_counted_a_second_time(
    owner: ChildRef | None, namespace: str, known: ChildRef, counted: bool
) -> None:
    found = parse_pod(pod(owner=owner, namespace=namespace), GPU)
    assert found is not None
    assert used_by_others([found], {"team": [known]}) == ({"a": 4} if counted else {})


@pytest.mark.parametrize(
    "gpus, largest_pod, used, admitted, message",
    [
        pytest.param(4, 4, {"a": 6}, False, "of which 6 are used by other pods: 2 are left.", id="too few"),
        pytest.param(2, 2, {"a": 6}, True, "2 of them free", id="enough"),
        pytest.param(8, 8, {"b": 8}, True, "8 of them free", id="on another node"),
        pytest.param(
            8, 8, {"a": 99}, False, "8 are used by other pods: 0 are left", id="more than there are"
        ),
    ],
)
def test_gpus_of_other_pods_are_not_free(
    gpus: int, largest_pod: int, used: dict[str, int], admitted: bool, message: str
) -> None:
    found = decision(request("a", gpus, largest_pod=largest_pod), used=used)
    assert (found.admitted, found.unschedulable) == (admitted, False)
    assert message in found.arithmetic


def test_a_pod_must_fit_on_one_node_beside_other_pods() -> None:
    nodes = [Node("a", {}, 8), Node("b", {}, 8)]
    found = decision(request("mine", 8, largest_pod=7), nodes=nodes, used={"a": 4, "b": 3})
    assert found.arithmetic == (
        "Needs 8 GPUs (1 teacher + 7 student); the pool has 16 on 2 ready nodes, of which 7 are used by "
        "other pods: 9 are left, but at most 5 on one node, and a pod needs 7."
    )
    assert not decision(
        request("younger", 1), request("old", 8, 9, 7), nodes=nodes, used={"a": 4, "b": 3}
    ).admitted


# --- which runs take part


@pytest.mark.parametrize(
    "runtime, chart, takes_part",
    [
        pytest.param({}, "Queued", True, id="queued"),
        pytest.param({"queueName": "team"}, "Queued", False, id="Kueue admits it"),
        pytest.param({"scheduling": "Immediate"}, "Queued", False, id="immediate"),
        pytest.param({}, "Immediate", False, id="immediate by the chart"),
    ],
)
def test_only_runs_of_this_operators_queue_hold_gpus_or_wait_for_them(
    runtime: dict[str, Any], chart: str, takes_part: bool
) -> None:
    changed = SETTINGS.model_copy(update={"scheduling": chart})
    waits = observed_run(waiting_run().status, runtime=runtime)
    holds = observed_run(training_run().status, runtime=runtime)
    assert waits_for_gpus(waits, changed) is takes_part
    assert holds_gpus(holds, changed) is takes_part
    assert will_need_gpus(observed_run(runtime=runtime), changed) is takes_part


def test_a_run_waits_from_the_end_of_preprocessing_until_it_holds_gpus() -> None:
    cluster = waiting_run()
    preprocessing = cluster.status.model_copy(
        update={
            "steps": tuple(step.model_copy(update={"state": "Running"}) for step in cluster.status.steps[:1])
        }
    )
    for observed, expected in (
        (observed_run(), (True, False, False)),
        (observed_run(preprocessing), (True, False, False)),
        (observed_run(cluster.status), (True, True, False)),
        (observed_run(cluster.status, suspend=True), (False, False, False)),
        (observed_run(cluster.status, deleting=True), (False, False, False)),
        (observed_run(training_run().status), (False, False, True)),
        (observed_run(Status(phase="Succeeded")), (False, False, False)),
        (observed_run(cluster.status, nonsense=1), (False, False, False)),
    ):
        found = [question(observed, SETTINGS) for question in (will_need_gpus, waits_for_gpus, holds_gpus)]
        assert tuple(found) == expected


def test_a_run_does_not_wait_for_gpus_while_its_initial_weights_are_made() -> None:
    """Other runs get them. A run that can rescore meanwhile needs them at once."""
    upcycled = {"shape": "tiny", "gpus": 4, "init": {"upcycle": {"model": "s3://models/dense"}}}
    preprocessed = waiting_run(student=upcycled).status
    made = preprocessed.model_copy(
        update={"steps": tuple(step.model_copy(update={"state": "Succeeded"}) for step in preprocessed.steps)}
    )
    both = made.model_copy(update={"steps": made.steps[:2]})
    for status, stages, waits in (
        (preprocessed, ALL_KINDS[:1], False),
        (preprocessed, ALL_KINDS[:2], True),
        (both, ALL_KINDS[:1], True),
    ):
        observed = observed_run(status, student=upcycled, stages=stages)
        assert observed.run is not None and will_need_gpus(observed, SETTINGS)
        assert waits_for_gpus(observed, SETTINGS) is waits


@pytest.mark.parametrize(
    "stages, student, per_pod",
    [
        pytest.param(ALL_KINDS[:2], {"gpus": 4}, 4, id="students"),
        pytest.param(ALL_KINDS, {"gpus": 4}, 6, id="students and the teachers' processes"),
        pytest.param(
            ALL_KINDS,
            {"gpus": 4, "gpusPerPod": 1},
            3,
            id="one student per pod, and the teachers' processes beside one",
        ),
        pytest.param(
            [{**ONPOLICY, "sampler": {"gpus": 3}}],
            {"gpus": 4, "gpusPerPod": 1},
            3,
            id="the sampler in one pod",
        ),
    ],
)
def test_a_run_requests_the_maximum_that_its_steps_need_at_once(
    stages: list[dict[str, Any]], student: dict[str, Any], per_pod: int
) -> None:
    run = observed_run(
        stages=stages, student={"shape": "tiny", **student}, teacher={"model": "s3://models/t", "gpus": 2}
    )
    assert run.run is not None
    found = gpu_request(run.run, run, SETTINGS)
    assert (found.teacher, found.student, found.gpus, found.largest_pod) == (2, 4, 6, per_pod)


# --- messages


def test_the_message_has_the_numbers_of_gpus() -> None:
    message = decision(request("second"), holders=(request("first", 6),), used={"a": 2}).arithmetic
    assert message == (
        "Needs 8 GPUs (1 teacher + 7 student); the pool has 8 on 1 ready node, of which 2 are used by "
        "other pods and 6 are held by first (6): 0 are left."
    )


def test_a_message_names_runs_of_its_own_namespace_only() -> None:
    nodes = [Node("a", {}, 64)]
    own = [request(f"own-{i}", 4, age=i) for i in range(1, 6)]
    secret = [request(f"secret-{i}", 8, age=i, namespace=f"hidden-{i}") for i in (1, 2)]
    older = [request("secret-older", 40, age=9, namespace="hidden-3"), request("own-older", 40, age=8)]
    mine, behind = request("mine", 40), request("behind", 1, age=-1)
    found = decision(mine, holders=(*own, *secret), nodes=nodes).arithmetic
    assert (
        "20 are held by own-5 (4), own-4 (4), own-3 (4) and 2 more and 16 are held by 2 runs of other"
        in found
    )
    found += decision(behind, *older, mine, holders=(*own, *secret), nodes=nodes).arithmetic
    assert found.endswith("the pool has 64 on 1 ready node. 3 older runs go first.")
    assert "secret" not in found and "hidden" not in found


def test_messages_of_runs_behind_others_rarely_change() -> None:
    queue = [request(f"r{i:03}", age=-i) for i in range(200)]
    found = decide(queue, [], Pool(NODES))
    texts = [found[one.key].arithmetic.rpartition(". ")[2] for one in queue[2:]]
    assert found[queue[1].key].arithmetic.endswith("of which 8 are held by r000 (8): 0 are left.")
    assert texts[0] == "1 older run goes first."
    assert (texts[8], texts[9], texts[150]) == (
        "9 older runs go first.",
        "At least 10 older runs go first.",
        "At least 100 older runs go first.",
    )
    assert len(set(texts)) == 11


@pytest.mark.parametrize(
    "mine, nodes, message",
    [
        pytest.param(
            request("a", 16),
            NODES,
            "the pool has 8 on 1 ready node: the run can never start there. Add nodes, or request fewer GPUs",
            id="too many",
        ),
        pytest.param(request("a"), [], "the pool has 0 on 0 ready nodes", id="no node"),
        pytest.param(
            request("a", 8, largest_pod=7),
            [Node("a", {}, 4), Node("b", {}, 4)],
            "the largest node of the pool has 4",
            id="small nodes",
        ),
        pytest.param(
            request("a", pool="y"),
            NODES,
            "the pool has 0 on 0 ready nodes that the run's pods may use: the run can never start there. "
            "Not counted: 1 node excluded by runtime.nodeSelector.",
            id="no matching node",
        ),
        pytest.param(
            request("a"),
            [Node("a", {}, 8, (SPOT,)), Node("b", {}, 8, (SPOT,)), Node("c", {}, 8, (), False)],
            "Not counted: 2 nodes with taint spot:NoSchedule, which runtime.tolerations lacks, "
            "1 node cordoned or not ready.",
            id="no node that can be used",
        ),
    ],
)
def test_a_run_that_is_too_large_for_the_pool_is_unschedulable(
    mine: GpuRequest, nodes: list[Node], message: str
) -> None:
    found = decision(mine, nodes=nodes)
    assert (found.admitted, found.unschedulable) == (False, True)
    assert message in found.arithmetic
    assert "set runtime.scheduling to Immediate" in found.arithmetic
    assert never_fits(mine, Pool(nodes)) == found.arithmetic


def test_the_longest_message_fits_into_the_status() -> None:
    taints = [Taint("example.com/" + f"{i}" * 63, "v" * 63, "NoSchedule") for i in range(9)]
    nodes = [Node(f"n{i}", {}, 999_999, (taint,)) for i, taint in enumerate(taints)]
    holders = tuple(
        request("n" * 30, 10**6, namespace=space) for space in ("team", "team", "team", "team", "b")
    )
    for mine in (
        request("mine", 10**6),
        request("mine", 10**6, tolerations=(Toleration(operator="Exists"),)),
    ):
        assert len(decision(mine, holders=holders, nodes=[*NODES, *nodes]).arithmetic) < MESSAGE


# --- properties

LABELS = st.sampled_from([{}, {"pool": "x"}, {"pool": "y"}])
PLACEMENTS = st.builds(
    Placement,
    LABELS.map(lambda labels: frozenset(labels.items())),
    st.sampled_from([frozenset(), frozenset({Toleration(key="spot", operator="Exists")})]),
)
POOLS = st.lists(
    st.tuples(LABELS, st.integers(1, 8), st.sampled_from([(), (SPOT,)]), st.booleans(), st.integers(0, 8)),
    max_size=4,
)
REQUESTS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 2), st.integers(1, 9), st.integers(1, 8), PLACEMENTS),
    max_size=12,
)


def built(nodes: Any, requests: Any) -> tuple[list[Node], dict[str, int], list[GpuRequest]]:
    made = [
        Node(f"n{i}", labels, gpus, taints, ready) for i, (labels, gpus, taints, ready, _) in enumerate(nodes)
    ]
    used = {f"n{i}": used for i, (*_, used) in enumerate(nodes)}
    asked = [
        GpuRequest("team", f"r{i}", START + timedelta(seconds=age), teacher, student, pod, placement)
        for i, (age, teacher, student, pod, placement) in enumerate(requests)
    ]
    return made, used, asked


def usable(request: GpuRequest, nodes: list[Node]) -> frozenset[str]:
    """Names of the nodes on which the request's pods may run; written apart from the scheduler."""
    tolerated = {toleration.key for toleration in request.placement.tolerations}
    return frozenset(
        node.name
        for node in nodes
        if node.available
        and dict(request.placement.node_selector).items() <= node.labels.items()
        and {taint.key for taint in node.taints} <= tolerated
    )


def overcommitted(holders: list[GpuRequest], nodes: list[Node], used: dict[str, int]) -> list[frozenset[str]]:
    """Sets of nodes with fewer GPUs than the runs that may run nowhere else: by Hall's theorem, GPUs can be
    given to all runs if there is none.
    """
    free = {node.name: max(node.gpus - used[node.name], 0) for node in nodes}
    subsets = [frozenset(names) for size in range(1, len(nodes) + 1) for names in combinations(free, size)]
    return [
        names
        for names in subsets
        if sum(one.gpus for one in holders if usable(one, nodes) <= names) > sum(free[name] for name in names)
    ]


@given(POOLS, REQUESTS)
@settings(max_examples=400, deadline=None)
def test_gpus_are_never_overcommitted_and_no_free_ones_are_kept_from_the_oldest(
    nodes: Any, requests: Any
) -> None:
    made, used, asked = built(nodes, requests)
    pool = Pool(made, used)
    found = decide(asked, [], pool)
    admitted = [one for one in asked if found[one.key].admitted]
    assert not overcommitted(admitted, made, used)
    assert found.keys() == {one.key for one in asked}
    by_age = sorted(asked, key=lambda one: (one.created, one.key))
    for position, one in enumerate(by_age):
        older = [
            other
            for other in by_age[:position]
            if usable(other, made) & usable(one, made) and not found[other.key].unschedulable
        ]
        if found[one.key].admitted:
            assert all(found[other.key].admitted for other in older), "no run overtakes an older one"
        elif not found[one.key].unschedulable and all(found[other.key].admitted for other in older):
            assert not fits(one, [other for other in admitted if other in by_age[:position]], pool)
        assert found[one.key].unschedulable == bool(never_fits(one, pool))


@given(POOLS, REQUESTS, st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_every_run_that_can_fit_starts_if_the_others_end_whatever_comes_later(
    nodes: Any, requests: Any, random: Any
) -> None:
    """Each round admits, then one run ends and a younger one of the same kind comes: nobody starves."""
    made, _, asked = built(nodes, requests)
    pool, used = Pool(made), dict.fromkeys((node.name for node in made), 0)
    waiting, holding, started = list(asked), list[GpuRequest](), set[Any]()
    for round_number in range(4 * len(asked)):
        found = decide(waiting, holding, pool)
        admitted = [one for one in waiting if found[one.key].admitted]
        holding += admitted
        waiting = [one for one in waiting if one not in admitted]
        started |= {one.key for one in admitted}
        assert not overcommitted(holding, made, used)
        if holding:
            ended = holding.pop(random.randrange(len(holding)))
            later = START + timedelta(seconds=100 + round_number)
            waiting.append(
                GpuRequest(
                    "team", f"later-{round_number}", later, ended.teacher, ended.student, 1, ended.placement
                )
            )
    assert {one.key for one in asked if not never_fits(one, pool)} <= started


# --- cost


def calls(function: Callable[[], object]) -> int:
    """Python functions that are called, as a measure of work that does not depend on the machine."""
    count = 0

    def counted(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        del frame, argument
        count += event == "call"

    sys.setprofile(counted)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def queue_of(runs: int) -> list[GpuRequest]:
    return [request(f"r{i:05}", 1 + i % 8, age=-i, pool=("x", "y", "z")[i % 3]) for i in range(runs)]


def test_the_work_of_one_look_grows_linearly_with_the_queue() -> None:
    nodes = [Node(f"{pool}{i}", {"pool": pool}, 8) for pool in "xyz" for i in range(10)]
    small, large = (
        calls(lambda runs=runs: decide(queue_of(runs), queue_of(20), Pool(nodes)))  # type: ignore[misc]
        for runs in (500, 1000)
    )
    assert large < 2.2 * small, (small, large)


def test_a_placement_is_not_compared_with_every_node() -> None:
    """Tenants choose the tolerations and node selectors of as many runs as they like."""
    placements = [
        Placement(
            frozenset({("zone", f"z{i % 7}")} if i % 2 else ()),
            frozenset(Toleration(key=f"t{j}", operator="Exists") for j in range(20) if i >> j % 9 & 1),
        )
        for i in range(300)
    ]
    runs = [replace(one, placement=placements[i]) for i, one in enumerate(queue_of(300))]

    def work(number: int) -> int:
        taints = [(Taint(f"t{j}", "", "NoSchedule"),) for j in range(20)]
        pool = Pool(Node(f"n{i}", {"zone": f"z{i % 7}"}, 1000, taints[i % 20]) for i in range(number))
        return calls(lambda: decide(runs, [], pool))

    small, large = work(140), work(1400)
    assert large < 1.2 * small, (small, large)
