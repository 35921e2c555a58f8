"""The teacher of a TeacherForced stage: its files, and its final hidden states of packed documents. The
students compute the logits.

It is transformers' own model of the checkpoint, without the output matrix, in the type that the checkpoint
declares; experts stored in MXFP4 are widened to it. Each document is a row of its own, right-padded.
Attention is causal, so no document sees padding or another document, and positions begin at 0 in each.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from vpmoe.failure import Permanent
from vpmoe.trainer.teacher_forced.protocol import DocumentRange

ROOM = 16_384
"""Positions of one forward, padding included. A longer document has a forward of its own."""
PADDING = 0
"""Token after a document's end. No document attends to it, so its value does not matter."""


def load_teacher(directory: Path, device: torch.device) -> torch.nn.Module:
    """The model in `directory`, for inference. Raises Permanent if transformers cannot load it."""
    from transformers import AutoModel, Mxfp4Config  # here, because it takes seconds
    from transformers.utils import logging

    logging.set_verbosity_error()  # it warns that the output matrix is not used
    logging.disable_progress_bar()
    packed = _config(directory).get("quantization_config", {}).get("quant_method") == "mxfp4"
    # Attention with sinks is an [L, L] matrix a head in "eager"; on a GPU flex_attention does without.
    attention = "flex_attention" if device.type == "cuda" else "eager"
    try:
        model = AutoModel.from_pretrained(
            directory,
            dtype="auto",
            attn_implementation=attention,
            local_files_only=True,
            **({"quantization_config": Mxfp4Config(dequantize=True)} if packed else {}),
        )
    except (ValueError, OSError, ImportError) as error:
        raise Permanent(f"teacher.model: transformers cannot load it: {error}") from error
    return model.to(device).eval().requires_grad_(False)  # type: ignore[no-any-return]


def width(directory: Path) -> int:
    """The width G of its hidden states."""
    return int(_config(directory)["hidden_size"])


def output_matrix(directory: Path) -> Tensor:
    """The matrix [V, G] from hidden states to logits, on the CPU. Reads no other tensor.

    Raises Permanent if there is none.
    """
    names = [
        "lm_head.weight",
        *(["model.embed_tokens.weight"] if _config(directory).get("tie_word_embeddings") else []),
    ]
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in names:
                if name in file.keys():  # noqa: SIM118 (it is no dictionary)
                    found: Tensor = file.get_tensor(name)
                    return found
    raise Permanent(
        f"teacher.model: no *.safetensors file holds {' or '.join(names)}. Give a whole Hugging Face "
        "checkpoint."
    )


def _config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())  # type: ignore[no-any-return]


def batches_by_length(documents: Sequence[DocumentRange], room: int) -> Iterator[list[DocumentRange]]:
    """The documents in batches of similar lengths, each of at most `room` positions with padding, or of one
    longer document."""
    batch: list[DocumentRange] = []
    for document in sorted(documents, key=lambda run: (-run.length, run.start)):
        if batch and (len(batch) + 1) * batch[0].length > room:
            yield batch
            batch = []
        batch.append(document)
    if batch:
        yield batch


@torch.no_grad()
def hidden_states(
    model: Any, tokens_T: Tensor, documents: Sequence[DocumentRange], room: int = ROOM
) -> Tensor:
    """The final hidden states [T, G], after the last norm, in the model's type; 0 at padding.

    `tokens_T` are the ids of a microbatch in the order of its positions, on the model's device.
    """
    hidden_TG = torch.zeros(
        len(tokens_T), model.config.hidden_size, dtype=model.dtype, device=tokens_T.device
    )
    for batch in batches_by_length(documents, room):
        tokens_BL = torch.full(
            (len(batch), batch[0].length), PADDING, dtype=torch.int64, device=tokens_T.device
        )
        for row, (start, length) in enumerate(batch):
            tokens_BL[row, :length] = tokens_T[start : start + length]
        found_BLG = model(input_ids=tokens_BL, use_cache=False).last_hidden_state
        for row, (start, length) in enumerate(batch):
            hidden_TG[start : start + length] = found_BLG[row, :length]
    return hidden_TG
