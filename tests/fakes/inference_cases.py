"""The kernels of inference on a GPU (gpu_kernels.py, decode_attention.py) beside the same in float64.

    TRITON_INTERPRET=1 python -m tests.fakes.inference_cases

runs them without a GPU.
"""

from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor, nn

from tests.fakes.policy_versions import COMPLETE_TINY
from tests.fakes.students import WITHOUT, new_seed
from vpmoe.inference import gpu_kernels, gpu_student
from vpmoe.inference.decode_attention import decode_attention
from vpmoe.model import hf_export
from vpmoe.model.configuration_vpmoe import VpmoeConfig
from vpmoe.model.modeling_vpmoe import MLP, MoE, Projections, feed_forward, rotation
from vpmoe.model.shapes import SHAPES, Shape

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
"""Allowed relative error of a norm. float32: order of sums. bf16: at most four roundings of 2⁻⁹ (a projection
or an inner row, and the output), each of which a norm shows as 2e-3 or less."""
PLAIN_TINY = replace(COMPLETE_TINY, **WITHOUT)
COMPLETE = replace(SHAPES["vpmoe-6b"], router_bias=True)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def randomised(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The module with random weights that change its result; what is kept in float32 stays in float32."""
    for name, parameter in module.named_parameters():
        kept = name.endswith(("softmax_offset", "value_mix", "log_frequency", "e_score_correction_bias"))
        std = 0.2 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
        parameter.data = (torch.randn(parameter.shape, device=device) * std).to(
            torch.float32 if kept else dtype
        )
        if name.endswith("norm.weight"):
            parameter.data += 1
    return module


def queries_keys_and_values(
    shape: Shape, layer: int, device: torch.device, dtype: torch.dtype, tokens: int
) -> None:
    config = VpmoeConfig(**hf_export.hf_config(shape, 4096, dtype))
    module = randomised(Projections(config, layer), device, dtype)
    hidden_NH = torch.randn(tokens, shape.hidden, device=device).to(dtype)
    first_NgD = torch.randn(tokens, shape.kv_heads, shape.head_width, device=device).to(dtype)
    frequency = None
    if shape.learned_frequencies:
        frequency = torch.randn(shape.head_width // 2, device=device)
    cos, sin = rotation(torch.randint(0, 4096, (tokens,), device=device), config, frequency)
    found = gpu_student.project(
        module, hidden_NH, (cos.squeeze(1), sin.squeeze(1)), first_NgD, shape.norm_epsilon
    )
    wanted = (
        deepcopy(module).double().project(hidden_NH.double(), cos.double(), sin.double(), first_NgD.double())
    )
    for name, x, y in zip(("queries", "keys", "values"), found, wanted, strict=True):
        assert relative(x, y) <= TOLERANCE[dtype], (shape.name, layer, name, relative(x, y))


def decoding_attention(
    shape: Shape, layer: int, device: torch.device, dtype: torch.dtype, sequences: int, longest: int
) -> None:
    """Over a cache whose blocks are in random order, with garbage where nothing may be read."""
    heads, groups, width, window = shape.heads, shape.kv_heads, max(shape.head_width, 32), shape.window(layer)
    block = 16
    query_NhD = torch.randn(sequences, heads, width, device=device).to(dtype)
    length_N = torch.randint(0, longest + 1, (sequences,), dtype=torch.int32, device=device)
    length_N[: min(3, sequences)] = torch.tensor([longest, 1, 0], dtype=torch.int32)[:sequences]
    blocks = -(-longest // block)
    cache = torch.randn(sequences * blocks + 1, groups, block, 2 * width, device=device).to(dtype)
    cache[0] = torch.nan
    blocks_NB = (torch.randperm(sequences * blocks, device=device) + 1).view(sequences, blocks).int()
    key_NTgD, value_NTgD = cache[blocks_NB].transpose(2, 3).flatten(1, 2).double().split(width, -1)
    position_T = torch.arange(blocks * block, device=device)
    seen_NT = position_T < length_N[:, None]
    if window is not None:
        seen_NT &= position_T >= length_N[:, None] - window
        blocks_NB[~seen_NT.unflatten(1, (blocks, block)).any(2)] = 0  # as vLLM has it
    slope_h = None if window is not None else torch.rand(heads, device=device)
    offset_h = torch.randn(heads, device=device)
    out = torch.full_like(query_NhD, torch.nan)
    decode_attention(
        query_NhD,
        cache,
        blocks_NB,
        length_N,
        scale=width**-0.5,
        window=window,
        slope_h=slope_h,
        offset_h=offset_h,
        out=out,
    )
    key_NThD, value_NThD = (x.repeat_interleave(heads // groups, 2) for x in (key_NTgD, value_NTgD))
    score_NhT = torch.einsum("nhd,nthd->nht", query_NhD.double(), key_NThD) * width**-0.5
    if slope_h is not None:
        score_NhT += slope_h.double()[:, None] * (position_T - (length_N[:, None] - 1))[:, None]
    score_NhT = score_NhT.masked_fill(~seen_NT[:, None], -torch.inf)
    with_offset = torch.cat([score_NhT, offset_h.double().expand(sequences, -1)[..., None]], 2)
    weight_NhT = with_offset.softmax(2)[..., :-1]
    wanted = torch.einsum("nht,nthd->nhd", weight_NhT, value_NThD.nan_to_num())
    assert relative(out, wanted) <= TOLERANCE[dtype], (shape.name, layer, relative(out, wanted))


def exact_output(layer: MLP | MoE, normed_NH: Tensor) -> Tensor:
    """[N, H] in float64, each choice with its expert's matrices. The router computes in float32, as it
    does."""
    if isinstance(layer, MLP):
        return layer(normed_NH)
    expert_NK, weight_NK = layer.gate(normed_NH)
    experts = layer.experts
    inner_NKW = torch.einsum("nh,nkwh->nkw", normed_NH, experts.up[expert_NK])
    if experts.up_bias is not None:
        inner_NKW = inner_NKW + experts.up_bias[expert_NK]
    out_NKH = torch.einsum("nkw,nkhw->nkh", torch.relu(inner_NKW).square(), experts.down[expert_NK])
    if experts.down_bias is not None:
        out_NKH = out_NKH + experts.down_bias[expert_NK]
    return (out_NKH * weight_NK.double().unsqueeze(2)).sum(1) + layer.shared_expert(normed_NH)


def feed_forward_layers(
    shape: Shape, layer: int, device: torch.device, dtype: torch.dtype, tokens: int
) -> None:
    """A mixture's routed and shared output, or a dense layer's, added to hidden states and normalised."""
    config = VpmoeConfig(**hf_export.hf_config(shape, 4096, dtype))
    module = randomised(feed_forward(config, layer), device, dtype)
    norm = randomised(nn.RMSNorm(shape.hidden, eps=shape.norm_epsilon), device, dtype)
    hidden_NH, normed_NH = torch.randn(2, tokens, shape.hidden, device=device).to(dtype)
    found = gpu_kernels.add_and_norm(
        hidden_NH, *gpu_student.feed_forward(module, normed_NH), norm.weight, shape.norm_epsilon
    )
    exact_norm = deepcopy(norm).double()
    wanted = hidden_NH.double() + exact_output(deepcopy(module).double(), normed_NH.double())
    for name, x, y in zip(("sum", "norm"), found, (wanted, exact_norm(wanted)), strict=True):
        assert relative(x, y) <= TOLERANCE[dtype], (shape.name, layer, tokens, name, relative(x, y))


def experts_are_sorted(device: torch.device, tokens: int) -> None:
    """Stable, with experts that have no token."""
    expert_NK = torch.randint(0, 13, (tokens, 4), device=device, dtype=torch.int32) * 2
    order_C, starts_E = gpu_kernels.sort_by_expert(expert_NK, 32)
    wanted = expert_NK.flatten().sort(stable=True)
    assert torch.equal(order_C.long(), wanted.indices)
    counts = torch.bincount(expert_NK.flatten(), minlength=32).cumsum(0)
    assert torch.equal(starts_E[1:].long(), counts) and starts_E[0] == 0


def main() -> None:
    device = torch.device("cpu")
    torch.manual_seed(new_seed())
    with torch.no_grad():
        for shape in (COMPLETE_TINY, PLAIN_TINY):
            for layer in (0, 2, 3):
                queries_keys_and_values(shape, layer, device, torch.float32, 5)
            for layer, tokens in ((0, 3), (1, 1), (1, 70)):
                feed_forward_layers(shape, layer, device, torch.float32, tokens)
        experts_are_sorted(device, 300)
        for layer in (0, 3):
            decoding_attention(COMPLETE_TINY, layer, device, torch.float32, 4, 300)


if __name__ == "__main__":
    main()
