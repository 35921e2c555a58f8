"""The way between the students of a stage and its teacher: a group with a store of its own, and nothing but messages from one to one.

It is apart from the students' process group, whose collectives (optimizer, checkpoints) know nothing of the teacher. Words and token ids
lie on the host and go by gloo, which notices at once when the other end dies; tensors go by NCCL between GPUs, by gloo between CPUs. The
teacher announces a tensor in a word before it sends it, so no GPU waits in a kernel for one that is not there yet.

The store stands in the teacher's process. Students have the ranks that they have among themselves, the teacher the one after theirs.
Whatever takes minutes is waited for at the store, where a process that should stop can look up.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from vpmoe.failure import Retriable, Terminated

PATIENCE = timedelta(hours=1)
"""How long one end may keep the other waiting: for the teacher to be fetched and loaded, for students that evaluate and save."""
POLL = 0.2
"""Seconds between looks at the store."""
IN_FLIGHT = 4
"""Messages of a kind that may be under way to one peer."""

CheckStop = Callable[[], None]
"""Called while waiting; raises where the process should stop."""


class Channel:
    """One end of the way. Make it with `host` in the teacher's process and with `join` in a student's."""

    def __init__(self, store: Store, rank: int, students: int, device: torch.device) -> None:
        self.students = students
        self.teacher = students
        """The teacher's rank."""
        self.device = device
        self._store = store
        size = students + 1
        self._words: Any = dist.ProcessGroupGloo(PrefixStore("words", store), rank, size, PATIENCE)
        self._tensors: Any = self._words
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = PATIENCE
            self._tensors = dist.ProcessGroupNCCL(PrefixStore("tensors", store), rank, size, options)
        self._going: dict[tuple[str, int], deque[tuple[dist.Work, Tensor]]] = {}

    def note(self, name: str, number: int) -> None:
        """Leave a number at the store, for everybody."""
        self._store.set(name, str(number))

    def noted(self, name: str, check_stop: CheckStop) -> int:
        """A number that the teacher leaves at the store; waits for it."""
        _await(self._store, [name], check_stop)
        return int(self._store.get(name))

    def tell(self, peer: int, word: Tensor) -> None:
        """Begin to send a tensor of the host; returns before it has arrived."""
        self._keep("word", peer, word, lambda: self._words.send([word], peer, 0))

    def hear(self, peer: int, size: int, dtype: torch.dtype) -> Tensor:
        """What the peer told, of that many numbers. Raises Retriable where the peer is gone."""
        word = torch.empty(size, dtype=dtype)
        _attempt(self._name(peer), lambda: self._words.recv([word], peer, 0).wait())
        return word

    def send(self, peer: int, tensor: Tensor) -> None:
        """Begin to send a tensor of the channel's device; returns before it has arrived. It must not change from here on."""
        self._keep("tensor", peer, tensor, lambda: self._tensors.send([tensor], peer, 1))

    def receive(self, peer: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The tensor that the peer sent, on the channel's device."""
        tensor = torch.empty(*shape, dtype=dtype, device=self.device)
        _attempt(self._name(peer), lambda: self._tensors.recv([tensor], peer, 1).wait())
        return tensor

    def flush(self) -> None:
        """Wait until all that was sent has arrived."""
        for (_, peer), going in self._going.items():
            while going:
                _attempt(self._name(peer), going.popleft()[0].wait)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _keep(self, kind: str, peer: int, tensor: Tensor, send: Callable[[], dist.Work]) -> None:
        """Hold what is under way until it has arrived; the oldest of IN_FLIGHT messages is waited for."""
        going = self._going.setdefault((kind, peer), deque())
        while len(going) >= IN_FLIGHT:
            _attempt(self._name(peer), going.popleft()[0].wait)
        going.append((_attempt(self._name(peer), send), tensor))

    def _name(self, peer: int) -> str:
        return "the teacher" if peer == self.teacher else f"rank {peer}"


def host(address: str, port: int, students: int, device: torch.device, check_stop: CheckStop) -> Channel:
    """The teacher's end; returns when all students have come. Raises Retriable where the port is taken or a student does not come."""
    store = _attempt(
        "a student", lambda: TCPStore(address, port, is_master=True, timeout=PATIENCE, wait_for_workers=False)
    )
    _await(store, [f"student {rank}" for rank in range(students)], check_stop)
    store.set("all are here", "")
    return Channel(store, students, students, device)


def join(
    address: str, port: int, rank: int, students: int, device: torch.device, check_stop: CheckStop
) -> Channel:
    """A student's end; returns when the teacher and all students have come. Raises Retriable where the teacher does not answer."""
    deadline = time.monotonic() + PATIENCE.total_seconds()
    while True:
        check_stop()
        try:
            store = TCPStore(address, port, timeout=timedelta(seconds=5), wait_for_workers=False)
            break
        except RuntimeError as error:
            if time.monotonic() > deadline:
                raise Retriable(
                    f"the teacher does not answer at {address}:{port} ({_line(error)})."
                ) from error
    store.set_timeout(PATIENCE)
    store.set(f"student {rank}", "")
    _await(store, ["all are here"], check_stop)
    return Channel(store, rank, students, device)


def stop_check(stopping: threading.Event) -> CheckStop:
    """What ends a wait when the process should stop."""

    def check_stop() -> None:
        if stopping.is_set():
            raise Terminated("asked to stop before training began; nothing was lost")

    return check_stop


def _await(store: Store, names: list[str], check_stop: CheckStop) -> None:
    """Return when all of the names stand at the store."""
    deadline = time.monotonic() + PATIENCE.total_seconds()
    while not _attempt("the teacher", lambda: store.check(names)):
        check_stop()
        if time.monotonic() > deadline:
            raise Retriable(
                f"waited {PATIENCE} for {', '.join(names)} between teacher and students, in vain."
            )
        time.sleep(POLL)


def _attempt[T](peer: str, action: Callable[[], T]) -> T:
    try:
        return action()
    except RuntimeError as error:
        raise Retriable(f"{peer} is gone, or does not answer: {_line(error)}.") from error


def _line(error: RuntimeError) -> str:
    return str(error).partition("\n")[0].rstrip(".")
