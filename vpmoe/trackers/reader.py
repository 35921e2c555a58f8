"""Reads the rows of a run's metrics that are new since the call before.

An object with metrics is written once and never changes, so each is read once. x is the tokens that all
stages have trained on, as in the report: of a stage, those of the stages before and its own. Sampler and
teacher work ahead of the trainer, so the x of their rows is the window.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from vpmoe.api import DistillRun
from vpmoe.api.run import VALIDITY
from vpmoe.report.run_data import THREADS, Line, get_if_there, parse_lines, read_progress
from vpmoe.storage import Bucket, paths
from vpmoe.trackers.rows import Row, row

Scalar = str | int | float | bool
Config = Mapping[str, Scalar]
"""What a tracker shows of where a step comes from, by name."""


@dataclass(frozen=True)
class TrackedStep:
    """A step of a run, which is a run in the tracker."""

    run: str
    """DistillRun.identity."""
    run_name: str
    """name-uid8"""
    name: str
    role: str
    axis: str
    """What x is: tokens or window."""
    config: Config


@dataclass(frozen=True)
class NewRows:
    """What a step has had since the reading before."""

    step: TrackedStep
    rows: Sequence[Row]
    """In the order of x, then time."""
    ended: bool
    """Whether there will be no more."""


def tracked_steps(run: DistillRun) -> list[str]:
    """The steps with metrics that have an x: not preparation, rescoring, exports and reports, and not the
    validity while a stage trains, which is in the trainer's lines."""
    steps = (name for stage in run.spec.stages for name in run.steps_of(stage))
    return [name for name in steps if not name.endswith(f"-{VALIDITY}")]


class MetricsReader:
    """Reads a run's metrics, again and again."""

    def __init__(self, run: DistillRun, bucket: Bucket) -> None:
        self.run, self.bucket = run, bucket
        self._steps: dict[str, TrackedStep] = {}
        self._seen: set[str] = set()
        self._tokens: dict[str, int] = {}
        """Tokens that each stage has trained on."""

    def read(self) -> list[NewRows]:
        """The new rows of each step that has begun, in the order of the run. Raises StorageError, Permanent
        if an object is malformed."""
        names = tracked_steps(self.run)
        # Backwards: when a later stage has lines, those of the stages before are complete.
        lines = {name: self._read_step(name) for name in reversed(names)}
        for stage in self.run.spec.stages:
            known = (int(line["tokens"]) for line in lines[stage.name][0])
            self._tokens[stage.name] = max([self._tokens.get(stage.name, 0), *known])
        return [
            NewRows(self._steps[name], self._rows(name, lines[name][0]), lines[name][1])
            for name in names
            if name in self._steps
        ]

    def finished(self) -> bool:
        """Whether all tracked steps have succeeded."""
        return all(self._ended(name) for name in tracked_steps(self.run))

    def _ended(self, name: str) -> bool:
        progress = read_progress(self.run, self.bucket, name)
        return progress is not None and progress.state == "Succeeded"

    def _read_step(self, name: str) -> tuple[list[Line], bool]:
        """The new lines of a step, and whether they are the last."""
        ended = self._ended(name)  # before the list, so that no line can follow
        folder = paths.metrics(self.run, name, "").removesuffix(".jsonl")
        keys = [found.key for found in self.bucket.list(folder) if found.key.endswith(".jsonl")]
        new = [key for key in keys if key not in self._seen]
        lines: list[Line] = []
        with ThreadPoolExecutor(THREADS) as pool:
            for key, content in zip(
                new, pool.map(lambda key: get_if_there(self.bucket, key), new), strict=True
            ):
                if content is not None:
                    lines += parse_lines(content, self.bucket.url(key))
        self._seen.update(new)
        if new and name not in self._steps:
            self._steps[name] = self._tracked(name, self.bucket.metadata(new[0]))
        return lines, ended

    def _rows(self, name: str, lines: Iterable[Line]) -> list[Row]:
        role, axis, stage = self.run.role(name), self._steps[name].axis, self.run.stage_of(name)
        assert stage is not None, "tracked_steps has steps of stages only"
        stages = [one.name for one in self.run.spec.stages]
        start = sum(self._tokens[before] for before in stages[: stages.index(stage.name)])
        found = []
        for line in lines:
            if axis == "window":
                x = int(line["window"])
            elif role == "train":
                x = start + int(line["tokens"])
            else:
                x = start + self._tokens[stage.name]
            group = "evaluation" if line["event"] == "evaluation" else role
            found.append(row(line, x, group))
        return sorted((one for one in found if one is not None), key=lambda one: (one.x, one.time))

    def _tracked(self, name: str, metadata: Mapping[str, str]) -> TrackedStep:
        """`metadata`: of the step's first object, which says what wrote it."""
        run, stage = self.run, self.run.stage_of(name)
        assert stage is not None, "tracked_steps has steps of stages only"
        role = run.role(name)
        config: dict[str, Scalar] = {
            "run": run.identity,
            "folder": self.bucket.url(run.folder),
            "step": name,
            "role": role,
            "stage": stage.name,
            "kind": stage.kind,
            "config_hash": run.config_hash,
            **{
                f"written_by.{key}": metadata[key]
                for key in ("git-sha", "image", "attempt", "harmony")
                if key in metadata
            },
            **flat(run.config()["spec"], "spec"),
        }
        axis = "window" if role in ("sampler", "teacher") else "tokens"
        return TrackedStep(run.identity, run.folder.rpartition("/")[2], name, role, axis, config)


def flat(value: Any, name: str) -> dict[str, Scalar]:
    """The leaves of a JSON value by their path, as in spec.stages.0.kind; without null and what is empty."""
    if isinstance(value, dict):
        return {key: leaf for part in value for key, leaf in flat(value[part], f"{name}.{part}").items()}
    if isinstance(value, list):
        return {
            key: leaf for at, part in enumerate(value) for key, leaf in flat(part, f"{name}.{at}").items()
        }
    return {name: value} if value is not None else {}
