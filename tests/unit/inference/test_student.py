"""The student computes the same in the trainer, in transformers and in vLLM; incomplete exports are
rejected."""

import json
import math
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from tests.fakes import model_folders, policy_versions
from tests.fakes.policy_versions import TINY, trainer_logp
from tests.fakes.students import (
    COMPLETE,
    SMALL,
    copy_slices,
    documents,
    join_slices,
    learner,
    new_seed,
    read_from,
)
from vpmoe.checkpoint.safetensors_header import INDEX
from vpmoe.data.harmony import Renderer, SystemMessage
from vpmoe.data.tokenizer import Tokenizer
from vpmoe.data.vocabulary import STOP_IDS
from vpmoe.failure import Permanent, Retriable
from vpmoe.inference import hf_model, weight_reader
from vpmoe.inference.engine_pool import EnginePool, SamplingRequest
from vpmoe.inference.vllm_options import CPU_CACHE, check_attention, check_device, cpu_memory_error
from vpmoe.model import hf_export, state
from vpmoe.model.batch import Batch
from vpmoe.model.learner import Learner
from vpmoe.objectives.vanilla import vanilla

TOLERANCE = 1e-4
"""Nats. All compute in float32 with different orders of summation, over up to 600 positions and 201,088
logits."""
COMPLETION = 150
"""Tokens of a completion that is longer than the window of 128."""


def harmony_documents(random: np.random.Generator) -> list[NDArray[np.int32]]:
    """Documents as in a dataset, with lengths up to almost the engine's maximum."""
    render = Renderer(Tokenizer(), SystemMessage("You are vpMoE.", "2024-06", "2026-01-01", "high")).render
    words = [f"pond ≈ {n} m, ⟨H≈0.4⟩" for n in range(100)]

    def text(length: int) -> str:
        return " ".join(random.choice(words, length))

    sizes = ((3, 2), (1, 9), (12, 4), (19, 6))
    return [
        np.array(render(text(4), None, text(reasoning), text(final)).ids, np.int32)
        for reasoning, final in sizes
    ]


def scored_sequences(random: np.random.Generator) -> list[NDArray[np.int32]]:
    """Harmony documents, and random ids of lengths around the window of 128."""
    around = [random.integers(0, TINY.vocabulary, length).astype(np.int32) for length in (3, 127, 128, 129)]
    return harmony_documents(random) + around


@pytest.fixture(scope="module")
def trained(device: torch.device) -> Learner:
    """A tiny student after one optimizer step."""
    trained_learner = policy_versions.learner(device, new_seed())
    batch = Batch.from_rows(*documents(torch.Generator().manual_seed(1), [60, 40], 128, TINY.vocabulary))
    trained_learner.forward_backward(
        [batch], vanilla(batch.counts, {"reasoning": 1.0, "final": 1.0}), int(batch.counts[0])
    )
    trained_learner.step(1e-2)
    return trained_learner


