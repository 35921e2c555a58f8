"""The student in transformers, and its feed-forward layers in plain torch, which vLLM's model has too.

The student is Qwen3's model (grouped-query attention with norms on queries and keys, RMSNorm, half-rotated
RoPE, no biases, untied embeddings) with other feed-forward layers. Parameters have their checkpoint names. It
computes the same as the trainer's student, without balance losses and expert parallelism. No operation
synchronises with the GPU.

This file is copied into every exported model folder, so it imports nothing but torch, transformers and the
files beside it that are copied too.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.models.qwen3 import Qwen3ForCausalLM

from .configuration_vpmoe import VpmoeConfig
from .grouped import grouped_product


class MLP(nn.Module):
    """down(relu(up(x))²): the feed-forward layer of the first layers, and the shared expert."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.down_proj(torch.relu(self.up_proj(hidden)).square())
        return out


class Router(nn.Module):
    """Selects K experts per token within the best groups by sigmoid(x·W) + bias, weighted by the sigmoid; in
    fp32.

    A group's score is the sum of its K / (groups per token) best experts, as in megatron-core
    (group_limited_topk). The group routers of vLLM and transformers sum the best two for every K.
    """

    def __init__(self, config: VpmoeConfig) -> None:
        super().__init__()
        self.choices, self.scaling = config.num_experts_per_tok, config.routed_scaling_factor
        self.groups, self.chosen_groups = config.n_group, config.topk_group
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias = nn.Parameter(
            torch.empty(config.n_routed_experts, dtype=torch.float32), requires_grad=False
        )

    def forward(self, hidden_NH: Tensor) -> tuple[Tensor, Tensor]:
        """(experts [N, K] int64, their weights [N, K] fp32)."""
        score_NE = torch.sigmoid(linear(hidden_NH.float(), self.weight.float()))
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
    """Σ_k down_e(relu(up_e(x))² · weight_k), with e the token's k-th expert.

    Rows are sorted by expert, then multiplied by two grouped matrix products.
    """

    def __init__(self, config: VpmoeConfig) -> None:
        super().__init__()
        experts, width, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.up = nn.Parameter(torch.empty(experts, width, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, hidden_NH: Tensor, expert_NK: Tensor, weight_NK: Tensor) -> Tensor:
        expert_C, order = expert_NK.flatten().sort(stable=True)
        numbers_E = torch.arange(len(self.up), device=expert_C.device)
        ends_E = torch.searchsorted(expert_C, numbers_E, right=True, out_int32=True)
        rows_CH = hidden_NH[order // expert_NK.shape[1]]
        inner_CW = torch.relu(grouped_product(rows_CH, self.up, ends_E)).square()
        inner_CW = (inner_CW * weight_NK.flatten()[order].unsqueeze(1)).to(hidden_NH.dtype)
        out_CH = grouped_product(inner_CW, self.down, ends_E)
        return out_CH[order.argsort()].view(*expert_NK.shape, -1).sum(1)


class MoE(nn.Module):
    """Mixture of experts: the routed experts plus the shared one."""

    def __init__(self, config: VpmoeConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_expert = MLP(config.hidden_size, config.shared_expert_intermediate_size)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden_NH = hidden.flatten(0, -2)
        routed: Tensor = self.experts(hidden_NH, *self.gate(hidden_NH))
        shared: Tensor = self.shared_expert(hidden)
        return routed.view_as(hidden) + shared


def feed_forward(config: VpmoeConfig, layer: int) -> MLP | MoE:
    """The feed-forward part of a layer. Choose other implementations for a kind of device here."""
    return (
        MLP(config.hidden_size, config.intermediate_size)
        if layer < config.first_k_dense_replace
        else MoE(config)
    )


class VpmoeForCausalLM(Qwen3ForCausalLM):  # type: ignore[misc]
    config_class = VpmoeConfig
    _keep_in_fp32_modules_strict = ("e_score_correction_bias",)

    def __init__(self, config: VpmoeConfig) -> None:
        super().__init__(config)
        for number, layer in enumerate(self.model.layers):
            layer.mlp = feed_forward(config, number)
        self.post_init()
