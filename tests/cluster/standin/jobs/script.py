"""What a stand-in is to do, from the run itself: `dataset.conversation.identity` holds words such as "steps=6 pause=0.2 kill=1:3".

steps   optimizer steps of the stage (parts of preprocessing: as many as workers)
pause   seconds that each takes
every   steps between checkpoints
hurry   attempt from which on a single step does all that is left
kill    attempt:step at which the process kills itself, as the kernel would; several with commas
fail    attempt:step at which it raises an error that another attempt may mend; several with commas
refuse  attempt:step at which it raises Permanent
"""

import os
import signal
import time
from dataclasses import dataclass

from vpmoe.api import DistillRun
from vpmoe.failure import Permanent


@dataclass(frozen=True)
class Script:
    """One attempt's part of the words."""

    attempt: int
    words: dict[str, str]

    @classmethod
    def of(cls, run: DistillRun, attempt: int) -> "Script":
        words = run.spec.dataset.conversation.identity.split()
        return cls(attempt, dict(word.split("=") for word in words if "=" in word))

    def number(self, name: str, otherwise: float) -> float:
        return float(self.words.get(name, otherwise))

    @property
    def hurries(self) -> bool:
        return self.attempt >= self.number("hurry", 1000)

    def reach(self, step: int) -> None:
        """What happens at this step of this attempt."""
        here = f"{self.attempt}:{step}"
        if here in self.words.get("kill", "").split(","):
            os.kill(os.getpid(), signal.SIGKILL)
        if here in self.words.get("fail", "").split(","):
            raise RuntimeError(f"stand-in fails at step {step}")
        if here in self.words.get("refuse", "").split(","):
            raise Permanent(f"stand-in refuses at step {step}")
        time.sleep(self.number("pause", 0.1))
