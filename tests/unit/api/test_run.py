"""DistillRun: parsing, defaults, errors with the remedy, steps, and the configuration hash."""

import json
import pickle
import re
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes import invalid_specs, valid_specs
from vpmoe.api import DistillRun, Invalid, OnPolicy, Rescored, load_run
from vpmoe.api.run import NEWER_TRAINING, STEP_NAME, needs_gpus
from vpmoe.api.runtime import RuntimeSpec
from vpmoe.api.text import read_yaml, write_yaml

EXAMPLES = Path(__file__).parents[3] / "manifests" / "examples"
FULL = EXAMPLES / "full.yaml"
CONTRACT = Path(__file__).parents[2] / "fakes" / "contract.yaml"
"""The fields and spellings that stay valid in every version: fields may be added, none of these renamed."""
SHA256 = re.compile(r"[0-9a-f]{64}")
MINIMAL_HASH = "c88ee2a5caa3759b3726571f7dcf3fc4da17f70e0ad43b9c53b27c91a1139f26"
"""Hash of valid_specs.MINIMAL before spec.export existed, at commit d3a952b."""


def load_text(text: str, folder: Path) -> DistillRun:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_run(path)


@pytest.mark.parametrize(
    "changes", [pytest.param(changes, id=name) for name, changes in valid_specs.VALID.items()]
)
def test_a_valid_run_is_accepted(changes: dict[str, Any]) -> None:
    DistillRun.parse(valid_specs.manifest(changes))


@pytest.mark.parametrize("bad", [pytest.param(bad, id=name) for name, bad in invalid_specs.INVALID.items()])
def test_an_invalid_run_is_rejected_with_the_field_and_the_remedy(bad: invalid_specs.InvalidSpec) -> None:
    with pytest.raises(Invalid) as caught:
        DistillRun.parse(valid_specs.manifest(bad.changes))
    assert any(line.startswith(f"{bad.field}: ") and bad.message in line for line in caught.value.problems), (
        caught.value.problems
    )
    assert len(caught.value.problems) == 1, caught.value.problems


def test_all_problems_are_reported_with_their_fields() -> None:
    changes = {
        "spec.student.gpus": 0,
        "spec.training.optimizer": {"weightDecay": 2},
        "spec.stages.0.tokens": "x",
        "spec.typo": 1,
    }
    with pytest.raises(Invalid) as caught:
        DistillRun.parse(valid_specs.manifest(changes))
    assert [line.partition(":")[0] for line in caught.value.problems] == [
        "spec.student.gpus",
        "spec.training.optimizer.weightDecay",
        "spec.stages[0].tokens",
        "spec.typo",
    ]


