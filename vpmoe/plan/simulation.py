"""Simulation of an OnPolicy stage: its time, and how much of it each role works and waits.

A batch takes as long as its longest completion, a version has to reach the sampler, and no window is trained
before its version's batch is scored: so a stage takes longer than its slowest role alone. It is simulated
window by window by the stage's own rules (versions, staleness, anchor steps, curriculum, the sampler's queue,
parts). Pure, and nothing is drawn: lengths of completions are evenly spread over their distribution.

Left out: back-pressure, completions that vLLM preempts and computes again, held-out losses, checkpoints, the
start of the pods, and failures.
"""

import heapq
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import count
from statistics import NormalDist
from typing import NamedTuple

from vpmoe.api.layout import layout
from vpmoe.api.microbatch import FIXED, MOST, Microbatch, time_of_stage
from vpmoe.api.spec import Spec
from vpmoe.api.stages import OnPolicy
from vpmoe.plan.onpolicy import EFFORTS, RAMP, rollout_totals
from vpmoe.plan.sampling import PART_SECONDS, SEQUENCES
from vpmoe.plan.throughput import POLL, RoleTimes

SPREAD = 0.34
"""Standard deviation of the logarithm of a completion's length at one effort, as in SYNTH's rows."""
RUNAWAY = 0.01
"""Share of completions that grow until their limit. An assumption."""
PACKED = 0.98
"""Share of a sequence's positions that hold tokens when windows are packed: 0.975 to 0.985 with the lengths
above (data/packing.py)."""
BATCHES = (64, 192)
"""A stage of many more versions is simulated with as many of its tokens as make the first and the second
number, and continued by the difference between the two, which has no start in it."""
REQUESTS = 2048
"""Completions of a batch that are simulated. Of more, every n-th is, in an n-th of the engines' places."""
RAMP_LEVELS = 4
"""Steps in which the rollouts of a prompt go to rolloutsPerPromptAtEnd here."""
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts and completions."""

    prompt: int
    completion: Mapping[str, int]
    """Mean by effort, of all."""
    spread: float = SPREAD
    runaway: float = RUNAWAY


@dataclass(frozen=True)
class StageTime:
    """What a stage takes."""

    seconds: float
    busy: Mapping[str, float]
    """Seconds in which each of "train", "sampler" and "teacher" works."""
    tokens: float
    """Of the stage."""
    window_tokens: float
    """Of these, the windows'."""
    windows: float
    copying: float
    """Part of busy["train"] in which policy versions are copied."""
    uploading: float
    """Seconds in which training waits for the upload of the version before."""

    @property
    def train_tokens_per_second(self) -> float:
        """Of the optimizer steps alone, without waits and copies."""
        return self.tokens / (self.busy["train"] - self.copying)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def shares(self) -> dict[str, float]:
        """The share of the time in which each role works."""
        return {role: seconds / self.seconds for role, seconds in self.busy.items()}

    def continued(self, before: "StageTime", tokens: float) -> "StageTime":
        """The stage at `tokens` tokens, if it goes on as between `before` and this one. It takes no less time
        than a role works: the last windows of the two may be in other places of the teachers' turns."""
        factor = (tokens - self.tokens) / (self.tokens - before.tokens)

        def at(now: float, then: float) -> float:
            return now + factor * (now - then)

        busy = {role: at(seconds, before.busy[role]) for role, seconds in self.busy.items()}
        return StageTime(
            max(at(self.seconds, before.seconds), *busy.values()),
            busy,
            tokens,
            at(self.window_tokens, before.window_tokens),
            at(self.windows, before.windows),
            at(self.copying, before.copying),
            at(self.uploading, before.uploading),
        )


class Level(NamedTuple):
    """What the curriculum asks for until `end` tokens of the stage."""

    end: float
    effort: tuple[float, ...]
    """Share of prompts at each of EFFORTS."""
    rollouts: float
    """Mean number of rollouts of a prompt."""


def levels(stage: OnPolicy, tokens: float) -> list[Level]:
    """The curriculum of a stage of `tokens` tokens, with steps in place of its ramps."""
    total = sum(phase.share for phase in stage.curriculum)
    found, start = [], 0.0
    for phase in stage.curriculum:
        length = tokens * phase.share / total
        effort = tuple(getattr(phase.effort, name) for name in EFFORTS)
        first, last = phase.rollouts_per_prompt, phase.rollouts_per_prompt_at_end or phase.rollouts_per_prompt
        if first == last:
            found.append(Level(start + length, effort, first))
        else:
            found.append(Level(start + (1 - RAMP) * length, effort, first))
            for place in range(1, RAMP_LEVELS + 1):
                end = start + (1 - RAMP + RAMP * place / RAMP_LEVELS) * length
                found.append(Level(end, effort, first + (last - first) * (place - 0.5) / RAMP_LEVELS))
        start += length
    return found


