"""Simulation of an OnPolicy stage on 8 GPUs: throughput, and which role waits for which.

    python -m benchmarks.pipeline [--run manifests/examples/full.yaml] [--tokens 100M] [--prompts N]
        [--completion low=300,medium=700,high=1500] [--engines 3] [--decode 0.004] …

The stage's own rules (version of each window, anchor steps, efforts, rollouts, packing) are simulated for
`--tokens` tokens, with the curriculum's phases scaled to them. Durations are options; their help says where
the defaults come from. Runs on one CPU core.

For one and for two teachers it prints three tables: the best split of the other GPUs by staleness and
publishEvery; all splits at the run's settings; the best split by window size. The best split has the most
tokens per second. Columns:
  T + S + t    GPUs of teacher, sampler and trainer
  idle, busy   share of the time in which a role waits or works
  s/win        seconds per window
  tokens/s     tokens of the stage per second, anchor steps included
  on-policy    tokens of windows per second; an anchor step has globalBatchTokens for every window size
  /floor       the time relative to the floor, the time of the role with the most work if it never waited

The trainer works while it copies weights; the sampler does not work while it loads them. Engines share one
queue, and the teacher scores finished completions in parts. Not simulated: completions that vLLM preempts and
recomputes when the KV cache is full.
"""

import argparse
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from vpmoe.api import DistillRun, load_run
from vpmoe.api.layout import layout
from vpmoe.api.quantities import parse_tokens
from vpmoe.api.stages import OnPolicy
from vpmoe.data.packing import pack_sequences
from vpmoe.inference.request_queue import RequestSize, longest_first
from vpmoe.plan.sampling import SEQUENCES
from vpmoe.rollout.__main__ import PROMPT_TOKENS, parse_lengths
from vpmoe.rollout.windows import WindowPlan, WindowSchedule, completion_limit
from vpmoe.sampler.part_log import PART_SECONDS

GPUS = 8
DOCUMENTS = 1_000_000
PACES = [(staleness, every) for staleness in range(5) for every in (1, 2)] + [(4, 4), (8, 8)]
"""(staleness, publishEvery) of the tables."""


class DecodingStep(NamedTuple):
    """Seconds of a decoding step of one of several engines that share a GPU, each with as many sequences."""

    decode: float
    """Of a step with a token per sequence, without what each adds."""
    token: float
    """What each sequence adds."""


DECODE = {1: DecodingStep(0.0071, 2.1e-5), 2: DecodingStep(0.0099, 3.2e-5)}
"""By engines on a GPU, the straight line through the steps of 512 and 1,024 sequences that benchmarks.decode
measures while completions grow and are replaced, so with the prompts' steps: H200."""
MEASURED = {
    "microbatch": (
        0.1024,
        "seconds of a microbatch of one row of sequenceLength on one GPU: vpmoe-6b, 8,192 tokens, a quarter "
        "of the time for 32,768, 2 × H200; docs/benchmarks.md",
    ),
    "step": (0.115, "seconds of an optimizer step, without its microbatches; same source"),
    "spread": (
        0.34,
        "standard deviation of the logarithm of a completion's length at one effort; as in SYNTH's rows",
    ),
}
ASSUMED = {
    "prefill": (30_000.0, "prompt tokens per second on one GPU of the sampler"),
    "runaway": (0.01, "share of completions that reach their limit"),
    "score": (
        67_500.0,
        "tokens per second that one teacher scores: gpt-oss-20b, benchmarks.scorer, H200",
    ),
    "copy": (
        0.8,
        "seconds that training waits while a version is copied and probed: benchmarks.publication",
    ),
    "publish": (22.0, "seconds from then until the version is in the bucket, at 1 GB/s: same source"),
    "load": (
        22.5,
        "seconds for the sampler to fetch a version, load it into its engines and verify it: same source",
    ),
    "volume": (
        0.0,
        "seconds from the copy until a version is on a volume that the sampler's --load is from "
        "(runtime.weightsVolume): benchmarks.publication --shape; 0 without a volume",
    ),
    "poll": (1.0, "seconds between two polls for an object; half of it is lost at each wait, on average"),
}


