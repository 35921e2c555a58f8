"""Weights & Biases: a run <uid8>-<step> for each step, grouped by the run of vpMoE.

A row has x as W&B's step. W&B takes rows in the order of their steps and never one before its last, so the
run's last step is the position: rows before it are left out. Rows of the same x are one row, and the latest
rows of a step that has not ended wait, because more may come with their x, such as an evaluation after an
optimizer step. They wait for an hour at most: a step that has failed does not end.

Offline there is no service that knows the last step. Then all is written again, into a new folder, and the
folders with the same run of earlier times are removed.
"""

import shutil
from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import groupby
from pathlib import Path

import wandb
from wandb.errors import Error

from vpmoe.clock import now
from vpmoe.failure import Permanent
from vpmoe.trackers.reader import TrackedStep
from vpmoe.trackers.rows import Row

WAITING = 4
"""Latest values of x that wait while a step runs: two teachers do not finish windows in order."""
LONGEST = timedelta(hours=1)
"""How old a row is that waits no longer."""


class WandB:
    """A project of W&B. Host, key, entity and mode come from W&B's own variables and files."""

    def __init__(self, folder: Path, project: str) -> None:
        """`folder`: where W&B keeps its files."""
        self.folder, self.project = folder, project

    def open(self, step: TrackedStep) -> "StepRun":
        """The step's run."""
        identity = f"{step.run_name.rpartition('-')[2]}-{step.name}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            before = set((self.folder / "wandb").glob(f"offline-run-*-{identity}"))
            run = wandb.init(
                project=self.project,
                id=identity,
                name=f"{step.run_name}/{step.name}",
                group=step.run_name,
                job_type=step.role,
                config=dict(step.config),
                dir=self.folder,
                resume="allow",
                reinit="create_new",
                # Nothing about this machine: it is not the one that trains.
                settings=wandb.Settings(
                    x_disable_stats=True,
                    x_disable_meta=True,
                    x_save_requirements=False,
                    disable_git=True,
                    disable_code=True,
                    console="off",
                    silent=True,
                ),
            )
        except OSError as error:
            raise Permanent(
                f"--dir {self.folder}: {error.strerror}. Name a folder that can be written."
            ) from None
        except Error as error:
            raise Permanent(f"W&B: {error}. Log in with `wandb login`, or set WANDB_MODE=offline.") from error
        return StepRun(run, before if run.offline else set())


class StepRun:
    """One step's run."""

    def __init__(self, run: wandb.Run, replaced: set[Path]) -> None:
        self._run, self._replaced = run, replaced
        self._next = run.step
        """The lowest x that W&B does not have."""
        self._waiting: list[Row] = []

    def write(self, rows: Sequence[Row], ended: bool) -> int:
        """As TrackerRun.write; counts rows when they are sent."""
        known = sorted([*self._waiting, *rows], key=lambda row: (row.x, row.time))
        merged = [(x, list(some)) for x, some in groupby(known, lambda row: row.x) if x >= self._next]
        recent = now() - LONGEST
        young = (at for at, (_, some) in enumerate(merged) if some[-1].time > recent)
        first = len(merged) if ended else max(len(merged) - WAITING, next(young, len(merged)))
        self._waiting = [row for _, some in merged[first:] for row in some]
        for x, some in merged[:first]:
            self._run.log(_joined(some), step=x)
            self._next = x + 1
        return sum(len(some) for _, some in merged[:first])

    def close(self) -> None:
        """As TrackerRun.close. Offline nothing has to wait, because the next time all is written again."""
        if self._run.offline:
            self.write([], ended=True)
        self._run.finish()
        for folder in self._replaced:
            shutil.rmtree(folder)


def _joined(rows: Sequence[Row]) -> Mapping[str, float]:
    """The values of rows with the same x."""
    return {name: value for row in rows for name, value in row.values.items()}
