"""Export of the student as a Hugging Face checkpoint: config.json, safetensors and their index.

`exported_tensors` maps exported tensors to parameters. Writing and checking both use it, and a name that is
not in it is an error. This module imports neither megatron-core nor transformers: the trainer writes exports,
the sampler and the evaluation check them.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpmoe.checkpoint.safetensors_header import (
    INDEX,
    InvalidCheckpoint,
    TensorEntry,
    read_folder,
    read_json_object,
    write_header,
)
from vpmoe.data.vocabulary import CALL, RETURN
from vpmoe.failure import Permanent
from vpmoe.model.shapes import PARTS, Shape, other_parts
from vpmoe.storage.blocks import in_order

MODEL_TYPE = "vpmoe"
ARCHITECTURE = "VpmoeForCausalLM"

FILE_BYTES = 512 << 20
"""Largest size of a file in bytes, unless one tensor is larger. A thread writes a file, and one computes its
sha256, so a policy version is as fast as its largest file: vpmoe-6b has 24 files."""

ONLY_IN_TRAINING = ("main/projection",)
"""Parameters of the state that are not exported: the projection of TeacherForced."""

BIAS = ".e_score_correction_bias"
"""Suffix of the experts' selection biases."""

FLOAT32 = (BIAS, ".softmax_offset", ".value_mix", ".log_frequency")
"""Suffixes of the tensors that are fp32 for every dtype of the weights, as in training."""

ReadTensor = Callable[[str, int, int], Tensor]
"""`(name in the state, start, stop) -> [stop − start]`, on any device, in fp32 or in the type of the weights;
names as in vpmoe/model/state.py."""

SAFETENSORS = {torch.float32: "F32", torch.bfloat16: "BF16"}
"""safetensors' names of the types of exported tensors."""


@dataclass(frozen=True)
class ExportedTensor:
    """The origin of an exported tensor: [:, pick] of the state's tensor `source`, viewed as `view`."""

    source: str
    """Name in the state, as in state.py."""
    shape: tuple[int, ...]
    """Shape of the exported tensor."""
    view: tuple[int, ...]
    pick: slice | None = None
    """None: the whole of `source`."""

    def cut_from(self, flat: Tensor) -> Tensor:
        """The exported tensor, from all of `source`, flat."""
        whole = flat.view(self.view)
        return (whole if self.pick is None else whole[:, self.pick]).reshape(self.shape)


