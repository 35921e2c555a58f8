"""A teacher's checkpoint is whole, or the first tensor, file or field at fault is named, before vLLM and
transformers are imported."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.sparse_checkpoint import header_of, write_file, write_folder
from vpmoe.checkpoint.safetensors_header import INDEX, SINGLE
from vpmoe.failure import Permanent
from vpmoe.teacher.weights import check_weights, has_output_matrix, wanted_tensors

ROOT = Path(__file__).parents[3]
RELEASED = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "quantization_config": {
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
        "quant_method": "mxfp4",
    },
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}
"""The fields of gpt-oss-20b's config.json that matter here. It declares no dtype."""
OF_120B = {"num_hidden_layers": 36, "num_local_experts": 128}

SMALL = RELEASED | {
    "dtype": "float32",
    "head_dim": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "quantization_config": None,
    "vocab_size": 1000,
}

Tensors = dict[str, tuple[str, list[int]]]


def tensors_of(config: dict[str, Any], dtype: str = "F32") -> Tensors:
    """All tensors of the configuration, by transformers' own model of it; experts in MXFP4 are as OpenAI
    documents them (gpt-oss' model card): the last dimension in blocks of 32 numbers, two in a byte."""
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM

    fields = {name: value for name, value in config.items() if name not in ("dtype", "quantization_config")}
    with torch.device("meta"):
        model = GptOssForCausalLM(GptOssConfig(**fields))
    tensors: Tensors = {}
    for name, tensor in model.state_dict().items():
        shape = list(tensor.shape)
        if config["quantization_config"] and name.endswith("_proj") and "experts" in name:
            experts, columns, rows = shape
            tensors[f"{name}_blocks"] = ("U8", [experts, rows, columns // 32, 16])
            tensors[f"{name}_scales"] = ("U8", [experts, rows, columns // 32])
        else:
            tensors[name] = (dtype, shape)
    return tensors


@pytest.mark.parametrize(
    "changes, dtype, shards",
    [
        pytest.param({}, "BF16", 3, id="20b-as-released"),
        pytest.param(OF_120B, "BF16", 15, id="120b-as-released"),
        pytest.param({"quantization_config": None, "dtype": "bfloat16"}, "BF16", 9, id="20b-unpacked"),
        pytest.param({"quantization_config": None, "torch_dtype": "float16"}, "F16", 9, id="20b-in-float16"),
        pytest.param(SMALL, "F32", 1, id="small"),
    ],
)
def test_whole_checkpoints_are_accepted(
    tmp_path: Path, changes: dict[str, Any], dtype: str, shards: int
) -> None:
    config = RELEASED | changes
    tensors = tensors_of(config, dtype)
    assert {tensor.name: list(tensor.shape) for tensor in wanted_tensors(config)} == {
        name: shape for name, (_, shape) in tensors.items()
    }
    check_weights(write_folder(tmp_path, config, tensors, shards))


def test_the_released_shapes_are_those_of_the_model_card(tmp_path: Path) -> None:
    shapes = {tensor.name: tensor.shape for tensor in wanted_tensors(RELEASED)}
    layer = "model.layers.23"
    assert shapes[f"{layer}.mlp.experts.gate_up_proj_blocks"] == (32, 5760, 90, 16)
    assert shapes[f"{layer}.mlp.experts.gate_up_proj_scales"] == (32, 5760, 90)
    assert shapes[f"{layer}.mlp.experts.down_proj_blocks"] == (32, 2880, 90, 16)
    assert shapes[f"{layer}.self_attn.q_proj.weight"] == (4096, 2880)
    assert len(shapes) == 3 + 24 * 19


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(
            {"model.norm.weight": "F32", "model.layers.0.input_layernorm.weight": "F32"}, id="norms"
        ),
        pytest.param({"model.layers.1.mlp.router.weight": "F32"}, id="router"),
    ],
)
def test_single_tensors_of_a_half_precision_checkpoint_may_be_float32(
    tmp_path: Path, change: dict[str, str]
) -> None:
    """transformers keeps GPT-OSS' norms so in float16."""
    config = SMALL | {"dtype": "bfloat16"}
    tensors = tensors_of(config, "BF16")
    check_weights(
        write_folder(tmp_path, config, tensors | {n: (d, tensors[n][1]) for n, d in change.items()})
    )


@pytest.mark.parametrize("declared, stored", [("float32", "BF16"), ("bfloat16", "F32"), ("float16", "F32")])
def test_a_checkpoint_may_be_declared_in_another_precision(
    tmp_path: Path, declared: str, stored: str
) -> None:
    config = SMALL | {"dtype": declared}
    check_weights(write_folder(tmp_path, config, tensors_of(config, stored)))


def test_an_output_matrix_that_is_tied_to_the_embeddings_may_be_missing(tmp_path: Path) -> None:
    config = SMALL | {"tie_word_embeddings": True}
    tensors = tensors_of(config)
    check_weights(write_folder(tmp_path, config, tensors))
    assert has_output_matrix(tmp_path)
    del tensors["lm_head.weight"]
    check_weights(write_folder(tmp_path, config, tensors))
    assert not has_output_matrix(tmp_path)


EXPERTS = "model.layers.1.mlp.experts"


@pytest.mark.parametrize("packed", [False, True], ids=["unpacked", "mxfp4"])
def test_every_tensor_is_needed_in_its_shape_and_type(tmp_path: Path, packed: bool) -> None:
    """Each tensor in turn is left out, is larger in its first dimension, and is of another type."""
    config = SMALL | ({"quantization_config": {"quant_method": "mxfp4"}} if packed else {})
    tensors = tensors_of(config)
    for name, (dtype, shape) in tensors.items():
        other = "F32" if dtype == "U8" else "I32"
        for changed, message in (
            ({}, f"{name} is missing"),
            ({name: (dtype, [shape[0] + 1, *shape[1:]])}, f"{SINGLE}: {name} is "),
            ({name: (other, shape)}, f"{SINGLE}: {name} is {other}, not "),
        ):
            rest = {each: entry for each, entry in tensors.items() if each != name}
            with pytest.raises(Permanent, match=f"^teacher.model: {message}"):
                check_weights(write_folder(tmp_path, config, rest | changed))


TENSORS_AT_FAULT: dict[str, tuple[dict[str, Any], Callable[[Tensors], object], str]] = {
    "another-layer": (
        {},
        lambda t: t.update({"model.layers.2.self_attn.sinks": ("F32", [4])}),
        "model.layers.2.self_attn.sinks is not in the model .* num_hidden_layers 2",
    ),
    "more-layers-in-the-config": (
        {"num_hidden_layers": 3},
        lambda t: None,
        "model.layers.2.input_layernorm.weight is missing. config.json has num_hidden_layers 3",
    ),
    "adapter": ({}, lambda t: t.update({"lora_A.weight": ("F32", [4])}), "lora_A.weight is not in the model"),
    "another-prefix": (
        {},
        lambda t: t.update({f"language_model.{name}": t.pop(name) for name in list(t)}),
        "model.embed_tokens.weight is missing",
    ),
    "one-projection-for-all": (
        {},
        lambda t: [t.pop(f"model.layers.0.self_attn.{letter}_proj.weight") for letter in "qkv"],
        "model.layers.0.self_attn.q_proj.weight is missing",
    ),
    "experts-one-by-one": (
        {},
        lambda t: [t.pop(f"{EXPERTS}.gate_up_proj"), t.update({f"{EXPERTS}.0.gate.weight": ("F32", [1])})],
        f"{EXPERTS}.gate_up_proj is missing",
    ),
    "packed-but-not-declared": (
        {},
        lambda t: t.update({f"{EXPERTS}.down_proj_blocks": ("U8", t.pop(f"{EXPERTS}.down_proj")[1])}),
        f"{EXPERTS}.down_proj is missing. .* not quantised",
    ),
    "declared-but-not-packed": (
        {"quantization_config": {"quant_method": "mxfp4"}},
        lambda t: None,
        r"gate_up_proj_blocks is missing. .* MXFP4",
    ),
    "experts-transposed": (
        {},
        lambda t: t.update({f"{EXPERTS}.down_proj": ("F32", [8, 64, 96])}),
        rf"{EXPERTS}.down_proj is \[8, 64, 96\], and config.json implies \[8, 96, 64\]",
    ),
    "vocabulary-cut": (
        {},
        lambda t: t.update({"lm_head.weight": ("F32", [999, 64])}),
        r"lm_head.weight is \[999, 64\], and config.json implies \[1000, 64\]",
    ),
    "float8": (
        {},
        lambda t: t.update({"lm_head.weight": ("F8_E4M3", [1000, 64])}),
        "lm_head.weight is F8_E4M3",
    ),
    "float64": (
        {},
        lambda t: t.update({"lm_head.weight": ("F64", [1000, 64])}),
        "lm_head.weight is F64, not F32",
    ),
    "one-in-float16": (
        {},
        lambda t: t.update({"model.norm.weight": ("F16", [64])}),
        "model.norm.weight is F16, not F32 like most",
    ),
    "one-in-bfloat16-of-float16": (
        {"dtype": "float16"},
        lambda t: t.update({n: ("F16" if "k_proj" not in n else "BF16", s) for n, (_, s) in t.items()}),
        "model.layers.0.self_attn.k_proj.weight is BF16, not F16 like most, or F32",
    ),
    "bfloat16-declared-float16": (
        {"dtype": "float16"},
        lambda t: t.update({n: ("BF16", s) for n, (_, s) in t.items()}),
        "config.json declares dtype float16, and the tensors are BF16",
    ),
}


@pytest.mark.parametrize("name", TENSORS_AT_FAULT)
def test_another_model_than_the_config_describes_is_refused(tmp_path: Path, name: str) -> None:
    fields, change, message = TENSORS_AT_FAULT[name]
    tensors = tensors_of(SMALL)
    change(tensors)
    with pytest.raises(Permanent, match=f"^teacher.model: .*{message}"):
        check_weights(write_folder(tmp_path, SMALL | fields, tensors, 2))


MISSING = object()
FIELDS_AT_FAULT: dict[str, tuple[dict[str, Any], str]] = {
    "another-model": ({"model_type": "llama"}, "model_type is 'llama', expected gpt_oss"),
    "no-model-type": ({"model_type": MISSING}, "model_type is missing, expected gpt_oss"),
    "another-head": ({"architectures": ["GptOssForSequenceClassification"]}, "architectures is .*expected"),
    "no-architecture": ({"architectures": MISSING}, "architectures is missing"),
    "no-layers": (
        {"num_hidden_layers": MISSING},
        "num_hidden_layers is missing, expected a positive integer",
    ),
    "no-width": ({"head_dim": MISSING}, "head_dim is missing"),
    "null": ({"hidden_size": None}, "hidden_size is None, expected a positive integer"),
    "text": ({"num_local_experts": "8"}, "num_local_experts is '8', expected a positive integer"),
    "zero": ({"intermediate_size": 0}, "intermediate_size is 0, expected a positive"),
    "negative": ({"vocab_size": -1}, "vocab_size is -1"),
    "fraction": ({"num_experts_per_tok": 2.5}, "num_experts_per_tok is 2.5"),
    "bool": ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    "heads-not-divisible": ({"num_key_value_heads": 3}, "num_key_value_heads is 3, expected a divisor"),
    "more-choices-than-experts": ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9, expected at most 8"),
    "no-biases": ({"attention_bias": False}, "attention_bias is False, expected true"),
    "tied-by-text": ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
    "layer-types": (
        {"layer_types": ["full_attention"]},
        "layer_types is .*, expected a list of num_hidden_layers 2",
    ),
    "layer-types-in-another-order": (
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types is .*expected .* sliding_attention, full_attention and so on",
    ),
    "only-full-attention": ({"layer_types": ["full_attention"] * 2}, "layer_types is .*in turn"),
    "layer-types-by-number": ({"layer_types": [0, 1]}, r"layer_types is \[0, 1\]"),
    "no-window": ({"sliding_window": None}, "sliding_window is None, expected a positive integer"),
    "window-by-text": ({"sliding_window": "128"}, "sliding_window is '128'"),
    "window-negative": ({"sliding_window": -1}, "sliding_window is -1"),
    "another-norm": ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06, expected 1e-05, with which vLLM"),
    "norm-by-text": ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', expected 1e-05"),
    "another-limit": ({"swiglu_limit": 10.0}, "swiglu_limit is 10.0, expected 7.0, with which vLLM"),
    "no-limit": ({"swiglu_limit": None}, "swiglu_limit is None, expected 7.0"),
    "another-activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected silu"),
    "rope-base-zero": ({"rope_theta": 0}, "rope_theta is 0, expected a positive number"),
    "rope-base-by-text": ({"rope_theta": "150000"}, "rope_theta is '150000'"),
    "rope-factor-nan": (
        {"rope_scaling": RELEASED["rope_scaling"] | {"factor": float("nan")}},  # type: ignore[operator]
        "rope_scaling is .*numbers positive",
    ),
    "rope-of-no-positions": (
        {"rope_scaling": RELEASED["rope_scaling"] | {"original_max_position_embeddings": 0}},  # type: ignore[operator]
        "rope_scaling is .*numbers positive",
    ),
    "rope-beta-by-text": (
        {"rope_scaling": RELEASED["rope_scaling"] | {"beta_fast": "32"}},  # type: ignore[operator]
        "rope_scaling is .*numbers positive",
    ),
    "positions": ({"max_position_embeddings": "4096"}, "max_position_embeddings is '4096'"),
    "another-rope": (
        {"rope_parameters": {"rope_type": "default"}},
        "rope_parameters is .*, expected .* yarn",
    ),
    "rope-without-factor": (
        {"rope_scaling": {"rope_type": "yarn"}},
        "rope_scaling is .*, expected .* factor",
    ),
    "rope-by-text": ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', expected an object"),
    "bitsandbytes": (
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        "quantization_config is of bitsandb",
    ),
    "fp8": ({"quantization_config": {"quant_method": "fp8"}}, r"is of fp8. .*\(mxfp4\)"),
    "quantization-by-text": ({"quantization_config": "mxfp8"}, "is of mxfp8"),
    "mxfp4-blocks": (
        {"quantization_config": {"quant_method": "mxfp4"}, "hidden_size": 80},
        "hidden_size is 80, expected a multiple of 32",
    ),
    "dtype": (
        {"dtype": "float8_e4m3fn"},
        "declares dtype 'float8_e4m3fn', not one of float32, bfloat16, float16",
    ),
    "dtype-is-an-object": ({"dtype": {"text": "float32"}}, "declares dtype {'text': 'float32'}"),
    "many-layers": ({"num_hidden_layers": 10**12}, "model.layers.2.input_layernorm.weight is missing"),
}


@pytest.mark.parametrize("name", FIELDS_AT_FAULT)
def test_a_config_that_is_no_gpt_oss_is_refused(tmp_path: Path, name: str) -> None:
    changes, message = FIELDS_AT_FAULT[name]
    config = {field: value for field, value in (SMALL | changes).items() if value is not MISSING}
    with pytest.raises(Permanent, match=f"^teacher.model: .*{message}"):
        check_weights(write_folder(tmp_path, config, tensors_of(SMALL)))


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "config-alone": (lambda d: [p.unlink() for p in d.glob("model*")], "has no .*safetensors file"),
    "no-config": (lambda d: (d / "config.json").unlink(), "config.json cannot be read"),
    "config-not-json": (lambda d: (d / "config.json").write_text("{'a': 1}"), "config.json is not JSON"),
    "config-with-a-byte-order-mark": (
        lambda d: (d / "config.json").write_bytes(b"\xef\xbb\xbf{}"),
        "config.json is not JSON .*BOM",
    ),
    "config-in-utf-16": (
        lambda d: (d / "config.json").write_bytes("{}".encode("utf-16")),
        "config.json is not JSON",
    ),
    "config-is-a-list": (lambda d: (d / "config.json").write_text("[]"), "config.json is not a JSON object"),
    "a-missing-shard": (
        lambda d: min(d.glob("model-*")).unlink(),
        f"model-00000-of-00001.*, which {INDEX} names",
    ),
    "a-cut-shard": (lambda d: cut(max(d.glob("model-*"))), "model-00001-of-00001.safetensors is cut"),
    "no-index": (lambda d: (d / INDEX).unlink(), f"no {INDEX}"),
    "another-checkpoint": (
        lambda d: write_file(d / SINGLE, header_of({"a": ("F32", [1])})),
        "two checkpoints",
    ),
}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_is_not_whole_is_refused(tmp_path: Path, name: str) -> None:
    change, message = FOLDERS[name]
    change(write_folder(tmp_path, SMALL, tensors_of(SMALL), 2))
    with pytest.raises(Permanent, match=f"^teacher.model: .*{message}"):
        check_weights(tmp_path)


def test_folders_beside_the_checkpoint_are_ignored(tmp_path: Path) -> None:
    """GPT-OSS' repositories have original/ and metal/."""
    write_folder(tmp_path, SMALL, tensors_of(SMALL))
    for name in ("original", "metal"):
        (tmp_path / name).mkdir()
        (tmp_path / name / SINGLE).write_bytes(b"another format")
    check_weights(tmp_path)


@pytest.mark.parametrize("engine", ["teacher_engine.TeacherEngine", "teacher_hidden.HiddenStateEngine"])
def test_both_engines_refuse_before_they_import_vllm_or_transformers(tmp_path: Path, engine: str) -> None:
    config = SMALL | {"vocab_size": 201_088}
    tensors = tensors_of(config)
    del tensors["lm_head.weight"]
    write_folder(tmp_path, config, tensors)
    module, name = engine.split(".")
    code = f"""
import sys
from pathlib import Path
from vpmoe.inference.{module} import {name}
try:
    {name}(Path({str(tmp_path)!r}), 100)
except Exception as error:
    assert not {{"vllm", "transformers"}} & set(sys.modules)
    print(type(error).__name__, error)
"""
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.startswith("Permanent teacher.model: lm_head.weight is missing"), json.dumps(
        shown.stdout
    )
