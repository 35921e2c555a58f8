"""Time of one decoding step of the student, a token for each of N sequences. Floor: reading its weights once.

    python -m benchmarks.decode [--shape vpmoe-6b] [--context 512] [--sequences 1,16,64,128,256]

Runs the exported student's layers (vpmoe/model/modeling_vpmoe.py) in bf16 with random weights, with torch's
attention of one token per sequence over a full cache. The forward pass is timed twice: launched from Python,
as in an eager engine, and as one CUDA graph. Then the sampling of a token per sequence from fp32 logits is
timed, each sequence with its own generator. The last lines fit a straight line to the times over N: the cost
of a step, and the cost per sequence. They are the `--decode` and `--decode-token` of benchmarks.pipeline.
Needs a GPU.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vpmoe.model import hf_export
from vpmoe.model.configuration_vpmoe import VpmoeConfig
from vpmoe.model.modeling_vpmoe import VpmoeForCausalLM
from vpmoe.model.shapes import SHAPES, Shape


def student(shape: Shape, positions: int) -> Any:
    """A student with random weights, on the GPU."""
    config = hf_export.hf_config(shape, positions, torch.bfloat16)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model: Any = VpmoeForCausalLM(VpmoeConfig(**config))
        for parameter in model.parameters():
            parameter.data.normal_(std=0.02) if parameter.dim() > 1 else parameter.data.fill_(1)
    torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False)


def rotate(heads_NhD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embeddings to the two halves of each head."""
    left, right = heads_NhD.chunk(2, dim=-1)
    return heads_NhD * cos + torch.cat((-right, left), dim=-1) * sin


def forward(model: Any, shape: Shape, ids_N: Tensor, cache: Tensor) -> Tensor:
    """Logits [N, V] of the next token of each sequence.

    `cache` is [layers, 2, N, key-value heads, context, width].
    """
    hidden_NH, width = model.model.embed_tokens(ids_N), shape.head_width
    position = torch.full((1, 1), cache.shape[4] - 1, device=ids_N.device)
    cos, sin = model.model.rotary_emb(hidden_NH, position)
    for layer, (keys, values) in zip(model.model.layers, cache, strict=True):
        attention, normed_NH = layer.self_attn, layer.input_layernorm(hidden_NH)
        query, key = (
            rotate(norm(project(normed_NH).view(len(ids_N), -1, width)), cos, sin)
            for norm, project in ((attention.q_norm, attention.q_proj), (attention.k_norm, attention.k_proj))
        )
        keys[:, :, -1] = key
        values[:, :, -1] = attention.v_proj(normed_NH).view(len(ids_N), -1, width)
        seen = scaled_dot_product_attention(query.unsqueeze(2), keys, values, enable_gqa=True)
        hidden_NH = hidden_NH + attention.o_proj(seen.reshape(len(ids_N), -1))
        hidden_NH = hidden_NH + layer.mlp(layer.post_attention_layernorm(hidden_NH))
    logits: Tensor = model.lm_head(model.model.norm(hidden_NH))
    return logits


def sample(logits_NV: Tensor, generators: list[torch.Generator]) -> Tensor:
    """Sample a token per sequence and return its log-probability, [N, 1].

    Samples as vLLM does for requests with seeds: with exponential noise, generated row by row.
    """
    logp_NV = logits_NV.float().log_softmax(1)
    noise_NV = torch.empty_like(logp_NV)
    for row, generator in zip(noise_NV, generators, strict=True):
        row.exponential_(generator=generator)
    token_N = logp_NV.exp().div_(noise_NV).argmax(1)
    return logp_NV.gather(1, token_N[:, None])


def seconds(call: Callable[[], object], repeats: int = 10) -> float:
    """Median seconds of a call."""
    times = []
    for _ in range(repeats + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def cuda_graph(call: Callable[[], object]) -> Callable[[], object]:
    """The call, captured as one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, stream=stream):
        call()
    return captured.replay


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="vpmoe-6b")
    parser.add_argument("--context", type=int, default=512, help="positions in the cache of each sequence")
    parser.add_argument(
        "--sequences",
        type=lambda text: [int(count) for count in text.split(",")],
        default=[1, 16, 64, 128, 256],
        help="values of N, comma-separated",
    )
    given = parser.parse_args()
    shape = SHAPES[given.shape]
    model = student(shape, given.context)
    held = sum(parameter.numel() for parameter in model.parameters())
    half = torch.empty(held // 2, dtype=torch.bfloat16, device="cuda")
    floor = seconds(half.clone)  # half of the weights, read and written, is as many bytes as reading all
    del half
    print(
        f"{torch.cuda.get_device_name()}, {given.shape}, context {given.context}; floor {floor * 1e3:.1f} ms"
    )
    print(
        f"{'N':>5}  {'eager ms':>9}  {'graph ms':>9}  {'sample ms':>9}  {'tokens/s, eager':>15}  {'graph':>8}"
    )
    found = []
    for count in given.sequences:
        ids_N = torch.randint(0, shape.vocabulary, (count,), device="cuda")
        cache = torch.randn(
            shape.layers,
            2,
            count,
            shape.kv_heads,
            given.context,
            shape.head_width,
            dtype=torch.bfloat16,
            device="cuda",
        )
        generators = [torch.Generator("cuda").manual_seed(seed) for seed in range(count)]
        eager = seconds(lambda ids_N=ids_N, cache=cache: forward(model, shape, ids_N, cache))
        logits_NV = forward(model, shape, ids_N, cache)
        sampling = seconds(lambda logits_NV=logits_NV, generators=generators: sample(logits_NV, generators))
        captured = seconds(cuda_graph(lambda ids_N=ids_N, cache=cache: forward(model, shape, ids_N, cache)))
        found.append((count, eager + sampling, captured + sampling))
        speeds = count / (eager + sampling), count / (captured + sampling)
        print(
            f"{count:5}  {eager * 1e3:9.1f}  {captured * 1e3:9.1f}  {sampling * 1e3:9.2f}  "
            f"{speeds[0]:15,.0f}  {speeds[1]:8,.0f}",
            flush=True,
        )
        del cache
    counts, *times = zip(*found, strict=True)
    for name, values in zip(("eager", "graph"), times, strict=True):
        slope, start = np.polyfit(counts, values, 1)
        print(f"{name}: {start * 1e3:.1f} ms per step, plus {slope * 1e6:.0f} µs per sequence")


if __name__ == "__main__":
    main()