@pytest.mark.parametrize(
    "changes, problem",
    [
        pytest.param({"apiVersion": "v1"}, 'apiVersion: "v1" must be vpmoe.dev/v1alpha1', id="another API"),
        pytest.param({"kind": "Job"}, 'kind: "Job" must be DistillRun', id="another kind"),
        pytest.param({"metadata": valid_specs.DROP}, "metadata: is required", id="no metadata"),
        pytest.param({"spec": None}, "spec: null must be a mapping", id="null spec"),
        pytest.param({"spec.stages": {}}, "spec.stages: a mapping must be a list", id="stages by name"),
        pytest.param(
            {"spec.stages.0": {**valid_specs.ONPOLICY, "require": None}},
            "spec.stages[0].require: null must be a mapping",
            id="null gate",
        ),
        pytest.param(
            {"spec.stages.0": "Vanilla"},
            'spec.stages[0]: "Vanilla" must be a mapping',
            id="a stage as text",
        ),
        pytest.param(
            {"spec.stages.0.optimizer": 1},
            "spec.stages[0].optimizer: 1 must be a mapping",
            id="a number for an optimizer",
        ),
        pytest.param(
            {"spec.dataset.conversation.date": date(2026, 1, 1)},
            "spec.dataset.conversation.date: 2026-01-01 must be a string: quote it",
            id="a date that is not text",
        ),
        pytest.param(
            {"spec.storage.prefix": "a\ud800"},
            "spec.storage.prefix: has \\ud800, half of a character. "
            "Write the character itself, or both halves.",
            id="a text that UTF-8 has not",
        ),
        pytest.param(
            {"spec.training.optimizer.weightDecay": float("nan")},
            "spec.training.optimizer.weightDecay: nan must be a number",
            id="nan",
        ),
        pytest.param(
            {"spec.stages.0.optimizer": {"learningRate": -1}},
            "spec.stages[0].optimizer.learningRate: -1 must be more than 0",
            id="a negative learning rate",
        ),
    ],
)
def test_errors_that_an_api_server_would_have_rejected_are_reported(
    changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(Invalid) as caught:
        DistillRun.parse(valid_specs.manifest(changes))
    assert caught.value.problems == (problem,)


def test_a_malformed_object_is_the_only_problem_reported() -> None:
    with pytest.raises(Invalid) as caught:
        DistillRun.parse(valid_specs.manifest({"spec.training": 3}))
    assert caught.value.problems == ("spec.training: 3 must be a mapping",)


def test_validity_is_measured_on_a_gpu_of_the_teacher_beside_a_stage_that_needs_it_to_stop() -> None:
    kinds = ["Vanilla", "Rescored", "TeacherForced", "OnPolicy"]
    stages = [
        {
            "name": kind.lower(),
            "kind": kind,
            "tokens": 1000,
            "stop": {"minValidity": 0 if kind == "TeacherForced" else 0.5},
            **REQUIRED_OF_KIND.get(kind, {}),
        }
        for kind in kinds
    ]
    run = DistillRun.parse(valid_specs.manifest({"spec.stages": stages}))
    assert [step for step in run.steps() if step.endswith("-validity")] == [
        "vanilla-validity",
        "rescored-validity",
    ], "a teacher runs beside the others, and OnPolicy measures its own rollouts"
    assert run.role("vanilla-validity") == "evaluate"
    assert run.needs("vanilla-validity") == ("preprocess", "rescore"), "rescoring has the GPUs until it ends"
    assert run.needs("vanilla") == ("preprocess",), "the stage does not wait for it"
    assert run.needs("rescored-validity") == run.needs("rescored") == ("vanilla-evaluate", "rescore")
    assert run.needs("vanilla-evaluate") == ("vanilla-validity", "vanilla")
    beside = [step for step in run.steps() if run.serves_trainer(step)]
    assert beside == ["vanilla-validity", "rescored-validity", "onpolicy-sampler", "onpolicy-teacher"]
    stages[0]["stop"] = {"minValidity": 0}
    alone = {"spec.stages": stages[:1]}
    assert "vanilla-validity" not in DistillRun.parse(valid_specs.manifest(alone)).steps()


@pytest.mark.parametrize("path", [*sorted(EXAMPLES.glob("*.yaml")), CONTRACT], ids=lambda path: path.stem)
def test_an_example_is_a_valid_run(path: Path) -> None:
    load_run(path)


def test_the_contract_requires_validity_of_a_stage_that_does_not_sample() -> None:
    first = load_run(CONTRACT).spec.stages[0]
    assert not first.samples and first.stop is not None and first.stop.min_validity == 0.95


def test_the_full_example_has_every_field() -> None:
    def fields(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: fields(inner) for key, inner in value.items()}
        return (
            [fields(inner) for inner in value]
            if isinstance(value, list) and value and isinstance(value[0], dict)
            else None
        )

    spec = load_run(FULL).spec.model_dump(mode="json", by_alias=True)
    given = fields(read_yaml(FULL.read_text(encoding="utf-8"))["spec"])
    defaults_of_kind = {stage["kind"]: fields(stage) for stage in spec["stages"]}
    assert set(given) == set(spec)
    for part in ("dataset", "teacher", "student", "training", "evaluation", "storage", "runtime"):
        assert set(given[part]) == set(spec[part]), part
    stage_only = {"name", "kind", "tokens", "stop", "optimizer"}
    for stage in given["stages"]:
        kind = next(
            kind
            for kind, all_fields in defaults_of_kind.items()
            if set(stage) - stage_only == set(all_fields) - stage_only
        )
        assert defaults_of_kind.pop(kind)
    assert not defaults_of_kind


def test_the_defaults_of_all_kinds_of_stages() -> None:
    run = DistillRun.parse(valid_specs.manifest(valid_specs.VALID["stages of all kinds"]))
    vanilla, rescored, forced, onpolicy = run.spec.stages
    assert (run.spec.teacher.gpus, run.spec.student.gpus) == (1, 7)
    assert [stage.tokens for stage in run.spec.stages] == [10**9, 2 * 10**9, 665 * 10**6, 8 * 10**9]
    assert isinstance(rescored, Rescored) and isinstance(onpolicy, OnPolicy)
    assert (rescored.subset.tokens, rescored.mix, rescored.confidence.min, rescored.confidence.max) == (
        10**9,
        0.65,
        0.25,
        4.0,
    )
    assert [(p.share, p.rollouts_per_prompt, p.rollouts_per_prompt_at_end) for p in onpolicy.curriculum] == [
        (0.3, 1, None),
        (0.4, 1, 2),
        (0.3, 2, None),
    ]
    assert [stage.optimizer.learning_rate for stage in (vanilla, rescored, forced, onpolicy)] == [
        3e-4,
        3e-4,
        3e-4,
        2e-5,
    ]
    assert run.steps() == (
        "preprocess",
        "rescore",
        "first",
        "first-evaluate",
        "first-report",
        "rescored",
        "rescored-evaluate",
        "rescored-report",
        "forced",
        "forced-evaluate",
        "forced-report",
        "onpolicy-sampler",
        "onpolicy-teacher",
        "onpolicy",
        "onpolicy-evaluate",
        "onpolicy-export",
        "onpolicy-report",
    )
    assert run.stage("forced") is forced


NOT_EVALUATED = {"completions": 0}
UPCYCLED = "upcycled"
"""Stands beside the kinds of stages for a run whose student begins with a dense model."""
REQUIRED_OF_KIND = {"OnPolicy": {"require": {"validity": 0}}}


@pytest.mark.parametrize(
    "kinds, evaluation, needs",
    [
        pytest.param(
            ["Vanilla", "Vanilla"],
            NOT_EVALUATED,
            {"preprocess": [], "s0": ["preprocess"], "s1": ["s0"]},
            id="no scores, no rescoring",
        ),
        pytest.param(
            ["Vanilla", "Vanilla", "Rescored", "Vanilla"],
            NOT_EVALUATED,
            {
                "preprocess": [],
                "rescore": ["preprocess"],
                "s0": ["preprocess"],
                "s1": ["s0"],
                "s2": ["s1", "rescore"],
                "s3": ["s2"],
            },
            id="rescoring beside Vanilla",
        ),
        pytest.param(
            ["TeacherForced", "Rescored", "OnPolicy"],
            NOT_EVALUATED,
            {
                "preprocess": [],
                "rescore": ["preprocess"],
                "s0": ["preprocess", "rescore"],
                "s1": ["s0", "rescore"],
                "s2-sampler": ["s1", "rescore"],
                "s2-teacher": ["s1", "rescore"],
                "s2": ["s1", "rescore"],
            },
            id="stages that use the teacher's GPUs",
        ),
        pytest.param(
            ["Vanilla", "TeacherForced"],
            NOT_EVALUATED,
            {"preprocess": [], "s0": ["preprocess"], "s1": ["s0"]},
            id="a teacher without scores",
        ),
        pytest.param(
            ["OnPolicy", "Vanilla"],
            NOT_EVALUATED,
            {
                "preprocess": [],
                "s0-sampler": ["preprocess"],
                "s0-teacher": ["preprocess"],
                "s0": ["preprocess"],
                "s1": ["s0-sampler", "s0-teacher", "s0"],
            },
            id="all steps of an on-policy stage",
        ),
        pytest.param(
            ["Rescored", "OnPolicy", "OnPolicy"],
            {"completions": 8},
            {
                "preprocess": [],
                "rescore": ["preprocess"],
                "s0": ["preprocess", "rescore"],
                "s0-evaluate": ["s0"],
                "s1-sampler": ["s0-evaluate", "rescore"],
                "s1-teacher": ["s0-evaluate", "rescore"],
                "s1": ["s0-evaluate", "rescore"],
                "s1-evaluate": ["s1-sampler", "s1-teacher", "s1"],
                "s2-sampler": ["s1-evaluate", "rescore"],
                "s2-teacher": ["s1-evaluate", "rescore"],
                "s2": ["s1-evaluate", "rescore"],
                "s2-evaluate": ["s2-sampler", "s2-teacher", "s2"],
            },
            id="evaluations",
        ),
        pytest.param(
            ["Vanilla"],
            {"completions": 0, "canary": "s3://corpora/canary.txt"},
            {"preprocess": [], "s0": ["preprocess"], "s0-evaluate": ["s0"]},
            id="a canary is a reason to evaluate",
        ),
        pytest.param(
            ["Vanilla", "Rescored", UPCYCLED],
            NOT_EVALUATED,
            {
                "init": [],
                "preprocess": [],
                "rescore": ["preprocess"],
                "s0": ["init", "preprocess"],
                "s1": ["s0", "rescore"],
            },
            id="initial weights beside preprocessing",
        ),
        pytest.param(
            ["OnPolicy", UPCYCLED],
            NOT_EVALUATED,
            {
                "init": [],
                "preprocess": [],
                "s0-sampler": ["init", "preprocess"],
                "s0-teacher": ["init", "preprocess"],
                "s0": ["init", "preprocess"],
            },
            id="initial weights before all steps of an on-policy stage",
        ),
    ],
)
def test_a_step_needs_the_stage_before_its_scores_and_the_teachers_gpus(
    kinds: list[str], evaluation: dict[str, Any], needs: dict[str, list[str]]
) -> None:
    init = {"upcycle": {"model": "s3://models/dense"}} if UPCYCLED in kinds else None
    stages = [
        {"name": f"s{i}", "kind": kind, "tokens": 1000, **REQUIRED_OF_KIND.get(kind, {})}
        for i, kind in enumerate(kinds)
        if kind != UPCYCLED
    ]
    changes = {
        "spec.stages": stages,
        "spec.evaluation": evaluation,
        "spec.export": {"stages": []},
        "spec.runtime": {"report": False},
        "spec.student.init": init,
    }
    run = DistillRun.parse(valid_specs.manifest(changes))
    assert run.steps() == tuple(needs)
    assert {step: list(run.needs(step)) for step in run.steps()} == needs


@pytest.mark.parametrize(
    "export, evaluation, exports",
    [
        pytest.param({}, {}, {"s2-export": ("s2-evaluate",)}, id="by default the last stage"),
        pytest.param({"spec.export": {}}, {}, {"s2-export": ("s2-evaluate",)}, id="without stages the same"),
        pytest.param({"spec.export": {"stages": []}}, {}, {}, id="none"),
        pytest.param(
            {"spec.export": {"stages": ["s2", "s0"]}},
            NOT_EVALUATED,
            dict.fromkeys(("s0-export", "s2-export"), ("s2-sampler", "s2-teacher", "s2")),
            id="two, in the order of the stages",
        ),
    ],
)
def test_exports_are_the_last_steps_and_need_all_others(
    export: dict[str, Any], evaluation: dict[str, Any], exports: dict[str, tuple[str, ...]]
) -> None:
    kinds = ("Vanilla", "Rescored", "OnPolicy")
    stages = [
        {"name": f"s{i}", "kind": kind, "tokens": 1000, **REQUIRED_OF_KIND.get(kind, {})}
        for i, kind in enumerate(kinds)
    ]
    changes = {"spec.stages": stages, "spec.evaluation": evaluation, **export}
    without_reports = {"spec.runtime": {"report": False}}
    run = DistillRun.parse(valid_specs.manifest(changes | without_reports))
    steps = run.steps()
    assert steps[len(steps) - len(exports) :] == tuple(exports)
    assert {step: run.needs(step) for step in exports} == exports
    assert [step for step in steps if run.role(step) == "export"] == list(exports)
    for step in steps:
        assert needs_gpus(step) is (run.role(step) not in ("preprocess", "export"))
        if step not in exports:
            assert not {*run.needs(step)} & {*exports}, "nothing waits for an export"
    reported = DistillRun.parse(valid_specs.manifest(changes))
    reports = {step: reported.needs(step) for step in reported.steps() if reported.role(step) == "report"}
    assert tuple(step for step in reported.steps() if step not in reports) == steps
    assert reports == {
        "s0-report": run.steps_of(run.stage("s0"))[-1:],
        "s1-report": run.steps_of(run.stage("s1"))[-1:],
        "s2-report": tuple(exports) or ("s2-evaluate",),
    }
    for step in reported.steps():
        assert not {*reported.needs(step)} & {*reports}, "nothing waits for a report"
        assert step not in reports or not needs_gpus(step)


def test_the_default_of_export_changes_neither_the_configuration_nor_its_hash() -> None:
    """So runs that were started before there was an export go on: by hand, also in the same folder."""
    absent, explicit, none = (
        DistillRun.parse(valid_specs.manifest(export))
        for export in ({}, {"spec.export": {"stages": ["first"]}}, {"spec.export": {"stages": []}})
    )
    assert absent.spec.export.stages == ("first",)
    assert "export" not in absent.config()["spec"]
    assert absent.config_hash == explicit.config_hash == MINIMAL_HASH
    assert none.config()["spec"]["export"] == {"stages": []} and none.config_hash != MINIMAL_HASH
    for run in (absent, none):
        assert DistillRun.parse(run.document()).spec == run.spec


def test_the_defaults_of_newer_fields_of_training_are_not_in_the_configuration() -> None:
    """So runs that were started before there were these fields keep their hash, as above."""
    absent, explicit, other = (
        DistillRun.parse(valid_specs.manifest(changes))
        for changes in (
            {},
            {"spec.training.maxCollapsedSteps": 1000},
            {"spec.training.maxCollapsedSteps": 0},
        )
    )
    assert not {*NEWER_TRAINING} & {*absent.config()["spec"]["training"]}
    assert absent.config_hash == explicit.config_hash == MINIMAL_HASH
    assert other.config()["spec"]["training"]["maxCollapsedSteps"] == 0
    for run in (absent, other):
        assert DistillRun.parse(run.document()).spec == run.spec


def test_rescoring_on_the_teachers_gpus_is_not_in_the_configuration() -> None:
    """So runs that were started before there was spec.rescore keep their hash."""
    absent, explicit, other = (
        DistillRun.parse(valid_specs.manifest(changes))
        for changes in ({}, {"spec.rescore": {}}, {"spec.rescore": {"gpus": 3}})
    )
    assert "rescore" not in absent.config()["spec"]
    assert absent.config_hash == explicit.config_hash == MINIMAL_HASH != other.config_hash
    assert other.config()["spec"]["rescore"] == {"gpus": 3}


@pytest.mark.parametrize("gpus, waits", [(None, False), (1, False), (2, False), (3, True), (9, True)])
def test_stages_wait_for_rescoring_that_takes_gpus_of_the_student(gpus: int | None, waits: bool) -> None:
    changes = {
        "spec.stages": [*valid_specs.MINIMAL["spec"]["stages"], valid_specs.RESCORED],
        "spec.teacher.gpus": 2,
        "spec.rescore": {"gpus": gpus},
    }
    run = DistillRun.parse(valid_specs.manifest(changes))
    assert run.spec.rescoring_gpus == (gpus or 2)
    assert run.needs("rescore") == ("preprocess",)
    assert run.needs("first") == (("preprocess", "rescore") if waits else ("preprocess",))


def test_an_unknown_step_is_rejected() -> None:
    run = DistillRun.parse(valid_specs.manifest({}))
    for name in ("rescore", "other", "first-sampler", "other-evaluate", "-evaluate", "first-"):
        for method in (run.needs, run.role, run.stage_of):
            with pytest.raises(
                KeyError,
                match=f"{name} is not a step of minimal, which has preprocess, first, first-evaluate, "
                "first-export, first-report",
            ):
                method(name)


def test_role_and_stage_of_a_step() -> None:
    dense = valid_specs.VALID["a dense model in a bucket"]
    run = DistillRun.parse(valid_specs.manifest(valid_specs.VALID["stages of all kinds"] | dense))
    assert {step: run.role(step) for step in run.steps()} == {
        "init": "init",
        "preprocess": "preprocess",
        "rescore": "rescore",
        "first": "train",
        "first-evaluate": "evaluate",
        "first-report": "report",
        "rescored": "train",
        "rescored-evaluate": "evaluate",
        "rescored-report": "report",
        "forced": "train",
        "forced-evaluate": "evaluate",
        "forced-report": "report",
        "onpolicy-sampler": "sampler",
        "onpolicy-teacher": "teacher",
        "onpolicy": "train",
        "onpolicy-evaluate": "evaluate",
        "onpolicy-export": "export",
        "onpolicy-report": "report",
    }
    assert [run.stage_of(step) for step in ("init", "preprocess", "rescore")] == [None, None, None]
    without_gpus = [step for step in run.steps() if not needs_gpus(step) and run.role(step) != "report"]
    assert without_gpus == ["init", "preprocess", "onpolicy-export"]
    for stage in run.spec.stages:
        assert {run.stage_of(step) for step in run.steps_of(stage)} == {stage}


def test_the_longest_step_has_the_longest_name() -> None:
    run = DistillRun.parse(
        valid_specs.manifest(
            {"spec.stages": [{**valid_specs.ONPOLICY, "name": "a" * 16, "require": {"validity": 0}}]}
        )
    )
    assert max(len(step) for step in run.steps()) == STEP_NAME


@pytest.mark.parametrize(
    "common, stage_only, kind, expected",
    [
        pytest.param({}, {}, "Vanilla", (3e-4, 1e-5, 20_000_000), id="the defaults"),
        pytest.param(
            {"learningRate": 1e-3, "warmupTokens": "1k"},
            {},
            "Rescored",
            (1e-3, 1e-5, 1000),
            id="values of all stages",
        ),
        pytest.param(
            {"learningRate": 1e-3},
            {"learningRate": 5e-4},
            "Vanilla",
            (5e-4, 1e-5, 20_000_000),
            id="the stage's own value",
        ),
        pytest.param(
            {"learningRate": 1e-3}, {}, "OnPolicy", (2e-5, 1e-5, 20_000_000), id="on-policy's own peak"
        ),
        pytest.param(
            {},
            {"learningRate": 1e-4, "minLearningRate": 0},
            "OnPolicy",
            (1e-4, 0, 20_000_000),
            id="both ends of on-policy",
        ),
    ],
)
def test_a_stage_inherits_optimizer_fields_from_training(
    common: dict[str, Any], stage_only: dict[str, Any], kind: str, expected: tuple[float, float, int]
) -> None:
    stage = {
        "name": "only",
        "kind": kind,
        **REQUIRED_OF_KIND.get(kind, {}),
        **({"optimizer": stage_only} if stage_only else {}),
    }
    optimizer = (
        DistillRun.parse(valid_specs.manifest({"spec.training.optimizer": common, "spec.stages": [stage]}))
        .spec.stages[0]
        .optimizer
    )
    assert (optimizer.learning_rate, optimizer.min_learning_rate, optimizer.warmup_tokens) == expected


def test_the_default_of_max_length_is_the_sequence_length() -> None:
    run = DistillRun.parse(valid_specs.manifest({"spec.training.sequenceLength": 512}))
    assert run.spec.dataset.max_length == 512


def test_fields_added_by_an_api_server_are_accepted_and_ignored() -> None:
    plain = DistillRun.parse(valid_specs.manifest({}))
    added = {
        "metadata.uid": "0f0e0d0c-0b0a-0908-0706-050403020100",
        "metadata.namespace": "team",
        "metadata.managedFields": [{"manager": "kubectl"}],
        "metadata.generation": 3,
        "status": {"phase": "Running", "unheard": "of"},
    }
    run = DistillRun.parse(valid_specs.manifest(added))
    assert (run.config_hash, run.metadata.namespace, run.uid8) == (plain.config_hash, "team", "0f0e0d0c")
    assert (plain.metadata.namespace, plain.metadata.uid, plain.uid8) == (
        "default",
        None,
        plain.config_hash[:8],
    )


def test_a_parsed_document_has_the_same_configuration() -> None:
    run = load_run(FULL)
    parsed_again = DistillRun.parse(json.loads(json.dumps(run.document())))
    assert (parsed_again.config_hash, parsed_again.config(), parsed_again.uid8) == (
        run.config_hash,
        run.config(),
        run.uid8,
    )
    assert SHA256.fullmatch(run.config_hash)


def test_changing_the_returned_configuration_does_not_change_the_run() -> None:
    run = load_run(FULL)
    run.config()["spec"].clear()
    assert run.config()["spec"]


EQUIVALENT = {
    "tokens as a number": {"spec.stages.0.tokens": 1_000_000_000},
    "tokens as text": {"spec.stages.0.tokens": "1B"},
    "tokens as longer text": {"spec.stages.0.tokens": "1_000M"},
    "a default written out": {"spec.student.gpus": 7, "spec.training.optimizer.learningRate": 0.0003},
    "an inherited default written out": {
        "spec.dataset.maxLength": 8192,
        "spec.stages.0.optimizer": {"learningRate": 3e-4},
    },
    "a whole number as a fraction": {"spec.dataset.sampling.keep": 1},
    "null instead of absent": {"spec.resumeFrom": None, "spec.student.init": None},
    "suspended": {"spec.suspend": True},
    "kept for a day": {"spec.ttlAfterFinished": "1d"},
    "deleted with its folder": {"spec.deletionPolicy": "Delete"},
    "another runtime": {"spec.runtime": valid_specs.RUNTIME},
    "another name": {"metadata.name": "other"},
}


@pytest.mark.parametrize("changes", [pytest.param(changes, id=name) for name, changes in EQUIVALENT.items()])
def test_equivalent_runs_have_the_same_hash(changes: dict[str, Any]) -> None:
    assert (
        DistillRun.parse(valid_specs.manifest(changes)).config_hash
        == DistillRun.parse(valid_specs.manifest({})).config_hash
    )


@pytest.mark.parametrize(
    "path, value",
    [
        ("spec.training.seed", 1),
        ("spec.training.maxCollapsedSteps", 999),
        ("spec.dataset.conversation.effort", "low=0.5,high=0.5"),
        ("spec.stages.0.tokens", "1000000001"),
        ("spec.student.gpusPerPod", 1),
        ("spec.storage.bucket", "other"),
    ],
)
def test_different_configurations_have_different_hashes(path: str, value: object) -> None:
    assert (
        DistillRun.parse(valid_specs.manifest({path: value})).config_hash
        != DistillRun.parse(valid_specs.manifest({})).config_hash
    )


def test_no_field_of_runtime_is_part_of_the_configuration() -> None:
    assert set(EQUIVALENT["another runtime"]["spec.runtime"]) == {
        str(field.alias) for field in RuntimeSpec.model_fields.values()
    }, "the case above changes every field"
    assert "runtime" not in load_run(FULL).config()["spec"]
    assert "runtime" not in load_run(FULL).document()["spec"]


def test_the_hash_of_a_run_is_that_of_the_versions_before() -> None:
    """Written down when runtime had no env from Secrets, no cache and no settings of pods."""
    assert DistillRun.parse(valid_specs.manifest({})).config_hash == (
        "c88ee2a5caa3759b3726571f7dcf3fc4da17f70e0ad43b9c53b27c91a1139f26"
    )


NEW_RULES = {
    name: bad.changes
    for name, bad in invalid_specs.INVALID.items()
    if name
    in (
        "HF_TOKEN in plain text",
        "a proxy with a password",
        "a resource that is none",
        "half a device",
        "a validity that a TeacherForced stage cannot measure",
        "a validity that no step measures",
    )
}


@pytest.mark.parametrize("name", NEW_RULES)
def test_a_stored_run_goes_on_that_a_later_rule_would_reject(name: str, tmp_path: Path) -> None:
    """Its pods too: their file is the operator's, which has the uid. A file without one is a new run."""
    written = valid_specs.manifest(NEW_RULES[name])
    run = DistillRun.parse(written, stored=True)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(written))
    with pytest.raises(Invalid):
        load_run(file)
    written["metadata"]["uid"] = "0a1b2c3d-0000-4000-8000-000000000001"
    file.write_text(yaml.safe_dump(written))
    assert load_run(file).spec == run.spec


