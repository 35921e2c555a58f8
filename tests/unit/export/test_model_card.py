"""The model card: what the run knows about the student, in Hugging Face's form."""

import re
from dataclasses import replace
from typing import Any

import pytest
from huggingface_hub import ModelCard

from tests.fakes.finished_stages import COMMIT, FinishedStage
from vpmoe.api import DistillRun
from vpmoe.export.model_card import ModelFacts, StageFacts, model_card
from vpmoe.export.stage_model import open_stage_model
from vpmoe.rollout.evaluation_record import EvaluationRecord
from vpmoe.storage import paths
from vpmoe.storage.bucket import json_bytes
from vpmoe.storage.manifest import Input

EVALUATION: dict[str, Any] = {
    "run": "default/tiny-run-01234567",
    "config": "c" * 64,
    "stage": "vanilla",
    "iteration": 3,
    "checkpoint": "a" * 64,
    "documents": 16,
    "heldOut": {"reasoning": 8.125, "final": 9.0},
    "completions": 6,
    "validity": {"valid": 3, "truncated": 3},
    "efforts": {
        "high": {"validity": {"truncated": 2}, "meanTokens": 24.0, "mostTokens": 24},
        "low": {"validity": {"valid": 2}, "meanTokens": 7.5, "mostTokens": 8},
        "medium": {"validity": {"valid": 1, "truncated": 1}, "meanTokens": 15.0, "mostTokens": 16},
    },
    "canary": {"bitsPerByte": 3.25, "bytes": 1000, "sha256": "e" * 64},
}


@pytest.fixture(scope="module")
def finished(small_stage: FinishedStage) -> FinishedStage:
    return small_stage


@pytest.fixture
def facts(finished: FinishedStage) -> ModelFacts:
    return read_facts(finished)


def read_facts(finished: FinishedStage) -> ModelFacts:
    run = finished.run
    return open_stage_model(run, run.spec.stages[0], finished.bucket).facts


def with_last(facts: ModelFacts, **changes: Any) -> ModelFacts:
    return replace(facts, stages=(*facts.stages[:-1], replace(facts.stages[-1], **changes)))


def test_the_card_says_what_the_run_knows(finished: FinishedStage, facts: ModelFacts) -> None:
    text = model_card(facts)
    assert "# tiny-run, stage vanilla" in text
    assert "trained without a teacher" in text
    assert "| vanilla | Vanilla | 300 | 3 | 12.5000 / 12.2500 → 8.1250 / 9.0000 |" in text
    splits = facts.dataset.facts["splits"]
    assert (
        f"`{finished.run.spec.dataset.source}`, 3 files: {splits['train']['documents']} documents for "
        f"training, {splits['valid']['documents']} held out. Its licence is that of its source; the run does "
        "not record it."
    ) in text
    for known in (
        finished.run.identity,
        finished.run.config_hash,
        facts.checkpoint,
        facts.checkpoint_sha256,
        facts.dataset.sha256,
    ):
        assert f"`{known}`" in text
    assert f"| vanilla | `{COMMIT}` | `registry.example.com/vpmoe/trainer:1` |" in text


def test_the_front_matter_is_the_hubs(facts: ModelFacts) -> None:
    """Read by the hub's own library. No licence: the run does not know it."""
    card = ModelCard(model_card(facts))
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["vpmoe", "mixture-of-experts", "distillation"],
    }
    hub = replace(facts.inputs, source="hf://PleIAs/SYNTH@main", commit="f" * 40)
    text = model_card(replace(facts, inputs=hub))
    assert ModelCard(text).data.to_dict()["datasets"] == ["PleIAs/SYNTH"]
    assert f"`hf://PleIAs/SYNTH@main` at commit `{'f' * 40}`" in text
    assert "Its licence is on <https://huggingface.co/datasets/PleIAs/SYNTH>." in text


def test_a_card_without_an_evaluation_says_so(facts: ModelFacts) -> None:
    assert "The run did not evaluate this stage" in model_card(facts)
    not_sampled = EvaluationRecord.model_validate(
        {**EVALUATION, "completions": 0, "validity": {}, "efforts": {}}
    )
    text = model_card(with_last(facts, evaluation=not_sampled))
    assert "No completion was sampled" in text and "3.2500 bits per byte" in text


