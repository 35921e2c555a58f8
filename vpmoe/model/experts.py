"""The routed experts as two stacked weights and grouped products.

Without Transformer Engine, megatron-core executes its experts one by one: 256 of them take about 700 times
as long as their arithmetic. Stacked, any number of experts is two parameters, and a rank's experts are a
slice of the whole stack, so a checkpoint fits every expert-parallel layout. The choice of a token's experts
is in router.py, the dispatch to them in dispatch.py, their computation on a GPU in experts_gpu.py. Beside
them, the shared expert.
"""

from copy import copy

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from vpmoe.model.dispatch import Sorting, collect, spread
from vpmoe.model.expert_exchange import gathered, scattered
from vpmoe.model.grouped import grouped_product, grouped_product_with_bias, rows_of
from vpmoe.model.residual import total_of


def squared_relu(x: Tensor) -> Tensor:
    return torch.relu(x).square()


class StackedExperts(MegatronModule):  # type: ignore[misc]
    """This rank's experts: the sum over a token's choices of p · (down_e(squared_relu(up_e(x) + b₁)) + b₂);
    p is the token's weight for expert e.

    The biases are flat, [experts·width] and [experts·H]: megatron's optimizer gives weight decay to what is
    not a vector, and no other bias has any.
    """

    def __init__(
        self,
        experts: int,
        config: TransformerConfig,
        *,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(config)
        shape = (experts, config.moe_ffn_hidden_size, config.hidden_size)
        place = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.up = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=place))
        self.down = nn.Parameter(
            torch.empty((shape[0], shape[2], shape[1]), dtype=config.params_dtype, device=place)
        )
        self.up_bias: nn.Parameter | None = None
        self.down_bias: nn.Parameter | None = None
        if config.add_bias_linear:
            self.up_bias, self.down_bias = (
                nn.Parameter(torch.empty(experts * width, dtype=config.params_dtype, device=place))
                for width in (shape[1], shape[2])
            )
        for weight in self.parameters():
            # megatron's name for "reduced over the ranks that hold the same experts, not over all ranks"
            weight.allreduce = config.expert_model_parallel_size == 1

    def forward(
        self, input_NH: Tensor, sorting: Sorting, weight_C: Tensor, beside: tuple[Tensor, ...] = ()
    ) -> tuple[Tensor, None]:
        """[N, H]: the sum over each token's choices, plus up to two tensors `beside` it [N, H]. `sorting` is
        by expert of this rank; a weight per choice, in their own order. With a group of ranks all of them
        call it: see Sorting."""
        if input_NH.is_cuda:
            from vpmoe.model import experts_gpu  # its kernels are Triton's, which needs a GPU

            return experts_gpu.mixture(
                input_NH,
                weight_C,
                self.up,
                self.down,
                self.up_bias,
                self.down_bias,
                sorting.order_C,
                sorting.inverse_C,
                sorting.tokens_E,
                sorting.choices,
                sorting.group,
                beside,
            ), None
        order_C, inverse_C, choices = sorting.order_C, sorting.inverse_C, sorting.choices
        if sorting.group is not None:
            input_NH = gathered(input_NH, sorting.group)
        rows_CH = spread(input_NH, order_C, inverse_C, choices)
        rows_CH = self._of_rows(rows_CH, sorting.tokens_E, spread(weight_C, order_C, inverse_C, 1))
        sums_NH = collect(rows_CH, order_C, inverse_C, choices)
        if sorting.group is not None:
            sums_NH = scattered(sums_NH, sorting.group)
        return total_of((sums_NH, *beside)), None

    def _of_rows(self, input_CH: Tensor, tokens_E: Tensor, weight_C: Tensor) -> Tensor:
        """[C, H], of rows sorted by expert."""
        ends_E = tokens_E.cumsum(0).to(device=input_CH.device, dtype=torch.int32)
        inner_CW = grouped_product(input_CH, self.up, ends_E)
        if self.up_bias is None or self.down_bias is None:
            inner_CW = (squared_relu(inner_CW) * weight_C.unsqueeze(1)).to(input_CH.dtype)
            return grouped_product(inner_CW, self.down, ends_E)
        inner_CW = squared_relu(inner_CW + rows_of(self.up_bias, ends_E, len(input_CH)))
        inner_CW = (inner_CW * weight_C.unsqueeze(1)).to(input_CH.dtype)
        return grouped_product_with_bias(inner_CW, self.down, self.down_bias, weight_C, ends_E)


class FeedForward(MLP):  # type: ignore[misc]
    """megatron's feed-forward part, without a mixture: of a dense layer."""

    readers = 1
    """Of its input, as in MixtureLayer."""

    def added_to(self, stream: Tensor, hidden: Tensor, *, padding_bS: Tensor) -> Tensor:
        """Its output […, H] plus the residual stream, as MixtureLayer.added_to."""
        return total_of((self.biased(hidden), stream))

    def biased(self, hidden: Tensor) -> Tensor:
        """Output […, H], its bias included."""
        if hidden.is_cuda:
            from vpmoe.model import activation_gpu, linear_gpu  # their kernels are Triton's

            up, down = self.linear_fc1, self.linear_fc2
            inner = activation_gpu.squared_relu(linear_gpu.linear(hidden, up.weight, None), up.bias)
            return linear_gpu.linear(inner, down.weight, down.bias)
        out, bias = super().forward(hidden)
        summed: Tensor = out if bias is None else out + bias
        return summed


class SharedExpert(FeedForward):
    """The expert that every token passes through. megatron's SharedExpertMLP allows no bias."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        gate: bool,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        assert not gate, "the student's shared expert has no gate"
        own = copy(config)
        own.ffn_hidden_size = config.moe_shared_expert_intermediate_size
        super().__init__(
            own, submodules, ffn_hidden_size=own.ffn_hidden_size, tp_group=pg_collection.tp, name=name
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Output […, H], its bias included."""
        return self.biased(hidden)
