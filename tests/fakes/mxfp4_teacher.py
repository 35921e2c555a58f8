"""GPT-OSS checkpoints of random weights in the format of OpenAI's releases: BF16, experts in MXFP4.

Each layer is a file of its own, written before the next one is drawn, so memory holds one layer of any size.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.fakes.teacher_configs import GPT_OSS_20B
from vpmoe.checkpoint.safetensors_header import INDEX
from vpmoe.teacher.weights import wanted_tensors

SMALL: dict[str, Any] = {
    **GPT_OSS_20B,
    "hidden_size": 320,
    "intermediate_size": 320,
    "layer_types": ["sliding_attention", "full_attention"],
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
}
"""A release in small. As 2880, its width is no multiple of 128, to which kernels for MXFP4 pad."""
EXPONENT_BIAS = 127
"""Of scales in E8M0."""
ROOT_MEAN_SQUARE = 2.93
"""Of the 16 numbers of E2M1."""


def write(folder: Path, config: Mapping[str, Any] = SMALL, seed: int = 0, device: str = "cpu") -> Path:
    """Write the model directory of `config`, without tokenizer files; returns it.

    Each layer adds as much as the hidden states have, so that every part changes every logit, and logits
    spread by about 2. Random numbers are drawn on `device`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator(device).manual_seed(seed)
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for tensor in wanted_tensors(config):
        layer = tensor.name.split(".")[2] if tensor.name.startswith("model.layers.") else "rest"
        files.setdefault(layer, {})[tensor.name] = tensor.shape
    weight_map = {}
    for number, shapes in enumerate(files.values()):
        name = f"model-{number:05d}-of-{len(files) - 1:05d}.safetensors"  # OpenAI counts from 0
        drawn = {each: _draw(each, shape, generator).cpu() for each, shape in shapes.items()}
        save_file(drawn, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shapes, name)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
    return folder


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    device = generator.device
    if name.endswith("_blocks"):
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)
    if name.endswith("_scales"):
        columns = shape[-1] * 32
        middle = EXPONENT_BIAS + int(torch.tensor(columns**-0.5 / ROOT_MEAN_SQUARE).log2().floor())
        return torch.randint(middle, middle + 2, shape, dtype=torch.uint8, device=device, generator=generator)
    drawn = torch.randn(shape, device=device, generator=generator)
    if name.endswith("norm.weight"):
        return (1 + 0.1 * drawn).bfloat16()
    if name == "lm_head.weight":
        return (2 * shape[-1] ** -0.5 * drawn).bfloat16()
    if name.endswith("bias"):
        return (0.2 * drawn).bfloat16()
    if name.endswith("sinks"):
        return (5 + drawn).bfloat16()  # some 200 positions weigh as much
    if name == "model.embed_tokens.weight":
        return drawn.bfloat16()
    return (shape[-1] ** -0.5 * drawn).bfloat16()
