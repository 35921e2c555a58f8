"""The student's engines of a job: one process per GPU (engine.py), which load weights, sample and score on
request.

The process that asks imports neither vLLM nor torch. Engines end when it ends, however it ends. An engine's
error is raised here with its own class. Requests are assigned to engines by their index, so the assignment
depends on the list of requests and the number of engines only.
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

from vpmoe.api.termination import TerminationRecord
from vpmoe.data.tokenizer import Ids
from vpmoe.failure import Permanent, Retriable

POLL_SECONDS = 0.2
"""Seconds between two calls of `check_stop` while engines work."""

CheckStop = Callable[[], None]
"""Called while waiting; raises if the process was asked to stop."""


class SamplingRequest(NamedTuple):
    """A completion to sample."""

    ids_P: Ids
    """Token ids of the prompt."""
    seed: int
    max_tokens: int
    """Length limit of the completion, in tokens."""


class Completion(NamedTuple):
    """A sampled completion."""

    ids_C: Ids
    """Token ids. The last is a stop token (vocabulary.STOP_IDS), or the length limit was reached."""
    logp_C: NDArray[np.float32]
    """Log-probability of each token at temperature 1, given all tokens before it."""


class EnginePool:
    """The engines of one process: started by the first `load`, stopped at the end of the `with` block.

    Methods call `check_stop`, which may raise, every POLL_SECONDS while engines work. The first `load` must
    be called from a thread that lives as long as the engines are needed: they end with that thread.
    """

    def __init__(self, gpus: int, shape: str, max_length: int) -> None:
        """One engine for each of `gpus` GPUs; `shape` is a name in vpmoe.model.shapes, `max_length` in
        tokens.

        Raises Permanent if CUDA_VISIBLE_DEVICES names fewer devices.
        """
        self.loaded = False
        """Whether the engines hold weights, so that the next `load` replaces them in place."""
        self._environments = [engine_environment(os.environ, number, gpus) for number in range(gpus)]
        self._arguments = (shape, str(max_length))
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        self._calls = 0
        """Number of calls so far. A reply carries its call's number, so the reply to an abandoned call is
        ignored."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        for connection in self._connections:
            connection.close()

    def load(self, folder: Path, check_stop: CheckStop = lambda: None) -> None:
        """Make all engines use the weights in `folder`."""
        if not self._processes:
            for changes in self._environments:
                self._start(changes)
        self._call("load", [(folder,)] * len(self._processes), check_stop)
        self.loaded = True

    def sample(
        self, requests: Sequence[SamplingRequest], check_stop: CheckStop = lambda: None
    ) -> list[Completion]:
        """The completion of each request; engine i mod the number of engines samples request i."""
        engines = len(self._processes)
        completions: list[Any] = [None] * len(requests)
        replies = self._call(
            "sample", [(requests[number::engines],) for number in range(engines)], check_stop
        )
        for number, reply in enumerate(replies):
            completions[number::engines] = reply
        return completions

    def score(
        self, sequences: Sequence[Ids], check_stop: CheckStop = lambda: None
    ) -> list[list[NDArray[np.float32]]]:
        """By engine, for each sequence: [T − 1] log-probabilities of all ids but the first.

        Every engine scores all.
        """
        return self._call("score", [(sequences,)] * len(self._processes), check_stop)

    def _start(self, changes: Mapping[str, str]) -> None:
        """Start an engine process with `changes` to the environment."""
        ours, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-m", "vpmoe.inference.engine", str(theirs.fileno()), *self._arguments]
            self._processes.append(
                subprocess.Popen(command, env={**os.environ, **changes}, pass_fds=[theirs.fileno()])
            )
        self._connections.append(ours)

    def _call(self, method: str, arguments: Sequence[tuple[Any, ...]], check_stop: CheckStop) -> list[Any]:
        """Call a method of every engine, each with its own arguments; returns the results.

        Raises the error of the first engine that fails, and Retriable if an engine process ends without a
        reply.
        """
        replies: dict[int, Any] = {}
        self._calls += 1
        number = 0
        try:
            for number, connection in enumerate(self._connections):
                connection.send((self._calls, method, arguments[number]))
            while len(replies) < len(self._connections):
                ready = wait(
                    [each for number, each in enumerate(self._connections) if number not in replies],
                    POLL_SECONDS,
                )
                for number in [number for number, each in enumerate(self._connections) if each in ready]:
                    call, reply = self._connections[number].recv()
                    if call == self._calls:
                        replies[number] = reply
                check_stop()
        except (EOFError, ConnectionError):
            check_stop()  # the pod's termination may have reached the engines first
            raise _engine_exited(number, self._processes[number].wait()) from None
        for number in sorted(replies):
            if isinstance(replies[number], TerminationRecord):
                raise engine_error(number, replies[number])
        return [replies[number] for number in sorted(replies)]


def _engine_exited(number: int, code: int) -> Retriable:
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return Retriable(
        f"engine {number} {how}. The most frequent cause is that the container ran out of memory: raise the "
        "limit in runtime.resources.sampler."
    )


def engine_error(number: int, failure: TerminationRecord) -> Exception:
    """An engine's failure as an exception of the same class; RuntimeError if the class is none of
    vpmoe.failure."""
    kinds: dict[str, type[Exception]] = {"Permanent": Permanent, "Retriable": Retriable}
    return kinds.get(failure.kind, RuntimeError)(f"engine {number}: {failure.message}")


def engine_environment(environment: Mapping[str, str], number: int, gpus: int) -> dict[str, str]:
    """The variables that engine `number` of `gpus` has in addition to `environment`, or with other values.

    Raises Permanent if CUDA_VISIBLE_DEVICES is set to fewer than `gpus` devices. Set and empty, it means the
    CPU.
    """
    # One thread unless the environment asks for more: the order of a sum, and so its bits, depends on the
    # number of threads, which must not depend on the machine.
    changes = {"OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", "1"), "VPMOE_LAUNCHER": str(os.getpid())}
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible == "":
        return changes
    devices = [str(device) for device in range(gpus)] if visible is None else visible.split(",")
    if len(devices) < gpus:
        raise Permanent(
            f"CUDA_VISIBLE_DEVICES is {visible}: {len(devices)} devices for {gpus} engines. Name as many as "
            "stages[].sampler.gpus, or unset it (in a pod: runtime.env)."
        )
    return changes | {"CUDA_VISIBLE_DEVICES": devices[number]}
