"""Rescored stages with scores in a real store: the documents and scores of each step; exact resumption."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.fakes import datasets, students, trainers
from tests.fakes.checkpoints import equal_states
from tests.fakes.reporters import RecordingReporter, stop_after
from tests.fakes.trainers import start_of
from vpmoe.api.stages import Confidence
from vpmoe.checkpoint.train_state import TrainState, load_stage_end
from vpmoe.data.mixture import interleave
from vpmoe.data.packing import PackedDocument
from vpmoe.data.reader import BlockCache, DatasetReader
from vpmoe.failure import Permanent, Terminated
from vpmoe.objectives.confidence import centre
from vpmoe.storage import Bucket, paths
from vpmoe.storage.manifest import Manifest
from vpmoe.trainer.context import StageContext
from vpmoe.trainer.data import collate
from vpmoe.trainer.data.scored_documents import ScoredDocuments
from vpmoe.trainer.trainer import Trainer

pytestmark = pytest.mark.usefixtures("device")
RESCORED = {"kind": "Rescored", "tokens": 2000, "mix": 0.6}


@pytest.fixture
def spec(run_spec: dict[str, Any]) -> dict[str, Any]:
    run_spec["spec"]["dataset"]["maxLength"] = 64
    run_spec["spec"]["training"] |= {
        "sequenceLength": 64,
        "globalBatchTokens": 256,
        "checkpoint": {"everyTokens": 400, "keep": 9},
    }
    run_spec["spec"]["stages"] = [{"name": "rescored", **RESCORED}, {"name": "again", **RESCORED}]
    run_spec["spec"]["evaluation"]["documents"] = 0
    return run_spec


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> list[datasets.Documents]:
    monkeypatch.setattr(collate, "PADDING", 0)  # the small vocabulary has no other
    random = np.random.default_rng(11)
    return [datasets.random_documents(random, 60), datasets.random_documents(random, 40)]


@pytest.fixture
def dataset(bucket: Bucket, train: list[datasets.Documents]) -> Manifest:
    return datasets.write_dataset(bucket, train, [[]])


@pytest.fixture
def scores(bucket: Bucket, dataset: Manifest, train: list[datasets.Documents]) -> Manifest:
    return datasets.write_scores(bucket, dataset, train, np.random.default_rng(5))


MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def make_trainer(
    bucket: Bucket,
    spec: dict[str, Any],
    dataset: Manifest,
    scores: Manifest,
    tmp_path: Path,
    device: torch.device,
) -> MakeTrainer:
    """Makes trainers at the stage's state according to the bucket."""

    def make(uploader: RecordingReporter, stage: str = "rescored") -> Trainer:
        context = datasets.context(bucket, spec, tmp_path, dataset, stage, scores)
        return trainers.trainer(context, device, students.learner(device), uploader)

    return make


def final_state(bucket: Bucket, context: StageContext) -> TrainState:
    end = load_stage_end(bucket, paths.checkpoints(context.run, context.stage.name))
    assert end is not None
    return end[1]


def test_a_stopped_stage_resumes_to_the_same_bits_and_the_mix_is_exact(
    make_trainer: MakeTrainer, bucket: Bucket, spec: dict[str, Any]
) -> None:
    spec["metadata"]["name"] = "alone"
    uninterrupted = make_trainer(RecordingReporter())
    uninterrupted.run()
    spec["metadata"]["name"] = "stopped"
    stopped: list[Trainer] = []
    stopped.append(make_trainer(RecordingReporter(stop_after(4, lambda: stopped[0].context))))
    with pytest.raises(Terminated):
        stopped[0].run()
    resumed = make_trainer(RecordingReporter())
    assert resumed.start.state.steps == 4
    resumed.run()
    assert equal_states(resumed.learner, uninterrupted.learner)
    assert final_state(bucket, uninterrupted.context) == final_state(bucket, resumed.context)
    assert isinstance(uninterrupted.reporter.uploader, RecordingReporter) and isinstance(
        resumed.reporter.uploader, RecordingReporter
    )
    steps = [line for line in uninterrupted.reporter.uploader.lines if line["event"] == "step"]
    by_span, weights = steps[-1]["lossBySpan"], uninterrupted.stage.span_weights
    assert uninterrupted.reporter.uploader.progress["loss"] == pytest.approx(
        sum(weights[span] * (loss or 0) for span, loss in by_span.items())
    ), "the reported loss has no confidence weights"
    assert [line["kind"] == "Rescored" for line in steps] == interleave(len(steps), 0.6).tolist()
    for line in steps:
        assert ("weight" in line) == (line["kind"] == "Rescored")
    resumed_lines = [line for line in resumed.reporter.uploader.lines if line["event"] == "step"]
    for line in (*steps, *resumed_lines):
        for name in ("time", "seconds", "tokensPerSecond", "attempt"):
            line.pop(name)
    assert resumed_lines == steps[4:]


