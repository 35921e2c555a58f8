"""Queries, keys and values as tensor products (TPA, arXiv 2501.06425), which local layers have.

All heads of a position share `rank` vectors; each head mixes them. Both the vectors and the mixtures are
linear in the hidden state, so a query, key or value is quadratic in it.

This file is copied into every exported model folder, so it imports nothing but torch.
"""

import torch
from torch import Tensor


def tensor_product(
    factors: Tensor, heads: int, groups: int, width: int, ranks: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries […, heads, width], keys and values […, groups, width]: q_h = Σ_r a_q[h, r] · b_q[r] / rank.

    `factors` […, F]: a_q [heads, R], b_q [R, width], a_k [groups, r], b_k [r, width], a_v and b_v likewise,
    in this order; `ranks` is (R, r).
    """
    sizes, shapes = [], []
    for count, rank in ((heads, ranks[0]), (groups, ranks[1]), (groups, ranks[1])):
        shapes += [(count, rank), (rank, width)]
        sizes += [count * rank, rank * width]
    pieces = [
        piece.reshape(*piece.shape[:-1], *shape)
        for piece, shape in zip(torch.split(factors, sizes, -1), shapes, strict=True)
    ]
    query, key, value = (
        torch.matmul(mixture, vectors) / vectors.shape[-2]
        for mixture, vectors in zip(pieces[::2], pieces[1::2], strict=True)
    )
    return query, key, value
