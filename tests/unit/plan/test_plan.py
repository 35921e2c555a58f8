"""A run's plan: bytes and hours by hand, the teacher's size, the OnPolicy totals, what does not fit."""

import math
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import valid_specs
from tests.fakes.chart import VALUES
from tests.fakes.teacher_configs import GPT_OSS_20B, GPT_OSS_120B
from vpmoe.api import DistillRun, Invalid, OnPolicy, load_run
from vpmoe.api.card import GIB
from vpmoe.api.memory import STUDENTS
from vpmoe.api.quantities import parse_quantity
from vpmoe.api.spec import Spec
from vpmoe.inference import teacher_hidden
from vpmoe.plan import memory, onpolicy, throughput
from vpmoe.plan.memory import MicrobatchPlan
from vpmoe.plan.onpolicy import rollout_totals
from vpmoe.plan.plan import (
    CHART_CORES,
    DIVISIONS,
    Assumptions,
    Plan,
    divisions,
    make_plan,
    plan_steps,
    splits,
)
from vpmoe.plan.sampling import ENGINES, SAMPLING_SHARE, divide_card
from vpmoe.plan.scoring import LEAST_TOKENS, MOST_TOKENS, forward_tokens, needed_to_score, teacher_share
from vpmoe.plan.simulation import BATCHES, StageTime, stage_time
from vpmoe.plan.table import memory_rows, plan_text
from vpmoe.plan.teacher import KNOWN, TeacherSize, known_teacher
from vpmoe.plan.throughput import CARDS, MEASURED, Measured, Work
from vpmoe.rollout import curriculum
from vpmoe.rollout.forecast import Assumptions as Lengths
from vpmoe.rollout.forecast import Forecast, forecast_phases
from vpmoe.teacher.weights import MXFP4_TYPE, check_config, wanted_tensors

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "manifests" / "examples"
H100 = CARDS["h100-80"]


def plan_of(changes: dict[str, Any], teacher: str = "gpt-oss-120b", **assumed: Any) -> Plan:
    run = DistillRun.parse(valid_specs.manifest(changes))
    return make_plan(run, Assumptions(H100, H100.memory, KNOWN[teacher], **assumed))


@pytest.mark.parametrize("released, name", [(GPT_OSS_20B, "gpt-oss-20b"), (GPT_OSS_120B, "gpt-oss-120b")])
@pytest.mark.parametrize("packed", [True, False])
def test_a_teacher_s_bytes_are_those_of_its_tensors(
    released: dict[str, Any], name: str, packed: bool
) -> None:
    """The tensors that the checkpoint must have are counted independently, in teacher/weights.py."""
    config = dict(released)
    if not packed:
        del config["quantization_config"]
    check_config(config)
    size = TeacherSize.from_config(config, name)
    tensors = list(wanted_tensors(config))
    elements = [(tensor.packed, _product(tensor.shape)) for tensor in tensors]
    assert MXFP4_TYPE == "U8"
    assert size.stored == sum(number * (1 if one else 2) for one, number in elements)
    if not packed:
        assert size.parameters == sum(number for _, number in elements)
        assert size.output == 2 * 201_088 * 2880
    else:
        assert size == KNOWN[name]


def _product(shape: tuple[int, ...]) -> int:
    found = 1
    for one in shape:
        found *= one
    return found


def test_the_releases_have_their_published_parameters() -> None:
    assert round(KNOWN["gpt-oss-20b"].parameters / 1e9, 1) == 20.9
    assert round(KNOWN["gpt-oss-120b"].parameters / 1e9, 1) == 116.8


@pytest.mark.parametrize(
    "model, name",
    [
        ("hf://openai/gpt-oss-20b", "gpt-oss-20b"),
        ("hf://openai/gpt-oss-120b@abc", "gpt-oss-120b"),
        ("s3://models/gpt-oss-120b/", "gpt-oss-120b"),
        ("s3://models/gpt-oss-120b-tuned", None),
    ],
)
def test_a_release_is_known_by_its_name(model: str, name: str | None) -> None:
    found = known_teacher(model)
    assert (found and found.name) == name


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_size": "big"}, "hidden_size is 'big', expected a positive integer"),
        ({"head_dim": 0}, "head_dim is 0, expected a positive integer"),
        ({"dtype": "int8"}, "dtype is 'int8', expected one of float32, bfloat16, float16"),
    ],
)
def test_a_malformed_config_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TeacherSize.from_config({**GPT_OSS_20B, **change}, "x")


def test_tokens_of_a_forward_follow_from_the_card() -> None:
    """The 120B on 80 GB by hand: 72 GB of 80 for vLLM, less 65.2 GB of weights, 1.1 GB of context and 0.3 GB
    for a sequence of 4,096 tokens, over 258 kB a token."""
    small, large = KNOWN["gpt-oss-20b"], KNOWN["gpt-oss-120b"]
    assert large.activations == 2 * (8 * 2880 + 4 * 6 * 2880) and large.cached == 36 * 2 * 8 * 64 * 2
    room = 0.9 * 80e9 - large.stored - GIB - 4096 * large.cached
    exact = room / (large.activations + large.cached)
    assert exact > MOST_TOKENS == forward_tokens(large, 80 * 10**9, 4096)
    smaller = 77 * 10**9
    exact -= 0.9 * (80e9 - smaller) / (large.activations + large.cached)
    assert exact - 1024 < forward_tokens(large, smaller, 4096) <= exact
    assert forward_tokens(large, 141 * 10**9, 4096) == forward_tokens(small, 80 * 10**9, 4096) == MOST_TOKENS


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("length", [512, 4096, 100_000])
def test_a_forward_fits_from_the_named_card_on(name: str, length: int) -> None:
    teacher = KNOWN[name]
    card = needed_to_score(teacher, length)
    assert forward_tokens(teacher, card, length) == LEAST_TOKENS
    assert forward_tokens(teacher, card - 2, length) == 0
    role = memory.scoring_teacher("rescore", teacher, 1, card, length)
    assert role.fits and role.total <= teacher_share(card)
    assert not memory.scoring_teacher("rescore", teacher, 1, card - 2, length).fits


