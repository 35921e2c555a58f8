"""Tokens per second and peak memory of the scorer, compared with what vLLM can do and with transformers.

    python -m benchmarks.scorer --shape gpt-oss-20b|gpt-oss-120b [--forward 4096,8192,16384] [--peer]
    python -m benchmarks.scorer [--model DIRECTORY] [--tokens 8192] [--repeats 3]

With --shape, on a GPU: the teacher's engine with vLLM's dummy weights in MXFP4, documents of 800 to 2,200
random ids, and for each number of tokens of a forward:
  scored         all of them scored
  prefill        the same engine and documents without the output layer: the layers alone
  share          scored / prefill; "at the floor": if the output layer took the time of its product alone
  peer           with --peer: vLLM's prompt_logprobs in an engine of its own
  activations    peak memory beyond the loaded engine
With --written the weights are random ones in the format of OpenAI's release, written below TMPDIR first (13
GB of the 20B), and the times and host memory to write and to load them are printed too. --layers makes the
model shorter.

Rows without --shape:
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
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from vpmoe.data.tokenizer import Ids
from vpmoe.data.vocabulary import VOCABULARY_SIZE
from vpmoe.teacher import model

if TYPE_CHECKING:
    from vpmoe.inference.teacher_engine import TeacherEngine

LONGEST = 1200
"""Documents have fewer tokens than this."""

MEMORY = ("RssAnon", "RssFile")
SHAPES = ("gpt-oss-20b", "gpt-oss-120b")
SHORTEST_SCORED, LONGEST_SCORED = 800, 2200
"""Lengths of the documents that are scored with --shape."""

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
    return peak_host_memory()


def peak_host_memory() -> int:
    """Peak resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class HostMemory:
    """The most memory of this process while it is entered, in bytes: its own, and the parts of files that it
    has mapped, which the kernel takes back when it needs memory."""

    def __init__(self) -> None:
        self.own = self.mapped = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(0.05):
            lines = Path("/proc/self/status").read_text().splitlines()
            kib = {name: int(line.split()[1]) for line in lines if (name := line.partition(":")[0]) in MEMORY}
            self.own = max(self.own, kib["RssAnon"] * 1024)
            self.mapped = max(self.mapped, kib["RssFile"] * 1024)


def shape_config(shape: str, layers: int | None) -> dict[str, Any]:
    """config.json of a release, with `layers` layers instead of its own."""
    from tests.fakes.teacher_configs import GPT_OSS_20B, GPT_OSS_120B

    config = {"gpt-oss-20b": GPT_OSS_20B, "gpt-oss-120b": GPT_OSS_120B}[shape]
    layers = layers or config["num_hidden_layers"]
    return config | {"num_hidden_layers": layers, "layer_types": config["layer_types"][:layers]}


def engine_of_shape(directory: Path, forward: int, load_format: str) -> "TeacherEngine":
    """The teacher's engine for forwards of up to `forward` tokens, with dummy or stored weights."""
    from vpmoe.inference import teacher_engine, teacher_model
    from vpmoe.inference.vllm_options import check_device, prepare_environment

    class Unchecked(teacher_engine.TeacherEngine):
        """Without the checks of a checkpoint, of which dummy weights have none."""

        def __init__(self) -> None:
            prepare_environment()
            self.max_length, self.forward_tokens = LONGEST_SCORED, forward
            device = check_device("the teacher", "spec.teacher.gpus")
            self._llm = teacher_engine.load_vllm(
                directory, device, LONGEST_SCORED, forward, teacher_model.register, load_format=load_format
            )

    return Unchecked()


