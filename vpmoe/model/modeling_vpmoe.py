"""The student in transformers, and its layers' parts in plain torch, which vLLM's model has too.

Attention has the parts that the configuration names (configuration_vpmoe.py); feed-forward layers are squared
ReLU and mixtures of experts. Parameters have their checkpoint names. It computes the same as the trainer's
student, without balance losses and expert parallelism. No operation synchronises with the GPU.

This file is copied into every exported model folder, so it imports nothing but torch, transformers and the
files beside it that are copied too.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, scaled_dot_product_attention
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.qwen3 import Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3PreTrainedModel, Qwen3RMSNorm
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_vpmoe import VpmoeConfig
from .grouped import grouped_product
from .tensor_product import tensor_product

QUERIES = 512
"""Queries whose scores are held at the same time, if attention has a part that a causal mask cannot say."""


class MLP(nn.Module):
    """down(relu(up(x))²): the feed-forward layer of the first layers, and the shared expert."""

    def __init__(self, hidden: int, width: int, bias: bool) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.down_proj(torch.relu(self.up_proj(hidden)).square())
        return out


class Router(nn.Module):
    """Selects K experts per token within the best groups by sigmoid(x·W) + selection bias, weighted by the
    sigmoid; in fp32. With `bias`, a learned one is added to x·W.

    A group's score is the sum of its K / (groups per token) best experts, as in megatron-core
    (group_limited_topk). The group routers of vLLM and transformers sum the best two for every K.
    """

    def __init__(self, config: VpmoeConfig) -> None:
        super().__init__()
        self.choices, self.scaling = config.num_experts_per_tok, config.routed_scaling_factor
        self.groups, self.chosen_groups = config.n_group, config.topk_group
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.n_routed_experts)) if config.router_bias else None
        self.e_score_correction_bias = nn.Parameter(
            torch.empty(config.n_routed_experts, dtype=torch.float32), requires_grad=False
        )

    def forward(self, hidden_NH: Tensor) -> tuple[Tensor, Tensor]:
        """(experts [N, K] int64, their weights [N, K] fp32)."""
        bias = None if self.bias is None else self.bias.float()
        score_NE = torch.sigmoid(linear(hidden_NH.float(), self.weight.float(), bias))
        biased_NE = score_NE + self.e_score_correction_bias
        by_group = biased_NE.view(len(biased_NE), self.groups, -1)
        group_NG = by_group.topk(self.choices // self.chosen_groups, dim=2).values.sum(2)
        left_out_NG = torch.ones_like(group_NG, dtype=torch.bool).scatter_(
            1, group_NG.topk(self.chosen_groups, dim=1).indices, False
        )
        expert_NK = (
            by_group.masked_fill(left_out_NG.unsqueeze(2), -torch.inf)
            .flatten(1)
            .topk(self.choices, dim=1)
            .indices
        )
        weight_NK = score_NE.gather(1, expert_NK)
        return expert_NK, weight_NK / (weight_NK.sum(1, keepdim=True) + 1e-20) * self.scaling


class Experts(nn.Module):
    """Σ_k weight_k · (down_e(relu(up_e(x) + b₁)²) + b₂), with e the token's k-th expert.

    Rows are sorted by expert, then multiplied by two grouped matrix products.
    """

    def __init__(self, config: VpmoeConfig) -> None:
        super().__init__()
        experts, width, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.up = nn.Parameter(torch.empty(experts, width, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, width))
        self.up_bias: nn.Parameter | None = None
        self.down_bias: nn.Parameter | None = None
        if config.linear_biases:
            self.up_bias = nn.Parameter(torch.empty(experts, width))
            self.down_bias = nn.Parameter(torch.empty(experts, hidden))

    def forward(self, hidden_NH: Tensor, expert_NK: Tensor, weight_NK: Tensor) -> Tensor:
        expert_C, order = expert_NK.flatten().sort(stable=True)
        numbers_E = torch.arange(len(self.up), device=expert_C.device)
        ends_E = torch.searchsorted(expert_C, numbers_E, right=True, out_int32=True)
        rows_CH = hidden_NH[order // expert_NK.shape[1]]
        weight_C = weight_NK.flatten()[order].unsqueeze(1)
        inner_CW = grouped_product(rows_CH, self.up, ends_E)
        if self.up_bias is not None:
            inner_CW = inner_CW + self.up_bias[expert_C]
        inner_CW = (torch.relu(inner_CW).square() * weight_C).to(hidden_NH.dtype)
        out_CH = grouped_product(inner_CW, self.down, ends_E)
        if self.down_bias is not None:
            out_CH = out_CH + (self.down_bias[expert_C] * weight_C).to(hidden_NH.dtype)
        return out_CH[order.argsort()].view(*expert_NK.shape, -1).sum(1)


class MoE(nn.Module):
    """Mixture of experts: the routed experts plus the shared one."""

    def __init__(self, config: VpmoeConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_expert = MLP(
            config.hidden_size, config.shared_expert_intermediate_size, config.linear_biases
        )

    def forward(self, hidden: Tensor) -> Tensor:
        hidden_NH = hidden.flatten(0, -2)
        routed: Tensor = self.experts(hidden_NH, *self.gate(hidden_NH))
        shared: Tensor = self.shared_expert(hidden)
        return routed.view_as(hidden) + shared


def feed_forward(config: VpmoeConfig, layer: int) -> MLP | MoE:
    """The feed-forward part of a layer. Choose other implementations for a kind of device here."""
    return (
        MLP(config.hidden_size, config.intermediate_size, config.linear_biases)
        if layer < config.first_k_dense_replace
        else MoE(config)
    )


class Projections(nn.Module):
    """Normalised and rotated queries, keys, and values of a layer: all of its attention but the softmax.

    A base class: its parameters are the attention's own in every checkpoint.
    """

    def __init__(self, config: VpmoeConfig, layer: int) -> None:
        super().__init__()
        hidden, self.width = config.hidden_size, config.head_dim
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.ranks, self.window, self.slopes = config.ranks(layer), config.window(layer), config.slopes(layer)
        bias = config.linear_biases
        if self.ranks is None:
            self.q_proj = nn.Linear(hidden, self.heads * self.width, bias=bias)
            self.k_proj = nn.Linear(hidden, self.groups * self.width, bias=bias)
            self.v_proj = nn.Linear(hidden, self.groups * self.width, bias=bias)
        else:
            self.tensor_product = TensorProduct(config, self.ranks)
        self.o_proj = nn.Linear(self.heads * self.width, hidden, bias=bias)
        self.q_norm, self.k_norm = (Qwen3RMSNorm(self.width, eps=config.rms_norm_eps) for _ in range(2))
        self.softmax_offset: nn.Parameter | None = None
        if config.softmax_offset:
            self.softmax_offset = nn.Parameter(torch.empty(self.heads, dtype=torch.float32))
        self.value_mix: nn.Parameter | None = None
        if config.value_residual and layer > 0:
            self.value_mix = nn.Parameter(torch.empty(1, dtype=torch.float32))

    def project(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, first_value: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries […, heads, D], keys and values […, groups, D] of hidden states […, H]. cos and sin […, 1,
        D]; `first_value`: the first layer's values, in later ones."""
        if self.ranks is None:
            query, key, value = (
                project(hidden).unflatten(-1, (-1, self.width))
                for project in (self.q_proj, self.k_proj, self.v_proj)
            )
        else:
            query, key, value = self.tensor_product(hidden)
        query, key = self.q_norm(query), self.k_norm(key)
        if self.slopes is None:
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if self.value_mix is not None:
            assert first_value is not None, "the first layer's values come with the hidden states"
            share = self.value_mix.sigmoid()
            value = (share * value + (1 - share) * first_value).to(value.dtype)
        return query, key, value