def test_the_plan_has_the_constants_of_the_engines_and_of_the_curriculum() -> None:
    assert teacher_hidden.FORWARD_TOKENS["cuda"] == memory.FORWARD_TOKENS
    assert onpolicy.EFFORTS == curriculum.EFFORTS and onpolicy.RAMP == curriculum.RAMP


@pytest.mark.parametrize(
    "changes", [{}, {"anchor": 0}, {"publishEvery": 1, "rollout": {"promptsPerWindow": 99}}]
)
def test_totals_of_an_onpolicy_stage_are_those_of_the_forecast(changes: dict[str, Any]) -> None:
    """The forecast counts whole windows; over the hundreds of a stage the two differ by less than 1 %."""
    stage = {**valid_specs.ONPOLICY, "tokens": "2B", **changes}
    run = DistillRun.parse(valid_specs.manifest({"spec.stages": [stage]}))
    found = run.spec.stages[0]
    assert isinstance(found, OnPolicy)
    lengths = {"low": 300, "medium": 700, "high": 1500}
    exact = sum(forecast_phases(run.spec, found, Lengths(100, lengths)), Forecast())
    totals = rollout_totals(run.spec, found, 100, lengths)
    assert totals.windows == pytest.approx(exact.windows, rel=0.01)
    assert totals.tokens == pytest.approx(exact.on_policy, rel=0.01)
    assert totals.rollouts == pytest.approx(exact.rollouts, rel=0.01)
    assert totals.versions == pytest.approx(len(exact.versions), rel=0.02)


def test_hours_of_a_run_by_hand() -> None:
    """Rescoring runs beside the Vanilla stage, and the Rescored stage waits for both."""
    plan = plan_of(
        {
            "spec.stages": [*valid_specs.MINIMAL["spec"]["stages"], valid_specs.RESCORED],
            "spec.evaluation.completions": 0,
        },
        speeds={"train": 1000.0, "score": 10_000.0},
    )
    first, rescored, scores = 1e9 / 7000 / 3600, 2e9 / 7000 / 3600, 1e9 / 10_000 / 3600
    # 50M tokens take two hours, so the 30 minutes of training.checkpoint.interval come first. The state of
    # each of 7 GPUs is copied at 25 GB/s.
    pause = STUDENTS["vpmoe-6b"].checkpoint / 7 / 25e9 / 3600
    first_pauses, rescored_pauses = (math.ceil(hours / 0.5) * pause for hours in (first, rescored))
    hours = {step.step: step.hours for step in plan.steps}
    assert hours["preprocess"] is None
    assert hours["first"] == pytest.approx(first + first_pauses)
    assert hours["rescored"] == pytest.approx(rescored + rescored_pauses)
    assert hours["rescore"] == pytest.approx(scores)
    assert plan.hours == pytest.approx(max(first + first_pauses, scores) + rescored + rescored_pauses)
    every = first + first_pauses + rescored + rescored_pauses
    assert plan.gpu_hours == pytest.approx(7 * every + scores)


@pytest.mark.parametrize(
    "changes, speed, disk_speed, expected",
    [
        # 7 GPUs, one pod: 72.4 GB. Number, interval, upload, host GB, grace.
        pytest.param({}, 10_000.0, 1e9, (20, 714, 72, 72, 640), id="by-tokens"),
        pytest.param({}, 1000.0, 1e9, (80, 1800, 72, 72, 640), id="by-time"),
        pytest.param(
            {"spec.training.checkpoint": {"everyTokens": "1B"}},
            1000.0,
            1e9,
            (80, 1800, 72, 72, 640),
            id="by-time-alone",
        ),
        pytest.param({}, 70_000.0, 0.25e9, (8, 289, 289, 72, 640), id="by-the-bucket"),
        pytest.param(
            {"spec.training.checkpoint": {"interval": "0s"}},
            100.0,
            1e9,
            (20, 71429, 72, 72, 640),
            id="unbounded",
        ),
        pytest.param({"spec.student.gpusPerPod": 1}, 10_000.0, 1e9, (20, 714, 10, 10, 300), id="seven-pods"),
    ],
)
def test_checkpoints_come_by_tokens_or_time_and_as_fast_as_the_bucket_takes_them(
    changes: dict[str, Any], speed: float, disk_speed: float, expected: tuple[int, ...]
) -> None:
    plan = plan_of(
        {"spec.evaluation.completions": 0, **changes}, speeds={"train": speed}, disk_speed=disk_speed
    )
    (found,) = plan.checkpoints
    assert found.interval_seconds is not None
    assert expected == (
        found.number,
        round(found.interval_seconds),
        round(found.upload_seconds),
        round(found.host_bytes / 1e9),
        found.grace_seconds,
    )
    assert plan.bucket["checkpoints"] == found.kept * found.size
    shown = plan_text(plan)
    assert f"{found.grace_seconds}" in shown and "host memory for copies" in shown
    slow = [one for one in plan.sources if one.startswith("grace:")]
    assert len(slow) == (disk_speed < 0.25e9)