class Times(NamedTuple):
    """The values of MEASURED, ASSUMED and DECODE, or of the options that replace them."""

    microbatch: float
    step: float
    spread: float
    prefill: float
    runaway: float
    score: float
    copy: float
    publish: float
    load: float
    volume: float
    poll: float
    engines: int
    """Engines on each GPU of the sampler."""
    decode: float
    decode_token: float


@dataclass
class Result:
    """One simulated stage: its seconds, and the seconds for which each role works.

    `seen`: tokens of the stage. `rolled`: tokens of windows alone.
    """

    split: str
    total: float = 0.0
    trainer: float = 0.0
    sampler: float = 0.0
    teacher: float = 0.0
    windows: int = 0
    seen: int = 0
    rolled: int = 0

    @property
    def floor(self) -> float:
        """Seconds of the stage if the role with the most work never waited."""
        return max(self.trainer, self.sampler, self.teacher)


class WindowRequests(NamedTuple):
    """The requests of a window, in order: tokens of each prompt, and of each completion its limit and its
    length."""

    prompt: int
    limits: tuple[int, ...]
    sampled: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.sampled) + self.prompt * len(self.sampled)


def stage_of(run: DistillRun, teachers: int, sampling: int, **changes: object) -> tuple[DistillRun, OnPolicy]:
    """The run with these numbers of GPUs and these changes to its OnPolicy stage, and that stage.

    The run must have exactly one OnPolicy stage.
    """
    written: Any = run.document()
    written["spec"]["teacher"]["gpus"] = teachers
    written["spec"]["student"] |= {"gpus": GPUS - teachers, "gpusPerPod": None}
    for stage in written["spec"]["stages"]:
        if stage["kind"] == "OnPolicy":
            stage |= {"sampler": {"gpus": sampling}, **changes}
    changed = DistillRun.parse(written)
    (found,) = (stage for stage in changed.spec.stages if isinstance(stage, OnPolicy))
    return changed, found


KNOWN: dict[tuple[object, ...], WindowRequests] = {}
"""Cache over simulations, by number, level and rollout settings of a window."""


def requests(
    windows: WindowSchedule,
    number: int,
    tokens: int,
    mean: dict[str, int],
    prompt: int,
    bound: int,
    times: Times,
) -> WindowRequests:
    """The requests of window `number`, whose version was published after `tokens` tokens of the stage."""
    key = (number, windows.curriculum.level_at(tokens), windows.curriculum.stage.rollout)
    if key not in KNOWN:
        KNOWN[key] = sampled_requests(windows.window(number, tokens), mean, prompt, bound, times)
    return KNOWN[key]


def sampled_requests(
    window: WindowPlan, mean: dict[str, int], prompt: int, bound: int, times: Times
) -> WindowRequests:
    """The requests of a window with the length of each completion, a function of the request's seed.

    Lengths are log-normal around the mean of the effort; a share of `runaway` reaches the limit.
    """
    limits, sampled = [], []
    for one in window.prompts:
        most = completion_limit(prompt, one.effort, window.max_tokens, bound)
        middle = NormalDist(np.log(mean[one.effort]) - times.spread**2 / 2, times.spread)
        for seed in one.seeds:
            high, low = divmod(seed, 1 << 32)
            drawn = most if low < times.runaway * 2**32 else int(np.exp(middle.inv_cdf((high + 0.5) / 2**31)))
            limits.append(most)
            sampled.append(min(most, max(1, drawn)))
    return WindowRequests(prompt, tuple(limits), tuple(sampled))


class SampledBatch(NamedTuple):
    """How long a batch takes, and what is finished before."""

    seconds: float
    """Until its last completion has finished."""
    parts: tuple[tuple[float, int], ...]
    """Of each part, the seconds after which it is written, and its tokens, prompts included. What finishes
    after the last one comes with the windows."""


