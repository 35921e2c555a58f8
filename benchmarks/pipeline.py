"""An OnPolicy stage on 8 GPUs, simulated: who waits for whom, by staleness, publishEvery, teachers, and the
sampler's share of the GPUs.

    python -m benchmarks.pipeline [--run manifests/examples/full.yaml] [--tokens 200M] [--completion
    low=300,medium=700,high=1500] …

The stage's own rules (which windows from which version, anchor steps, efforts, rollouts, packing) run for so
many tokens, with the run's phases in proportion; how long things take is given below, each with where its
default comes from. Prints by staleness and publishEvery, then by promptsPerWindow, the split with most tokens
a second, and for each role the share of the time for which it works; then all splits. tokens/s are the
stage's, on-policy those of windows alone: anchor steps have globalBatchTokens however small windows are. The
floor is the time of the role with most work, if it never waited. A trainer that copies weights works; a
sampler that loads them does not. A completion that vLLM sets aside because keys and values find no room, to
compute it again, is not in it.
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
from vpmoe.inference.engine import MAX_SEQUENCES
from vpmoe.rollout.__main__ import PROMPT_TOKENS, parse_lengths
from vpmoe.rollout.windows import WindowPlan, WindowSchedule, completion_limit

GPUS = 8
DOCUMENTS = 1_000_000
PACES = [(staleness, every) for staleness in range(5) for every in (1, 2)] + [(4, 4), (8, 8)]
"""(staleness, publishEvery) of the tables."""

MEASURED = {
    "microbatch": (
        0.72,
        "seconds of a microbatch of one row of sequenceLength on one GPU: vpmoe-6b, 8,192, an H200; "
        "docs/benchmarks.md",
    ),
    "step": (0.12, "seconds of an optimizer step beside its microbatches; same place"),
    "spread": (
        0.34,
        "standard deviation of the logarithm of a completion's length at one effort; that of SYNTH's rows",
    ),
    "decode": (
        0.190,
        "seconds of a forward that draws a token of each sequence, no CUDA graph (with one 0.023): "
        "benchmarks.decode, H100",
    ),
    "decode-token": (7.5e-5, "seconds that each sequence in flight adds to it, context 512; same place"),
}
ASSUMED = {
    "prefill": (30_000.0, "tokens of prompts a second on one GPU of the sampler"),
    "runaway": (0.01, "share of completions that do not stop before their bound"),
    "score": (
        15_000.0,
        "tokens a second that one teacher scores; gpt-oss-20b in transformers and bf16 makes 16,800 on an "
        "H100",
    ),
    "copy": (
        0.8,
        "seconds for which training waits while a version is copied and probed: benchmarks.publication",
    ),
    "publish": (22.0, "seconds from there until it is in the bucket, at 1 GB/s: same place"),
    "load": (
        22.5,
        "seconds in which the sampler fetches it, takes it into its engines and proves it: same place",
    ),
    "poll": (1.0, "seconds between two looks for an object; half of it is lost at each"),
}


class Times(NamedTuple):
    """How long things take, as above."""

    microbatch: float
    step: float
    spread: float
    decode: float
    decode_token: float
    prefill: float
    runaway: float
    score: float
    copy: float
    publish: float
    load: float
    poll: float


@dataclass
class Result:
    """One simulated stage: seconds of it, and for which of them each role works. `seen`: its tokens;
    `rolled`: those of windows."""

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
        return max(self.trainer, self.sampler, self.teacher)


class Asked(NamedTuple):
    """What a window's requests come to, in their order, tokens."""

    prompt: int
    sampled: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.sampled) + self.prompt * len(self.sampled)


def stage_of(run: DistillRun, teachers: int, sampling: int, **changes: object) -> tuple[DistillRun, OnPolicy]:
    """The run with other numbers, and its OnPolicy stage, which must be its only one."""
    written: Any = run.document()
    written["spec"]["teacher"]["gpus"] = teachers
    written["spec"]["student"] |= {"gpus": GPUS - teachers, "gpusPerPod": None}
    for stage in written["spec"]["stages"]:
        if stage["kind"] == "OnPolicy":
            stage |= {"sampler": {"gpus": sampling}, **changes}
    changed = DistillRun.parse(written)
    (found,) = (stage for stage in changed.spec.stages if isinstance(stage, OnPolicy))
    return changed, found


