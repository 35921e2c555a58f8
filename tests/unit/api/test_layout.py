"""The layout of a stage: ranks, pods and sequences per step."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import valid_specs
from vpmoe.api import DistillRun, Invalid
from vpmoe.api.layout import (
    EXPERTS,
    Layout,
    first_pod_gpus,
    largest_pod,
    layout,
    teacher_processes,
)
from vpmoe.api.student import StudentSpec


def stage_layout(changes: dict[str, Any], stage: str = "first") -> Layout:
    run = DistillRun.parse(valid_specs.manifest(changes))
    return layout(run.spec.student, run.spec.training, run.stage(stage))


@pytest.mark.parametrize(
    "changes, stage, expected",
    [
        pytest.param({}, "first", Layout(7, 1, 7, 7, 1, 17, 119, 119 * 8192), id="seven GPUs in one pod"),
        pytest.param(
            {"spec.stages": [valid_specs.ONPOLICY]},
            "onpolicy",
            Layout(3, 1, 3, 3, 1, 40, 120, 120 * 8192),
            id="half of the GPUs, rounded up, go to the sampler",
        ),
        pytest.param(
            {"spec.student.gpusPerPod": 1},
            "first",
            Layout(7, 7, 1, 7, 1, 17, 119, 119 * 8192),
            id="one pod per GPU",
        ),
        pytest.param(
            {
                "spec.student": {"gpus": 16, "gpusPerPod": 8, "expertParallel": 4},
                "spec.training.globalBatchTokens": "131072",
            },
            "first",
            Layout(16, 2, 8, 16, 4, 1, 16, 131_072),
            id="two nodes, experts on four ranks, the smallest batch",
        ),
        pytest.param(
            {
                "spec.student": {"gpus": 8, "gpusPerPod": 8},
                "spec.stages": [{**valid_specs.ONPOLICY, "sampler": {"gpus": 1}}],
            },
            "onpolicy",
            Layout(7, 1, 7, 7, 1, 17, 119, 119 * 8192),
            id="a pod is no larger than the stage",
        ),
        pytest.param(
            {"spec.stages": [valid_specs.FORCED]},
            "forced",
            Layout(7, 1, 7, 7, 1, 17, 119, 119 * 8192),
            id="the teacher is not a rank",
        ),
    ],
)
def test_the_layout_of_a_stage(changes: dict[str, Any], stage: str, expected: Layout) -> None:
    assert stage_layout(changes, stage) == expected


@given(
    gpus=st.integers(1, 12),
    sampler=st.integers(1, 3),
    per_pod=st.one_of(st.none(), st.integers(1, 8)),
    expert_parallel=st.sampled_from([1, 2, 3, 4]),
    batch=st.integers(1, 20_000),
    length=st.sampled_from([512, 2048]),
)
def test_a_run_is_accepted_exactly_if_its_layout_is_valid(
    gpus: int, sampler: int, per_pod: int | None, expert_parallel: int, batch: int, length: int
) -> None:
    changes = {
        "spec.student": {"gpus": gpus, "gpusPerPod": per_pod, "expertParallel": expert_parallel},
        "spec.training": {"globalBatchTokens": batch, "sequenceLength": length},
        "spec.stages": [{**valid_specs.ONPOLICY, "sampler": {"gpus": sampler}}],
    }
    ranks = gpus - sampler
    pod = min(per_pod or gpus, ranks)
    valid = (
        ranks > 0
        and ranks % expert_parallel == 0
        and 256 % expert_parallel == 0
        and ranks % pod == 0
        and batch >= ranks * length
    )
    if not valid:
        with pytest.raises(Invalid):
            stage_layout(changes, "onpolicy")
        return
    found = stage_layout(changes, "onpolicy")
    assert found.ranks == ranks == found.pods * found.processes_per_pod == found.data_parallel
    assert found.processes_per_pod == pod
    assert found.sequences_per_step == found.sequences_per_rank * ranks > 0
    assert found.tokens_per_step == found.sequences_per_step * length
    assert found.tokens_per_step <= batch < found.tokens_per_step + length * ranks


@pytest.mark.parametrize(
    "stage, gpus",
    [
        pytest.param(valid_specs.MINIMAL["spec"]["stages"][0], 2, id="training"),
        pytest.param(valid_specs.FORCED, 4, id="training with the teachers' processes"),
        pytest.param({**valid_specs.ONPOLICY, "sampler": {"gpus": 4}}, 4, id="the sampler"),
        pytest.param(
            {**valid_specs.ONPOLICY, "sampler": {"gpus": 2}}, 2, id="training and a sampler of equal size"
        ),
    ],
)
def test_a_node_must_hold_the_largest_pod(stage: dict[str, Any], gpus: int) -> None:
    run = DistillRun.parse(
        valid_specs.manifest(
            {
                "spec.student": {"gpus": 8, "gpusPerPod": 2},
                "spec.teacher": {"model": "s3://models/teacher", "gpus": 2},
                "spec.stages": [stage],
            }
        )
    )
    assert largest_pod(run.spec.teacher, run.spec.student, run.spec.stages[0]) == gpus


@pytest.mark.parametrize("gpus, teachers", [(1, 1), (3, 3), (5, 4)])
def test_a_teacher_has_at_least_one_student(gpus: int, teachers: int) -> None:
    run = DistillRun.parse(
        valid_specs.manifest(
            {
                "spec.student": {"gpus": 4},
                "spec.teacher": {"model": "s3://models/teacher", "gpus": gpus},
                "spec.stages": [valid_specs.FORCED],
            }
        )
    )
    stage = run.spec.stages[0]
    assert teacher_processes(run.spec.teacher, run.spec.student, stage) == teachers
    assert first_pod_gpus(run.spec.teacher, run.spec.student, stage) == 4 + teachers


def test_every_shape_has_its_number_of_experts() -> None:
    assert set(EXPERTS) == set(StudentSpec.model_json_schema()["properties"]["shape"]["enum"])