@lru_cache(None)
def sample_batch(requests: WindowRequests, gpus: int, slots: int, times: Times) -> SampledBatch:
    """Sample requests from one queue for all engines, as request_queue.py orders it.

    A decoding step costs `decode` even if few sequences are left. `slots`: of each engine.
    """
    engines = gpus * times.engines
    sizes = [RequestSize(limit, requests.prompt) for limit in requests.limits]
    busy: list[int] = [0] * (engines * slots)  # of each place, the step at which it is free
    ends, lengths = [], [requests.sampled[number] for number in longest_first(sizes)]
    for length in lengths:
        ends.append(busy[0] + length)
        heapq.heapreplace(busy, ends[-1])
    steps = max(ends, default=0)
    seconds = (
        steps * times.decode
        + sum(lengths) / engines * times.decode_token
        + len(lengths) / gpus * requests.prompt / times.prefill
    )
    count = int(seconds / PART_SECONDS)
    parts = [0] * count
    for end, length in zip(ends, lengths, strict=True):
        number = int(end / steps * seconds / PART_SECONDS)
        if number < count:
            parts[number] += length + requests.prompt
    return SampledBatch(
        seconds, tuple((PART_SECONDS * (number + 1), tokens) for number, tokens in enumerate(parts))
    )


def score_parts(
    batch: SampledBatch, began: float, free: float, tokens: int, teachers: int, times: Times
) -> tuple[float, float]:
    """What one of the teachers scores of a batch, whose sampling `began`, while the batch is sampled.

    `free`: when the teacher is; `tokens`: of the batch. Returns when it is free again, and the share of its
    windows' tokens that is left to score.
    """
    done = 0
    for written, finished in batch.parts:
        begin = max(free, began + written + times.poll / 2)
        if begin >= began + batch.seconds:
            break
        free, done = begin + finished / teachers / times.score, done + finished
    return free, 1 - done / tokens


@lru_cache(None)
def packed_rows(requests: WindowRequests, sequence_length: int) -> int:
    """Number of rows into which the trainer packs a window."""
    return (
        len(
            pack_sequences(
                np.array([requests.prompt + length for length in requests.sampled], np.int32), sequence_length
            )[1]
        )
        - 1
    )


