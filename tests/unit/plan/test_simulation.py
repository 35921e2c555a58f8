"""The simulation of an OnPolicy stage: small stages by hand, the roles' own rules, and its shortening."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from tests.fakes import valid_specs
from vpmoe.api import DistillRun, OnPolicy
from vpmoe.api.layout import layout
from vpmoe.api.microbatch import FIXED, MOST, Microbatch
from vpmoe.api.spec import Spec
from vpmoe.data.packing import pack_sequences
from vpmoe.inference.request_queue import RequestSize, longest_first
from vpmoe.plan import simulation
from vpmoe.plan.sampling import SEQUENCES
from vpmoe.plan.simulation import (
    PACKED,
    REQUESTS,
    Lengths,
    Requests,
    StageTime,
    completions,
    levels,
    log_center,
    part_scores,
    sample_batch,
    simulate,
    stage_time,
    windows_of,
)
from vpmoe.plan.throughput import DECODE, POLL, Measured, RoleTimes, role_times
from vpmoe.rollout.curriculum import Curriculum

QUICK = RoleTimes(
    position=0.0,
    step=0.0,
    engines=1,
    decode=0.0,
    decode_token=0.0,
    prefill=0.0,
    score=0.0,
    copy=0.0,
    publish=0.0,
    volume=None,
    load=0.0,
)
"""Roles that take no time, but for the polls."""
LENGTHS = Lengths(100, {"low": 300, "medium": 300, "high": 300}, spread=1e-9, runaway=0.0)
"""All completions have 300 tokens, so a window of 512 has 204,800."""
WINDOW = 512 * 400
FOURS = Microbatch(rows=4)
CURRICULUM = [{"share": 1.0, "effort": {"low": 1.0}}]


def stage_with(windows: int, teachers: int = 1, **changes: Any) -> tuple[Spec, OnPolicy]:
    """A stage of so many windows without anchor steps, on `teachers` + 4 + 3 GPUs."""
    stage = valid_specs.ONPOLICY | {
        "tokens": windows * WINDOW,
        "anchor": 0,
        "rollout": {"promptsPerWindow": 512},
        "curriculum": CURRICULUM,
        "sampler": {"gpus": 4},
        **changes,
    }
    run = DistillRun.parse(valid_specs.manifest({"spec.stages": [stage], "spec.teacher.gpus": teachers}))
    (found,) = run.spec.stages
    assert isinstance(found, OnPolicy)
    return run.spec, found


def test_roles_that_take_turns_add_up() -> None:
    """With staleness 0 and a version each window, everything happens between two optimizer steps."""
    spec, stage = stage_with(10, staleness=0, publishEvery=1)
    times = replace(QUICK, position=1e-4, step=2.0, decode=0.05, score=1e-4, copy=3.0, publish=40.0, load=7.0)
    length = spec.training.sequence_length
    rows = math.ceil(math.ceil(WINDOW / (PACKED * length)) / 3)
    assert rows == 9  # of each rank, in microbatches of 4, 4 and 1
    training = (9 * length + 3 * FIXED) * 1e-4 * MOST / (MOST + FIXED) + 2.0
    sampling, scoring = 300 * 0.05, WINDOW * 1e-4
    one = 40 + POLL / 2 + 7 + sampling + POLL / 2 + scoring + POLL / 2 + training + 3
    found = simulate(spec, stage, LENGTHS, times, FOURS, stage.tokens)
    assert found.seconds == pytest.approx(3 + 10 * one)
    assert (found.windows, found.tokens, found.window_tokens) == (10, 10 * WINDOW, 10 * WINDOW)
    assert found.busy == pytest.approx(
        {"train": 3 + 10 * (training + 3), "sampler": 10 * sampling, "teacher": 10 * scoring}
    )
    assert (found.copying, found.uploading) == (pytest.approx(3 + 10 * 3), 0)
    assert found.train_tokens_per_second == pytest.approx(WINDOW / training)
    # By a volume, the windows wait for the bucket to have the version, or not, but for nothing else.
    for volume, written in ((5.0, 40.0), (30.0, 30 + 7 + sampling)):
        by_volume = simulate(spec, stage, LENGTHS, replace(times, volume=volume), FOURS, stage.tokens)
        earlier = 40 + POLL / 2 + 7 + sampling - written
        assert found.seconds - by_volume.seconds == pytest.approx(10 * earlier)


@pytest.mark.parametrize(
    "changes, seconds",
    [
        # Of a window. Whatever is not named takes almost no time.
        pytest.param({"score": 1e-3}, WINDOW * 1e-3, id="teacher"),
        pytest.param({"step": 100.0}, 100, id="trainer"),
        pytest.param({"decode": 0.05, "load": 9.0}, (300 * 0.05 + 9) / 2, id="sampler: two windows a batch"),
        pytest.param({"publish": 500.0, "copy": 20.0}, 520 / 2, id="one upload at a time, of two windows"),
        pytest.param(
            {"publish": 150.0, "load": 150.0, "decode": 0.05, "step": 100.0},
            (150 + POLL / 2 + 150 + 300 * 0.05 + POLL + 2 * 100) / 4,
            id="from version to version: four windows in flight",
        ),
    ],
)
def test_the_slowest_part_decides_a_long_stage(changes: dict[str, Any], seconds: float) -> None:
    """With staleness and publishEvery 2; the start of the stage, and polls beside the slowest part, are less
    than 2 %."""
    spec, stage = stage_with(400, staleness=2, publishEvery=2)
    found = simulate(spec, stage, LENGTHS, replace(QUICK, **changes), FOURS, stage.tokens)
    assert found.seconds == pytest.approx(400 * seconds, rel=0.02)
    uploads = found.busy["train"] + found.uploading
    assert (uploads == pytest.approx(found.seconds, rel=0.02)) == (
        "copy" in changes or changes == {"step": 100.0}
    )


@pytest.mark.parametrize("seed", range(40))
def test_a_stage_ends_when_what_its_last_window_needs_has_ended(seed: int) -> None:
    """The same end follows from the last window backwards: what each part of the work waits for, with the
    curriculum's own versions."""
    random = np.random.default_rng(seed)
    staleness, every, teachers = (int(random.integers(*span)) for span in ((0, 6), (1, 5), (1, 4)))
    score, step, copy, publish, load = random.uniform(0, 60, 5).tolist()
    volume = random.uniform(0, publish) if seed % 2 else None
    times = replace(
        QUICK,
        score=score / WINDOW,
        step=step,
        copy=copy,
        publish=publish,
        load=load,
        volume=volume,
        decode=0.03,
    )
    spec, stage = stage_with(30, teachers, staleness=staleness, publishEvery=every)
    curriculum = Curriculum(stage)

    @cache
    def copied(version: int) -> float:
        if version == 0:
            return copy
        return max(trained(version - 1), in_bucket(version - every)) + copy

    def in_bucket(version: int) -> float:
        return copied(version) + publish

    @cache
    def sampled(version: int) -> float:
        before = sampled(version - every) if version else 0.0
        found = in_bucket(version) + POLL / 2 if volume is None else copied(version) + volume
        return max(max(before, found) + load + 300 * 0.03, in_bucket(version))

    @cache
    def scored(window: int) -> float:
        before = scored(window - teachers) if window >= teachers else 0.0
        return max(before, sampled(curriculum.version_of(window)) + POLL / 2) + score

    @cache
    def trained(window: int) -> float:
        before = copied(window) if window % every == 0 else trained(window - 1)
        return max(before, scored(window) + POLL / 2) + step

    end = copied(30) if 30 % every == 0 else trained(29)
    assert simulate(spec, stage, LENGTHS, times, FOURS, stage.tokens).seconds == pytest.approx(end)


