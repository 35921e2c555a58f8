"""OnPolicy stages on a real store, with fake_onpolicy_peers.py as sampler and teacher: the order of steps,
what is published, that a kill changes no bit and trains nothing twice, drift, starving, the end."""

import contextlib
import json
import pickle
import random
import signal
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.fakes import datasets, onpolicy_ranks, students, trainers
from tests.fakes.checkpoints import same
from tests.fakes.fake_onpolicy_peers import FakePeers
from tests.fakes.onpolicy_ranks import PeerReporter
from tests.fakes.ranks import run_ranks
from tests.fakes.students import new_seed
from vpmoe.checkpoint.train_state import TrainState, list_iterations, load_stage_end
from vpmoe.data.mixture import interleave
from vpmoe.failure import Permanent, Terminated
from vpmoe.model.learner import Learner
from vpmoe.process.launcher import free_port
from vpmoe.rollout import back_pressure, policy_version
from vpmoe.storage import Bucket, paths
from vpmoe.storage.manifest import Manifest
from vpmoe.trainer.data import collate
from vpmoe.trainer.onpolicy import publisher, starvation, window_stats, window_wait
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
    monkeypatch.setattr(window_wait, "POLL", 0.01)
    documents = np.random.default_rng(11)
    return [datasets.random_documents(documents, 60), datasets.random_documents(documents, 40)]


@pytest.fixture
def dataset(bucket: Bucket, train: list[datasets.Documents]) -> Manifest:
    return datasets.write(bucket, train, [datasets.random_documents(np.random.default_rng(5), 9)])


Make = Callable[..., Trainer]


@pytest.fixture
def trainer(
    bucket: Bucket,
    spec: dict[str, Any],
    train: list[datasets.Documents],
    dataset: Manifest,
    tmp_path: Path,
    device: torch.device,
) -> Make:
    """A trainer that stands where the bucket says the stage stands, with fake peers."""

    def make(
        uploader: PeerReporter | None = None, stage: str = "onpolicy", learner: Learner | None = None
    ) -> Trainer:
        uploader = uploader or PeerReporter()
        context = datasets.context(bucket, spec, tmp_path, dataset, stage)
        uploader.peers = FakePeers(context, train, tmp_path)
        return trainers.trainer(context, device, learner or students.learner(device), uploader, held_out=9)

    return make


def reached(it: Trainer) -> TrainState:
    found = load_stage_end(it.context.bucket, paths.checkpoints(it.context.run, it.context.stage.name))
    assert found is not None
    return found[1]


def lines_of(it: Trainer, event: str = "step") -> list[dict[str, Any]]:
    assert isinstance(it.reporter.uploader, PeerReporter)
    return [line for line in it.reporter.uploader.lines if line["event"] == event]


def objects(it: Trainer, folder: str) -> dict[str, str]:
    """ETag of everything in a folder of the stage."""
    prefix = f"{paths.run(it.context.run)}/{folder}/{it.context.stage.name}/"
    return {found.key.removeprefix(prefix): found.etag for found in it.context.bucket.list(prefix)}


