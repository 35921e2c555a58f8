"""A DistillRun is read, filled in, refused with words, and hashed."""

import json
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
from vpmoe.api.run import STEP_NAME
from vpmoe.api.text import read_yaml, write_yaml

EXAMPLES = Path(__file__).parents[3] / "manifests" / "examples"
FULL = EXAMPLES / "full.yaml"
SHA256 = re.compile(r"[0-9a-f]{64}")


def written(text: str, folder: Path) -> DistillRun:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_run(path)


@pytest.mark.parametrize(
    "changes", [pytest.param(changes, id=name) for name, changes in valid_specs.VALID.items()]
)
def test_a_good_run_is_accepted(changes: dict[str, Any]) -> None:
    DistillRun.parse(valid_specs.manifest(changes))


@pytest.mark.parametrize("bad", [pytest.param(bad, id=name) for name, bad in invalid_specs.INVALID.items()])
def test_a_bad_run_is_refused_with_its_field_and_the_way_out(bad: invalid_specs.InvalidSpec) -> None:
    with pytest.raises(Invalid) as refused:
        DistillRun.parse(valid_specs.manifest(bad.changes))
    assert any(
        line.startswith(f"{bad.field}: ") and bad.message in line for line in refused.value.problems
    ), refused.value.problems
    assert len(refused.value.problems) == 1, refused.value.problems


def test_every_problem_is_named_at_once_and_each_where_it_was_written() -> None:
    changes = {
        "spec.student.gpus": 0,
        "spec.training.optimizer": {"weightDecay": 2},
        "spec.stages.0.tokens": "x",
        "spec.typo": 1,
    }
    with pytest.raises(Invalid) as refused:
        DistillRun.parse(valid_specs.manifest(changes))
    assert [line.partition(":")[0] for line in refused.value.problems] == [
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
        pytest.param({"spec": None}, "spec: null must be a mapping", id="null for all of it"),
        pytest.param({"spec.stages": {}}, "spec.stages: a mapping must be a list", id="stages by name"),
        pytest.param(
            {"spec.stages.0": {**valid_specs.ONPOLICY, "require": None}},
            "spec.stages[0].require: null must be a mapping",
            id="no gate",
        ),
        pytest.param(
            {"spec.stages.0": "Vanilla"},
            'spec.stages[0]: "Vanilla" must be a mapping',
            id="a stage that is a word",
        ),
        pytest.param(
            {"spec.stages.0.optimizer": 1},
            "spec.stages[0].optimizer: 1 must be a mapping",
            id="a number for an optimizer",
        ),
        pytest.param(
            {"spec.dataset.conversation.date": date(2026, 1, 1)},
            "spec.dataset.conversation.date: 2026-01-01 must be a string: quote it",
            id="a date that is no text",
        ),
        pytest.param(
            {"spec.training.optimizer.weightDecay": float("nan")},
            "spec.training.optimizer.weightDecay: nan must be a number",
            id="nan",
        ),
        pytest.param(
            {"spec.stages.0.optimizer": {"learningRate": -1}},
            "spec.stages[0].optimizer.learningRate: -1 must be more than 0",
            id="a bound",
        ),
    ],
)
def test_what_no_api_server_would_pass_on_is_refused_by_hand(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(Invalid) as refused:
        DistillRun.parse(valid_specs.manifest(changes))
    assert refused.value.problems == (problem,)


def test_a_part_that_is_malformed_is_the_only_thing_complained_of() -> None:
    with pytest.raises(Invalid) as refused:
        DistillRun.parse(valid_specs.manifest({"spec.training": 3}))
    assert refused.value.problems == ("spec.training: 3 must be a mapping",)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_an_example_is_a_valid_run(path: Path) -> None:
    load_run(path)


def test_the_full_example_has_every_field_that_there_is() -> None:
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
    given_sets = {stage["kind"]: fields(stage) for stage in spec["stages"]}
    assert set(given) == set(spec)
    for part in ("dataset", "teacher", "student", "training", "evaluation", "storage", "runtime"):
        assert set(given[part]) == set(spec[part]), part
    own = {"name", "kind", "tokens", "stop", "optimizer"}
    for stage in given["stages"]:
        kind = next(
            kind for kind, all_fields in given_sets.items() if set(stage) - own == set(all_fields) - own
        )
        assert given_sets.pop(kind)
    assert not given_sets


def test_defaults_are_those_of_the_plan() -> None:
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
        "rescored",
        "rescored-evaluate",
        "forced",
        "forced-evaluate",
        "onpolicy-sampler",
        "onpolicy-teacher",
        "onpolicy",
        "onpolicy-evaluate",
    )
    assert run.stage("forced") is forced