def exported_tensors(shape: Shape) -> dict[str, ExportedTensor]:
    """All tensors of a checkpoint by name.

    The trainer keeps queries, keys and values in one matrix: for each key-value head the rows of its
    queries, then of its key, then of its value.
    """
    table: dict[str, ExportedTensor] = {}

    def add(name: str, source: str, *size: int, kind: str = "main") -> None:
        table[name] = ExportedTensor(f"{kind}/{source}", size, size)

    def add_linear(name: str, source: str, rows: int, columns: int) -> None:
        add(f"{name}.weight", f"{source}.weight", rows, columns)
        if shape.linear_biases:
            add(f"{name}.bias", f"{source}.bias", rows)

    def add_qkv(to: str, of: str, kind: str, *columns: int) -> None:
        picks = {"q": slice(0, share), "k": slice(share, share + 1), "v": slice(share + 1, share + 2)}
        for letter, pick in picks.items():
            rows = shape.kv_heads * (pick.stop - pick.start) * width
            table[f"{to}.self_attn.{letter}_proj.{kind}"] = ExportedTensor(
                f"main/{of}.self_attention.linear_qkv.{kind}",
                (rows, *columns),
                (shape.kv_heads, share + 2, width * math.prod(columns)),
                pick,
            )

    hidden, width = shape.hidden, shape.head_width
    share = shape.heads // shape.kv_heads
    add("model.embed_tokens.weight", "embedding.weight", shape.vocabulary, hidden)
    add("model.norm.weight", "decoder.final_layernorm.weight", hidden)
    add("lm_head.weight", "output", shape.vocabulary, hidden)
    if shape.learned_frequencies:
        add("model.log_frequency", "log_frequency", width // 2)
    for number in range(shape.layers):
        to, of = f"model.layers.{number}", f"decoder.layers.{number}"
        add(f"{to}.input_layernorm.weight", f"{of}.input_layernorm.weight", hidden)
        if shape.ranks(number) is not None:
            own, theirs = f"{to}.self_attn.tensor_product", f"{of}.self_attention.tensor_product"
            add(f"{own}.weight", f"{theirs}.weight", shape.factors_width, hidden)
            if shape.linear_biases:
                add(f"{own}.bias", f"{theirs}.bias", shape.qkv_width)
        else:
            add_qkv(to, of, "weight", hidden)
            if shape.linear_biases:
                add_qkv(to, of, "bias")
        if shape.softmax_offset:
            add(
                f"{to}.self_attn.softmax_offset",
                f"{of}.self_attention.core_attention.offset",
                shape.heads,
            )
        if shape.value_residual and number > 0:
            add(f"{to}.self_attn.value_mix", f"{of}.self_attention.value_mix", 1)
        add(f"{to}.self_attn.q_norm.weight", f"{of}.self_attention.q_layernorm.weight", width)
        add(f"{to}.self_attn.k_norm.weight", f"{of}.self_attention.k_layernorm.weight", width)
        add_linear(f"{to}.self_attn.o_proj", f"{of}.self_attention.linear_proj", hidden, shape.heads * width)
        add(f"{to}.post_attention_layernorm.weight", f"{of}.pre_mlp_layernorm.weight", hidden)
        if number < shape.dense_layers:
            add_linear(f"{to}.mlp.up_proj", f"{of}.mlp.linear_fc1", shape.dense_width, hidden)
            add_linear(f"{to}.mlp.down_proj", f"{of}.mlp.linear_fc2", hidden, shape.dense_width)
            continue
        add(f"{to}.mlp.gate.weight", f"{of}.mlp.router.weight", shape.experts, hidden)
        if shape.router_bias:
            add(f"{to}.mlp.gate.bias", f"{of}.mlp.router.bias", shape.experts)
        add(f"{to}.mlp.gate{BIAS}", f"{of}.mlp.router.expert_bias", shape.experts, kind="buffer")
        add(f"{to}.mlp.experts.up", f"{of}.mlp.experts.up", shape.experts, shape.expert_width, hidden)
        add(f"{to}.mlp.experts.down", f"{of}.mlp.experts.down", shape.experts, hidden, shape.expert_width)
        if shape.linear_biases:
            for name, rows in (("up_bias", shape.expert_width), ("down_bias", hidden)):
                add(f"{to}.mlp.experts.{name}", f"{of}.mlp.experts.{name}", shape.experts, rows)
        shared, width_of_shared = f"{of}.mlp.shared_experts", shape.shared_width
        add_linear(f"{to}.mlp.shared_expert.up_proj", f"{shared}.linear_fc1", width_of_shared, hidden)
        add_linear(f"{to}.mlp.shared_expert.down_proj", f"{shared}.linear_fc2", hidden, width_of_shared)
    return table


def hf_config(shape: Shape, positions: int, dtype: torch.dtype) -> dict[str, Any]:
    """config.json: the shape in transformers' field names. `positions` is the longest sequence that the
    student was trained on."""
    return {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "first_k_dense_replace": shape.dense_layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_width,
        "intermediate_size": shape.dense_width,
        "n_routed_experts": shape.experts,
        "num_experts_per_tok": shape.experts_per_token,
        "moe_intermediate_size": shape.expert_width,
        "shared_expert_intermediate_size": shape.shared_width,
        "n_group": shape.expert_groups,
        "topk_group": shape.expert_groups_per_token,
        "routed_scaling_factor": shape.routed_scaling,
        "hidden_act": "relu2",
        "rms_norm_eps": shape.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(shape.rope_base)},
        "attention_bias": False,
        "tie_word_embeddings": False,
        "max_position_embeddings": positions,
        "bos_token_id": None,
        "eos_token_id": [RETURN, CALL],
        # transformers treats the padding id's embedding specially; here every id is an ordinary one.
        "pad_token_id": None,
        **shape.parts,
    }


def export_student(
    folder: Path,
    shape: Shape,
    positions: int,
    sizes: Mapping[str, int],
    read: ReadTensor,
    dtype: torch.dtype,
    threads: int = 1,
) -> None:
    """Write the student's weights and configuration into `folder`, config.json last.

    Raises Permanent as `write_weights` does.
    """
    write_weights(folder, shape, sizes, read, dtype, threads)
    (folder / "config.json").write_text(json.dumps(hf_config(shape, positions, dtype), indent=1))