def test_a_position_takes_its_time_in_long_microbatches() -> None:
    """As it was measured: anchor steps of 40 sequences a rank, in ten microbatches of 4, beside windows of
    one sequence. Recomputing all layers takes a third of the arithmetic more."""
    spec, stage = stage_with(3, anchor=0.75, rollout={"promptsPerWindow": 1})
    times = replace(QUICK, position=1e-3)
    plain, again = (
        simulate(spec, stage, LENGTHS, times, FOURS.model_copy(update={"recomputed_layers": layers}), 10**7)
        for layers in (0, 80)
    )
    anchors = round((plain.tokens - plain.window_tokens) / (120 * 8192))
    windows = plain.windows * (8192 + FIXED) * 1e-3 * MOST / (MOST + FIXED)
    assert plain.busy["train"] == pytest.approx(anchors * 40 * 8192 * 1e-3 + windows)
    assert again.busy["train"] / plain.busy["train"] == pytest.approx(
        (MOST * 4 / 3 + FIXED) / (MOST + FIXED), rel=0.01
    )


def test_teachers_share_windows_by_turns() -> None:
    slow = replace(QUICK, score=1e-3)
    one, two, three = (
        simulate(*stage_with(300, teachers, staleness=4, publishEvery=2), LENGTHS, slow, FOURS, 300 * WINDOW)
        for teachers in (1, 2, 3)
    )
    assert two.seconds == pytest.approx(one.seconds / 2, rel=0.02)
    assert three.seconds == pytest.approx(one.seconds / 3, rel=0.05)
    assert one.shares()["teacher"] == pytest.approx(1, rel=0.01)
    # A batch of one window is scored by one of them.
    alone, both = (
        simulate(*stage_with(100, teachers, staleness=0, publishEvery=1), LENGTHS, slow, FOURS, 100 * WINDOW)
        for teachers in (1, 2)
    )
    assert both.seconds == pytest.approx(alone.seconds)