class TensorProduct(nn.Module):
    """Queries, keys and values as tensor products of factors, which are linear in the hidden state."""

    def __init__(self, config: VpmoeConfig, ranks: tuple[int, int]) -> None:
        super().__init__()
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.width, self.ranks = config.head_dim, ranks
        factors = ranks[0] * (self.heads + self.width) + 2 * ranks[1] * (self.groups + self.width)
        self.weight = nn.Parameter(torch.empty(factors, config.hidden_size))
        self.bias: nn.Parameter | None = None
        if config.linear_biases:
            self.bias = nn.Parameter(torch.empty((self.heads + 2 * self.groups) * self.width))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        factors = linear(hidden, self.weight)
        parts = tensor_product(factors, self.heads, self.groups, self.width, self.ranks)
        if self.bias is None:
            return parts
        biases = torch.split(self.bias.view(-1, self.width), [self.heads, self.groups, self.groups])
        query, key, value = (part + bias for part, bias in zip(parts, biases, strict=True))
        return query, key, value


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of […, D] in the half-and-half order."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def rotation(position: Tensor, config: VpmoeConfig, log_frequency: Tensor | None) -> tuple[Tensor, Tensor]:
    """cos and sin […, 1, D] in fp32 of the angles of positions […]: position · exp(log_frequency / 16), or
    base^(−2i / D) without learned frequencies."""
    if log_frequency is None:
        width = config.head_dim
        exponent = torch.arange(0, width, 2, dtype=torch.float32, device=position.device) / width
        frequency = config.rope_parameters["rope_theta"] ** -exponent
    else:
        frequency = (log_frequency / 16).exp()
    angle = position.float().unsqueeze(-1) * frequency
    angle = torch.cat([angle, angle], dim=-1).unsqueeze(-2)
    return angle.cos(), angle.sin()


