"""Token dispatch: which choices this rank's experts compute, sorted by expert, over one rank or several.

Without Transformer Engine, megatron-core's dispatcher splits its input into one tensor per expert and joins
them again, four times per layer and again in the backward. At 256 experts that takes two fifths of a training
step on a GPU. Here every choice (a token and one of its experts) is a row, and one permutation sorts the rows
by expert. Combining is the inverse permutation and a sum over each token's choices, which is also the
gradient of dispatching. So neither direction scatters, and both are deterministic. The permutation is
described by a `Sorting` and left to experts.py: a GPU's products read through it. The GPU's kernels are in
dispatch_gpu.py.

Ranks that share a set of experts sort the choices of all their tokens. Those of other ranks' experts come
last, and are not computed (expert_exchange.py).
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from vpmoe.model.expert_exchange import all_gather, gathered
from vpmoe.model.residual import total_of


class MixtureLayer(MoELayer):  # type: ignore[misc]
    """megatron's mixture layer (router, experts, shared expert) with the dispatcher below."""

    readers = 3
    """Of its input: see `added_to`."""

    def __init__(
        self, config: TransformerConfig, *, pg_collection: ProcessGroupCollection, **kwargs: Any
    ) -> None:
        super().__init__(config, pg_collection=pg_collection, **kwargs)
        self.token_dispatcher = Dispatcher(config, pg_collection)

    def added_to(
        self,
        stream: Tensor,
        for_shared: Tensor,
        for_router: Tensor,
        for_routed: Tensor,
        *,
        padding_bS: Tensor,
    ) -> Tensor:
        """Output of the routed experts, plus that of the shared one, plus the residual stream [S, b, H].

        Its readers of the input get equal tensors, whose gradients come one by one (residual.py). On a GPU
        that has all experts the sum over a token's choices also adds the two others. Elsewhere they are added
        after it, as by megatron: a CPU's bits depend on the order in which autograd adds gradients."""
        shared = self.shared_experts_compute(for_shared)
        weight_NK, expert_NK = self.route(for_router, padding_bS.T)
        dispatched, weight_C = self.preprocess(for_routed, weight_NK, expert_NK)
        dispatched, weight_C = self.dispatch(dispatched, weight_C)
        dispatcher = self.token_dispatcher
        rows, sorting, weight_C = dispatcher.dispatch_postprocess(dispatched, weight_C)
        if rows.is_cuda and dispatcher.ep_size == 1:
            beside = tuple(x.reshape(rows.shape) for x in (shared, stream))
            return dispatcher.combine_postprocess(self.experts(rows, sorting, weight_C, beside)[0])
        combined = self.combine(self.experts(rows, sorting, weight_C)[0])
        return total_of((dispatcher.combine_postprocess(combined), shared, stream))


@dataclass(frozen=True)
class Sorting:
    """How choices are sorted by the experts of this rank. C are those of N tokens, or with a `group` of all
    its ranks' tokens, in the order of the ranks."""

    order_C: Tensor
    """The choice of each row; choice c is of token c // choices. Choices of other ranks' experts follow, on a
    GPU; on the CPU they are left out."""
    inverse_C: Tensor
    """The row of each choice; of one of other ranks' experts a number that no row has."""
    tokens_E: Tensor
    """Number of rows of each expert."""
    choices: int
    """Of a token."""
    group: ProcessGroup | None = None
    """The ranks that share a set of experts; None if this rank has all experts."""


class Dispatcher(MoETokenDispatcher):  # type: ignore[misc]
    """The steps of a mixture layer's forward, in the order in which megatron calls them.

    N tokens with K choices each make C = N·K rows; with R ranks that share a set of experts, R·N·K.
    """

    def dispatch_preprocess(
        self, hidden: Tensor, expert_NK: Tensor, weight_NK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(tokens [N, H], weights [C])."""
        self.shape = hidden.shape
        experts, group = self.config.num_moe_experts, None
        if self.ep_size > 1:
            group = self.ep_group
            weight_NK = gathered(weight_NK, group)
            # counted from the first of this rank's, which so come first
            expert_NK = (all_gather(expert_NK, group) - experts // self.ep_size * self.ep_rank) % experts
        self.sorting = _by_expert(expert_NK, experts, experts // self.ep_size, group)
        return hidden.view(-1, self.shape[-1]), weight_NK.flatten()

    def token_dispatch(self, tokens: Tensor, weight_C: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing: the experts gather the tokens, and only for as long as they read them."""
        return tokens, weight_C

    def dispatch_postprocess(self, tokens: Tensor, weight_C: Tensor) -> tuple[Tensor, Sorting, Tensor]:
        """(tokens, how their choices are sorted, weights)."""
        return tokens, self.sorting, weight_C

    def combine_preprocess(self, tokens: Tensor) -> Tensor:
        """The experts' outputs, summed over each token's choices."""
        return tokens

    def token_combine(self, tokens: Tensor) -> Tensor:
        """Nothing: the experts have summed them over the ranks."""
        return tokens

    def combine_postprocess(self, tokens: Tensor) -> Tensor:
        """In the shape of dispatch_preprocess's `hidden`."""
        del self.sorting  # or every layer would hold one until its next forward
        return tokens.view(self.shape)


def _by_expert(expert_NK: Tensor, experts: int, own: int, group: ProcessGroup | None) -> Sorting:
    """Choices sorted by expert, in a stable order. This rank has the first `own` of the experts."""
    expert_C, choices = expert_NK.flatten(), expert_NK.shape[1]
    if expert_C.is_cuda:
        from vpmoe.model import dispatch_gpu  # its kernels are Triton's, which needs a GPU

        order, inverse, tokens_E = dispatch_gpu.sorted_by_expert(expert_C, experts)
        return Sorting(order, inverse, tokens_E[:own], choices, group)
    order = expert_C.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    tokens_E = expert_C.bincount(minlength=experts)[:own]
    return Sorting(order[: int(tokens_E.sum())], inverse, tokens_E, choices, group)


def spread(tokens: Tensor, order: Tensor, inverse: Tensor, choices: int) -> Tensor:
    """The token of every row, in `order`. Its gradient is `collect`."""
    copies: Tensor = _Spread.apply(tokens, order, inverse, choices)  # type: ignore[no-untyped-call]
    return copies


def collect(rows: Tensor, order: Tensor, inverse: Tensor, choices: int) -> Tensor:
    """The sum of every token's rows, which are in `order`; choices without a row add nothing. Its gradient is
    `spread`."""
    sums: Tensor = _Collect.apply(rows, order, inverse, choices)  # type: ignore[no-untyped-call]
    return sums


def _spread(tokens: Tensor, order: Tensor, choices: int) -> Tensor:
    return tokens.index_select(0, order // choices)


def _collect(rows: Tensor, inverse: Tensor, choices: int) -> Tensor:
    if len(rows) < len(inverse):  # one more row for the choices that have none
        rows, inverse = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])]), inverse.clamp(max=len(rows))
    return rows.index_select(0, inverse).view(-1, choices, *rows.shape[1:]).sum(1)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, inverse: Tensor, choices: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.choices = choices
        return _spread(tokens, order, choices)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return _collect(gradient, inverse, ctx.choices), None, None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor, choices: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.choices = choices
        return _collect(rows, inverse, choices)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (order,) = ctx.saved_tensors
        return _spread(gradient, order, ctx.choices), None, None, None
