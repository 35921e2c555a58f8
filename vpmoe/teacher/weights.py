"""Verify that a teacher's checkpoint is a whole GPT-OSS: every tensor that its config.json implies, in the
right shape and type, and no other.

Engines do not: vLLM leaves a missing matrix as zeros, and transformers fills it with random numbers. Only
headers are read, before either is imported. The experts are as transformers saves them (F32, BF16 or F16) or
as OpenAI released them: MXFP4, blocks of 32 four-bit numbers that share a scale (OCP Microscaling).
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpmoe.checkpoint.safetensors_header import InvalidCheckpoint, StoredTensor, read_folder
from vpmoe.failure import Permanent
from vpmoe.teacher.model import DTYPES, declared_dtype, read_config

MODEL_TYPE, ARCHITECTURE = "gpt_oss", "GptOssForCausalLM"
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_local_experts",
    "num_experts_per_tok",
)
"""Fields of config.json that decide the tensors' shapes, or what is computed with them. transformers would
take a missing one from GPT-OSS-120B."""
ALTERNATING = ("sliding_attention", "full_attention")
"""Kinds of attention of even and odd layers."""
FIXED = {"rms_norm_eps": 1e-5, "swiglu_limit": 7.0, "hidden_act": "silu"}
"""Fields that vLLM's GPT-OSS does not read, with the values that are written into it. With others its scores
would be those of another model than transformers computes."""
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

MXFP4_BLOCK = 32
"""Numbers that share a scale."""
MXFP4_TYPE = "U8"
REMEDY = "Copy the whole model directory again, or write it with save_pretrained."


@dataclass(frozen=True)
class WantedTensor:
    """A tensor that the configuration implies."""

    name: str
    shape: tuple[int, ...]
    packed: bool = False
    """Blocks or scales of MXFP4, stored as bytes."""


def check_weights(directory: Path) -> None:
    """Raise Permanent, naming the file, field or tensor, unless `directory` holds a whole GPT-OSS checkpoint.

    The output matrix may be missing if config.json ties it to the embeddings.
    """
    config = read_config(directory)
    check_config(config)
    try:
        found = read_folder(directory)
    except InvalidCheckpoint as error:
        raise Permanent(f"teacher.model: {error} {REMEDY}") from error
    optional = {HEAD} if config.get("tie_word_embeddings") else set()
    unknown = dict(found)
    stored: dict[str, StoredTensor] = {}
    for wanted in wanted_tensors(config):
        tensor = unknown.pop(wanted.name, None)
        if tensor is None and wanted.name not in optional:
            raise Permanent(f"teacher.model: {wanted.name} is missing. {_about(config)} {REMEDY}")
        if tensor is None:
            continue
        if tensor.shape != wanted.shape:
            raise Permanent(
                f"teacher.model: {tensor.file}: {wanted.name} is {list(tensor.shape)}, and config.json "
                f"implies {list(wanted.shape)}. {REMEDY}"
            )
        if wanted.packed != (tensor.dtype == MXFP4_TYPE):
            expected = MXFP4_TYPE if wanted.packed else ", ".join(DTYPES)
            raise Permanent(
                f"teacher.model: {tensor.file}: {wanted.name} is {tensor.dtype}, not {expected}. {REMEDY}"
            )
        if not wanted.packed:
            stored[wanted.name] = tensor
    if unknown:
        name = min(unknown)
        raise Permanent(
            f"teacher.model: {unknown[name].file}: {name} is not in the model that config.json describes. "
            f"{_about(config)} {REMEDY}"
        )
    _check_float_types(stored, declared_dtype(config))


def has_output_matrix(directory: Path) -> bool:
    """Whether the checkpoint has an output matrix of its own, not tied to the embeddings.

    Raises InvalidCheckpoint as read_folder does.
    """
    return HEAD in read_folder(directory)


def wanted_tensors(config: Mapping[str, Any]) -> Iterator[WantedTensor]:
    """All tensors of a GPT-OSS with this configuration, as transformers and OpenAI name them."""
    vocabulary, hidden, inner, layers, heads, groups, width, experts, _ = (config[name] for name in SIZES)
    packed = is_mxfp4(config)
    yield WantedTensor(EMBEDDING, (vocabulary, hidden))
    for number in range(layers):
        layer = f"model.layers.{number}"
        yield WantedTensor(f"{layer}.input_layernorm.weight", (hidden,))
        for letter, rows in (("q", heads * width), ("k", groups * width), ("v", groups * width)):
            yield WantedTensor(f"{layer}.self_attn.{letter}_proj.weight", (rows, hidden))
            yield WantedTensor(f"{layer}.self_attn.{letter}_proj.bias", (rows,))
        yield WantedTensor(f"{layer}.self_attn.o_proj.weight", (hidden, heads * width))
        yield WantedTensor(f"{layer}.self_attn.o_proj.bias", (hidden,))
        yield WantedTensor(f"{layer}.self_attn.sinks", (heads,))
        yield WantedTensor(f"{layer}.post_attention_layernorm.weight", (hidden,))
        yield WantedTensor(f"{layer}.mlp.router.weight", (experts, hidden))
        yield WantedTensor(f"{layer}.mlp.router.bias", (experts,))
        for matrix, rows, columns in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            name = f"{layer}.mlp.experts.{matrix}"
            if packed:
                blocks = columns // MXFP4_BLOCK
                yield WantedTensor(f"{name}_blocks", (experts, rows, blocks, MXFP4_BLOCK // 2), True)
                yield WantedTensor(f"{name}_scales", (experts, rows, blocks), True)
            else:  # transformers stores the experts' matrices transposed
                yield WantedTensor(name, (experts, columns, rows))
            yield WantedTensor(f"{name}_bias", (experts, rows))
    yield WantedTensor("model.norm.weight", (hidden,))
    yield WantedTensor(HEAD, (vocabulary, hidden))


def is_mxfp4(config: Mapping[str, Any]) -> bool:
    """Whether the experts are in MXFP4, as in OpenAI's release."""
    return config.get("quantization_config") is not None


