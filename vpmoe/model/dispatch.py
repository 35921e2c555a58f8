"""Token dispatch: sends tokens to their experts and sums the results, over one rank or several.

Without Transformer Engine, megatron-core's dispatcher splits its input into one tensor per expert and joins
them again, four times per layer and again in the backward. At 256 experts that takes two fifths of a training
step on a GPU. Here every choice (a token and one of its experts) is a row, and one permutation sorts the rows
by expert. Combining is the inverse permutation and a sum over each token's choices, which is also the
gradient of dispatching. So neither direction scatters, and both are deterministic. The last permutation, to
the experts of a rank, is described by a `Sorting` and left to experts.py: a GPU's products read through it.
The GPU's kernels are in dispatch_gpu.py.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch import distributed as dist

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

        Its readers of the input get equal tensors, whose gradients come one by one (residual.py). On one rank
        the sum over a token's choices also adds the two others; megatron's forward does so afterwards."""
        shared = self.shared_experts_compute(for_shared)
        weight_NK, expert_NK = self.route(for_router, padding_bS.T)
        dispatched, weight_C = self.preprocess(for_routed, weight_NK, expert_NK)
        dispatched, weight_C = self.dispatch(dispatched, weight_C)
        dispatcher = self.token_dispatcher
        rows, sorting, weight_C = dispatcher.dispatch_postprocess(dispatched, weight_C)
        if dispatcher.ep_size == 1:
            beside = tuple(x.reshape(rows.shape) for x in (shared, stream))
            return dispatcher.combine_postprocess(self.experts(rows, sorting, weight_C, beside)[0])
        combined = self.combine(self.experts(rows, sorting, weight_C)[0])
        return total_of((dispatcher.combine_postprocess(combined), shared, stream))


@dataclass(frozen=True)
class Sorting:
    """How the choices that a rank's experts compute are sorted by expert."""

    order_C: Tensor
    """The choice of each row; choice c is of token c // choices."""
    inverse_C: Tensor
    """The row of each choice."""
    tokens_E: Tensor
    """Number of rows of each expert."""
    choices: int
    """Of a token."""


class Dispatcher(MoETokenDispatcher):  # type: ignore[misc]
    """The steps of a mixture layer's forward, in the order in which megatron calls them.

    N tokens with K choices each make C = N·K rows.
    """

    def dispatch_preprocess(
        self, hidden: Tensor, expert_NK: Tensor, weight_NK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(tokens [N, H], weights [C]). With several ranks, a row [C, H] and a weight per choice, sorted by
        expert."""
        self.shape = hidden.shape
        tokens_NH, weight_C = hidden.view(-1, self.shape[-1]), weight_NK.flatten()
        self.sorting = _by_expert(expert_NK.flatten(), self.config.num_moe_experts, expert_NK.shape[1])
        if self.ep_size == 1:
            return tokens_NH, weight_C
        self.sent = sent = self.sorting
        return (
            spread(tokens_NH, sent.order_C, sent.inverse_C, sent.choices),
            spread(weight_C, sent.order_C, sent.inverse_C, 1),
        )

    def token_dispatch(self, rows: Tensor, weight_C: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, weights) that all ranks send to this rank's experts, by rank, then by expert."""
        if self.ep_size == 1:
            return rows, weight_C
        tokens_E = self.sent.tokens_E
        all_tokens = tokens_E.new_empty(self.ep_size * len(tokens_E))
        dist.all_gather_single(all_tokens, tokens_E, group=self.ep_group)
        self.received_Re = all_tokens.view(self.ep_size, -1).chunk(self.ep_size, dim=1)[self.ep_rank]
        self.sends, self.receives = (
            tokens_E.view(self.ep_size, -1).sum(1).tolist(),
            self.received_Re.sum(1).tolist(),
        )
        exchanged = (all_to_all(self.ep_group, x, self.receives, self.sends) for x in (rows, weight_C))
        return next(exchanged), next(exchanged)

    def dispatch_postprocess(self, rows: Tensor, weight_C: Tensor) -> tuple[Tensor, Sorting, Tensor]:
        """(rows, how their choices are sorted by this rank's experts, weights): a received row is a token
        with one choice."""
        if self.ep_size > 1:
            expert_e = torch.arange(self.received_Re.shape[1], device=rows.device).repeat(self.ep_size)
            order, inverse = _sorted(expert_e.repeat_interleave(self.received_Re.flatten()))
            self.sorting = Sorting(order, inverse, self.received_Re.sum(0), 1)
        return rows, self.sorting, weight_C

    def combine_preprocess(self, rows: Tensor) -> Tensor:
        """The experts' outputs, which are in the order of their inputs."""
        return rows

    def token_combine(self, rows: Tensor) -> Tensor:
        """The outputs for this rank's tokens, sent back by the ranks of their experts."""
        sent: Tensor = (
            rows if self.ep_size == 1 else all_to_all(self.ep_group, rows, self.sends, self.receives)
        )
        return sent

    def combine_postprocess(self, rows: Tensor) -> Tensor:
        """Each token's sum over its choices, in the shape of dispatch_preprocess's `hidden`."""
        del self.sorting  # or every layer would hold one until its next forward
        if self.ep_size > 1:
            rows = collect(rows, self.sent.order_C, self.sent.inverse_C, self.sent.choices)
            del self.sent, self.received_Re
        return rows.view(self.shape)


def _by_expert(expert_C: Tensor, experts: int, choices: int) -> Sorting:
    """Choices sorted by expert, in a stable order."""
    if expert_C.is_cuda:
        from vpmoe.model import dispatch_gpu  # its kernels are Triton's, which needs a GPU

        return Sorting(*dispatch_gpu.sorted_by_expert(expert_C, experts), choices)
    return Sorting(*_sorted(expert_C), expert_C.bincount(minlength=experts), choices)


def _sorted(key_C: Tensor) -> tuple[Tensor, Tensor]:
    """(the stable order that sorts the keys, its inverse)."""
    order = key_C.argsort(stable=True)
    return order, torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def spread(tokens: Tensor, order: Tensor, inverse: Tensor, choices: int) -> Tensor:
    """`choices` copies of every token, in `order`. Its gradient is `collect`."""
    copies: Tensor = _Spread.apply(tokens, order, inverse, choices)  # type: ignore[no-untyped-call]
    return copies


def collect(rows: Tensor, order: Tensor, inverse: Tensor, choices: int) -> Tensor:
    """The sum of every token's `choices` rows, which are in `order`. Its gradient is `spread`."""
    sums: Tensor = _Collect.apply(rows, order, inverse, choices)  # type: ignore[no-untyped-call]
    return sums


def _spread(tokens: Tensor, order: Tensor, choices: int) -> Tensor:
    return tokens.index_select(0, order // choices)


def _collect(rows: Tensor, inverse: Tensor, choices: int) -> Tensor:
    if rows.is_cuda and choices > 1:
        from vpmoe.model import dispatch_gpu

        return dispatch_gpu.sum_of_rows(rows, inverse, choices)
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
