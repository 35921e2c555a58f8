"""A run's plan: steps with their GPUs and hours, checkpoints, bytes in the bucket, memory, and what cannot
work."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile

from vpmoe.api.card import GIB
from vpmoe.api.layout import layout, teacher_processes
from vpmoe.api.memory import STUDENTS
from vpmoe.api.microbatch import FIXED, MOST, time_of_stage
from vpmoe.api.quantities import parse_quantity
from vpmoe.api.rules import RULES
from vpmoe.api.run import EVALUATE, INIT, PREPROCESS, RESCORE, DistillRun
from vpmoe.api.saving import BUCKET_SPEED, grace_seconds, host_copies, pod_checkpoint
from vpmoe.api.spec import Spec
from vpmoe.api.stages import OnPolicy, Stage
from vpmoe.plan import units
from vpmoe.plan.memory import RoleMemory, memory_by_role, teacher_problems, trainer_microbatch
from vpmoe.plan.onpolicy import EFFORTS, RolloutTotals, rollout_totals
from vpmoe.plan.sampling import ENGINES, SEQUENCES, divide_card
from vpmoe.plan.simulation import RUNAWAY, Lengths, StageTime, stage_time
from vpmoe.plan.teacher import TeacherSize
from vpmoe.plan.throughput import (
    DECODE_SECONDS,
    TEXT,
    Card,
    Measured,
    RoleTimes,
    Work,
    measured,
    role_times,
)

CHART_CORES = 1.0
"""CPU cores that the chart's jobResources requests for preprocessing."""
MOST_CORES = 2.0
"""CPU cores of a worker that are counted, at most. More were not measured, and one process reads and writes
for all of them."""
TOKEN_BYTES = 5
"""Bytes of a token in a dataset: int32 and its span."""
SCORE_BYTES = 2
"""Bytes of a token in scores: float16."""
PROMPT_BYTES, COMPLETION_BYTES = 4, 13
"""Bytes of a token in the files of windows: its id; in completions also span, and both models' log p in
fp32."""
SAMPLED_AT_ONCE = 256
"""Completions that an evaluation samples at the same time."""
COPY_SPEED = 25e9
"""Bytes a second of the copy of a GPU's state into pinned memory, over PCIe: half of what a copy alone
reaches on a machine with an H100, because the GPUs of a pod share the host's memory."""
HOST_MEMORY = 32
"""GiB of host memory of a trainer's pod beside its copies: the request of the chart."""
HELD_VERSIONS = 2
"""Policy versions whose weights are kept beside those that waiting windows are sampled from: the one that is
sampled from and the one that is uploaded."""
DIVISIONS = 128
"""Divisions of an OnPolicy stage's GPUs that are compared, at most: all of up to 17 GPUs. Of more, those
whose slowest role is fastest."""
SIMULATED = 2**21
"""Windows that are simulated to compare the divisions of all OnPolicy stages, at most: 128 of one long stage
with publishEvery 64. Of more, fewer divisions are compared."""


@dataclass(frozen=True)
class Assumptions:
    """What the specification does not say."""

    card: Card
    memory: int
    """Bytes of each GPU."""
    teacher: TeacherSize | None
    """None if its size is not known: then neither its memory nor its speed is."""
    prompt: int = 128
    """Tokens of a prompt."""
    completion: Mapping[str, int] = field(default_factory=dict)
    """Tokens of a completion by effort; half of maxTokens for an effort that is absent."""
    dataset_tokens: int | None = None
    speeds: Mapping[Work, float] = field(default_factory=dict)
    """Tokens a second of one GPU, in preprocessing of one CPU core, instead of those measured."""
    disk_speed: float = 1e9
    """Bytes a second at which a pod writes to the bucket, and the step init to its scratch disk."""


