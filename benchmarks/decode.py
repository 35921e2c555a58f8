"""Tokens per second of the student in vLLM, beside the floor of its memory traffic or beside a peer.

    python -m benchmarks.decode [--shape vpmoe-6b] [--sequences 1,64,512] [--profile]
    python -m benchmarks.decode --peer granite

Runs the sampler's own engine (vpmoe/inference/engine.py) in bf16 with random weights, on random prompts of
--prompt tokens. First, for each N of --sequences, the mean time of --steps steps in which N sequences get a
token each, with scheduling and sampling, from some 40 tokens of completion on. Floor: reading the weights
once (of the experts, those that some sequence chose, for uniformly random choices), and the keys and values
of the mean context once, at --bandwidth. A straight line through the times over N gives the cost of a step,
and that per sequence: they are the `--decode` and `--decode-token` of benchmarks.pipeline.

Then, for each number of --steadily and for --seconds, so many sequences grow, with completions of --shortest
to --longest tokens, each replaced by another when it ends. At the start each has an age as if that had gone
on for long.

`--peer` runs another model's shape in the same vLLM instead, asked in the same way, with the same CUDA
graphs, vLLM's own scheduler and dummy weights: `granite` is Granite-MoE 3B-A0.8B, which has about as many
active parameters as vpmoe-6b, in 32 layers. Needs a GPU, and vLLM for CUDA.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vpmoe.inference.engine import StudentEngine
from vpmoe.inference.engine_pool import SamplingRequest
from vpmoe.inference.request_queue import ADMITTED
from vpmoe.inference.vllm_options import GPU_MEMORY, STEP_TOKENS, gpu_sampling_options
from vpmoe.model.shapes import SHAPES, Shape

PEERS: dict[str, dict[str, Any]] = {
    "granite": {
        "architectures": ["GraniteMoeForCausalLM"],
        "model_type": "granitemoe",
        "vocab_size": 49155,
        "hidden_size": 1536,
        "intermediate_size": 512,
        "num_hidden_layers": 32,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "num_local_experts": 40,
        "num_experts_per_tok": 8,
        "embedding_multiplier": 12.0,
        "logits_scaling": 6.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.015625,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    },
}


def student(shape: Shape, max_length: int) -> StudentEngine:
    """An engine with random weights: every expert is as likely as any other."""
    import torch

    from vpmoe.model import hf_export

    engine = StudentEngine(shape, max_length)
    with tempfile.TemporaryDirectory() as folder:
        config = hf_export.hf_config(shape, max_length, torch.bfloat16)
        (Path(folder) / "config.json").write_text(json.dumps(config))
        engine._llm = engine._start(Path(folder), load_format="dummy")
    engine._llm.apply_model(_randomise)
    return engine


def _randomise(model: Any) -> None:
    import torch

    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.fill_(1)
        elif parameter.dim() == 1 and not name.endswith("log_frequency"):
            parameter.data.zero_()
        elif name.endswith("log_frequency"):
            parameter.data.copy_(torch.linspace(0, -140, len(parameter)))
        else:
            parameter.data.normal_(std=parameter.shape[-1] ** -0.5)


class PeerEngine(StudentEngine):
    def _params(self, request: SamplingRequest) -> Any:
        """Without the student's stop tokens, which are not in a peer's vocabulary."""
        params = super()._params(request)
        params.stop_token_ids = []
        return params


def peer(name: str, max_length: int) -> StudentEngine:
    """An engine that asks a peer's shape with dummy weights."""
    engine = PeerEngine(SHAPES["vpmoe-6b"], max_length)
    import vllm

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(PEERS[name]))
        engine._llm = vllm.LLM(
            folder,
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype="bfloat16",
            max_model_len=max_length,
            max_num_seqs=engine.sequences,
            max_num_batched_tokens=STEP_TOKENS["cuda"],
            gpu_memory_utilization=GPU_MEMORY,
            enable_prefix_caching=False,
            compilation_config=gpu_sampling_options()["compilation_config"],
            disable_log_stats=True,
            seed=0,
        )
    return engine


