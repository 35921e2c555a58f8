"""The students' side of the teacher: its width, its output matrix, and hidden states that are requested one
microbatch ahead."""

import os
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from vpmoe.model import distributed
from vpmoe.model.batch import Batch
from vpmoe.trainer.context import StageContext
from vpmoe.trainer.teacher_forced.channel import Channel, CheckStop, join, stop_check
from vpmoe.trainer.teacher_forced.protocol import NO_MORE, WIRE, question_of


def connect(context: StageContext, device: torch.device) -> "RemoteTeacher":
    """The teacher of a stage, for one rank. Raises Terminated if the process is asked to stop while it
    waits."""
    check_stop = stop_check(context.stopping)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["VPMOE_TEACHER_PORT"])
    return RemoteTeacher(
        join(address, port, distributed.rank(), distributed.world_size(), device, check_stop), check_stop
    )


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