def test_a_memory_limit_that_the_copies_exceed_is_a_problem() -> None:
    limits = {"spec.runtime.resources": {"train": {"limits": {"memory": "64Gi"}}}}
    (problem,) = plan_of(limits).problems
    assert problem == (
        "spec.runtime.resources.train: the memory limit 64Gi is less than the 67.4 GiB that each pod of "
        "stage first holds while its state is uploaded. Raise it to 100Gi or more, or leave it out."
    )
    assert not plan_of({"spec.runtime.resources": {"train": {"limits": {"memory": "100Gi"}}}}).problems


@pytest.mark.parametrize(
    "gpus, score, before, noted",
    [
        pytest.param(None, 10_000.0, False, "27.8 hours on 1 GPU (rescore.gpus) beside 39.7", id="less"),
        pytest.param(None, 1_000.0, False, "on 8 GPUs it would take 34.7 hours before them", id="more"),
        pytest.param(8, 1_000.0, True, "34.7 hours on 8 GPUs (rescore.gpus), then 39.7", id="students' GPUs"),
        pytest.param(8, 1e4, True, "on 1 GPU it would take 27.8 hours beside them", id="needless"),
    ],
)
def test_hours_of_rescoring_beside_or_before_the_vanilla_stage(
    gpus: int | None, score: float, before: bool, noted: str
) -> None:
    plan = plan_of(
        {
            "spec.stages": [*valid_specs.MINIMAL["spec"]["stages"], valid_specs.RESCORED],
            "spec.evaluation.completions": 0,
            "spec.rescore": {"gpus": gpus},
        },
        speeds={"train": 1000.0, "score": score},
    )
    first, rescored, scores = (
        next(step.hours or 0.0 for step in plan.steps if step.step == name)
        for name in ("first", "rescored", "rescore")
    )
    assert scores == pytest.approx(1e9 / ((gpus or 1) * score) / 3600)
    assert plan.hours == pytest.approx((scores + first if before else max(scores, first)) + rescored)
    (note,) = (one for one in plan.sources if one.startswith("rescore:"))
    assert noted in note and ("would take" in note) == ("would take" in noted)
    assert next(role.gpus for role in plan.memory if role.step == "rescore") == (gpus or 1)


@pytest.mark.parametrize(
    "resources, cores",
    [
        ({}, 1),
        ({"preprocess": {"requests": {"cpu": "500m"}}}, 0.5),
        ({"preprocess": {"requests": {"cpu": "0.5"}, "limits": {"cpu": "1500m"}}}, 1.5),
        ({"preprocess": {"requests": {"cpu": 64}}}, 2),
        ({"preprocess": {"limits": {"memory": "4Gi"}}}, 1),
        ({"train": {"limits": {"cpu": 4}}}, 1),
    ],
    ids=str,
)
def test_workers_share_the_tokens_of_preprocessing(resources: dict[str, Any], cores: float) -> None:
    changes = {"spec.runtime.resources": resources, "spec.dataset.workers": 5}
    plan = plan_of(changes, speeds={"preprocess": 1e6}, dataset_tokens=18 * 10**9)
    first = plan.steps[0]
    assert (first.step, first.slowest) == ("preprocess", "preprocess")
    assert first.hours == pytest.approx(18e9 / (5 * cores * 1e6) / 3600)
    assert plan.preprocess_cpu_hours == pytest.approx(5)
    assert plan.hours == plan_of(changes).hours, "they begin after preprocessing"


def test_initial_weights_are_written_to_disk_and_bucket_beside_preprocessing() -> None:
    changes = {"spec.student.init": {"upcycle": {"model": "hf://Qwen/Qwen3-0.6B"}}}
    plan = plan_of(changes, speeds={"preprocess": 1e6}, dataset_tokens=10**9, disk_speed=5e8)
    other = plan_of({}, speeds={"preprocess": 1e6}, dataset_tokens=10**9, disk_speed=5e8)
    size = 4 * STUDENTS["vpmoe-6b"].parameters
    assert [step.step for step in plan.steps][:2] == ["init", "preprocess"]
    assert plan.steps[0].hours == pytest.approx(2 * size / 5e8 / 3600) and not plan.steps[0].gpus
    assert plan.bucket["initial weights"] == size and "initial weights" not in other.bucket
    assert (plan.hours, plan.gpu_hours) == (other.hours, other.gpu_hours)
    assert plan.preprocess_cpu_hours == other.preprocess_cpu_hours is not None
    assert "of preprocessing (" in plan_text(plan) and "\ninit " in plan_text(plan)


def test_preprocessing_of_unknown_tokens_has_a_speed_and_no_hours() -> None:
    plan = plan_of({"spec.dataset.workers": 5}, speeds={"preprocess": 1e6})
    assert plan.steps[0].hours is None and plan.preprocess_cpu_hours is None
    assert plan.steps[0].tokens_per_second == 5e6
    hint = "preprocess: 5 workers (dataset.workers) that use 1 CPU each; give --dataset-tokens for its hours"
    assert hint in plan.sources


def test_a_worker_has_the_cpus_of_the_chart() -> None:
    assert parse_quantity(VALUES["jobResources"]["preprocess"]["requests"]["cpu"]) == CHART_CORES
    assert "cpu" not in VALUES["jobResources"]["preprocess"]["limits"]


def test_the_slowest_role_decides_an_onpolicy_stage() -> None:
    changes = {"spec.stages": [valid_specs.ONPOLICY]}
    for slow, role in (("train", "train"), ("sample", "sampler"), ("score", "teacher")):
        speeds = {"train": 1e6, "sample": 1e6, "score": 1e6, slow: 10.0}
        (step,) = (one for one in plan_of(changes, speeds=speeds).steps if one.step == "onpolicy")
        assert step.slowest == role and step.gpus == {"train": 3, "sampler": 4, "teacher": 1}


