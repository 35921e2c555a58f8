"""Reads what a report shows of a run: metrics, progress, evaluations, windows and manifests.

Nothing is written, and nothing has to be there but run.json: a run may be in any state. An object that is
deleted while the report is made, such as an old checkpoint, counts as one that was never there.
"""

import codecs
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from vpmoe.api import DistillRun
from vpmoe.api.progress import Progress
from vpmoe.clock import now
from vpmoe.data import vocabulary_file
from vpmoe.data.spans import SPANS
from vpmoe.data.tokenizer import Ids
from vpmoe.data.vocabulary import END, MESSAGE, TEXT_IDS
from vpmoe.failure import Permanent
from vpmoe.rollout.curriculum import EFFORTS
from vpmoe.rollout.evaluation_record import (
    EvaluationRecord,
    load_evaluation,
    load_validity,
    measured_validities,
)
from vpmoe.rollout.task_record import TaskEvaluation, load_task_evaluations
from vpmoe.rollout.validity import VALID
from vpmoe.rollout.window_files import Rollout, WindowRollouts, read_rollouts, read_scores
from vpmoe.storage import Bucket, StorageError, paths
from vpmoe.storage.manifest import Manifest, load
from vpmoe.storage.records import facts_of
from vpmoe.teacher.histogram import dense
from vpmoe.teacher.scores import ScoresFacts

Line = Mapping[str, Any]
"""One line of metrics (docs/reference/metrics.md)."""

THREADS = 8
"""Objects that are read at the same time."""
WINDOWS = 3
"""Windows of a stage whose rollouts are read: the first, one in the middle, and the last."""
COMPLETION_TOKENS = 300
"""Tokens of a completion that are kept."""
LOWEST_LOGP = -20.0
"""Lower bound of the histograms of log p. What is lower counts in the first bin."""
DOCUMENTS = "documents"
"""TeacherLogp.tokens of the dataset's documents."""
LOGP_BINS = 80
"""Bins of the histograms of log p, from LOWEST_LOGP to 0."""


@dataclass(frozen=True)
class Activity:
    """A time in which an attempt at a step ran, as far as its records tell."""

    step: str
    attempt: int
    start: datetime
    end: datetime

    @property
    def hours(self) -> float:
        """How long it ran."""
        return (self.end - self.start) / timedelta(hours=1)


@dataclass(frozen=True)
class StepRecord:
    """What the bucket has of a step."""

    name: str
    role: str
    stage: str | None
    """None for init, preprocess and rescore."""
    progress: Progress | None
    """None if it has not started."""
    lines: tuple[Line, ...]
    """Its metrics, in the order of time."""

    @property
    def state(self) -> str:
        """Waiting, Running or Succeeded. A step that failed is Running: its job does not write that."""
        return self.progress.state if self.progress is not None else "Waiting"

    def events(self, event: str) -> list[Line]:
        """Its metrics of one kind, in order."""
        return [line for line in self.lines if line["event"] == event]


@dataclass(frozen=True)
class TeacherLogp:
    """How likely the teacher finds some tokens."""

    tokens: str
    """Which tokens, in words."""
    counts: Mapping[str, NDArray[np.int64]]
    """By span, [LOGP_BINS]: number of tokens by the teacher's log p."""


@dataclass(frozen=True)
class Token:
    """A sampled token. `text` may be empty, if it ends within a character, and holds several otherwise."""

    text: str
    span: str
    special: bool
    """Whether it is one of Harmony's special tokens."""
    teacher: float
    """log p, in nats."""
    student: float
    """log p with which it was sampled."""


@dataclass(frozen=True)
class Completion:
    """A completion that the student sampled and the teacher scored."""

    stage: str
    window: int
    version: int
    effort: str
    validity: str
    question: str
    tokens: tuple[Token, ...]
    """The first COMPLETION_TOKENS."""
    length: int
    """Number of tokens."""