@dataclass(frozen=True)
class StepPlan:
    """One step, or a training step with those that run beside it."""

    step: str
    kind: str
    tokens: int | None
    gpus: Mapping[str, int]
    """GPUs by role."""
    hours: float | None
    """None if no speed is known."""
    tokens_per_second: float | None
    """Of the slowest role; of an OnPolicy stage with all waits."""
    slowest: str
    """The role that works longest, in the table the busiest. Where `busy` has it far below 1, waits decide
    the hours too."""
    pause_hours: float = 0.0
    """Part of `hours` in which training waits for checkpoints."""
    busy: Mapping[str, float] = field(default_factory=dict)
    """Of roles that wait for each other: the share of the hours without pauses in which each has work."""
    step_to_sampling: float | None = None
    """Of an OnPolicy stage: seconds from an optimizer step until the sampler can sample from its weights."""
    step_to_bucket: float | None = None
    """And until the bucket has them, before which no window that is sampled from them is written."""
    copy_seconds: float | None = None
    """Of an OnPolicy stage: for which training stops while a policy version is copied; a part of its busy
    time."""
    upload_share: float | None = None
    """Of an OnPolicy stage: the share of the hours without pauses in which training waits for an upload."""
    train_tokens_per_second: float | None = None
    """Of an OnPolicy stage: of the optimizer steps alone, without waits and copies."""


@dataclass(frozen=True)
class CheckpointPlan:
    """The checkpoints of a stage."""

    stage: str
    number: int
    kept: int
    size: int
    """Bytes of one."""
    pause_seconds: float
    """Time of the copy to host memory. Training waits for one at most as long: forward and backward go on."""
    upload_seconds: float
    """Time of an upload, during which training goes on. The next checkpoint waits for its end."""
    interval_seconds: float | None
    """Time between two of them; None if no speed is known."""
    host_bytes: int
    """Host memory of each training pod for the copies that are uploaded."""
    grace_seconds: int
    """Time after SIGTERM in which the pod saves its last checkpoint: its terminationGracePeriodSeconds."""


@dataclass(frozen=True)
class Plan:
    """A run's plan."""

    run: str
    card: str
    card_memory: int
    teacher: str | None
    gpus: int
    """GPUs that are alive at once, at most."""
    hours: float | None
    """From the end of preprocessing and of the step init, without waiting for GPUs."""
    gpu_hours: float | None
    preprocess_cpu_hours: float | None
    """Time of CPU cores for preprocessing; None if the dataset's tokens are not known."""
    steps: list[StepPlan]
    checkpoints: list[CheckpointPlan]
    bucket: dict[str, int | None]
    """Bytes at the end of the run by kind; None if not known."""
    memory: list[RoleMemory]
    problems: list[str]
    """Why the run cannot work, with the numbers and the remedy."""
    sources: list[str]
    """Where the speeds come from, and what was assumed."""

    @property
    def preprocess(self) -> StepPlan:
        """The step preprocess."""
        return next(step for step in self.steps if step.step == PREPROCESS)


def worker_cores(spec: Spec) -> float:
    """CPU cores that a pod uses to preprocess: its limit, else its request, else the request of the chart; at
    most MOST_CORES."""
    resources = spec.runtime.resources.get("preprocess")
    written = (resources.limits.get("cpu") or resources.requests.get("cpu")) if resources else None
    return min(MOST_CORES, (parse_quantity(written) if written else 0.0) or CHART_CORES)


