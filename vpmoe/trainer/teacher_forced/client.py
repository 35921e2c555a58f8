"""The students' side of the teacher: its width, its output matrix, hidden states that are requested one
microbatch ahead, and how long they had to be waited for."""

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from vpmoe.model import distributed
from vpmoe.model.batch import Batch
from vpmoe.process.environment import teacher_ports
from vpmoe.trainer.context import StageContext
from vpmoe.trainer.teacher_forced.channel import Channel, CheckStop, join, stop_check
from vpmoe.trainer.teacher_forced.protocol import NO_MORE, WIRE, question_of, ranks_of


def connect(context: StageContext, device: torch.device) -> "RemoteTeacher":
    """The teacher of one rank of a stage. Raises Terminated if the process is asked to stop while it
    waits."""
    check_stop = stop_check(context.stopping)
    ports, rank = teacher_ports(), distributed.rank()
    teacher = rank % len(ports)
    ranks = ranks_of(teacher, len(ports), distributed.world_size())
    channel = join(os.environ["MASTER_ADDR"], ports[teacher], rank, ranks, device, check_stop)
    return RemoteTeacher(channel, check_stop)


class WaitMeter:
    """Seconds in which a device has nothing to do because it waits for an answer.

    On a GPU, between two events of its stream: the host waits long before the GPU has done what it was given.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._times: list[tuple[float, float]] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Measures the time that the body takes of the device."""
        if self._device.type == "cuda":
            began, ended = (
                torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                for _ in range(2)
            )
            began.record()
            yield
            ended.record()
            self._events.append((began, ended))
        else:
            start = time.monotonic()
            yield
            self._times.append((start, time.monotonic()))

    def seconds(self) -> float:
        """Seconds since `reset`. Waits until the device has done what it was given before."""
        for _, ended in self._events:
            ended.synchronize()
        milliseconds: float = sum(began.elapsed_time(ended) for began, ended in self._events)
        return milliseconds / 1000 + sum(end - start for start, end in self._times)

    def reset(self) -> None:
        """Begin to count anew."""
        self._times.clear()
        self._events.clear()


class RemoteTeacher:
    """The teacher at the other end of a channel. While one microbatch is trained on, it computes the next."""

    def __init__(self, channel: Channel, check_stop: CheckStop) -> None:
        """Waits until the teacher is on disk and was checked."""
        self._channel = channel
        self._check_stop = check_stop
        self.width = channel.wait_number("width", check_stop)
        """G, of its hidden states."""
        self._announced: deque[Batch] = deque()
        self._requested: deque[int] = deque()
        """Positions of each microbatch whose answer has not been received."""
        self.meter = WaitMeter(channel.device)
        """Time that `hidden_of` has waited for answers."""

    def output(self, vocabulary: int) -> Tensor:
        """Its output matrix [V, G]. Call it once, before the first request. Waits until the teacher is
        loaded."""
        self._channel.wait_number("loaded", self._check_stop)
        return self._channel.receive(
            self._channel.teacher, (vocabulary, self.width), WIRE[self._channel.device.type]
        )

    def announce(self, batches: Sequence[Batch], then: Batch | None = None) -> None:
        """Announce a step's microbatches, in the order in which `hidden_of` will be called; `then` is the
        first of the next step."""
        self._announced.extend(batches[len(self._requested) :])
        if then is not None:
            self._announced.append(then)
        if not self._requested:
            self._request()

    def hidden_of(self, batch: Batch) -> Tensor:
        """The final hidden states [T, G] of the next microbatch that was announced, which must be `batch`."""
        self._request()
        with self.meter.waiting():
            return self._receive()

    def disconnect(self) -> None:
        """Tell the teacher that there are no more requests. Receives unused answers first, so that nothing is
        left on its way."""
        while self._requested:
            self._receive()
        self._channel.send_host(self._channel.teacher, NO_MORE)
        self._channel.flush()

    def _request(self) -> None:
        if self._announced:
            question = question_of(self._announced.popleft())
            self._channel.send_host(self._channel.teacher, question.header)
            self._channel.send_host(self._channel.teacher, question.body)
            self._requested.append(len(question.tokens))

    def _receive(self) -> Tensor:
        positions = self._requested.popleft()
        answered = int(self._channel.receive_host(self._channel.teacher, 1, torch.int64))
        if answered != positions:
            raise RuntimeError(
                f"requested the hidden states of {positions} positions, but the teacher answers with "
                f"{answered}"
            )
        return self._channel.receive(
            self._channel.teacher, (positions, self.width), WIRE[self._channel.device.type]
        )
