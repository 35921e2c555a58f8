"""Configurations, orders and seeds equal the recorded ones, so a resumed run trains on the same data.

No server is needed. Values are integers, ids and orders, so they are the same on every machine.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.fakes.recorded import VALUES, plain, sha256, small_run
from vpmoe.api import DistillRun, load_run
from vpmoe.api.text import read_yaml
from vpmoe.data import packing
from vpmoe.data.mixture import interleave, mix_streams
from vpmoe.data.packing import SequenceStream
from vpmoe.evaluation import questions
from vpmoe.rollout import windows
from vpmoe.rollout.back_pressure import ADJUSTMENTS, Adjustment
from vpmoe.rollout.curriculum import Curriculum
from vpmoe.rollout.windows import WindowPlan, WindowSchedule
from vpmoe.storage import paths

EXAMPLES = Path(__file__).parents[3] / "manifests" / "examples"
SEED = 1234
PLANS = VALUES["plans"]
ONPOLICY = {
    "name": "onpolicy",
    "kind": "OnPolicy",
    "tokens": 100_000,
    "anchor": 0.3,
    "staleness": 1,
    "publishEvery": 2,
    "require": {"validity": 0},
    "optimizer": {"learningRate": 3e-3, "minLearningRate": 1e-4, "warmupTokens": 0},
    "rollout": {"promptsPerWindow": 12, "maxTokens": {"low": 64, "medium": 128, "high": 256}},
    "curriculum": [
        {"share": 0.5, "effort": {"low": 0.5, "medium": 0.5}},
        {"share": 0.5, "effort": {"low": 0.1, "medium": 0.3, "high": 0.6}, "rolloutsPerPromptAtEnd": 2},
    ],
}


def document_lengths() -> list[NDArray[np.int32]]:
    """Document lengths of three parts, one of them empty: 1 to 500, from a formula."""
    return [(1 + np.arange(n, dtype=np.int64) * 7919 % 500).astype(np.int32) for n in (700, 0, 2300)]


def on_policy_stage() -> Any:
    run = DistillRun.parse(small_run(stages=[ONPOLICY], student={"shape": "tiny", "gpus": 2}))
    return run.spec.stages[0]


@pytest.mark.parametrize("name", sorted(VALUES["runs"]))
def test_an_example_resolves_to_the_recorded_configuration_and_steps(name: str) -> None:
    document = read_yaml((EXAMPLES / f"{name}.yaml").read_text())
    document["metadata"] |= {"namespace": "team", "uid": "0a1b2c3d-0000-4000-8000-000000000001"}
    run, from_file = DistillRun.parse(document), load_run(EXAMPLES / f"{name}.yaml")
    # Since then, the last stage is exported, and there are reports.
    steps = [step for step in run.steps() if run.role(step) not in ("export", "report")]
    assert run.steps()[-2:] == tuple(f"{run.spec.stages[-1].name}-{role}" for role in ("export", "report"))
    found = {
        "configHash": run.config_hash,
        "configHashByHand": from_file.config_hash,
        "uid8ByHand": from_file.uid8,
        "folder": paths.run(run),
        "folderByHand": paths.run(from_file),
        "steps": steps,
        "roles": {step: run.role(step) for step in steps},
        "needs": {step: run.needs(step) for step in steps},
    }
    expected = VALUES["runs"][name]
    if "runtime" in document["spec"]:  # it was part of the hash then, and its default still is
        assert found["configHash"] != expected["configHash"]
        hashed = {"configHash", "configHashByHand", "uid8ByHand", "folderByHand"}
        found, expected = ({k: v for k, v in one.items() if k not in hashed} for one in (found, expected))
    assert plain(found) == expected


def test_a_run_that_has_started_keeps_the_hash_and_the_folder_of_then() -> None:
    recorded = VALUES["runs"]["full"]
    run = load_run(EXAMPLES / "full.yaml").with_recorded_hash(recorded["configHash"])
    assert (run.config_hash, run.uid8, paths.run(run)) == (
        recorded["configHashByHand"],
        recorded["uid8ByHand"],
        recorded["folderByHand"],
    )


def test_order_and_packing() -> None:
    parts, recorded = document_lengths(), PLANS["batchPlan"]
    stream = SequenceStream(parts, SEED, 512)
    orders = [packing.epoch_order([len(part) for part in parts], SEED, epoch) for epoch in (0, 1)]
    assert [sha256(order.astype("<i4").tobytes()) for order in orders] == recorded["order"]
    epochs = [packing.build_epoch(parts, SEED, epoch, 512) for epoch in (0, 1)]
    assert [
        [
            sha256(epoch.documents_D.astype("<i4").tobytes()),
            sha256(epoch.starts_N.astype("<i8").tobytes()),
            sha256(epoch.tokens_N.astype("<i8").tobytes()),
            len(epoch.tokens_N),
        ]
        for epoch in epochs
    ] == recorded["epochs"]
    sequences = [[list(document) for document in stream.sequence(number)] for number in range(3)]
    assert plain(sequences) == recorded["firstSequences"]
    steps = stream.tokens_after_steps(7, 8, 500_000)
    assert [len(steps), sha256(steps.astype("<i8").tobytes())] == recorded["steps"]
    assert [list(packing.rank_sequences(rank, 4, 7, 8, 3)) for rank in range(4)] == recorded["slices"]


def test_mixture() -> None:
    stream, recorded = SequenceStream(document_lengths(), SEED, 512), PLANS["mixture"]
    assert {
        share: "".join(map(str, interleave(40, float(share)).astype(int))) for share in recorded["interleave"]
    } == recorded["interleave"]
    plain_steps, scored_steps = (stream.tokens_after_steps(first, 8, 200_000) for first in (0, 3))
    mixed = mix_streams(plain_steps, scored_steps, 0.65, 200_000)
    assert (
        plain(
            [
                sha256(mixed.scored.astype(np.uint8).tobytes()),
                sha256(mixed.seen.astype("<i8").tobytes()),
                len(mixed.seen),
                mixed.steps_by_kind(20),
                [mixed.index_in_stream(step) for step in range(10)],
            ]
        )
        == recorded["mix"]
    )


def test_questions_of_evaluation() -> None:
    parts, recorded = document_lengths(), PLANS["evaluation"]
    assert packing.held_out_documents(parts, 8, SEED).tolist() == recorded["heldOutNumbers"]
    held_out = questions.held_out_documents(parts, 8, SEED)
    assert plain([list(document) for document in held_out]) == recorded["heldOut"]
    sampling_questions = questions.sampling_questions(parts, 10, SEED)
    assert plain(sampling_questions) == recorded["questions"]
    assert [questions.request_seed(SEED, number) for number in (0, 1, 255)] == recorded["requestSeed"]


def recorded_form(window: WindowPlan) -> Any:
    """The window with the recorded name of its field `adjustments`."""
    found = plain(window)
    found["turns"] = found.pop("adjustments")
    return found


def test_windows_of_prompts() -> None:
    sizes, recorded = [len(part) for part in document_lengths()], PLANS["rollout"]
    schedule = WindowSchedule(on_policy_stage(), SEED, sizes, 17)
    adjustments = [
        Adjustment(number=number + 1, window=10 + 5 * number, setting=setting, waiting=0.6)
        for number, setting in enumerate(ADJUSTMENTS)
    ]
    tokens_before = {0: 0, 3: 0, 11: 30_000, 23: 70_000, 40: 99_000}
    window_plans = {
        str(k): recorded_form(schedule.window(k, seen, adjustments)) for k, seen in tokens_before.items()
    }
    assert window_plans["0"] == recorded["window0"]
    assert window_plans["40"] == recorded["window40"]
    assert {number: sha256(window) for number, window in window_plans.items()} == recorded["windows"]
    documents = [schedule.documents(number).tolist() for number in range(600)]
    assert sha256(documents) == recorded["documents"]
    places = ((0, 0, 0), (3, 2, 1), (999, 11, 0))
    assert [windows.request_seed(SEED, *place) for place in places] == recorded["requestSeed"]


def test_curriculum() -> None:
    curriculum, recorded = Curriculum(on_policy_stage()), PLANS["rollout"]
    anchors = SequenceStream(document_lengths(), SEED, 512).tokens_after_steps(0, 4, 100_000)
    assert [curriculum.version_of(window) for window in range(12)] == recorded["versionOf"]
    assert plain({str(v): list(curriculum.windows_of(v)) for v in (0, 2, 4, 6)}) == recorded["windowsOf"]
    assert [curriculum.steps_trained(version) for version in (0, 2, 4, 6)] == recorded["publishedAfter"]
    assert "".join(str(int(curriculum.is_window(step))) for step in range(40)) == recorded["isWindow"]
    assert [curriculum.step_of(window) for window in range(12)] == recorded["stepOf"]
    after = [curriculum.tokens_before_next(window, 1000 * window, 900, anchors) for window in range(12)]
    assert plain(after) == recorded["after"]
    levels = {tokens: plain(curriculum.level_at(int(tokens))) for tokens in recorded["levels"]}
    assert levels == recorded["levels"]


def test_a_change_of_seed_changes_the_order() -> None:
    """Shows that the comparisons above depend on the order."""
    parts = document_lengths()
    other = packing.epoch_order([len(part) for part in parts], SEED + 1, 0)
    assert sha256(other.astype("<i4").tobytes()) not in PLANS["batchPlan"]["order"]
