"""The optimizer's step on this rank's share of the weights: AdamW, and the rounded copy of its result.

vpmoe-6b has 1,518 parameters. megatron's optimizer and torch's AdamW go through them in Python at every step,
while the GPU waits for its work. Gradients, fp32 parameters, moments and weights keep their addresses, so the
lists of them are made once, and a step gives whole lists to torch. The bits are those of
torch.optim.AdamW(fused=True).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from vpmoe.model.state import OptimizerShard


class WeightUpdate:
    """Create it once gradients and moments are allocated."""

    def __init__(self, optimizer: Any, shards: Sequence[OptimizerShard]) -> None:
        """`optimizer`: megatron's, whose fp32 parameters have a `grad`. `shards`: this rank's."""
        self.gradients: list[Tensor] = [parameter.grad for parameter in optimizer.get_parameters()]
        """Of this rank's share, fp32, in the optimizer's order."""
        self._groups = [
            _Group.of(part.optimizer.state, group)
            for part in optimizer.chained_optimizers
            for group in part.optimizer.param_groups
        ]
        rounded = [shard for shard in shards if shard.weight.dtype != shard.main.dtype]
        self._weights = [shard.weight for shard in rounded]
        self._mains = [shard.main for shard in rounded]

    @torch.no_grad()
    def step(self, learning_rate: float, weight_decay: float) -> None:
        """Move this rank's share of the weights. Uses the gradients as they are. `weight_decay` applies to
        matrices, not to norms (the groups' wd_mult)."""
        for group in self._groups:
            adamw(
                group.parameters,
                group.gradients,
                group.exp_avgs,
                group.exp_avg_sqs,
                [],
                group.steps,
                fused=True,  # one pass over memory; torch's default on the CPU makes ten
                amsgrad=False,
                beta1=group.options["betas"][0],
                beta2=group.options["betas"][1],
                lr=learning_rate,
                weight_decay=weight_decay * group.options["wd_mult"],
                eps=group.options["eps"],
                maximize=False,
            )
        if self._weights:  # elsewhere fp32 parameters are the weights
            torch._foreach_copy_(self._weights, self._mains)


@dataclass(frozen=True, eq=False)
class _Group:
    """What torch's adamw takes, of one of the optimizer's groups of parameters."""

    options: dict[str, Any]
    parameters: list[Tensor]
    gradients: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]

    @classmethod
    def of(cls, state: dict[Tensor, dict[str, Tensor]], group: dict[str, Any]) -> "_Group":
        held: list[Any] = group["params"]
        moments = [state[parameter] for parameter in held]
        return cls(
            group,
            held,
            [parameter.grad for parameter in held],
            *([one[kind] for one in moments] for kind in ("exp_avg", "exp_avg_sq", "step")),
        )