def windows_of(version: int, staleness: int, every: int) -> range:
    """The windows that are sampled from a version, as vpmoe.rollout.curriculum has them."""
    return range(version + staleness if version else 0, version + staleness + every)


class Requests(NamedTuple):
    """The completions of a batch."""

    number: int
    prompt: int
    """Tokens of each prompt."""
    efforts: tuple[tuple[float, int, int], ...]
    """Of each effort its share, and the mean and the limit of its completions."""
    spread: float
    runaway: float


class SampledBatch(NamedTuple):
    """How long a batch takes, and what is finished before."""

    seconds: float
    """Until its last completion has finished."""
    tokens: float
    """Of all, prompts included."""
    parts: tuple[tuple[float, float], ...]
    """Of each part, the seconds after which it is written, and its tokens, prompts included. What finishes
    after the last one comes with the windows."""


def log_center(mean: float, limit: int, spread: float, runaway: float) -> float:
    """Mean of the logarithm of lengths that, cut at `limit`, have the mean `mean` together with a share of
    `runaway` that has the limit. Those of a mean that cannot be have one token, or the limit."""
    low, high = 0.0, math.log(limit) + 6 * spread
    while high - low > 1e-6:
        center = (low + high) / 2
        below = NormalDist(center, spread).cdf(math.log(limit))
        # E[length; length < limit] of a log-normal distribution.
        shorter = math.exp(center + spread**2 / 2) * NormalDist(center + spread**2, spread).cdf(
            math.log(limit)
        )
        if runaway * limit + (1 - runaway) * (shorter + (1 - below) * limit) < mean:
            low = center
        else:
            high = center
    return high


@lru_cache(256)
def completions(requests: Requests) -> tuple[int, ...]:
    """Tokens of each completion, in the order of the sampler's queue: the longest limits first
    (inference/request_queue.py).

    Log-normal, but a share of `runaway` and what would be longer grow until the limit. Multiples of the
    golden ratio spread both evenly over any stretch of the queue.
    """
    ends = 1 - requests.runaway
    found: list[int] = []
    reached = 0.0
    for share, mean, limit in sorted(requests.efforts, key=lambda effort: effort[2], reverse=True):
        reached += share
        lengths = NormalDist(log_center(mean, limit, requests.spread, requests.runaway), requests.spread)
        for index in range(round(reached * requests.number) - len(found)):
            place = (index + 0.5) * GOLDEN % 1
            length = math.exp(lengths.inv_cdf(place / ends)) if place < ends else limit
            found.append(min(limit, max(1, round(length))))
    return tuple(found)