def test_the_centre_is_fixed_when_the_stage_starts(
    make_trainer: MakeTrainer, bucket: Bucket, scores: Manifest
) -> None:
    """Later attempts read it from the checkpoint: another histogram in the manifest does not change it."""
    stopped: list[Trainer] = []
    stopped.append(make_trainer(RecordingReporter(stop_after(2, lambda: stopped[0].context))))
    with pytest.raises(Terminated):
        stopped[0].run()
    at_start = stopped[0].start.state.objective
    assert at_start is not None
    assert at_start.reasoning == centre(scores.facts["histogram"]["reasoning"], Confidence())
    context = replace(
        stopped[0].context,
        scores=replace(scores, facts={**scores.facts, "histogram": {"reasoning": [], "final": []}}),
    )
    assert start_of(context, stopped[0].learner).state.objective == at_start


def test_the_next_stage_continues_both_streams(make_trainer: MakeTrainer, bucket: Bucket) -> None:
    first = make_trainer(RecordingReporter())
    first.run()
    end = final_state(bucket, first.context)
    second = make_trainer(RecordingReporter(), "again")
    at_start = second.start.state
    assert at_start.scored is not None and end.scored is not None
    assert (at_start.first_sequence, at_start.scored.first_sequence) == (
        end.next_sequence,
        end.scored.next_sequence,
    )
    assert at_start.first_sequence > 0 and at_start.scored.first_sequence > 0
    plain, scored = first.stage.plan.mixture.steps_by_kind(first.stage.plan.steps)  # type: ignore[attr-defined]
    assert (at_start.first_sequence, at_start.scored.first_sequence) == (plain * 4, scored * 4)


def test_scored_steps_have_only_scored_documents_with_their_scores(
    make_trainer: MakeTrainer, train: list[datasets.Documents], bucket: Bucket, scores: Manifest
) -> None:
    trainer = make_trainer(RecordingReporter())
    kinds = {"picked": set(), "other": set()}  # type: ignore[var-annotated]
    for part in train:
        for place, (tokens, _) in enumerate(part):
            kinds["picked" if place % 2 == 0 else "other"].add(tuple(tokens.tolist()))
    seen = 0
    for step in range(trainer.stage.plan.steps):
        for batch in trainer.stage.plan.batches(step):
            documents = [
                tuple(row.tolist())
                for row in batch.tokens.flatten().tensor_split(batch.boundaries[1:-1].tolist())
                if tuple(row.tolist())
            ]
            training_documents = [
                document for document in documents if document in kinds["picked"] | kinds["other"]
            ]
            if trainer.stage.plan.kind(step) == "Rescored":
                assert set(training_documents) <= kinds["picked"] and batch.teacher_logp is not None
                assert not batch.teacher_logp[batch.span > 0].isnan().any()
                seen += len(training_documents)
            else:
                assert batch.teacher_logp is None
    assert seen > 50


def test_a_supervised_token_without_a_score_is_rejected(
    bucket: Bucket, dataset: Manifest, train: list[datasets.Documents], scores: Manifest, tmp_path: Path
) -> None:
    name = next(name for name in scores.subjects if name.endswith("part-00001.logp.bin"))
    without_scores = np.full(scores.subjects[name].size // 2, np.nan, "<f2").tobytes()
    stored = bucket.put_bytes(scores.subjects[name].key, without_scores, {}).subject("scores/" + datasets.HEX)
    broken = replace(scores, subjects={**scores.subjects, name: stored})
    cache = BlockCache(bucket, tmp_path / "blocks")
    parts = ScoredDocuments(DatasetReader(dataset, "train", cache), broken, cache)
    assert len(parts.logp(PackedDocument(0, 3, int(parts.lengths[0][3])))) == parts.lengths[0][3]
    with pytest.raises(
        Permanent,
        match=r"document 6 of train/part-00001 counts as scored, but some .* tokens have no score",
    ):
        parts.logp(PackedDocument(1, 3, int(parts.lengths[1][3])))


def test_a_stage_does_not_resume_with_other_scores(make_trainer: MakeTrainer, scores: Manifest) -> None:
    stopped: list[Trainer] = []
    stopped.append(make_trainer(RecordingReporter(stop_after(1, lambda: stopped[0].context))))
    with pytest.raises(Terminated):
        stopped[0].run()
    other = replace(stopped[0].context, scores=replace(scores, facts={**scores.facts, "id": "f" * 64}))
    with pytest.raises(
        Permanent, match=r"began with the teacher's scores 0123.*, but would continue with ffff"
    ):
        start_of(other, stopped[0].learner)
