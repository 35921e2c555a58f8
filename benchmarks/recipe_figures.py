"""Figures of a finished run of benchmarks.recipe: from its metrics and records in the bucket, from readings
of the GPUs, and from `vpmoe plan`.
"""

import argparse
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tests.fakes.local_pods import Placement, Span, on_cpu
from vpmoe.api import DistillRun
from vpmoe.api.card import GIB
from vpmoe.api.progress import Progress
from vpmoe.api.stages import OnPolicy, Stage
from vpmoe.cli.plan import add_arguments, assumptions
from vpmoe.plan.plan import make_plan
from vpmoe.plan.table import plan_json
from vpmoe.process.gpu import PERIOD, GpuReading, GpusUnreadable, read_nvml
from vpmoe.report.run_data import Line, line_time, parse_lines
from vpmoe.rollout import policy_version
from vpmoe.rollout.curriculum import EFFORTS
from vpmoe.sampler.sampler import VOLUME_SECONDS
from vpmoe.storage import Bucket, paths

UNKNOWN = "–"
LONG = 1000
"""Of an OnPolicy stage with so many times the tokens, the plan's speed and shares are without its start."""
TOLERANCE = 0.2
"""Largest difference from the plan that is not marked."""
LEAST = 0.1
"""Least figure of the plan, in seconds, per cent or tokens a second, that a difference is shown from."""


IN_STEP = (("rollouts", "waitRollouts"), ("scores", "waitScores"), ("teacher", "teacherWaitSeconds"))
"""What a step waits for, and the field with the seconds, which are part of the step's."""
AFTER_STEP = ("uploads", "waitUpload")
"""And what training waits for after a step."""


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
    """Of all steps, with waits and what is between steps of an attempt, without evaluations."""
    waits: Mapping[str, float]
    """Seconds of waiting, by what for: in steps for rollouts, scores and the teacher, after steps for
    uploads."""
    working: float | None
    """Tokens a second without waits: the median of all steps but an attempt's first. None if there is no
    other."""
    pauses: dict[int, float]
    """By step: seconds between its end and the begin of the next one, without evaluations and waits for
    uploads: there training waits for a checkpoint, and copies a policy version."""
    ended: float
    """Time of its last line."""
    steady: float | None
    """Tokens a second of all steps but an attempt's first, with waits and what is between steps, without
    evaluations."""
    uploads: float | None
    """Share of the time of these steps in which training waited for uploads."""
    busy: float | None
    """Share of the time of these steps in which training did not wait. It works while it copies a version, as
    in the plan, and while it saves a checkpoint, which the plan's share leaves out."""

    @classmethod
    def of(cls, lines: Sequence[Line]) -> "TrainerFigures":
        """From the lines in the order of time, which have a step at least."""
        steps = [line for line in lines if line["event"] == "step"]
        before, speeds = 0, []
        pauses: dict[int, float] = {}
        last: Line | None = None
        waits: dict[str, float] = {}
        evaluated = later = later_waits = later_uploads = later_tokens = 0.0
        for line in lines:
            if line["event"] == "evaluation":
                evaluated += line["seconds"]
            elif line["event"] != "step":
                last, evaluated = None, 0.0  # another attempt
            else:
                for name, key in (*IN_STEP, AFTER_STEP):
                    if line.get(key) is not None:
                        waits[name] = waits.get(name, 0.0) + line[key]
                if last is not None:
                    in_step = sum(line.get(key) or 0.0 for _, key in IN_STEP)
                    uploads = last.get(AFTER_STEP[1]) or 0.0
                    speeds.append((line["tokens"] - before) / (line["seconds"] - in_step))
                    taken = _time(line) - _time(last) - evaluated
                    pauses[last["step"]] = taken - line["seconds"] - uploads
                    later += taken
                    later_waits += in_step + uploads
                    later_uploads += uploads
                    later_tokens += line["tokens"] - before
                before, last, evaluated = line["tokens"], line, 0.0
        return cls(
            steps=len(steps),
            tokens=steps[-1]["tokens"],
            seconds=sum(line["seconds"] for line in steps)
            + waits.get(AFTER_STEP[0], 0.0)
            + sum(pauses.values()),
            waits=waits,
            working=statistics.median(speeds) if speeds else None,
            pauses=pauses,
            ended=max(map(_time, lines)),
            steady=later_tokens / later if later else None,
            uploads=later_uploads / later if later else None,
            busy=1 - later_waits / later if later else None,
        )


