"""The student as a sampler: prompts in, completions out with the log-probability that each token was drawn with. vLLM computes it.

`python -m vpmoe.inference.engine` is one such process, on one GPU or on the CPU (engines.py starts it and asks). vLLM runs in this very
process, as the teacher's does (vpmoe.inference.teacher_engine): what it is given together it computes together, so on the CPU the same requests in
the same order have the same bits, whether the weights are the first or came later. Which weights these are is the caller's business.
"""

import json
import signal
import sys
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vpmoe import failure
from vpmoe.data.tokenizer import Ids
from vpmoe.data.vocabulary import STOP_IDS
from vpmoe.inference.engine_pool import Completion, Request
from vpmoe.inference.teacher_engine import (
    BATCH_TOKENS,
    GPU_MEMORY,
    STEP_TOKENS,
    batches,
    check_device,
    logp_of,
    prepare_environment,
)
from vpmoe.model.shapes import SHAPES, Shape
from vpmoe.process.launcher import die_with_launcher

if TYPE_CHECKING:
    from torch import Tensor
    from vllm import RequestOutput

SEQUENCES = {"cpu": 32, "cuda": 1024}
"""Completions that grow at the same time, at most; a forward costs nearly the same however many they are. On a GPU of 80 GB that has
vpmoe-6b and 80 kB of keys and values a token, by calculation some 600 tokens each find room; where they get longer vLLM lets some wait, and
computes those again."""


class Engine:
    """A student, as soon as `load` has been called. One a process; it is gone when the process ends."""

    def __init__(self, shape: Shape, longest: int) -> None:
        """`longest`: tokens of prompt and completion together, at most.

        Raises Permanent where the machine lacks what the environment asks for.
        """
        prepare_environment()
        self.shape, self.longest = shape, longest
        self.device = check_device("the sampler", "stages[].sampler.gpus")
        self._llm: Any = None

    def load(self, folder: Path) -> None:
        """Compute with the weights in `folder` from now on. Raises Permanent where they are no whole student of this shape."""
        from vpmoe.model import hf_export

        hf_export.check_export(folder, self.shape)
        if self._llm is None:
            self._llm = self._start(folder)
        else:
            self._llm.apply_model(lambda model: model.load_weights(_tensors(folder)))

    def sample(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion each, at temperature 1 and of the whole vocabulary; a stop token is part of it. Together they are one batch.

        Raises ValueError for a request that may grow beyond `longest`.
        """
        import vllm

        for one in requests:
            if len(one.ids_P) + one.longest > self.longest:
                raise ValueError(
                    f"{one.longest} tokens after a prompt of {len(one.ids_P)}, and the student was loaded for {self.longest}"
                )
        asking = [
            vllm.SamplingParams(
                max_tokens=one.longest,
                temperature=1.0,
                top_p=1.0,
                seed=one.seed,
                stop_token_ids=list(STOP_IDS),
                ignore_eos=True,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
            )
            for one in requests
        ]
        sent = [{"prompt_token_ids": one.ids_P.tolist()} for one in requests]
        return [_completion(answer) for answer in self._llm.generate(sent, asking, use_tqdm=False)]

    def score(self, sequences: Sequence[Ids]) -> list[NDArray[np.float32]]:
        """For each sequence of T ids, which is shorter than `longest`, [T − 1] the log-probability of all but the first given those before.

        In batches of BATCH_TOKENS, as the teacher's.
        """
        import vllm

        asking = vllm.SamplingParams(
            max_tokens=1,
            temperature=1.0,
            top_p=1.0,
            prompt_logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            ignore_eos=True,
        )
        found = []
        for batch in batches(sequences, BATCH_TOKENS[self.device]):
            answers = self._llm.generate(
                [{"prompt_token_ids": ids_T.tolist()} for ids_T in batch], asking, use_tqdm=False
            )
            found += [logp_of(answer, ids_T) for answer, ids_T in zip(answers, batch, strict=True)]
        return found

    def _start(self, folder: Path) -> Any:
        """vLLM with the weights in `folder`."""
        import vllm

        from vpmoe.inference import vllm_model

        vllm_model.register()
        chunks = self.device == "cuda"
        return vllm.LLM(
            str(folder),
            skip_tokenizer_init=True,
            dtype=json.loads((folder / "config.json").read_text())["dtype"],  # "auto" makes less of float32
            max_model_len=self.longest,
            # The probe's logits are held whole, as the teacher's are. On the CPU a prompt has to be as well: vLLM draws a token after each
            # piece of one that it computes in pieces and takes the draw back, which a generator of the CPU cannot: it has no offset.
            max_num_batched_tokens=STEP_TOKENS["cuda"] if chunks else max(STEP_TOKENS["cpu"], self.longest),
            enable_chunked_prefill=chunks,
            max_num_seqs=SEQUENCES[self.device],
            gpu_memory_utilization=GPU_MEMORY,
            enforce_eager=True,
            enable_prefix_caching=False,
            async_scheduling=False,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            seed=0,
        )


def _tensors(folder: Path) -> "Iterator[tuple[str, Tensor]]":
    """All weights by name, a file in memory at a time."""
    from safetensors.torch import load_file

    for file in sorted(folder.glob("*.safetensors")):
        yield from load_file(file).items()


def _completion(answer: "RequestOutput") -> Completion:
    """vLLM's answer to a request. Raises RuntimeError where its log-probabilities are not of the tokens that it drew."""
    (out,) = answer.outputs
    if list(out.logprobs.token_ids) != list(out.token_ids):
        raise RuntimeError(
            f"vLLM drew {len(out.token_ids)} tokens, and has {len(out.logprobs.token_ids)} log-probabilities of others"
        )
    return Completion(np.array(out.token_ids, np.int32), np.array(out.logprobs.logprobs, np.float32))


def main() -> None:
    """Answer whoever started this process: (number, name of a method of Engine, its arguments) → (number, what it returns or Failure)."""
    die_with_launcher()
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)  # when to end is the word of who started it
    connection, engine = Connection(int(sys.argv[1])), None
    while True:
        try:
            number, name, arguments = connection.recv()
        except EOFError:
            return
        try:
            engine = engine or Engine(SHAPES[sys.argv[2]], int(sys.argv[3]))
            connection.send((number, getattr(engine, name)(*arguments)))
        except Exception as error:  # noqa: BLE001 (who asked ends as this error says)
            found = failure.classify(error)
            if found.kind == "Internal":
                sys.__excepthook__(type(error), error, error.__traceback__)
            connection.send((number, found))


if __name__ == "__main__":
    main()