@pytest.fixture(scope="module")
def exported(trained: Learner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return policy_versions.export(tmp_path_factory.mktemp("student"), trained)


def test_transformers_agrees_at_every_position(trained: Learner, exported: Path) -> None:
    sequences = scored_sequences(np.random.default_rng(new_seed()))
    model = hf_model.load_student(exported, TINY)
    expected = trainer_logp(trained, sequences)
    for ids_T, expected_T in zip(sequences, expected, strict=True):
        ids = torch.from_numpy(ids_T.astype(np.int64))
        with torch.no_grad():
            logits_TV = model(ids[None]).logits[0]
        got = logits_TV[:-1].double().log_softmax(1).gather(1, ids[1:, None])[:, 0].numpy()
        assert np.abs(got - expected_T).max() <= TOLERANCE
    assert np.concatenate(expected).std() > 0.5, (
        "log-probabilities differ between tokens: else agreement would show nothing"
    )


def test_the_biases_change_the_chosen_experts(trained: Learner, exported: Path) -> None:
    """Otherwise agreement would not show that biases are exported."""
    (ids_T, *_) = harmony_documents(np.random.default_rng(new_seed()))
    model = hf_model.load_student(exported, TINY)
    ids = torch.from_numpy(ids_T.astype(np.int64))[None]
    with torch.no_grad():
        before = model(ids).logits
        for layer in model.model.layers[TINY.dense_layers :]:
            layer.mlp.gate.e_score_correction_bias.zero_()
        assert (model(ids).logits - before).abs().max() > 0.1


def test_generation_with_a_cache_equals_a_full_forward(exported: Path) -> None:
    model = hf_model.load_student(exported, TINY)
    ids = torch.from_numpy(harmony_documents(np.random.default_rng(new_seed()))[0].astype(np.int64))[None]
    out = model.generate(ids[:, :20], max_new_tokens=8, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        logits = model(out).logits[0]
    assert torch.equal(logits[19:-1].argmax(1), out[0, 20:])


def test_a_cache_and_padding_change_nothing_past_the_window(exported: Path) -> None:
    """Two sequences, the shorter padded on the left: a prompt of 140, then three tokens one by one."""
    model = hf_model.load_student(exported, TINY)
    ids = torch.from_numpy(np.random.default_rng(new_seed()).integers(0, TINY.vocabulary, (1, 143)))
    padded = torch.cat([ids, torch.nn.functional.pad(ids[:, :130], (13, 0))])
    seen = torch.ones_like(padded)
    seen[1, :13] = 0
    positions = (seen.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        whole, short = model(ids).logits[0], model(ids[:, :130]).logits[0]
        step = model(
            padded[:, :140], attention_mask=seen[:, :140], position_ids=positions[:, :140], use_cache=True
        )
        found = [step.logits]
        for at in range(140, 143):
            step = model(
                padded[:, at : at + 1],
                attention_mask=seen[:, : at + 1],
                position_ids=positions[:, at : at + 1],
                past_key_values=step.past_key_values,
                use_cache=True,
            )
            found.append(step.logits)
    both = torch.cat(found, 1)
    torch.testing.assert_close(both[0], whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both[1, 13:], short, rtol=1e-4, atol=1e-4)


def test_vllm_agrees_at_every_position(trained: Learner, exported: Path, engines: EnginePool) -> None:
    sequences = scored_sequences(np.random.default_rng(new_seed()))
    assert max(map(len, sequences)) > 512, "longer than one of vLLM's batches"
    engines.load(exported)
    (found,) = engines.score(sequences)
    for got, expected in zip(found, trainer_logp(trained, sequences), strict=True):
        assert np.abs(got - expected).max() <= TOLERANCE


def test_samples_are_a_function_of_the_seed_and_their_log_probabilities_equal_the_trainers(
    trained: Learner, exported: Path, engines: EnginePool
) -> None:
    seed = new_seed() >> 1
    prompts = [
        ids_T[:length]
        for ids_T, length in zip(
            harmony_documents(np.random.default_rng(seed)), (30, 41, 64, 50), strict=True
        )
    ]
    prompts.append(prompts[0])
    engines.load(exported)
    first, again, other = (
        engines.sample([SamplingRequest(ids_P, start + n, 24) for n, ids_P in enumerate(prompts)])
        for start in (seed, seed, seed + 1000)
    )
    for one, same, another in zip(first, again, other, strict=True):
        assert one.ids_C.tobytes() == same.ids_C.tobytes() and one.logp_C.tobytes() == same.logp_C.tobytes()
        assert len(one.ids_C) == 24 and one.ids_C.tolist() != another.ids_C.tolist()
    assert first[0].ids_C.tolist() != first[-1].ids_C.tolist(), "the same prompt with another seed"
    whole_sequences = [
        np.concatenate([prompt, one.ids_C]) for prompt, one in zip(prompts, first, strict=True)
    ]
    for one, expected in zip(first, trainer_logp(trained, whole_sequences), strict=True):
        assert np.abs(one.logp_C - expected[-24:]).max() <= TOLERANCE


def test_a_queue_answers_every_request_once_with_its_own_log_probabilities(
    trained: Learner, exported: Path, engines: EnginePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on GPUs, where the engine takes each step's tokens from vLLM's core. A request that was dropped in
    mid-step gives nothing to one that follows under the same number."""
    seed = new_seed()
    random = np.random.default_rng(seed)
    requests = [
        SamplingRequest(random.integers(0, TINY.vocabulary, length).astype(np.int32), seed + n, limit)
        for n, (length, limit) in enumerate(zip((3, 40, 130, 7, 90), (30, 1, 12, 140, 8), strict=True))
    ]
    monkeypatch.setattr(engines, "depth", 4)
    engines.load(exported)
    next(engines.sample_queue(requests))
    answers = list(engines.sample_queue(requests))
    assert sorted(number for number, _ in answers) == list(range(len(requests)))
    found = [completion for _, completion in sorted(answers, key=lambda answer: answer[0])]
    whole = [np.concatenate([one.ids_P, answer.ids_C]) for one, answer in zip(requests, found, strict=True)]
    for one, answer, expected in zip(requests, found, trainer_logp(trained, whole), strict=True):
        assert len(answer.ids_C) == one.max_tokens or answer.ids_C[-1] in STOP_IDS
        assert answer.ids_C.dtype == np.int32 and answer.logp_C.dtype == np.float32
        assert np.abs(answer.logp_C - expected[-len(answer.ids_C) :]).max() <= TOLERANCE


def test_vllm_decodes_past_the_window_as_the_trainer(
    trained: Learner, exported: Path, engines: EnginePool
) -> None:
    """Completions longer than the window, made one token at a time. Local layers keep the keys and values of
    a window only, the global one all of them."""
    random = np.random.default_rng(new_seed())
    prompts = [random.integers(0, TINY.vocabulary, length).astype(np.int32) for length in (3, 127, 300)]
    engines.load(exported)
    found = engines.sample([SamplingRequest(ids_P, n, COMPLETION) for n, ids_P in enumerate(prompts)])
    whole = [np.concatenate([ids_P, one.ids_C]) for ids_P, one in zip(prompts, found, strict=True)]
    for one, expected in zip(found, trainer_logp(trained, whole), strict=True):
        assert len(one.ids_C) == COMPLETION
        assert np.abs(one.logp_C - expected[-COMPLETION:]).max() <= TOLERANCE
    (layers,) = engines._call("attention", [()], lambda: None)
    assert layers == [("CPU_ATTN", window) for window in (128, 128, 128, None, 128)]


def test_vllm_loads_other_weights_into_the_running_engine(
    trained: Learner, exported: Path, engines: EnginePool, tmp_path: Path
) -> None:
    sequences = harmony_documents(np.random.default_rng(new_seed()))
    before = trainer_logp(trained, sequences)
    original = {name: parameter.detach().clone() for name, parameter in trained.student.named_parameters()}
    engines.load(exported)
    with torch.no_grad():
        for parameter in trained.student.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    after = trainer_logp(trained, sequences)
    engines.load(policy_versions.export(tmp_path, trained))
    (found,) = engines.score(sequences)
    with torch.no_grad():
        for name, parameter in trained.student.named_parameters():
            parameter.copy_(original[name])
    for got, expected, before_load in zip(found, after, before, strict=True):
        assert np.abs(got - expected).max() <= TOLERANCE and np.abs(expected - before_load).max() > 0.1


def save_indexed(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Write the tensors as the only file of a checkpoint, and its index."""
    save_file(tensors, folder / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_memory_that_is_too_small_for_vllms_cache_is_no_internal_error(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache of 10 TiB stands for a pod's memory limit: vLLM compares the two in the same place."""
    monkeypatch.setenv(CPU_CACHE, "10240")
    with EnginePool(1, "tiny", 64) as engines, pytest.raises(Retriable) as caught:
        engines.load(exported)
    message = str(caught.value)
    assert message.startswith("engine 0: out of memory: vLLM's cache on the CPU has 10240 GiB")
    assert "no room beside the student: Available memory on node " in message
    assert message.endswith(
        "Raise the memory in runtime.resources of this role, or lower VLLM_CPU_KVCACHE_SPACE in runtime.env."
    )


def test_a_cache_that_is_too_small_for_a_sequence_names_the_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the words of vLLM's source: a model whose cache of one sequence has over 1 GiB loads too long."""
    monkeypatch.setenv(CPU_CACHE, "1")
    words = "To serve at least one request with the model's max seq len "
    (folder,) = find_spec("vllm").submodule_search_locations  # type: ignore[union-attr, misc]
    assert words in (Path(folder) / "v1/core/kv_cache_utils.py").read_text()
    rest = (
        "(9000), (1.5 GiB KV cache is needed, which is larger than the available KV cache memory (1.0 GiB). "
    )
    error = cpu_memory_error(
        ValueError(f"{words}{rest}Try increasing `gpu_memory_utilization`"), "the student", "a.field"
    )
    assert isinstance(error, Permanent) and "gpu_memory_utilization" not in str(error)
    assert "Raise VLLM_CPU_KVCACHE_SPACE in runtime.env" in str(error) and "lower a.field" in str(error)


@pytest.mark.parametrize("size", ["", "0", "1.5", "-1", "1GiB"])
def test_a_size_of_the_cache_that_is_none_is_rejected(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv(CPU_CACHE, size)
    with pytest.raises(Permanent, match=f"^VLLM_CPU_KVCACHE_SPACE is '{size}', and must be a whole number"):
        check_device("the sampler", "stages[].sampler.gpus")


@pytest.mark.parametrize("change", ["missing", "extra", "misshapen"])
def test_vllm_rejects_incomplete_weights(
    exported: Path, engines: EnginePool, tmp_path: Path, change: str
) -> None:
    """An engine keeps its weights if a load fails."""
    sequence = harmony_documents(np.random.default_rng(0))[0]
    engines.load(exported)
    before = engines.score([sequence])
    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    tensors = load_file(exported / "model-00001-of-00001.safetensors")
    norm = tensors.pop("model.norm.weight")
    changed = {
        "missing": {},
        "extra": {"model.norm.weight": norm, "extra": norm.clone()},
        "misshapen": {"model.norm.weight": norm[1:].clone()},
    }
    save_indexed(tensors | changed[change], tmp_path)
    messages = {
        "missing": "model.norm.weight is missing",
        "extra": "extra is not a part of this student",
        "misshapen": r"model.norm.weight is \('F32', \[63\]\), wanted \('F32', \[64\]\)",
    }
    with pytest.raises(Permanent, match=f"engine 0: {tmp_path}: {messages[change]}"):
        engines.load(tmp_path)
    assert np.array_equal(engines.score([sequence]), before)


def test_an_export_from_a_checkpoint_equals_one_from_the_learner(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, also in several files. The projection of TeacherForced stages is not exported."""
    source = learner(device, teacher_width=48)
    sizes = state.sizes(source)
    hf_export.export_student(tmp_path / "live", SMALL, 256, sizes, state.copy_weights(source), torch.float32)
    monkeypatch.setattr(hf_export, "FILE_BYTES", 10_000)
    hf_export.export_student(
        tmp_path / "read",
        SMALL,
        256,
        sizes,
        read_from(join_slices([copy_slices(source)], sizes)),
        torch.float32,
    )
    files = sorted((tmp_path / "read").glob("*.safetensors"))
    assert len(files) > 3
    read = {name: tensor for file in files for name, tensor in load_file(file).items()}
    live = load_file(tmp_path / "live" / "model-00001-of-00001.safetensors")
    assert set(live) == set(read) == set(hf_export.exported_tensors(SMALL)) and all(
        torch.equal(live[name], read[name]) for name in live
    )
    assert (
        sum(tensor.numel() for tensor in live.values())
        == SMALL.parameters() + SMALL.moe_layers * SMALL.experts
    )
    hf_export.check_export(tmp_path / "read", SMALL)


def test_a_bf16_export_rounds_as_the_trainer_and_keeps_biases_in_float32(
    device: torch.device, tmp_path: Path
) -> None:
    source = learner(device)
    hf_export.export_student(
        tmp_path, SMALL, 256, state.sizes(source), state.copy_weights(source), torch.bfloat16
    )
    tensors = load_file(tmp_path / "model-00001-of-00001.safetensors")
    assert torch.equal(tensors["lm_head.weight"], source.student.output.detach().bfloat16())
    assert {name for name, tensor in tensors.items() if tensor.dtype == torch.float32} == {
        name for name in tensors if name.endswith("_bias")
    }
    model = hf_model.load_student(tmp_path, SMALL)
    assert (
        model.lm_head.weight.dtype == torch.bfloat16
        and model.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
    )


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param(lambda sizes: sizes.pop("main/output"), "main/output is missing", id="missing"),
        pytest.param(
            lambda sizes: sizes.update({"main/new.weight": 3}),
            "main/new.weight is not a part of this student",
            id="extra",
        ),
        pytest.param(
            lambda sizes: sizes.update({"main/output": 3}), "main/output is 3, wanted 16384", id="size"
        ),
    ],
)
def test_an_unexpected_state_is_not_exported(
    device: torch.device, tmp_path: Path, change: Callable[[dict[str, int]], object], message: str
) -> None:
    source = learner(device)
    sizes = dict(state.sizes(source))
    change(sizes)
    with pytest.raises(Permanent, match=f"the state to export as small: {message}"):
        hf_export.export_student(
            tmp_path / "out", SMALL, 256, sizes, state.copy_weights(source), torch.float32
        )
    assert not (tmp_path / "out").exists()


def rename_bias(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.gate.bias"] = tensors.pop("model.layers.1.mlp.gate.e_score_correction_bias")


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param(
            lambda tensors: tensors.pop("model.layers.2.mlp.experts.down"),
            r"layers.2.mlp.experts.down is missing",
            id="missing",
        ),
        pytest.param(
            lambda tensors: tensors.update(extra=torch.zeros(2)),
            "extra is not a part of this student. Export the student again",
            id="extra",
        ),
        pytest.param(
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}),
            r"model.norm.weight is \('F32', \[31\]\), wanted \('F32', \[32\]\)",
            id="misshapen",
        ),
        pytest.param(
            lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].half()}),
            "lm_head.weight is .'F16'",
            id="type",
        ),
        pytest.param(rename_bias, "gate.bias is not a part of this student", id="renamed"),
    ],
)
def test_an_incomplete_checkpoint_is_rejected(
    device: torch.device, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    source = learner(device)
    hf_export.export_student(
        tmp_path, SMALL, 256, state.sizes(source), state.copy_weights(source), torch.float32
    )
    tensors = load_file(tmp_path / "model-00001-of-00001.safetensors")
    change(tensors)
    save_indexed(tensors, tmp_path)
    with pytest.raises(Permanent, match=message):
        hf_model.load_student(tmp_path, SMALL)


FILE = "model-00001-of-00001.safetensors"


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param(lambda d: (d / FILE).unlink(), f"{FILE}, which {INDEX} names, is missing", id="no-file"),
        pytest.param(lambda d: (d / FILE).write_bytes(b""), f"{FILE} is not a safetensors file", id="empty"),
        pytest.param(
            lambda d: (d / FILE).write_bytes((d / FILE).read_bytes()[:-4]), f"{FILE} is cut", id="cut"
        ),
        pytest.param(lambda d: (d / INDEX).unlink(), f"no {INDEX}", id="no-index"),
        pytest.param(lambda d: (d / INDEX).write_text("{}"), f"{INDEX} has no weight_map", id="no-map"),
        pytest.param(
            lambda d: (d / INDEX).write_text((d / INDEX).read_text().replace("lm_head", "head")),
            f"head.weight is missing in {FILE}",
            id="another-name",
        ),
        pytest.param(lambda d: (d / "config.json").unlink(), "config.json cannot be read", id="no-config"),
        pytest.param(lambda d: (d / "config.json").write_text("[]"), "is not a JSON object", id="list"),
        pytest.param(lambda d: (d / "config.json").write_text("{}"), "dtype is None", id="no-dtype"),
        pytest.param(
            lambda d: (d / "config.json").write_text('{"dtype": ["float32"]}'), "dtype is", id="dtype-list"
        ),
    ],
)
def test_a_damaged_export_is_rejected(
    device: torch.device, tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    source = learner(device)
    hf_export.export_student(
        tmp_path, SMALL, 256, state.sizes(source), state.copy_weights(source), torch.float32
    )
    change(tmp_path)
    with pytest.raises(Permanent, match=f"{tmp_path}.*{message}.*xport"):
        hf_export.check_export(tmp_path, SMALL)


@pytest.mark.parametrize(
    "backends, refused",
    [
        ([["CPU_ATTN"]], False),
        ([["FLASH_ATTN", "FLASH_ATTN"]], False),
        ([["TRITON_ATTN"]], False),
        ([[]], False),
        ([["FLEX_ATTENTION"]], True),
        ([["FLASH_ATTN", "FLEX_ATTENTION"]], True),
        ([["TRITON_ATTN"], ["FLEX_ATTENTION"]], True),
    ],
)
def test_vllm_s_flex_attention_is_refused(backends: list[list[str]], refused: bool) -> None:
    """Stand-in layers: vLLM chooses FlexAttention only on a GPU for which it has no other kernel."""

    class Layer(torch.nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.attn_backend = type("Backend", (), {"get_name": staticmethod(lambda: name)})

    class Engine:
        def apply_model(self, function: Callable[[torch.nn.Module], list[str]]) -> list[list[str]]:
            models = [torch.nn.ModuleList([torch.nn.Linear(1, 1), *map(Layer, names)]) for names in backends]
            return [function(model) for model in models]

    with pytest.raises(Permanent, match="only FlexAttention for the teacher") if refused else nullcontext():
        check_attention(Engine(), "the teacher")


def test_an_export_of_another_shape_or_dtype_is_rejected(device: torch.device, tmp_path: Path) -> None:
    source = learner(device)
    hf_export.export_student(
        tmp_path, SMALL, 256, state.sizes(source), state.copy_weights(source), torch.float32
    )
    with pytest.raises(Permanent, match=r"config.json, not a other: moe_intermediate_size is 16, wanted 24"):
        hf_export.check_export(tmp_path, replace(SMALL, name="other", expert_width=24))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    with pytest.raises(Permanent, match="dtype is float16"):
        hf_export.check_export(tmp_path, SMALL)
    (tmp_path / "config.json").write_text(json.dumps(config))
    file = tmp_path / "model-00001-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(Permanent, match="is not a complete checkpoint"):
        hf_export.check_export(tmp_path, SMALL)


def test_the_reader_returns_every_tensor_of_every_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the safetensors library does, of both types, and of a larger checkpoint after a smaller one. A
    tensor is larger than a piece, and there are more than buffers."""
    monkeypatch.setattr(weight_reader, "PIECE", 1000)
    monkeypatch.setattr(hf_export, "FILE_BYTES", 60_000)
    reader = weight_reader.WeightReader(pinned=False)
    for number, (shape, dtype) in enumerate([(SMALL, torch.bfloat16), (COMPLETE, torch.float32)] * 2):
        sizes = {part.source: math.prod(part.view) for part in hf_export.exported_tensors(shape).values()}
        folder = tmp_path / str(number)
        hf_export.write_weights(folder, shape, sizes, model_folders.random_weights, dtype)
        expected = {k: v for file in hf_export.weight_files(folder) for k, v in load_file(file).items()}
        found = {name: tensor.clone() for name, tensor in reader.read(folder)}
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


def test_a_file_that_ends_early_is_an_error(tmp_path: Path) -> None:
    sizes = {part.source: math.prod(part.view) for part in hf_export.exported_tensors(SMALL).values()}
    hf_export.write_weights(tmp_path, SMALL, sizes, model_folders.random_weights, torch.float32)
    (file,) = hf_export.weight_files(tmp_path)
    tensors = weight_reader.WeightReader(pinned=False).read(tmp_path)
    next(tensors)
    os.truncate(file, 1000)
    with pytest.raises(EOFError, match="a file of the checkpoint ends before byte"):
        list(tensors)
