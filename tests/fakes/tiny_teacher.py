"""Tiny random GPT-OSS checkpoints, the whole architecture (experts, sinks, sliding window, YaRN) and vocabulary in 100 MB; and one of
them behind vLLM in a process of its own.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from vpmoe.data.vocabulary import PADDING, RETURN, VOCABULARY_SIZE
from vpmoe.inference import vllm_options
from vpmoe.inference.teacher_engine import TeacherEngine
from vpmoe.inference.vllm_options import token_batches

LONGEST = 640
"""Tokens that the shared teacher and the shared sampler take at once."""

BATCH_TOKENS = vllm_options.BATCH_TOKENS["cpu"]

TINY = {
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 16,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 4,
    "vocab_size": VOCABULARY_SIZE,
    "max_position_embeddings": 4096,
    "pad_token_id": PADDING,
    "eos_token_id": RETURN,
    "bos_token_id": None,
    "tie_word_embeddings": False,
}
"""What GPT-OSS' configuration says of this checkpoint; the rest is GPT-OSS' own. vLLM's kernels want head_dim 32 or more."""


def write(folder: Path, seed: int = 0, dtype: str = "float32", **changes: object) -> Path:
    """Write a Hugging Face model directory of random weights, without tokenizer files (100 MB in float32); returns it.

    Weights are large enough for every part of the model to matter to every logit. `changes` are made to its configuration.
    """
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = GptOssConfig(**{**TINY, **changes}, dtype=dtype)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = GptOssForCausalLM(config)
        for name, weights in model.named_parameters():
            if "norm" not in name:
                weights.normal_(std=1.0 if "sinks" in name else 0.15)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    said = json.loads((folder / "config.json").read_text())
    if said.get("dtype") != dtype:
        raise ValueError(f"{folder}/config.json says dtype {said.get('dtype')}, not {dtype}")
    return folder


class Remote:
    """A scorer in another process (`python -m tests.fakes.tiny_teacher`), asked over a socket: the same interface as vpmoe.inference.teacher_engine.Scorer.

    So vLLM, whose start takes longest, is started once for all tests, outlives those that kill whoever asks it, and leaves torch's
    process groups to the tests of the trainer. `sequences` counts what it was asked to score.
    """

    def __init__(self, address: str, max_length: int) -> None:
        self.max_length = max_length
        self.sequences = 0
        self._connection = Client(address)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the next one ask."""
        self._connection.close()

    def score(
        self, sequences: Iterable[NDArray[np.int32]], check_stop: Callable[[], None] = lambda: None
    ) -> Iterator[NDArray[np.float32]]:
        for batch in token_batches(sequences, BATCH_TOKENS):
            check_stop()
            self._connection.send(batch)
            answer = self._connection.recv()
            if isinstance(answer, Exception):
                raise answer
            self.sequences += len(batch)
            yield from answer


def serve(address: str, answer: Callable[[Any], object]) -> None:
    """Answer one asker after another until the process is ended. A ValueError is an answer."""
    with Listener(address) as listener:
        while True:
            with listener.accept() as asker, suppress(EOFError, ConnectionError):
                while question := asker.recv():
                    try:
                        asker.send(answer(question))
                    except ValueError as error:
                        asker.send(error)


if __name__ == "__main__":
    teacher = TeacherEngine(Path(sys.argv[2]), int(sys.argv[3]))
    serve(sys.argv[1], lambda batch: list(teacher.score(batch)))
