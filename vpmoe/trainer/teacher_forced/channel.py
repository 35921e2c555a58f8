"""The connection between a teacher and its students: a process group with a store of its own, for
point-to-point messages only.

It is separate from the students' process group, whose collectives (optimizer, checkpoints) do not include the
teacher. Headers and token ids are host tensors and travel by gloo, which notices at once when the other end
dies. Hidden states and matrices travel by NCCL between GPUs, by gloo between CPUs. The teacher sends a header
before each of them, so no GPU waits in a kernel for a tensor that is not there.

The store is in the teacher's process. In the group students are numbered in the order of their ranks; the
teacher has the next number. Whatever can take minutes is waited for at the store, where a waiting process can
still be stopped.
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
from vpmoe.model import distributed

PATIENCE = timedelta(hours=1)
"""How long one end may keep the other waiting: while the teacher is fetched and loaded, while students
evaluate and save."""
POLL = 0.2
"""Seconds between looks at the store."""
IN_FLIGHT = 4
"""Messages of a kind that may be on their way to one peer."""

CheckStop = Callable[[], None]
"""Called while waiting; raises if the process should stop."""


class Channel:
    """One end of the connection. `host` makes the teacher's, `join` a student's."""

    def __init__(self, store: Store, number: int, ranks: Sequence[int], device: torch.device) -> None:
        """`number`: of this end in the group. `ranks`: of the students in the stage."""
        self.ranks = ranks
        self.teacher = len(ranks)
        """The teacher's number."""
        self.device = device
        self._store = store
        size = len(ranks) + 1
        self._host_group: Any = dist.ProcessGroupGloo(PrefixStore("host", store), number, size, PATIENCE)
        self._device_group: Any = self._host_group
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = PATIENCE
            self._device_group = dist.ProcessGroupNCCL(PrefixStore("device", store), number, size, options)
        self._sending: dict[tuple[str, int], deque[tuple[dist.Work, Tensor]]] = {}

    def set_number(self, name: str, number: int) -> None:
        """Store a number for all students."""
        self._store.set(name, str(number))

    def wait_number(self, name: str, check_stop: CheckStop) -> int:
        """A number that the teacher stores; waits for it."""
        _wait_keys(self._store, [name], check_stop)
        return int(self._store.get(name))

    def send_host(self, peer: int, tensor: Tensor) -> None:
        """Begin to send a tensor of the host; returns before it has arrived."""
        self._send("host", peer, tensor, lambda: self._host_group.send([tensor], peer, 0))

    def receive_host(self, peer: int, size: int, dtype: torch.dtype) -> Tensor:
        """The host tensor [size] that the peer sent. Raises Retriable if the peer is gone."""
        tensor = torch.empty(size, dtype=dtype)
        _attempt(self._name(peer), lambda: self._host_group.recv([tensor], peer, 0).wait())
        return tensor

    def send(self, peer: int, tensor: Tensor) -> None:
        """Begin to send a tensor of the channel's device; returns before it has arrived. It must not change
        afterwards."""
        self._send("device", peer, tensor, lambda: self._device_group.send([tensor], peer, 1))

    def receive(self, peer: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The tensor that the peer sent, on the channel's device. Raises Retriable if the peer is gone."""
        tensor = torch.empty(*shape, dtype=dtype, device=self.device)
        _attempt(self._name(peer), lambda: self._device_group.recv([tensor], peer, 1).wait())
        return tensor

    def flush(self) -> None:
        """Wait until everything that was sent has arrived."""
        for (_, peer), sending in self._sending.items():
            while sending:
                _attempt(self._name(peer), sending.popleft()[0].wait)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _send(self, kind: str, peer: int, tensor: Tensor, send: Callable[[], dist.Work]) -> None:
        """Send, and keep the tensor until it has arrived. Waits for the oldest message if IN_FLIGHT are on
        their way."""
        sending = self._sending.setdefault((kind, peer), deque())
        while len(sending) >= IN_FLIGHT:
            _attempt(self._name(peer), sending.popleft()[0].wait)
        sending.append((_attempt(self._name(peer), send), tensor))

    def _name(self, peer: int) -> str:
        return "the teacher" if peer == self.teacher else f"rank {self.ranks[peer]}"


def host(
    address: str, port: int, ranks: Sequence[int], device: torch.device, check_stop: CheckStop
) -> Channel:
    """The end of a teacher of these ranks; returns when all of them have joined. Raises Retriable if the port
    is taken or a student does not join."""
    store = _attempt(
        "a student", lambda: TCPStore(address, port, is_master=True, timeout=PATIENCE, wait_for_workers=False)
    )
    distributed.agree_to_start(store, _members(ranks), check_stop, PATIENCE)
    return Channel(store, len(ranks), ranks, device)


def join(
    address: str, port: int, rank: int, ranks: Sequence[int], device: torch.device, check_stop: CheckStop
) -> Channel:
    """The end of a student, `rank` among the teacher's `ranks`; returns when the teacher and all its students
    have joined. Raises Retriable if the teacher does not answer."""
    store = distributed.connect(address, port, "the teacher", check_stop, PATIENCE)
    store.set(f"student {rank}", "")
    distributed.agree_to_start(store, _members(ranks), check_stop, PATIENCE)
    return Channel(store, ranks.index(rank), ranks, device)


def _members(ranks: Sequence[int]) -> list[str]:
    return [f"student {rank}" for rank in ranks]


def stop_check(stopping: threading.Event) -> CheckStop:
    """A function that raises Terminated once the process should stop."""

    def check_stop() -> None:
        if stopping.is_set():
            raise Terminated("asked to stop before training began; nothing was lost")

    return check_stop


def _wait_keys(store: Store, names: list[str], check_stop: CheckStop) -> None:
    """Return when the store has all of these keys."""
    deadline = time.monotonic() + PATIENCE.total_seconds()
    while not _attempt("the teacher", lambda: store.check(names)):
        check_stop()
        if time.monotonic() > deadline:
            raise Retriable(f"teacher and students waited {PATIENCE} for {', '.join(names)}, in vain.")
        time.sleep(POLL)


def _attempt[T](peer: str, action: Callable[[], T]) -> T:
    try:
        return action()
    except RuntimeError as error:
        raise Retriable(f"{peer} is gone, or does not answer: {_first_line(error)}.") from error


def _first_line(error: RuntimeError) -> str:
    return str(error).partition("\n")[0].rstrip(".")
