"""Time of one decoding step of the student, a token for each of N sequences. Floor: reading its weights once.

    python -m benchmarks.decode [--shape vpmoe-6b] [--context 512] [--sequences 1,16,64,128,256]

Runs the exported student's layers (vpmoe/model/modeling_vpmoe.py) in bf16 with random weights; attention of
one token per sequence over a full cache is torch's products and softmax. The forward pass is timed twice:
launched from Python, as in an eager engine, and as one CUDA graph. Then the sampling of a token per sequence
from fp32 logits is timed, each sequence with its own generator. The last lines fit a straight line to the
times over N: the cost of a step, and the cost per sequence. They are the `--decode` and `--decode-token` of
benchmarks.pipeline. Needs a GPU.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from vpmoe.model import hf_export
from vpmoe.model.configuration_vpmoe import VpmoeConfig
from vpmoe.model.modeling_vpmoe import VpmoeForCausalLM, rotation
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


class LayerCache(NamedTuple):
    """What one layer keeps of N sequences: keys and values [N, key-value heads, positions, width], those of a
    window in a local layer; and `bias`, [key-value heads, heads of each, 1 + positions]: the softmax offset,
    and what ALiBi adds to the scores."""

    keys: Tensor
    values: Tensor
    bias: Tensor


def random_cache(model: Any, shape: Shape, count: int, context: int) -> list[LayerCache]:
    """A full cache of `count` sequences of `context` positions, the current one included."""
    found = []
    for number, layer in enumerate(model.model.layers):
        weight = layer.input_layernorm.weight
        positions = min(shape.window(number) or context, context)
        distance_k = torch.arange(positions, device=weight.device).flip(0)
        slopes_h = torch.tensor(shape.slopes(number) or [0.0] * shape.heads, device=weight.device)
        offset_h = layer.self_attn.softmax_offset
        if offset_h is None:
            offset_h = torch.full_like(slopes_h, -torch.inf)
        bias_hk = torch.cat([offset_h[:, None], -slopes_h[:, None] * distance_k], dim=1)
        size = (count, shape.kv_heads, positions, shape.head_width)
        keys, values = (torch.randn(size, dtype=weight.dtype, device=weight.device) for _ in range(2))
        found.append(LayerCache(keys, values, bias_hk.unflatten(0, (shape.kv_heads, -1))))
    return found


def forward(model: Any, ids_N: Tensor, position_1: Tensor, cache: list[LayerCache]) -> Tensor:
    """Logits [N, V] of the next token of each sequence, all of which are at the same position."""
    decoder = model.model
    hidden_NH = decoder.embed_tokens(ids_N)
    cos, sin = (
        part.to(hidden_NH.dtype) for part in rotation(position_1, model.config, decoder.log_frequency)
    )
    first_NgD: Tensor | None = None
    for layer, held in zip(decoder.layers, cache, strict=True):
        attention = layer.self_attn
        query_NhD, key_NgD, value_NgD = attention.project(
            layer.input_layernorm(hidden_NH), cos, sin, first_NgD
        )
        first_NgD = value_NgD if first_NgD is None else first_NgD
        held.keys[:, :, -1] = key_NgD
        held.values[:, :, -1] = value_NgD
        query_NgrD = query_NhD.unflatten(1, (len(held.bias), -1)) * attention.width**-0.5
        score_Ngrk = pad((query_NgrD @ held.keys.mT).float(), (1, 0)) + held.bias
        weight_Ngrk = score_Ngrk.softmax(3)[..., 1:].to(hidden_NH.dtype)
        hidden_NH = hidden_NH + attention.o_proj((weight_Ngrk @ held.values).flatten(1))
        hidden_NH = hidden_NH + layer.mlp(layer.post_attention_layernorm(hidden_NH))
    logits: Tensor = model.lm_head(decoder.norm(hidden_NH))
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
    position_1, found = torch.tensor([given.context - 1], device="cuda"), []
    for count in given.sequences:
        ids_N = torch.randint(0, shape.vocabulary, (count,), device="cuda")
        cache = random_cache(model, shape, count, given.context)
        generators = [torch.Generator("cuda").manual_seed(seed) for seed in range(count)]
        step = partial(forward, model, ids_N, position_1, cache)
        eager, logits_NV = seconds(step), step()
        sampling = seconds(lambda logits_NV=logits_NV, generators=generators: sample(logits_NV, generators))
        captured = seconds(cuda_graph(step))
        found.append((count, eager + sampling, captured + sampling))
        speeds = count / (eager + sampling), count / (captured + sampling)
        print(
            f"{count:5}  {eager * 1e3:9.1f}  {captured * 1e3:9.1f}  {sampling * 1e3:9.2f}  "
            f"{speeds[0]:15,.0f}  {speeds[1]:8,.0f}",
            flush=True,
        )
        del cache, step
    counts, *times = zip(*found, strict=True)
    for name, values in zip(("eager", "graph"), times, strict=True):
        slope, start = np.polyfit(counts, values, 1)
        print(f"{name}: {start * 1e3:.1f} ms per step, plus {slope * 1e6:.0f} µs per sequence")


if __name__ == "__main__":
    main()
