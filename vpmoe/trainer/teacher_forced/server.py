"""The teacher's process: waits for the students, fetches, checks and loads the model, and answers until the
students have no more questions.

It takes no part in the students' collectives and keeps no state: an answer follows from the question alone,
so a resumed run gets the same answers. SIGTERM does not end it while students train: they finish a step and
save first, then disconnect.
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
from vpmoe.teacher.model import check_vocabulary, fetch_teacher, resolve_teacher
from vpmoe.teacher.weights import check_weights
from vpmoe.trainer.teacher_forced import model
from vpmoe.trainer.teacher_forced.channel import Channel, CheckStop, host, stop_check
from vpmoe.trainer.teacher_forced.protocol import WIRE, parse_question

log = logging.getLogger(__name__)


def serve(
    run: DistillRun,
    bucket: Bucket,
    *,
    students: int,
    address: str,
    port: int,
    folder: Path,
    stopping: threading.Event,
) -> None:
    """Be the teacher of one attempt at a stage. Returns when every student has disconnected.

    `folder` is where models are kept on this pod's disk. Raises Permanent if these students cannot learn
    from the model; Retriable if a student is gone; Terminated if the process should stop, before
    training began or because the students did.
    """
    try:
        _serve(run, bucket, students, address, port, folder, stop_check(stopping))
    except Retriable as error:
        if stopping.is_set():
            raise Terminated(f"asked to stop, and so were the students: {error}") from error
        raise


def _serve(
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
    directory = fetch_teacher(resolve_teacher(run, bucket), bucket, folder, check_stop)
    check_vocabulary(directory)
    check_weights(directory)
    channel.set_number("width", model.width(directory))
    output_VG = model.output_matrix(directory)
    if len(output_VG) != VOCABULARY_SIZE:
        raise Permanent(
            f"teacher.model: its output matrix has {len(output_VG)} rows, not {VOCABULARY_SIZE}. Give a "
            "whole checkpoint."
        )
    teacher = model.load_teacher(directory, device)
    log.info(
        "Loaded teacher %s: %s, hidden states %d wide, on %s",
        run.spec.teacher.model,
        teacher.dtype,
        model.width(directory),
        device,
    )
    output_VG = output_VG.to(device, WIRE[device.type])
    model.check_output(teacher, output_VG)
    channel.set_number("loaded", 1)
    for student in range(students):
        channel.send(student, output_VG)
    answer_questions(channel, teacher)


def answer_questions(channel: Channel, teacher: torch.nn.Module) -> None:
    """Answer one question of each student in turn until all have disconnected. Students have equally many
    questions."""
    connected = list(range(channel.students))
    while connected:
        for student in tuple(connected):
            header = channel.receive_host(student, 2, torch.int64)
            positions, documents = header.tolist()
            if not positions:
                connected.remove(student)
                continue
            body = channel.receive_host(student, positions + 2 * documents, torch.int32)
            question = parse_question(header, body)
            hidden_TG = model.hidden_states(teacher, question.tokens.to(channel.device), question.documents)
            channel.send_host(student, header[:1])
            channel.send(student, hidden_TG.to(WIRE[channel.device.type]))
    channel.flush()