def splits(gpus: int, teacher: float, student: float) -> list[tuple[int, int]]:
    """(GPUs of the teacher, of the student): the ways to divide them in a TeacherForced stage, that with the
    most tokens first; of equals, that with the fewest teachers. Every teacher has a student.

    `teacher`, `student`: tokens a second of one GPU.
    """
    ways = [(teachers, gpus - teachers) for teachers in range(1, gpus // 2 + 1)]
    return sorted(ways, key=lambda way: min(way[0] * teacher, way[1] * student), reverse=True)


def divisions(gpus: int, work: dict[str, float]) -> list[dict[str, int]]:
    """GPUs of "teacher", "sampler" and "train", at least one each: of the ways to divide them in an OnPolicy
    stage DIVISIONS, that with the fastest slowest role first; of equals, that with the fewest teachers, then
    samplers. `work`: seconds of each on one GPU.

    5,120 GPUs have 13 million ways, so only those near the best are made. If a few GPUs are left when each
    was given to the slowest role, the ways to add these are the best: in any other, a role has fewer GPUs
    than when it was the slowest.
    """
    left = math.isqrt(2 * DIVISIONS)  # which can be added in (left + 1)(left + 2) / 2 ways
    least = dict.fromkeys(work, 1)
    for _ in range(gpus - len(work) - left):
        least[max(work, key=lambda role: work[role] / least[role])] += 1
    most = max(work[role] / least[role] for role in work)
    for role in work:  # ways that are as fast as the slowest of these may be before it
        while least[role] > 1 and work[role] / (least[role] - 1) <= most:
            least[role] -= 1
    ways = [
        {"teacher": teacher, "sampler": sampler, "train": gpus - teacher - sampler}
        for teacher in range(least["teacher"], gpus - least["sampler"] - least["train"] + 1)
        for sampler in range(least["sampler"], gpus - teacher - least["train"] + 1)
    ]
    return sorted(ways, key=lambda way: max(work[role] / way[role] for role in work))[:DIVISIONS]


def make_plan(run: DistillRun, assumed: Assumptions) -> Plan:
    """The plan of a run."""
    return _Planner(run, assumed).plan()


def plan_steps(run: DistillRun, assumed: Assumptions) -> list[StepPlan]:
    """The steps of a run's plan alone, which takes a tenth of the time."""
    return _Planner(run, assumed).steps()[0]


class _Planner:
    def __init__(self, run: DistillRun, assumed: Assumptions) -> None:
        self.run, self.spec, self.assumed = run, run.spec, assumed
        self.size = STUDENTS[run.spec.student.shape]
        self.sources: list[str] = []
        self.onpolicy = [stage for stage in run.spec.stages if isinstance(stage, OnPolicy)]
        self.lengths = {stage.name: self._lengths(stage) for stage in self.onpolicy}
        self.rollouts = {
            stage.name: rollout_totals(run.spec, stage, assumed.prompt, self.lengths[stage.name].completion)
            for stage in self.onpolicy
        }
        self._note(f"disk and bucket: {assumed.disk_speed / 1e9:g} GB/s a pod, assumed")
        if assumed.disk_speed < BUCKET_SPEED:
            self._note(
                f"grace: {BUCKET_SPEED / 1e9:g} GB/s a pod; a slower one is killed before its last "
                "checkpoint is written, and the stage continues from the one before"
            )

    def plan(self) -> Plan:
        steps, hours = self.steps()
        speeds = {step.step: step.tokens_per_second for step in steps}
        memory = memory_by_role(self.spec, self.assumed.memory, self.assumed.teacher)
        self._note_engines(memory)
        for stage in self.onpolicy:
            self._note_roles(stage)
        known = [step.hours for step in steps if step.step != PREPROCESS]
        gpu_hours = sum((step.hours or 0.0) * sum(step.gpus.values()) for step in steps)
        checkpoints = [self._checkpoints(stage, speeds[stage.name]) for stage in self.spec.stages]
        return Plan(
            run=self.run.metadata.name,
            card=self.assumed.card.name,
            card_memory=self.assumed.memory,
            teacher=self.assumed.teacher.name if self.assumed.teacher else None,
            gpus=self.spec.teacher.gpus + self.spec.student.gpus,
            hours=hours,
            gpu_hours=None if None in known else gpu_hours,
            preprocess_cpu_hours=self._cpu_hours(next(step for step in steps if step.step == PREPROCESS)),
            steps=steps,
            checkpoints=checkpoints,
            bucket=self._bucket(checkpoints),
            memory=memory,
            problems=self._problems(memory),
            sources=self.sources,
        )

    def _note_engines(self, memory: Sequence[RoleMemory]) -> None:
        """Note how many engines share a GPU of each sampler, and how much each of their caches holds."""
        for role in memory:
            if role.role == "sampler" and role.fits:
                length = self.spec.training.sequence_length
                each, some = (", each", "s") if role.engines > 1 else ("", "")
                self._note(
                    f"{role.step}: {role.engines} engine{some} on each GPU{each} with "
                    f"{role.items['cache'] / role.engines / GIB:.1f} GiB of keys and values, which are "
                    f"{role.sequences:,} sequences of {length:,} tokens; it samples up to {SEQUENCES:,} at a "
                    "time"
                )

    def _lengths(self, stage: OnPolicy) -> Lengths:
        """The assumed lengths of prompts and completions; notes them."""
        allowed = stage.rollout.max_tokens
        found = {name: self.assumed.completion.get(name, -(-getattr(allowed, name) // 2)) for name in EFFORTS}
        lengths = ", ".join(f"{name} {tokens:,}" for name, tokens in found.items())
        self._note(
            f"{stage.name}: prompts of {self.assumed.prompt:,} tokens, completions of {lengths} on average, "
            f"one in {1 / RUNAWAY:.0f} as long as it may be, assumed"
        )
        return Lengths(self.assumed.prompt, found)

    def _speed(self, work: Work) -> float | None:
        """Tokens a second of one GPU, in preprocessing of one CPU core; notes where it comes from."""
        found = self._measured(work)
        return None if found is None else found.tokens_per_second

    def _measured(self, work: Work) -> Measured | None:
        """The speed that the plan computes with, None if there is none; notes where it comes from."""
        model: str = TEXT if work == "preprocess" else self.spec.student.shape
        unit = "CPU core" if work == "preprocess" else "GPU"
        if work in ("score", "hidden"):
            model = self.assumed.teacher.name if self.assumed.teacher else "teacher.model"
        if work in self.assumed.speeds:
            speed = self.assumed.speeds[work]
            self._note(f"{work}: {speed:,.15g} tokens/s a {unit}, given")
            return Measured(work, model, self.assumed.card.name, speed, "", "given")
        engines = self._engines() if work == "sample" else 1
        found: Measured | None = measured(work, model, self.assumed.card.name, engines)
        if found is None and work == "hidden":
            self._note("hidden: at least as fast as score, which is the same forward and the logits after it")
            return self._measured("score")
        if found is None:
            self._note(f"{work}: {model} was not measured; give --{work}-tokens-per-second")
            return None
        fewer = (
            f"; measured with {found.engines} engine{'s' * (found.engines > 1)} on a GPU, and here {engines} "
            "share one"
        )
        self._note(
            f"{work}: {found.tokens_per_second:,.0f} tokens/s a {unit}, {model} "
            f"({found.source}, {found.date}){fewer if found.engines < engines else ''}"
        )
        return found

    def _engines(self) -> int:
        """Engines of a sampler on each GPU."""
        length = self.spec.training.sequence_length
        return divide_card(self.size, self.assumed.memory, length, ENGINES).engines

    def _note(self, text: str) -> None:
        if text not in self.sources:
            self.sources.append(text)

    def steps(self) -> tuple[list[StepPlan], float | None]:
        """The steps in order, and the hours until the last one ends."""
        steps = [*self._init(), self._preprocess()]
        scored = 0.0
        ends: float | None = 0.0
        if any(stage.needs_rescoring for stage in self.spec.stages):
            rescore = self._rescore()
            steps.append(rescore)
            scored = rescore.hours or 0.0
            ends = None if rescore.hours is None else (scored if self.spec.rescores_first else 0.0)
        for stage in self.spec.stages:
            training, evaluation = self._training(stage), self._evaluation(stage)
            for step in (training, *evaluation):
                steps.append(step)
                known = ends is not None and step.hours is not None
                ends = ends + step.hours if known else None  # type: ignore[operator]
                if step is training and ends is not None and stage.needs_teacher:
                    ends = max(ends, scored + (training.hours or 0.0))
        self._note_rescoring(steps)
        return steps, ends

    def _note_rescoring(self, steps: Sequence[StepPlan]) -> None:
        """Note how long rescoring takes beside, or before, the stages that do not need it."""
        rescore = next((step for step in steps if step.step == RESCORE), None)
        if rescore is None or rescore.hours is None:
            return
        beside = list(takewhile(lambda stage: not stage.needs_teacher, self.spec.stages))
        names = {step for stage in beside for step in self.run.steps_of(stage)}
        hours = [step.hours for step in steps if step.step in names]
        if None in hours:
            return
        trained = sum(one for one in hours if one is not None)
        gpus, every = self.spec.rescoring_gpus, self.spec.teacher.gpus + self.spec.student.gpus
        taken = f"rescore: {units.hours(rescore.hours)} hours on {units.gpus(gpus)} (rescore.gpus)"
        if self.spec.rescores_first:
            few = self.spec.teacher.gpus
            alone = rescore.hours * gpus / few
            advice = (
                f"; on {units.gpus(few)} it would take {units.hours(alone)} hours beside them"
                if max(alone, trained) < rescore.hours + trained
                else ""
            )
            self._note(
                f"{taken}, then {units.hours(trained)} hours of stages that do not need the teacher{advice}"
            )
            return
        waits = max(0.0, rescore.hours - trained)
        together = rescore.hours * gpus / every
        advice = (
            f"; on {units.gpus(every)} it would take {units.hours(together)} hours before them"
            if together + trained < max(rescore.hours, trained)
            else ""
        )
        self._note(
            f"{taken} beside {units.hours(trained)} hours of stages that do not need the teacher: the "
            f"student's GPUs wait {units.hours(waits)} hours for scores{advice}"
        )

    def _init(self) -> list[StepPlan]:
        """The initial weights, if they are made from a dense model: written to disk, then to the bucket."""
        if self.run.upcycle is None:
            return []
        seconds = 2 * self.size.main_weights / self.assumed.disk_speed
        self._note(
            f"init: writes {self.size.main_weights / 1e9:.3g} GB, beside preprocessing; neither the download "
            f"of {self.run.upcycle.model} nor the arithmetic was measured"
        )
        return [StepPlan(INIT, "", None, {}, seconds / 3600, None, INIT)]

    def _preprocess(self) -> StepPlan:
        """Preprocessing, whose workers share the dataset's tokens. Its hours need the number of tokens."""
        workers, cores = self.spec.dataset.workers, worker_cores(self.spec)
        tokens, speed = self.assumed.dataset_tokens, self._speed("preprocess")
        together = workers * cores * speed if speed else None
        hours = tokens / together / 3600 if tokens is not None and together else None
        hint = "" if tokens is not None else "; give --dataset-tokens for its hours"
        pods = f"{workers:,} workers (dataset.workers) that use {cores:g} CPU each"
        if workers == 1:
            pods = f"1 worker (dataset.workers) that uses {cores:g} CPU"
        self._note(f"preprocess: {pods}{hint}")
        return StepPlan(PREPROCESS, "", tokens, {}, hours, together, "" if hours is None else PREPROCESS)

    def _cpu_hours(self, preprocess: StepPlan) -> float | None:
        """CPU hours of that step."""
        if preprocess.hours is None:
            return None
        return preprocess.hours * self.spec.dataset.workers * worker_cores(self.spec)

    def _rescore(self) -> StepPlan:
        tokens = sum(self._scored_tokens().values())
        gpus = self.spec.rescoring_gpus
        speed = self._speed("score")
        hours = tokens / (gpus * speed) / 3600 if speed else None
        return StepPlan(
            RESCORE, "scores", tokens, {"teacher": gpus}, hours, speed and gpus * speed, "teacher"
        )

    def _scored_tokens(self) -> dict[str, int]:
        """Assistant tokens that the teacher scores, by the subset that stages share."""
        found = {}
        for stage in self.spec.stages:
            if (subset := stage.scored_subset) is not None:
                share = self.assumed.dataset_tokens
                most = subset.tokens if share is None else int(subset.fraction * share)
                found[subset.model_dump_json()] = min(subset.tokens, most)
        return found

    def _training(self, stage: Stage) -> StepPlan:
        """The training step, with the roles beside it."""
        shape = layout(self.spec.student, self.spec.training, stage)
        gpus = {"train": shape.ranks}
        if isinstance(stage, OnPolicy):
            gpus |= {"sampler": stage.sampler_gpus, "teacher": self.spec.teacher.gpus}
            times = self._role_times()
            if times is None:
                return self._trained(stage, gpus, None, {})
            found = self._simulated(self.spec, stage, times)
            return replace(
                self._trained(stage, gpus, found.seconds, found.shares()),
                step_to_sampling=times.step_to_sampling,
                step_to_bucket=times.copy + times.publish,
                copy_seconds=times.copy,
                upload_share=found.uploading / found.seconds,
                train_tokens_per_second=found.train_tokens_per_second,
            )
        if self.run.measures_validity(stage):
            gpus |= {"evaluate": min(1, self.spec.teacher.gpus)}
        speed = self._training_speed(stage)
        seconds = {"train": stage.tokens / (shape.ranks * speed) if speed else None}
        if stage.runs_teacher:
            teachers = teacher_processes(self.spec.teacher, self.spec.student, stage)
            gpus |= {"teacher": teachers}
            speed = self._speed("hidden")
            seconds["teacher"] = stage.tokens / (teachers * speed) if speed else None
        known = {role: of_role for role, of_role in seconds.items() if of_role is not None}
        if len(known) < len(seconds):
            return self._trained(stage, gpus, None, {})
        longest = max(known.values())
        busy = {role: of_role / longest for role, of_role in known.items()}
        if stage.runs_teacher:
            self._note_split(stage, busy["train"])
        return self._trained(stage, gpus, longest, busy)

    def _training_speed(self, stage: Stage) -> float | None:
        """Tokens a second of one GPU that trains on the dataset; notes where it comes from.

        A measured one is of microbatches of MOST positions without recomputed layers; the stage's own may
        take longer, by their rule. A given one is that of a run, so of its microbatches.
        """
        speed = self._speed("train")
        if speed is None or "train" in self.assumed.speeds:
            return speed
        teacher, spec = self.assumed.teacher, self.spec
        width = teacher.hidden if teacher is not None and stage.runs_teacher else None
        microbatch = trainer_microbatch(spec, stage, self.assumed.memory, width)
        sequences = layout(spec.student, spec.training, stage).sequences_per_rank
        positions = sequences * spec.training.sequence_length
        longer = time_of_stage(microbatch, spec, stage, sequences) / positions / (1 + FIXED / MOST)
        if longer < 1.005:
            return speed
        self._note(
            f"{stage.name}: trains {speed / longer:,.0f} tokens/s a GPU, because its microbatches are "
            "shorter than those that were measured, or have recomputed layers or sharded gradients"
        )
        return speed / longer

    def _trained(
        self, stage: Stage, gpus: Mapping[str, int], seconds: float | None, busy: dict[str, float]
    ) -> StepPlan:
        """A training step of `seconds` without checkpoints, None if not known. `busy`: share of them in which
        each role has work."""
        if seconds is None:
            return StepPlan(stage.name, stage.kind, stage.tokens, gpus, None, None, "")
        speed = stage.tokens / seconds
        checkpoints = self._checkpoints(stage, speed)
        pauses = checkpoints.number * checkpoints.pause_seconds / 3600
        return StepPlan(
            stage.name,
            stage.kind,
            stage.tokens,
            gpus,
            seconds / 3600 + pauses,
            speed,
            max(busy, key=lambda role: busy[role]),
            pauses,
            busy if len(busy) > 1 else {},
        )

    def _role_times(self) -> RoleTimes | None:
        """Seconds of what the roles of an OnPolicy stage do; None if a speed is not known."""
        train, sample, score = self._measured("train"), self._measured("sample"), self._measured("score")
        if train is None or sample is None or score is None:
            return None
        return role_times(
            train,
            sample,
            score,
            self._engines(),
            SEQUENCES,
            self.size.weights,
            self.assumed.disk_speed,
            self.spec.runtime.weights_volume is not None,
        )

    def _simulated(self, spec: Spec, stage: OnPolicy, times: RoleTimes) -> StageTime:
        """The time of an OnPolicy stage with the GPUs of `spec` and of its sampler."""
        microbatch = trainer_microbatch(spec, stage, self.assumed.memory, None)
        return stage_time(spec, stage, self.lengths[stage.name], times, microbatch)

    def _note_split(self, stage: Stage, busy: float) -> None:
        """Notes how busy the students of a TeacherForced stage are, and how its GPUs are split best."""
        spec = self.spec
        teacher, student = self._speed("hidden"), self._training_speed(stage)
        assert teacher is not None and student is not None
        teachers = teacher_processes(spec.teacher, spec.student, stage)
        gpus = spec.teacher.gpus + spec.student.gpus
        ways = splits(gpus, teacher, student)
        split = next((way for way in ways if _accepted(self._with_gpus(*way), stage)), None)
        now = min(teachers * teacher, spec.student.gpus * student)
        most = min(split[0] * teacher, split[1] * student) if split else now
        text = f"{stage.name}: the students are busy for {100 * busy:.0f} % of the time"
        if split and most > 1.005 * now:
            self._note(
                f"{text}. Of {units.gpus(gpus)}, {split[0]:,} for the teacher and {split[1]:,} for the "
                f"student make the most tokens: {most:,.0f} a second, not {now:,.0f} (teacher.gpus, "
                "student.gpus)"
            )
        else:
            self._note(f"{text}; no other split of {units.gpus(gpus)} makes more tokens")

    def _note_roles(self, stage: OnPolicy) -> None:
        """Notes what the simulation of an OnPolicy stage assumes and finds, and how its GPUs are divided
        best."""
        times = self._role_times()
        if times is None:
            return
        now = self._simulated(self.spec, stage, times)
        bucket, load = (
            f"in the bucket after {units.three_digits(times.publish)} s",
            f"{units.three_digits(times.load)} s later in the engines",
        )
        way = f"{bucket} and {load}"
        if times.volume is not None:
            way = f"on the volume after {units.three_digits(times.volume)} s and {load}; it is {bucket}"
        self._note(
            f"{stage.name}: simulated, because its roles wait for each other. Training waits "
            f"{units.three_digits(times.copy)} s for a policy version, which is {way}"
        )
        uploads = now.uploading / now.seconds
        pressure = stage.back_pressure
        if now.waiting > pressure.waiting:
            self._note(
                f"{stage.name}: the trainer waits for windows for {100 * now.waiting:.0f} % of its steps' "
                f"time, more than backPressure.waiting {pressure.waiting:g}: after {pressure.windows:,} "
                "windows completions are shortened, which is not simulated"
            )
        if uploads >= 0.05:
            self._note(
                f"{stage.name}: the trainer waits for {100 * uploads:.0f} % of the time until the bucket has "
                "the version before; a faster bucket, larger windows (rollout.promptsPerWindow) or a larger "
                "publishEvery make that shorter"
            )
        self._note_division(stage, times, now)

    def _note_division(self, stage: OnPolicy, times: RoleTimes, now: StageTime) -> None:
        """Notes how the GPUs of an OnPolicy stage are divided best, and how many other divisions were
        compared if one that was not may take less time. `now`: its time as they are."""
        seconds, totals = now.seconds, self.rollouts[stage.name]
        gpus = self.spec.teacher.gpus + self.spec.student.gpus
        full = (times.decode + SEQUENCES * times.decode_token) / (times.engines * SEQUENCES)
        work = {
            "teacher": totals.tokens * times.score,
            "sampler": totals.completions * full,
            "train": stage.tokens * times.position,
        }
        most = math.ceil(SIMULATED / len(self.onpolicy) / now.simulated)
        ways = divisions(gpus, work)[:most]
        complete, others = len(ways) == math.comb(gpus - 1, 2), 0
        here = (self.spec.teacher.gpus, stage.sampler_gpus)
        least, best = seconds, None
        for roles in ways:
            if max(work[role] / roles[role] for role in work) > least:
                complete = True  # all that follow take longer, even without waits
                break
            if (roles["teacher"], roles["sampler"]) == here:
                continue
            sampler = stage.sampler.model_copy(update={"gpus": roles["sampler"]})
            divided = stage.model_copy(update={"sampler": sampler})
            spec = self._with_gpus(roles["teacher"], gpus - roles["teacher"])
            if _accepted(spec, divided):
                others += 1
                found = self._simulated(spec, divided, times).seconds
                if found < least:
                    least, best = found, roles
        compared = "" if complete else f", of {others:,} compared"
        if best is not None and least < 0.995 * seconds:
            self._note(
                f"{stage.name}: {best['teacher']:,} of {units.gpus(gpus)} for the teacher, "
                f"{best['sampler']:,} to sample and {best['train']:,} to train take the least time"
                f"{compared}: {units.hours(least / 3600)} hours without pauses, not "
                f"{units.hours(seconds / 3600)} (teacher.gpus, student.gpus, stages[].sampler.gpus)"
            )
        elif complete or others:
            self._note(f"{stage.name}: no other division of {units.gpus(gpus)} takes less time{compared}")
        else:
            self._note(f"{stage.name}: no other division of {units.gpus(gpus)} was compared")

    def _with_gpus(self, teacher: int, student: int) -> Spec:
        """The specification with these GPUs, of the memory that is assumed."""
        return self.spec.model_copy(
            update={
                "teacher": self.spec.teacher.model_copy(update={"gpus": teacher}),
                "student": self.spec.student.model_copy(update={"gpus": student}),
                "runtime": self.spec.runtime.model_copy(
                    update={"gpu_memory": f"{self.assumed.memory // GIB}Gi"}
                ),
            }
        )

    def _checkpoints(self, stage: Stage, speed: float | None) -> CheckpointPlan:
        """The checkpoints of a stage that trains `speed` tokens a second, None if that is not known."""
        student, training = self.spec.student, self.spec.training
        policy = training.checkpoint
        number = -(-stage.tokens // policy.every_tokens)
        upload = pod_checkpoint(student, training, stage) / self.assumed.disk_speed
        interval = None
        if speed:
            bound = policy.interval or float("inf")
            interval = max(min(policy.every_tokens / speed, bound), upload)
            number = math.ceil(stage.tokens / speed / interval - 1e-9)  # less the rounding of the division
        return CheckpointPlan(
            stage=stage.name,
            number=number,
            kept=min(policy.keep, number),
            size=self.size.checkpoint,
            pause_seconds=self.size.checkpoint / layout(student, training, stage).ranks / COPY_SPEED,
            upload_seconds=upload,
            interval_seconds=interval,
            host_bytes=host_copies(student, training, stage),
            grace_seconds=grace_seconds(student, training, stage),
        )

    def _evaluation(self, stage: Stage) -> list[StepPlan]:
        """The evaluation after a stage: completions as long as they may be, without held-out documents."""
        wanted = self.spec.evaluation
        if not wanted.completions and not wanted.canary:
            return []
        rounds = -(-wanted.completions // SAMPLED_AT_ONCE)
        longest = max(
            (one.rollout.max_tokens.high for one in self.spec.stages if isinstance(one, OnPolicy)),
            default=4096,
        )
        seconds = rounds * min(longest, self.spec.training.sequence_length) * DECODE_SECONDS
        return [
            StepPlan(f"{stage.name}-{EVALUATE}", "", None, {"evaluate": 1}, seconds / 3600, None, "evaluate")
        ]

    def _bucket(self, checkpoints: Sequence[CheckpointPlan]) -> dict[str, int | None]:
        """Bytes at the end of the run by kind."""
        tokens = self.assumed.dataset_tokens
        found: dict[str, int | None] = {"dataset": tokens * TOKEN_BYTES if tokens is not None else None}
        if self.run.upcycle is not None:
            found["initial weights"] = self.size.main_weights
        if scored := self._scored_tokens():
            found["scores"] = sum(scored.values()) * SCORE_BYTES
        if self.rollouts:
            found["windows"] = round(sum(map(_window_bytes, self.rollouts.values())))
            found["policy versions"] = self.size.weights * max(
                HELD_VERSIONS + -(-stage.staleness // stage.publish_every) for stage in self.onpolicy
            )
        found["checkpoints"] = sum(one.kept * one.size for one in checkpoints)
        found["exported model"] = self.size.weights
        return found

    def _problems(self, memory: list[RoleMemory]) -> list[str]:
        """What does not fit on the cards."""
        card = f"{self.assumed.memory / GIB:.1f} GiB"
        problems = [
            f"spec.student: {_WHO[role.role]} of {role.step} needs {-(-role.needed // GIB)} GiB on each of "
            f"its {units.gpus(role.gpus)}, and a GPU has {card} (spec.runtime.gpuMemory or "
            f"--gpu). {_REMEDIES[role.role]}"
            for role in memory
            if not role.fits and role.role != "teacher"
        ]
        problems += self._host_problems()
        if self.assumed.teacher is not None:
            problems += teacher_problems(self.spec, self.assumed.teacher, self.assumed.memory, card)
        return problems

    def _host_problems(self) -> list[str]:
        """Stages whose trainers would be killed for their copies, by the run's own limit of memory."""
        resources = self.spec.runtime.resources.get("train")
        limit = resources.limits.get("memory") if resources else None
        if limit is None:
            return []
        needed = {
            stage.name: host_copies(self.spec.student, self.spec.training, stage)
            for stage in self.spec.stages
        }
        name = max(needed, key=lambda stage: needed[stage])
        if needed[name] <= parse_quantity(limit):
            return []
        return [
            f"spec.runtime.resources.train: the memory limit {limit} is less than the "
            f"{needed[name] / GIB:.1f} GiB that each pod of stage {name} holds while its state is uploaded. "
            f"Raise it to {-(-needed[name] // GIB) + HOST_MEMORY}Gi or more, or leave it out."
        ]


def _accepted(spec: Spec, stage: Stage) -> bool:
    """Whether the API server accepts the stage."""
    return all(rule.broken(spec, stage) is None for rule in RULES if rule.each == "stages")


def _window_bytes(totals: RolloutTotals) -> float:
    prompts = totals.tokens - totals.completions
    return prompts * PROMPT_BYTES + totals.completions * COMPLETION_BYTES


_WHO = {"train": "the trainer", "sampler": "the sampler", "evaluate": "the student"}
_REMEDIES = {
    "train": "Give the stage more GPUs (raise student.gpus or lower sampler.gpus), raise "
    "student.expertParallel, lower training.sequenceLength, or use GPUs with more memory.",
    "sampler": "Use GPUs with more memory.",
    "evaluate": "Use GPUs with more memory.",
}
