"""OnPolicy stages on a real store with the sampler and teacher of fake_onpolicy_peers.py.

The order of steps, published versions, exact resumption after a kill, drift, starvation, and early ends.
"""

import contextlib
import json
import pickle
import random
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.fakes import datasets, onpolicy_ranks, students, trainers
from tests.fakes.checkpoints import equal_states
from tests.fakes.fake_onpolicy_peers import FakePeers
from tests.fakes.onpolicy_ranks import PeerReporter
from tests.fakes.ranks import run_ranks
from tests.fakes.students import new_seed
from vpmoe.api.metrics import line_time
from vpmoe.checkpoint.train_state import TrainState, WindowStats, list_iterations, load_stage_end
from vpmoe.data import canary
from vpmoe.data.mixture import interleave
from vpmoe.failure import Permanent, Terminated
from vpmoe.model.learner import Learner
from vpmoe.model.objective import Objective
from vpmoe.rollout import back_pressure, policy_version
from vpmoe.storage import Bucket, manifest, paths
from vpmoe.storage.manifest import Manifest
from vpmoe.trainer.data import collate
from vpmoe.trainer.onpolicy import starvation, window_stats, window_wait
from vpmoe.trainer.stages.on_policy import OnPolicyStage
from vpmoe.trainer.trainer import Trainer

pytestmark = pytest.mark.usefixtures("device")
TOKENS, ANCHOR, STALENESS, EVERY = 1500, 0.3, 1, 2
ONPOLICY = {
    "kind": "OnPolicy",
    "tokens": TOKENS,
    "anchor": ANCHOR,
    "staleness": STALENESS,
    "publishEvery": EVERY,
    "require": {"validity": 0},
    "optimizer": {"learningRate": 3e-3, "minLearningRate": 1e-4, "warmupTokens": 0},
    "rollout": {"promptsPerWindow": 4, "maxTokens": {"low": 8, "medium": 12, "high": 16}},
    "curriculum": [
        {"share": 0.5, "effort": {"low": 0.5, "medium": 0.5}},
        {"share": 0.5, "effort": {"medium": 0.5, "high": 0.5}, "rolloutsPerPromptAtEnd": 2},
    ],
}


@pytest.fixture
def spec(run_spec: dict[str, Any]) -> dict[str, Any]:
    run_spec["spec"]["dataset"]["maxLength"] = 64
    run_spec["spec"]["student"]["gpus"] = 2
    run_spec["spec"]["training"] |= {
        "sequenceLength": 64,
        "globalBatchTokens": 128,
        "checkpoint": {"everyTokens": 400, "keep": 9},
    }
    run_spec["spec"]["stages"] = [{"name": "onpolicy", **ONPOLICY}, {"name": "again", **ONPOLICY}]
    run_spec["spec"]["evaluation"] |= {"everyTokens": 800}
    return run_spec


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> list[datasets.Documents]:
    monkeypatch.setattr(collate, "PADDING", 0)  # the small vocabulary has no other
    monkeypatch.setattr(canary, "load_texts", students.load_canary)  # nor the ids of real texts
    monkeypatch.setattr(window_wait, "POLL", 0.01)
    documents = np.random.default_rng(11)
    return [datasets.random_documents(documents, 60), datasets.random_documents(documents, 40)]


@pytest.fixture
def dataset(bucket: Bucket, train: list[datasets.Documents]) -> Manifest:
    return datasets.write_dataset(bucket, train, [datasets.random_documents(np.random.default_rng(5), 9)])


MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def make_trainer(
    bucket: Bucket,
    spec: dict[str, Any],
    train: list[datasets.Documents],
    dataset: Manifest,
    tmp_path: Path,
    device: torch.device,
) -> MakeTrainer:
    """Makes trainers at the stage's state according to the bucket, with fake peers and a volume."""

    def make(
        uploader: PeerReporter | None = None, stage: str = "onpolicy", learner: Learner | None = None
    ) -> Trainer:
        uploader = uploader or PeerReporter()
        context = datasets.context(bucket, spec, tmp_path, dataset, stage)
        context = replace(context, weights_volume=tmp_path / "volume")
        uploader.peers = FakePeers(context, train, tmp_path)
        return trainers.trainer(context, device, learner or students.learner(device), uploader, held_out=9)

    return make