def _about(config: Mapping[str, Any]) -> str:
    experts = "MXFP4 (quantization_config)" if is_mxfp4(config) else "not quantised (no quantization_config)"
    return f"config.json has num_hidden_layers {config['num_hidden_layers']}, and its experts are {experts}."


def check_config(config: Mapping[str, Any]) -> None:
    """Raise Permanent unless it is a GPT-OSS, and means the same to vLLM and transformers."""
    _check_field(config, "model_type", config.get("model_type") == MODEL_TYPE, MODEL_TYPE)
    _check_field(
        config, "architectures", config.get("architectures") == [ARCHITECTURE], f'["{ARCHITECTURE}"]'
    )
    for name in SIZES:
        value = config.get(name)
        _check_field(config, name, type(value) is int and value > 0, "a positive integer")
    heads, groups, experts = (
        config[f"num_{of}"] for of in ("attention_heads", "key_value_heads", "local_experts")
    )
    _check_field(
        config, "num_key_value_heads", heads % groups == 0, f"a divisor of num_attention_heads {heads}"
    )
    _check_field(
        config, "num_experts_per_tok", config["num_experts_per_tok"] <= experts, f"at most {experts}"
    )
    # vLLM computes with biases in any case, and would leave them uninitialised
    _check_field(config, "attention_bias", config.get("attention_bias", True) is True, "true")
    _check_field(
        config, "tie_word_embeddings", type(config.get("tie_word_embeddings", False)) is bool, "a bool"
    )
    positions = config.get("max_position_embeddings")
    fits = positions is None or (type(positions) is int and positions > 0)
    _check_field(config, "max_position_embeddings", fits, "a positive integer")
    for name in ("rope_parameters", "rope_scaling"):  # vLLM computes YaRN in any case
        described = (
            "an object of rope_type yarn with factor and original_max_position_embeddings, all its numbers "
            "positive"
        )
        _check_field(config, name, config.get(name) is None or _is_yarn(config[name]), described)
    types = config.get("layer_types")
    described = (
        f"a list of num_hidden_layers {config['num_hidden_layers']}: {ALTERNATING[0]}, {ALTERNATING[1]} "
        "and so on in turn, which is what vLLM computes in any case"
    )
    fits = types is None or (
        isinstance(types, list)
        and len(types) == config["num_hidden_layers"]
        and all(kind == ALTERNATING[layer % 2] for layer, kind in enumerate(types))
    )
    _check_field(config, "layer_types", fits, described)
    window = config.get("sliding_window", 128)
    _check_field(config, "sliding_window", type(window) is int and window > 0, "a positive integer")
    for name, value in FIXED.items():
        fits = type(config.get(name, value)) is type(value) and config.get(name, value) == value
        _check_field(config, name, fits, f"{value}, with which vLLM computes in any case")
    base = config.get("rope_theta", 1.0)
    _check_field(config, "rope_theta", _is_positive(base), "a positive number")
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        if method != "mxfp4":
            raise Permanent(
                f"teacher.model: config.json: quantization_config is of {method}. GPT-OSS is read as OpenAI "
                "released it (mxfp4) or not quantised; give such a checkpoint."
            )
        for name in ("hidden_size", "intermediate_size"):
            fits = config[name] % MXFP4_BLOCK == 0
            _check_field(config, name, fits, f"a multiple of {MXFP4_BLOCK}, the block of MXFP4")


def _is_yarn(rope: object) -> bool:
    fields = rope if isinstance(rope, dict) else {}
    numbers = [fields.get(name) for name in ("factor", "original_max_position_embeddings")]
    numbers += [fields.get(name, 1.0) for name in ("beta_fast", "beta_slow", "rope_theta")]
    kind = fields.get("rope_type", fields.get("type"))
    return kind == "yarn" and all(map(_is_positive, numbers))


def _is_positive(number: object) -> bool:
    return type(number) in (int, float) and 0 < number < float("inf")  # type: ignore[operator]  # a number here


def _check_field(config: Mapping[str, Any], name: str, valid: bool, wanted: str) -> None:
    if not valid:
        found = f"is {config[name]!r:.80}" if name in config else "is missing"
        raise Permanent(
            f"teacher.model: config.json: {name} {found}, expected {wanted}. Give the model directory of a "
            "GPT-OSS, with the config.json that belongs to its weights."
        )


def _check_float_types(stored: Mapping[str, StoredTensor], declared: str | None) -> None:
    """Raise Permanent unless the floating-point tensors have one type, which the declared one can represent.

    Single ones may be F32, as transformers keeps norms. Between F16 and BF16 numbers overflow or lose bits.
    """
    counts = Counter(tensor.dtype for tensor in stored.values())
    usual = max(sorted(counts), key=lambda dtype: counts[dtype])
    for name, tensor in stored.items():
        if tensor.dtype not in (usual, "F32") or tensor.dtype not in DTYPES:
            allowed = ", ".join(DTYPES) if tensor.dtype not in DTYPES else f"{usual} like most, or F32"
            raise Permanent(
                f"teacher.model: {tensor.file}: {name} is {tensor.dtype}, not {allowed}. {REMEDY}"
            )
    if declared and "float32" not in (declared, DTYPES[usual]) and declared != DTYPES[usual]:
        raise Permanent(
            f"teacher.model: config.json declares dtype {declared}, and the tensors are {usual}. Declare the "
            "type in which they were saved."
        )
