"""What a TeacherForced stage reads of its teacher itself: width and output matrix, with which the students
compute the logits. vpmoe.inference.teacher_hidden computes the hidden states."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from safetensors import safe_open
from torch import Tensor

from vpmoe.checkpoint.safetensors_header import read_folder
from vpmoe.data.tokenizer import Ids
from vpmoe.failure import Permanent
from vpmoe.teacher.model import read_config
from vpmoe.teacher.uniform import UniformCheck
from vpmoe.teacher.weights import EMBEDDING, HEAD

PROBE = 64
"""Ids that the model scores once, before training."""

HiddenStates = Callable[[Sequence[Ids]], Tensor]
"""Final hidden states [tokens, G] of documents, one after another: HiddenStateEngine.hidden_states."""


def check_output(hidden_states: HiddenStates, output_VG: Tensor) -> None:
    """Raise Permanent if the model and its output matrix give every token the same probability, or none.

    `output_VG` is on the model's device. The ids are spread over the vocabulary.
    """
    ids_T = np.arange(PROBE, dtype=np.int32) * (len(output_VG) // PROBE)
    hidden_TG = hidden_states([ids_T]).to(output_VG.dtype)
    logp_TV = (hidden_TG[:-1] @ output_VG.T).float().log_softmax(1).cpu().numpy()
    logp_T = np.take_along_axis(logp_TV, ids_T[1:, None].astype(np.int64), 1)[:, 0]
    if not np.isfinite(logp_T).all():
        raise Permanent(
            "teacher.model: its log-probabilities are not finite. Its weights may hold numbers that are not "
            "finite, or overflow in their dtype; try another checkpoint."
        )
    UniformCheck(f"a probe of {PROBE} ids", len(output_VG)).add(logp_T)


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
