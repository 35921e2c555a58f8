"""What a student sees of the teacher: its width, its output matrix, and hidden states that it asks for one microbatch ahead."""

import os
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from vpmoe.model import distributed
from vpmoe.model.batch import Batch
from vpmoe.trainer.context import StageContext
from vpmoe.trainer.teacher_forced.channel import Channel, CheckStop, join, stop_check
from vpmoe.trainer.teacher_forced.protocol import NO_MORE, question_of

WIRE = {"cpu": torch.float32, "cuda": torch.bfloat16}
"""The type in which hidden states and output matrix travel: that of the students' weights."""


def meet(task: StageContext, device: torch.device) -> "RemoteTeacher":
    """The teacher of a stage, from a process of the students' group. Raises Terminated where the process should stop while it waits."""
    check_stop = stop_check(task.stopping)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["VPMOE_TEACHER_PORT"])
    return RemoteTeacher(
        join(address, port, distributed.rank(), distributed.world_size(), device, check_stop), check_stop
    )


class RemoteTeacher:
    """The teacher, at the other end of a channel. While one microbatch is trained on, it works on the next."""

    def __init__(self, channel: Channel, check_stop: CheckStop) -> None:
        """Waits until the teacher is on disk and was checked."""
        self._channel = channel
        self._check_stop = check_stop
        self.width = channel.noted("width", check_stop)
        """G, of its hidden states."""
        self._coming: deque[Batch] = deque()
        self._asked: deque[int] = deque()  # positions of each microbatch whose answer is not here yet

    def output(self, vocabulary: int) -> Tensor:
        """Its output matrix [V, G]; to be called once, before the first question. Waits until the teacher is loaded."""
        self._channel.noted("loaded", self._check_stop)
        return self._channel.receive(
            self._channel.teacher, (vocabulary, self.width), WIRE[self._channel.device.type]
        )

    def begin(self, batches: Sequence[Batch], then: Batch | None = None) -> None:
        """Announce a step's microbatches, which must be those that are trained on, in that order. `then`: the first of the next step."""
        self._coming.extend(batches[len(self._asked) :])
        if then is not None:
            self._coming.append(then)
        if not self._asked:
            self._ask()

    def hidden_of(self, batch: Batch) -> Tensor:
        """The final hidden states [T, G] of the next microbatch announced."""
        self._ask()
        return self._answer()

    def dismiss(self) -> None:
        """Say that there are no more questions; what was asked and not used is taken in first, so that both ends are even."""
        while self._asked:
            self._answer()
        self._channel.tell(self._channel.teacher, NO_MORE)
        self._channel.flush()

    def _ask(self) -> None:
        if self._coming:
            question = question_of(self._coming.popleft())
            self._channel.tell(self._channel.teacher, question.header)
            self._channel.tell(self._channel.teacher, question.body)
            self._asked.append(len(question.tokens))

    def _answer(self) -> Tensor:
        positions = self._asked.popleft()
        told = int(self._channel.hear(self._channel.teacher, 1, torch.int64))
        if told != positions:
            raise RuntimeError(
                f"asked for the hidden states of {positions} positions, the teacher has {told}"
            )
        return self._channel.receive(
            self._channel.teacher, (positions, self.width), WIRE[self._channel.device.type]
        )
