"""Checkpoints in the format of OpenAI's releases: they are accepted, and refused with a name where one lacks
something. tests/gpu/test_teacher.py scores with them."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.fakes import mxfp4_teacher
from tests.fakes.students import new_seed
from vpmoe.checkpoint.safetensors_header import INDEX
from vpmoe.failure import Permanent
from vpmoe.inference.teacher_engine import check_kernels
from vpmoe.teacher.model import checkpoint_dtype
from vpmoe.teacher.weights import check_weights

SMALLEST: dict[str, Any] = {
    **mxfp4_teacher.SMALL,
    "hidden_size": 64,
    "intermediate_size": 32,
    "vocab_size": 256,
}


@pytest.fixture(scope="module")
def seed() -> int:
    return new_seed()


def test_the_released_format_is_accepted(tmp_path: Path, seed: int) -> None:
    folder = mxfp4_teacher.write(tmp_path, SMALLEST, seed)
    check_weights(folder)
    assert checkpoint_dtype(folder) == "bfloat16", "of the output matrix, as config.json declares none"


@pytest.mark.parametrize(
    "missing",
    [
        "model.layers.1.mlp.experts.down_proj_scales",
        "model.layers.0.mlp.experts.gate_up_proj_blocks",
        "model.layers.0.mlp.experts.gate_up_proj_bias",
        "model.layers.1.self_attn.sinks",
    ],
)
def test_a_tensor_that_is_missing_is_named(tmp_path: Path, seed: int, missing: str) -> None:
    folder = mxfp4_teacher.write(tmp_path, SMALLEST, seed)
    index = json.loads((folder / INDEX).read_text())
    file = folder / index["weight_map"].pop(missing)
    tensors = load_file(file)
    del tensors[missing]
    save_file(tensors, file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(Permanent, match=f"^teacher.model: {missing} is missing"):
        check_weights(folder)


def test_a_shard_that_is_missing_is_named(tmp_path: Path, seed: int) -> None:
    folder = mxfp4_teacher.write(tmp_path, SMALLEST, seed)
    name = "model-00001-of-00002.safetensors"
    (folder / name).unlink()
    with pytest.raises(Permanent, match=name):
        check_weights(folder)


def test_it_is_refused_on_the_cpu(tmp_path: Path, seed: int) -> None:
    folder = mxfp4_teacher.write(tmp_path, SMALLEST, seed)
    check_kernels(folder, "cuda")
    with pytest.raises(Permanent, match="experts are in MXFP4, for which vLLM has no kernel on the CPU"):
        check_kernels(folder, "cpu")