def simulate(
    run: DistillRun, stage: OnPolicy, mean: dict[str, int], prompt: int, slots: int, times: Times
) -> Result:
    """Simulate the stage window by window: each role starts when it is free and its input exists.

    The sampler takes all windows of a version as one batch. Its windows are written when its last completion
    has finished; the teacher scores the parts of the batch before.
    """
    spec = run.spec
    plan, bound, teachers = (
        layout(spec.student, spec.training, stage),
        spec.training.sequence_length,
        spec.teacher.gpus,
    )
    windows = WindowSchedule(stage, spec.training.seed, [DOCUMENTS])
    course = windows.curriculum
    anchor_tokens = plan.tokens_per_step
    anchors = np.arange(1, -(-stage.tokens // anchor_tokens) + 1) * anchor_tokens
    anchor_seconds = plan.sequences_per_rank * times.microbatch + times.step
    lost = times.poll / 2
    # By version: the time when it is in the bucket, the tokens of the stage when it was published, and the
    # time when the sampler finds it.
    published, seen_at = {0: times.copy + times.publish}, {0: 0}
    found = {0: times.copy + times.volume if times.volume else published[0] + lost}
    trained = uploaded = published[0]
    sampled, scored = 0.0, [0.0] * teachers
    # By teacher: the share of the loaded version's tokens that is not scored in parts.
    left = [1.0] * teachers
    loaded, seen, number, step = -1, 0, 0, 0
    out = Result(f"{teachers} + {stage.sampler.gpus} + {plan.ranks}", trainer=times.copy)
    while seen < stage.tokens:
        version = course.version_of(number)
        batch = [
            requests(windows, each, seen_at[version], mean, prompt, bound, times)
            for each in course.windows_of(version)
        ]
        window = batch[number - course.windows_of(version)[0]]
        if version != loaded:
            together = WindowRequests(
                prompt,
                sum((each.limits for each in batch), ()),
                sum((each.sampled for each in batch), ()),
            )
            of_batch = sample_batch(together, stage.sampler.gpus, slots, times)
            began = max(sampled, found[version]) + times.load
            sampled = max(began + of_batch.seconds, published[version])  # nothing is written before
            out.sampler += of_batch.seconds
            for each in range(teachers):
                free = max(scored[each], published[version])
                scored[each], left[each] = score_parts(
                    of_batch, began, free, together.tokens, teachers, times
                )
            loaded = version

        takes = window.tokens / times.score
        out.teacher += takes / teachers
        scored[number % teachers] = (
            max(scored[number % teachers], sampled + lost) + takes * left[number % teachers]
        )

        while not course.is_window(step):
            trained, out.trainer, step = trained + anchor_seconds, out.trainer + anchor_seconds, step + 1
        takes = -(-packed_rows(window, bound) // plan.ranks) * times.microbatch + times.step
        trained = max(trained, scored[number % teachers] + lost) + takes
        out.trainer += takes
        step += 1
        after = course.tokens_before_next(number, seen, window.tokens, anchors)
        out.windows += 1
        out.rolled += window.tokens
        number += 1
        if number % stage.publish_every == 0:
            trained = max(trained, uploaded) + times.copy  # one upload runs at a time
            out.trainer += times.copy
            published[number] = uploaded = trained + times.publish
            found[number] = trained + times.volume if times.volume else uploaded + lost
            seen_at[number] = seen + window.tokens
        seen = after
    out.total, out.seen = trained, seen
    return out


def splits(run: DistillRun, teachers: int, how: Sequence[Any], **changes: object) -> list[Result]:
    """Simulate every split of the student's GPUs between sampler and trainer."""
    return [
        simulate(*stage_of(run, teachers, number, **changes), *how) for number in range(1, GPUS - teachers)
    ]


def row(result: Result, *first: object) -> str:
    """A line of a table; its columns are in the module docstring."""
    total = result.total
    shares = "  ".join(
        f"{busy / total:7.1%}"
        for busy in (total - result.trainer, result.trainer, result.sampler, result.teacher)
    )
    head = "  ".join(f"{cell!s:>9}" for cell in (*first, result.split))
    speeds = f"{result.seen / total:9,.0f}  {result.rolled / total:9,.0f}"
    return f"{head}  {shares}  {total / result.windows:7.1f}  {speeds}  {total / result.floor:6.2f}"


def header(*first: str) -> str:
    """The head of a table; `first` are the columns before the split."""
    head = "  ".join(f"{cell:>9}" for cell in (*first, "T + S + t"))
    roles = f"{'t idle':>7}  {'t busy':>7}  {'S busy':>7}  {'T busy':>7}"
    return f"{head}  {roles}  {'s/win':>7}  {'tokens/s':>9}  {'on-policy':>9}  {'/floor':>6}"


def best(run: DistillRun, teachers: int, how: Sequence[Any], **changes: object) -> Result:
    """The split with the most tokens per second."""
    return min(splits(run, teachers, how, **changes), key=lambda result: result.total / result.seen)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("manifests/examples/full.yaml"))
    parser.add_argument(
        "--tokens", type=parse_tokens, default=parse_tokens("100M"), help="tokens to simulate (default: 100M)"
    )
    parser.add_argument(
        "--prompt", type=int, default=PROMPT_TOKENS, help=f"tokens of a prompt (default: {PROMPT_TOKENS})"
    )
    parser.add_argument(
        "--completion",
        type=parse_lengths,
        default=parse_lengths("low=300,medium=700,high=1500"),
        help="mean tokens of a completion by effort (default: low=300,medium=700,high=1500)",
    )
    parser.add_argument("--prompts", type=int, help="prompts per window (default: the run's)")
    parser.add_argument(
        "--slots",
        type=int,
        default=SEQUENCES,
        help=f"sequences in flight per engine (default: {SEQUENCES})",
    )
    parser.add_argument(
        "--engines",
        type=int,
        default=max(DECODE),
        help=f"engines on each GPU of the sampler (default: {max(DECODE)}, the most that were measured)",
    )
    for name, what in (
        ("decode", "seconds of a decoding step, without what each sequence adds"),
        ("decode-token", "seconds that each sequence in flight adds to a step"),
    ):
        parser.add_argument(
            f"--{name}",
            type=float,
            metavar="X",
            help=f"{what}, of one of --engines on a GPU (default: as benchmarks.decode measured for so many)",
        )
    for kind, known in (("measured", MEASURED), ("assumed", ASSUMED)):
        for name, (value, what) in known.items():
            parser.add_argument(
                f"--{name}", type=float, default=value, metavar="X", help=f"{what} ({kind}: {value:g})"
            )
    given = parser.parse_args(arguments)
    if given.engines not in DECODE and None in (given.decode, given.decode_token):
        parser.error(
            f"a step of {given.engines} engines on a GPU was not measured: give --decode and --decode-token, "
            f"as benchmarks.decode --engines {given.engines} prints them"
        )
    if given.decode is None:
        given.decode = DECODE[given.engines].decode
    if given.decode_token is None:
        given.decode_token = DECODE[given.engines].token
    run = load_run(given.run)
    (stage,) = (stage for stage in run.spec.stages if isinstance(stage, OnPolicy))
    rollout = stage.rollout.model_dump(mode="json", by_alias=True)
    each = rollout["promptsPerWindow"] = given.prompts or stage.rollout.prompts_per_window
    how = (
        given.completion,
        given.prompt,
        given.slots,
        Times(**{name: getattr(given, name) for name in Times._fields}),
    )
    mean = ", ".join(f"{effort} {length:,}" for effort, length in given.completion.items())
    print(
        f"{given.tokens:,} tokens, {each:,} prompts per window; {given.engines} engines per GPU, "
        f"{given.slots} sequences per engine, a step of {given.decode:g} s and {given.decode_token:g} s a "
        "sequence."
    )
    print(f"Prompts of {given.prompt} tokens, mean completion {mean}; anchor {stage.anchor:g}.")
    for kind, known in (("Measured", MEASURED), ("Assumed", ASSUMED)):
        print(f"{kind}: " + ", ".join(f"{name} {getattr(given, name.replace('-', '_')):g}" for name in known))
    print(
        "GPUs of the teacher (T), the sampler (S) and the trainer (t); /floor is the time relative to that "
        "of the role with the most work."
    )
    for teachers in (1, 2):
        print(f"\n{teachers} teacher(s), best split:\n{header('staleness', 'every')}")
        for staleness, every in PACES:
            found = best(
                run,
                teachers,
                how,
                tokens=given.tokens,
                staleness=staleness,
                publishEvery=every,
                rollout=rollout,
            )
            print(row(found, staleness, every), flush=True)
        print(f"\n{teachers} teacher(s), the run's settings, all splits:\n{header()}")
        for found in splits(run, teachers, how, tokens=given.tokens, rollout=rollout):
            print(row(found), flush=True)
        print(
            f"\n{teachers} teacher(s), larger windows, best split:\n{header('prompts', 'staleness', 'every')}"
        )
        for times in (2, 4, 8):
            tokens = given.tokens * min(times, 4)  # more, so that start and end of the stage matter little
            size = rollout | {"promptsPerWindow": each * times}
            for staleness, every in ((1, 1), (2, 1), (2, 2), (4, 4)):
                found = best(
                    run, teachers, how, tokens=tokens, staleness=staleness, publishEvery=every, rollout=size
                )
                print(row(found, each * times, staleness, every), flush=True)


if __name__ == "__main__":
    main()
