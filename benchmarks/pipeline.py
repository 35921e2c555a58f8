"""Tables of simulated OnPolicy stages on 8 GPUs: throughput, and which role waits for which.

    python -m benchmarks.pipeline [--run manifests/examples/full.yaml] [--tokens 8B] [--prompts N]
        [--prompt 103] [--completion low=300,medium=700,high=1500] [--weights bucket|volume] [--engines 2]
        [--load 1.8] …

The simulation is that of `vpmoe plan` (vpmoe/plan/simulation.py), of the run's OnPolicy stage with other
splits, windows and paces. Durations are those that the plan computes with (vpmoe/plan/throughput.py), of
vpmoe-6b and the teacher gpt-oss-20b on H200s; options replace them. Runs on one CPU core.

For one and for two teachers it prints three tables: the best split of the other GPUs by staleness and
publishEvery; all splits at the run's settings; the best split by window size. The best split has the most
tokens per second. Columns:
  T + S + t    GPUs of teacher, sampler and trainer
  idle, busy   share of the time in which a role waits or works
  s/win        seconds per window
  tokens/s     tokens of the stage per second, anchor steps included
  on-policy    tokens of windows per second; an anchor step has globalBatchTokens for every window size
  /floor       the time relative to the floor, the time of the role with the most work if it never waited

The trainer works while it copies weights; the sampler does not work while it loads them.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from vpmoe.api import DistillRun, load_run
from vpmoe.api.memory import STUDENTS
from vpmoe.api.stages import OnPolicy
from vpmoe.cli.plan import positive_number, tokens
from vpmoe.plan.memory import trainer_microbatch
from vpmoe.plan.sampling import ENGINES, SEQUENCES
from vpmoe.plan.simulation import RUNAWAY, SPREAD, Lengths, StageTime, stage_time
from vpmoe.plan.throughput import CARDS, DECODE, RoleTimes, measured, role_times
from vpmoe.rollout.__main__ import PROMPT_TOKENS, parse_lengths

GPUS = 8
CARD, STUDENT, TEACHER = "h200-141", "vpmoe-6b", "gpt-oss-20b"
PACES = [(staleness, every) for staleness in range(5) for every in (1, 2)] + [(4, 4), (8, 8)]
"""(staleness, publishEvery) of the tables."""
SECONDS = {
    "position": "the trainer computes a position forward and backward on one GPU",
    "step": "an optimizer step, without its positions",
    "decode": "a decoding step of one of --engines on a GPU, without what each sequence adds",
    "decode_token": "what each sequence adds to it",
    "prefill": "the sampler computes a token of a prompt on one GPU",
    "score": "one teacher scores a token",
    "copy": "training waits while a version is copied and probed",
    "publish": "from the copy until a version is in the bucket",
    "volume": "from the copy until it is on the volume, with --weights volume",
    "load": "the sampler fetches a version, loads it into its engines and verifies it",
}
"""What each field of RoleTimes with an option of its name is, in seconds."""


class Split(NamedTuple):
    """A simulated stage with one division of the GPUs."""

    gpus: str
    """Of teacher, sampler and trainer."""
    time: StageTime

    @property
    def floor(self) -> float:
        """Seconds of the stage if the role with the most work never waited."""
        return max(self.time.busy.values())


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


def planned_times(engines: int, volume: bool, rate: float) -> RoleTimes:
    """The seconds that the plan computes with. `rate`: GB/s of a pod to and from the bucket."""
    train = measured("train", STUDENT, CARD)
    sample = measured("sample", STUDENT, CARD, engines)
    score = measured("score", TEACHER, CARD)
    assert train is not None and sample is not None and score is not None
    version = STUDENTS[STUDENT].weights
    return role_times(train, sample, score, engines, SEQUENCES, version, rate * 1e9, volume)


def splits(
    run: DistillRun, teachers: int, lengths: Lengths, times: RoleTimes, **changes: object
) -> list[Split]:
    """Simulate every split of the student's GPUs between sampler and trainer."""
    found = []
    for sampling in range(1, GPUS - teachers):
        changed, stage = stage_of(run, teachers, sampling, **changes)
        name = f"{teachers} + {sampling} + {GPUS - teachers - sampling}"
        microbatch = trainer_microbatch(changed.spec, stage, CARDS[CARD].memory, None)
        found.append(Split(name, stage_time(changed.spec, stage, lengths, times, microbatch)))
    return found


def row(split: Split, *first: object) -> str:
    """A line of a table; its columns are in the module docstring."""
    time, busy = split.time, split.time.shares()
    shares = "  ".join(
        f"{share:7.1%}" for share in (1 - busy["train"], busy["train"], busy["sampler"], busy["teacher"])
    )
    head = "  ".join(f"{cell!s:>9}" for cell in (*first, split.gpus))
    speeds = f"{time.tokens_per_second:9,.0f}  {time.window_tokens / time.seconds:9,.0f}"
    return (
        f"{head}  {shares}  {time.seconds / time.windows:7.1f}  {speeds}  {time.seconds / split.floor:6.2f}"
    )


def header(*first: str) -> str:
    """The head of a table; `first` are the columns before the split."""
    head = "  ".join(f"{cell:>9}" for cell in (*first, "T + S + t"))
    roles = f"{'t idle':>7}  {'t busy':>7}  {'S busy':>7}  {'T busy':>7}"
    return f"{head}  {roles}  {'s/win':>7}  {'tokens/s':>9}  {'on-policy':>9}  {'/floor':>6}"