@dataclass(frozen=True)
class RunData:
    """All that a report is made from."""

    run: DistillRun
    url: str
    """s3:// URL of the run's folder."""
    made: datetime
    steps: tuple[StepRecord, ...]
    """Without those that write reports."""
    evaluations: Mapping[str, EvaluationRecord]
    """By stage, those that were measured after it."""
    validities: Mapping[str, Sequence[EvaluationRecord]]
    """By stage, those that were measured while it trained."""
    tasks: Mapping[str, TaskEvaluation]
    """By stage, answers to benchmark tasks."""
    teacher_logp: tuple[TeacherLogp, ...]
    completions: tuple[Completion, ...]
    """Of the first and of the last window that was read."""
    manifests: tuple[Manifest, ...]
    """Initial weights, dataset, scores; then of each stage the last checkpoint, the last policy version and
    the exported model."""
    activities: tuple[Activity, ...]
    """In the order of their start."""

    def step(self, name: str) -> StepRecord:
        """The step of that name."""
        return next(step for step in self.steps if step.name == name)

    def of_role(self, *roles: str) -> list[StepRecord]:
        """The steps of these roles, in the order of the run."""
        return [step for step in self.steps if step.role in roles]

    def manifest(self, kind: str) -> Manifest | None:
        """The first manifest of a kind."""
        return next((found for found in self.manifests if found.kind == kind), None)


def read_run_data(run: DistillRun, bucket: Bucket) -> RunData:
    """Read a run. Raises StorageError, Permanent if one of its objects is malformed."""
    return _Reader(run, bucket).read()


class _Reader:
    def __init__(self, run: DistillRun, bucket: Bucket) -> None:
        self.run, self.bucket = run, bucket
        self.folder = paths.run(run)
        self.keys = [found.key for found in bucket.list(f"{self.folder}/")]

    def read(self) -> RunData:
        steps = tuple(self._steps())
        manifests = tuple(self._manifests(steps))
        stages = [stage.name for stage in self.run.spec.stages]
        evaluations = {stage: load_evaluation(self.run, stage, self.bucket) for stage in stages}
        validities = {
            stage: [
                load_validity(self.run, stage, self.bucket, number)
                for number in measured_validities(self.run, stage, self.bucket)
            ]
            for stage in stages
            if self._below(f"steps/{stage}-validity/evaluation-")
        }
        windows = [window for stage in stages for window in self._windows(stage)]
        return RunData(
            run=self.run,
            url=self.bucket.url(self.folder),
            made=now(),
            steps=steps,
            evaluations={stage: found for stage, found in evaluations.items() if found is not None},
            validities=validities,
            tasks=load_task_evaluations(self.run, self.bucket) if self._below("tasks/") else {},
            teacher_logp=(*self._scores(manifests), *map(_window_logp, windows)),
            completions=tuple(
                found for window in (*windows[:1], *windows[1:][-1:]) for found in _completions(*window)
            ),
            manifests=manifests,
            activities=tuple(_activities(self.run, steps, manifests)),
        )

    def _below(self, prefix: str, ending: str = "") -> list[str]:
        """The run's keys that begin and end so, in order."""
        whole = f"{self.folder}/{prefix}"
        return [key for key in self.keys if key.startswith(whole) and key.endswith(ending)]

    def _get(self, key: str) -> bytes | None:
        return get_if_there(self.bucket, key)

    def _steps(self) -> Iterable[StepRecord]:
        lines: dict[str, list[Line]] = defaultdict(list)
        keys = [key for key in self._below("steps/", ".jsonl") if "/metrics/" in key]
        with ThreadPoolExecutor(THREADS) as pool:
            for key, content in zip(keys, pool.map(self._get, keys), strict=True):
                if content is not None:
                    step = key.removeprefix(f"{self.folder}/steps/").partition("/")[0]
                    lines[step] += parse_lines(content, self.bucket.url(key))
        for name in self.run.steps():
            if self.run.role(name) == "report":  # a page does not tell about itself
                continue
            stage = self.run.stage_of(name)
            yield StepRecord(
                name=name,
                role=self.run.role(name),
                stage=stage.name if stage is not None else None,
                progress=read_progress(self.run, self.bucket, name),
                lines=tuple(sorted(lines[name], key=line_time)),
            )

    def _manifests(self, steps: Sequence[StepRecord]) -> Iterable[Manifest]:
        found: list[Manifest] = []
        for stage in self.run.spec.stages:
            for folder in (f"checkpoints/{stage.name}/", f"weights/{stage.name}/", f"models/{stage.name}/"):
                keys = self._below(folder, "/manifest.json")
                # The number of a checkpoint is not padded: order by length first.
                for key in sorted(keys, key=lambda key: (len(key), key))[-1:]:
                    found += self._manifest(key)
        datasets = {
            step.progress.dataset.id for step in steps if step.progress is not None and step.progress.dataset
        }
        scores = {line["scores"] for step in steps if step.role == "rescore" for line in step.lines}
        scores |= {str(one.inputs["scores"].facts["id"]) for one in found if "scores" in one.inputs}
        folders = (
            paths.init(self.run),
            *map(paths.dataset, sorted(datasets)),
            *map(paths.scores, sorted(scores)),
        )
        shared = [one for folder in folders for one in self._manifest(paths.manifest(folder))]
        return [*shared, *found]

    def _manifest(self, key: str) -> list[Manifest]:
        """The manifest at a key; none if it does not exist."""
        try:
            return [load(self.bucket, key)]
        except StorageError as error:
            if error.reason != "Missing":
                raise
            return []

    def _scores(self, manifests: Iterable[Manifest]) -> Iterable[TeacherLogp]:
        for found in manifests:
            if found.kind == "scores":
                facts = facts_of(self.bucket, found, "scores", ScoresFacts)
                found_by_span = facts["histogram"]
                counts = {
                    "reasoning": _rebin(dense(found_by_span["reasoning"])),
                    "final": _rebin(dense(found_by_span["final"])),
                }
                yield TeacherLogp(DOCUMENTS, counts)

    def _windows(self, stage: str) -> Iterable[tuple[WindowRollouts, list[NDArray[np.float32]]]]:
        """Up to WINDOWS windows of a stage that the teacher has scored, with the scores."""
        scored = self._below(f"rollouts/{stage}/window-", ".scores.arrow")
        places = np.unique(np.linspace(0, len(scored) - 1, WINDOWS).round().astype(int)) if scored else ()
        for key in (scored[place] for place in places):
            rollouts_key = key.removesuffix(".scores.arrow") + ".rollouts.arrow"
            rollouts, scores = self._get(rollouts_key), self._get(key)
            if rollouts is not None and scores is not None:
                window = read_rollouts(rollouts, self.bucket.url(rollouts_key))
                yield window, read_scores(scores, self.bucket.url(key), window)