def test_a_stored_run_is_rejected_for_what_every_version_rejects() -> None:
    with pytest.raises(Invalid, match="HOME is reserved"):
        DistillRun.parse(valid_specs.manifest({"spec.runtime.env": [{"name": "HOME"}]}), stored=True)


def test_a_started_run_keeps_the_hash_that_was_recorded() -> None:
    run = load_run(FULL)
    recorded = run.with_recorded_hash("0f" * 32)
    assert (recorded.config_hash, recorded.uid8, recorded.spec) == ("0f" * 32, "0f0f0f0f", run.spec)
    assert run.config_hash != recorded.config_hash
    assert pickle.loads(pickle.dumps(recorded)).config_hash == "0f" * 32, "workers get the run pickled"


@pytest.mark.parametrize("text", ["", "0f", "0F" * 32, "0g" * 32, "0f" * 33])
def test_a_text_that_is_no_hash_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="is not the hash of a configuration"):
        load_run(FULL).with_recorded_hash(text)


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_order_of_fields_does_not_change_the_hash(random: Any) -> None:
    def shuffled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shuffled(value[key]) for key in random.sample(sorted(value), len(value))}
        return [shuffled(item) for item in value] if isinstance(value, list) else value

    full = read_yaml(FULL.read_text(encoding="utf-8"))
    assert DistillRun.parse(shuffled(full)).config_hash == load_run(FULL).config_hash


