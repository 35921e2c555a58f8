"""Hugging Face checkpoints of any size, of headers and holes: sparse files without any tensor's bytes."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vpmoe.checkpoint.safetensors_header import BITS, INDEX, SINGLE

Entries = Mapping[str, tuple[str, Sequence[int]]]
"""(dtype, shape) by name."""


def header_of(tensors: Entries) -> dict[str, Any]:
    """The header of a file that holds these tensors one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stop = 0
    for name, (dtype, shape) in tensors.items():
        start, stop = stop, stop + math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
    return header


def write_file(path: Path, header: Mapping[str, Any] | bytes, data_bytes: int | None = None) -> None:
    """Write a safetensors file with this header. `data_bytes`: of its data; None: as the header says."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    if data_bytes is None:
        assert not isinstance(header, bytes)
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        data_bytes = max((entry["data_offsets"][1] for entry in entries), default=0)
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + data_bytes)


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Entries, shards: int = 1) -> Path:
    """Write a checkpoint: config.json, and the tensors in `shards` files, with an index if several."""
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write_file(folder / SINGLE, header_of(tensors))
        return folder
    weight_map: dict[str, str] = {}
    names = list(tensors)
    for number in range(shards):
        file = f"model-{number:05d}-of-{shards - 1:05d}.safetensors"  # OpenAI counts from 0 to 2
        of_file = names[number::shards]
        write_file(folder / file, header_of({name: tensors[name] for name in of_file}))
        weight_map |= dict.fromkeys(of_file, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder
