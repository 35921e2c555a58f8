"""The teacher as it runs: token ids in, the log-probability of each of them given those before it out. vLLM computes it.

vLLM runs in this very process: only then does it compute together what it was given together, so the same ids in the same order give
the same bits. What the ids are, and what becomes of the numbers, is the caller's business. vLLM is imported here and nowhere else.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vpmoe.data.tokenizer import Ids
from vpmoe.data.vocabulary import VOCABULARY_SIZE
from vpmoe.failure import Permanent
from vpmoe.teacher import model

if TYPE_CHECKING:
    from vllm import RequestOutput

log = logging.getLogger(__name__)

BATCH_TOKENS = {"cpu": 1 << 11, "cuda": 1 << 15}
"""Tokens that are handed to vLLM at once: seconds of work, after which a job that was asked to stop does."""

STEP_TOKENS = {"cpu": 512, "cuda": 2048}
"""Tokens of one forward; longer sequences are computed in pieces. vLLM holds their logits whole, [2048, 201088] in float32 twice and once
in the model's dtype, which is 4 GB; and of 512 in float32 0.8 GB."""

SEQUENCES = 32
"""Sequences of one forward, at most."""

GPU_MEMORY = 0.85
"""Share of the GPU that vLLM plans with. It does not count the logits of prompts (STEP_TOKENS), so the rest must hold them."""

CPU_CACHE_GIB = "1"
"""Key-value cache on the CPU."""


class Scorer:
    """A teacher, loaded. One a process; it is gone when the process ends."""

    def __init__(self, directory: Path, longest: int) -> None:
        """Load the model in `directory`, to score sequences of up to `longest` tokens.

        Raises Permanent where the model cannot be what it has to be, or the machine lacks what the environment asks for.
        """
        model.check(directory)
        positions = model.config(directory).get("max_position_embeddings")
        if positions is not None and longest >= positions:
            raise Permanent(
                f"teacher.model: max_position_embeddings is {positions}, and the longest document is {longest} tokens with one to follow. "
                "Lower dataset.maxLength, or give a model with a longer context."
            )
        self.longest = longest
        prepare_environment()
        import vllm

        self.device = check_device()
        log.info("Loading the teacher, in %s", model.dtype(directory))
        self._llm = vllm.LLM(
            str(directory),
            skip_tokenizer_init=True,
            dtype=model.dtype(directory),
            max_model_len=longest + 1,  # vLLM cannot score without generating a token
            max_num_batched_tokens=STEP_TOKENS[self.device],
            max_num_seqs=SEQUENCES,
            enable_chunked_prefill=True,
            gpu_memory_utilization=GPU_MEMORY,
            enforce_eager=True,
            enable_prefix_caching=False,
            async_scheduling=False,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            seed=0,
        )
        self._asking = vllm.SamplingParams(
            max_tokens=1,
            temperature=1.0,
            top_p=1.0,
            prompt_logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            ignore_eos=True,
        )

    def score(
        self, sequences: Iterable[Ids], check_stop: Callable[[], None] = lambda: None
    ) -> Iterator[NDArray[np.float32]]:
        """For each sequence of T ids, [T] float32: the log-probability of each given those before it; NaN for the first.

        Sequences are taken as they are asked for, BATCH_TOKENS at a time, and `check_stop`, which may raise, is called before each
        time. Raises ValueError for a sequence that is longer than `longest`, or has an id that the vocabulary does not have.
        """
        for batch in batches(sequences, BATCH_TOKENS[self.device]):
            check_stop()
            yield from self._score(batch)

    def _score(self, batch: list[Ids]) -> Iterator[NDArray[np.float32]]:
        for ids_T in batch:
            if len(ids_T) > self.longest:
                raise ValueError(f"{len(ids_T)} ids, and the teacher was loaded for {self.longest} at most")
            if len(ids_T) and not 0 <= ids_T.min() <= ids_T.max() < VOCABULARY_SIZE:
                raise ValueError(
                    f"ids from {ids_T.min()} to {ids_T.max()}, and the vocabulary has those from 0 to {VOCABULARY_SIZE - 1}"
                )
        sent = [{"prompt_token_ids": ids_T.tolist()} for ids_T in batch if len(ids_T) > 1]
        answers = iter(self._llm.generate(sent, self._asking, use_tqdm=False) if sent else [])
        for ids_T in batch:
            logp_T = np.full(len(ids_T), np.nan, np.float32)
            if len(ids_T) > 1:
                logp_T[1:] = logp_of(next(answers), ids_T)
            yield logp_T


def logp_of(answer: "RequestOutput", ids_T: Ids) -> NDArray[np.float32]:
    """The log-probabilities in vLLM's answer to a prompt, [T - 1]. Raises RuntimeError where they are not of these ids."""
    found = answer.prompt_logprobs
    if found is None or not np.array_equal(found.token_ids, ids_T[1:]):
        raise RuntimeError(
            f"vLLM scored other tokens than it was given: {len(ids_T)} ids, {found and len(found.token_ids)} scores"
        )
    return np.array(found.logprobs, np.float32)


def batches(sequences: Iterable[Ids], tokens: int) -> Iterator[list[Ids]]:
    """Consecutive sequences of up to `tokens` ids together, at least one at a time."""
    batch: list[Ids] = []
    size = 0
    for ids_T in sequences:
        if batch and size + len(ids_T) > tokens:
            yield batch
            batch, size = [], 0
        batch.append(ids_T)
        size += len(ids_T)
    if batch:
        yield batch


def check_device(whose: str = "the teacher", field: str = "spec.teacher.gpus") -> str:
    """Where vLLM computes: on "cuda", or on the "cpu" only where CUDA_VISIBLE_DEVICES is set and empty.

    Raises Permanent where there is no GPU, of which `field` gives `whose` process one, or vLLM was not built for one.
    """
    import torch
    from vllm.platforms import current_platform

    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return "cpu"
    if not torch.cuda.device_count():
        raise Permanent(
            f"this pod finds no CUDA device for {whose}. Give it one ({field}), install the driver, or set CUDA_VISIBLE_DEVICES to the "
            "empty string to compute on the CPU."
        )
    if not current_platform.is_cuda():
        found = current_platform.device_type
        raise Permanent(
            f"the installed vLLM computes on {found}, not on CUDA. Use the inference image for GPUs, which has package vllm."
        )
    return "cuda"


def prepare_environment() -> None:
    """What vLLM and torch read from the environment, before they are imported. What is set already stays.

    Nothing is compiled: what would be is one count of larger logits, and the compiler would want a C compiler and tens of seconds.
    Nothing is written outside of TMPDIR, asked of the network, or looked up about the user, who need not have a name.
    """
    scratch = Path(tempfile.gettempdir())
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CONFIGURE_LOGGING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_CPU_KVCACHE_SPACE": CPU_CACHE_GIB,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CACHE_ROOT": str(scratch / "vllm"),
        "VLLM_CONFIG_ROOT": str(scratch / "vllm"),
        "TORCHDYNAMO_DISABLE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "HF_HUB_OFFLINE": "1",
        "USER": str(os.getuid()),
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    logging.getLogger("vllm").setLevel(logging.WARNING)
    logging.getLogger("vllm.renderers").setLevel(
        logging.ERROR
    )  # it warns that there is no tokenizer, which is as it should be