KNOWN: dict[tuple[object, ...], Asked] = {}
"""By number, level and prompts of a window: what is the same in many simulations is worked out once."""


def requests(
    windows: WindowSchedule,
    number: int,
    tokens: int,
    mean: dict[str, int],
    prompt: int,
    bound: int,
    times: Times,
) -> Asked:
    """What window `number` comes to where its version has seen so many tokens."""
    key = (number, windows.curriculum.level_at(tokens), windows.curriculum.stage.rollout)
    if key not in KNOWN:
        KNOWN[key] = asked(windows.window(number, tokens), mean, prompt, bound, times)
    return KNOWN[key]


def asked(window: WindowPlan, mean: dict[str, int], prompt: int, bound: int, times: Times) -> Asked:
    """How long each completion gets: log-normal about its effort's mean, some of them as long as they may be;
    by the request's seed."""
    sampled = []
    for one in window.prompts:
        most = completion_limit(prompt, one.effort, window.max_tokens, bound)
        middle = NormalDist(np.log(mean[one.effort]) - times.spread**2 / 2, times.spread)
        for seed in one.seeds:
            high, low = divmod(seed, 1 << 32)
            drawn = most if low < times.runaway * 2**32 else int(np.exp(middle.inv_cdf((high + 0.5) / 2**31)))
            sampled.append(min(most, max(1, drawn)))
    return Asked(prompt, tuple(sampled))


@lru_cache(None)
def sampling(requests: Asked, engines: int, slots: int, times: Times) -> float:
    """Seconds until the slowest of the engines has its share: each forward costs what it costs, however few
    sequences are left."""
    slowest = 0.0
    for number in range(engines):
        mine = requests.sampled[number::engines]
        busy = list(mine[:slots])
        heapq.heapify(busy)
        for length in mine[slots:]:
            heapq.heapreplace(busy, busy[0] + length)
        steps = max(busy, default=0)
        slowest = max(
            slowest,
            steps * times.decode
            + sum(mine) * times.decode_token
            + len(mine) * requests.prompt / times.prefill,
        )
    return slowest


@lru_cache(None)
def rows(requests: Asked, sequence_length: int) -> int:
    """Packed rows that the trainer makes of a window."""
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
    """The stage, window by window: each role begins as soon as it is free and what it needs is there.

    The sampler takes all windows of a version as one batch; they are there when the last of its completions
    is.
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
    published, seen_at = (
        {0: times.copy + times.publish},
        {0: 0},
    )  # by version: when it is there, the stage's tokens at it
    trained = uploaded = published[0]
    sampled, scored = 0.0, [0.0] * teachers
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
            takes = sampling(
                Asked(prompt, sum((each.sampled for each in batch), ())), stage.sampler.gpus, slots, times
            )
            sampled = max(sampled, published[version] + lost) + times.load + takes
            out.sampler += takes
            loaded = version

        takes = window.tokens / times.score
        scored[number % teachers] = max(scored[number % teachers], sampled + lost) + takes
        out.teacher += takes / teachers

        while not course.is_window(step):
            trained, out.trainer, step = trained + anchor_seconds, out.trainer + anchor_seconds, step + 1
        takes = -(-rows(window, bound) // plan.ranks) * times.microbatch + times.step
        trained = max(trained, scored[number % teachers] + lost) + takes
        out.trainer += takes
        step += 1
        after = course.tokens_before_next(number, seen, window.tokens, anchors)
        out.windows += 1
        out.rolled += window.tokens
        number += 1
        if number % stage.publish_every == 0:
            trained = max(trained, uploaded) + times.copy  # one upload goes on at a time
            out.trainer += times.copy
            published[number] = uploaded = trained + times.publish
            seen_at[number] = seen + window.tokens
        seen = after
    out.total, out.seen = trained, seen
    return out


def splits(run: DistillRun, teachers: int, how: Sequence[Any], **changes: object) -> list[Result]:
    """Every split of the student's GPUs between sampler and trainer."""
    return [
        simulate(*stage_of(run, teachers, number, **changes), *how) for number in range(1, GPUS - teachers)
    ]