def test_windows_and_anchor_steps_alternate_and_versions_are_published_on_the_way(trainer: Make) -> None:
    it = trainer()
    it.run()
    steps, end = lines_of(it), reached(it)
    kinds = [line["kind"] for line in steps]
    assert [kind == "Vanilla" for kind in kinds] == interleave(len(kinds), ANCHOR).tolist() and {
        "Vanilla",
        "OnPolicy",
    } == set(kinds)
    of_windows = [line for line in steps if line["kind"] == "OnPolicy"]
    assert [line["window"] for line in of_windows] == list(range(len(of_windows))) and len(of_windows) > 8
    assert [line["version"] for line in of_windows] == [
        max(0, k - STALENESS) // EVERY * EVERY for k in range(len(of_windows))
    ]
    assert [line["tokens"] for line in steps] == sorted({line["tokens"] for line in steps})
    assert end.tokens == steps[-1]["tokens"] >= TOKENS > steps[-2]["tokens"] and end.finished
    assert end.windows is not None and (end.windows.trained, end.windows.next_prompt) == (
        len(of_windows),
        4 * len(of_windows),
    )
    assert end.next_sequence == 2 * kinds.count("Vanilla")
    assert steps[-1]["learningRate"] == 1e-4, "the last step has the lowest rate, whatever it overshoots by"
    assert isinstance(it.reporter.uploader, PeerReporter)
    weighted = sum(
        it.stage.span_weights[span] * (kl or 0) for span, kl in of_windows[-1]["reverseKl"].items()
    )
    assert it.reporter.uploader.progress["loss"] == pytest.approx(weighted), "the latest window's reverse KL"
    weights = objects(it, "weights")
    versions = sorted({int(name[1:7]) for name in weights})
    last = of_windows[-1]["version"]
    assert (
        versions[: last // EVERY + 1] == list(range(0, last + 1, EVERY))
        and len(versions) <= last // EVERY + 2
    )
    assert all(name.endswith("/manifest.json") for name in weights), "nobody needs their weights any more"
    for line in (
        of_windows
    ):  # its version is as old as the plan says, and on a CPU the sampler computes what the trainer does
        assert line["staleness"] == line["window"] - line["version"]
        assert line["version"] != line["window"] or all(
            abs(kl or 0) < 1e-6 for kl in line["samplerKl"].values()
        )
    assert any(max(kl or 0 for kl in line["samplerKl"].values()) > 1e-9 for line in of_windows), (
        "stale versions are other students"
    )


def test_a_step_of_a_window_says_what_the_window_was(trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("VPMOE_METRICS_PORT", str(port))
    it = trainer()
    it.run()
    line = lines_of(it)[0]
    assert (line["window"], line["version"], line["phase"], line["turns"], line["prompts"]) == (0, 0, 0, 0, 4)
    assert (
        sum(line["rollouts"].values()) == 4
        and line["rollouts"].keys() == line["validity"].keys() == line["lengths"].keys()
    )
    assert all(sum(shares.values()) == pytest.approx(1) for shares in line["validity"].values())
    assert (
        all(of["mean"] <= of["max"] <= 12 for of in line["lengths"].values())
        and line["waitRollouts"] > 0
        and line["waitScores"] >= 0
    )
    assert line["buffer"].keys() == {"sampled", "scored"} and sum(
        line["exercises"].values()
    ) == pytest.approx(1)
    assert "window" not in next(line for line in lines_of(it) if line["kind"] == "Vanilla")
    start, evaluations = lines_of(it, "start")[0], lines_of(it, "evaluation")
    assert (start["windows"], start["firstPrompt"], start["steps"], start["stageTokens"]) == (
        0,
        0,
        None,
        TOKENS,
    )
    assert (
        "reverseKl" not in evaluations[0]
        and 0 <= evaluations[-1]["validity"] <= 1
        and "heldOut" in evaluations[-1]
    )
    shown = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    for name in (
        'reverse_kl{namespace="default",run="tiny-run",span="final"',
        "sampler_kl{",
        "window_staleness{",
        "wait_rollouts_seconds{",
    ):
        assert f"vpmoe_train_{name}" in shown
    assert 'vpmoe_train_buffer_windows{kind="scored"' in shown and 'vpmoe_train_valid_ratio{effort="' in shown


class Killed(BaseException):
    """Ends a trainer in the midst of what it does, with nothing said or saved."""


class Dying(PeerReporter):
    def __init__(self, at: int) -> None:
        super().__init__()
        self._at = at

    def update(self, **changes: Any) -> None:
        super().update(**changes)
        self._at -= 1
        if self._at == 0:
            raise Killed


@pytest.mark.parametrize(
    "kills", [pytest.param(2, id="killed-twice"), pytest.param(5, id="killed-five-times")]
)
def test_a_stage_that_was_killed_ends_at_the_same_bits_and_trains_nothing_twice(
    trainer: Make, spec: dict[str, Any], kills: int
) -> None:
    chance = random.Random(new_seed())
    spec["metadata"]["name"] = "alone"
    whole = trainer()
    whole.run()
    spec["metadata"]["name"] = "killed"
    published: dict[str, str] = {}
    for _ in range(kills):
        dying = trainer(Dying(chance.randint(1, 25)))
        with contextlib.suppress(Killed):
            dying.run()
        dying.stage.close()  # a real kill ends these threads; here their work ends first
        dying.checkpoints.close()
        now = {
            name: etag for name, etag in objects(dying, "weights").items() if name.endswith("manifest.json")
        }
        assert published.items() <= now.items(), "no version is published again"
        published = now
    it = trainer()
    it.run()
    assert same(it.learner, whole.learner) and reached(it) == reached(whole)
    assert objects(it, "rollouts").keys() == objects(whole, "rollouts").keys()
    assert published.items() <= objects(it, "weights").items()


def test_who_waits_stops_at_once_and_saves(trainer: Make) -> None:
    class Silent(PeerReporter):
        def update(self, **changes: Any) -> None:
            super().update(**changes) if "window 2" not in changes.get(
                "message", ""
            ) else it.context.stopping.set()

    it = trainer(Silent())
    with pytest.raises(Terminated, match="Stopped after step 2, all of it saved"):
        it.run()
    assert list_iterations(it.context.bucket, paths.checkpoints(it.context.run, "onpolicy"))[0] == 2
    position = trainer().start.state
    assert position.windows is not None and (
        position.steps,
        position.windows.trained,
        position.windows.next_prompt,
    ) == (2, 2, 8)


def test_the_next_stage_goes_on_with_the_prompts(trainer: Make) -> None:
    first = trainer()
    first.run()
    second = trainer(stage="again")
    position = second.start.state
    assert position.windows is not None and first.reporter.uploader is not None
    assert position.windows.first_prompt == position.windows.next_prompt == reached(first).windows.next_prompt  # type: ignore[union-attr]
    assert (position.windows.trained, position.windows.digest) == (0, "")
    second.run()
    found = policy_version.find_version(second.context.bucket, second.context.run, "again", 0)
    assert (
        found is not None
        and found[1].first_prompt == position.windows.first_prompt
        and found[1].first_sequence > 0
    )


def test_a_sampler_that_computes_another_student_fails_the_stage(
    trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window_stats, "PATIENCE", 3)
    report = PeerReporter()
    it = trainer(report)
    report.peers.sampler_logp = lambda logp_C: logp_C - np.float32(1)
    with pytest.raises(
        Permanent,
        match=r"SamplerDrift: .* maxSamplerKl 0.1 for 3 windows in a row, 0\.7.* in window 2; the weights",
    ):
        it.run()
    assert [line["kind"] for line in lines_of(it)].count("OnPolicy") == 2 and it.learner.steps == len(
        lines_of(it)
    )


@pytest.mark.parametrize(
    "changes, words",
    [
        pytest.param({"weights": "x" * 64}, f"weights is {'x' * 64}, not [0-9a-f]*", id="other-weights"),
        pytest.param({"seen": 7}, "seen is 7, not [0-9]*", id="other-tokens-before"),
        pytest.param(
            {"run": "default/other-01234567"},
            "run is default/other-01234567, not default/tiny-run-01234567",
            id="another-run",
        ),
        pytest.param({"last": True}, "last is True, not False", id="an-end-that-is-none"),
    ],
)
def test_a_window_that_is_not_due_ends_the_stage_with_its_name(
    trainer: Make, changes: dict[str, Any], words: str
) -> None:
    report = PeerReporter()
    it = trainer(report)
    report.peers.says = lambda about: about.model_copy(update=changes) if about.window == 1 else about
    with pytest.raises(
        Permanent,
        match=rf"rollouts/onpolicy/window-000001.rollouts.arrow: {words}\. It is not the window .* Delete it",
    ):
        it.run()
    assert it.learner.steps == 1


def test_a_trainer_that_starves_turns_a_knob_before_it_publishes(
    trainer: Make, spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec["spec"]["stages"][0]["backPressure"] = {"waiting": 1e-6, "windows": 2}
    seen: list[tuple[int, list[back_pressure.Adjustment]]] = []
    write = publisher.manifest.write

    def spying(bucket: Bucket, key: str, made: Any) -> Manifest:
        facts = made["predicate"]["buildDefinition"]["internalParameters"]
        seen.append((facts["version"], back_pressure.read_adjustments(bucket, it.context.run, "onpolicy")))
        return write(bucket, key, made)

    monkeypatch.setattr(publisher.manifest, "write", spying)
    it = trainer()
    it.checkpoints.save = lambda *_: None  # type: ignore[method-assign] # its manifests are written by the same function
    it.run()
    found = back_pressure.read_adjustments(it.context.bucket, it.context.run, "onpolicy")
    assert [turn.number for turn in found] == list(range(1, len(found) + 1)) and len(found) >= 3
    assert [turn.setting for turn in found] == list(back_pressure.ADJUSTMENTS[: len(found)])
    for number, known in seen:
        assert [turn.window for turn in known if turn.window == number + STALENESS] == [
            turn.window for turn in found if turn.window == number + STALENESS
        ]
    windows = {line["window"]: line for line in lines_of(it) if line["kind"] == "OnPolicy"}
    assert all(
        line["turns"] == len(back_pressure.applies_to(found, number)) for number, line in windows.items()
    )
    shown = [
        condition
        for condition in it.reporter.uploader.progress["conditions"]
        if condition.type == "TrainerStarved"
    ]  # type: ignore[union-attr]
    assert [condition.reason for condition in shown] == [
        starvation.REASONS[found[-1].setting][0]
    ] and f"from window {found[-1].window} on" in shown[0].message
    again = trainer(stage="onpolicy")
    assert again.stage.conditions() == [starvation.starvation_condition(found[-1])], "another attempt knows"


def test_a_turn_is_written_once_though_its_writer_dies_before_it_publishes(
    trainer: Make, spec: dict[str, Any]
) -> None:
    spec["spec"]["stages"][0] |= {"tokens": 600, "backPressure": {"waiting": 1e-6, "windows": 2}}
    dying = trainer()
    assert isinstance(dying.stage, OnPolicyStage) and dying.stage.publisher is not None
    publisher = dying.stage.publisher
    publishes = publisher.publish

    def publish_or_die(learner: Learner, position: TrainState) -> None:
        if position.windows is not None and position.windows.trained == 2:
            raise Killed
        publishes(learner, position)

    publisher.publish = publish_or_die  # type: ignore[method-assign]
    with pytest.raises(Killed):
        dying.run()
    first = back_pressure.read_adjustments(dying.context.bucket, dying.context.run, "onpolicy")
    assert [(turn.number, turn.window) for turn in first] == [(1, 2 + STALENESS)] and not publisher.exists(2)
    it = trainer()
    it.run()
    found = back_pressure.read_adjustments(it.context.bucket, it.context.run, "onpolicy")
    assert found[:1] == first and [turn.window for turn in found] == sorted({turn.window for turn in found})
    assert policy_version.find_version(it.context.bucket, it.context.run, "onpolicy", 2) is not None


def test_a_stage_ends_early_where_reverse_kl_no_longer_falls_and_rollouts_are_valid(
    trainer: Make, spec: dict[str, Any]
) -> None:
    spec["spec"]["evaluation"]["everyTokens"] = 300
    spec["spec"]["stages"][0]["stop"] = {"evaluations": 1, "minImprovement": 0.9, "minValidity": 0.0}
    it = trainer()
    it.run()
    end = reached(it)
    assert end.windows is not None and 300 <= end.tokens < TOKENS and len(end.windows.reverse_kl) == 2
    spec["metadata"]["name"] = "never-valid"
    spec["spec"]["stages"][0]["stop"]["minValidity"] = 1.0
    it = trainer()
    it.run()
    assert reached(it).tokens >= TOKENS


@pytest.fixture
def two(
    bucket: Bucket, spec: dict[str, Any], train: list[datasets.Documents], dataset: Manifest, tmp_path: Path
) -> Callable[..., list[Any]]:
    """Runs the stage as two ranks that share the experts; what each came to, or their exit codes where one is
    to be killed. See onpolicy_ranks.py."""

    def run(name: str, kill: str = "") -> list[Any]:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        spec["metadata"]["name"] = name
        spec["spec"]["student"] |= {"gpus": 4, "expertParallel": 2}  # half of them would sample
        (folder / "task.json").write_text(json.dumps({"spec": spec, "dataset": dataset.key}))
        (folder / "documents").write_bytes(pickle.dumps(train))
        codes = run_ranks(onpolicy_ranks.main, folder, KILL=kill)
        if kill:
            return codes
        assert codes == [0, 0]
        return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]

    return run


def test_two_ranks_train_as_one_does_and_one_that_is_killed_changes_no_bit(
    trainer: Make, spec: dict[str, Any], two: Any
) -> None:
    """The peers verify each version, so what ranks that share the experts publish is the whole student."""
    spec["spec"]["stages"][0]["tokens"] = 500
    alone = trainer()
    alone.run()
    whole = two("two")
    for ours, theirs in zip(
        lines_of(alone)[:4], whole[0]["lines"], strict=False
    ):  # windows of version 0, and an anchor step
        assert (ours["kind"], ours["tokens"], ours["targets"]) == (
            theirs["kind"],
            theirs["tokens"],
            theirs["targets"],
        )
        for name, tolerance in (("loss", 1e-4), ("gradientNorm", 1e-3)):
            assert theirs[name] == pytest.approx(ours[name], rel=tolerance)
    assert max(line.get("version", 0) for line in whole[0]["lines"]) > 0
    chance = random.Random(new_seed())
    assert -signal.SIGKILL in two(
        "killed", kill=f"{chance.randrange(2)}:{chance.randrange(1, len(whole[0]['lines']))}"
    )
    again = two("killed")
    for rank in range(2):
        assert again[rank]["position"] == whole[rank]["position"], (
            "every window once, in order, the same bytes"
        )
        for name, of in whole[rank]["state"].items():
            assert all(
                torch.equal(now[1], then[1]) for now, then in zip(again[rank]["state"][name], of, strict=True)
            ), name
