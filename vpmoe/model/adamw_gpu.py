"""AdamW on a GPU in one launch: a rank's gradients, weights and moments are read and written once. Before it,
their norm in another.

torch's fused AdamW takes lists of tensors too, but gradients have to be divided and clipped before, and
weights rounded to bf16 after, each in a pass over memory of its own. Here the gradients' factor is an
argument, and the rounded weight is written beside the fp32 one. A table has the tensors' addresses, so they
must stay where they are. The update is elementwise: no sums, the same bits in each call.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

BLOCK, STEPS, WARPS = 1024, 4, 4
"""Elements that a program holds at a time, and how often it does. On an H200 22.2 ms for 3 G parameters, a
rank's share of vpmoe-6b on two; other tiles took up to 23.5, the bytes at 4.3 TB/s take 20.9."""
WIDEST = 16
"""Bytes that a thread reads or writes at a time, if all tensors begin at a multiple of them."""


@dataclass(frozen=True, eq=False)
class Updated:
    """A parameter, or a rank's part of one: flat tensors of one length, at addresses that stay."""

    gradient: Tensor
    """fp32; only read."""
    main: Tensor
    """The parameter in fp32."""
    exp_avg: Tensor
    """fp32."""
    exp_avg_sq: Tensor
    """fp32."""
    weight: Tensor | None
    """In bf16: the parameter, rounded. None if it is kept in fp32 alone."""
    decays: bool
    """Whether weight decay applies."""


