"""The teacher of a TeacherForced stage as its students see it: questions and answers, the channel between
processes, and how long they wait. The engine is in tests/unit/inference/test_teacher_hidden.py."""

import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.fakes import tiny_teacher
from tests.fakes.students import documents, new_seed
from vpmoe.checkpoint.safetensors_header import INDEX
from vpmoe.data.tokenizer import Ids
from vpmoe.failure import Permanent, Retriable, Terminated
from vpmoe.model import distributed
from vpmoe.model.batch import Batch
from vpmoe.process.launcher import free_port, free_ports
from vpmoe.trainer.context import StageContext
from vpmoe.trainer.teacher_forced import model
from vpmoe.trainer.teacher_forced.channel import Channel, host, join, stop_check
from vpmoe.trainer.teacher_forced.client import RemoteTeacher, WaitMeter, connect
from vpmoe.trainer.teacher_forced.protocol import (
    DocumentRange,
    Question,
    parse_question,
    question_of,
    ranks_of,
)
from vpmoe.trainer.teacher_forced.server import answer_questions

if TYPE_CHECKING:
    from transformers import GptOssForCausalLM

VOCABULARY = 1000
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_teacher.write(
        tmp_path_factory.mktemp("teacher"), vocab_size=VOCABULARY, pad_token_id=0, eos_token_id=1
    )


@pytest.fixture(scope="module")
def teacher(directory: Path) -> "GptOssForCausalLM":
    """The checkpoint in transformers."""
    from transformers import GptOssForCausalLM

    return GptOssForCausalLM.from_pretrained(directory, dtype=torch.float32)


def hidden_states_of(teacher: "GptOssForCausalLM") -> model.HiddenStates:
    """Hidden states by one forward per document."""

    @torch.no_grad()
    def hidden_states(documents: Sequence[Ids]) -> Tensor:
        return torch.cat(
            [teacher.model(torch.from_numpy(ids).long()[None]).last_hidden_state[0] for ids in documents]
        )

    return hidden_states


def answer(teacher: "GptOssForCausalLM", question: Question) -> Tensor:
    """The hidden states at a question's positions, and 0 at padding."""
    hidden_states = hidden_states_of(teacher)
    answer_TG = torch.zeros(len(question.tokens), teacher.config.hidden_size)
    for (start, length), ids in zip(question.documents, question.ids, strict=True):
        answer_TG[start : start + length] = hidden_states([ids])
    return answer_TG


def packed_batch(seed: int, *rows: list[int]) -> Batch:
    """Packed rows [len(rows), 80] of random documents of the given lengths, then padding."""
    generator = torch.Generator().manual_seed(seed)
    packed = [documents(generator, lengths, 80, VOCABULARY) for lengths in rows]
    return Batch.from_rows(*(torch.cat(parts) for parts in zip(*packed, strict=True)))


def test_a_question_has_the_documents_without_padding() -> None:
    packed = packed_batch(new_seed(), [5, 30, 1], [], [80])
    question = question_of(packed)
    assert question.documents == [
        DocumentRange(0, 5),
        DocumentRange(5, 30),
        DocumentRange(35, 1),
        DocumentRange(160, 80),
    ]
    parsed = parse_question(question.header, question.body)
    assert (
        torch.equal(parsed.tokens, packed.tokens.flatten().int()) and parsed.documents == question.documents
    )
    assert [ids.tolist() for ids in question.ids] == [
        packed.tokens.flatten()[start : start + length].tolist() for start, length in question.documents
    ]


@pytest.mark.parametrize("tied", [False, True])
def test_only_the_output_matrix_is_read(tmp_path: Path, tied: bool) -> None:
    expected = torch.randn(7, 3)
    names = {"model.embed_tokens.weight": expected if tied else torch.zeros(7, 3)} | (
        {} if tied else {"lm_head.weight": expected}
    )
    files = {name: f"model-{number}.safetensors" for number, name in enumerate(names)}
    for name, tensor in names.items():
        save_file({name: tensor}, tmp_path / files[name])
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": files}))
    save_file({"lm_head.weight": torch.zeros(7, 3)}, tmp_path / "a-shard-of-an-earlier-save.safetensors")
    (tmp_path / "config.json").write_text(f'{{"hidden_size": 3, "tie_word_embeddings": {str(tied).lower()}}}')
    assert torch.equal(model.output_matrix(tmp_path), expected) and model.width(tmp_path) == 3
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": "x.safetensors"}}))
    save_file({"x": expected}, tmp_path / "x.safetensors")
    missing = "model.embed_tokens.weight" if tied else "lm_head.weight"
    with pytest.raises(Permanent, match=f"^teacher.model: {missing} is missing"):
        model.output_matrix(tmp_path)


def never_stop() -> None:
    pass


def run_concurrently(*ends: Callable[[], object]) -> list[object]:
    """Run all `ends` in threads; returns their results or exceptions."""

    def result_or_error(end: Callable[[], object]) -> object:
        try:
            return end()
        except Exception as error:  # noqa: BLE001 (the test inspects it)
            return error

    with ThreadPoolExecutor(len(ends)) as pool:
        return list(pool.map(result_or_error, ends))


