"""Script of a stand-in, in the run's `dataset.conversation.identity`: settings such as "steps=6 pause=0.2
kill=1:3".

steps   optimizer steps of each stage (parts of preprocessing: as many as workers)
windows windows of an OnPolicy stage's sampler and teacher; default: as many as steps
parts   parts of rescoring; default: as many as pods
beside  step that must have reported progress before anything is scored
pause   seconds of each step or part
every   steps between checkpoints
hurry   attempt from which a single step does all that is left
kill    attempt:step at which the process sends itself SIGKILL; several, separated by commas
fail    attempt:step at which it raises an error; several, separated by commas
refuse  attempt:step at which it raises Permanent
hang    attempt:step at which it does nothing for `hung` seconds, 45 by default; several, separated by commas

Steps count from 0, parts of preprocessing are -1, -2, …, parts of rescoring -101, -102, …, windows sampled
-201, -202, …, windows scored -301, -302, …, an export is -401, init -501, and a
report -601; `vanilla@1:3` applies to step vanilla only.
"""

import os
import signal
import time
from dataclasses import dataclass

from jobs.entrypoint import JobContext
from vpmoe.api import DistillRun
from vpmoe.api.progress import Progress
from vpmoe.failure import Permanent
from vpmoe.storage import paths


@dataclass(frozen=True)
class Script:
    """The settings, for one attempt of one step."""

    step: str
    attempt: int
    settings: dict[str, str]

    @classmethod
    def from_run(cls, run: DistillRun, context: JobContext) -> "Script":
        settings = run.spec.dataset.conversation.identity.split()
        return cls(
            context.step, context.attempt, dict(setting.split("=") for setting in settings if "=" in setting)
        )

    def number(self, name: str, otherwise: float) -> float:
        return float(self.settings.get(name, otherwise))

    @property
    def hurries(self) -> bool:
        return self.attempt >= self.number("hurry", 1000)

    def reach(self, step: int) -> None:
        """Do what the script says for this step of this attempt, then pause."""
        here = {f"{self.attempt}:{step}", f"{self.step}@{self.attempt}:{step}"}
        if here & {*self.settings.get("kill", "").split(",")}:
            os.kill(os.getpid(), signal.SIGKILL)
        if here & {*self.settings.get("fail", "").split(",")}:
            raise RuntimeError(f"stand-in fails at step {step}")
        if here & {*self.settings.get("refuse", "").split(",")}:
            raise Permanent(f"stand-in refuses at step {step}")
        if here & {*self.settings.get("hang", "").split(",")}:
            time.sleep(self.number("hung", 45))
        time.sleep(self.number("pause", 0.1))


def report_progress(run: DistillRun, context: JobContext, progress: Progress) -> None:
    """Publish the progress and write progress.json, as the real jobs do."""
    context.board.progress = progress
    key = paths.progress(run, context.step)
    context.bucket.write_json(key, progress.dump(), context.provenance.metadata())
