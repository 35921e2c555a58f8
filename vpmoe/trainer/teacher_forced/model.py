"""The teacher of a TeacherForced stage: its files, and its final hidden states of packed documents. The
students compute the logits.

It is transformers' own model of the checkpoint, without the output matrix, in the type that the checkpoint
declares; experts stored in MXFP4 are widened to it. Each document is a row of its own, right-padded.
Attention is causal, so no document sees padding or another document, and positions begin at 0 in each.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from torch import Tensor

from vpmoe.checkpoint.safetensors_header import read_folder
from vpmoe.failure import Permanent, Retriable
from vpmoe.teacher.model import read_config
from vpmoe.teacher.uniform import UniformCheck
from vpmoe.teacher.weights import EMBEDDING, HEAD, check_weights, is_mxfp4
from vpmoe.trainer.teacher_forced.protocol import DocumentRange

ROOM = 16_384
"""Positions of one forward, padding included. A longer document has a forward of its own."""
PADDING = 0
"""Token after a document's end. No document attends to it, so its value does not matter."""
PROBE = 64
"""Ids that the model scores once, before training."""
COMPILED = 64
"""Variants that may be compiled of each function of FlexAttention. Eight are: for a window and for all
positions, for one document and several, for the first shape and then for any. So dynamo's default of 8 has
no room."""


def load_teacher(directory: Path, device: torch.device) -> torch.nn.Module:
    """The model in `directory`, for inference.

    Raises Permanent if the checkpoint is not whole, or if transformers cannot load it.
    """
    check_weights(directory)
    from transformers import AutoModel, Mxfp4Config  # here, because it takes seconds
    from transformers.utils import logging

    logging.set_verbosity_error()  # it warns that the output matrix is not used
    logging.disable_progress_bar()
    packed = is_mxfp4(read_config(directory))
    # Attention with sinks is an [L, L] matrix a head in "eager"; on a GPU flex_attention does without.
    attention = "flex_attention" if device.type == "cuda" else "eager"
    if attention == "flex_attention":
        forbid_eager_attention()
    try:
        model, loaded = AutoModel.from_pretrained(
            directory,
            output_loading_info=True,
            dtype="auto",
            attn_implementation=attention,
            local_files_only=True,
            **({"quantization_config": Mxfp4Config(dequantize=True)} if packed else {}),
        )
    except (ValueError, KeyError, AttributeError, OSError, ImportError, StrictDataclassError) as error:
        raise Permanent(f"teacher.model: transformers cannot load it: {error}") from error
    _check_loaded(loaded)
    return model.to(device).eval().requires_grad_(False)  # type: ignore[no-any-return]


def forbid_eager_attention() -> None:
    """Make it an error in this process if FlexAttention is compiled too often.

    Beyond its limit dynamo falls back to attention that is not compiled and materialises [L, L], with only a
    warning (https://github.com/vllm-project/vllm/issues/27178).
    """
    torch._dynamo.config.recompile_limit = COMPILED
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def check_output(model: Any, output_VG: Tensor) -> None:
    """Raise Permanent if the model and its output matrix give every token the same probability, or none.

    `output_VG` is on the model's device. The ids are spread over the vocabulary.
    """
    ids_T = torch.arange(PROBE, device=output_VG.device) * (len(output_VG) // PROBE)
    hidden_TG = hidden_states(model, ids_T, [DocumentRange(0, PROBE)]).to(output_VG.dtype)
    logp_TV = (hidden_TG[:-1] @ output_VG.T).float().log_softmax(1)
    logp_T = logp_TV.gather(1, ids_T[1:, None])[:, 0].cpu().numpy()
    if not np.isfinite(logp_T).all():
        raise Permanent(
            "teacher.model: its log-probabilities are not finite. Its weights may hold numbers that are not "
            "finite, or overflow in their dtype; try another checkpoint."
        )
    UniformCheck(f"a probe of {PROBE} ids", len(output_VG)).add(logp_T)


def _check_loaded(loaded: Mapping[str, Collection[Any]]) -> None:
    """Raise Permanent if transformers has not put every tensor of the checkpoint into the model as it is.

    It would draw the others at random. `loaded` is its loading info. The output matrix is not a part of this
    model.
    """
    faults = {kind: sorted(map(str, set(names) - {HEAD})) for kind, names in loaded.items()}
    for kind, names in faults.items():
        if names:
            raise Permanent(
                f"teacher.model: transformers reports {kind.replace('_', ' ')}: {', '.join(names[:3])}"
                f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}. Save the model again with the "
                "version of transformers that is installed here."
            )


def width(directory: Path) -> int:
    """The width G of its hidden states."""
    return int(read_config(directory)["hidden_size"])


def output_matrix(directory: Path) -> Tensor:
    """The matrix [V, G] from hidden states to logits, on the CPU. Reads no other tensor.

    Raises Permanent if there is none, InvalidCheckpoint as read_folder does.
    """
    found = read_folder(directory)
    name = HEAD if HEAD in found or not read_config(directory).get("tie_word_embeddings") else EMBEDDING
    if name not in found:
        raise Permanent(f"teacher.model: {name} is missing. Give a whole Hugging Face checkpoint.")
    with safe_open(directory / found[name].file, framework="pt") as file:
        return file.get_tensor(name)  # type: ignore[no-any-return]


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

    `tokens_T` are the ids of a microbatch in the order of its positions, on the model's device. Raises
    Retriable if attention would be computed without compilation.
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
        try:
            found_BLG = model(input_ids=tokens_BL, use_cache=False).last_hidden_state
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise Retriable(
                f"the teacher's FlexAttention was compiled {COMPILED} times, for the shapes of this stage's "
                f"documents, the last {list(tokens_BL.shape)}. The next attempt starts with none."
            ) from error
        for row, (start, length) in enumerate(batch):
            hidden_TG[start : start + length] = found_BLG[row, :length]
    return hidden_TG