def final_state(trainer: Trainer) -> TrainState:
    found = load_stage_end(
        trainer.context.bucket, paths.checkpoints(trainer.context.run, trainer.context.stage.name)
    )
    assert found is not None
    return found[1]


def metrics_lines(trainer: Trainer, event: str = "step") -> list[dict[str, Any]]:
    assert isinstance(trainer.reporter.uploader, PeerReporter)
    return [line for line in trainer.reporter.uploader.lines if line["event"] == event]


def object_etags(trainer: Trainer, folder: str) -> dict[str, str]:
    """The ETag of each object in a folder of the stage, by its name."""
    prefix = f"{paths.run(trainer.context.run)}/{folder}/{trainer.context.stage.name}/"
    return {found.key.removeprefix(prefix): found.etag for found in trainer.context.bucket.list(prefix)}


def count_versions_on_volume(trainer: Trainer) -> list[int]:
    """A list that gets, whenever a version is added to the volume, the number of those that are there."""
    assert isinstance(trainer.stage, OnPolicyStage) and trainer.stage.publisher is not None
    volume, counts = trainer.stage.publisher._volume, []
    assert volume is not None
    add = volume.add

    def count(*given: Any) -> Path:
        folder = add(*given)
        counts.append(len(list(folder.parent.iterdir())) - 1)  # the writer's lock is beside them
        return folder

    volume.add = count  # type: ignore[method-assign]
    return counts