@lru_cache(1024)
def sample_batch(requests: Requests, gpus: int, times: RoleTimes) -> SampledBatch:
    """Sample requests from one queue for all engines. A decoding step costs `decode` even if few sequences
    are left."""
    every = -(-requests.number // REQUESTS)
    engines = gpus * times.engines
    lengths = completions(requests._replace(number=requests.number // every))
    places = max(1, engines * SEQUENCES // every)
    ends, longer = list(lengths), 1.0
    if len(lengths) > places:
        busy = [0] * places  # of each place, the step after which it is free
        ends = [heapq.heapreplace(busy, busy[0] + length) + length for length in lengths]
        longer = places * every / (engines * SEQUENCES)  # an n-th of the places is rounded
    steps, sampled = max(ends), sum(lengths) * requests.number / len(lengths)
    seconds = (
        steps * longer * times.decode
        + sampled / engines * times.decode_token
        + requests.number * requests.prompt / gpus * times.prefill
    )
    parts: dict[int, float] = {}
    for end, length in zip(ends, lengths, strict=True):
        part = int(end / steps * seconds / PART_SECONDS) + 1
        if part * PART_SECONDS <= seconds:
            tokens = (length + requests.prompt) * requests.number / len(lengths)
            parts[part] = parts.get(part, 0.0) + tokens
    return SampledBatch(
        seconds,
        sampled + requests.number * requests.prompt,
        tuple((PART_SECONDS * part, parts[part]) for part in sorted(parts)),
    )


def score_parts(
    batch: SampledBatch, began: float, free: float, share: float, times: RoleTimes
) -> tuple[float, float]:
    """What a teacher scores of a batch, whose sampling `began`, while the batch is sampled.

    `free`: when the teacher is. `share`: that of its own windows in the batch; it scores nothing else.
    Returns when it is free again, and the share of its windows' tokens that is left to score.
    """
    done = 0.0
    for written, tokens in batch.parts:
        begin = max(free, began + written + POLL / 2)
        if begin >= began + batch.seconds:
            break
        free, done = begin + tokens * share * times.score, done + tokens
    return free, 1 - done / batch.tokens


def stage_time(
    spec: Spec, stage: OnPolicy, lengths: Lengths, times: RoleTimes, microbatch: Microbatch
) -> StageTime:
    """The time of a stage with the GPUs of `spec` and of its sampler. Of a long stage, two shortened ones are
    simulated (BATCHES). `microbatch`: its trainer's."""
    versions = rollout_totals(spec, stage, lengths.prompt, lengths.completion).versions
    if versions <= 2 * max(BATCHES):
        return simulate(spec, stage, lengths, times, microbatch, stage.tokens)
    few, many = (
        simulate(spec, stage, lengths, times, microbatch, stage.tokens * each / versions) for each in BATCHES
    )
    return many.continued(few, stage.tokens)


def simulate(
    spec: Spec,
    stage: OnPolicy,
    lengths: Lengths,
    times: RoleTimes,
    microbatch: Microbatch,
    tokens: float,
) -> StageTime:
    """Simulate a stage that ends after `tokens` tokens; the phases of its curriculum are scaled to them.

    Each role starts when it is free and its input exists. The trainer works while it copies weights, the
    sampler does not while it loads them. The sampler takes all windows of a version as one batch, and writes
    them when its last completion has finished and the bucket has the version; the teachers, which share the
    windows by turns, score the parts of the batch before.
    """
    training, every, teachers = spec.training, stage.publish_every, spec.teacher.gpus
    plan, curriculum = layout(spec.student, training, stage), levels(stage, tokens)
    room = training.sequence_length - lengths.prompt
    efforts = [
        (lengths.completion[name], min(room, getattr(stage.rollout.max_tokens, name))) for name in EFFORTS
    ]

    @cache
    def step_seconds(sequences: int) -> float:
        """Of an optimizer step for which each rank has so many sequences."""
        token = times.position * MOST / (MOST + FIXED)  # times.position is of a microbatch of MOST
        return token * time_of_stage(microbatch, spec, stage, sequences) + times.step

    anchor_seconds = step_seconds(plan.sequences_per_rank)
    # By version: the time when it is in the bucket, the tokens of the stage when it was published, and the
    # time when the sampler finds it.
    published, seen_at = {0: times.copy + times.publish}, {0: 0.0}
    found = {0: times.copy + times.volume if times.volume is not None else published[0] + POLL / 2}
    trained, uploaded, sampled, scored = times.copy, published[0], 0.0, [0.0] * teachers
    busy = {"train": times.copy, "sampler": 0.0, "teacher": 0.0}
    copying, uploading = times.copy, 0.0
    seen = rolled = 0.0
    trained_windows = 0
    for version in count(0, every):
        level = next((each for each in curriculum if seen_at[version] < each.end), curriculum[-1])
        windows = windows_of(version, stage.staleness, every)
        requests = Requests(
            len(windows) * int(stage.rollout.prompts_per_window * level.rollouts),
            lengths.prompt,
            tuple((share, *effort) for share, effort in zip(level.effort, efforts, strict=True)),
            lengths.spread,
            lengths.runaway,
        )
        batch = sample_batch(requests, stage.sampler.gpus, times)
        began = max(sampled, found[version]) + times.load
        sampled = max(began + batch.seconds, published[version])
        busy["sampler"] += batch.seconds
        left = {}
        for teacher, number in Counter(window % teachers for window in windows).items():
            free, share = max(scored[teacher], published[version]), number / len(windows)
            scored[teacher], left[teacher] = score_parts(batch, began, free, share, times)
        window_tokens = batch.tokens / len(windows)
        score_seconds = window_tokens * times.score
        rows = math.ceil(window_tokens / (PACKED * training.sequence_length))
        train_seconds = step_seconds(math.ceil(rows / plan.ranks))
        for window in windows:
            teacher = window % teachers
            scored[teacher] = max(scored[teacher], sampled + POLL / 2) + score_seconds * left[teacher]
            trained = max(trained, scored[teacher] + POLL / 2) + train_seconds
            busy["teacher"] += score_seconds / teachers
            busy["train"] += train_seconds
            seen, rolled, trained_windows = seen + window_tokens, rolled + window_tokens, window + 1
            if trained_windows % every == 0:
                uploading += max(0.0, uploaded - trained)
                trained = max(trained, uploaded) + times.copy  # one upload runs at a time
                busy["train"] += times.copy
                copying += times.copy
                published[trained_windows] = uploaded = trained + times.publish
                found[trained_windows] = (
                    trained + times.volume if times.volume is not None else uploaded + POLL / 2
                )
                seen_at[trained_windows] = seen
            anchors = int(trained_windows / (1 - stage.anchor)) - int(window / (1 - stage.anchor)) - 1
            trained += anchors * anchor_seconds
            busy["train"] += anchors * anchor_seconds
            seen += anchors * plan.tokens_per_step
            if seen >= tokens:
                return StageTime(trained, busy, seen, rolled, trained_windows, copying, uploading)
    raise AssertionError("every window has tokens")