def test_a_speed_that_nobody_measured_makes_the_hours_unknown() -> None:
    plan = plan_of({"spec.student.shape": "tiny"})
    assert plan.hours is None and plan.gpu_hours is None
    assert "train: tiny was not measured; give --train-tokens-per-second" in plan.sources


def test_bytes_in_the_bucket_by_hand() -> None:
    plan = plan_of(
        {
            "spec.stages": [
                *valid_specs.MINIMAL["spec"]["stages"],
                valid_specs.RESCORED,
                valid_specs.ONPOLICY,
            ],
            "spec.training.checkpoint": {"everyTokens": "400M", "keep": 4},
        },
        dataset_tokens=2 * 10**9,
    )
    parameters = 6_029_894_927
    assert plan.bucket["dataset"] == 10**10
    assert plan.bucket["scores"] == 2 * 4 * 10**8, "a fifth of 2 B tokens, in float16"
    assert plan.bucket["checkpoints"] == (3 + 4 + 4) * 12 * parameters
    assert plan.bucket["exported model"] == 2 * parameters
    assert plan.bucket["policy versions"] == 3 * 2 * parameters


def test_every_role_has_its_memory_and_it_fits_where_it_ran() -> None:
    """Trainers of 4 and of 3 ranks, the sampler and both releases as teachers ran on H100s of 80 GB."""
    stages = [*valid_specs.MINIMAL["spec"]["stages"], valid_specs.RESCORED, valid_specs.ONPOLICY]
    plan = plan_of({"spec.stages": stages})
    assert [(one.step, one.role) for one in plan.memory] == [
        ("first", "train"),
        ("rescored", "train"),
        ("onpolicy", "train"),
        ("onpolicy-sampler", "sampler"),
        ("rescore", "teacher"),
        ("onpolicy-teacher", "teacher"),
        ("evaluate", "evaluate"),
    ]
    assert plan.problems == [] and all(one.total <= one.card for one in plan.memory)


@pytest.mark.parametrize("card, engines", [(30, 1), (79, 2), (139, 2)])
def test_a_samplers_gpu_is_divided_among_its_engines(card: int, engines: int) -> None:
    """The evaluation has one engine on the same card."""
    run = DistillRun.parse(valid_specs.manifest({"spec.stages": [valid_specs.ONPOLICY]}))
    plan = make_plan(run, Assumptions(H100, card * GIB, KNOWN["gpt-oss-20b"]))
    sampler, evaluation = (role for role in plan.memory if role.sequences is not None)
    assert (sampler.role, sampler.engines) == ("sampler", engines)
    assert (evaluation.role, evaluation.engines) == ("evaluate", 1)
    length = run.spec.training.sequence_length
    share, whole = SAMPLING_SHARE
    one = divide_card(STUDENTS["vpmoe-6b"], card * GIB, length, ENGINES)
    assert sampler.items["weights"] == engines * 2 * STUDENTS["vpmoe-6b"].parameters
    assert sampler.total == one.total <= card * GIB * share // whole
    assert sampler.items["cache"] == engines * one.cache
    (note,) = (one for one in plan.sources if one.startswith("onpolicy-sampler:"))
    assert f"{engines} engine{'s' * (engines > 1)} on each GPU" in note
    assert f"{one.cache / GIB:.1f} GiB of keys and values" in note
    assert f"{sampler.sequences} sequences of {length:,} tokens" in note
    head, *rows = memory_rows(plan.memory)
    column = head.index("engines")
    assert {row[1]: row[column] for row in rows} == {
        "train": "",
        "sampler": str(engines),
        "teacher": "",
        "evaluate": "1",
    }


def test_a_card_that_holds_no_engine_is_a_problem_with_its_remedy() -> None:
    plan = make_plan(
        DistillRun.parse(valid_specs.manifest({"spec.stages": [valid_specs.ONPOLICY]})),
        Assumptions(H100, 16 * GIB, KNOWN["gpt-oss-20b"]),
    )
    (problem,) = (one for one in plan.problems if "the sampler of onpolicy-sampler" in one)
    assert re.search(r"needs 1\d GiB on each of its 4 GPUs, and a GPU has 16\.0 GiB.*more memory", problem)
    assert not any(source.startswith("onpolicy-sampler:") for source in plan.sources)


@pytest.mark.parametrize(
    "card, model, engines, found",
    [
        pytest.param("large", "a", 3, 34.0, id="as-many"),
        pytest.param("large", "a", 2, 17.0, id="the-most-of-fewer"),
        pytest.param("large", "a", 4, 34.0, id="fewer-than-there-are"),
        pytest.param("other", "a", 3, 2.0, id="another-card"),
        pytest.param("large", "b", 3, None, id="another-model"),
    ],
)
def test_the_speed_of_sampling_is_that_of_as_many_engines(
    monkeypatch: pytest.MonkeyPatch, card: str, model: str, engines: int, found: float | None
) -> None:
    rows = [("small", 2.0, 1), ("large", 17.0, 1), ("large", 34.0, 3)]
    table = tuple(Measured("sample", "a", name, speed, "", "", count) for name, speed, count in rows)
    monkeypatch.setattr(throughput, "MEASURED", table)
    one = throughput.measured("sample", model, card, engines)
    assert (one and one.tokens_per_second) == found


def test_a_speed_of_fewer_engines_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"spec.stages": [valid_specs.ONPOLICY]}
    alone = Measured("sample", "vpmoe-6b", "h100-80", 3000, "", "")
    monkeypatch.setattr(throughput, "MEASURED", (alone,))
    (note,) = (one for one in plan_of(changes).sources if one.startswith("sample:"))
    assert note.endswith("; measured with 1 engine on a GPU, and here 2 share one")
    both = Measured("sample", "vpmoe-6b", "h100-80", 5000, "", "", engines=2)
    monkeypatch.setattr(throughput, "MEASURED", (alone, both))
    (note,) = (one for one in plan_of(changes).sources if one.startswith("sample:"))
    assert note.startswith("sample: 5,000 tokens/s") and "measured with" not in note


