"""The teacher of a TeacherForced stage: hidden states equal one forward per document, and the channel between
processes."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fakes import tiny_teacher
from tests.fakes.students import documents, new_seed
from vpmoe.checkpoint.safetensors_header import INDEX
from vpmoe.failure import Permanent, Retriable, Terminated
from vpmoe.model.batch import Batch
from vpmoe.process.launcher import free_port
from vpmoe.trainer.teacher_forced import model
from vpmoe.trainer.teacher_forced.channel import Channel, host, join, stop_check
from vpmoe.trainer.teacher_forced.client import RemoteTeacher
from vpmoe.trainer.teacher_forced.protocol import DocumentRange, Question, parse_question, question_of
from vpmoe.trainer.teacher_forced.server import answer_questions

VOCABULARY = 1000
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_teacher.write(
        tmp_path_factory.mktemp("teacher"), vocab_size=VOCABULARY, pad_token_id=0, eos_token_id=1
    )


@pytest.fixture(scope="module")
def teacher(directory: Path) -> torch.nn.Module:
    return model.load_teacher(directory, CPU)


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


@pytest.mark.parametrize(
    "max_tokens",
    [pytest.param(1, id="one-by-one"), pytest.param(64, id="some"), pytest.param(10_000, id="all-at-once")],
)
def test_hidden_states_equal_those_of_one_forward_per_document(
    teacher: torch.nn.Module, max_tokens: int
) -> None:
    """Some documents are longer than the sliding window of 16. The tolerance is for fp32 products of other
    shapes; magnitudes are 1 to 10."""
    from transformers import GptOssForCausalLM

    question = question_of(packed_batch(new_seed(), [5, 30, 1, 33], [], [80]))
    found = model.hidden_states(teacher, question.tokens, question.documents, max_tokens)
    reference = GptOssForCausalLM.from_pretrained(teacher.config._name_or_path, dtype=torch.float32)
    outside = torch.ones(len(question.tokens), dtype=torch.bool)
    for start, length in question.documents:
        separate = reference.model(
            input_ids=question.tokens[start : start + length].long().unsqueeze(0)
        ).last_hidden_state[0]
        torch.testing.assert_close(found[start : start + length], separate, rtol=1e-4, atol=1e-4)
        outside[start : start + length] = False
    assert (found[outside] == 0).all() and outside.any()


def test_hidden_states_of_a_document_do_not_depend_on_others_or_padding(teacher: torch.nn.Module) -> None:
    """Only rounding may differ: experts process the tokens of all documents together, so products have other
    shapes."""
    first, second = (question_of(packed_batch(seed, [10, 30], [40])) for seed in (1, 2))
    document = DocumentRange(10, 30)
    mixed = Question(second.tokens.clone(), second.documents)
    mixed.tokens[10:40] = first.tokens[10:40]
    one, other = (
        model.hidden_states(teacher, question.tokens, question.documents) for question in (first, mixed)
    )
    torch.testing.assert_close(
        one[document.start :][: document.length],
        other[document.start :][: document.length],
        rtol=1e-5,
        atol=1e-5,
    )
    assert not torch.allclose(one[:10], other[:10], atol=0.1)


def test_batches_have_similar_lengths_and_are_bounded() -> None:
    documents = [
        DocumentRange(0, 3),
        DocumentRange(3, 50),
        DocumentRange(53, 4),
        DocumentRange(57, 200),
        DocumentRange(257, 49),
    ]
    batches = list(model.batches_by_length(documents, 100))
    assert batches == [
        [DocumentRange(57, 200)],
        [DocumentRange(3, 50), DocumentRange(257, 49)],
        [DocumentRange(53, 4), DocumentRange(0, 3)],
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


def test_each_student_gets_the_answers_to_its_own_questions(teacher: torch.nn.Module) -> None:
    """Two students take two steps of two microbatches. Each asks for the first microbatch of the next step
    ahead and disconnects with that question open."""
    port, seed = free_port(), new_seed()
    steps = [
        [
            [packed_batch(seed + 10 * rank + 2 * step + i, [7, 20 + rank], [40]) for i in range(2)]
            for step in range(3)
        ]
        for rank in range(2)
    ]
    expected = [
        [
            [model.hidden_states(teacher, q.tokens, q.documents) for q in map(question_of, s)]
            for s in steps_of_student
        ]
        for steps_of_student in steps
    ]

    def run_teacher() -> None:
        end = host("127.0.0.1", port, 2, CPU, never_stop)
        end.set_number("width", teacher.config.hidden_size)
        end.set_number("loaded", 1)
        for student in range(2):
            end.send(student, torch.full((VOCABULARY, teacher.config.hidden_size), float(student)))
        answer_questions(end, teacher)

    def run_student(rank: int) -> object:
        remote = RemoteTeacher(join("127.0.0.1", port, rank, 2, CPU, never_stop), never_stop)
        assert remote.width == 64 and (remote.output(VOCABULARY) == rank).all()
        hidden_states = []
        for step, batches in enumerate(steps[rank][:2]):
            remote.announce(batches, steps[rank][step + 1][0])
            hidden_states.append([remote.hidden_of(microbatch) for microbatch in batches])
        remote.disconnect()
        return hidden_states

    results = run_concurrently(run_teacher, lambda: run_student(0), lambda: run_student(1))
    assert results[0] is None
    for rank in range(2):
        assert isinstance(results[1 + rank], list), results[1 + rank]
        for hidden_states, expected_states in zip(results[1 + rank], expected[rank], strict=False):  # type: ignore[arg-type]
            assert all(torch.equal(h, w) for h, w in zip(hidden_states, expected_states, strict=True))


def test_waiting_for_the_other_processes_can_be_stopped() -> None:
    stopping, port = threading.Event(), free_port()
    threading.Timer(0.5, stopping.set).start()
    hosting, joining = (
        lambda: host("127.0.0.1", port, 2, CPU, stop_check(stopping)),
        lambda: join("127.0.0.1", port, 0, 2, CPU, stop_check(stopping)),
    )
    assert [type(end) for end in run_concurrently(hosting, joining)] == [Terminated, Terminated]


def test_a_lost_process_is_named() -> None:
    port = free_port()
    ends: list[Channel | None] = [None, None]

    def set_end(number: int, end: Callable[[], Channel]) -> None:
        ends[number] = end()

    assert run_concurrently(
        lambda: set_end(0, lambda: host("127.0.0.1", port, 1, CPU, never_stop)),
        lambda: set_end(1, lambda: join("127.0.0.1", port, 0, 1, CPU, never_stop)),
    ) == [None, None]
    ends[1] = None  # this closes the student's end
    with pytest.raises(Retriable, match="rank 0 is gone, or does not answer"):
        ends[0].receive_host(0, 2, torch.int64)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.1.self_attn.sinks",
        "model.layers.0.mlp.router.bias",
        "model.layers.1.mlp.experts.down_proj",
    ],
)
def test_a_missing_tensor_is_not_drawn_at_random(directory: Path, tmp_path: Path, name: str) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    with pytest.raises(Permanent, match=f"^teacher.model: {name} is missing"):
        model.load_teacher(tmp_path, CPU)


@pytest.mark.parametrize(
    "kind, names, message",
    [
        ("missing_keys", {"layers.0.self_attn.sinks"}, "missing keys: layers.0.self_attn.sinks"),
        ("unexpected_keys", {"lm_head.weight", "extra"}, r"unexpected keys: extra\."),
        ("mismatched_keys", {("norm.weight", (1,), (2,))}, "mismatched keys: .'norm.weight'"),
        ("error_msgs", ["a size mismatch"], "error msgs: a size mismatch"),
        ("missing_keys", {"a", "b", "c", "d", "e"}, "missing keys: a, b, c and 2 more"),
    ],
)
def test_what_transformers_did_not_load_is_an_error(
    directory: Path, monkeypatch: pytest.MonkeyPatch, kind: str, names: object, message: str
) -> None:
    """The report is injected: with a whole checkpoint transformers of this version loads all."""
    from transformers import AutoModel

    load = AutoModel.from_pretrained

    def with_fault(*arguments: object, **more: object) -> tuple[object, dict[str, object]]:
        loaded, report = load(*arguments, **more)
        assert set(report) == {"missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"}
        return loaded, report | {kind: names}

    monkeypatch.setattr(AutoModel, "from_pretrained", with_fault)
    with pytest.raises(Permanent, match=f"transformers reports {message}"):
        model.load_teacher(directory, CPU)


def test_the_output_of_random_weights_is_accepted(directory: Path, teacher: torch.nn.Module) -> None:
    model.check_output(teacher, model.output_matrix(directory))


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
    directory: Path, name: str, value: float, message: str
) -> None:
    loaded, output = model.load_teacher(directory, CPU), model.output_matrix(directory)
    with torch.no_grad():
        (output if name == "output" else loaded.norm.weight).fill_(value)
    with pytest.raises(Permanent, match=message):
        model.check_output(loaded, output)


def test_attention_that_would_not_be_compiled_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own limit, with a function in place of FlexAttention, which is compiled on GPUs alone."""
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", torch._dynamo.config.recompile_limit)
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", False)
    model.forbid_eager_attention()
    assert torch._dynamo.config.fail_on_recompile_limit_hit and torch._dynamo.config.recompile_limit > 8
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 2)
    compiled = torch.compile(lambda ids, width: ids.float() * width, backend="eager", dynamic=False)

    class Compiled:
        config = type("", (), {"hidden_size": 1})()
        dtype = torch.float32

        def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> object:
            hidden = compiled(input_ids, 1).unsqueeze(-1)
            return type("", (), {"last_hidden_state": hidden})()

    with pytest.raises(Retriable, match=r"FlexAttention was compiled \d+ times, .* the last \[1, 5\]"):
        for length in range(3, 9):
            model.hidden_states(Compiled(), torch.arange(length), [DocumentRange(0, length)])


def test_experts_in_mxfp4_are_widened_without_other_packages(directory: Path, tmp_path: Path) -> None:
    """The format of the released gpt-oss: experts are blocks of 32 four-bit numbers that share a scale (OCP
    Microscaling, E2M1 and E8M0)."""
    torch.manual_seed(new_seed())
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(directory / "model.safetensors").items()}
    expected = {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, outer = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, outer, inner // 32, 16), dtype=torch.uint8)
        scales = torch.randint(120, 126, (experts, outer, inner // 32), dtype=torch.uint8)
        numbers = values[torch.stack([blocks & 15, blocks >> 4], dim=-1).long()].flatten(3) * 2.0 ** (
            scales.float() - 127
        ).unsqueeze(-1)
        expected[name.removeprefix("model.")] = numbers.flatten(2).transpose(1, 2).bfloat16()
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text()) | {"dtype": "bfloat16"}
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = dict(model.load_teacher(tmp_path, CPU).named_parameters())
    assert expected and all(
        torch.equal(found[name], numbers) and found[name].dtype == torch.bfloat16
        for name, numbers in expected.items()
    )
