"""The student's engines of a job: processes (engine.py), one or several on a GPU, which load weights, sample
and score on request.

The process that asks imports neither vLLM nor torch. Engines end when it ends, however it ends. An engine's
error is raised here with its own class. `sample` assigns requests to engines by their index, so the
assignment depends on the list of requests and the number of engines only; `sample_queue` gives the next
request to whichever engine has room (request_queue.py).
"""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from vpmoe.api.card import GIB
from vpmoe.api.termination import TerminationRecord
from vpmoe.data.tokenizer import Ids
from vpmoe.failure import Permanent, Retriable
from vpmoe.inference.request_queue import RequestSize, longest_first, next_engines
from vpmoe.plan.sampling import EngineMemory

log = logging.getLogger(__name__)

ENGINE = "vpmoe.inference.engine"
"""The module that an engine's process runs."""
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

    def __init__(
        self,
        gpus: int,
        shape: str,
        max_length: int,
        depth: int | None = None,
        per_gpu: int = 1,
        module: str = ENGINE,
    ) -> None:
        """`shape` is a name in vpmoe.model.shapes, `max_length` in tokens. `depth`:
        request_queue.queue_depth. `per_gpu`: engines on each of `gpus` GPUs, fewer if its memory holds no
        more (vpmoe.plan.sampling). `module`: what an engine's process runs; it calls engine.serve.

        Raises Permanent if CUDA_VISIBLE_DEVICES names fewer devices.
        """
        self.depth = depth
        """Requests that an engine holds at the same time in `sample_queue`; None: the engines share no
        queue."""
        self.loaded = False
        """Whether the engines hold weights, so that the next `load` replaces them in place."""
        self.gpu_of: list[int] = []
        """By engine, the number of its GPU: first one engine of each GPU, then the second ones, and so on."""
        self._environments = [engine_environment(os.environ, number, gpus) for number in range(gpus)]
        self._per_gpu = per_gpu
        self._command = [sys.executable, "-m", module]
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
            self._start_engines(check_stop)
        engines = [(folder, self.gpu_of.count(gpu)) for gpu in self.gpu_of]
        self._call("load", engines, check_stop)
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

    def sample_queue(
        self, requests: Sequence[SamplingRequest], check_stop: CheckStop = lambda: None
    ) -> Iterator[tuple[int, Completion]]:
        """Sample all requests from one queue, long completions first; yields the index of a request and its
        completion as soon as an engine has finished it.

        If the caller stops before the end, the engines drop what is left at the next call.
        """
        order = longest_first([RequestSize(one.max_tokens, len(one.ids_P)) for one in requests])
        return self.sample_in_order(((index, requests[index]) for index in order), check_stop)

    def sample_in_order(
        self, numbered: Iterable[tuple[int, SamplingRequest]], check_stop: CheckStop = lambda: None
    ) -> Iterator[tuple[int, Completion]]:
        """As `sample_queue`, of requests with numbers, which are taken in their order and as late as
        possible; yields numbers.

        An engine gets further requests while others of its still grow, so it computes full batches until the
        queue is empty. It goes on while the caller handles a completion.
        """
        assert self.depth, "this pool was started without a queue"
        queue = iter(numbered)
        held = [0] * len(self._processes)
        self._calls += 1
        while True:
            room = sum(self.depth - count for count in held)
            taken = list(islice(queue, room))
            if not taken and not any(held):
                return
            given: list[list[tuple[int, SamplingRequest]]] = [[] for _ in held]
            for one, engine in zip(taken, next_engines(len(taken), held, self.depth), strict=True):
                given[engine].append(one)
                held[engine] += 1
            for engine, numbered in enumerate(given):
                if numbered:
                    self._send(engine, "add", (numbered,), check_stop)
            finished = self._receive([engine for engine, count in enumerate(held) if count], check_stop)
            for engine, reply in finished.items():
                if isinstance(reply, TerminationRecord):
                    raise engine_error(engine, reply)
                held[engine] -= len(reply)
            for reply in finished.values():
                yield from reply
            check_stop()

    def score(
        self, sequences: Sequence[Ids], check_stop: CheckStop = lambda: None
    ) -> list[list[NDArray[np.float32]]]:
        """By engine, for each sequence: [T − 1] log-probabilities of all ids but the first.

        Every engine scores all.
        """
        return self._call("score", [(sequences,)] * len(self._processes), check_stop)

    def check_engines(self, check_stop: CheckStop) -> None:
        """Raise Retriable if an engine's process has ended, which otherwise the next call finds."""
        for engine, process in enumerate(self._processes):
            if process.poll() is not None:
                check_stop()  # the pod's termination may have reached the engines first
                raise _engine_exited(engine, process.wait())

    def _start_engines(self, check_stop: CheckStop) -> None:
        """Start one engine on each GPU, then those that its memory has room for beside it."""
        gpus = range(len(self._environments))
        for gpu in gpus:
            self._start(gpu)
        if self._per_gpu > 1:
            shared: list[EngineMemory] = self._call("divide", [(self._per_gpu,)] * len(gpus), check_stop)
            for engine in range(1, self._per_gpu):
                for gpu in gpus:
                    if engine < shared[gpu].engines:
                        self._start(gpu)
            for gpu in gpus:
                log.info("%s", describe_gpu(gpu, self.gpu_of, shared[gpu]))

    def _start(self, gpu: int) -> None:
        """Start an engine process on a GPU."""
        ours, theirs = Pipe()
        with theirs:
            self._processes.append(
                subprocess.Popen(
                    [*self._command, str(theirs.fileno()), *self._arguments],
                    env={**os.environ, **self._environments[gpu]},
                    pass_fds=[theirs.fileno()],
                )
            )
        self._connections.append(ours)
        self.gpu_of.append(gpu)

    def _call(self, method: str, arguments: Sequence[tuple[Any, ...]], check_stop: CheckStop) -> list[Any]:
        """Call a method of every engine, each with its own arguments; returns the results.

        Raises the error of the first engine that fails, and Retriable if an engine process ends without a
        reply.
        """
        replies: dict[int, Any] = {}
        self._calls += 1
        for engine in range(len(self._processes)):
            self._send(engine, method, arguments[engine], check_stop)
        while missing := [engine for engine in range(len(self._processes)) if engine not in replies]:
            replies |= self._receive(missing, check_stop)
            check_stop()
        for engine in sorted(replies):
            if isinstance(replies[engine], TerminationRecord):
                raise engine_error(engine, replies[engine])
        return [replies[engine] for engine in sorted(replies)]

    def _send(self, engine: int, method: str, arguments: tuple[Any, ...], check_stop: CheckStop) -> None:
        with self._alive(engine, check_stop):
            self._connections[engine].send((self._calls, method, arguments))

    def _receive(self, engines: Sequence[int], check_stop: CheckStop) -> dict[int, Any]:
        """By engine, a reply to the current call that arrives within POLL_SECONDS; at most one of each."""
        ready = wait([self._connections[engine] for engine in engines], POLL_SECONDS)
        replies = {}
        for engine in engines:
            if self._connections[engine] in ready:
                with self._alive(engine, check_stop):
                    call, reply = self._connections[engine].recv()
                if call == self._calls:
                    replies[engine] = reply
        return replies

    @contextmanager
    def _alive(self, engine: int, check_stop: CheckStop) -> Iterator[None]:
        """Raise Retriable if the engine's process has ended."""
        try:
            yield
        except (EOFError, ConnectionError):
            check_stop()  # the pod's termination may have reached the engines first
            raise _engine_exited(engine, self._processes[engine].wait()) from None


def describe_gpu(gpu: int, gpu_of: Sequence[int], memory: EngineMemory) -> str:
    """How engines share a GPU, for the log. `gpu_of`: by engine, the number of its GPU."""
    names = [str(engine) for engine, its in enumerate(gpu_of) if its == gpu]
    listed = f"engines {', '.join(names[:-1])} and {names[-1]}" if names[1:] else f"engine {names[0]}"
    each = "each " if names[1:] else ""
    return (
        f"GPU {gpu}, {memory.card / GIB:.1f} GiB: {listed}, {each}with {memory.weights / GIB:.1f} GiB of "
        f"weights and {memory.cache / GIB:.1f} GiB of keys and values, {memory.sequences} of the longest "
        "sequences"
    )


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


def engine_environment(environment: Mapping[str, str], gpu: int, gpus: int) -> dict[str, str]:
    """The variables that engines on GPU number `gpu` of `gpus` have in addition to `environment`, or with
    other values.

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
            f"CUDA_VISIBLE_DEVICES is {visible}: {len(devices)} devices, and {gpus} are used. Name as many "
            "as stages[].sampler.gpus, or unset it (in a pod: runtime.env)."
        )
    return changes | {"CUDA_VISIBLE_DEVICES": devices[gpu]}