def seconds_of(call: Callable[[], object], repeats: int) -> float:
    """Median wall-clock seconds of a call, after one that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def set_forward(llm: Any, tokens: int) -> None:
    """Have vLLM compute at most `tokens` tokens in a forward from now on."""
    llm.llm_engine.engine_core.engine_core.scheduler.max_num_scheduled_tokens = tokens


def leave_out_head(model: Any) -> None:
    """Have the teacher return zeros in place of log-probabilities."""
    import torch

    model.pooler._logp = lambda hidden_NH, targets_N: hidden_NH.new_zeros(len(hidden_NH), dtype=torch.float32)


def restore_head(model: Any) -> None:
    del model.pooler._logp


def measure_shape(given: argparse.Namespace, directory: Path) -> None:
    """Print the rows of --shape for an engine of our own."""
    import torch

    start = time.perf_counter()
    forwards = [int(tokens) for tokens in given.forward.split(",")]
    load_format = "auto" if given.written else "dummy"
    with HostMemory() as host:
        engine = engine_of_shape(directory, max(forwards), load_format)
    weights = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    print(
        f"loaded ({load_format}) in {time.perf_counter() - start:.1f} s, with {weights / 2**30:.1f} GiB on "
        f"the GPU (weights and cache), at most {host.own / 2**30:.1f} GiB of host memory and "
        f"{host.mapped / 2**30:.1f} GiB of mapped files",
        flush=True,
    )
    batch = scored_documents(given.tokens)
    tokens = sum(map(len, batch))
    head = head_seconds(directory, 8192, given.repeats) / 8192
    for forward in forwards:
        set_forward(engine._llm, forward)
        engine.forward_tokens = forward
        torch.cuda.reset_peak_memory_stats()
        scored = seconds_of(lambda: list(engine.score(batch)), given.repeats)
        taken = memory() - weights
        engine._llm.apply_model(leave_out_head)
        prefill = seconds_of(lambda: list(engine.score(batch)), given.repeats)
        engine._llm.apply_model(restore_head)
        print(
            f"SCORE {given.shape} forward {forward}: scored {tokens / scored:,.0f} tokens/s, prefill "
            f"{tokens / prefill:,.0f}, share {prefill / scored:.3f} (at the floor "
            f"{prefill / (prefill + head * tokens):.3f}), activations {taken / 2**30:.2f} GiB",
            flush=True,
        )


def measure_peer(given: argparse.Namespace, directory: Path) -> None:
    """Print the rows of --peer: vLLM's prompt_logprobs."""
    from vpmoe.inference import vllm_options

    vllm_options.prepare_environment()
    import vllm

    forwards = [int(tokens) for tokens in given.forward.split(",")]
    llm = vllm.LLM(
        str(directory),
        **vllm_options.engine_options(model.checkpoint_dtype(directory), LONGEST_SCORED + 1),
        gpu_memory_utilization=0.85,
        load_format="auto" if given.written else "dummy",
        max_num_batched_tokens=max(forwards),
        max_num_seqs=256,
        enable_chunked_prefill=True,
    )
    batch = scored_documents(given.tokens)
    prompts = [{"prompt_token_ids": ids.tolist()} for ids in batch]
    for forward in forwards:
        set_forward(llm, forward)
        took = seconds_of(
            lambda: llm.generate(prompts, vllm_options.scoring_params(), use_tqdm=False), given.repeats
        )
        print(
            f"SCORE {given.shape} forward {forward}: peer {sum(map(len, batch)) / took:,.0f} tokens/s",
            flush=True,
        )


def scored_documents(tokens: int) -> list[Ids]:
    """Documents of SHORTEST_SCORED to LONGEST_SCORED random ids, about `tokens` together."""
    random = np.random.default_rng(0)
    lengths = random.integers(
        SHORTEST_SCORED, LONGEST_SCORED, max(1, 2 * tokens // (SHORTEST_SCORED + LONGEST_SCORED))
    )
    return [random.integers(0, VOCABULARY_SIZE, int(length), np.int32) for length in lengths]


def head_seconds(directory: Path, tokens: int, repeats: int) -> float:
    """Seconds of the output layer's product of `tokens` tokens."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden = int(model.read_config(directory)["hidden_size"])
    weight_VH = torch.randn(VOCABULARY_SIZE, hidden, device=device, dtype=torch.bfloat16)
    hidden_TH = torch.randn(tokens // 8, hidden, device=device, dtype=torch.bfloat16)

    def product() -> None:
        for _ in range(8):
            hidden_TH @ weight_VH.T
        if device == "cuda":
            torch.cuda.synchronize()

    return seconds_of(product, repeats)


def run_shape(given: argparse.Namespace) -> None:
    """Write the checkpoint, then measure each engine in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / given.shape
        directory.mkdir()
        config = shape_config(given.shape, given.layers)
        if given.written:
            import torch

            from tests.fakes import mxfp4_teacher

            start = time.perf_counter()
            mxfp4_teacher.write(directory, config, device="cuda" if torch.cuda.is_available() else "cpu")
            print(f"written in {time.perf_counter() - start:.1f} s", flush=True)
        else:
            (directory / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
        for part in ("shape", "peer")[: 1 + given.peer]:
            arguments = [*sys.argv[1:], "--part", part, "--model", str(directory)]
            subprocess.run([sys.executable, "-m", "benchmarks.scorer", *arguments], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="directory of a GPT-OSS checkpoint")
    parser.add_argument("--tokens", type=int, help="tokens to score in each repeat; with --shape 131072")
    parser.add_argument("--repeats", type=int, default=3, help="repeats of each row")
    parser.add_argument("--shape", choices=SHAPES, help="a release's shape, with dummy weights")
    parser.add_argument("--forward", default="4096,8192,16384", help="with --shape: tokens of a forward")
    parser.add_argument("--peer", action="store_true", help="with --shape: vLLM's prompt_logprobs too")
    parser.add_argument("--written", action="store_true", help="with --shape: write and load weights")
    parser.add_argument("--layers", type=int, help="with --shape: layers instead of the release's")
    parser.add_argument("--only", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=("shape", "peer"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.tokens = given.tokens or (131_072 if given.shape else 8192)
    if given.part:
        {"shape": measure_shape, "peer": measure_peer}[given.part](given, given.model)
        return
    if given.shape:
        run_shape(given)
        return
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