def floor_ms(shape: Shape, sequences: int, context: int, bandwidth: float) -> float:
    """Milliseconds to read a step's weights, keys and values once."""
    unused = (1 - shape.experts_per_token / shape.experts) ** sequences
    weights = 2 * (shape.parameters() - shape.vocabulary * shape.hidden - shape.expert_parameters() * unused)
    window = min(context / (shape.local_window or context), 1.0)
    return (weights + sequences * (shape.cached_bytes() * context + shape.window_bytes() * window)) / (
        bandwidth * 1e6
    )


PROFILED = 32
"""Steps of a profile."""


def print_profile(step: Callable[[], object]) -> None:
    """Print the kernels of PROFILED steps that take longest, each as milliseconds a step."""
    from torch.autograd import DeviceType  # type: ignore[attr-defined]
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(PROFILED):
            step()
    by_name: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in recorded.events():
        if event.device_type == DeviceType.CUDA:
            by_name[event.name[:110]][0] += 1
            by_name[event.name[:110]][1] += event.device_time / 1e3 / PROFILED
    total = sum(ms for _, ms in by_name.values())
    launches = sum(count for count, _ in by_name.values()) / PROFILED
    print(f"{total:.2f} ms and {launches:.0f} kernels a step, of which")
    for name, (count, ms) in sorted(by_name.items(), key=lambda item: -item[1][1])[:40]:
        print(f"{ms:8.3f} ms  {count / PROFILED:7.1f}  {name}")


def print_host_times(sampler: "Sampler") -> None:
    """Print where the host is during PROFILED steps, as milliseconds a step: in vLLM's scheduler, launching,
    waiting for the GPU's results and reading them, and taking them into account; the rest of the step is this
    project's and what lies between."""
    core = sampler.engine._llm.llm_engine.engine_core.engine_core
    from vllm.v1.worker.gpu.async_utils import AsyncOutput

    spent: dict[str, float] = defaultdict(float)

    def timed(owner: Any, name: str, label: str) -> Callable[[], None]:
        call = getattr(owner, name)

        def measured(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            result = call(*arguments, **options)
            spent[label] += time.perf_counter() - started
            return result

        setattr(owner, name, measured)
        return lambda: setattr(owner, name, call)

    restore = [
        timed(core.scheduler, "schedule", "schedule"),
        timed(core.model_executor, "execute_model", "launch"),
        timed(core.model_executor, "sample_tokens", "launch sampling"),
        timed(AsyncOutput, "get_output", "wait"),
        timed(core.scheduler, "update_from_output", "update"),
    ]
    spent["step"] = sampler.seconds(PROFILED) * PROFILED
    for each in restore:
        each()
    print("host: " + ", ".join(f"{name} {took / PROFILED * 1e3:.2f} ms" for name, took in spent.items()))


class Sampler:
    """Asks an engine as the sampler does. So a completion also ends at a stop token, which random weights
    draw once in some 70,000 tokens."""

    def __init__(self, engine: StudentEngine, prompt: int) -> None:
        self.engine, self.prompt = engine, prompt
        self.random = np.random.default_rng(0)
        self.asked = 0

    def add(self, lengths: Sequence[int]) -> None:
        """Ask for completions of these lengths, of random prompts."""
        for length in lengths:
            ids_P = self.random.integers(0, 40000, self.prompt).astype(np.int32)
            self.engine.add([(self.asked, SamplingRequest(ids_P, self.asked, int(length)))])
            self.asked += 1

    def tokens(self) -> list[int]:
        """Tokens of each completion that vLLM has and has not finished."""
        scheduler = self.engine._llm.llm_engine.engine_core.engine_core.scheduler
        return [request.num_output_tokens for request in scheduler.running]

    def grow(self, sequences: int, length: int, tokens: int) -> None:
        """Ask for completions of `length`, and step until each has `tokens`."""
        self.add([length] * sequences)
        while len(grown := self.tokens()) < sequences or min(grown) < tokens:
            self.add([length] * len(self.engine.step()))  # in place of those that drew a stop token

    def seconds(self, steps: int) -> float:
        """Seconds of a step, the mean of `steps`."""
        import torch

        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(steps):
            self.engine.step()
        torch.cuda.synchronize()
        return (time.perf_counter() - started) / steps

    def drop(self) -> None:
        self.engine.drop()
        while self.tokens():
            self.engine.step()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="vpmoe-6b")
    parser.add_argument("--peer", choices=PEERS, help="another model instead of the student")
    parser.add_argument("--prompt", type=int, default=103, help="tokens of a prompt")
    parser.add_argument("--shortest", type=int, default=256, help="tokens of a completion")
    parser.add_argument("--longest", type=int, default=2048, help="tokens of a completion")
    parser.add_argument("--steps", type=int, default=100, help="steps to time for each N")
    parser.add_argument("--seconds", type=float, default=15.0, help="of steady sampling")
    parser.add_argument(
        "--sequences",
        type=lambda text: [int(count) for count in text.split(",")],
        default=[1, 64, 512],
        help="values of N, comma-separated",
    )
    parser.add_argument(
        "--steadily",
        type=lambda text: [int(count) for count in text.split(",")],
        default=[512],
        help="numbers of sequences to sample steadily, comma-separated",
    )
    parser.add_argument("--bandwidth", type=float, default=4800.0, help="of the GPU's memory, GB/s")
    parser.add_argument(
        "--profile", action="store_true", help="list the kernels of the largest N, and where the host is"
    )
    given = parser.parse_args()
    shape = SHAPES[given.shape]
    started = time.perf_counter()
    longest = given.prompt + given.longest
    engine = peer(given.peer, longest) if given.peer else student(shape, longest)
    import torch
    import vllm

    print(
        f"{torch.cuda.get_device_name()}, {given.peer or shape.name}, vLLM {vllm.__version__}, "
        f"torch {torch.__version__}; started in {time.perf_counter() - started:.0f} s"
    )
    measure(Sampler(engine, given.prompt), given, None if given.peer else shape)