def test_a_batch_is_scored_while_it_is_sampled() -> None:
    """A quarter of the completions ends after 300 of 3,000 steps of 0.1 s, so in a part that is written after
    40 s."""
    curriculum = [{"share": 1.0, "effort": {"low": 0.25, "high": 0.75}}]
    lengths = replace(LENGTHS, completion={"low": 300, "medium": 1, "high": 3000})
    spec, stage = stage_with(1, staleness=0, publishEvery=1, curriculum=curriculum)
    times = replace(QUICK, decode=0.1, score=1e-4)
    found = simulate(spec, stage, lengths, times, FOURS, 1)
    late = 384 * 3100
    assert found.window_tokens == late + 128 * 400
    assert found.seconds == pytest.approx(POLL / 2 + 300 + POLL / 2 + late * 1e-4 + POLL / 2)


def test_anchor_steps_are_trained_while_the_trainer_waits() -> None:
    """One step of four is an anchor step, in the trainer's own time; the teacher decides."""
    spec, stage = stage_with(200, staleness=2, publishEvery=2, anchor=0.25)
    step = layout(spec.student, spec.training, stage).tokens_per_step
    times = replace(QUICK, score=1e-3, position=1e-5)
    found = simulate(spec, stage, LENGTHS, times, FOURS, 200 * WINDOW)
    assert found.tokens - found.window_tokens == pytest.approx(found.windows / 3 * step, abs=step)
    assert found.seconds == pytest.approx(found.window_tokens * 1e-3, rel=0.05)


@pytest.mark.parametrize("staleness", range(6))
@pytest.mark.parametrize("every", [1, 2, 3, 4])
def test_versions_sample_the_windows_of_the_curriculum(staleness: int, every: int) -> None:
    curriculum = Curriculum(stage_with(1, staleness=staleness, publishEvery=every)[1])
    for version in range(0, 40, every):
        assert windows_of(version, staleness, every) == curriculum.windows_of(version)


def test_levels_are_those_of_the_curriculum() -> None:
    """At the middle of each level, the mean rollouts are exact; a ramp has steps."""
    curriculum = [
        {"share": 0.4, "effort": {"low": 0.7, "medium": 0.3}},
        {
            "share": 0.6,
            "effort": {"low": 0.1, "high": 0.9},
            "rolloutsPerPrompt": 2,
            "rolloutsPerPromptAtEnd": 6,
        },
    ]
    _, stage = stage_with(1, tokens="1B", curriculum=curriculum)
    exact, start = Curriculum(stage), 0.0
    for level in levels(stage, stage.tokens):
        found = exact.level_at(int((start + level.end) / 2))
        assert tuple(map(float, found.effort)) == pytest.approx(level.effort)
        assert float(found.rollouts) == pytest.approx(level.rollouts)
        start = level.end
    assert start == stage.tokens


MIXED = Requests(4096, 103, ((0.2, 300, 1024), (0.5, 700, 2048), (0.3, 1500, 4096)), 0.34, 0.01)