def attention(
    query_bhqD: Tensor,
    key_bgkD: Tensor,
    value_bgkD: Tensor,
    *,
    window: int | None,
    slopes: list[float] | None,
    offset_h: Tensor | None,
    seen_bk: Tensor | None,
) -> Tensor:
    """[b, h, q, D]: the queries are those of the last positions of the keys. `seen_bk`: False for padding.

    A softmax offset is one more key, whose score is the offset and whose value is zero. Block by block of
    queries, so that no tensor has all pairs of positions.
    """
    queries, keys = query_bhqD.shape[2], key_bgkD.shape[2]
    if window is None and slopes is None and offset_h is None and seen_bk is None and queries in (1, keys):
        return scaled_dot_product_attention(
            query_bhqD, key_bgkD, value_bgkD, is_causal=queries > 1, enable_gqa=True
        )
    device = query_bhqD.device
    slopes_h = None if slopes is None else torch.tensor(slopes, device=device)
    blocks = []
    for start in range(keys - queries, keys, QUERIES):
        stop = min(start + QUERIES, keys)
        first = 0 if window is None else max(0, start - window + 1)
        position = torch.arange(first, stop, device=device)
        distance_qk = position[start - first :, None] - position[None, :]
        seen_bqk = (distance_qk >= 0).unsqueeze(0)
        if window is not None:
            seen_bqk = seen_bqk & (distance_qk < window)
        if seen_bk is not None:  # padding sees itself: a softmax of nothing would be NaN
            seen_bqk = seen_bqk & (seen_bk[:, None, first:stop] | (distance_qk == 0))
        bias_bhqk = torch.zeros_like(seen_bqk, dtype=torch.float32).masked_fill(~seen_bqk, -torch.inf)[
            :, None
        ]
        if slopes_h is not None:
            bias_bhqk = bias_bhqk - slopes_h[:, None, None] * distance_qk
        key, value = key_bgkD[:, :, first:stop], value_bgkD[:, :, first:stop]
        if offset_h is not None:
            key, value = pad(key, (0, 0, 1, 0)), pad(value, (0, 0, 1, 0))
            size = (len(bias_bhqk), len(offset_h), stop - start, 1)
            column = offset_h.float()[None, :, None, None].expand(size)
            bias_bhqk = torch.cat([column, bias_bhqk.expand(*size[:3], -1)], dim=3)
        query = query_bhqD[:, :, start - keys + queries : stop - keys + queries]
        mask = bias_bhqk.to(query.dtype)
        blocks.append(scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True))
    return torch.cat(blocks, dim=2)


