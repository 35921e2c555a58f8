"""The teacher in vLLM: takes sequences of token ids, returns the log-probability of each token given those
before.

The reason why vLLM runs in this process is in vllm_options.py. What the ids are and where the results go is
up to the caller.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vpmoe.data.tokenizer import Ids
from vpmoe.data.vocabulary import VOCABULARY_SIZE
from vpmoe.failure import Permanent
from vpmoe.inference.vllm_options import (
    BATCH_TOKENS,
    STEP_TOKENS,
    check_attention,
    check_device,
    engine_options,
    prepare_environment,
    prompt_logp,
    scoring_params,
    token_batches,
)
from vpmoe.teacher import model
from vpmoe.teacher.weights import HEAD, check_weights, has_output_matrix

log = logging.getLogger(__name__)

MAX_SEQUENCES = 32
"""Sequences of one forward pass, at most."""


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
        positions = model.read_config(directory).get("max_position_embeddings")
        if positions is not None and max_length >= positions:
            raise Permanent(
                f"teacher.model: max_position_embeddings is {positions}, and the longest document is "
                f"{max_length} tokens plus one that vLLM generates. Lower dataset.maxLength, or use a model "
                "with a longer context."
            )
        self.max_length = max_length
        prepare_environment()
        check_config(directory)
        import vllm

        self.device = check_device("the teacher", "spec.teacher.gpus")
        dtype = model.checkpoint_dtype(directory)
        log.info("Loading the teacher in %s", dtype)
        self._llm = vllm.LLM(
            str(directory),
            **engine_options(dtype, max_length + 1),  # vLLM cannot score without generating a token
            max_num_batched_tokens=STEP_TOKENS[self.device],
            max_num_seqs=MAX_SEQUENCES,
            enable_chunked_prefill=True,
        )
        check_attention(self._llm, "the teacher")
        self._params = scoring_params()

    def score(
        self, sequences: Iterable[Ids], check_stop: Callable[[], None] = lambda: None
    ) -> Iterator[NDArray[np.float32]]:
        """For each sequence of T ids, [T] float32: the log-probability of each id given those before; NaN for
        the first.

        Consumes `sequences` lazily, BATCH_TOKENS at a time, and calls `check_stop`, which may raise, before
        each batch. Raises ValueError if a sequence is longer than `max_length` or has an id outside of the
        vocabulary.
        """
        for batch in token_batches(sequences, BATCH_TOKENS[self.device]):
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
        prompts = [{"prompt_token_ids": ids_T.tolist()} for ids_T in batch if len(ids_T) > 1]
        outputs = iter(self._llm.generate(prompts, self._params, use_tqdm=False) if prompts else [])
        for ids_T in batch:
            logp_T = np.full(len(ids_T), np.nan, np.float32)
            if len(ids_T) > 1:
                logp_T[1:] = prompt_logp(next(outputs), ids_T)
            yield logp_T


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