class AdamW:
    """A step's kernels for a list of parameters: `squares` of their gradients, `step`."""

    def __init__(self, parameters: Sequence[Updated], betas: tuple[float, float], epsilon: float) -> None:
        """At least one parameter, all on one device. Raises ValueError if a tensor has another type or
        length, or is not contiguous."""
        self._betas, self._epsilon = betas, epsilon
        self._parameters = list(parameters)  # keeps the memory of the addresses
        device = self._parameters[0].main.device
        addresses = [_addresses(parameter) for parameter in self._parameters]
        self._aligned = math.gcd(WIDEST, *itertools.chain(*addresses))
        lengths = torch.tensor([parameter.main.numel() for parameter in self._parameters])
        decays = torch.tensor([parameter.decays for parameter in self._parameters])
        self._table = torch.cat([torch.tensor(addresses), torch.stack([lengths, decays], 1)], 1).to(device)
        """[parameters, 7] int64: addresses, length, whether it decays."""
        programs = -(-lengths // (BLOCK * STEPS))
        first = programs.cumsum(0) - programs
        owner = torch.repeat_interleave(torch.arange(len(lengths)), programs)
        self._pieces = torch.stack([owner, torch.arange(len(owner)) - first[owner]], 1).to(device)
        """[programs, 2] int64: number of the parameter, number of the piece in it."""

    def step(self, number: int, factor: float, learning_rate: float, weight_decay: float) -> None:
        """Update all parameters. `number`: of this step, from 1 on, for Adam's bias corrections. Gradients
        are multiplied by `factor` first.

        As torch.optim.AdamW (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", algorithm 2):
        the parameter decays, then moves against the corrected first moment over the root of the second.
        """
        if not len(self._pieces):  # of empty parts alone
            return
        first, second = self._betas
        _adamw[(len(self._pieces),)](
            self._table,
            self._pieces,
            factor,
            1.0 - learning_rate * weight_decay,
            learning_rate / (1 - first**number),
            (1 - second**number) ** -0.5,
            self._epsilon,
            first,
            second,
            self._aligned,
            BLOCK,
            STEPS,
            num_warps=WARPS,
        )

    def squares(self) -> Tensor:
        """Σ of the squares of all gradients, a fp32 scalar on the device; the same bits in each call."""
        sums_P = torch.empty(len(self._pieces), dtype=torch.float32, device=self._pieces.device)
        if len(sums_P):
            _squares[(len(sums_P),)](
                self._table, self._pieces, sums_P, self._aligned, BLOCK, STEPS, num_warps=WARPS
            )
        return sums_P.sum()


def _addresses(parameter: Updated) -> list[int]:
    """Of its tensors, 0 for a weight that it does not have."""
    fp32 = (parameter.gradient, parameter.main, parameter.exp_avg, parameter.exp_avg_sq)
    wanted = [(tensor, torch.float32) for tensor in fp32]
    if parameter.weight is not None:
        wanted.append((parameter.weight, torch.bfloat16))
    for tensor, dtype in wanted:
        if tensor.dtype != dtype or not tensor.is_contiguous() or tensor.shape != (parameter.main.numel(),):
            raise ValueError(
                f"AdamW takes flat contiguous tensors of one length, here of {dtype}, not {tensor.dtype} "
                f"{list(tensor.shape)} beside {list(parameter.main.shape)}."
            )
    return [*(tensor.data_ptr() for tensor, _ in wanted), 0][:5]


@triton.jit  # type: ignore[untyped-decorator]
def _adamw(  # type: ignore[no-untyped-def]
    table,
    pieces,
    factor,
    kept,
    rate,
    correction,
    epsilon: tl.constexpr,
    beta1: tl.constexpr,
    beta2: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    row = table + tl.load(pieces + 2 * tl.program_id(0)) * 7
    start = tl.load(pieces + 2 * tl.program_id(0) + 1) * (BLOCK * STEPS)
    gradients = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.float32)), ALIGNED)
    mains = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(tl.float32)), ALIGNED)
    firsts = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(tl.float32)), ALIGNED)
    seconds = tl.multiple_of(tl.load(row + 3).to(tl.pointer_type(tl.float32)), ALIGNED)
    weight = tl.load(row + 4)
    weights = tl.multiple_of(weight.to(tl.pointer_type(tl.bfloat16)), ALIGNED)
    length = tl.load(row + 5)
    kept = tl.where(tl.load(row + 6) != 0, kept, 1.0)
    for step in range(STEPS):
        first_of_block = start + step * BLOCK
        at = first_of_block + tl.arange(0, BLOCK)
        inside = at < length
        # A mask of unknown length allows one element at a time only, so whole blocks have none.
        if first_of_block + BLOCK <= length:
            gradient = tl.load(gradients + at)
            main, first, second = tl.load(mains + at), tl.load(firsts + at), tl.load(seconds + at)
            main, first, second = _moved(
                gradient, main, first, second, factor, kept, rate, correction, epsilon, beta1, beta2
            )
            tl.store(mains + at, main)
            tl.store(firsts + at, first)
            tl.store(seconds + at, second)
            if weight != 0:
                tl.store(weights + at, main.to(tl.bfloat16))
        elif first_of_block < length:
            gradient = tl.load(gradients + at, mask=inside, other=0.0)
            main = tl.load(mains + at, mask=inside, other=0.0)
            first = tl.load(firsts + at, mask=inside, other=0.0)
            second = tl.load(seconds + at, mask=inside, other=0.0)
            main, first, second = _moved(
                gradient, main, first, second, factor, kept, rate, correction, epsilon, beta1, beta2
            )
            tl.store(mains + at, main, mask=inside)
            tl.store(firsts + at, first, mask=inside)
            tl.store(seconds + at, second, mask=inside)
            if weight != 0:
                tl.store(weights + at, main.to(tl.bfloat16), mask=inside)


@triton.jit
def _moved(  # type: ignore[no-untyped-def]
    gradient, main, first, second, factor, kept, rate, correction, epsilon, beta1, beta2
):
    gradient *= factor
    first += (1 - beta1) * (gradient - first)
    second = beta2 * second + (1 - beta2) * gradient * gradient
    return main * kept - rate * first / (tl.sqrt(second) * correction + epsilon), first, second


@triton.jit  # type: ignore[untyped-decorator]
def _squares(  # type: ignore[no-untyped-def]
    table, pieces, sums, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr
):
    """`sums` [programs]: of the squares of each program's gradients."""
    row = table + tl.load(pieces + 2 * tl.program_id(0)) * 7
    start = tl.load(pieces + 2 * tl.program_id(0) + 1) * (BLOCK * STEPS)
    gradients = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.float32)), ALIGNED)
    length = tl.load(row + 5)
    total = tl.zeros((BLOCK,), tl.float32)
    if start + BLOCK * STEPS <= length:
        for step in range(STEPS):
            gradient = tl.load(gradients + start + step * BLOCK + tl.arange(0, BLOCK))
            total += gradient * gradient
    else:
        for step in range(STEPS):
            at = start + step * BLOCK + tl.arange(0, BLOCK)
            gradient = tl.load(gradients + at, mask=at < length, other=0.0)
            total += gradient * gradient
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))
