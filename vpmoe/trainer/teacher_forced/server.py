"""The teacher's process: waits for the students, fetches, checks and loads the model, and answers until the
students have no more questions.

It takes no part in the students' collectives and keeps no state: the questions of its students that belong
together, the n-th of each, are answered together, so that a forward is full; answers follow from them alone,
and a resumed run gets the same. SIGTERM does not end it while students train: they finish a step and
save first, then disconnect.
"""

import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vpmoe.api import DistillRun
from vpmoe.data.vocabulary import VOCABULARY_SIZE
from vpmoe.failure import Permanent, Retriable, Terminated
from vpmoe.inference.teacher_hidden import HiddenStateEngine, teacher_device
from vpmoe.storage import Bucket
from vpmoe.teacher.model import check_vocabulary, fetch_teacher, resolve_teacher
from vpmoe.trainer.teacher_forced import model
from vpmoe.trainer.teacher_forced.channel import Channel, CheckStop, host, stop_check
from vpmoe.trainer.teacher_forced.protocol import WIRE, Question, parse_question, ranks_of

log = logging.getLogger(__name__)


def serve(
    run: DistillRun,
    bucket: Bucket,
    *,
    teacher: int,
    students: int,
    address: str,
    ports: Sequence[int],
    folder: Path,
    stopping: threading.Event,
) -> None:
    """Be a teacher of one attempt at a stage. Returns when each of its students has disconnected.

    `teacher`: which of the stage's teachers, of which each has a port; `students`: ranks of the stage. Models
    are kept in `folder` on this pod's disk. Raises Permanent if these students cannot learn from the model;
    Retriable if a student is gone; Terminated if the process should stop, before training began or because
    the students did.
    """
    ranks = ranks_of(teacher, len(ports), students)
    try:
        _serve(run, bucket, ranks, address, ports[teacher], folder, stop_check(stopping))
    except Retriable as error:
        if stopping.is_set():
            raise Terminated(f"asked to stop, and so were the students: {error}") from error
        raise


def _serve(
    run: DistillRun,
    bucket: Bucket,
    ranks: Sequence[int],
    address: str,
    port: int,
    folder: Path,
    check_stop: CheckStop,
) -> None:
    device = teacher_device()
    channel = host(address, port, ranks, device, check_stop)
    directory = fetch_teacher(resolve_teacher(run, bucket), bucket, folder, check_stop)
    check_vocabulary(directory)
    channel.set_number("width", model.width(directory))
    output_VG = model.output_matrix(directory)
    if len(output_VG) != VOCABULARY_SIZE:
        raise Permanent(
            f"teacher.model: its output matrix has {len(output_VG)} rows, not {VOCABULARY_SIZE}. Give a "
            "whole checkpoint."
        )
    engine = HiddenStateEngine(directory, max(run.spec.dataset.max_length, model.PROBE))
    log.info(
        "Loaded teacher %s: %s, hidden states %d wide, on %s, for ranks %s",
        run.spec.teacher.model,
        engine.dtype,
        engine.width,
        device,
        ", ".join(map(str, ranks)),
    )
    output_VG = output_VG.to(device, WIRE[device.type])
    model.check_output(engine.hidden_states, output_VG)
    channel.set_number("loaded", 1)
    for student in range(len(ranks)):
        channel.send(student, output_VG)
    answer_questions(channel, engine.hidden_states)


def answer_questions(channel: Channel, hidden_states: model.HiddenStates) -> None:
    """Answer one question of each student at a time, in one batch, until all have disconnected. Students have
    equally many questions."""
    connected = list(range(len(channel.ranks)))
    while True:
        questions: dict[int, Question] = {}
        for student in tuple(connected):
            header = channel.receive_host(student, 2, torch.int64)
            positions, documents = header.tolist()
            if positions:
                body = channel.receive_host(student, positions + 2 * documents, torch.int32)
                questions[student] = parse_question(header, body)
            else:
                connected.remove(student)
        if not questions:
            break
        hidden_TG = hidden_states([ids for question in questions.values() for ids in question.ids])
        for student, answer_TG in zip(questions, place(questions.values(), hidden_TG), strict=True):
            channel.send_host(student, torch.tensor([len(answer_TG)]))
            channel.send(student, answer_TG.to(WIRE[channel.device.type]))
    channel.flush()


def place(questions: Iterable[Question], hidden_tG: Tensor) -> Iterator[Tensor]:
    """For each question, the hidden states of its documents at their positions, [T, G]; 0 at padding.
    `hidden_tG`: those of all documents, one after another."""
    for question in questions:
        answer_TG = hidden_tG.new_zeros(len(question.tokens), hidden_tG.shape[1])
        for start, length in question.documents:
            answer_TG[start : start + length] = hidden_tG[:length]
            hidden_tG = hidden_tG[length:]
        yield answer_TG
