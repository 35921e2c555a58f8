"""Tokens per second and peak memory of the scorer, compared with transformers on the same documents.

    python -m benchmarks.scorer [--model DIRECTORY] [--tokens 8192] [--repeats 3]

Rows:
  scorer                       vLLM, several documents per forward pass
  transformers, whole logits   one document at a time, whole logits and their fp32 log-softmax
  transformers, chunked head   log p by vpmoe/model/head.py, which never holds [tokens, vocabulary]
  floor                        the product of the output projection alone

Each row is measured in its own process; times are medians of the repeats. Memory is what is allocated beyond
the loaded model: on a GPU the allocator's peak, on a CPU the peak of the process. Documents are 200 to 1,200
random ids long. Without --model the model is a tiny random GPT-OSS, which spends nearly all its time on the
vocabulary. Meant for a GPU; it runs on the CPU if CUDA_VISIBLE_DEVICES is set and empty.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vpmoe.data.tokenizer import Ids
from vpmoe.data.vocabulary import VOCABULARY_SIZE
from vpmoe.teacher import model

LONGEST = 1200
"""Documents have fewer tokens than this."""

Score = Callable[[list[Ids]], None]


def documents(tokens: int) -> list[Ids]:
    """Documents of random ids, `tokens` tokens together."""
    random = np.random.default_rng(0)
    made: list[Ids] = []
    while tokens > 0:
        made.append(
            random.integers(0, VOCABULARY_SIZE, min(tokens, int(random.integers(200, LONGEST))), np.int32)
        )
        tokens -= len(made[-1])
    return made


def scorer(directory: Path) -> Score:
    """The repository's scorer, with vLLM."""
    from vpmoe.inference.teacher_engine import TeacherEngine

    teacher = TeacherEngine(directory, LONGEST)
    return lambda batch: [None for _ in teacher.score(batch)].clear()


def transformers(directory: Path, whole: bool) -> Score:
    """transformers with whole logits, or with the chunked head of vpmoe/model/head.py."""
    import torch
    from transformers import AutoModelForCausalLM

    from vpmoe.model.head import target_logp

    device = "cpu" if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else "cuda"
    dtype = getattr(torch, model.checkpoint_dtype(directory))
    teacher = (
        AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager")
        .to(device)
        .eval()
    )

    @torch.no_grad()
    def score(batch: list[Ids]) -> None:
        for ids in batch:
            ids_T = torch.from_numpy(ids.astype(np.int64)).to(device)
            if whole:
                logp_TV = teacher(ids_T[None]).logits[0, :-1].float().log_softmax(1)
                logp_TV.gather(1, ids_T[1:, None]).cpu()
            else:
                target_logp(
                    teacher.model(ids_T[None]).last_hidden_state[0, :-1], teacher.lm_head.weight, ids_T[1:]
                ).cpu()

    return score


def floor(directory: Path) -> Score:
    """The product of the output projection alone, on random hidden states."""
    import torch

    device = "cpu" if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else "cuda"
    hidden = int(model.read_config(directory)["hidden_size"])
    weight_VH = torch.randn(
        VOCABULARY_SIZE, hidden, device=device, dtype=getattr(torch, model.checkpoint_dtype(directory))
    )

    def score(batch: list[Ids]) -> None:
        for ids in batch:
            torch.randn(len(ids), hidden, device=device, dtype=weight_VH.dtype) @ weight_VH.T
        if device == "cuda":
            torch.cuda.synchronize()

    return score


CONTENDERS: dict[str, Callable[[Path], Score]] = {
    "scorer": scorer,
    "transformers, whole logits": lambda directory: transformers(directory, whole=True),
    "transformers, chunked head": lambda directory: transformers(directory, whole=False),
    "floor": floor,
}


def measure(name: str, directory: Path, tokens: int, repeats: int) -> dict[str, float]:
    """Median wall-clock and CPU seconds to score `tokens` tokens, and bytes allocated beyond the model."""
    score = CONTENDERS[name](directory)
    batch = documents(tokens)
    loaded = memory()
    score(batch[:1])
    seconds, processor = [], []
    for _ in range(repeats):
        start, used = time.perf_counter(), time.process_time()
        score(batch)
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - used)
    return {
        "seconds": statistics.median(seconds),
        "processor": statistics.median(processor),
        "bytes": memory() - loaded,
    }


def memory() -> int:
    """Peak memory so far, in bytes."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="directory of a GPT-OSS checkpoint")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens to score in each repeat")
    parser.add_argument("--repeats", type=int, default=3, help="repeats of each row")
    parser.add_argument("--only", choices=CONTENDERS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        print(json.dumps(measure(given.only, given.model, given.tokens, given.repeats)))
        return
    with tempfile.TemporaryDirectory() as folder:
        directory = given.model or tiny(Path(folder))
        name = directory.name if given.model else "tiny random GPT-OSS"
        print(
            f"{name}, {model.checkpoint_dtype(directory)}, {given.tokens:,} tokens, {given.repeats} repeats"
        )
        results = {}
        for name in CONTENDERS:
            arguments = [
                "--model",
                str(directory),
                "--tokens",
                str(given.tokens),
                "--repeats",
                str(given.repeats),
                "--only",
                name,
            ]
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.scorer", *arguments],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            results[name] = json.loads(done.stdout.splitlines()[-1])
            took, used, taken = (results[name][what] for what in ("seconds", "processor", "bytes"))
            times = took / results["scorer"]["seconds"], used / results["scorer"]["processor"]
            print(
                f"{name:28} {given.tokens / took:9,.0f} tokens/s {taken / 2**20:7,.0f} MiB   "
                f"{times[0]:5.2f} × the scorer's time, {times[1]:5.2f} × its CPU time",
                flush=True,
            )


def tiny(folder: Path) -> Path:
    """Write a tiny random GPT-OSS."""
    from tests.fakes import tiny_teacher

    return tiny_teacher.write(folder / "teacher")


if __name__ == "__main__":
    main()
