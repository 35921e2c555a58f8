"""What a stand-in is to do, from the run itself: `dataset.conversation.identity` holds words such as "steps=6 pause=0.2 kill=1:3".

steps   optimizer steps of each stage (parts of preprocessing: as many as workers)
windows windows that an OnPolicy stage's sampler and teacher work at; as many as steps where it does not say
parts   parts of rescoring; as many as pods where it does not say
beside  the step that must have reported before anything is scored
pause   seconds that each step or part takes
every   steps between checkpoints
hurry   attempt from which on a single step does all that is left
kill    attempt:step at which the process kills itself, as the kernel would; several with commas
fail    attempt:step at which it raises an error that another attempt may mend; several with commas
refuse  attempt:step at which it raises Permanent

Steps count from 0, parts of preprocessing are -1, -2, …, parts of rescoring -101, -102, …, windows sampled
-201, -202, …, and windows scored -301, -302, …; `vanilla@1:3` is about step vanilla alone.
"""

import os
import signal
import time
from dataclasses import dataclass

from jobs.entrypoint import JobContext
from vpmoe.api import DistillRun
from vpmoe.failure import Permanent


@dataclass(frozen=True)
class Script:
    """One attempt's part of the words."""

    step: str
    attempt: int
    words: dict[str, str]

    @classmethod
    def of(cls, run: DistillRun, context: JobContext) -> "Script":
        words = run.spec.dataset.conversation.identity.split()
        return cls(context.step, context.attempt, dict(word.split("=") for word in words if "=" in word))

    def number(self, name: str, otherwise: float) -> float:
        return float(self.words.get(name, otherwise))

    @property
    def hurries(self) -> bool:
        return self.attempt >= self.number("hurry", 1000)

    def reach(self, step: int) -> None:
        """What happens at this step of this attempt."""
        here = {f"{self.attempt}:{step}", f"{self.step}@{self.attempt}:{step}"}
        if here & {*self.words.get("kill", "").split(",")}:
            os.kill(os.getpid(), signal.SIGKILL)
        if here & {*self.words.get("fail", "").split(",")}:
            raise RuntimeError(f"stand-in fails at step {step}")
        if here & {*self.words.get("refuse", "").split(",")}:
            raise Permanent(f"stand-in refuses at step {step}")
        time.sleep(self.number("pause", 0.1))