def test_completions_have_the_lengths_that_are_assumed_in_the_queue_s_order() -> None:
    """Means within 1 %, and the standard deviation of the logarithm within 2 % of those that end by
    themselves."""
    lengths = completions(MIXED)
    limits = [4096] * round(0.3 * 4096) + [2048] * round(0.5 * 4096) + [1024] * round(0.2 * 4096)
    assert len(lengths) == len(limits) == 4096
    assert longest_first([RequestSize(limit, 103) for limit in limits]) == list(range(4096))
    for share, mean, limit in MIXED.efforts:
        of_effort = [length for length, most in zip(lengths, limits, strict=True) if most == limit]
        ended = [length for length in of_effort if length < limit]
        assert len(of_effort) == pytest.approx(share * 4096, abs=1)
        assert 1 - len(ended) / len(of_effort) == pytest.approx(0.01, abs=0.003)
        assert np.mean(of_effort) == pytest.approx(mean, rel=0.01)
        assert np.std(np.log(ended)) == pytest.approx(0.34, rel=0.02)


@pytest.mark.parametrize("mean", [20, 300, 600, 900, 1000, 1024])
def test_the_mean_is_of_all_completions_whatever_the_limit(mean: int) -> None:
    """Of a log-normal distribution that is drawn, too: 0.5 % are three standard errors of 200,000 numbers."""
    center = log_center(mean, 1024, 0.34, 0.01)
    drawn = np.minimum(np.exp(np.random.default_rng(3).normal(center, 0.34, 200_000)), 1024)
    assert 0.01 * 1024 + 0.99 * drawn.mean() == pytest.approx(mean, rel=0.005)
    found = completions(Requests(2000, 0, ((1.0, mean, 1024),), 0.34, 0.01))
    assert np.mean(found) == pytest.approx(mean, rel=0.02)


@pytest.mark.parametrize("mean, length", [(5, 1), (5000, 1024)])
def test_a_mean_that_cannot_be_is_the_nearest_one(mean: int, length: int) -> None:
    found = completions(Requests(2000, 0, ((1.0, mean, 1024),), 0.34, 0.01))
    assert sorted(found)[len(found) // 2] == length


def test_seconds_of_a_batch_by_hand() -> None:
    """2,048 completions of 100 tokens on one engine, and on two of one GPU; then so few that all start at
    once."""
    requests = Requests(2048, 10, ((1.0, 100, 200),), 1e-9, 0.0)
    times = replace(QUICK, decode=0.01, decode_token=1e-4, prefill=1e-3)
    assert SEQUENCES == 1024
    one = sample_batch(requests, 1, times)
    assert one.seconds == pytest.approx(200 * 0.01 + 204_800 * 1e-4 + 20_480 * 1e-3)
    assert one.tokens == 2048 * 110
    # Half ends after 100 of 200 steps, so at 21.5 of 43 s, too late for the part that is written after 20 s.
    assert one.parts == ((40.0, pytest.approx(1024 * 110)),)
    two = sample_batch(requests, 1, replace(times, engines=2))
    assert two.seconds == pytest.approx(100 * 0.01 + 102_400 * 1e-4 + 20_480 * 1e-3)
    few = sample_batch(requests._replace(number=512), 2, times)
    assert few.seconds == pytest.approx(100 * 0.01 + 25_600 * 1e-4 + 2560 * 1e-3)


@pytest.mark.parametrize("number, gpus", [(4096, 1), (8192, 1), (8192, 2), (40_000, 3)])
def test_a_part_of_a_large_batch_stands_for_all(
    monkeypatch: pytest.MonkeyPatch, number: int, gpus: int
) -> None:
    """Within 2 %: fewer completions show the longest ones of the last places less exactly."""
    assert number > REQUESTS
    times = replace(QUICK, decode=0.0099, decode_token=3.2e-5, engines=2)
    requests = MIXED._replace(number=number)
    some = sample_batch(requests, gpus, times)
    monkeypatch.setattr(simulation, "REQUESTS", 10**6)
    every = sample_batch.__wrapped__(requests, gpus, times)
    assert some.seconds == pytest.approx(every.seconds, rel=0.02)
    assert some.tokens == pytest.approx(every.tokens, rel=0.01)


@pytest.mark.parametrize("number", [10_000, 1_000_000, 3_000_000, 100_000_000])
def test_many_requests_take_their_share_of_the_engines(number: int) -> None:
    """Also if an n-th of the engines' places is no whole number. Within 1 %: a last step is not full; 3 % of
    the fewest, whose last of ten steps is not full."""
    requests = Requests(number, 0, ((1.0, 100, 200),), 1e-9, 0.0)
    found = sample_batch(requests, 1, replace(QUICK, decode=0.01))
    assert found.seconds == pytest.approx(
        number * 100 / SEQUENCES * 0.01, rel=0.01 if number > 10_000 else 0.03
    )


@pytest.mark.parametrize("length", [4096, 8192])
def test_rows_of_a_window_are_those_of_the_packing(length: int) -> None:
    tokens = np.array(completions(MIXED._replace(number=2048)), np.int32) + 103
    tokens = np.random.default_rng(1).permutation(tokens)  # as prompts come
    rows = len(pack_sequences(np.minimum(tokens, length), length)[1]) - 1
    assert math.ceil(tokens.sum() / (PACKED * length)) == pytest.approx(rows, rel=0.02)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda times: times, id="bucket"),
        pytest.param(lambda times: replace(times, volume=5.0, load=1.8), id="volume"),
    ],
)
def test_a_long_stage_is_continued_from_shortened_ones(change: Callable[[RoleTimes], RoleTimes]) -> None:
    """1 %: the phases change at whole windows."""
    stage = valid_specs.ONPOLICY | {"tokens": "4B"}
    run = DistillRun.parse(valid_specs.manifest({"spec.stages": [stage]}))
    found = run.spec.stages[0]
    assert isinstance(found, OnPolicy)
    lengths = Lengths(103, {"low": 300, "medium": 700, "high": 1500})
    times = change(
        RoleTimes(
            1.25e-5,
            0.115,
            2,
            *DECODE[2],
            prefill=3e-5,
            score=1.5e-5,
            copy=1,
            publish=22,
            volume=None,
            load=22,
        )
    )
    whole = simulate(run.spec, found, lengths, times, FOURS, found.tokens)
    short = stage_time(run.spec, found, lengths, times, FOURS)
    assert whole.windows / found.publish_every > 2 * max(simulation.BATCHES)
    assert short.tokens == found.tokens
    assert short.tokens_per_second == pytest.approx(whole.tokens_per_second, rel=0.01)
    assert short.windows == pytest.approx(whole.windows, rel=0.01)
    assert short.shares() == pytest.approx(whole.shares(), rel=0.01)


