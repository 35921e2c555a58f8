"""Sorting a mixture layer's choices by expert on a GPU, and summing a token's rows: Triton kernels.

Choices are sorted by counting: how many choices of each expert a block of choices has, a sum over the blocks
before it, and a choice's rank in its block. torch's stable sort takes seven kernels. A token's rows are read
and added in one pass; torch first copies them into the tokens' order. No atomic additions: the order is the
stable one, and sums are the same in each call.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

CHOICES = 128
"""Choices of a block."""
COLUMNS = 1024
"""Largest number of columns that a program adds."""


def sorted_by_expert(expert_C: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(the stable order that sorts the choices by expert [C] int64, its inverse [C] int64, number of choices
    of each expert [experts] int64)."""
    choices, device = len(expert_C), expert_C.device
    blocks = triton.cdiv(choices, CHOICES)
    count_EB = torch.empty(experts, blocks, dtype=torch.int32, device=device)
    width = triton.next_power_of_2(experts)
    _count[(blocks,)](expert_C, count_EB, choices, blocks, experts, width, CHOICES)
    end_EB = count_EB.view(-1).cumsum(0, dtype=torch.int32)
    # each at the start of an allocation: Triton compiles another kernel for a pointer of another alignment
    order, inverse = (torch.empty(choices, dtype=torch.int64, device=device) for _ in range(2))
    _place[(blocks,)](expert_C, count_EB, end_EB, order, inverse, choices, blocks, CHOICES)
    return order, inverse, count_EB.sum(1)


def sum_of_rows(
    rows_CW: Tensor,
    inverse: Tensor,
    choices: int,
    beside: tuple[Tensor, ...] = (),
    ends_E: Tensor | None = None,
) -> Tensor:
    """[tokens, W]: the sum of the `choices` rows of each token and of up to two tensors `beside` them
    [tokens, W], added in fp32; choice c is row `inverse[c]`. With `ends_E` int32 there are rows up to its
    last number only; the others add nothing and are not read."""
    first, second = ([x.contiguous() for x in beside] + [None, None])[:2]
    rows_CW = rows_CW.contiguous()
    tokens, width = len(inverse) // choices, rows_CW.shape[1]
    out = rows_CW.new_empty(tokens, width)
    block = min(COLUMNS, triton.next_power_of_2(width))
    experts = 0 if ends_E is None else len(ends_E)
    grid = (tokens, triton.cdiv(width, block))
    _sum[grid](rows_CW, inverse, ends_E, first, second, out, width, choices, block, experts, num_warps=4)
    return out


@triton.jit(do_not_specialize=["choices", "blocks"])  # type: ignore[untyped-decorator]
def _count(expert, count, choices, blocks, EXPERTS: tl.constexpr, E: tl.constexpr, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """E: the smallest power of 2 that is not below EXPERTS."""
    block = tl.program_id(0)
    c = block * C + tl.arange(0, C)
    e = tl.arange(0, E)
    own = tl.load(expert + c, mask=c < choices, other=-1)
    hits = tl.sum((own[:, None] == e[None, :]).to(tl.int32), 0)
    tl.store(count + e.to(tl.int64) * blocks + block, hits, mask=e < EXPERTS)


@triton.jit(do_not_specialize=["choices", "blocks"])  # type: ignore[untyped-decorator]
def _place(expert, count, end, order, inverse, choices, blocks, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """`end` [experts, blocks]: where the rows of an expert that come from a block end."""
    block = tl.program_id(0)
    i = tl.arange(0, C)
    c = block * C + i
    inside = c < choices
    own = tl.load(expert + c, mask=inside, other=-1)
    before = (own[:, None] == own[None, :]) & (i[None, :] < i[:, None])
    place = own.to(tl.int64) * blocks + block
    first = tl.load(end + place, mask=inside, other=0) - tl.load(count + place, mask=inside, other=0)
    row = (first + tl.sum(before.to(tl.int32), 1)).to(tl.int64)
    tl.store(inverse + c, row, mask=inside)
    tl.store(order + row, c.to(tl.int64), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _sum(  # type: ignore[no-untyped-def]
    rows,
    inverse,
    ends,
    first,
    second,
    out,
    W: tl.constexpr,
    K: tl.constexpr,
    B: tl.constexpr,
    E: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * B + tl.arange(0, B)
    inside = column < W
    total = tl.zeros((B,), tl.float32)
    if ends is not None:
        end = tl.load(ends + E - 1)
    if first is not None:
        total += tl.load(first + token * W + column, mask=inside, other=0.0).to(tl.float32)
    if second is not None:
        total += tl.load(second + token * W + column, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(K):
        row = tl.load(inverse + token * K + k)
        read = inside
        if ends is not None:
            read = inside & (row < end)
        total += tl.load(rows + row * W + column, mask=read, other=0.0).to(tl.float32)
    tl.store(out + token * W + column, total.to(out.dtype.element_ty), mask=inside)