def row(result: Result, *first: object) -> str:
    """A line of a table: shares of the time for which each role works, seconds of a window, tokens and those
    of windows a second."""
    total = result.total
    shares = "  ".join(
        f"{busy / total:7.1%}"
        for busy in (total - result.trainer, result.trainer, result.sampler, result.teacher)
    )
    head = "  ".join(f"{cell!s:>9}" for cell in (*first, result.split))
    speeds = f"{result.seen / total:9,.0f}  {result.rolled / total:9,.0f}"
    return f"{head}  {shares}  {total / result.windows:7.1f}  {speeds}  {total / result.floor:6.2f}"


def header(*first: str) -> str:
    head = "  ".join(f"{cell:>9}" for cell in (*first, "T + S + t"))
    roles = f"{'t idle':>7}  {'t busy':>7}  {'S busy':>7}  {'T busy':>7}"
    return f"{head}  {roles}  {'s/win':>7}  {'tokens/s':>9}  {'on-policy':>9}  {'/floor':>6}"


def best(run: DistillRun, teachers: int, how: Sequence[Any], **changes: object) -> Result:
    """The split with most tokens a second."""
    return min(splits(run, teachers, how, **changes), key=lambda result: result.total / result.seen)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("manifests/examples/full.yaml"))
    parser.add_argument(
        "--tokens", type=parse_tokens, default=parse_tokens("100M"), help="tokens that are simulated (100M)"
    )
    parser.add_argument(
        "--prompt", type=int, default=PROMPT_TOKENS, help=f"tokens of a prompt ({PROMPT_TOKENS})"
    )
    parser.add_argument(
        "--completion",
        type=parse_lengths,
        default=parse_lengths("low=300,medium=700,high=1500"),
        help="mean tokens by effort",
    )
    parser.add_argument("--prompts", type=int, help="prompts of a window (default: the run's)")
    parser.add_argument(
        "--slots",
        type=int,
        default=MAX_SEQUENCES["cuda"],
        help=f"sequences of one engine in flight ({MAX_SEQUENCES['cuda']})",
    )
    for kind, known in (("measured", MEASURED), ("assumed", ASSUMED)):
        for name, (value, what) in known.items():
            parser.add_argument(
                f"--{name}", type=float, default=value, metavar="X", help=f"{what} ({kind}: {value:g})"
            )
    given = parser.parse_args(arguments)
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
    print(f"{given.tokens:,} tokens, {each:,} prompts a window, {given.slots} sequences an engine at once.")
    print(f"Prompts of {given.prompt} tokens, completions of {mean}; anchor {stage.anchor:g}.")
    for kind, known in (("Measured", MEASURED), ("Assumed", ASSUMED)):
        print(f"{kind}: " + ", ".join(f"{name} {getattr(given, name.replace('-', '_')):g}" for name in known))
    print(
        "GPUs of the teacher (T), the sampler (S) and the trainer (t); /floor is the time over that of the "
        "role with most work."
    )
    for teachers in (1, 2):
        print(f"\n{teachers} teacher(s), the best split:\n{header('staleness', 'every')}")
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
        print(f"\n{teachers} teacher(s), as the run has it, all splits:\n{header()}")
        for found in splits(run, teachers, how, tokens=given.tokens, rollout=rollout):
            print(row(found), flush=True)
        print(
            f"\n{teachers} teacher(s), larger windows, the best "
            f"split:\n{header('prompts', 'staleness', 'every')}"
        )
        for times in (2, 4, 8):
            tokens, size = (
                given.tokens * min(times, 4),
                rollout | {"promptsPerWindow": each * times},
            )  # so many that the ends weigh little
            for staleness, every in ((1, 1), (2, 1), (2, 2), (4, 4)):
                found = best(
                    run, teachers, how, tokens=tokens, staleness=staleness, publishEvery=every, rollout=size
                )
                print(row(found, each * times, staleness, every), flush=True)


if __name__ == "__main__":
    main()
