"""Writes the student as a local model folder in Hugging Face layout, whole or not at all.

transformers opens the folder without this package, by the code in it; vLLM with this package as plugin. The
code in it is that of vpmoe.model, byte for byte. docs/reference/student.md lists the files.
"""

import json
import os
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from vpmoe.checkpoint.format import READ_TOGETHER
from vpmoe.data.harmony import SystemMessage
from vpmoe.data.vocabulary import PADDING, STOP_IDS
from vpmoe.export.chat_template import chat_template
from vpmoe.export.tokenizer_files import tokenizer_config, tokenizer_json
from vpmoe.failure import Permanent
from vpmoe.model import hf_export
from vpmoe.model.hf_export import ARCHITECTURE, ReadTensor
from vpmoe.model.shapes import Shape
from vpmoe.storage.errors import StorageError
from vpmoe.storage.scratch import lock_new_folder, remove_leftovers

CODE = ("configuration_vpmoe.py", "grouped.py", "modeling_vpmoe.py", "tensor_product.py")
"""Files of vpmoe.model that the folder has too. They import each other by relative names, and of other
packages only torch and transformers."""

AUTO_MAP = {
    "AutoConfig": "configuration_vpmoe.VpmoeConfig",
    "AutoModelForCausalLM": f"modeling_vpmoe.{ARCHITECTURE}",
}
"""Field of config.json: what transformers loads with trust_remote_code."""

GENERATION = {
    "do_sample": True,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "eos_token_id": list(STOP_IDS),
    "pad_token_id": PADDING,
}
"""Content of generation_config.json: sampling as in evaluation and in OnPolicy stages, from the whole
vocabulary at temperature 1. top_k: 0 is no limit; transformers' default is 50."""

OTHER_FILES_BYTES = 32 << 20
"""Upper bound of the files beside the weights: tokenizer.json has 12 MB."""


def write_model_folder(
    folder: Path,
    shape: Shape,
    *,
    sizes: Mapping[str, int],
    read: ReadTensor,
    dtype: torch.dtype,
    positions: int,
    system: SystemMessage,
) -> None:
    """Write weights, configuration, modeling code, tokenizer and chat template into the new folder `folder`.

    `sizes` and `read`: the weights, such as those of `vpmoe.checkpoint.format.open_weights`. READ_TOGETHER
    files are written at the same time, with a tensor of each in memory, and `read` may raise to stop. `dtype`
    is bfloat16 or float32. `positions`: the longest sequence that the student was trained on
    (training.sequenceLength). `system`: the run's system message (spec.dataset.conversation), which the chat
    template writes when a conversation does not override it.

    The folder appears under its name when all files are written and synced. A process that is killed leaves
    a temporary folder beside it (`vpmoe_*`), which the next call for a folder of the same parent removes.

    Raises Permanent if `folder` exists or the weights are not a whole student of this shape; StorageError
    (Local, with the bytes that are needed) if the disk is full or cannot be written; and what `read` raises.
    """
    if folder.exists():
        raise Permanent(f"{folder} exists already. Remove it, or name another folder.")
    needed = hf_export.weight_bytes(shape, dtype) + OTHER_FILES_BYTES
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder.parent)
        if (free := shutil.disk_usage(folder.parent).free) < needed:
            raise OSError(f"{free} bytes are free")
        temporary, lock = lock_new_folder(folder.parent)
        try:
            hf_export.write_weights(temporary, shape, sizes, read, dtype, READ_TOGETHER)
            for name, content in _other_files(shape, dtype, positions, system).items():
                (temporary / name).write_bytes(content)
            for path in sorted(temporary.iterdir()):
                path.chmod(0o644)  # whatever the umask
                _sync(path)
            temporary.chmod(0o755)
            _sync(temporary)
            hf_export.check_export(temporary, shape)
            temporary.rename(folder)
            _sync(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            with lock:
                Path(lock.name).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be written: {error}. The model needs {needed} bytes there; free space, or name "
            "a folder on a larger disk.",
            "Local",
        ) from error


def model_config(shape: Shape, positions: int, dtype: torch.dtype) -> dict[str, Any]:
    """The content of config.json."""
    return {
        **hf_export.hf_config(shape, positions, dtype),
        "auto_map": AUTO_MAP,
        "transformers_version": version("transformers"),
    }


def _other_files(shape: Shape, dtype: torch.dtype, positions: int, system: SystemMessage) -> dict[str, bytes]:
    """The files beside the weights, config.json last: without it no library takes the folder for a model."""
    return {
        **{name: (files("vpmoe.model") / name).read_bytes() for name in CODE},
        "tokenizer.json": tokenizer_json().encode(),
        "tokenizer_config.json": _json(tokenizer_config(positions)),
        "chat_template.jinja": chat_template(system).encode(),
        "generation_config.json": _json(GENERATION),
        "config.json": _json(model_config(shape, positions, dtype)),
    }


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _sync(path: Path) -> None:
    """Write a file or folder through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