@dataclass(frozen=True)
class WorkerFigures:
    """What a sampler or a teacher did."""

    windows: int
    tokens: float
    """Sampled, or scored."""
    seconds: float
    """In which it did so; of several workers together."""
    waits: Mapping[str, float]
    """Seconds in which it did not, by what for."""
    busy: float | None
    """Share of the time from the end of the first batch of windows to that of the last one in which one of
    them works. None if there are not two."""

    @classmethod
    def of_sampler(cls, lines: Sequence[Line]) -> "WorkerFigures":
        """A batch of windows has the same seconds and speed in each of its lines, and its waits in the
        first."""
        batches = [line for line in lines if line["load"]]
        return cls(
            len(lines),
            sum(line["tokensPerSecond"] * line["seconds"] for line in batches),
            sum(line["seconds"] for line in batches),
            {
                "weights": sum(line["waitWeights"] for line in batches),
                "loading them": sum(line["load"]["seconds"] for line in batches),
                "uploads": sum(line["waitUpload"] for line in batches),
            },
            later_share([(_time(line) - line["waitUpload"], line["seconds"]) for line in batches], 1),
        )

    @classmethod
    def of_teacher(cls, lines: Sequence[Line], workers: int) -> "WorkerFigures":
        return cls(
            len(lines),
            sum(line["tokensPerSecond"] * line["seconds"] for line in lines),
            sum(line["seconds"] for line in lines),
            {"rollouts": sum(line["waitRollouts"] for line in lines)},
            later_share([(_time(line), line["seconds"]) for line in lines], workers),
        )


def later_share(ended: Sequence[tuple[float, float]], workers: int) -> float | None:
    """Share of the time from the first end of work to the last in which one of `workers` works. `ended`:
    times of these ends, in order, and the seconds of work before each."""
    if len(ended) < 2 or ended[-1][0] <= ended[0][0]:
        return None
    return sum(seconds for _, seconds in ended[1:]) / workers / (ended[-1][0] - ended[0][0])


def step_to_sampling(
    copied: Mapping[int, float], sampled: Sequence[Line], waited: bool = False
) -> dict[int, float]:
    """By version: seconds from when training began to copy it until the sampler began to sample from it.

    `copied`: these times. `sampled`: the sampler's lines, which are written when the bucket has the version.
    `waited`: only of versions that the sampler looked for more than once, so that had no other work; the
    plan's figure is theirs.
    """
    return {
        int(line["version"]): _time(line) - line["waitUpload"] - line["seconds"] - copied[line["version"]]
        for line in sampled
        if line["load"]
        and line["version"] in copied
        and (not waited or line["waitWeights"] >= VOLUME_SECONDS)
    }


class Compared(NamedTuple):
    """A figure of a stage beside the plan's."""

    name: str
    measured: float | None
    planned: float | None
    digits: int = 0

    @property
    def row(self) -> str:
        """A line of a Markdown table. Marks a difference of more than TOLERANCE; shows none below LEAST."""
        difference = ""
        if self.measured is not None and self.planned is not None and self.planned >= LEAST:
            off = self.measured / self.planned - 1
            difference = f"**{off:+.0%}**" if abs(off) > TOLERANCE else f"{off:+.0%}"
        measured, planned = (_number(one, self.digits) for one in (self.measured, self.planned))
        return f"| {self.name} | {measured} | {planned} | {difference} |"


