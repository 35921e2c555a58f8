"""The teacher in vLLM: takes sequences of token ids, returns the log-probability of each token given those
before.

The reason why vLLM runs in this process is in vllm_options.py. What the ids are and where the results go is
up to the caller.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpmoe.api.card import GIB
from vpmoe.data.tokenizer import Ids
from vpmoe.data.vocabulary import VOCABULARY_SIZE
from vpmoe.failure import Permanent
from vpmoe.inference.vllm_options import (
    STEP_TOKENS,
    Device,
    check_attention,
    check_device,
    cpu_memory_error,
    engine_options,
    is_about_memory,
    prepare_environment,
    token_batches,
)
from vpmoe.plan.scoring import TEACHER_SHARE, forward_tokens, needed_to_score
from vpmoe.plan.teacher import TeacherSize
from vpmoe.process.memory import no_collection
from vpmoe.teacher import model
from vpmoe.teacher.weights import HEAD, check_weights, has_output_matrix, is_mxfp4

log = logging.getLogger(__name__)

MAX_SEQUENCES: dict[Device, int] = {"cpu": 32, "cuda": 256}
"""Sequences of one forward, at most. Documents of 64 tokens fill one on a GPU."""

BATCH_FORWARDS = 4
"""Forwards for which vLLM gets sequences in one call: on a GPU a second of work, after which a job can
stop."""


class TeacherEngine:
    """A loaded teacher. One per process; it lives until the process ends."""

    def __init__(self, directory: Path, max_length: int) -> None:
        """Load the model in `directory` to score sequences of up to `max_length` tokens.

        Raises Permanent if the model is not whole, has another vocabulary or a shorter context, or if there
        is no GPU for it.
        """
        model.check_vocabulary(directory)
        check_weights(directory)
        if not has_output_matrix(directory):
            raise Permanent(
                f"teacher.model: {HEAD} is missing, and vLLM does not tie GPT-OSS' output to its embeddings. "
                "Save the model with tie_word_embeddings false and an output matrix of its own."
            )
        device = check_loadable(directory, max_length)
        self.max_length = max_length
        self.forward_tokens = STEP_TOKENS["cpu"] if device == "cpu" else tokens_on_gpu(directory, max_length)
        with no_collection():
            from vpmoe.inference import teacher_model

        self._llm = load_vllm(directory, device, max_length, self.forward_tokens, teacher_model.register)
        check_attention(self._llm, "the teacher")

    def score(
        self, sequences: Iterable[Ids], check_stop: Callable[[], None] = lambda: None
    ) -> Iterator[NDArray[np.float32]]:
        """For each sequence of T ids, [T] float32: the log-probability of each id given those before; NaN for
        the first.

        Consumes `sequences` lazily, those of BATCH_FORWARDS at a time, and calls `check_stop`, which may
        raise, before each batch. Raises ValueError if a sequence is longer than `max_length` or has an id
        outside of the vocabulary.
        """
        for batch in token_batches(sequences, BATCH_FORWARDS * self.forward_tokens):
            check_stop()
            yield from self._score(batch)

    def _score(self, batch: list[Ids]) -> Iterator[NDArray[np.float32]]:
        for ids_T in batch:
            if len(ids_T) > self.max_length:
                raise ValueError(
                    f"{len(ids_T)} ids, and the teacher was loaded for {self.max_length} at most"
                )
            if len(ids_T) and not 0 <= ids_T.min() <= ids_T.max() < VOCABULARY_SIZE:
                raise ValueError(
                    f"ids from {ids_T.min()} to {ids_T.max()}, and the vocabulary has ids from 0 to "
                    f"{VOCABULARY_SIZE - 1}"
                )
        from vpmoe.inference.teacher_model import TASK

        prompts = [{"prompt_token_ids": ids_T.tolist()} for ids_T in batch if len(ids_T) > 1]
        outputs = iter(self._llm.encode(prompts, pooling_task=TASK, use_tqdm=False) if prompts else [])
        for ids_T in batch:
            logp_T = np.full(len(ids_T), np.nan, np.float32)
            if len(ids_T) > 1:
                next_T = next(outputs).outputs.data.numpy()  # of the id after each
                if next_T.shape != ids_T.shape:
                    raise RuntimeError(f"vLLM returned {next_T.shape} scores of {len(ids_T)} ids")
                logp_T[1:] = next_T[:-1]
            yield logp_T


def check_loadable(directory: Path, max_length: int) -> Device:
    """The device for the model in `directory`, which is to read texts of up to `max_length` tokens.

    Raises Permanent if it has a shorter context, if transformers cannot read its configuration, if there is
    no GPU, or if vLLM has no kernels for the experts on the CPU.
    """
    positions = model.read_config(directory).get("max_position_embeddings")
    if positions is not None and max_length > positions:
        raise Permanent(
            f"teacher.model: max_position_embeddings is {positions}, and the longest document is "
            f"{max_length} tokens. Lower dataset.maxLength, or use a model with a longer context."
        )
    prepare_environment()
    with no_collection():  # imports transformers and torch
        check_config(directory)
        device = check_device("the teacher", "spec.teacher.gpus")
    check_kernels(directory, device)
    return device


def check_kernels(directory: Path, device: Device) -> None:
    """Raise Permanent if vLLM has no kernels for the experts on this device."""
    if device == "cpu" and is_mxfp4(model.read_config(directory)):
        raise Permanent(
            "teacher.model: its experts are in MXFP4, for which vLLM has no kernel on the CPU. Use a GPU, or "
            "a teacher that is not quantised."
        )


def tokens_on_gpu(directory: Path, max_length: int) -> int:
    """Tokens of one forward on this process's GPU, from its memory and the model in `directory`.

    Raises Permanent if the model leaves no room for a forward.
    """
    import torch

    card = torch.cuda.get_device_properties(0).total_memory
    size = TeacherSize.from_config(
        model.read_config(directory) | {"dtype": model.checkpoint_dtype(directory)}, directory.name
    )
    tokens = forward_tokens(size, card, max_length)
    if not tokens:
        raise Permanent(
            f"teacher.model: {size.stored / GIB:.1f} GiB of weights, scoring documents of up to {max_length} "
            f"tokens, need a GPU of {needed_to_score(size, max_length) / GIB:.1f} GiB, and this pod's "
            f"(spec.teacher.gpus) has {card / GIB:.1f}. Use GPUs with more memory, a smaller teacher, or its "
            "release in MXFP4."
        )
    log.info(
        "Scoring %d tokens in a forward: the GPU has %.1f GiB, the weights %.1f GiB",
        tokens,
        card / GIB,
        size.stored / GIB,
    )
    return tokens


def load_vllm(
    directory: Path,
    device: Device,
    max_length: int,
    tokens: int,
    register: Callable[[], None],
    **options: Any,
) -> Any:
    """vLLM with the model in `directory`, which computes a forward of `tokens` tokens to see that it fits.

    `register` says as which class vLLM loads GPT-OSS in this process. `options`: of vllm.LLM, in place of the
    teacher's. Raises Permanent if it does not; on the CPU also Retriable (`cpu_memory_error`).
    """
    with no_collection():
        import torch
        from vllm import LLM

    register()
    share, whole = TEACHER_SHARE
    dtype = model.checkpoint_dtype(directory)
    log.info("Loading the teacher in %s", dtype)
    try:
        return LLM(
            str(directory),
            **engine_options(dtype, max_length)
            | {
                "runner": "pooling",
                "max_num_batched_tokens": tokens,
                "max_num_seqs": MAX_SEQUENCES[device],
                "enable_chunked_prefill": True,
            }
            | ({"gpu_memory_utilization": share / whole} if device == "cuda" else {})
            | options,
        )
    except (torch.OutOfMemoryError, ValueError) as error:
        if isinstance(error, ValueError) and not is_about_memory(error):
            raise
        if device == "cpu":
            raise cpu_memory_error(error, "the teacher (teacher.model)", "dataset.maxLength") from error
        raise Permanent(
            f"teacher.model: the model and a forward of {tokens} tokens do not fit on this pod's GPU "
            f"(spec.teacher.gpus): {error} Use GPUs with more memory or a smaller teacher, and see that no "
            "other process uses the GPU."
        ) from error


def check_config(directory: Path) -> None:
    """Raise Permanent if transformers, whose configurations vLLM uses, cannot read config.json."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(directory, local_files_only=True)
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        ArithmeticError,
        OSError,
        StrictDataclassError,
    ) as error:
        raise Permanent(
            f"teacher.model: transformers cannot read config.json: {error}. Use the one that belongs to the "
            "weights."
        ) from error