def get_if_there(bucket: Bucket, key: str) -> bytes | None:
    """An object's content; None if it does not exist, or has been deleted since it was listed."""
    try:
        return bucket.get(key)
    except StorageError as error:
        if error.reason != "Missing":
            raise
        return None


def read_progress(run: DistillRun, bucket: Bucket, step: str) -> Progress | None:
    """The progress of a step; None if it has not started. Raises Permanent if it is malformed."""
    key = paths.progress(run, step)
    content = get_if_there(bucket, key)
    try:
        return Progress.model_validate_json(content) if content is not None else None
    except ValidationError as error:
        raise Permanent(
            f"{bucket.url(key)}: {error.errors()[0]['msg']}. It was altered, or written by another "
            "version; delete it and make the report again."
        ) from error


def parse_lines(content: bytes, where: str) -> list[Line]:
    """The lines of an object with metrics. Raises Permanent, with the address `where`, if it has none."""
    try:
        lines = [json.loads(line) for line in content.decode().splitlines()]
        for line in lines:
            line_time(line), line["event"], line["attempt"]
    except (ValueError, KeyError, TypeError) as error:
        raise Permanent(
            f"{where}: it does not hold lines of metrics ({type(error).__name__}: {error}). It was altered; "
            "delete it and make the report again."
        ) from error
    return lines


def line_time(line: Line) -> datetime:
    """When a line of metrics was made."""
    return datetime.fromisoformat(line["time"])


def line_seconds(line: Line) -> float:
    """The time that a line of metrics is about: its work and the waits before it, in seconds."""
    seconds = line.get("seconds") or 0.0
    work = sum(seconds.values()) if isinstance(seconds, Mapping) else float(seconds)
    # The trainer's seconds include what it waited for before its line, and it waits for an upload after that;
    # those of sampler and teacher do not.
    if line["event"] == "step":
        return work
    return work + sum(line.get(wait) or 0.0 for wait in ("waitWeights", "waitUpload", "waitRollouts"))