@dataclass
class Report:
    """Prints what a run did, stage by stage, of the steps that have succeeded."""

    run: DistillRun
    bucket: Bucket
    placement: Placement
    spans: Mapping[str, Span]
    """Of these steps."""
    gpus: GpuRecorder
    active: int
    """Parameters that a token is multiplied with."""
    rate: float
    """Floating-point operations a second of one GPU by its data sheet; on the CPU of a large product."""
    plan_options: Sequence[str]
    """Of `vpmoe plan`, beside lengths."""
    objects: Path
    """Folder of the bucket's objects."""
    lines: dict[str, list[Line]] = field(default_factory=dict)

    def print(self) -> None:
        """Print everything."""
        self.lines = {step: self._lines(step) for step in self.run.steps()}
        plan, long = self._plan(), self._plan(LONG)
        for problem in plan["problems"]:
            print(f"vpmoe plan: {problem}")
        planned = {step["step"]: step for step in plan["steps"]}
        print(f"\n{'step':20}{'seconds':>9}{'planned':>9}")
        for step, span in self.spans.items():
            hours = planned.get(step, {}).get("hours")
            print(f"{step:20}{span.end - span.start:9.1f}{_number(hours and 3600 * hours, 1):>9}")
        stages = [stage for stage in self.run.spec.stages if stage.name in self.spans]
        if "rescore" in self.spans:
            scored = WorkerFigures.of_teacher(self.lines["rescore"], self.run.spec.rescoring_gpus)
            print(f"\nrescore: {_rate(scored)}; plan {_per_second(planned['rescore'])}")
        for stage in stages:
            print()
            pauses = next(each for each in plan["checkpoints"] if each["stage"] == stage.name)
            for line in self._stage_lines(stage, planned[stage.name], pauses):
                print(line)
        print("\n| | measured | plan | difference |\n|---|---|---|---|")
        steady = {step["step"]: step for step in long["steps"]}
        for stage in stages:
            pauses = next(each for each in plan["checkpoints"] if each["stage"] == stage.name)
            for compared in self._compared(stage, steady[stage.name], pauses):
                print(compared.row)
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
            f"{trainer.tokens / trainer.seconds:,.0f} tokens/s with waits; plan {_per_second(planned)}, "
            f"slowest {planned['slowest'] or UNKNOWN}"
        )
        mfu = _number(self._mfu(trainer.working, ranks), 2)
        yield (
            f"  trainer, {ranks} ranks: {_number(trainer.working)} tokens/s and {mfu} % MFU without waits; "
            f"busy {_share(trainer.seconds, sum(trainer.waits.values()))}, plan "
            f"{_planned_share(busy, 'train')}; waited "
            f"{_listed(trainer.waits)}"
        )
        if isinstance(stage, OnPolicy):
            yield from self._role_lines(stage, busy)
        pauses = trainer.pauses.values()
        yield (
            f"  between steps, without evaluations and uploads: {_number(sum(pauses), 1)} s, at most "
            f"{_number(max(pauses, default=None), 1)}; from the last step to the end "
            f"{self._updated(stage.name) - trainer.ended:.1f} s; plan: {checkpoints['number']} checkpoints, "
            f"pause {checkpoints['pauseSeconds']:.1f} s, upload {checkpoints['uploadSeconds']:.1f} s"
        )
        for line in self.gpus.lines(self.spans[stage.name]):
            yield f"  {line}"

    def _compared(
        self, stage: Stage, planned: Mapping[str, Any], checkpoints: Mapping[str, Any]
    ) -> Iterable[Compared]:
        """Figures of a stage, of all steps but an attempt's first, beside the plan's of a stage as long that
        its start does not count."""
        name, busy, speed = stage.name, planned["busy"], planned["tokensPerSecond"]
        trainer = TrainerFigures.of(self.lines[name])
        ranks = len(self.placement.pods(self.run, name)[0])
        working = planned["trainTokensPerSecond"]
        if working is None and speed:  # of a stage without versions, in which training does nothing else
            working = speed / busy.get("train", 1.0)
        yield Compared(f"{name}: tokens/s", trainer.steady, speed)
        yield Compared("trainer's tokens/s without waits", trainer.working, working)
        yield Compared(
            "MFU without waits, %", self._mfu(trainer.working, ranks), self._mfu(working, ranks), 1
        )
        if busy:
            yield Compared("trainer busy, %", _percent(trainer.busy), _percent(busy["train"]))
        if isinstance(stage, OnPolicy):
            sampler, teacher = self._workers(name)
            yield Compared("sampler busy, %", _percent(sampler.busy), _percent(busy.get("sampler")))
            yield Compared("teacher busy, %", _percent(teacher.busy), _percent(busy.get("teacher")))
            uploads = _percent(planned["uploadShare"])
            yield Compared("trainer waits for uploads, %", _percent(trainer.uploads), uploads)
            steps = self._steps_of_versions(stage)
            copied = self._copied(stage, steps)
            found = step_to_sampling(copied, self.lines[f"{name}-sampler"], waited=True).values()
            yield Compared("from step to sampling, s", _median(found), planned["stepToSampling"], 1)
            uploaded = self._step_to_bucket(stage, copied).values()
            yield Compared("from step to bucket, s", _median(uploaded), planned["stepToBucket"], 1)
            after = [trainer.pauses[step] for step in steps.values() if step in trainer.pauses]
            yield Compared("between steps, with a version, s", _median(after), planned["copySeconds"], 1)
        else:
            most = max(trainer.pauses.values(), default=None)
            pause = checkpoints["pauseSeconds"] if checkpoints["number"] > 1 else 0.0
            yield Compared("between two steps, at most, s", most, pause, 1)

    def _workers(self, stage: str) -> tuple[WorkerFigures, WorkerFigures]:
        """What sampler and teacher of an OnPolicy stage did."""
        return (
            WorkerFigures.of_sampler(self.lines[f"{stage}-sampler"]),
            WorkerFigures.of_teacher(self.lines[f"{stage}-teacher"], self.run.spec.teacher.gpus),
        )

    def _role_lines(self, stage: OnPolicy, busy: Mapping[str, float]) -> Iterable[str]:
        sampler_lines = self.lines[f"{stage.name}-sampler"]
        sampler, teacher = self._workers(stage.name)
        for name, role in (("sampler", sampler), ("teacher", teacher)):
            waited = sum(role.waits.values())
            yield (
                f"  {name}: {role.windows} windows, {_rate(role)} while it worked; busy "
                f"{_share(role.seconds + waited, waited)}, plan {_planned_share(busy, name)}; waited "
                f"{_listed(role.waits)}"
            )
        loads = [line["load"] for line in sampler_lines if line["load"]]
        by_source = ", ".join(f"{load['seconds']:.1f} s from the {load['source']}" for load in loads)
        yield f"  versions loaded: {by_source}"
        copied = self._copied(stage, self._steps_of_versions(stage))
        found = step_to_sampling(copied, sampler_lines)
        listed = ", ".join(f"{seconds:.1f} s (version {version})" for version, seconds in found.items())
        yield f"  from step to sampling: {listed or UNKNOWN}"

    def _steps_of_versions(self, stage: OnPolicy) -> dict[int, int]:
        """By version that was sampled from: the optimizer step that it has the weights of."""
        versions = sorted({int(line["version"]) for line in self.lines[f"{stage.name}-sampler"]})
        published = (
            policy_version.find_version(self.bucket, self.run, stage.name, version) for version in versions
        )
        return {found[1].version: found[1].steps for found in published if found}

    def _copied(self, stage: OnPolicy, steps: Mapping[int, int]) -> dict[int, float]:
        """By version: when training began to copy it, after its step and the upload of the version before.
        `steps`: by version."""
        ends = {
            line["step"]: _time(line) + (line.get(AFTER_STEP[1]) or 0.0)
            for line in self.lines[stage.name]
            if line["event"] == "step"
        }
        return {version: ends[step] for version, step in steps.items() if step in ends}

    def _step_to_bucket(self, stage: OnPolicy, copied: Mapping[int, float]) -> dict[int, float]:
        """By version: seconds from when training began to copy it until the bucket had its manifest."""
        manifests = {each: paths.manifest(paths.weights(self.run, stage.name, each)) for each in copied}
        return {
            each: (self.objects / manifests[each]).stat().st_mtime - began for each, began in copied.items()
        }

    def _mfu(self, speed: float | None, ranks: int) -> float | None:
        """Model FLOPs utilisation of `speed` tokens a second, in per cent: 6 operations a token and active
        parameter, as a share of what one GPU can do."""
        return None if speed is None else 100 * 6 * self.active * speed / ranks / self.rate

    def _plan(self, factor: int = 1) -> dict[str, Any]:
        """`vpmoe plan` for this run, with the lengths that it had, and OnPolicy stages of `factor` times the
        tokens."""
        options = list(self.plan_options)
        if lengths := self._lengths():
            prompt, completions = lengths
            options += ["--prompt", str(prompt), "--completion"]
            options.append(",".join(f"{effort}={length}" for effort, length in completions.items()))
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        stages = tuple(
            stage.model_copy(update={"tokens": factor * stage.tokens}) if stage.samples else stage
            for stage in self.run.spec.stages
        )
        spec = self.run.spec.model_copy(update={"stages": stages})
        run = self.run.model_copy(update={"spec": spec})
        return plan_json(make_plan(run, assumptions(run, parser.parse_args(["run.yaml", *options]))))

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


def _listed(waits: Mapping[str, float]) -> str:
    return ", ".join(f"{seconds:.1f} s for {name}" for name, seconds in waits.items()) or "for nothing"


def _rate(role: WorkerFigures) -> str:
    return f"{_number(role.tokens / role.seconds if role.seconds else None)} tokens/s"


def _per_second(planned: Mapping[str, Any]) -> str:
    return f"{_number(planned['tokensPerSecond'])} tokens/s"


def _share(seconds: float, waited: float) -> str:
    return f"{100 * (1 - waited / seconds):.0f} %" if seconds else UNKNOWN


def _median(values: Iterable[float]) -> float | None:
    return statistics.median(found) if (found := list(values)) else None


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _planned_share(busy: Mapping[str, float], role: str) -> str:
    return f"{100 * busy[role]:.0f} %" if role in busy else UNKNOWN


def _number(value: float | None, digits: int = 0) -> str:
    return UNKNOWN if value is None else f"{value:,.{digits}f}"