def write_weights(
    folder: Path,
    shape: Shape,
    sizes: Mapping[str, int],
    read: ReadTensor,
    dtype: torch.dtype,
    threads: int = 1,
) -> None:
    """Write the weights into `folder`, which then has no config.json.

    `threads` files are written at the same time, in the order of their names, and of each one tensor is in
    memory: where `read` returns parts of a copy, as state.copy_weights does, writing is as fast as the disk.

    `sizes` maps the state's tensors to their numbers of elements (state.sizes, or a checkpoint's). Those of
    kind "main" and "buffer" are exported, and `read` returns them. With `dtype` bfloat16 they are rounded as
    the trainer rounds its weights. Raises Permanent if a tensor of the state is not in the shape, a tensor of
    the shape is not in the state, or their sizes differ.
    """
    table = exported_tensors(shape)
    wanted = {part.source: math.prod(part.view) for part in table.values()}
    held = {
        name: size
        for name, size in sizes.items()
        if name.startswith(("main/", "buffer/")) and name not in ONLY_IN_TRAINING
    }
    _same(held, wanted, f"the state to export as {shape.name}", "Give the shape that it was trained with.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    files = weights_by_file(shape, dtype)

    def write(file: str) -> None:
        _write_file(folder / file, {name: table[name] for name in files[file]}, read, dtype)

    for _ in in_order(write, files, threads):
        pass
    weight_map = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": weight_bytes(shape, dtype)}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1))


@torch.no_grad()
def _write_file(
    path: Path, tensors: Mapping[str, ExportedTensor], read: ReadTensor, dtype: torch.dtype
) -> None:
    """Write a safetensors file (https://huggingface.co/docs/safetensors), the same bytes as save_file's.

    save_file holds all tensors of a file twice, and the interpreter while it copies them, so that threads
    would write one after the other.
    """
    # as the library: larger types first, so that every tensor is aligned, then by name
    names = sorted(tensors, key=lambda name: (-stored_dtype(name, dtype).itemsize, name))
    header = write_header(
        TensorEntry(
            name,
            SAFETENSORS[stored_dtype(name, dtype)],
            list(tensors[name].shape),
            _nbytes(name, tensors[name], dtype),
        )
        for name in names
    )
    with path.open("wb", buffering=0) as file:
        _write_bytes(file, header)
        for name in names:
            part = tensors[name]
            tensor = part.cut_from(read(part.source, 0, math.prod(part.view)))
            stored = tensor.to("cpu", stored_dtype(name, dtype)).contiguous()
            _write_bytes(file, memoryview(stored.flatten().view(torch.uint8).numpy()))


def _write_bytes(file: RawIOBase, data: bytes | memoryview) -> None:
    """Write all of `data`: one call of the system writes at most 2 GiB."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The type of an exported tensor. `dtype`: the type of the weights."""
    return torch.float32 if name.endswith(FLOAT32) else dtype


def weight_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Bytes of all exported tensors."""
    return sum(_nbytes(name, part, dtype) for name, part in exported_tensors(shape).items())


def weights_by_file(shape: Shape, dtype: torch.dtype) -> dict[str, list[str]]:
    """The names of each file's tensors, in order; every file has at most FILE_BYTES, or one tensor."""
    files: list[list[str]] = [[]]
    filled = 0
    for name, part in exported_tensors(shape).items():
        size = _nbytes(name, part, dtype)
        if files[-1] and filled + size > FILE_BYTES:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    return {
        f"model-{number:05}-of-{len(files):05}.safetensors": names for number, names in enumerate(files, 1)
    }


def _nbytes(name: str, part: ExportedTensor, dtype: torch.dtype) -> int:
    return math.prod(part.shape) * stored_dtype(name, dtype).itemsize


def check_export(folder: Path, shape: Shape) -> None:
    """Raise Permanent, naming the field or the tensor, unless `folder` holds exactly a student of this shape.

    Call it before transformers or vLLM load the folder: if a tensor is missing, transformers only warns and
    fills it with random numbers. Reads headers only.
    """
    try:
        config = read_json_object(folder / "config.json")
        stored = read_folder(folder)
    except InvalidCheckpoint as error:
        raise Permanent(
            f"{folder} is not a complete checkpoint: {error} Export the student again."
        ) from error
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(str(config.get("dtype")))
    if dtype is None:
        raise Permanent(
            f"{folder}/config.json: dtype is {config.get('dtype')}. Students are exported in float32 or "
            "bfloat16."
        )
    found_parts = {name: config[name] for name in PARTS if name in config}
    if difference := other_parts(found_parts, shape):
        raise Permanent(f"{folder}: {difference}. Use an export of a student with the same parts.")
    fields = hf_config(shape, config.get("max_position_embeddings", 0), dtype)
    _same(
        {name: config.get(name) for name in fields},
        fields,
        f"{folder}/config.json, not a {shape.name}",
        "Export the student again.",
    )
    wanted = {
        name: (SAFETENSORS[stored_dtype(name, dtype)], list(part.shape))
        for name, part in exported_tensors(shape).items()
    }
    found = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in stored.items()}
    _same(found, wanted, str(folder), "Export the student again.")


def weight_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that check_export has accepted."""
    return [folder / file for file in sorted({tensor.file for tensor in read_folder(folder).values()})]


def _same(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str, remedy: str) -> None:
    """Raise Permanent with the first name whose value differs or that only one of the two has."""
    for name in sorted({*found, *wanted}):
        if name not in found:
            raise Permanent(f"{where}: {name} is missing. {remedy}")
        if name not in wanted:
            raise Permanent(f"{where}: {name} is not a part of this student. {remedy}")
        if found[name] != wanted[name]:
            raise Permanent(f"{where}: {name} is {found[name]}, wanted {wanted[name]}. {remedy}")
