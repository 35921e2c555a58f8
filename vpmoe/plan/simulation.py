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
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate, count
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
DIVIDED = 16
"""Versions between two parts of anchor steps that are divided. More would skip phases of the curriculum."""
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
    simulated: int
    """Windows that were simulated for it."""

    @property
    def train_tokens_per_second(self) -> float:
        """Of the optimizer steps alone, without waits and copies."""
        return self.tokens / (self.busy["train"] - self.copying)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def waiting(self) -> float:
        """Share of the time of its steps in which training waits for windows, as back-pressure has it: copies
        and uploads are between steps."""
        steps = self.seconds - self.copying - self.uploading
        return 1 - (self.busy["train"] - self.copying) / steps

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
            self.simulated + before.simulated,
        )

    def plus(self, other: "StageTime", factor: float) -> "StageTime":
        """This stage, and after it `factor` times another one."""
        return StageTime(
            self.seconds + factor * other.seconds,
            {role: seconds + factor * other.busy[role] for role, seconds in self.busy.items()},
            self.tokens + factor * other.tokens,
            self.window_tokens + factor * other.window_tokens,
            self.windows + factor * other.windows,
            self.copying + factor * other.copying,
            self.uploading + factor * other.uploading,
            self.simulated + other.simulated,
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


class PartScores(NamedTuple):
    """How a teacher scores its windows' share of a batch while the batch is sampled; it scores nothing else
    of it. In seconds since sampling began, each by the number of parts before."""

    sampled: float
    """When the batch has been sampled. No part is begun from then on."""
    scoring: tuple[float, ...]
    """Seconds that scoring the parts before takes."""
    begun: tuple[float, ...]
    """When the next part is begun by a teacher that has been free for long, less `scoring`."""
    left: tuple[float, ...]
    """Share of the windows' tokens that is left to score."""

    def score(self, began: float, free: float) -> tuple[float, float]:
        """When a teacher that is free at `free` is free again, and the share of its windows' tokens that is
        left to score. `began`: when sampling did."""
        if not self.begun:
            return free, 1.0
        since = free - began
        number = bisect_left(
            range(len(self.begun)), self.sampled, key=lambda n: self.scoring[n] + max(since, self.begun[n])
        )
        if number == 0:
            return free, 1.0
        return began + self.scoring[number] + max(since, self.begun[number - 1]), self.left[number]


@lru_cache(256)
def part_scores(requests: Requests, gpus: int, times: RoleTimes, share: float) -> PartScores:
    """`share`: that of the teacher's own windows in the batch."""
    batch = sample_batch(requests, gpus, times)
    done = [0.0, *accumulate(tokens for _, tokens in batch.parts)]
    scoring = [share * tokens * times.score for tokens in done]
    begun = (written + POLL / 2 - before for (written, _), before in zip(batch.parts, scoring, strict=False))
    left = (1 - tokens / batch.tokens for tokens in done)
    return PartScores(batch.seconds, tuple(scoring), tuple(accumulate(begun, max)), tuple(left))


def requests_of(spec: Spec, stage: OnPolicy, lengths: Lengths, level: Level, windows: int) -> Requests:
    """The completions of a batch of so many windows."""
    room = spec.training.sequence_length - lengths.prompt
    efforts = [
        (lengths.completion[name], min(room, getattr(stage.rollout.max_tokens, name))) for name in EFFORTS
    ]
    return Requests(
        windows * int(stage.rollout.prompts_per_window * level.rollouts),
        lengths.prompt,
        tuple((share, *effort) for share, effort in zip(level.effort, efforts, strict=True)),
        lengths.spread,
        lengths.runaway,
    )


def stage_time(
    spec: Spec, stage: OnPolicy, lengths: Lengths, times: RoleTimes, microbatch: Microbatch
) -> StageTime:
    """The time of a stage with the GPUs of `spec` and of its sampler. Of a long stage, two shortened ones are
    simulated (BATCHES). `microbatch`: its trainer's.

    Three kinds of stages are shortened in another way. If anchor steps are rarer than the windows of a
    shortened stage, and have more tokens than all windows between two, each is divided into several. If
    batches are too small to have all efforts, the number of versions is that of their tokens. If a shortened
    stage would be less than one batch of some phase, the phases are simulated one by one.
    """
    tokens, every, anchors = float(stage.tokens), stage.publish_every, stage.anchor / (1 - stage.anchor)
    step, part = layout(spec.student, spec.training, stage).tokens_per_step, 1.0

    @cache
    def window_tokens(level: Level) -> float:
        requests = requests_of(spec, stage, lengths, level, every)
        return sample_batch(requests, stage.sampler.gpus, times).tokens / every

    def windows(stage: OnPolicy, tokens: float, of_anchors: float) -> float:
        """Windows in so many tokens. `of_anchors`: tokens of anchor steps for each window."""
        ends = levels(stage, tokens)
        starts = [0.0, *(level.end for level in ends)]
        return sum(
            (level.end - start) / (window_tokens(level) + of_anchors)
            for level, start in zip(ends, starts, strict=False)
        )

    def shortened(stage: OnPolicy, tokens: float, versions: float) -> StageTime:
        if versions <= 2 * max(BATCHES):
            return simulate(spec, stage, lengths, times, microbatch, tokens, part)
        few, many = (
            simulate(spec, stage, lengths, times, microbatch, tokens * each / versions, part)
            for each in BATCHES
        )
        return many.continued(few, tokens)

    versions = rollout_totals(spec, stage, lengths.prompt, lengths.completion).versions
    counted, without = windows(stage, tokens, anchors * step), windows(stage, tokens, 0.0)
    if anchors * max(BATCHES) * every < 1 and counted < without / 2:
        if without * anchors <= 1:
            versions, step, stage = without / every, 0, stage.model_copy(update={"anchor": 0.0})
        else:
            whole = _with_whole_anchors(tokens, tokens / without, 1 / anchors, step)
            versions, tokens = counted / every * whole / tokens, whole
            part = anchors * DIVIDED * every
            stage = stage.model_copy(update={"anchor": 1 / (1 + DIVIDED * every)})
    elif counted / every > 2 * versions:
        versions = counted / every
    largest = max(map(window_tokens, levels(stage, tokens))) * every
    if versions <= 2 * max(BATCHES) or largest <= tokens * min(BATCHES) / versions:
        return shortened(stage, tokens, versions)
    found = StageTime(0.0, dict.fromkeys(("train", "sampler", "teacher"), 0.0), 0.0, 0.0, 0.0, 0.0, 0.0, 0)
    for phase in stage.curriculum:
        alone = stage.model_copy(update={"curriculum": (phase,)})
        of_phase = tokens * phase.share / sum(each.share for each in stage.curriculum)
        one = shortened(alone, of_phase, windows(alone, of_phase, anchors * step) / every)
        found = found.plus(one, of_phase / one.tokens)
    return found


def _with_whole_anchors(tokens: float, window: float, between: float, anchor: float) -> float:
    """The tokens of a stage of `tokens`, if it ends in an anchor step with the whole of it, and in windows
    with what they have of one. `window`, `anchor`: tokens of each; there are `between` windows between two
    anchor steps."""
    whole, rest = divmod(tokens, between * window + anchor)
    if rest >= between * window:
        return (whole + 1) * (between * window + anchor)
    return whole * (between * window + anchor) + rest * (1 + anchor / between / window)


def simulate(
    spec: Spec,
    stage: OnPolicy,
    lengths: Lengths,
    times: RoleTimes,
    microbatch: Microbatch,
    tokens: float,
    anchor_part: float = 1.0,
) -> StageTime:
    """Simulate a stage that ends after `tokens` tokens; the phases of its curriculum are scaled to them.
    `anchor_part`: of an anchor step, what each is of it.

    Each role starts when it is free and its input exists. The trainer works while it copies weights, the
    sampler does not while it loads them. The sampler takes all windows of a version as one batch, and writes
    them when its last completion has finished and the bucket has the version; the teachers, which share the
    windows by turns, score the parts of the batch before.
    """
    training, every, teachers = spec.training, stage.publish_every, spec.teacher.gpus
    plan, curriculum = layout(spec.student, training, stage), levels(stage, tokens)

    @cache
    def step_seconds(sequences: int) -> float:
        """Of an optimizer step for which each rank has so many sequences."""
        token = times.position * MOST / (MOST + FIXED)  # times.position is of a microbatch of MOST
        return token * time_of_stage(microbatch, spec, stage, sequences) + times.step

    @cache
    def sampled_batch(level: Level, windows: int) -> tuple[Requests, SampledBatch]:
        requests = requests_of(spec, stage, lengths, level, windows)
        return requests, sample_batch(requests, stage.sampler.gpus, times)

    anchor_seconds = step_seconds(plan.sequences_per_rank) * anchor_part
    anchor_tokens = plan.tokens_per_step * anchor_part
    # By version: the time when it is in the bucket, the tokens of the stage when it was published, and the
    # time when the sampler finds it.
    published, seen_at = {0: times.copy + times.publish}, {0: 0.0}
    found = {0: times.copy + times.volume if times.volume is not None else published[0] + POLL / 2}
    trained, uploaded, sampled, scored = times.copy, published[0], 0.0, [0.0] * teachers
    busy = {"train": 0.0, "sampler": 0.0, "teacher": 0.0}
    working, copying, uploading = 0.0, times.copy, 0.0
    seen = rolled = 0.0
    anchors, windows_share = 0, 1 - stage.anchor
    for version in count(0, every):
        level = next((each for each in curriculum if seen_at[version] < each.end), curriculum[-1])
        windows = windows_of(version, stage.staleness, every)
        requests, batch = sampled_batch(level, len(windows))
        began = max(sampled, found[version]) + times.load
        sampled = max(began + batch.seconds, published[version])
        busy["sampler"] += batch.seconds
        window_tokens = batch.tokens / len(windows)
        score_seconds = window_tokens * times.score
        rows = math.ceil(window_tokens / (PACKED * training.sequence_length))
        train_seconds = step_seconds(math.ceil(rows / plan.ranks))
        score_left = {}  # of each teacher that has windows of the batch: the seconds that each takes
        fewest, more = divmod(len(windows), teachers)
        for place, window in enumerate(windows[:teachers]):
            if place in (0, more):
                share = (fewest + (place < more)) / len(windows)
                parts = part_scores(requests, stage.sampler.gpus, times, share)
                first = began + parts.begun[0] if parts.begun else 0.0  # all that are free by then are alike
                from_first = parts.score(began, first)
            teacher = window % teachers
            free = max(scored[teacher], published[version])
            free, left = from_first if free <= first else parts.score(began, free)
            scored[teacher], score_left[teacher] = max(free, sampled + POLL / 2), score_seconds * left
        anchors_before = anchors
        for window in windows:  # the longest stages have millions: no more than is needed is done here
            teacher = window % teachers
            scored[teacher] = ready = scored[teacher] + score_left[teacher]
            ready += POLL / 2
            trained = (ready if ready > trained else trained) + train_seconds
            seen += window_tokens
            window += 1
            if window % every == 0:
                uploading += max(0.0, uploaded - trained)
                trained = max(trained, uploaded) + times.copy  # one upload runs at a time
                copying += times.copy
                published[window] = uploaded = trained + times.publish
                found[window] = trained + times.volume if times.volume is not None else uploaded + POLL / 2
                seen_at[window] = seen
            if (before := int(window / windows_share) - window) > anchors:
                trained += (before - anchors) * anchor_seconds
                seen += (before - anchors) * anchor_tokens
                anchors = before
            if seen >= tokens:
                break
        number = window - windows.start
        rolled += number * window_tokens
        busy["teacher"] += number * score_seconds / teachers
        working += number * train_seconds + (anchors - anchors_before) * anchor_seconds
        if seen >= tokens:
            busy["train"] = working + copying
            return StageTime(trained, busy, seen, rolled, window, copying, uploading, window)
    raise AssertionError("every window has tokens")
