"""The student's forward pass in vLLM on a GPU: vllm_model.py's modules, computed with gpu_kernels.py.

Between dense matrix products and vLLM's attention, everything is a kernel of gpu_kernels.py, and the residual
sum of one half of a layer is computed together with the norm of the next.
"""

from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from vpmoe.inference import gpu_kernels
from vpmoe.model.head import chunk_logits
from vpmoe.model.modeling_vpmoe import MLP, MoE, Projections, rotation


def forward(decoder: Any, hidden_NH: Tensor, positions_N: Tensor) -> Tensor:
    """Hidden states [N, H] after the last norm, of embeddings [N, H]. `decoder`: vllm_model.Decoder."""
    cos_N1D, sin_N1D = rotation(positions_N, decoder.config, decoder.log_frequency)
    turn = cos_N1D.squeeze(1), sin_N1D.squeeze(1)
    epsilon = decoder.config.rms_norm_eps
    layers: list[Any] = list(decoder.layers)
    following_norms = [*(layer.input_layernorm.weight for layer in layers[1:]), decoder.norm.weight]
    normed_NH: Tensor = layers[0].input_layernorm(hidden_NH)
    first_value_NgD: Tensor | None = None
    for layer, following in zip(layers, following_norms, strict=True):
        query, key, value_NgD = project(layer.self_attn, normed_NH, turn, first_value_NgD, epsilon)
        first_value_NgD = value_NgD if first_value_NgD is None else first_value_NgD
        out_NH = layer.self_attn.attend(query, key, value_NgD)
        norm = layer.post_attention_layernorm.weight
        hidden_NH, normed_NH = gpu_kernels.add_and_norm(hidden_NH, out_NH, None, norm, epsilon)
        routed, shared_NH = feed_forward(layer.mlp, normed_NH)
        hidden_NH, normed_NH = gpu_kernels.add_and_norm(hidden_NH, routed, shared_NH, following, epsilon)
    return normed_NH


def project(
    attention: Projections,
    normed_NH: Tensor,
    turn: tuple[Tensor, Tensor],
    first_value_NgD: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Projections.project: queries [N, heads, D], keys and values [N, groups, D]. `turn`: cos and sin [N, D]
    of the rotation, fp32."""
    heads, groups, width, ranks = attention.heads, attention.groups, attention.width, attention.ranks
    if ranks is None:
        parts = [project(normed_NH) for project in (attention.q_proj, attention.k_proj, attention.v_proj)]
        bias = None
    else:
        factors_NF = linear(normed_NH, attention.tensor_product.weight)
        key = ranks[0] * (heads + width)
        parts = [factors_NF, factors_NF[:, key:], factors_NF[:, key + ranks[1] * (groups + width) :]]
        bias = attention.tensor_product.bias
    residual = None
    if attention.value_mix is not None:
        assert first_value_NgD is not None, "the first layer has no value residual"
        residual = attention.value_mix, first_value_NgD
    return gpu_kernels.project_heads(
        *parts,
        heads=heads,
        groups=groups,
        ranks=ranks,
        bias=bias,
        norms=(attention.q_norm.weight, attention.k_norm.weight),
        epsilon=epsilon,
        rotation=turn if attention.slopes is None else None,
        residual=residual,
    )


def feed_forward(layer: MLP | MoE, normed_NH: Tensor) -> tuple[Tensor, Tensor | None]:
    """(output [N, H], None) of a dense layer; (outputs of each token's experts [N, K, H], of the shared one
    [N, H]) of a mixture."""
    if isinstance(layer, MLP):
        return _dense(layer, normed_NH), None
    gate, experts = layer.gate, layer.experts
    expert_NK, weight_NK = gpu_kernels.choose_experts(
        # the product of bf16 numbers is exact in the fp32 sum, as in the definition, which converts them
        chunk_logits(normed_NH, gate.weight),
        gate.bias,
        gate.e_score_correction_bias,
        choices=gate.choices,
        groups=gate.groups,
        chosen_groups=gate.chosen_groups,
        scaling=gate.scaling,
    )
    routed_NKH = gpu_kernels.apply_experts(
        normed_NH,
        expert_NK,
        weight_NK,
        experts.up,
        experts.up_bias,
        experts.down,
        experts.down_bias,
    )
    return routed_NKH, _dense(layer.shared_expert, normed_NH)


def _dense(layer: MLP, normed_NH: Tensor) -> Tensor:
    out: Tensor = layer.down_proj(gpu_kernels.squared_relu(layer.up_proj(normed_NH)))
    return out
