"""Random cases of packed attention, and their results in float64: one masked product per document.

`TRITON_INTERPRET=1 python -m tests.fakes.attention_cases` runs the GPU's kernels on the CPU, in Triton's
interpreter, which has to be chosen before Triton is imported.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from vpmoe.model.attention_gpu import packed_attention
from vpmoe.model.batch import runs_of

BF16 = 1e-2
"""Allowed relative error of a norm: weights and their gradients are rounded to bf16 (2⁻⁹) before a product,
outputs and gradients after it. A correct kernel has 2e-3 to 5e-3. One key more or less in a window of 128, or
ALiBi off by one position, gives outputs and gradients of q, k and v that differ by about 4e-2 or more."""


@dataclass(frozen=True)
class Kind:
    window: int | None
    alibi: bool
    offset: bool
    heads: int = 8
    groups: int = 2
    width: int = 128


KINDS = {
    "local": Kind(window=128, alibi=False, offset=True),
    "global": Kind(window=None, alibi=True, offset=True),
    "plain": Kind(window=None, alibi=False, offset=False),
    "window-and-alibi": Kind(window=100, alibi=True, offset=False, groups=8),
    "tiny-local": Kind(window=128, alibi=False, offset=True, heads=4, width=16),
    "tiny-global": Kind(window=None, alibi=True, offset=True, heads=4, width=16),
}


@dataclass(frozen=True)
class Case:
    kind: Kind
    inputs: list[Tensor]
    """Queries, keys, values, and the offset if the kind has one."""
    slopes: Tensor | None
    boundaries: Tensor
    grad_out: Tensor

    def run(self) -> list[Tensor]:
        """The output, then the gradient of each input."""
        query, key, value, *offset = self.inputs
        out = packed_attention(
            query,
            key,
            value,
            runs_of(self.boundaries),
            window=self.kind.window,
            slopes_h=self.slopes,
            offset_h=offset[0] if offset else None,
        )
        return [out.detach(), *torch.autograd.grad(out, self.inputs, self.grad_out)]


def random_case(
    device: torch.device, kind: Kind, lengths: list[int], dtype: torch.dtype = torch.bfloat16
) -> Case:
    n = sum(lengths)
    inputs = [
        torch.randn(n, heads, kind.width, device=device, dtype=dtype).requires_grad_()
        for heads in (kind.heads, kind.groups, kind.groups)
    ]
    if kind.offset:
        inputs.append(torch.randn(kind.heads, device=device).requires_grad_())
    slopes = 2.0 ** (-8 / kind.heads * torch.arange(1, kind.heads + 1, device=device)) if kind.alibi else None
    boundaries = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    return Case(kind, inputs, slopes, boundaries, torch.randn_like(inputs[0]))


def in_float64(case: Case) -> list[Tensor]:
    exact = [x.detach().double().requires_grad_() for x in case.inputs]
    query, key, value, *offset = exact
    share = case.kind.heads // case.kind.groups
    bounds = case.boundaries.tolist()
    documents = []
    for start, stop in pairwise(bounds):
        q, k, v = query[start:stop], key[start:stop], value[start:stop]
        logit = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(share, 1)) / case.kind.width**0.5
        position = torch.arange(stop - start, device=q.device)
        distance = position[:, None] - position[None, :]
        if case.slopes is not None:
            logit = logit - case.slopes.double()[:, None, None] * distance
        hidden = distance < 0
        if case.kind.window is not None:
            hidden |= distance >= case.kind.window
        weight = logit.masked_fill(hidden, -torch.inf).exp()
        total = weight.sum(2, keepdim=True)
        if offset:
            total = total + offset[0].exp()[:, None, None]
        documents.append(torch.einsum("hij,jhd->ihd", weight / total, v.repeat_interleave(share, 1)))
    out = torch.cat(documents)
    return [out.detach(), *torch.autograd.grad(out, exact, case.grad_out.double())]


ONE_WEIGHT = 8e-3
"""Allowed error of a number beside that of the norm where all documents have one position: the gradient of
the logit of a weight near 1 is the difference of two nearly equal products, one with the rounded output."""


def assert_near(found: list[Tensor], expected: list[Tensor], each: float = 1e-6) -> None:
    """`each`: allowed of a number. A gradient can be 0, as that of a single position without an offset."""
    for x, y in zip(found, expected, strict=True):
        assert (x.double() - y).norm() <= BF16 * y.norm() + each * y.numel() ** 0.5


def random_lengths(total: int) -> list[int]:
    lengths: list[int] = []
    while sum(lengths) < total:
        lengths.append(int(torch.randint(1, 400, ())))
    return lengths


if __name__ == "__main__":
    for name in ("tiny-local", "tiny-global"):
        # fp16, because the interpreter multiplies the bits of bf16 as integers
        case = random_case(torch.device("cpu"), KINDS[name], [1, 129, 40], torch.float16)
        assert_near(case.run(), in_float64(case))
        print(name)
