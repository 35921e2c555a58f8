"""Tiny random GPT-OSS checkpoints, and one of them in a vLLM process that tests share.

A checkpoint has the whole architecture (experts, sinks, sliding window, YaRN) and vocabulary, in 100 MB.
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

from demo.tiny_gpt_oss import TINY
from vpmoe.inference import vllm_options
from vpmoe.inference.teacher_engine import TeacherEngine
from vpmoe.inference.vllm_options import token_batches

LONGEST = 640
"""The maximum length of a sequence, in tokens, for the engines that tests share."""

BATCH_TOKENS = vllm_options.BATCH_TOKENS["cpu"]


def write(folder: Path, seed: int = 0, dtype: str = "float32", **changes: object) -> Path:
    """Write a Hugging Face model directory of random weights, without tokenizer files; returns it.

    100 MB in float32. Weights are so large that every part of the model changes every logit. `changes` are
    changed fields of the configuration.
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
    written = json.loads((folder / "config.json").read_text())
    if written.get("dtype") != dtype:
        raise ValueError(f"{folder}/config.json says dtype {written.get('dtype')}, not {dtype}")
    return folder


class Remote:
    """Client of a scorer in another process; has the interface of vpmoe.inference.teacher_engine.Scorer.

    One vLLM process serves all tests: its start takes longest, it survives tests that kill their own process,
    and torch's process groups stay free for the trainer's tests. `sequences` counts the sequences scored.
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
        """Disconnect. The server then accepts the next client."""
        self._connection.close()

    def score(
        self, sequences: Iterable[NDArray[np.int32]], check_stop: Callable[[], None] = lambda: None
    ) -> Iterator[NDArray[np.float32]]:
        for batch in token_batches(sequences, BATCH_TOKENS):
            check_stop()
            self._connection.send(batch)
            reply = self._connection.recv()
            if isinstance(reply, Exception):
                raise reply
            self.sequences += len(batch)
            yield from reply


def serve(address: str, handle: Callable[[Any], object]) -> None:
    """Serve one client after another until the process ends. A ValueError is sent to the client."""
    with Listener(address) as listener:
        while True:
            with listener.accept() as client, suppress(EOFError, ConnectionError):
                while request := client.recv():
                    try:
                        client.send(handle(request))
                    except ValueError as error:
                        client.send(error)


if __name__ == "__main__":
    teacher = TeacherEngine(Path(sys.argv[2]), int(sys.argv[3]))
    serve(sys.argv[1], lambda batch: list(teacher.score(batch)))
