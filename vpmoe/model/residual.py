"""The residual stream of a layer: what is added to it, and the norms of it that a layer's two parts read.

A norm comes with the sum before it. On a GPU both are one pass over memory, and so are their gradients with
those of all readers (norm_gpu.py).
"""

from functools import reduce

import torch
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """torch's; on a GPU with the kernels of norm_gpu.py."""

    def forward(self, x: Tensor) -> Tensor:
        """x […, H] divided by the root of its mean square and multiplied by the weight [H]."""
        if x.is_cuda:
            return self.of_sum((x,), 1)[1]
        return super().forward(x)

    def of_sum(self, addends: tuple[Tensor, ...], readers: int) -> tuple[Tensor, ...]:
        """(sum of one or two addends, then its norm, once for each reader)."""
        if addends[0].is_cuda:
            from vpmoe.model import norm_gpu  # its kernels are Triton's, which needs a GPU

            assert self.eps is not None, "the shape gives it"
            return norm_gpu.sum_and_norm(addends, self.weight, self.eps, readers)
        total = total_of(addends)
        return total, *[super().forward(total)] * readers


class StreamNorm(RMSNorm):
    """The norm before a part of a layer. Adds to the residual stream what the part before returned, and gives
    each of its readers the norm of the sum as a tensor of its own, so that their gradients come one by one.
    """

    def forward(self, *addends: Tensor, readers: int = 1) -> tuple[Tensor, ...]:  # type: ignore[override]
        """(the stream […, H], then its norm `readers` times). One or two addends."""
        return self.of_sum(addends, readers)


def total_of(addends: tuple[Tensor, ...]) -> Tensor:
    """The sum of tensors of one shape. On a GPU it is rounded once, elsewhere after each addition."""
    if addends[0].is_cuda and len(addends) > 2:
        from vpmoe.model import norm_gpu

        return norm_gpu.total_of(*addends)
    return reduce(torch.add, addends)
