"""The routed experts as two stacked weights and grouped products.

Without Transformer Engine, megatron-core executes its experts one by one: 256 of them take about 700 times
as long as their arithmetic. Stacked, any number of experts is two parameters, and a rank's experts are a
slice of the whole stack, so a checkpoint fits every expert-parallel layout. The choice of a token's experts
is in router.py, the dispatch to them in dispatch.py.
"""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from vpmoe.model.grouped import grouped_product


def squared_relu(x: Tensor) -> Tensor:
    return torch.relu(x).square()


class StackedExperts(MegatronModule):  # type: ignore[misc]
    """This rank's experts: down_e(squared_relu(up_e(x)) · p) for the tokens sorted by expert; p is the
    token's weight for expert e."""

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
        for weight in self.parameters():
            # megatron's name for "reduced over the ranks that hold the same experts, not over all ranks"
            weight.allreduce = config.expert_model_parallel_size == 1

    def forward(self, input_nH: Tensor, tokens_E: Tensor, weight_n: Tensor) -> tuple[Tensor, None]:
        """Output [n, H]. `tokens_E` [experts of this rank]: the number of rows of each expert; the n rows
        are sorted by expert."""
        ends_E = tokens_E.cumsum(0).to(device=input_nH.device, dtype=torch.int32)
        inner_nW = squared_relu(grouped_product(input_nH, self.up, ends_E))
        inner_nW = (inner_nW * weight_n.unsqueeze(1)).to(input_nH.dtype)
        return grouped_product(inner_nW, self.down, ends_E), None