NOTHING = {"completions": 0}
OF_KIND = {"OnPolicy": {"require": {"validity": 0}}}


@pytest.mark.parametrize(
    "kinds, evaluation, needs",
    [
        pytest.param(
            ["Vanilla", "Vanilla"],
            NOTHING,
            {"preprocess": [], "s0": ["preprocess"], "s1": ["s0"]},
            id="no scores, no rescoring",
        ),
        pytest.param(
            ["Vanilla", "Vanilla", "Rescored", "Vanilla"],
            NOTHING,
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
            NOTHING,
            {
                "preprocess": [],
                "rescore": ["preprocess"],
                "s0": ["preprocess", "rescore"],
                "s1": ["s0", "rescore"],
                "s2-sampler": ["s1", "rescore"],
                "s2-teacher": ["s1", "rescore"],
                "s2": ["s1", "rescore"],
            },
            id="the teacher's GPUs",
        ),
        pytest.param(
            ["Vanilla", "TeacherForced"],
            NOTHING,
            {"preprocess": [], "s0": ["preprocess"], "s1": ["s0"]},
            id="a teacher without scores",
        ),
        pytest.param(
            ["OnPolicy", "Vanilla"],
            NOTHING,
            {
                "preprocess": [],
                "s0-sampler": ["preprocess"],
                "s0-teacher": ["preprocess"],
                "s0": ["preprocess"],
                "s1": ["s0-sampler", "s0-teacher", "s0"],
            },
            id="all of an on-policy stage",
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
            id="each stage is evaluated first",
        ),
        pytest.param(
            ["Vanilla"],
            {"completions": 0, "canary": "s3://corpora/canary.txt"},
            {"preprocess": [], "s0": ["preprocess"], "s0-evaluate": ["s0"]},
            id="a canary is a reason to evaluate",
        ),
    ],
)
def test_a_step_needs_what_it_goes_on_from_its_scores_and_the_teachers_gpus(
    kinds: list[str], evaluation: dict[str, Any], needs: dict[str, list[str]]
) -> None:
    stages = [
        {"name": f"s{i}", "kind": kind, "tokens": 1000, **OF_KIND.get(kind, {})}
        for i, kind in enumerate(kinds)
    ]
    run = DistillRun.parse(valid_specs.manifest({"spec.stages": stages, "spec.evaluation": evaluation}))
    assert run.steps() == tuple(needs)
    assert {step: list(run.needs(step)) for step in run.steps()} == needs


def test_a_step_that_the_run_does_not_have_is_refused() -> None:
    run = DistillRun.parse(valid_specs.manifest({}))
    for name in ("rescore", "other", "first-sampler", "other-evaluate", "-evaluate", "first-"):
        for ask in (run.needs, run.role, run.stage_of):
            with pytest.raises(
                KeyError,
                match=f"{name} is not a step of minimal, which has preprocess, first, first-evaluate",
            ):
                ask(name)


