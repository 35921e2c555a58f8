"""Figures of a finished run of benchmarks.recipe: from its metrics and records in the bucket, from readings
of the GPUs, and from `vpmoe plan`.
"""

import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fakes.local_pods import ROOT, Placement, Span, on_cpu
from vpmoe.api import DistillRun
from vpmoe.api.card import GIB
from vpmoe.api.progress import Progress
from vpmoe.api.stages import OnPolicy, Stage
from vpmoe.process.gpu import PERIOD, GpuReading, GpusUnreadable, read_nvml
from vpmoe.report.run_data import Line, line_time, parse_lines
from vpmoe.rollout import policy_version
from vpmoe.rollout.curriculum import EFFORTS
from vpmoe.storage import Bucket, paths

UNKNOWN = "–"


class GpuRecorder:
    """Reads all GPUs of a placement once a second between `with` and its end."""

    def __init__(
        self,
        names: Sequence[str],
        read: Callable[[Mapping[str, str]], list[GpuReading]] = read_nvml,
        period: float = PERIOD,
    ) -> None:
        self.names = names
        self.reason: str | None = None
        """Why nothing is read, if so."""
        self._read, self._period = read, period
        self._readings: list[tuple[float, list[GpuReading]]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "GpuRecorder":
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        visible = {"CUDA_VISIBLE_DEVICES": "" if on_cpu() else ",".join(self.names)}
        while not self._ended.wait(self._period):
            try:
                self._readings.append((time.time(), self._read(visible)))
            except GpusUnreadable as error:
                self.reason = str(error)
                return

    def lines(self, span: Span) -> list[str]:
        """By GPU: the share of the time in which a kernel ran, and the least free memory."""
        found = [readings for at, readings in self._readings if span.start <= at <= span.end]
        if not found:
            return [f"GPUs: not measured ({self.reason or 'shorter than a second'})"]
        return [
            f"GPU {name}: busy {100 * statistics.fmean(of_gpu.utilisation for of_gpu in readings):.0f} %, "
            f"at least {min(of_gpu.free for of_gpu in readings) / GIB:.1f} GiB free"
            for name, readings in zip(self.names, zip(*found, strict=True), strict=True)
        ]


@dataclass(frozen=True)
class TrainerFigures:
    """What a stage's trainer did, from its lines of metrics."""

    steps: int
    tokens: int
    seconds: float
    """Of all steps, waits included."""
    waits: Mapping[str, float]
    """Seconds that steps waited, by what for."""
    working: float | None
    """Tokens a second without waits: the median of all steps but an attempt's first. None if there is no
    other."""
    pauses: list[float]
    """Seconds between the end of a step and the begin of the next one, evaluations left out: there training
    waits for a checkpoint, and copies a policy version."""
    ended: float
    """Time of its last line."""

    @classmethod
    def of(cls, lines: Sequence[Line]) -> "TrainerFigures":
        """From the lines in the order of time, which have a step at least."""
        steps = [line for line in lines if line["event"] == "step"]
        before, speeds, pauses = 0, [], []
        last: Line | None = None
        waits: dict[str, float] = {}
        evaluated = 0.0
        for line in lines:
            if line["event"] == "evaluation":
                evaluated += line["seconds"]
            elif line["event"] != "step":
                last, evaluated = None, 0.0  # another attempt
            else:
                of_step = {
                    name: line[key]
                    for name, key in (
                        ("rollouts", "waitRollouts"),
                        ("scores", "waitScores"),
                        ("teacher", "teacherWaitSeconds"),
                    )
                    if line.get(key) is not None
                }
                for name, seconds in of_step.items():
                    waits[name] = waits.get(name, 0.0) + seconds
                if last is not None:
                    speeds.append((line["tokens"] - before) / (line["seconds"] - sum(of_step.values())))
                    pauses.append(_time(line) - line["seconds"] - _time(last) - evaluated)
                before, last, evaluated = line["tokens"], line, 0.0
        return cls(
            steps=len(steps),
            tokens=steps[-1]["tokens"],
            seconds=sum(line["seconds"] for line in steps),
            waits=waits,
            working=statistics.median(speeds) if speeds else None,
            pauses=pauses,
            ended=max(map(_time, lines)),
        )


@dataclass(frozen=True)
class WorkerFigures:
    """What a sampler or a teacher did."""

    windows: int
    tokens: float
    """Sampled, or scored."""
    seconds: float
    """In which it did so; of several workers together."""
    waits: float

    @classmethod
    def of_sampler(cls, lines: Sequence[Line]) -> "WorkerFigures":
        """A batch of windows has the same seconds and speed in each of its lines."""
        batches = {(line["attempt"], line["version"]): line for line in lines}.values()
        return cls(
            len(lines),
            sum(line["tokensPerSecond"] * line["seconds"] for line in batches),
            sum(line["seconds"] for line in batches),
            sum(line["waitWeights"] for line in lines),
        )

    @classmethod
    def of_teacher(cls, lines: Sequence[Line]) -> "WorkerFigures":
        return cls(
            len(lines),
            sum(line["tokensPerSecond"] * line["seconds"] for line in lines),
            sum(line["seconds"] for line in lines),
            sum(line.get("waitRollouts") or 0.0 for line in lines),
        )


@dataclass
class Report:
    """Prints what a run did, stage by stage."""

    run: DistillRun
    bucket: Bucket
    placement: Placement
    spans: Mapping[str, Span]
    gpus: GpuRecorder
    active: int
    """Parameters that a token is multiplied with."""
    rate: float
    """Floating-point operations a second of one GPU in a large product."""
    plan_options: Sequence[str]
    """Of `vpmoe plan`, beside lengths."""
    file: Path
    lines: dict[str, list[Line]] = field(default_factory=dict)

    def print(self) -> None:
        """Print everything."""
        self.lines = {step: self._lines(step) for step in self.run.steps()}
        plan = self._plan()
        planned = {step["step"]: step for step in plan["steps"]}
        print(f"\n{'step':20}{'seconds':>9}{'planned':>9}")
        for step, span in self.spans.items():
            hours = planned.get(step, {}).get("hours")
            print(f"{step:20}{span.end - span.start:9.1f}{_number(hours and 3600 * hours, 1):>9}")
        if self.lines.get("rescore"):
            scored = WorkerFigures.of_teacher(self.lines["rescore"])
            print(f"\nrescore: {_rate(scored)}; plan {_per_second(planned['rescore'])}")
        for stage in self.run.spec.stages:
            print()
            pauses = next(each for each in plan["checkpoints"] if each["stage"] == stage.name)
            for line in self._stage_lines(stage, planned[stage.name], pauses):
                print(line)
        print("\nThe plan computes with")
        for source in plan["sources"]:
            print(f"  {source}")

    def _stage_lines(
        self, stage: Stage, planned: Mapping[str, Any], checkpoints: Mapping[str, Any]
    ) -> Iterable[str]:
        trainer = TrainerFigures.of(self.lines[stage.name])
        ranks = len(self.placement.pods(self.run, stage.name)[0])
        busy = planned["busy"]
        yield (
            f"{stage.name} ({stage.kind}): {trainer.steps} steps, {trainer.tokens:,} tokens, "
            f"{trainer.tokens / trainer.seconds:,.0f} tokens/s over all steps; plan {_per_second(planned)}, "
            f"slowest {planned['slowest'] or UNKNOWN}"
        )
        waited = ", ".join(f"{seconds:.1f} s for {name}" for name, seconds in trainer.waits.items())
        yield (
            f"  trainer, {ranks} ranks: {_number(trainer.working)} tokens/s and {self._mfu(trainer, ranks)} "
            f"MFU without waits; busy {_share(trainer.seconds, sum(trainer.waits.values()))}, plan "
            f"{_planned_share(busy, 'train')}; waited {waited or 'for nothing'}"
        )
        if isinstance(stage, OnPolicy):
            yield from self._role_lines(stage, busy)
        pauses = trainer.pauses
        yield (
            f"  between steps, without evaluations: {_number(sum(pauses), 1)} s, at most "
            f"{_number(max(pauses, default=None), 1)}; from the last step to the end "
            f"{self._updated(stage.name) - trainer.ended:.1f} s; plan: {checkpoints['number']} checkpoints, "
            f"pause {checkpoints['pauseSeconds']:.1f} s, upload {checkpoints['uploadSeconds']:.1f} s"
        )
        for line in self.gpus.lines(self.spans[stage.name]):
            yield f"  {line}"

    def _role_lines(self, stage: OnPolicy, busy: Mapping[str, float]) -> Iterable[str]:
        sampler_lines = self.lines[f"{stage.name}-sampler"]
        sampler = WorkerFigures.of_sampler(sampler_lines)
        teacher = WorkerFigures.of_teacher(self.lines[f"{stage.name}-teacher"])
        for name, role, waits in (("sampler", sampler, "weights"), ("teacher", teacher, "rollouts")):
            yield (
                f"  {name}: {role.windows} windows, {_rate(role)} while it worked; busy "
                f"{_share(role.seconds + role.waits, role.waits)}, plan {_planned_share(busy, name)}; waited "
                f"{role.waits:.1f} s for {waits}"
            )
        loads = [line["load"] for line in sampler_lines if line["load"]]
        by_source = ", ".join(f"{load['seconds']:.1f} s from the {load['source']}" for load in loads)
        yield f"  versions loaded: {by_source}"
        found = self._step_to_sampling(stage, sampler_lines)
        listed = ", ".join(f"{seconds:.1f} s (version {version})" for version, seconds in found.items())
        yield f"  from step to sampling: {listed or UNKNOWN}"

    def _step_to_sampling(self, stage: OnPolicy, sampled: Sequence[Line]) -> dict[int, float]:
        """By version: seconds from the end of the optimizer step that it has the weights of, until the
        sampler began to sample from it."""
        ends = {line["step"]: _time(line) for line in self.lines[stage.name] if line["event"] == "step"}
        found = {}
        for line in sampled:
            published = policy_version.find_version(self.bucket, self.run, stage.name, line["version"])
            if line["load"] and published and (step := published[1].steps) in ends:
                found[int(line["version"])] = _time(line) - line["seconds"] - ends[step]
        return found

    def _mfu(self, trainer: TrainerFigures, ranks: int) -> str:
        """Model FLOPs utilisation: 6 operations a token and active parameter, as a share of a large product's
        rate on the same device."""
        if trainer.working is None:
            return UNKNOWN
        return f"{100 * 6 * self.active * trainer.working / ranks / self.rate:.2f} %"

    def _plan(self) -> dict[str, Any]:
        """`vpmoe plan` for this run, with the lengths that it had."""
        lengths = self._lengths()
        options = list(self.plan_options)
        if lengths:
            prompt, completions = lengths
            options += ["--prompt", str(prompt), "--completion"]
            options.append(",".join(f"{effort}={length}" for effort, length in completions.items()))
        planned = subprocess.run(
            [sys.executable, "-m", "vpmoe", "plan", str(self.file), "--output", "json", *options],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=False,  # a plan that does not fit is printed, too
        )
        found: dict[str, Any] = json.loads(planned.stdout)
        for problem in found["problems"]:
            print(f"vpmoe plan: {problem}")
        return found

    def _lengths(self) -> tuple[int, dict[str, int]] | None:
        """Mean tokens of a prompt, and of a completion by effort; None without windows."""
        lines = [
            line
            for stage in self.run.spec.stages
            if stage.samples
            for line in self.lines[f"{stage.name}-sampler"]
        ]
        if not lines:
            return None
        sampled, count = dict.fromkeys(EFFORTS, 0.0), dict.fromkeys(EFFORTS, 0)
        for line in lines:
            for effort, number in line["effort"].items():
                count[effort] += number
                sampled[effort] += number * line["lengths"][effort]["mean"] if number else 0
        prompts = sum(line["tokens"] for line in lines) - sum(sampled.values())
        means = {
            effort: max(1, round(sampled[effort] / count[effort])) for effort in EFFORTS if count[effort]
        }
        return max(1, round(prompts / sum(count.values()))), means

    def _lines(self, step: str) -> list[Line]:
        """A step's lines of metrics, in the order of time."""
        folder = paths.metrics(self.run, step, "").removesuffix(".jsonl")
        found = [
            line
            for each in self.bucket.list(folder)
            for line in parse_lines(self.bucket.get(each.key), self.bucket.url(each.key))
        ]
        return sorted(found, key=line_time)

    def _updated(self, step: str) -> float:
        """When a step reported its success."""
        progress = Progress.model_validate(self.bucket.get_json(paths.progress(self.run, step)))
        return progress.updated.timestamp()


def _time(line: Line) -> float:
    return line_time(line).timestamp()


def _rate(role: WorkerFigures) -> str:
    return f"{_number(role.tokens / role.seconds if role.seconds else None)} tokens/s"


def _per_second(planned: Mapping[str, Any]) -> str:
    return f"{_number(planned['tokensPerSecond'])} tokens/s"


def _share(seconds: float, waited: float) -> str:
    return f"{100 * (1 - waited / seconds):.0f} %" if seconds else UNKNOWN


def _planned_share(busy: Mapping[str, float], role: str) -> str:
    return f"{100 * busy[role]:.0f} %" if role in busy else UNKNOWN


def _number(value: float | None, digits: int = 0) -> str:
    return UNKNOWN if value is None else f"{value:,.{digits}f}"