@pytest.mark.parametrize(
    "gpus, memory, wanted",
    [
        pytest.param(7, 139, MicrobatchPlan(32_768, 4, 0, 80, False), id="everything-kept"),
        pytest.param(7, 79, MicrobatchPlan(16_384, 2, 2, 80, False), id="half-the-positions"),
        pytest.param(2, 79, MicrobatchPlan(32_768, 4, 70, 80, True), id="two-ranks-of-80-gb"),
        pytest.param(2, 70, MicrobatchPlan(8192, 1, 74, 80, True), id="two-ranks-of-less"),
    ],
)
def test_the_plan_has_each_trainer_s_microbatch(gpus: int, memory: int, wanted: MicrobatchPlan) -> None:
    run = DistillRun.parse(valid_specs.manifest({"spec.student.gpus": gpus}))
    plan = make_plan(run, Assumptions(H100, memory * GIB, None))
    assert [one.microbatch for one in plan.memory if one.role == "train"] == [wanted]
    assert all(one.microbatch is None for one in plan.memory if one.role != "train")
    kept = "sharded" if wanted.sharded_gradients else "whole"
    row = f"{wanted.positions:,} {wanted.sequences} {wanted.recomputed_layers} of 80 {kept}"
    assert f"first {row}" in [" ".join(line.split()) for line in plan_text(plan).splitlines()]


@pytest.mark.parametrize("card, problems", [(72, 1), (73, 0), (79, 0), (139, 0)])
def test_the_large_release_fits_beside_a_teacherforced_stage_as_it_is_stored(
    card: int, problems: int
) -> None:
    """60.8 GiB in MXFP4, without 1.1 GiB of output matrix, in nine tenths of the card."""
    run = DistillRun.parse(valid_specs.manifest({"spec.stages": [valid_specs.FORCED]}))
    plan = make_plan(run, Assumptions(H100, card * GIB, KNOWN["gpt-oss-120b"]))
    teacher = [problem for problem in plan.problems if problem.startswith("spec.teacher")]
    assert len(teacher) == problems
    for problem in teacher:
        assert problem == (
            f"spec.teacher.model: gpt-oss-120b needs GPUs of 73 GiB, and a GPU has {card}.0 GiB "
            "(spec.runtime.gpuMemory): step forced holds the whole teacher in vLLM beside its students on "
            "each of its GPUs (59.7 GiB of weights, 2.9 GiB of output matrix and answers). Either use a "
            "smaller teacher, or its release in MXFP4, or raise spec.teacher.gpus, so that each has fewer "
            "students, or use GPUs with more memory."
        )


@pytest.mark.parametrize("teachers, fits", [(1, False), (2, True)])
def test_answers_for_many_students_need_more_teachers(teachers: int, fits: bool) -> None:
    """Three copies of 63 × 8,192 hidden states of 2,880 numbers, 8.9 GB, and 1.2 GB of output matrix, in a
    tenth of the card."""
    changes = {
        "spec.stages": [valid_specs.FORCED],
        "spec.student": {"gpus": 63, "gpusPerPod": 7},
        "spec.training.globalBatchTokens": "1M",
        "spec.teacher.gpus": teachers,
    }
    problems = plan_of(changes, teacher="gpt-oss-20b").problems
    assert len(problems) == (not fits)
    assert all("9.4 GiB of output matrix and answers)" in one for one in problems)
    assert all("or raise spec.teacher.gpus, so that each has fewer students" in one for one in problems)


@pytest.mark.parametrize(
    "gpus, teacher, student, best",
    [
        pytest.param(8, 70_000, 11_300, [(1, 7), (2, 6), (3, 5), (4, 4)], id="one-teacher-is-enough"),
        pytest.param(8, 30_000, 11_300, [(2, 6), (3, 5), (4, 4), (1, 7)], id="two"),
        pytest.param(16, 66_000, 5950, [(2, 14), (3, 13)], id="sixteen"),
        pytest.param(4, 1, 1, [(2, 2), (1, 3)], id="equal-speeds"),
        pytest.param(9, 10, 1e9, [(4, 5), (3, 6), (2, 7), (1, 8)], id="every-teacher-has-a-student"),
        pytest.param(2, 1, 1e9, [(1, 1)], id="two-gpus"),
    ],
)
def test_the_split_with_the_most_tokens_comes_first(
    gpus: int, teacher: float, student: float, best: list[tuple[int, int]]
) -> None:
    found = splits(gpus, teacher, student)
    assert found[: len(best)] == best and len(found) == gpus // 2