def test_a_stage_of_few_prompts_is_shortened_by_its_own_batches() -> None:
    """A batch of one prompt has low effort alone: a fifth of the closed form's tokens. 1 %."""
    curriculum = [{"share": 1.0, "effort": {"low": 0.51, "high": 0.49}}]
    lengths = replace(LENGTHS, completion={"low": 300, "medium": 1, "high": 4000})
    spec, stage = stage_with(
        1, publishEvery=1, staleness=0, tokens="8M", curriculum=curriculum, rollout={"promptsPerWindow": 1}
    )
    _compare_to_the_whole(spec, stage, lengths, 0.01)


@pytest.mark.parametrize("score", [1e-6, 1e-3])
@pytest.mark.parametrize(
    "tokens, tolerance",
    [
        pytest.param("90M", 0.01, id="none"),
        pytest.param("110M", 0.03, id="ends-in-its-first"),
        pytest.param("11B", 0.04, id="36"),
    ],
)
def test_large_anchor_steps_that_are_rare_are_divided(tokens: str, tolerance: float, score: float) -> None:
    """One of 200 M tokens after 499 windows, which together have half as many."""
    spec, stage = stage_with(1, publishEvery=1, staleness=1, tokens=tokens, anchor=0.002)
    training = spec.training.model_copy(update={"global_batch_tokens": 200_000_000})
    _compare_to_the_whole(spec.model_copy(update={"training": training}), stage, LENGTHS, tolerance, score)


def test_phases_with_much_larger_windows_than_others_are_simulated_one_by_one() -> None:
    """The shortened stage would end in its first window. 5 %: those that are sampled when a phase ends belong
    to it, here 4 of 150."""
    curriculum = [
        {"share": 0.5, "effort": {"high": 1.0}, "rolloutsPerPrompt": 64},
        {"share": 0.5, "effort": {"low": 1.0}},
    ]
    lengths = replace(LENGTHS, completion={"low": 1, "medium": 1, "high": 4000})
    spec, stage = stage_with(1, tokens="40B", curriculum=curriculum, anchor=0.15)
    training = spec.training.model_copy(update={"global_batch_tokens": 50_000})
    _compare_to_the_whole(spec.model_copy(update={"training": training}), stage, lengths, 0.05)


