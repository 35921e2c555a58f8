"""Time of one decoding step of the student in vLLM, a token for each of N sequences, beside floor and peer.

    python -m benchmarks.decode [--shape vpmoe-6b] [--sequences 1,64,512] [--length 256] [--profile]
    python -m benchmarks.decode --peer granite

Runs the sampler's own engine (vpmoe/inference/engine.py) in bf16 with random weights: N random prompts of
--prompt tokens, and completions of --length and of an eighth of it. A step's time is the difference of the
two divided by that of their lengths, without the prompts' computation, and with scheduling and sampling.
"call" is the whole call of --length, its prompts included. Floor: reading the weights once (of the experts,
those that some sequence chose, for uniformly random choices), and the keys and values of the mean context
once, at --bandwidth. The last lines fit a straight line to the times over N, the cost of a step, and that per
sequence: they are the `--decode` and `--decode-token` of benchmarks.pipeline. Then 3 N completions of
--length / 4 to --length · 7 / 4 are sampled with at most N, the largest, at a time, so that most steps also
start a prompt.

`--peer` runs another model's shape in the same vLLM instead, with the same CUDA graphs and dummy weights:
`granite` is Granite-MoE 3B-A0.8B, which has about as many active parameters as vpmoe-6b, in 32 layers. Needs
a GPU, and vLLM for CUDA.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vpmoe.inference.engine import StudentEngine
from vpmoe.inference.vllm_options import gpu_sampling_options, prepare_environment
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


def student(shape: Shape, max_length: int, sequences: int) -> StudentEngine:
    """An engine with random weights: every expert is as likely as any other."""
    import torch

    from vpmoe.model import hf_export

    engine = StudentEngine(shape, max_length)
    with tempfile.TemporaryDirectory() as folder:
        config = hf_export.hf_config(shape, max_length, torch.bfloat16)
        (Path(folder) / "config.json").write_text(json.dumps(config))
        engine._llm = engine._start(Path(folder), load_format="dummy", max_num_seqs=sequences)
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


def peer(name: str, max_length: int, sequences: int) -> Any:
    """vLLM with a peer's shape and dummy weights."""
    prepare_environment()
    import vllm

    graphs = gpu_sampling_options()["compilation_config"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(PEERS[name]))
        return vllm.LLM(
            folder,
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype="bfloat16",
            max_model_len=max_length,
            max_num_seqs=sequences,
            enable_prefix_caching=False,
            compilation_config=graphs,
            disable_log_stats=True,
            seed=0,
        )


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


class Sampler:
    """Asks an engine as the sampler does, but without stop tokens, so that lengths are what they are set
    to."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.random = np.random.default_rng(0)

    def requests(self, prompt: int, lengths: list[int]) -> tuple[list[Any], list[Any]]:
        """Random prompts and the sampling parameters for completions of these lengths."""
        import vllm

        params = [
            vllm.SamplingParams(
                max_tokens=length, temperature=1.0, seed=n, logprobs=0, ignore_eos=True, detokenize=False
            )
            for n, length in enumerate(lengths)
        ]
        return [
            {"prompt_token_ids": self.random.integers(0, 40000, prompt).tolist()} for _ in lengths
        ], params

    def profile(self, prompt: int, length: int, sequences: int) -> None:
        """Print the kernels of steps that only decode, after half of `length` has been sampled."""
        engine = self.llm.llm_engine
        ids = [f"profiled-{n}" for n in range(sequences)]
        for name, asked, params in zip(ids, *self.requests(prompt, [length] * sequences), strict=True):
            engine.add_request(name, asked, params)
        grown = 0
        while grown < length // 2:
            grown = min([len(output.outputs[0].token_ids) for output in engine.step()], default=0)
        print(f"profile of {PROFILED} steps of {sequences} sequences of {prompt + grown} tokens: ", end="")
        print_profile(engine.step)
        engine.abort_request(ids)

    def seconds(self, prompt: int, lengths: list[int]) -> float:
        """Seconds to sample completions of these lengths, of random prompts."""
        import torch

        asked, params = self.requests(prompt, lengths)
        torch.cuda.synchronize()
        started = time.perf_counter()
        outputs = self.llm.generate(asked, params, use_tqdm=False)
        assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="vpmoe-6b")
    parser.add_argument("--peer", choices=PEERS, help="another model instead of the student")
    parser.add_argument("--prompt", type=int, default=103, help="tokens of a prompt")
    parser.add_argument("--length", type=int, default=256, help="tokens of a completion")
    parser.add_argument(
        "--sequences",
        type=lambda text: [int(count) for count in text.split(",")],
        default=[1, 64, 512],
        help="values of N, comma-separated",
    )
    parser.add_argument("--bandwidth", type=float, default=4800.0, help="of the GPU's memory, GB/s")
    parser.add_argument("--profile", action="store_true", help="list kernels at the largest N")
    given = parser.parse_args()
    shape = SHAPES[given.shape]
    largest = max(given.sequences)
    longest = given.prompt + 2 * given.length + 1
    started = time.perf_counter()
    llm = peer(given.peer, longest, largest) if given.peer else student(shape, longest, largest)._llm
    import torch
    import vllm

    print(
        f"{torch.cuda.get_device_name()}, {given.peer or shape.name}, vLLM {vllm.__version__}, "
        f"torch {torch.__version__}; started in {time.perf_counter() - started:.0f} s"
    )
    measure(Sampler(llm), given, None if given.peer else shape)


def measure(sampler: Sampler, given: argparse.Namespace, shape: Shape | None) -> None:
    print(f"{'N':>5}  {'ms a step':>9}  {'floor ms':>8}  {'tokens/s':>9}  {'call tokens/s':>13}")
    short, times = given.length // 8, []
    for count in given.sequences:
        sampler.seconds(given.prompt, [2] * count)  # compiles kernels
        first = sampler.seconds(given.prompt, [short] * count)
        whole = sampler.seconds(given.prompt, [given.length] * count)
        times.append((whole - first) / (given.length - short) * 1e3)
        floor = ""
        if shape is not None:
            context = given.prompt + (given.length + short) // 2
            floor = f"{floor_ms(shape, count, context, given.bandwidth):.2f}"
        print(
            f"{count:>5}  {times[-1]:>9.2f}  {floor:>8}  {count / times[-1] * 1e3:>9,.0f}  "
            f"{count * given.length / whole:>13,.0f}",
            flush=True,
        )
    if len(times) > 1:
        slope, start = np.polyfit(given.sequences, times, 1)
        print(f"a step costs {start / 1e3:.4f} s and {slope / 1e3:.6f} s a sequence")
    largest = max(given.sequences)
    lengths = sampler.random.integers(given.length // 4, given.length * 7 // 4 + 1, 3 * largest).tolist()
    seconds = sampler.seconds(given.prompt, lengths)
    print(f"{len(lengths)} completions, at most {largest} at a time: {sum(lengths) / seconds:,.0f} tokens/s")
    if given.profile:
        sampler.profile(given.prompt, 2 * given.length, largest)


if __name__ == "__main__":
    main()
