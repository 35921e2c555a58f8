"""The router of a mixture layer, and the load of its experts.

It is megatron-core's sigmoid router with groups and selection bias, corrected in three places. megatron's
fp32 product fails without Transformer Engine. Its count of tokens per expert, which moves the biases, accepts
no padding mask (the shapes do not match). Its sequence balance loss divides by the mean length of the rows,
which gives NaN for rows that are all padding and wrong shares for uneven rows.

A token's K choices are two tensors [N, K], as dispatch.py takes them, not megatron's [N, E]. The GPU's
kernels are in router_gpu.py.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn


class Router(TopKRouter):  # type: ignore[misc]
    """Chooses experts by sigmoid(x·W) + selection bias and weights them by the sigmoid alone, all of it in
    fp32; with `bias`, a learned one is added to x·W.

    Buffers, in fp32 for every dtype of the parameters: `expert_bias` [E] is part of a checkpoint;
    `local_tokens_per_expert` [E] and `aux_sum` are this rank's sums since the last step, over positions that
    are not padding.
    """

    def __init__(self, *args: Any, bias: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bias: nn.Parameter | None = None  # megatron creates one with the other linear biases
        if bias:
            self.bias = nn.Parameter(torch.empty_like(self.weight[:, 0]))
        self.register_buffer(
            "aux_sum", torch.zeros((), dtype=torch.float32, device=self.expert_bias.device), persistent=False
        )

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(weights [N, K] fp32, experts [N, K]) of the choices of N = S·b tokens `input` [S, b, H].
        `padding_mask` [S, b]."""
        if input.is_cuda:
            assert padding_mask is not None, "the student always passes its padding"
            return self._forward_on_gpu(input, padding_mask)
        weight_NE, chosen_NE = super().forward(input, padding_mask)
        # Every token has exactly K choices.
        expert_C = torch.nonzero_static(chosen_NE, size=len(chosen_NE) * self.topk)[:, 1]
        expert_NK = expert_C.view(len(chosen_NE), self.topk)
        return weight_NE.gather(1, expert_NK), expert_NK

    def _forward_on_gpu(self, input: Tensor, padding_Sb: Tensor) -> tuple[Tensor, Tensor]:
        from vpmoe.model import router_gpu  # its kernels are Triton's, which needs a GPU

        assert self.router_replay is None, "the kernels choose the experts themselves"
        self._maintain_float32_expert_bias()
        config = self.config
        rule = router_gpu.Rule(
            self.num_experts,
            self.topk,
            config.moe_router_num_groups,
            config.moe_router_group_topk,
            config.moe_router_topk_scaling_factor,
        )
        coefficient = self.get_aux_loss_coeff("seq_aux_loss")
        # Recomputation runs a forward twice; only the one with gradients counts.
        counted = torch.is_grad_enabled()
        balanced = counted and self.training and coefficient > 0
        return router_gpu.route(
            input.reshape(-1, input.shape[-1]),
            self.weight,
            self.bias,
            self.expert_bias,
            padding_Sb,
            rule,
            router_gpu.Load(self.local_tokens_per_expert, self.aux_sum) if counted else None,
            coefficient=coefficient if balanced else None,
        )

    def gating(self, input: Tensor) -> Tensor:
        dtype = torch.promote_types(input.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        logits: Tensor = nn.functional.linear(input.to(dtype), self.weight.to(dtype), bias)
        return logits

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Count the tokens of each expert. Recomputation runs a forward twice; only the one with gradients
        counts."""
        if torch.is_grad_enabled():
            assert padding_mask is not None, "the student always passes its padding"
            self.local_tokens_per_expert += (routing_map & ~padding_mask.unsqueeze(1)).sum(0)

    def _apply_seq_aux_loss(
        self,
        probs: Tensor,
        scores_for_aux_loss: Tensor,
        routing_map: Tensor,
        seq_length: int,
        bsz: int,
        with_padding_mask: bool = False,
    ) -> Tensor:
        """Attach the balance loss of each row r: coefficient · E · Σ_e f_re · p_re, weighted by its n_r
        positions that are not padding.

        f_re is the share of the row's choices that are expert e, p_re the mean of e's normalised score over
        the row (DeepSeek-V3, eq. 17–20; here balanced experts give 1). Learner.step divides the gradients by
        the positions of the global batch, so the coefficient has the same meaning however rows are masked,
        packed or padded. The scores and the map are zero at padding.
        """
        scores_rE, choices_rE = (
            x.view(seq_length, bsz, -1).sum(0) for x in (scores_for_aux_loss, routing_map)
        )
        positions_r = choices_rE.sum(1) / self.topk
        # n_r · E · Σ f·p
        balance_r = (
            (scores_rE * choices_rE).sum(1) * self.num_experts / (self.topk * positions_r.clamp(min=1))
        )
        self.aux_sum += balance_r.detach().sum()
        attached: Tensor = MoEAuxLossAutoScaler.apply(
            probs, self.get_aux_loss_coeff("seq_aux_loss") * balance_r.sum()
        )
        return attached


@dataclass(frozen=True, eq=False)
class ExpertLoad:
    """Tokens of each expert in one step, summed over all ranks. L mixture layers of E experts."""

    layers: tuple[str, ...]
    """The layers' names in the student; the first is "layers.1" if one layer is dense."""
    tokens: Tensor
    """[L, E] int64"""
    aux: Tensor
    """[L] float64, the balance loss without its coefficient, a mean over positions: 1 when balanced,
    E / experts per token when collapsed."""

    @property
    def max_over_mean(self) -> Tensor:
        """[L] ratio of the busiest expert's tokens to the mean; 1 when balanced."""
        tokens = self.tokens.double()
        return tokens.amax(1) / tokens.mean(1).clamp(min=1 / tokens.shape[1])

    @property
    def dead(self) -> Tensor:
        """[L] int64, number of experts without a token."""
        return (self.tokens == 0).sum(1)


def routers(student: nn.Module) -> dict[str, Router]:
    """The student's routers by name of their layer (see ExpertLoad.layers), in order."""
    return {
        name.removeprefix("decoder.").removesuffix(".mlp.router"): m
        for name, m in student.named_modules()
        if isinstance(m, Router)
    }