def _compare_to_the_whole(
    spec: Spec, stage: OnPolicy, lengths: Lengths, tolerance: float, score: float = 1e-5
) -> None:
    times = replace(QUICK, position=1e-6, step=0.1, decode=0.01, score=score, copy=1, publish=5, load=2)
    whole = simulate(spec, stage, lengths, times, FOURS, stage.tokens)
    found = stage_time(spec, stage, lengths, times, FOURS)
    print(whole, found)
    assert found.simulated <= 4 * sum(simulation.BATCHES) * stage.publish_every
    assert found.tokens_per_second == pytest.approx(whole.tokens_per_second, rel=tolerance)
    assert found.windows == pytest.approx(whole.windows, rel=tolerance)
    assert found.shares() == pytest.approx(whole.shares(), rel=tolerance)


def test_waits_for_windows_are_a_share_of_steps_alone() -> None:
    """As back-pressure has it: of 50 s of steps 30, beside 10 s of copies and 40 s of uploads."""
    busy = {"train": 30.0, "sampler": 0.0, "teacher": 0.0}
    found = StageTime(
        seconds=100.0,
        busy=busy,
        tokens=1.0,
        window_tokens=1.0,
        windows=1.0,
        copying=10.0,
        uploading=40.0,
        simulated=1,
    )
    assert found.waiting == pytest.approx(30 / 50)


@pytest.mark.parametrize("seed", range(20))
def test_a_teacher_scores_part_after_part_until_the_batch_is_sampled(seed: int) -> None:
    random = np.random.default_rng(seed)
    times = replace(QUICK, decode=0.02 * 10 ** random.uniform(0, 1), score=10 ** random.uniform(-6, -2))
    share = random.uniform()
    batch = sample_batch(MIXED, 1, times)
    began = random.uniform(0, 1000)
    assert len(batch.parts) > 2
    for free in (0.0, *(began + random.uniform(-1, 1.1, 20) * batch.seconds)):
        end, done = free, 0.0
        for written, tokens in batch.parts:
            begin = max(end, began + written + POLL / 2)
            if begin >= began + batch.seconds:
                break
            end, done = begin + tokens * share * times.score, done + tokens
        found = part_scores(MIXED, 1, times, share).score(began, free)
        assert found == pytest.approx((end, 1 - done / batch.tokens), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("every, teachers", [(1, 3), (5, 3), (7, 3)])
def test_no_role_works_for_longer_than_a_long_stage_takes(every: int, teachers: int) -> None:
    spec, stage = stage_with(5000 * every, teachers, staleness=2, publishEvery=every)
    found = stage_time(spec, stage, LENGTHS, replace(QUICK, score=1e-3), FOURS)
    assert found.shares()["teacher"] == pytest.approx(1, rel=0.01) and found.shares()["teacher"] <= 1


def test_seconds_of_the_roles_follow_from_the_speeds() -> None:
    train = Measured("train", "m", "c", 50_000, "", "", step_seconds=0.1, step_tokens=10_000)
    sample, score = Measured("sample", "m", "c", 40_000, "", ""), Measured("score", "m", "c", 20_000, "", "")
    times = role_times(train, sample, score, 2, 512, 12 * 10**9, 2e9, volume=False)
    assert 10_000 * times.position + times.step == pytest.approx(10_000 / 50_000)
    assert 2 * 512 / (times.decode + 512 * times.decode_token) == pytest.approx(40_000)
    assert times.decode / times.decode_token == pytest.approx(DECODE[2].decode / DECODE[2].token)
    assert (times.score, times.volume) == (1 / 20_000, None)
    assert times.publish == times.load == pytest.approx(12 / 2 + 12 / 1.2)
    assert times.step_to_sampling == pytest.approx(0.92 * 12 / 12.06 + 16 + POLL / 2 + 16)
    shared = role_times(train, sample, score, 2, 512, 12 * 10**9, 2e9, volume=True)
    # 6.33 s are measured, of 12.06 GB.
    assert shared.step_to_sampling == pytest.approx(6.33 * 12 / 12.06, rel=1e-6)
    assert shared.publish == times.publish
    more = role_times(train, sample, score, 5, 512, 1, 1.0, volume=False)
    assert 5 * 512 / (more.decode + 512 * more.decode_token) == pytest.approx(40_000)