@pytest.mark.parametrize(
    "changes, card, split",
    [
        pytest.param({"spec.student.gpus": 7}, 79, (3, 5), id="any"),
        pytest.param({"spec.student": {"gpus": 4, "expertParallel": 4}}, 79, None, id="experts"),
        pytest.param(
            {"spec.student": {"gpus": 8, "expertParallel": 4}, "spec.teacher.gpus": 4},
            79,
            None,
            id="experts-on-eight",
        ),
        pytest.param({"spec.student": {"gpus": 8, "gpusPerPod": 4}}, 79, None, id="pods-of-four"),
        pytest.param({"spec.student": {"gpus": 8, "gpusPerPod": 2}}, 79, (3, 6), id="pods-of-two"),
        pytest.param({"spec.student.gpus": 3}, 69, None, id="two-ranks-have-too-little-memory"),
        pytest.param({"spec.student.gpus": 3}, 79, (2, 2), id="two-ranks-have-enough"),
        pytest.param(
            {"spec.student": {"gpus": 4}, "spec.teacher.gpus": 3, "spec.training.globalBatchTokens": "32768"},
            79,
            None,
            id="the-batch-is-four-sequences",
        ),
    ],
)
def test_only_a_split_that_the_api_server_accepts_is_proposed(
    changes: dict[str, Any], card: int, split: tuple[int, int] | None
) -> None:
    run = DistillRun.parse(valid_specs.manifest(changes | {"spec.stages": [valid_specs.FORCED]}))
    speeds: dict[Work, float] = {"train": 11_300, "hidden": 20_000}
    plan = make_plan(run, Assumptions(H100, card * GIB, KNOWN["gpt-oss-20b"], speeds=speeds))
    (note,) = (one for one in plan.sources if one.startswith("forced: the students"))
    assert ("no other split" in note) == (split is None)
    if split is not None:
        teacher, student = split
        assert f" {teacher} for the teacher and {student} for the student make" in note
        proposed = {"spec.teacher.gpus": teacher, "spec.student.gpus": student}
        if "spec.student" in changes:
            proposed = {
                "spec.teacher.gpus": teacher,
                "spec.student": changes["spec.student"] | {"gpus": student},
            }
        memory_field = {"spec.runtime.gpuMemory": f"{card}Gi", "spec.stages": [valid_specs.FORCED]}
        DistillRun.parse(valid_specs.manifest(changes | memory_field | proposed))


def test_the_slower_of_teacher_and_students_decides_a_teacherforced_stage() -> None:
    """Seven students of 11,300 tokens/s, and one teacher or three of 20,000."""
    changes = {"spec.stages": [valid_specs.FORCED], "spec.student.gpus": 7}
    speeds = {"train": 11_300, "hidden": 20_000}
    one = plan_of(changes, speeds=speeds)
    step = next(step for step in one.steps if step.step == "forced")
    assert step.slowest == "teacher" and step.gpus == {"train": 7, "teacher": 1}
    assert step.busy == {"train": pytest.approx(20_000 / 79_100), "teacher": 1}
    assert step.tokens is not None
    assert step.hours == pytest.approx(step.tokens / 20_000 / 3600 + step.pause_hours)
    assert "train 25 %, teacher 100 %" in plan_text(one)
    assert (
        "forced: the students are busy for 25 % of the time. Of 8 GPUs, 3 for the teacher and 5 for the "
        "student make the most tokens: 56,500 a second, not 20,000 (teacher.gpus, student.gpus)"
        in one.sources
    )
    changes["spec.teacher"] = {"model": "s3://models/teacher", "gpus": 3}
    changes["spec.student.gpus"] = 5
    best = plan_of(changes, speeds=speeds)
    step = next(step for step in best.steps if step.step == "forced")
    assert step.slowest == "train" and step.gpus == {"train": 5, "teacher": 3}
    assert step.busy == {"train": 1, "teacher": pytest.approx(56_500 / 60_000)}
    assert any(
        source.startswith("forced: the students are busy for 100 % of the time; no other split of 8 GPUs")
        for source in best.sources
    )


@pytest.mark.parametrize(
    "speeds",
    [
        pytest.param({"train": 11_000, "sample": 50_000, "score": 60_000}, id="slow-training"),
        pytest.param({"train": 60_000, "sample": 50_000, "score": 60_000}, id="all-alike"),
        pytest.param({"train": 60_000, "sample": 5_000, "score": 60_000}, id="one-gpu-holds-no-training"),
        pytest.param({"train": 60_000, "sample": 50_000, "score": 6_000}, id="slow-teacher"),
    ],
)
def test_an_onpolicy_stage_s_best_division_of_gpus_is_named(speeds: dict[Work, float]) -> None:
    """It has the least hours of all divisions that the API server accepts, each planned by itself, and its
    plan names no other."""
    stage = valid_specs.ONPOLICY | {"tokens": "1B"}
    here = plan_of({"spec.stages": [stage]}, speeds=speeds)
    (note,) = (one for one in here.sources if one.startswith("onpolicy: ") and " GPUs" in one)
    plans = {}
    for teacher, sampler in product(range(1, 7), range(1, 7)):
        changes = {
            "spec.teacher.gpus": teacher,
            "spec.student.gpus": 8 - teacher,
            "spec.stages": [stage | {"sampler": {"gpus": sampler}}],
            "spec.runtime.gpuMemory": "79Gi",
        }
        try:
            plans[teacher, sampler] = plan_of(changes, speeds=speeds)
        except Invalid:
            continue  # as with less than one GPU to train

    def hours(plan: Plan) -> float:
        step = next(step for step in plan.steps if step.step == "onpolicy")
        assert step.hours is not None
        return step.hours - step.pause_hours

    best = min(plans, key=lambda roles: hours(plans[roles]))
    teacher, sampler = best
    assert len(plans) == 15, "two GPUs at least hold the trainer"
    assert note == (
        f"onpolicy: {teacher} of 8 GPUs for the teacher, {sampler} to sample and {8 - teacher - sampler} to "
        f"train take the least time: {hours(plans[best]):.1f} hours without pauses, not {hours(here):.1f} "
        "(teacher.gpus, student.gpus, stages[].sampler.gpus)"
    )
    assert "onpolicy: no other division of 8 GPUs takes less time" in plans[best].sources