def test_a_step_knows_its_role_and_its_stage() -> None:
    run = DistillRun.parse(valid_specs.manifest(valid_specs.VALID["stages of all kinds"]))
    assert {step: run.role(step) for step in run.steps()} == {
        "preprocess": "preprocess",
        "rescore": "rescore",
        "first": "train",
        "first-evaluate": "evaluate",
        "rescored": "train",
        "rescored-evaluate": "evaluate",
        "forced": "train",
        "forced-evaluate": "evaluate",
        "onpolicy-sampler": "sampler",
        "onpolicy-teacher": "teacher",
        "onpolicy": "train",
        "onpolicy-evaluate": "evaluate",
    }
    assert [run.stage_of(step) for step in ("preprocess", "rescore")] == [None, None]
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
    "common, own, kind, expected",
    [
        pytest.param({}, {}, "Vanilla", (3e-4, 1e-5, 20_000_000), id="the defaults"),
        pytest.param(
            {"learningRate": 1e-3, "warmupTokens": "1k"},
            {},
            "Rescored",
            (1e-3, 1e-5, 1000),
            id="what all stages share",
        ),
        pytest.param(
            {"learningRate": 1e-3},
            {"learningRate": 5e-4},
            "Vanilla",
            (5e-4, 1e-5, 20_000_000),
            id="the stage's own word",
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
def test_a_stage_takes_from_training_what_its_optimizer_does_not_say(
    common: dict[str, Any], own: dict[str, Any], kind: str, expected: tuple[float, float, int]
) -> None:
    stage = {"name": "only", "kind": kind, **OF_KIND.get(kind, {}), **({"optimizer": own} if own else {})}
    optimizer = (
        DistillRun.parse(valid_specs.manifest({"spec.training.optimizer": common, "spec.stages": [stage]}))
        .spec.stages[0]
        .optimizer
    )
    assert (optimizer.learning_rate, optimizer.min_learning_rate, optimizer.warmup_tokens) == expected


def test_documents_are_as_long_as_sequences_unless_they_say_otherwise() -> None:
    run = DistillRun.parse(valid_specs.manifest({"spec.training.sequenceLength": 512}))
    assert run.spec.dataset.max_length == 512


def test_what_an_api_server_adds_is_accepted_and_left_out() -> None:
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


def test_the_configuration_read_again_is_the_same_configuration() -> None:
    run = load_run(FULL)
    again = DistillRun.parse(json.loads(json.dumps(run.document())))
    assert (again.config_hash, again.config(), again.uid8) == (run.config_hash, run.config(), run.uid8)
    assert SHA256.fullmatch(run.config_hash)


def test_changing_what_config_returned_changes_nothing() -> None:
    run = load_run(FULL)
    run.config()["spec"].clear()
    assert run.config()["spec"]


SAME = {
    "tokens as a number": {"spec.stages.0.tokens": 1_000_000_000},
    "tokens as text": {"spec.stages.0.tokens": "1B"},
    "tokens as longer text": {"spec.stages.0.tokens": "1_000M"},
    "a default written out": {"spec.student.gpus": 7, "spec.training.optimizer.learningRate": 0.0003},
    "an inherited default written out": {
        "spec.dataset.maxLength": 8192,
        "spec.stages.0.optimizer": {"learningRate": 3e-4},
    },
    "a whole number for a fraction": {"spec.dataset.sampling.keep": 1},
    "null for what is absent": {"spec.resumeFrom": None, "spec.student.init": None},
    "suspended": {"spec.suspend": True},
    "kept for a day": {"spec.ttlAfterFinished": "1d"},
    "deleted with its folder": {"spec.deletionPolicy": "Delete"},
    "more attempts": {"spec.runtime.attempts": 9},
    "the same time in other units": {"spec.runtime.stalledAfter": "900s"},
    "another name": {"metadata.name": "other"},
}


@pytest.mark.parametrize("changes", [pytest.param(changes, id=name) for name, changes in SAME.items()])
def test_what_means_the_same_has_the_same_hash(changes: dict[str, Any]) -> None:
    assert (
        DistillRun.parse(valid_specs.manifest(changes)).config_hash
        == DistillRun.parse(valid_specs.manifest({})).config_hash
    )


@pytest.mark.parametrize(
    "path, value",
    [("spec.training.seed", 1), ("spec.stages.0.tokens", "1000000001"), ("spec.runtime.backend", "Job")],
)
def test_what_means_something_else_has_another_hash(path: str, value: object) -> None:
    assert (
        DistillRun.parse(valid_specs.manifest({path: value})).config_hash
        != DistillRun.parse(valid_specs.manifest({})).config_hash
    )


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
    assert written("# another comment\n" + flat, tmp_path).config_hash == load_run(FULL).config_hash


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
def test_what_is_written_is_read_back(value: Any) -> None:
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
def test_a_string_that_looks_like_something_else_stays_a_string(text: str) -> None:
    assert read_yaml(write_yaml({"field": text})) == {"field": text}


@pytest.mark.parametrize(
    "text, words",
    [
        pytest.param("a: 1\nb: 2\na: 3\n", "key a appears twice in one mapping", id="two equal keys"),
        pytest.param("a: [1", "is not YAML", id="not YAML"),
        pytest.param("a: 1\n---\nb: 2\n", "is not YAML", id="two documents"),
        pytest.param(
            "- 1\n",
            "a DistillRun is a mapping with apiVersion, kind, metadata and spec, not list",
            id="a list",
        ),
        pytest.param("", "not NoneType", id="nothing"),
    ],
)
def test_a_file_that_holds_no_run_is_named(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(Invalid, match=re.escape(words)) as refused:
        written(text, tmp_path)
    assert str(tmp_path / "run.yaml") in str(refused.value)


def test_a_stage_that_there_is_not_is_named_beside_those_that_there_are() -> None:
    with pytest.raises(KeyError, match="second is not a stage of minimal, which has first"):
        DistillRun.parse(valid_specs.manifest({})).stage("second")