def test_windows_and_anchor_steps_alternate_and_versions_are_published(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    on_volume = count_versions_on_volume(trainer)
    trainer.run()
    steps, end = metrics_lines(trainer), final_state(trainer)
    kinds = [line["kind"] for line in steps]
    assert [kind == "Vanilla" for kind in kinds] == interleave(len(kinds), ANCHOR).tolist() and {
        "Vanilla",
        "OnPolicy",
    } == set(kinds)
    window_lines = [line for line in steps if line["kind"] == "OnPolicy"]
    assert [line["window"] for line in window_lines] == list(range(len(window_lines))) and len(
        window_lines
    ) > 8
    assert [line["version"] for line in window_lines] == [
        max(0, k - STALENESS) // EVERY * EVERY for k in range(len(window_lines))
    ]
    assert [line["tokens"] for line in steps] == sorted({line["tokens"] for line in steps})
    assert end.tokens == steps[-1]["tokens"] >= TOKENS > steps[-2]["tokens"] and end.finished
    assert end.windows is not None and (end.windows.trained, end.windows.next_prompt) == (
        len(window_lines),
        4 * len(window_lines),
    )
    assert end.next_sequence == 2 * kinds.count("Vanilla")
    assert steps[-1]["learningRate"] == 1e-4, (
        "the last step has the lowest rate, even past the stage's tokens"
    )
    assert isinstance(trainer.reporter.uploader, PeerReporter)
    weighted = sum(
        trainer.stage.span_weights[span] * (kl or 0) for span, kl in window_lines[-1]["reverseKl"].items()
    )
    assert trainer.reporter.uploader.progress["loss"] == pytest.approx(weighted), (
        "the reverse KL of the latest window"
    )
    weights = object_etags(trainer, "weights")
    versions = sorted({int(name[1:7]) for name in weights})
    last = window_lines[-1]["version"]
    assert (
        versions[: last // EVERY + 1] == list(range(0, last + 1, EVERY))
        and len(versions) <= last // EVERY + 2
    )
    assert all(name.endswith("/manifest.json") for name in weights), "the weights are deleted at the end"
    assert max(on_volume) == -(-STALENESS // EVERY) + 1 and len(on_volume) == len(versions)
    assert trainer.context.weights_volume is not None
    assert not list(trainer.context.weights_volume.rglob("v0*")), "the volume is empty at the end"
    for line in (
        window_lines
    ):  # its version is as old as the plan says, and on a CPU the sampler computes what the trainer does
        assert line["staleness"] == line["window"] - line["version"]
        assert line["version"] != line["window"] or all(
            abs(kl or 0) < 1e-6 for kl in line["samplerKl"].values()
        )
    assert any(max(kl or 0 for kl in line["samplerKl"].values()) > 1e-9 for line in window_lines), (
        "stale versions differ from the trainer's student"
    )


def test_the_line_of_a_window_has_its_metrics(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    trainer.run()
    line = metrics_lines(trainer)[0]
    assert (line["window"], line["version"], line["phase"], line["turns"], line["prompts"]) == (0, 0, 0, 0, 4)
    assert (
        sum(line["rollouts"].values()) == 4
        and line["rollouts"].keys() == line["validity"].keys() == line["lengths"].keys()
    )
    assert all(sum(shares.values()) == pytest.approx(1) for shares in line["validity"].values())
    assert (
        all(lengths["mean"] <= lengths["max"] <= 12 for lengths in line["lengths"].values())
        and line["waitRollouts"] > 0
        and line["waitScores"] >= 0
    )
    assert line["buffer"].keys() == {"sampled", "scored"} and sum(
        line["exercises"].values()
    ) == pytest.approx(1)
    assert "window" not in next(line for line in metrics_lines(trainer) if line["kind"] == "Vanilla")
    start, evaluations = metrics_lines(trainer, "start")[0], metrics_lines(trainer, "evaluation")
    assert (start["windows"], start["firstPrompt"], start["steps"], start["stageTokens"]) == (
        0,
        0,
        None,
        TOKENS,
    )
    assert (
        evaluations[0]["reverseKl"] is None
        and 0 <= evaluations[-1]["validity"] <= 1
        and "heldOut" in evaluations[-1]
    )
    assert len(evaluations) > 2 and all(line["canary"]["bytes"] == 1000 for line in evaluations)
    bits = [line["canary"]["bitsPerByte"] for line in evaluations]
    assert len(set(bits)) == len(bits), "measured with the weights of each evaluation"
    prometheus = trainer.context.board.metrics.render(None).decode()
    for series in (
        'train_reverse_kl_nats{role="",run="",span="final"',
        "train_sampler_kl_nats{",
        "train_window_staleness{",
        "train_canary_bits_per_byte{",
        'train_ready_windows{role="",run="",stage="",state="scored"',
        'train_window_valid_ratio{effort="',
    ):
        assert f"\nvpmoe_{series}" in prometheus
    waits = [
        line["waitRollouts"] + line["waitScores"] + line["waitUpload"]
        for line in metrics_lines(trainer)
        if "window" in line
    ]
    counted = re.findall(r"vpmoe_wait_seconds_total{.*} (.*)", prometheus)
    assert sum(map(float, counted)) == pytest.approx(sum(waits))


def test_a_window_has_the_wait_for_the_upload_before_beside_its_seconds(
    make_trainer: MakeTrainer, spec: dict[str, Any]
) -> None:
    """Its line is as old as its step, before the wait."""
    spec["spec"]["stages"][0]["tokens"] = 600
    trainer = make_trainer()
    assert isinstance(trainer.stage, OnPolicyStage) and trainer.stage.publisher is not None
    publish, began = trainer.stage.publisher.publish, {}

    def after_a_wait(learner: Learner, at: TrainState, oldest: int) -> float:
        began[at.steps] = line_time()
        return publish(learner, at, oldest) + 1000.0

    trainer.stage.publisher.publish = after_a_wait  # type: ignore[method-assign]
    trainer.run()
    lines = metrics_lines(trainer)
    windows = [line for line in lines if "window" in line]
    due = [(line["window"] + 1) % EVERY == 0 for line in windows]
    assert [line["waitUpload"] >= 1000 for line in windows[:-1]] == due[:-1]
    assert {line["waitUpload"] for line, published in zip(windows, due, strict=True) if not published} == {0}
    assert all(line["seconds"] < 1000 and line["time"] <= began.get(line["step"], "9") for line in lines)


class Killed(BaseException):
    """Ends a trainer as a kill does: nothing more is reported or saved."""


class KilledReporter(PeerReporter):
    def __init__(self, at: int) -> None:
        super().__init__()
        self._at = at

    def update(self, **changes: Any) -> None:
        super().update(**changes)
        self._at -= 1
        if self._at == 0:
            raise Killed


def test_a_killed_stage_ends_with_the_same_bits_and_publishes_no_version_twice(
    make_trainer: MakeTrainer, spec: dict[str, Any]
) -> None:
    generator = random.Random(new_seed())
    spec["metadata"]["name"] = "alone"
    uninterrupted = make_trainer()
    uninterrupted.run()
    spec["metadata"]["name"] = "killed"
    published: dict[str, str] = {}
    for _ in range(5):
        killed = make_trainer(KilledReporter(generator.randint(1, 25)))
        with contextlib.suppress(Killed):
            killed.run()
        killed.stage.close()  # a kill would end these threads; here they finish their work
        killed.checkpoints.close()
        manifests = {
            name: etag
            for name, etag in object_etags(killed, "weights").items()
            if name.endswith("manifest.json")
        }
        assert published.items() <= manifests.items(), "no version is published again"
        published = manifests
    trainer = make_trainer()
    trainer.run()
    assert equal_states(trainer.learner, uninterrupted.learner) and final_state(trainer) == final_state(
        uninterrupted
    )
    assert object_etags(trainer, "rollouts").keys() == object_etags(uninterrupted, "rollouts").keys()
    assert published.items() <= object_etags(trainer, "weights").items()


def test_a_waiting_trainer_stops_at_once_and_saves(make_trainer: MakeTrainer) -> None:
    class StoppingReporter(PeerReporter):
        def update(self, **changes: Any) -> None:
            super().update(**changes) if "window 2" not in changes.get(
                "message", ""
            ) else trainer.context.stopping.set()

    trainer = make_trainer(StoppingReporter())
    with pytest.raises(Terminated, match="Stopped after step 2, all of it saved"):
        trainer.run()
    assert list_iterations(trainer.context.bucket, paths.checkpoints(trainer.context.run, "onpolicy"))[0] == 2
    position = make_trainer().start.state
    assert position.windows is not None and (
        position.steps,
        position.windows.trained,
        position.windows.next_prompt,
    ) == (2, 2, 8)


def test_the_next_stage_continues_with_the_next_prompts(
    make_trainer: MakeTrainer, spec: dict[str, Any]
) -> None:
    for stage in spec["spec"]["stages"]:
        stage["tokens"] = 500
    first = make_trainer()
    first.run()
    second = make_trainer(stage="again")
    position = second.start.state
    assert position.windows is not None and first.reporter.uploader is not None
    assert (
        position.windows.first_prompt
        == position.windows.next_prompt
        == final_state(first).windows.next_prompt
    )  # type: ignore[union-attr]
    assert (position.windows.trained, position.windows.digest) == (0, "")
    second.run()
    found = policy_version.find_version(second.context.bucket, second.context.run, "again", 0)
    assert (
        found is not None
        and found[1].first_prompt == position.windows.first_prompt
        and found[1].first_sequence > 0
    )


def test_a_sampler_that_computes_another_student_fails_the_stage(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window_stats, "PATIENCE", 3)
    reporter = PeerReporter()
    trainer = make_trainer(reporter)
    reporter.peers.sampler_logp = lambda logp_C: logp_C - np.float32(1)
    with pytest.raises(
        Permanent,
        match=r"SamplerDrift: .* maxSamplerKl 0.1 for 3 windows in a row, 0\.7.* in window 2; the weights",
    ):
        trainer.run()
    assert [line["kind"] for line in metrics_lines(trainer)].count(
        "OnPolicy"
    ) == 2 and trainer.learner.steps == len(metrics_lines(trainer))


def spoil_step(trainer: Trainer, bad: int) -> list[WindowStats]:
    """Make the weights infinite during the forward of step `bad` (from 0), and only then. The list gets the
    sums over windows before and after that step."""
    objective, after_step, sums = trainer.stage.objective, trainer.stage.after_step, []
    weight = trainer.learner.student.embedding.weight
    kept = torch.empty_like(weight)

    def spoiling(step: int, counts: torch.Tensor) -> Objective:
        if step == bad:
            kept.copy_(weight)
            weight.data.fill_(torch.inf)
        return objective(step, counts)

    def restoring(learner: Learner, state: TrainState, seconds: float) -> None:
        if state.steps == bad + 1:
            weight.data.copy_(kept)
        if bad <= state.steps <= bad + 1 and state.windows is not None:
            sums.append(state.windows.since)
        after_step(learner, state, seconds)

    trainer.stage.objective, trainer.stage.after_step = spoiling, restoring  # type: ignore[method-assign]
    return sums


@pytest.mark.parametrize("kind, bad", [("OnPolicy", 4), ("Vanilla", 3)])
def test_a_bad_step_is_skipped_and_its_window_counts_as_read(
    make_trainer: MakeTrainer, spec: dict[str, Any], kind: str, bad: int
) -> None:
    """The windows go on, each once, and none of the bad numbers is in what evaluations sum up. A trainer that
    was killed after the step ends with the same bits and state."""
    spec["metadata"]["name"] = "alone"
    spec["spec"]["stages"][0]["tokens"] = 900  # an evaluation before the last one
    trainer = make_trainer()
    assert trainer.stage.plan.kind(bad) == kind
    sums = spoil_step(trainer, bad)
    trainer.run()
    assert len(sums) == 2 and sums[0] == sums[1]
    end = final_state(trainer)
    (skipped,) = end.skipped
    assert (skipped.step, skipped.kind, skipped.loss) == (bad + 1, kind, "nan")
    assert end.windows is not None and end.updates == end.steps - 1 == trainer.learner.steps
    windows = [line["window"] for line in metrics_lines(trainer) if line["kind"] == "OnPolicy"]
    (line,) = metrics_lines(trainer, "skipped")
    if kind == "OnPolicy":
        assert skipped.batch.window == line["batch"]["window"] and skipped.batch.first_sequence is None
        assert sorted([*windows, skipped.batch.window]) == list(range(end.windows.trained))
        prompts = sum(map(len, skipped.batch.documents.values()))
        assert prompts == ONPOLICY["rollout"]["promptsPerWindow"]  # type: ignore[index]
    else:
        assert windows == list(range(end.windows.trained))
        assert (skipped.batch.window, skipped.batch.sequences) == (None, 2)

    spec["metadata"]["name"] = "killed"

    def kill(step: int) -> None:
        if step == bad + 2:
            raise Killed

    killed = make_trainer(PeerReporter(kill))
    spoil_step(killed, bad)
    with pytest.raises(Killed):
        killed.run()
    killed.stage.close()  # a kill would end these threads; here they finish their work
    killed.checkpoints.close()
    resumed = make_trainer()
    spoil_step(resumed, bad)
    resumed.run()
    assert equal_states(resumed.learner, trainer.learner) and final_state(resumed) == end


@pytest.mark.parametrize(
    "changes, message",
    [
        pytest.param({"weights": "x" * 64}, f"weights is {'x' * 64}, not [0-9a-f]*", id="other-weights"),
        pytest.param({"seen": 7}, "seen is 7, not [0-9]*", id="other-tokens-seen"),
        pytest.param(
            {"run": "default/other-01234567"},
            "run is default/other-01234567, not default/tiny-run-01234567",
            id="another-run",
        ),
        pytest.param({"last": True}, "last is True, not False", id="wrong-last"),
    ],
)
def test_a_window_that_is_not_due_is_rejected_with_its_name(
    make_trainer: MakeTrainer, changes: dict[str, Any], message: str
) -> None:
    reporter = PeerReporter()
    trainer = make_trainer(reporter)
    reporter.peers.change_header = lambda header: (
        header.model_copy(update=changes) if header.window == 1 else header
    )
    with pytest.raises(
        Permanent,
        match=(
            rf"rollouts/onpolicy/window-000001.rollouts.arrow: {message}\. "
            r"It is not the window .* Delete it"
        ),
    ):
        trainer.run()
    assert trainer.learner.steps == 1


def test_a_starved_trainer_writes_an_adjustment_before_it_publishes(
    make_trainer: MakeTrainer, spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec["spec"]["stages"][0]["backPressure"] = {"waiting": 1e-6, "windows": 2}
    adjustments_at_version: list[tuple[int, list[back_pressure.Adjustment]]] = []
    write = manifest.write

    def recording_write(bucket: Bucket, key: str, statement: Any) -> Manifest:
        facts = statement["predicate"]["buildDefinition"]["internalParameters"]
        adjustments_at_version.append(
            (facts["version"], back_pressure.read_adjustments(bucket, trainer.context.run, "onpolicy"))
        )
        return write(bucket, key, statement)

    monkeypatch.setattr(manifest, "write", recording_write)
    trainer = make_trainer()
    trainer.checkpoints.save = lambda *_: None  # type: ignore[method-assign] # its manifests are written by the same function
    trainer.run()
    adjustments = back_pressure.read_adjustments(trainer.context.bucket, trainer.context.run, "onpolicy")
    assert [adjustment.number for adjustment in adjustments] == list(range(1, len(adjustments) + 1)) and len(
        adjustments
    ) >= 3
    assert [adjustment.setting for adjustment in adjustments] == list(
        back_pressure.ADJUSTMENTS[: len(adjustments)]
    )
    for number, at_publication in adjustments_at_version:
        assert [
            adjustment.window for adjustment in at_publication if adjustment.window == number + STALENESS
        ] == [adjustment.window for adjustment in adjustments if adjustment.window == number + STALENESS]
    windows = {line["window"]: line for line in metrics_lines(trainer) if line["kind"] == "OnPolicy"}
    assert all(
        line["turns"] == len(back_pressure.applies_to(adjustments, number))
        for number, line in windows.items()
    )
    conditions = [
        condition
        for condition in trainer.reporter.uploader.progress["conditions"]
        if condition.type == "TrainerStarved"
    ]  # type: ignore[union-attr]
    assert [condition.reason for condition in conditions] == [
        starvation.REASONS[adjustments[-1].setting][0]
    ] and f"from window {adjustments[-1].window} on" in conditions[0].message
    restarted = make_trainer(stage="onpolicy")
    assert restarted.stage.conditions() == [starvation.starvation_condition(adjustments[-1])], (
        "another attempt reports it too"
    )


def test_an_adjustment_is_written_once_if_the_trainer_is_killed_before_it_publishes(
    make_trainer: MakeTrainer, spec: dict[str, Any]
) -> None:
    spec["spec"]["stages"][0] |= {"tokens": 600, "backPressure": {"waiting": 1e-6, "windows": 2}}
    killed = make_trainer()
    assert isinstance(killed.stage, OnPolicyStage) and killed.stage.publisher is not None
    publisher = killed.stage.publisher
    publish = publisher.publish

    def publish_or_die(learner: Learner, position: TrainState, oldest: int) -> None:
        if position.windows is not None and position.windows.trained == 2:
            raise Killed
        publish(learner, position, oldest)

    publisher.publish = publish_or_die  # type: ignore[method-assign]
    with pytest.raises(Killed):
        killed.run()
    before = back_pressure.read_adjustments(killed.context.bucket, killed.context.run, "onpolicy")
    assert [(adjustment.number, adjustment.window) for adjustment in before] == [
        (1, 2 + STALENESS)
    ] and not publisher.exists(2)
    trainer = make_trainer()
    trainer.run()
    adjustments = back_pressure.read_adjustments(trainer.context.bucket, trainer.context.run, "onpolicy")
    assert adjustments[:1] == before and [adjustment.window for adjustment in adjustments] == sorted(
        {adjustment.window for adjustment in adjustments}
    )
    assert policy_version.find_version(trainer.context.bucket, trainer.context.run, "onpolicy", 2) is not None


def test_a_stage_ends_early_if_reverse_kl_no_longer_falls_and_rollouts_are_valid(
    make_trainer: MakeTrainer, spec: dict[str, Any]
) -> None:
    tokens = 1000
    spec["spec"]["evaluation"]["everyTokens"] = 300
    stop = {"evaluations": 1, "minImprovement": 0.9, "minValidity": 0.0}
    spec["spec"]["stages"][0] |= {"tokens": tokens, "stop": stop}
    trainer = make_trainer()
    trainer.run()
    end = final_state(trainer)
    assert end.windows is not None and 300 <= end.tokens < tokens and len(end.windows.reverse_kl) == 2
    spec["metadata"]["name"] = "never-valid"
    stop["minValidity"] = 1.0
    trainer = make_trainer()
    trainer.run()
    assert final_state(trainer).tokens >= tokens


@pytest.fixture
def run_two_ranks(
    bucket: Bucket, spec: dict[str, Any], train: list[datasets.Documents], dataset: Manifest, tmp_path: Path
) -> Callable[..., list[Any]]:
    """Runs the stage as two ranks that share the experts (onpolicy_ranks.py).

    Returns the results of the ranks, or their exit codes if one of them is killed.
    """

    def run(name: str, kill: str = "") -> list[Any]:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        spec["metadata"]["name"] = name
        spec["spec"]["student"] |= {"gpus": 4, "expertParallel": 2}  # half of the GPUs are the sampler's
        (folder / "task.json").write_text(json.dumps({"spec": spec, "dataset": dataset.key}))
        (folder / "documents").write_bytes(pickle.dumps(train))
        codes = run_ranks(onpolicy_ranks.main, folder, KILL=kill)
        if kill:
            return codes
        assert codes == [0, 0]
        return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]

    return run


def test_two_ranks_train_as_one_and_a_killed_rank_changes_no_bit(
    make_trainer: MakeTrainer, spec: dict[str, Any], run_two_ranks: Any
) -> None:
    """The peers verify each version, so versions published by ranks that share the experts are complete."""
    spec["spec"]["stages"][0]["tokens"] = 500
    one_rank = make_trainer()
    one_rank.run()
    two_ranks = run_two_ranks("two")
    for line_of_one, line_of_two in zip(
        metrics_lines(one_rank)[:4], two_ranks[0]["lines"], strict=False
    ):  # windows of version 0, and an anchor step
        assert (line_of_one["kind"], line_of_one["tokens"], line_of_one["targets"]) == (
            line_of_two["kind"],
            line_of_two["tokens"],
            line_of_two["targets"],
        )
        for name, tolerance in (("loss", 1e-4), ("gradientNorm", 1e-3)):
            assert line_of_two[name] == pytest.approx(line_of_one[name], rel=tolerance)
    assert max(line.get("version", 0) for line in two_ranks[0]["lines"]) > 0
    generator = random.Random(new_seed())
    assert -signal.SIGKILL in run_two_ranks(
        "killed", kill=f"{generator.randrange(2)}:{generator.randrange(1, len(two_ranks[0]['lines']))}"
    )
    resumed = run_two_ranks("killed")
    for rank in range(2):
        assert resumed[rank]["position"] == two_ranks[rank]["position"], (
            "each window is trained once, in order, with the same bytes"
        )
        for name, slices in two_ranks[rank]["state"].items():
            assert all(
                torch.equal(after[1], before[1])
                for after, before in zip(resumed[rank]["state"][name], slices, strict=True)
            ), name
