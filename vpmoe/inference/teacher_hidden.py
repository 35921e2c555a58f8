"""The teacher's final hidden states from vLLM, for students that train beside it: documents of token ids in,
one row a token out.

vLLM packs many documents into a forward, without padding, and computes a GPT-OSS in MXFP4 as it is stored.
Scores are teacher_engine.py's; where documents come from and where rows go is up to the caller.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vpmoe.data.tokenizer import Ids
from vpmoe.inference.teacher_engine import check_loadable, load_vllm
from vpmoe.inference.vllm_options import Device, check_attention, check_device, prepare_environment
from vpmoe.process.memory import no_collection
from vpmoe.teacher import model
from vpmoe.teacher.weights import check_weights

FORWARD_TOKENS: dict[Device, int] = {"cpu": 2048, "cuda": 16_384}
"""Tokens of one forward. A longer document is computed in chunks. There are no logits, so more would fit, but
a GPU is busy at this size."""


class HiddenStateEngine:
    """A loaded teacher without its output matrix. One per process; it lives until the process ends."""

    def __init__(self, directory: Path, max_length: int) -> None:
        """Load the model in `directory` for documents of up to `max_length` tokens.

        Raises Permanent if the model is not whole, and as check_loadable and load_vllm do.
        """
        check_weights(directory)
        check_loadable(directory, max_length)
        self._load(directory, max_length)

    def _load(self, directory: Path, max_length: int, **options: Any) -> None:
        """`options`: of vllm.LLM, in place of this engine's."""
        with no_collection():
            from vpmoe.inference import teacher_hidden_model
            from vpmoe.inference.teacher_model import TASK

        self.max_length = max_length
        self.device = teacher_device()
        self.dtype: torch.dtype = getattr(torch, model.checkpoint_dtype(directory))
        self.width = int(model.read_config(directory)["hidden_size"])
        device: Device = "cuda" if self.device.type == "cuda" else "cpu"
        self._llm = load_vllm(
            directory,
            device,
            max_length,
            FORWARD_TOKENS[device],
            teacher_hidden_model.register,
            **options,
        )
        check_attention(self._llm, "the teacher")
        self._task, self._request = TASK, teacher_hidden_model.request
        (self._pooler,) = self._llm.apply_model(_pooler)

    def hidden_states(self, documents: Sequence[Ids]) -> Tensor:
        """Final hidden states, after the last norm, of all documents one after another: [their tokens, width]
        in the model's dtype, on the engine's device.

        No document attends to another; positions begin at 0 in each. On the CPU the same documents in the
        same order have the same bits. Raises ValueError if one is empty or longer than `max_length`.
        """
        lengths = [len(ids_T) for ids_T in documents]
        for length in lengths:
            if not 0 < length <= self.max_length:
                raise ValueError(
                    f"a document of {length} ids, and the teacher was loaded for 1 to {self.max_length}"
                )
        answer_TG = torch.empty(sum(lengths), self.width, dtype=self.dtype, device=self.device)
        if documents:
            self._pooler.answer_TG = answer_TG
            self._forward(documents)
            self._pooler.answer_TG = None
        return answer_TG

    def _forward(self, documents: Sequence[Ids]) -> None:
        """Have vLLM compute them. Returns when the device has."""
        starts = np.cumsum([0, *map(len, documents[:-1])]).tolist()
        self._llm.encode(
            [{"prompt_token_ids": ids_T.tolist()} for ids_T in documents],
            [self._request(start) for start in starts],
            pooling_task=self._task,
            use_tqdm=False,
        )


def teacher_device() -> torch.device:
    """The device that the engine computes on: the first GPU that this process sees, because vLLM has no
    other, or the CPU if CUDA_VISIBLE_DEVICES is set and empty. Raises Permanent as check_device does."""
    prepare_environment()
    return torch.device("cpu" if check_device("the teacher", "spec.teacher.gpus") == "cpu" else "cuda:0")


def _pooler(model: Any) -> Any:
    """The model's pooler, which is in this process."""
    return model.pooler
