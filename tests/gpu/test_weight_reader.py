"""Weights that are read into pinned memory and copied to the GPU are those of the files."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.fakes.model_folders import random_weights
from tests.fakes.policy_versions import COMPLETE_TINY
from vpmoe.inference.weight_reader import WeightReader
from vpmoe.model import hf_export


def test_tensors_on_the_gpu_are_those_of_the_files(
    gpu: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two checkpoints, in files of few tensors: a buffer is filled again as soon as its copy is done."""
    monkeypatch.setattr(hf_export, "FILE_BYTES", 1 << 20)
    sizes = {p.source: math.prod(p.view) for p in hf_export.exported_tensors(COMPLETE_TINY).values()}
    reader = WeightReader(pinned=True)
    for dtype in (torch.bfloat16, torch.float32):
        folder = tmp_path / str(dtype)
        hf_export.write_weights(folder, COMPLETE_TINY, sizes, random_weights, dtype, threads=4)
        expected = {k: v for file in hf_export.weight_files(folder) for k, v in load_file(file).items()}
        found: dict[str, torch.Tensor] = {}
        for name, tensor in reader.read(folder):
            assert tensor.is_pinned()
            found[name] = torch.empty_like(tensor, device=gpu)
            found[name].copy_(tensor)
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor.cpu(), expected[name]), name