def best(run: DistillRun, teachers: int, lengths: Lengths, times: RoleTimes, **changes: object) -> Split:
    """The split with the most tokens per second."""
    found = splits(run, teachers, lengths, times, **changes)
    return max(found, key=lambda split: split.time.tokens_per_second)


def share(text: str) -> float:
    """A share of --runaway: from 0 to below 1. Raises ArgumentTypeError."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to below 1")
    return number


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("manifests/examples/full.yaml"))
    parser.add_argument("--tokens", type=tokens, help="tokens of the stage (default: the run's)")
    parser.add_argument(
        "--prompt", type=tokens, default=PROMPT_TOKENS, help=f"tokens of a prompt (default: {PROMPT_TOKENS})"
    )
    parser.add_argument(
        "--completion",
        type=parse_lengths,
        default=parse_lengths("low=300,medium=700,high=1500"),
        help="mean tokens of a completion by effort (default: low=300,medium=700,high=1500)",
    )
    parser.add_argument(
        "--spread",
        type=positive_number,
        default=SPREAD,
        help=f"standard deviation of the logarithm of a completion's length (default: {SPREAD})",
    )
    parser.add_argument(
        "--runaway",
        type=share,
        default=RUNAWAY,
        help=f"share of completions that reach their limit (default: {RUNAWAY})",
    )
    parser.add_argument("--prompts", type=tokens, help="prompts per window (default: the run's)")
    parser.add_argument(
        "--weights",
        choices=("bucket", "volume"),
        help="how versions reach the sampler (default: as the run says, runtime.weightsVolume)",
    )
    parser.add_argument(
        "--gigabytes-per-second",
        type=positive_number,
        default=1.0,
        help="speed of a pod to the bucket (default: 1)",
    )
    parser.add_argument(
        "--engines",
        type=int,
        choices=sorted(DECODE),
        default=ENGINES,
        help=f"engines on each GPU of the sampler, as were measured (default: {ENGINES})",
    )
    for name, what in SECONDS.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=positive_number,
            metavar="SECONDS",
            help=f"{what} (default: as the plan has it)",
        )
    given = parser.parse_args(arguments)
    run = load_run(given.run)
    volume = given.weights == "volume" if given.weights else run.spec.runtime.weights_volume is not None
    if given.volume is not None and not volume:
        parser.error("--volume needs --weights volume")
    stages = [stage for stage in run.spec.stages if isinstance(stage, OnPolicy)]
    if len(stages) != 1:
        parser.error(f"{given.run} has {len(stages)} OnPolicy stages. Give --run a run with one")
    (stage,) = stages
    if given.prompt >= run.spec.training.sequence_length:
        parser.error(
            f"--prompt {given.prompt} leaves no room for an answer in training.sequenceLength "
            f"{run.spec.training.sequence_length}. Lower it"
        )
    replaced = {name: value for name in SECONDS if (value := getattr(given, name)) is not None}
    times = replace(planned_times(given.engines, volume, given.gigabytes_per_second), **replaced)
    lengths = Lengths(given.prompt, given.completion, given.spread, given.runaway)
    rollout = stage.rollout.model_dump(mode="json", by_alias=True)
    each = rollout["promptsPerWindow"] = given.prompts or stage.rollout.prompts_per_window
    total = given.tokens or stage.tokens
    mean = ", ".join(f"{effort} {length:,}" for effort, length in given.completion.items())
    print(
        f"{total:,} tokens, {each:,} prompts per window, weights by the {'volume' if volume else 'bucket'}."
    )
    print(
        f"Prompts of {given.prompt} tokens, mean completion {mean}, spread {given.spread:g}, "
        f"{given.runaway:g} run to their limit; anchor {stage.anchor:g}."
    )
    values = asdict(times)
    print(
        f"{times.engines} engines per GPU. Seconds: "
        + ", ".join(
            f"{field.name} {values[field.name]:.3g}"
            for field in fields(times)
            if field.name != "engines" and values[field.name] is not None
        )
    )
    print(
        "GPUs of the teacher (T), the sampler (S) and the trainer (t); /floor is the time relative to that "
        "of the role with the most work."
    )
    for teachers in (1, 2):
        print(f"\n{teachers} teacher(s), best split:\n{header('staleness', 'every')}")
        for staleness, every in PACES:
            pace = {"staleness": staleness, "publishEvery": every}
            found = best(run, teachers, lengths, times, tokens=total, rollout=rollout, **pace)
            print(row(found, staleness, every), flush=True)
        print(f"\n{teachers} teacher(s), the run's settings, all splits:\n{header()}")
        for found in splits(run, teachers, lengths, times, tokens=total, rollout=rollout):
            print(row(found), flush=True)
        print(
            f"\n{teachers} teacher(s), larger windows, best split:\n{header('prompts', 'staleness', 'every')}"
        )
        for factor in (2, 4, 8):
            size = rollout | {"promptsPerWindow": each * factor}
            for staleness, every in ((1, 1), (2, 1), (2, 2), (4, 4)):
                pace = {"staleness": staleness, "publishEvery": every}
                found = best(run, teachers, lengths, times, tokens=total, rollout=size, **pace)
                print(row(found, each * factor, staleness, every), flush=True)


if __name__ == "__main__":
    main()
