"""The sampler's engines: a process for each of its GPUs (engine.py), which load, sample and score when they are told.

Nothing of vLLM or torch is in the process that asks. An engine ends with it, whatever ends it; the error of one is the asker's, of the same
class. What is asked is dealt to the engines by its place in the list, so it is a function of the list and their number.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from vpmoe.data.tokenizer import Ids
from vpmoe.failure import Failure, Permanent, Retriable

POLL = 0.2
"""Seconds between looks at whether the process should stop, while engines work."""

CheckStop = Callable[[], None]
"""Called while waiting; raises where the process should stop."""


class Request(NamedTuple):
    """One completion to sample."""

    ids_P: Ids
    """The prompt."""
    seed: int
    longest: int
    """Tokens of the completion, at most."""


class Completion(NamedTuple):
    """What was sampled."""

    ids_C: Ids
    """Ends with a token of vocabulary.STOP_IDS, or at the request's bound."""
    logp_C: NDArray[np.float32]
    """Log-probability of each token at temperature 1, given all before it."""


class Engines:
    """The engines of one process. They are started by the first `load` and end with the `with` block, or with this process.

    `check_stop`, which may raise, is called again and again while they work. Whoever calls `load` first lives as long as they are to: they
    end with that thread.
    """

    def __init__(self, gpus: int, shape: str, longest: int) -> None:
        """One engine for each of so many GPUs; `shape` of vpmoe.model.shapes, `longest` tokens a sequence at most.

        Raises Permanent where CUDA_VISIBLE_DEVICES names fewer.
        """
        self.loaded = False
        """Whether they hold weights already, so that others are to be taken into what runs."""
        self._settings = [settings(os.environ, number, gpus) for number in range(gpus)]
        self._arguments = (shape, str(longest))
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        self._asked = 0
        """Times that they were asked anything: the answer to what was given up is not taken for another's."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        for connection in self._connections:
            connection.close()

    def load(self, folder: Path, check_stop: CheckStop = lambda: None) -> None:
        """Have all of them compute with the weights in `folder` from now on."""
        if not self._processes:
            for changes in self._settings:
                self._begin(changes)
        self._ask("load", [(folder,)] * len(self._processes), check_stop)
        self.loaded = True

    def sample(self, requests: Sequence[Request], check_stop: CheckStop = lambda: None) -> list[Completion]:
        """The completion of each; request i by engine i mod their number."""
        each = len(self._processes)
        found: list[Any] = [None] * len(requests)
        answers = self._ask("sample", [(requests[number::each],) for number in range(each)], check_stop)
        for number, completions in enumerate(answers):
            found[number::each] = completions
        return found

    def score(
        self, sequences: Sequence[Ids], check_stop: CheckStop = lambda: None
    ) -> list[list[NDArray[np.float32]]]:
        """By engine what it finds of each sequence: [T − 1] log-probabilities of all ids but the first."""
        return self._ask("score", [(sequences,)] * len(self._processes), check_stop)

    def _begin(self, changes: Mapping[str, str]) -> None:
        ours, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-m", "vpmoe.inference.engine", str(theirs.fileno()), *self._arguments]
            self._processes.append(
                subprocess.Popen(command, env={**os.environ, **changes}, pass_fds=[theirs.fileno()])
            )
        self._connections.append(ours)

    def _ask(self, name: str, arguments: Sequence[tuple[Any, ...]], check_stop: CheckStop) -> list[Any]:
        """Each engine's answer to its own arguments. Raises what the first that fails says, Retriable where it ends without a word."""
        answers: dict[int, Any] = {}
        self._asked += 1
        number = 0
        try:
            for number, connection in enumerate(self._connections):
                connection.send((self._asked, name, arguments[number]))
            while len(answers) < len(self._connections):
                ready = wait(
                    [each for number, each in enumerate(self._connections) if number not in answers], POLL
                )
                for number in [number for number, each in enumerate(self._connections) if each in ready]:
                    asked, answer = self._connections[number].recv()
                    if asked == self._asked:
                        answers[number] = answer
                check_stop()
        except (EOFError, ConnectionError):
            check_stop()  # who asks this process to stop may have asked its engines too
            raise _gone(number, self._processes[number].wait()) from None
        for number in sorted(answers):
            if isinstance(answers[number], Failure):
                raise error_of(number, answers[number])
        return [answers[number] for number in sorted(answers)]


def _gone(number: int, code: int) -> Retriable:
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return Retriable(
        f"engine {number} {how}. Most often the container ran out of memory: raise the limit in runtime.resources.sampler."
    )


def error_of(number: int, found: Failure) -> Exception:
    """What an engine's failure is here: of its own class, and a bug where it is of none that is known."""
    kinds: dict[str, type[Exception]] = {"Permanent": Permanent, "Retriable": Retriable}
    return kinds.get(found.kind, RuntimeError)(f"engine {number}: {found.message}")


def settings(environment: Mapping[str, str], number: int, gpus: int) -> dict[str, str]:
    """What the environment of engine `number` says beside what this one's says.

    Raises Permanent where CUDA_VISIBLE_DEVICES names fewer than `gpus` devices, and is not empty, which means the CPU.
    """
    # One thread wherever nothing else is asked for: sums depend on how many share them, and bits must not depend on the machine.
    found = {"OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", "1"), "VPMOE_LAUNCHER": str(os.getpid())}
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible == "":
        # Keep memory that is freed: logits are large, and to have them zeroed by the kernel anew takes longer than to compute them.
        return found | {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    devices = [str(device) for device in range(gpus)] if visible is None else visible.split(",")
    if len(devices) < gpus:
        raise Permanent(
            f"CUDA_VISIBLE_DEVICES is {visible}: {len(devices)} devices for {gpus} engines. Name as many as stages[].sampler.gpus, or "
            "unset it."
        )
    return found | {"CUDA_VISIBLE_DEVICES": devices[number]}