@pytest.mark.parametrize(
    "volume, way",
    [
        (None, "in the bucket after 22.1 s and 22.1 s later in the engines"),
        (
            {"claimName": "weights"},
            "on the volume after 2.74 s and 2.67 s later in the engines; it is in the bucket after 22.1 s",
        ),
    ],
)
def test_the_way_of_a_policy_version_is_named(volume: dict[str, str] | None, way: str) -> None:
    """12.06 GB, at the measured and assumed rates of docs/benchmarks.md."""
    speeds: dict[Work, float] = {"train": 60_000, "sample": 50_000, "score": 60_000}
    plan = plan_of(
        {"spec.stages": [valid_specs.ONPOLICY], "spec.runtime.weightsVolume": volume}, speeds=speeds
    )
    assert (
        "onpolicy: simulated, because its roles wait for each other. Training waits 0.92 s for a policy "
        f"version, which is {way}" in plan.sources
    )


def test_a_trainer_that_waits_too_long_for_back_pressure_is_named() -> None:
    speeds: dict[Work, float] = {"train": 60_000, "sample": 5_000, "score": 60_000}
    for waiting, named in ((0.5, True), (1.0, False)):
        stage = valid_specs.ONPOLICY | {"backPressure": {"waiting": waiting, "windows": 20}}
        plan = plan_of({"spec.stages": [stage]}, speeds=speeds)
        (step,) = [step for step in plan.steps if step.step == "onpolicy"]
        assert step.tokens_per_second and step.train_tokens_per_second and step.upload_share is not None
        steps = step.tokens_per_second / step.train_tokens_per_second
        copies = step.busy["train"] - steps
        waits = 1 - steps / (1 - copies - step.upload_share)
        text = (
            f"onpolicy: the trainer waits for windows for {100 * waits:.0f} % of its steps' time, more than "
            "backPressure.waiting 0.5: after 20 windows completions are shortened, which is not simulated"
        )
        assert waits > 0.5 and (text in plan.sources) == named


def test_a_trainer_that_waits_for_uploads_is_named() -> None:
    """For an upload and for nothing else, as other roles are fast: that is no reason for back-pressure."""
    stage = valid_specs.ONPOLICY | {"backPressure": {"waiting": 0.1}, "staleness": 4, "publishEvery": 1}
    for disk_speed, train, named in ((1e8, 10**6, True), (1e11, 20_000, False)):
        speeds: dict[Work, float] = {"train": train, "sample": 10**7, "score": 10**7}
        plan = plan_of({"spec.stages": [stage]}, speeds=speeds, disk_speed=disk_speed)
        (step,) = [step for step in plan.steps if step.step == "onpolicy"]
        assert step.upload_share is not None and (step.upload_share > 0.5) == named
        text = f"onpolicy: the trainer waits for {100 * step.upload_share:.0f} % of the time until the bucket"
        assert any(source.startswith(text) for source in plan.sources) == named
        assert not any("waits for windows" in source for source in plan.sources)
        assert step.copy_seconds == pytest.approx(0.92, rel=1e-3)
        assert step.tokens_per_second is not None and step.train_tokens_per_second is not None
        assert step.train_tokens_per_second > step.tokens_per_second / step.busy["train"]


def test_the_steps_alone_are_those_of_the_plan() -> None:
    run = DistillRun.parse(valid_specs.manifest({"spec.stages": [valid_specs.ONPOLICY]}))
    assumed = Assumptions(H100, H100.memory, KNOWN["gpt-oss-20b"])
    assert plan_steps(run, assumed) == make_plan(run, assumed).steps