def test_the_evaluation_is_in_the_card_by_effort(finished: FinishedStage) -> None:
    """Read from the bucket."""
    key = paths.evaluation(finished.run, "vanilla")
    finished.bucket.create(key, json_bytes(EVALUATION), {})
    try:
        text = model_card(read_facts(finished))
    finally:
        finished.bucket.delete(key)
    assert "50.0% of 6 sampled completions are valid Harmony" in text
    table = text[text.index("| reasoning effort |") :].splitlines()[2:5]
    assert table == [
        "| low | 2 | 100.0% | 7.5 | 8 |",
        "| medium | 2 | 50.0% | 15.0 | 16 |",
        "| high | 2 | 0.0% | 24.0 | 24 |",
    ]


def test_what_is_gone_is_not_known(facts: ModelFacts) -> None:
    """A stage before whose checkpoints were deleted."""
    before = StageFacts(facts.stage, None, None, None)
    text = model_card(replace(facts, stages=(before, *facts.stages)))
    assert "| vanilla | Vanilla | not known | not known | not measured |" in text
    assert "| vanilla | not known | not known |" in text


def test_teacher_and_first_weights_are_named(finished: FinishedStage, facts: ModelFacts) -> None:
    last = facts.stages[-1].manifest
    assert last is not None
    teacher = Input("teacher", "s3://models/gpt-oss-120b", {"sha256": "d" * 64}, {})
    spec = finished.run.spec.model_copy(update={"resume_from": "s3://vpmoe/runs/a/b-01234567"})
    text = model_card(
        replace(
            with_last(facts, manifest=replace(last, inputs={**last.inputs, "teacher": teacher})),
            run=finished.run.model_copy(update={"spec": spec}),
        )
    )
    assert "distilled from `s3://models/gpt-oss-120b` by vpMoE" in text
    assert "Its weights begin with `s3://vpmoe/runs/a/b-01234567`." in text


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    "model, commit, named",
    [
        ("hf://Qwen/Qwen3-0.6B@main", "0" * 40, f"`hf://Qwen/Qwen3-0.6B@main` at commit `{'0' * 40}`"),
        ("s3://models/qwen3", None, "`s3://models/qwen3`"),
    ],
    ids=["hub", "bucket"],
)
def test_the_dense_model_that_the_student_began_with_is_named(
    finished: FinishedStage, facts: ModelFacts, model: str, commit: str | None, named: str, known: bool
) -> None:
    """With the manifest of the initial weights, if the first stage's checkpoint still says which."""
    written = finished.run.document()
    written["spec"]["student"]["init"] = {"upcycle": {"model": model}}
    last = facts.stages[-1].manifest
    assert last is not None
    made_of = {"model": model} | ({"gitCommit": commit} if commit else {})
    init = Input("init", "s3://a/init/manifest.json", {"sha256": "d" * 64}, made_of)
    changed = replace(last, inputs={**last.inputs, "init": init}) if known else None
    text = model_card(replace(with_last(facts, manifest=changed), run=DistillRun.parse(written)))
    if known:
        made = f"made into this architecture: `s3://a/init/manifest.json`, sha256 `{'d' * 64}`."
        assert f"Its weights begin with those of the dense model {named}, {made}" in text
    else:
        assert f"Its weights begin with those of the dense model `{model}`." in text
    assert ("base_model: Qwen/Qwen3-0.6B\n" in text) is model.startswith("hf://")


def test_equal_facts_give_equal_cards_and_no_clock_is_in_them(
    finished: FinishedStage, facts: ModelFacts
) -> None:
    text = model_card(facts)
    assert text == model_card(read_facts(finished))
    assert not re.search(r"\d\d:\d\d", text)


def test_names_of_any_kind_do_not_break_the_card(facts: ModelFacts) -> None:
    strange = replace(facts.inputs, source="s3://corpora/a|b`c\n\n# d/*.parquet")
    text = model_card(replace(facts, inputs=strange))
    assert "`` s3://corpora/a\\|b`c # d/*.parquet ``" in text
    assert "\n# d" not in text