@pytest.mark.parametrize("teachers", [1, 2])
def test_each_student_gets_the_answers_to_its_own_questions(
    teacher: "GptOssForCausalLM", monkeypatch: pytest.MonkeyPatch, teachers: int
) -> None:
    """Three students of one or two teachers take two steps of two microbatches. Each asks for the first
    microbatch of the next step ahead and disconnects with that question open."""
    ports, seed, students = free_ports(teachers), new_seed(), 3
    monkeypatch.setenv("VPMOE_TEACHER_PORTS", ",".join(map(str, ports)))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(distributed, "world_size", lambda: students)
    rank_of_thread = threading.local()
    monkeypatch.setattr(distributed, "rank", lambda: rank_of_thread.rank)
    context = cast(StageContext, SimpleNamespace(stopping=threading.Event()))
    steps = [
        [
            [packed_batch(seed + 10 * rank + 2 * step + i, [7, 20 + rank], [40]) for i in range(2)]
            for step in range(3)
        ]
        for rank in range(students)
    ]
    expected = [
        [[answer(teacher, question_of(batch)) for batch in batches] for batches in steps_of_student]
        for steps_of_student in steps
    ]

    def run_teacher(number: int) -> None:
        ranks = ranks_of(number, teachers, students)
        end = host("127.0.0.1", ports[number], ranks, CPU, never_stop)
        end.set_number("width", teacher.config.hidden_size)
        end.set_number("loaded", 1)
        for student, rank in enumerate(ranks):
            end.send(student, torch.full((VOCABULARY, teacher.config.hidden_size), float(rank)))
        answer_questions(end, hidden_states_of(teacher))

    def run_student(rank: int) -> object:
        rank_of_thread.rank = rank
        remote = connect(context, CPU)
        assert remote.width == 64 and (remote.output(VOCABULARY) == rank).all()
        hidden_states = []
        for step, batches in enumerate(steps[rank][:2]):
            remote.announce(batches, steps[rank][step + 1][0])
            hidden_states.append([remote.hidden_of(microbatch) for microbatch in batches])
        remote.disconnect()
        return hidden_states

    results = run_concurrently(
        *[partial(run_teacher, number) for number in range(teachers)],
        *[partial(run_student, rank) for rank in range(students)],
    )
    assert results[:teachers] == [None] * teachers
    for found, expected_of_rank in zip(results[teachers:], expected, strict=True):
        assert isinstance(found, list), found
        for hidden_states, expected_states in zip(found, expected_of_rank, strict=False):
            assert all(torch.equal(h, w) for h, w in zip(hidden_states, expected_states, strict=True))


def test_the_questions_of_all_students_are_one_batch(teacher: "GptOssForCausalLM") -> None:
    """The teacher's forward is full only if it computes what all its students ask at a time."""
    port, ranks, batches = free_port(), [0, 1, 2], []
    questions = [packed_batch(new_seed(), [7, 20 + rank], [40]) for rank in ranks]

    def hidden_states(documents: Sequence[Ids]) -> Tensor:
        batches.append([len(ids) for ids in documents])
        return torch.zeros(sum(batches[-1]), 3)

    def run_student(rank: int) -> None:
        end = join("127.0.0.1", port, rank, ranks, CPU, never_stop)
        end.set_number("width", 3)
        remote = RemoteTeacher(end, never_stop)
        remote.announce([questions[rank]])
        remote.hidden_of(questions[rank])
        remote.disconnect()

    assert (
        run_concurrently(
            lambda: answer_questions(host("127.0.0.1", port, ranks, CPU, never_stop), hidden_states),
            *[partial(run_student, rank) for rank in ranks],
        )
        == [None] * 4
    )
    assert batches == [[7, 20, 40, 7, 21, 40, 7, 22, 40]]


def test_a_student_knows_how_long_it_waited() -> None:
    meter = WaitMeter(CPU)
    with meter.waiting():
        time.sleep(0.05)
    time.sleep(0.05)
    with meter.waiting():
        pass
    assert 0.05 <= meter.seconds() < 0.1
    meter.reset()
    assert meter.seconds() == 0


def test_waiting_for_the_other_processes_can_be_stopped() -> None:
    stopping, port = threading.Event(), free_port()
    threading.Timer(0.5, stopping.set).start()
    hosting, joining = (
        lambda: host("127.0.0.1", port, [0, 1], CPU, stop_check(stopping)),
        lambda: join("127.0.0.1", port, 0, [0, 1], CPU, stop_check(stopping)),
    )
    assert [type(end) for end in run_concurrently(hosting, joining)] == [Terminated, Terminated]


def test_a_lost_process_is_named() -> None:
    port = free_port()
    ends: list[Channel | None] = [None, None]

    def set_end(number: int, end: Callable[[], Channel]) -> None:
        ends[number] = end()

    assert run_concurrently(
        lambda: set_end(0, lambda: host("127.0.0.1", port, [3], CPU, never_stop)),
        lambda: set_end(1, lambda: join("127.0.0.1", port, 3, [3], CPU, never_stop)),
    ) == [None, None]
    ends[1] = None  # this closes the student's end
    with pytest.raises(Retriable, match="rank 3 is gone, or does not answer"):
        ends[0].receive_host(0, 2, torch.int64)  # type: ignore[union-attr]


def test_the_output_of_random_weights_is_accepted(directory: Path, teacher: "GptOssForCausalLM") -> None:
    model.check_output(hidden_states_of(teacher), model.output_matrix(directory))


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("output", 0.0, "its output is uniform"),
        ("output", 1.0, "its output is uniform"),
        ("norm", 0.0, "its output is uniform"),
        ("output", torch.nan, "log-probabilities are not finite"),
        ("norm", torch.inf, "log-probabilities are not finite"),
    ],
)
def test_a_teacher_whose_output_says_nothing_is_rejected(
    directory: Path,
    teacher: "GptOssForCausalLM",
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: float,
    message: str,
) -> None:
    output = model.output_matrix(directory)
    if name == "norm":
        monkeypatch.setattr(
            teacher.model.norm.weight, "data", torch.full_like(teacher.model.norm.weight, value)
        )
    else:
        output.fill_(value)
    with pytest.raises(Permanent, match=message):
        model.check_output(hidden_states_of(teacher), output)
