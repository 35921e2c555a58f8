"""The teacher's process: waits for the students, brings the model to disk, checks and loads it, and answers until nobody asks any more.

It has no part in the students' collectives and keeps nothing: what it answers follows from the question alone, so a run that is resumed
hears the same again. SIGTERM does not end it while students are at work: they finish a step and save first, then say that they are done.
"""

import logging
import threading
from pathlib import Path

import torch

from vpmoe.api import DistillRun
from vpmoe.data.vocabulary import VOCABULARY_SIZE
from vpmoe.failure import Permanent, Retriable, Terminated
from vpmoe.model.device import choose
from vpmoe.storage import Bucket
from vpmoe.teacher.model import check, fetch, resolve_teacher
from vpmoe.trainer.teacher_forced import model
from vpmoe.trainer.teacher_forced.channel import Channel, CheckStop, host, stop_check
from vpmoe.trainer.teacher_forced.client import WIRE
from vpmoe.trainer.teacher_forced.protocol import read

log = logging.getLogger(__name__)


def teach(
    run: DistillRun,
    bucket: Bucket,
    students: int,
    address: str,
    port: int,
    folder: Path,
    stopping: threading.Event,
) -> None:
    """Be the teacher of one attempt at a stage. Returns when every student has said that it is done.

    `folder` is where models are kept on this pod's disk. Raises Permanent where the model is none that these students can learn from,
    Retriable where a student is gone, Terminated where the process should stop: before training began, or because students did.
    """
    try:
        _teach(run, bucket, students, address, port, folder, stop_check(stopping))
    except Retriable as error:
        if stopping.is_set():
            raise Terminated(f"asked to stop, and so were the students: {error}") from error
        raise


def _teach(
    run: DistillRun,
    bucket: Bucket,
    students: int,
    address: str,
    port: int,
    folder: Path,
    check_stop: CheckStop,
) -> None:
    device = choose(megatron=False)
    channel = host(address, port, students, device, check_stop)
    directory = fetch(resolve_teacher(run, bucket), bucket, folder, check_stop)
    check(directory)
    channel.note("width", model.width(directory))
    output_VG = model.output_matrix(directory)
    if len(output_VG) != VOCABULARY_SIZE:
        raise Permanent(
            f"teacher.model: its output matrix has {len(output_VG)} rows, not {VOCABULARY_SIZE}. Give a whole checkpoint."
        )
    teacher = model.load(directory, device)
    log.info(
        "Teacher %s: %s, hidden states %d wide, on %s",
        run.spec.teacher.model,
        teacher.dtype,
        model.width(directory),
        device,
    )
    channel.note("loaded", 1)
    output_VG = output_VG.to(device, WIRE[device.type])
    for student in range(students):
        channel.send(student, output_VG)
    answer(channel, teacher)


def answer(channel: Channel, teacher: torch.nn.Module) -> None:
    """Answer the students by turns, each question as it comes, until all are done: they ask equally often."""
    asking = list(range(channel.students))
    while asking:
        for student in tuple(asking):
            header = channel.hear(student, 2, torch.int64)
            positions, documents = header.tolist()
            if not positions:
                asking.remove(student)
                continue
            question = read(header, channel.hear(student, positions + 2 * documents, torch.int32))
            hidden_TG = model.hidden_states(teacher, question.tokens.to(channel.device), question.documents)
            channel.tell(student, header[:1])
            channel.send(student, hidden_TG.to(WIRE[channel.device.type]))
    channel.flush()