def test_hidden_states_that_were_not_measured_are_as_fast_as_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scoring is the same forward, and the logits after it."""
    known = tuple(one for one in MEASURED if one.work != "hidden")
    monkeypatch.setattr("vpmoe.plan.throughput.MEASURED", known)
    plan = plan_of({"spec.stages": [valid_specs.FORCED]}, teacher="gpt-oss-120b", speeds={"score": 40_000})
    step = next(step for step in plan.steps if step.step == "forced")
    assert step.slowest == "train" or step.tokens_per_second is not None
    assert any(source.startswith("hidden: at least as fast as score") for source in plan.sources)


def test_a_teacher_too_large_for_vllm_is_refused_in_every_step_that_uses_it() -> None:
    plan = make_plan(
        DistillRun.parse(valid_specs.manifest({"spec.stages": [valid_specs.RESCORED, valid_specs.ONPOLICY]})),
        Assumptions(H100, 48 * GIB, KNOWN["gpt-oss-120b"]),
    )
    teacher = [problem for problem in plan.problems if problem.startswith("spec.teacher.model")]
    assert len(teacher) == 2 and "step rescore holds" in teacher[0] and "onpolicy-teacher" in teacher[1]


@pytest.mark.parametrize("gpus", [3, 4, 17, 18, 64, 90])
@pytest.mark.parametrize(
    "seconds",
    [
        pytest.param((3.0, 5.0, 2.0), id="some"),
        pytest.param((1.0, 1.0, 1.0), id="equal"),
        pytest.param((4.0, 8.0, 2.0), id="ties"),
        pytest.param((1e-9, 1e3, 1e-9), id="one-alone"),
        pytest.param((0.17, 0.01, 33.3), id="unlike"),
    ],
)
def test_of_many_divisions_the_best_are_made(gpus: int, seconds: tuple[float, float, float]) -> None:
    """The same, in the same order, as if all were sorted; those of the largest run are 13 million."""
    work = dict(zip(("teacher", "sampler", "train"), seconds, strict=True))
    ways = [
        {"teacher": teacher, "sampler": sampler, "train": gpus - teacher - sampler}
        for teacher in range(1, gpus - 1)
        for sampler in range(1, gpus - teacher)
    ]
    slowest = sorted(ways, key=lambda way: max(work[role] / way[role] for role in work))
    assert divisions(gpus, work) == slowest[:DIVISIONS]
    assert len(divisions(5120, work)) == DIVISIONS


def test_the_divisions_of_all_stages_share_the_windows_that_are_simulated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """120 of a run of 17 GPUs, or fewer."""
    simulated: list[str] = []

    def counted(spec: Spec, stage: OnPolicy, *others: Any) -> StageTime:
        simulated.append(stage.name)
        return stage_time(spec, stage, *others)

    monkeypatch.setattr("vpmoe.plan.plan.stage_time", counted)
    stages = [valid_specs.ONPOLICY | {"name": name, "tokens": 10**15} for name in ("one", "two")]
    changes = {"spec.stages": stages, "spec.student.gpus": 16, "spec.training.globalBatchTokens": "1M"}
    speeds: dict[Work, float] = {"train": 1e9, "sample": 1e9, "score": 1e9}  # only waits take time
    plan_of(changes, speeds=speeds)
    assert simulated.count("one") > 100
    simulated.clear()
    windows = sum(BATCHES) * 2
    monkeypatch.setattr("vpmoe.plan.plan.SIMULATED", 2 * 10 * windows)
    plan_of(changes, speeds=speeds)
    assert simulated.count("one") == simulated.count("two") <= 2 + 10


@pytest.mark.parametrize(
    "gpus, speed, changes, note",
    [
        pytest.param(17, 1e9, {}, "no other division of 17 GPUs takes less time", id="all"),
        pytest.param(20, 1e9, {}, "no other division of 20 GPUs takes less time, of 128 compared", id="some"),
        pytest.param(
            20,
            1.5e5,
            {},
            "2 of 20 GPUs for the teacher, 7 to sample and 11 to train take the least time, of 128 "
            "compared: ",
            id="the-best-of-some",
        ),
        pytest.param(
            18,
            1e4,
            {},
            "3 of 18 GPUs for the teacher, 9 to sample and 6 to train take the least time: ",
            id="the-others-take-longer",
        ),
        pytest.param(
            73,
            1e4,
            {
                "spec.student.expertParallel": 64,
                "spec.stages": [valid_specs.ONPOLICY | {"sampler": {"gpus": 8}}],
            },
            "no other division of 73 GPUs was compared",
            id="none",
        ),
    ],
)
def test_a_plan_says_how_many_divisions_were_compared(
    gpus: int, speed: float, changes: dict[str, Any], note: str
) -> None:
    """Unless they are all, or those that are left take longer even without waits."""
    changes = {"spec.stages": [valid_specs.ONPOLICY], "spec.student.gpus": gpus - 1} | changes
    speeds: dict[Work, float] = {"train": speed, "sample": speed, "score": speed}
    found = plan_of(changes, speeds=speeds).sources[-1].removeprefix("onpolicy: ")
    assert found.startswith(note) if note.endswith(": ") else found == note


def test_numbers_of_the_largest_runs_have_three_digits_or_separators() -> None:
    plan = plan_of(
        {
            "spec.teacher.gpus": 1024,
            "spec.student.gpus": 2048,
            "spec.training.globalBatchTokens": "64M",
            "spec.stages": [
                valid_specs.RESCORED | {"tokens": 829_561_045_245_900},
                valid_specs.FORCED | {"tokens": 10**15},
            ],
        },
        speeds={"train": 5.0, "score": 0.4, "hidden": 50_000},
        dataset_tokens=1_234_567_891_234,
        disk_speed=1e7,
    )
    shown = [" ".join(line.split()) for line in plan_text(plan).splitlines()]
    assert " hours and " in shown[0] and " GPU hours on 3,072 GPUs of " in shown[0]
    for row in (
        "preprocess 1.23T none 37.6M preprocess",
        "rescored 830T 2,048 train 10.2k train",
        "forced 1,000T 2,048 train + 1,024 teacher 10.2k train",
        "forced train 2,048",
        "- score: 0.4 tokens/s a GPU, given",
    ):
        assert any(line.startswith(row) for line in shown), row
    assert not re.search(r"[0-9]{4}(?!-[0-9]{2}-)", plan_text(plan)), "a number without separators"


def test_what_is_not_known_is_said_to_be() -> None:
    plan = plan_of({"spec.student.shape": "tiny", "spec.student.gpus": 1, "spec.teacher.gpus": 0})
    shown = plan_text(plan)
    assert shown.startswith("minimal: hours not known, on 1 GPU of 79.0 GiB") and "\nall known  " in shown
    plan = plan_of({"spec.dataset.workers": 1}, dataset_tokens=10**4)
    assert "\ndataset         <0.001" in plan_text(plan) and "\nall  " in plan_text(plan)
    assert "preprocess: 1 worker (dataset.workers) that uses 1 CPU" in plan.sources


@pytest.mark.parametrize(
    "speed, way",
    [
        (1e9, "in the bucket after 22.1 s and 22.1 s later in the engines"),
        (1e7, "in the bucket after 1,220 s and 1,220 s later in the engines"),
    ],
)
def test_seconds_are_printed_with_three_digits(speed: float, way: str) -> None:
    speeds: dict[Work, float] = {"train": 60_000, "sample": 50_000, "score": 60_000}
    plan = plan_of({"spec.stages": [valid_specs.ONPOLICY]}, speeds=speeds, disk_speed=speed)
    assert any(one.endswith(way) for one in plan.sources)


def test_speeds_are_those_of_the_benchmarks_page() -> None:
    """Each figure, with its unit, is on the page that describes how it was measured."""
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    for one in MEASURED:
        text = f"{one.tokens_per_second:,.0f}"
        assert text in page, one


def test_the_examples_fit() -> None:
    for path in sorted(EXAMPLES.glob("*.yaml")):
        run = load_run(path)
        plan = make_plan(run, Assumptions(H100, H100.memory, known_teacher(run.spec.teacher.model)))
        assert plan.problems == [], path