def test_comments_and_style_do_not_change_the_hash(tmp_path: Path) -> None:
    flat = yaml.safe_dump(read_yaml(FULL.read_text(encoding="utf-8")))
    assert load_text("# another comment\n" + flat, tmp_path).config_hash == load_run(FULL).config_hash


@pytest.mark.parametrize(
    "text, value",
    [
        pytest.param("2026-01-01", "2026-01-01", id="a date"),
        pytest.param("2024-06", "2024-06", id="a month"),
        pytest.param("3e-4", 0.0003, id="a float without a point"),
        pytest.param("1E9", 1e9, id="a float in capitals"),
        pytest.param(".5", 0.5, id="a float without a whole part"),
        pytest.param("1_000_000", 1_000_000, id="an int with underscores"),
        pytest.param("1B", "1B", id="a token count"),
        pytest.param("12", 12, id="an int"),
    ],
)
def test_yaml_is_read_as_kubectl_reads_it(text: str, value: object) -> None:
    read = read_yaml(f"field: {text}")["field"]
    assert (read, type(read)) == (value, type(value))


@given(
    st.recursive(
        st.text() | st.integers() | st.booleans() | st.none(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_yaml_is_read_as_it_was_written(value: Any) -> None:
    assert read_yaml(write_yaml(value)) == value


@pytest.mark.parametrize(
    "text",
    [
        "3e-4",
        "1E9",
        "2026-01-01",
        "2024-06",
        "1_000",
        "null",
        "yes",
        "1B",
        ".5",
        "",
        " a",
        "\u2028",
        "a\x85b",
        "0x1",
    ],
)
def test_a_string_that_looks_like_another_type_remains_a_string(text: str) -> None:
    assert read_yaml(write_yaml({"field": text})) == {"field": text}


@pytest.mark.parametrize(
    "text, message",
    [
        pytest.param("a: 1\nb: 2\na: 3\n", "key a appears twice in one mapping", id="two equal keys"),
        pytest.param("a: [1", "is not YAML", id="not YAML"),
        pytest.param("a: 1\n---\nb: 2\n", "is not YAML", id="two documents"),
        pytest.param(
            "- 1\n",
            "a DistillRun is a mapping with apiVersion, kind, metadata and spec, not list",
            id="a list",
        ),
        pytest.param("", "not NoneType", id="an empty file"),
    ],
)
def test_a_file_without_a_run_is_rejected_by_name(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(Invalid, match=re.escape(message)) as caught:
        load_text(text, tmp_path)
    assert str(tmp_path / "run.yaml") in str(caught.value)


def test_an_unknown_stage_is_rejected_with_the_names_of_the_others() -> None:
    with pytest.raises(KeyError, match="second is not a stage of minimal, which has first"):
        DistillRun.parse(valid_specs.manifest({})).stage("second")
