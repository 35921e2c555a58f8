"""The optimizer's step on this rank's share of the weights: gradients divided and clipped, AdamW, and the
rounded copy of its result.

vpmoe-6b has 1,518 parameters. megatron's optimizer and torch's AdamW go through them in Python at every step,
while the GPU waits for its work. Gradients, fp32 parameters, moments and weights keep their addresses, so the
lists of them are made once. On a GPU all is one kernel (adamw_gpu.py). Elsewhere a step gives whole lists to
torch, with the bits of torch.optim.AdamW(fused=True).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim.adamw import adamw

from vpmoe.model.state import OptimizerShard

if TYPE_CHECKING:
    from vpmoe.model.adamw_gpu import AdamW


class WeightUpdate:
    """Create it once gradients and moments are allocated. Then, at each step: `divide`, `step`."""

    def __init__(self, optimizer: Any, shards: Sequence[OptimizerShard], device: torch.device) -> None:
        """`optimizer`: megatron's, whose fp32 parameters have a `grad`. `shards`: this rank's, in its
        order."""
        self._device = device
        self._gradients: list[Tensor] = [parameter.grad for parameter in optimizer.get_parameters()]
        self._groups = [
            _Group.of(part.optimizer.state, group)
            for part in optimizer.chained_optimizers
            for group in part.optimizer.param_groups
        ]
        rounded = [shard for shard in shards if shard.weight.dtype != shard.main.dtype]
        self._weights = [shard.weight for shard in rounded]
        self._mains = [shard.main for shard in rounded]
        self._factor = 1.0
        """Of the gradients of this step, which the kernel multiplies by it."""
        self._kernel = self._one_kernel() if device.type == "cuda" and self._gradients else None

    def divide(self, positions: Tensor) -> Tensor:
        """Divide the gradients by `positions`, at least 1. Returns the square of their norm after it, a fp32
        scalar on the device."""
        if not self._gradients:  # of few parameters on many ranks
            return torch.zeros((), device=self._device)
        factor = float(1.0 / positions.clamp(min=1))
        if self._kernel:
            self._factor = factor
            return self._kernel.squares() * factor**2
        torch._foreach_mul_(self._gradients, factor)
        return get_total_norm(self._gradients) ** 2

    @torch.no_grad()
    def step(self, learning_rate: float, weight_decay: float, factor: float) -> None:
        """Move this rank's share of the weights. The gradients, after `divide`, are multiplied by `factor`
        if it is less than 1. `weight_decay` applies to matrices, not to norms (the groups' wd_mult)."""
        factor = min(factor, 1.0)
        if self._kernel:
            steps = [step for group in self._groups for step in group.steps]  # some ranks have empty groups
            torch._foreach_add_(steps, 1)
            self._kernel.step(int(steps[0]), self._factor * factor, learning_rate, weight_decay)
            return
        if factor < 1 and self._gradients:
            torch._foreach_mul_(self._gradients, factor)
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

    def _one_kernel(self) -> "AdamW":
        from vpmoe.model.adamw_gpu import AdamW, Updated  # Triton, which only a GPU needs

        weights = dict(zip((main.data_ptr() for main in self._mains), self._weights, strict=True))
        options = self._groups[0].options
        parameters = [
            Updated(*tensors, weights.get(tensors[1].data_ptr()), bool(group.options["wd_mult"]))
            for group in self._groups
            for tensors in zip(
                group.gradients, group.parameters, group.exp_avgs, group.exp_avg_sqs, strict=True
            )
        ]
        return AdamW(parameters, options["betas"], options["eps"])


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