def _activities(
    run: DistillRun, steps: Iterable[StepRecord], manifests: Sequence[Manifest]
) -> list[Activity]:
    """When each attempt ran: from its metrics and progress; of a step without metrics, from its manifest."""
    found = []
    for step in steps:
        for attempt, lines in groupby(
            sorted(step.lines, key=lambda line: int(line["attempt"])), lambda line: int(line["attempt"])
        ):
            times = [(line_time(line), line_seconds(line)) for line in lines]
            start = min(time - timedelta(seconds=seconds) for time, seconds in times)
            end = max(time for time, _ in times)
            if step.progress is not None and step.progress.attempt == attempt:
                end = max(end, step.progress.updated)
            found.append(Activity(step.name, attempt, start, end))
        if not step.lines:
            found += [
                Activity(
                    step.name,
                    made.provenance.attempt,
                    datetime.fromisoformat(made.provenance.started),
                    datetime.fromisoformat(made.raw["predicate"]["runDetails"]["metadata"]["finishedOn"]),
                )
                for made in manifests
                if made.provenance.run == run.identity and made.provenance.step == step.name
            ]
    return sorted(found, key=lambda activity: activity.start)


def _rebin(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Counts of float16 bit patterns [65536] as counts of bins [LOGP_BINS]."""
    bits = np.flatnonzero(counts)
    return _binned(bits.astype(np.uint16).view(np.float16).astype(np.float64), counts[bits])


def _binned(logp: NDArray[Any], weights: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """Number of values in each bin, [LOGP_BINS]."""
    inside = np.clip(logp, LOWEST_LOGP, 0.0)
    return np.histogram(inside, LOGP_BINS, (LOWEST_LOGP, 0.0), weights=weights)[0].astype(np.int64)


def _window_logp(read: tuple[WindowRollouts, list[NDArray[np.float32]]]) -> TeacherLogp:
    window, scores = read
    spans = np.concatenate([one.span_C for one in window.rollouts])
    logp = np.concatenate(scores)
    header = window.header
    return TeacherLogp(
        f"{header.stage} window {header.window}",
        {name: _binned(logp[spans == number]) for name, number in SPANS.items()},
    )


def _completions(window: WindowRollouts, scores: Sequence[NDArray[np.float32]]) -> Iterable[Completion]:
    """One completion of a window for each effort: the first valid one, else the first."""
    pairs = list(zip(window.rollouts, scores, strict=True))
    for effort in EFFORTS:
        found = [pair for pair in pairs if pair[0].effort == effort]
        valid = [pair for pair in found if pair[0].validity == VALID]
        for one, logp_C in (valid or found)[:1]:
            yield Completion(
                stage=window.header.stage,
                window=window.header.window,
                version=window.header.version,
                effort=effort,
                validity=one.validity,
                question=_question(one.ids_T[: one.prompt_length]),
                tokens=tuple(_tokens(one, logp_C)),
                length=len(one.logp_C),
            )


def _question(prompt_T: Ids) -> str:
    """The text of a prompt's last message."""
    ends = np.flatnonzero(prompt_T == END)
    last = int(ends[-1]) if len(ends) else len(prompt_T)
    begins = np.flatnonzero(prompt_T[:last] == MESSAGE)
    first = int(begins[-1]) + 1 if len(begins) else 0
    return vocabulary_file.encoding().decode(prompt_T[first:last].tolist())


def _tokens(one: Rollout, logp_C: NDArray[np.float32]) -> Iterable[Token]:
    encoding, names = vocabulary_file.encoding(), {number: name for name, number in SPANS.items()}
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    completion = one.ids_T[one.prompt_length :].tolist()[:COMPLETION_TOKENS]
    for token, span, teacher, student in zip(completion, one.span_C, logp_C, one.logp_C, strict=False):
        special = token >= TEXT_IDS
        text = (
            encoding.decode([token]) if special else decoder.decode(encoding.decode_single_token_bytes(token))
        )
        yield Token(text, names[int(span)], special, float(teacher), float(student))