class VpmoeAttention(Projections):
    def __init__(self, config: VpmoeConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.layer = layer

    def forward(
        self,
        hidden_bqH: Tensor,
        cos: Tensor,
        sin: Tensor,
        first_value: Tensor | None,
        seen_bk: Tensor | None,
        cache: Cache | None,
    ) -> tuple[Tensor, Tensor]:
        """(output [b, q, H], values [b, q, groups, D])."""
        query, key, value = self.project(hidden_bqH, cos, sin, first_value)
        keys, values = key.transpose(1, 2), value.transpose(1, 2)
        if cache is not None:
            keys, values = cache.update(keys, values, self.layer)
        out = attention(
            query.transpose(1, 2),
            keys,
            values,
            window=self.window,
            slopes=self.slopes,
            offset_h=self.softmax_offset,
            seen_bk=seen_bk,
        )
        return self.o_proj(out.transpose(1, 2).flatten(2)), value


class VpmoeDecoderLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    def __init__(self, config: VpmoeConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = VpmoeAttention(config, layer)
        self.mlp = feed_forward(config, layer)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_bqH: Tensor,
        cos: Tensor,
        sin: Tensor,
        first_value: Tensor | None,
        seen_bk: Tensor | None,
        past_key_values: Cache | None,
    ) -> tuple[Tensor, Tensor]:
        """(hidden states, values): the first layer's values are for the layers after it."""
        out, value = self.self_attn(
            self.input_layernorm(hidden_bqH), cos, sin, first_value, seen_bk, past_key_values
        )
        hidden_bqH = hidden_bqH + out
        return hidden_bqH + self.mlp(self.post_attention_layernorm(hidden_bqH)), value


class VpmoePreTrainedModel(Qwen3PreTrainedModel):  # type: ignore[misc]
    config_class = VpmoeConfig
    _can_record_outputs = {"hidden_states": VpmoeDecoderLayer}  # noqa: RUF012
    _no_split_modules = ("VpmoeDecoderLayer",)
    _keep_in_fp32_modules_strict = (
        "e_score_correction_bias",
        "softmax_offset",
        "value_mix",
        "log_frequency",
    )
    # Attention is this file's own: one implementation, which has every part.
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False


class VpmoeModel(VpmoePreTrainedModel):
    """The student up to its last hidden states."""

    def __init__(self, config: VpmoeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.layers = nn.ModuleList(
            VpmoeDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.log_frequency: nn.Parameter | None = None
        if config.learned_frequencies:
            self.log_frequency = nn.Parameter(torch.empty(config.head_dim // 2, dtype=torch.float32))
        self.post_init()

    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states [b, q, H]. `attention_mask` [b, keys]: 0 for padding. Raises ValueError for a mask of
        pairs of positions."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden_bqH = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(past, past + hidden_bqH.shape[1], device=hidden_bqH.device)[None]
        seen_bk = None
        if attention_mask is not None:
            if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
                raise ValueError(
                    "attention_mask must be [sequences, positions], 0 for padding: attention is causal in "
                    "every sequence. A static cache is not supported."
                )
            seen_bk = attention_mask.bool()
        cos, sin = (
            part.to(hidden_bqH.dtype) for part in rotation(position_ids, self.config, self.log_frequency)
        )
        first_value: Tensor | None = None
        for layer in self.layers:
            hidden_bqH, value = layer(
                hidden_bqH, cos, sin, first_value, seen_bk, past_key_values=past_key_values
            )
            first_value = value if first_value is None else first_value
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_bqH), past_key_values=past_key_values if use_cache else None
        )


class VpmoeForCausalLM(VpmoePreTrainedModel, Qwen3ForCausalLM):  # type: ignore[misc]
    def __init__(self, config: VpmoeConfig) -> None:
        super(Qwen3ForCausalLM, self).__init__(config)  # Qwen3's would first build a model of its own
        self.model = VpmoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
