"""Admission to the pool of GPUs: which runs fit together, their order, and the messages of queued runs."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from distill_operator.gpu_scheduler import (
    Decision,
    GpuRequest,
    Node,
    admit,
    gpu_request,
    schedulable_nodes,
)

from tests.fakes.simulated_cluster import ALL_KINDS, ONPOLICY, observed_run

START = datetime(2026, 1, 1, tzinfo=UTC)
POOL = [Node("a", {"pool": "x"}, 8)]


def request(
    name: str,
    gpus: int = 8,
    age: int = 0,
    admitted: bool = False,
    largest_pod: int | None = None,
    **selector: str,
) -> GpuRequest:
    """A request of `gpus` GPUs, one of them the teacher's, created `age` seconds before START."""
    return GpuRequest(
        name,
        f"uid-{name}",
        START - timedelta(seconds=age),
        1,
        gpus - 1,
        largest_pod or gpus - 1,
        selector,
        admitted,
    )


def decide(mine: GpuRequest, *others: GpuRequest, pool: list[Node] = POOL) -> Decision:
    return admit(mine, [mine, *others], pool)


@pytest.mark.parametrize(
    "mine, others, admitted",
    [
        pytest.param(request("a"), [], True, id="alone"),
        pytest.param(request("a", 4), [request("b", 4, admitted=True)], True, id="fits beside another"),
        pytest.param(request("a"), [request("b", 1, admitted=True)], False, id="one GPU short"),
        pytest.param(request("a"), [request("b", age=9)], False, id="older one queued"),
        pytest.param(request("a"), [request("b", age=-9)], True, id="younger one queued"),
        pytest.param(request("a"), [request("b")], True, id="same age: by name"),
        pytest.param(request("b"), [request("a")], False, id="same age: by name, reversed"),
        pytest.param(
            request("a", 2),
            [request("b", age=9), request("c", 6, admitted=True)],
            False,
            id="a small younger one does not overtake an older one",
        ),
        pytest.param(
            request("a"), [request("b", 16, age=9)], True, id="an older one that can never fit does not block"
        ),
        pytest.param(
            request("a"),
            [request("b", age=9, pool="elsewhere")],
            True,
            id="an older one of another pool does not block",
        ),
    ],
)
def test_the_oldest_run_is_admitted_first_if_enough_gpus_are_free(
    mine: GpuRequest, others: list[GpuRequest], admitted: bool
) -> None:
    assert decide(mine, *others).admitted is admitted


def test_the_message_has_the_numbers_of_gpus() -> None:
    message = decide(request("second"), request("team/first", admitted=True)).arithmetic
    assert message == (
        "Needs 8 GPUs (1 teacher + 7 student); the pool has 8 on 1 ready node, "
        "of which 8 are held by team/first (8): 0 are left."
    )


@pytest.mark.parametrize(
    "mine, pool, message",
    [
        pytest.param(
            request("a", 16),
            POOL,
            "the pool has 8 on 1 ready node: the run can never start there",
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
            request("a", pool="y"), POOL, "0 ready nodes matching runtime.nodeSelector", id="no matching node"
        ),
    ],
)
def test_a_run_that_is_too_large_for_the_pool_is_unschedulable(
    mine: GpuRequest, pool: list[Node], message: str
) -> None:
    found = decide(mine, pool=pool)
    assert (found.admitted, found.unschedulable) == (False, True)
    assert message in found.arithmetic


def test_runs_on_other_nodes_are_not_counted() -> None:
    pool = [Node("a", {"pool": "x"}, 8), Node("b", {"pool": "y"}, 8)]
    other = request("other", admitted=True, pool="y")
    assert decide(request("mine", pool="x"), other, pool=pool).admitted
    assert decide(request("anywhere", 8), other, pool=pool).admitted, "the pools have 16 in total"
    assert not decide(request("mine", pool="y"), other, pool=pool).admitted


def node(name: str, gpus: str | None = "8", ready: str = "True", **spec: Any) -> dict[str, Any]:
    allocatable = {"nvidia.com/gpu": gpus} if gpus else {}
    status = {"allocatable": allocatable, "conditions": [{"type": "Ready", "status": ready}]}
    return {"metadata": {"name": name, "labels": {}}, "spec": spec, "status": status}


def test_only_ready_schedulable_nodes_are_in_the_pool() -> None:
    objects = [
        node("good"),
        node("cordoned", unschedulable=True),
        node("lost", ready="Unknown"),
        node("cpu", None),
    ]
    assert [(found.name, found.gpus) for found in schedulable_nodes(objects)] == [("good", 8), ("cpu", 0)]


@pytest.mark.parametrize(
    "stages, student, per_pod",
    [
        pytest.param(ALL_KINDS[:2], {"gpus": 4}, 4, id="students"),
        pytest.param(ALL_KINDS, {"gpus": 4}, 5, id="students and the teacher's process"),
        pytest.param(
            ALL_KINDS,
            {"gpus": 4, "gpusPerPod": 1},
            2,
            id="one student per pod, and the teacher's process beside one",
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
    found = gpu_request(run.run, run)
    assert (found.teacher, found.student, found.gpus, found.largest_pod) == (2, 4, 6, per_pod)
