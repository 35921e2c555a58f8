"""Write an upcycled student into a folder, for `vpmoe init`: its weights under the trainer's names, and a
manifest of what they were made from. The folder appears whole or not at all.

The weights are one safetensors file, written tensor by tensor, so that one is in memory at a time.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vpmoe.checkpoint.safetensors_header import LENGTH_BYTES
from vpmoe.failure import Permanent
from vpmoe.provenance import git_sha
from vpmoe.storage.errors import StorageError
from vpmoe.storage.local import written_whole
from vpmoe.storage.scratch import temporary_folder
from vpmoe.upcycle.build import Upcycling

WEIGHTS, MANIFEST = "model.safetensors", "manifest.json"
REMEDY = "Free space there, or name a folder on a larger disk."


def write_model_folder(folder: Path, made: Upcycling) -> None:
    """Write model.safetensors and manifest.json into the new folder `folder`.

    Raises Permanent if `folder` exists; StorageError (Local) if the disk cannot hold it; OSError if a file of
    the source cannot be read.
    """
    if os.path.lexists(folder):
        raise Permanent(f"{folder} exists. Name a new folder, or remove it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    needed = weight_bytes(made.sizes())
    if (free := shutil.disk_usage(folder.parent).free) < needed:
        raise StorageError(f"{folder} needs {needed} bytes, and {free} are free. {REMEDY}", "Local")
    with temporary_folder(folder.parent) as scratch:
        whole = scratch / "model"
        whole.mkdir()
        with written_whole(whole / WEIGHTS, needed, str(folder), REMEDY) as file:
            sha256 = _write_weights(file, made)
        content = {"weights": {"file": WEIGHTS, "sha256": sha256}, "commit": git_sha(), **made.facts()}
        data = (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
        with written_whole(whole / MANIFEST, len(data), str(folder), REMEDY) as file:
            file.write(data)
        for name in (WEIGHTS, MANIFEST):
            (whole / name).chmod(0o644)  # temporary files are private
        whole.rename(folder)


def weight_bytes(sizes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of the weights' file."""
    return len(_header(sizes)) + sum(4 * math.prod(size) for size in sizes.values())


def _header(sizes: Mapping[str, tuple[int, ...]]) -> bytes:
    """The length and the header of a safetensors file of fp32 tensors in this order."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, size in sizes.items():
        stop = start + 4 * math.prod(size)
        entries[name] = {"dtype": "F32", "shape": list(size), "data_offsets": [start, stop]}
        start = stop
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)  # the data begins at a multiple of 8
    return len(header).to_bytes(LENGTH_BYTES, "little") + header


def _write_weights(file: BinaryIO, made: Upcycling) -> str:
    """Write the file; returns its sha256."""
    digest = hashlib.sha256()
    header = _header(made.sizes())
    file.write(header)
    digest.update(header)
    for _, tensor in made.tensors():
        data = memoryview(np.ascontiguousarray(tensor.numpy(), dtype="<f4")).cast("B")
        file.write(data)
        digest.update(data)
    return digest.hexdigest()
