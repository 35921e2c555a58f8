"""Rescored stages on scores in a real store: the documents and scores of their steps; a pause changes no
bit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.fakes import datasets, students, trainers
from tests.fakes.checkpoints import same
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
    return datasets.write(bucket, train, [[]])


@pytest.fixture
def scores(bucket: Bucket, dataset: Manifest, train: list[datasets.Documents]) -> Manifest:
    return datasets.score(bucket, dataset, train, np.random.default_rng(5))


Make = Callable[..., Trainer]


@pytest.fixture
def trainer(
    bucket: Bucket,
    spec: dict[str, Any],
    dataset: Manifest,
    scores: Manifest,
    tmp_path: Path,
    device: torch.device,
) -> Make:
    """A trainer that stands where the bucket says the stage stands."""

    def make(uploader: RecordingReporter, stage: str = "rescored") -> Trainer:
        context = datasets.context(bucket, spec, tmp_path, dataset, stage, scores)
        return trainers.trainer(context, device, students.learner(device), uploader)

    return make


def reached(bucket: Bucket, context: StageContext) -> TrainState:
    end = load_stage_end(bucket, paths.checkpoints(context.run, context.stage.name))
    assert end is not None
    return end[1]


def test_a_stage_that_was_stopped_goes_on_to_the_same_bits_and_the_mix_is_exact(
    trainer: Make, bucket: Bucket, spec: dict[str, Any]
) -> None:
    spec["metadata"]["name"] = "alone"
    whole = trainer(RecordingReporter())
    whole.run()
    spec["metadata"]["name"] = "stopped"
    stopped: list[Trainer] = []
    stopped.append(trainer(RecordingReporter(stop_after(4, lambda: stopped[0].context))))
    with pytest.raises(Terminated):
        stopped[0].run()
    resumed = trainer(RecordingReporter())
    assert resumed.start.state.steps == 4
    resumed.run()
    assert same(resumed.learner, whole.learner)
    assert reached(bucket, whole.context) == reached(bucket, resumed.context)
    assert isinstance(whole.reporter.uploader, RecordingReporter) and isinstance(
        resumed.reporter.uploader, RecordingReporter
    )
    steps = [line for line in whole.reporter.uploader.lines if line["event"] == "step"]
    by_span, weights = steps[-1]["lossBySpan"], whole.stage.span_weights
    assert whole.reporter.uploader.progress["loss"] == pytest.approx(
        sum(weights[span] * (loss or 0) for span, loss in by_span.items())
    ), "without confidence weights"
    assert [line["kind"] == "Rescored" for line in steps] == interleave(len(steps), 0.6).tolist()
    for line in steps:
        assert ("weight" in line) == (line["kind"] == "Rescored")
    again = [line for line in resumed.reporter.uploader.lines if line["event"] == "step"]
    for line in (*steps, *again):
        for name in ("time", "seconds", "tokensPerSecond", "attempt"):
            line.pop(name)
    assert again == steps[4:]


def test_the_centre_is_fixed_when_the_stage_begins(trainer: Make, bucket: Bucket, scores: Manifest) -> None:
    """It is taken from the checkpoint afterwards: a manifest that says something else does not move it."""
    it: list[Trainer] = []
    it.append(trainer(RecordingReporter(stop_after(2, lambda: it[0].context))))
    with pytest.raises(Terminated):
        it[0].run()
    begun = it[0].start.state.objective
    assert begun is not None
    assert begun.reasoning == centre(scores.facts["histogram"]["reasoning"], Confidence())
    context = replace(
        it[0].context,
        scores=replace(scores, facts={**scores.facts, "histogram": {"reasoning": [], "final": []}}),
    )
    assert start_of(context, it[0].learner).state.objective == begun


def test_the_next_stage_goes_on_in_both_streams(trainer: Make, bucket: Bucket) -> None:
    first = trainer(RecordingReporter())
    first.run()
    end = reached(bucket, first.context)
    second = trainer(RecordingReporter(), "again")
    at = second.start.state
    assert at.scored is not None and end.scored is not None
    assert (at.first_sequence, at.scored.first_sequence) == (end.next_sequence, end.scored.next_sequence)
    assert at.first_sequence > 0 and at.scored.first_sequence > 0
    plain, scored = first.stage.plan.mixture.steps_by_kind(first.stage.plan.steps)
    assert (at.first_sequence, at.scored.first_sequence) == (plain * 4, scored * 4)


def test_scored_steps_hold_scored_documents_alone_with_their_scores(
    trainer: Make, train: list[datasets.Documents], bucket: Bucket, scores: Manifest
) -> None:
    it = trainer(RecordingReporter())
    kinds = {"picked": set(), "other": set()}  # type: ignore[var-annotated]
    for part in train:
        for place, (tokens, _) in enumerate(part):
            kinds["picked" if place % 2 == 0 else "other"].add(tuple(tokens.tolist()))
    seen = 0
    for step in range(it.stage.plan.steps):
        for one in it.stage.plan.batches(step):
            documents = [
                tuple(row.tolist())
                for row in one.tokens.flatten().tensor_split(one.boundaries[1:-1].tolist())
                if tuple(row.tolist())
            ]
            real = [document for document in documents if document in kinds["picked"] | kinds["other"]]
            if it.stage.plan.kind(step) == "Rescored":
                assert set(real) <= kinds["picked"] and one.teacher_logp is not None
                assert not one.teacher_logp[one.span > 0].isnan().any()
                seen += len(real)
            else:
                assert one.teacher_logp is None
    assert seen > 50


def test_a_supervised_token_without_a_score_is_refused(
    bucket: Bucket, dataset: Manifest, train: list[datasets.Documents], scores: Manifest, tmp_path: Path
) -> None:
    name = next(name for name in scores.subjects if name.endswith("part-00001.logp.bin"))
    hole = np.full(scores.subjects[name].size // 2, np.nan, "<f2").tobytes()
    stored = bucket.put_bytes(scores.subjects[name].key, hole, {}).subject("scores/" + datasets.HEX)
    broken = replace(scores, subjects={**scores.subjects, name: stored})
    cache = BlockCache(bucket, tmp_path / "blocks")
    parts = ScoredDocuments(DatasetReader(dataset, "train", cache), broken, cache)
    assert len(parts.logp(PackedDocument(0, 3, int(parts.lengths[0][3])))) == parts.lengths[0][3]
    with pytest.raises(
        Permanent,
        match=r"document 6 of training part 1 counts as scored, but some .* tokens have no score",
    ):
        parts.logp(PackedDocument(1, 3, int(parts.lengths[1][3])))


def test_other_scores_than_the_stage_began_with_are_refused(trainer: Make, scores: Manifest) -> None:
    it: list[Trainer] = []
    it.append(trainer(RecordingReporter(stop_after(1, lambda: it[0].context))))
    with pytest.raises(Terminated):
        it[0].run()
    other = replace(it[0].context, scores=replace(scores, facts={**scores.facts, "id": "f" * 64}))
    with pytest.raises(
        Permanent, match=r"began with the teacher's scores 0123.*, but would continue with ffff"
    ):
        start_of(other, it[0].learner)