def measure(sampler: Sampler, given: argparse.Namespace, shape: Shape | None) -> None:
    print(f"{'N':>5}  {'ms a step':>9}  {'floor ms':>8}  {'tokens/s':>9}")
    begin, times = 40, []
    for count in given.sequences:
        sampler.grow(count, given.longest, begin)
        times.append(sampler.seconds(given.steps) * 1e3)
        sampler.drop()
        floor = ""
        if shape is not None:
            context = given.prompt + begin + given.steps // 2
            floor = f"{floor_ms(shape, count, context, given.bandwidth):.2f}"
        print(f"{count:>5}  {times[-1]:>9.2f}  {floor:>8}  {count / times[-1] * 1e3:>9,.0f}", flush=True)
    if len(times) > 1:
        slope, start = np.polyfit(given.sequences, times, 1)
        print(f"a step costs {start / 1e3:.4f} s and {slope / 1e3:.6f} s a sequence")
    for count in given.steadily:
        steadily(sampler, given, count)
    if given.profile:
        largest = max(given.sequences)
        sampler.grow(largest, given.longest, 256)
        print(f"{PROFILED} steps of {largest} sequences of some {given.prompt + 256} tokens: ", end="")
        print_profile(sampler.engine.step)
        print_host_times(sampler)


def steadily(sampler: Sampler, given: argparse.Namespace, sequences: int) -> None:
    """Print the tokens a second while `sequences` completions grow and finished ones are replaced."""
    lengths = given.shortest, given.longest + 1
    sampler.engine.sequences = sequences
    # A completion is met in proportion to its length, at an age that is uniform. Only what is left is asked
    # for, so contexts are shorter at the start than they become.
    met = sampler.random.choice(np.arange(*lengths), sequences, p=np.arange(*lengths) / sum(range(*lengths)))
    sampler.add(np.maximum(met * sampler.random.random(sequences), 1).astype(int).tolist())
    while sampler.engine.waiting or 0 in sampler.tokens():
        sampler.engine.step()
    started, sampled, steps = time.perf_counter(), -sum(sampler.tokens()), 0
    while (seconds := time.perf_counter() - started) < given.seconds:
        missing = sequences + 2 * ADMITTED - len(sampler.engine.growing) - len(sampler.engine.waiting)
        sampler.add(sampler.random.integers(*lengths, missing).tolist())
        sampled += sum(len(completion.ids_C) for _, completion in sampler.engine.step())
        steps += 1
    sampled += sum(sampler.tokens())
    print(
        f"steadily {sequences} completions of {given.shortest} to {given.longest} tokens, for "
        f"{seconds:.0f} s: {sampled / seconds:,.0f} tokens/s, {seconds / steps * 1e3:.1f} ms a step"
    )
    sampler.drop()


if __name__ == "__main__":
    main()
