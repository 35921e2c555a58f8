"""The kernels of experts_gpu.py beside their definition in float64.

    TRITON_INTERPRET=1 python -m tests.fakes.expert_cases

runs them without a GPU.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import ProcessGroup

from vpmoe.model import experts_gpu

ROUNDED = 1e-2
"""Allowed relative error of a norm. Sums are fp32; what is rounded to bf16 (2⁻⁹) on the way are the first
product, its activation, their gradients, the rows before they are summed, and results. A gradient passes four
of these."""

Outcome = dict[str, Tensor]


def random_choices(experts: Sequence[int], tokens: int, choices: int, device: torch.device) -> Tensor:
    """[tokens · choices]: experts among these, the first as often as all others together."""
    drawn = torch.tensor(experts, device=device)[torch.randint(len(experts), (tokens * choices,))]
    return torch.where(torch.rand(len(drawn), device=device) < 0.5, experts[0], drawn)


def random_weights(
    device: torch.device, dtype: torch.dtype, experts: int, hidden: int, width: int, biased: bool
) -> list[Tensor]:
    """up, down, and their biases if `biased`; results have norms about those of the inputs."""
    sizes = [(experts, width, hidden), (experts, hidden, width)]
    weights = [torch.randn(*size, device=device) * size[2] ** -0.5 for size in sizes]
    weights += [torch.randn(experts * size, device=device) for size in (width, hidden) if biased]
    return [weight.to(dtype).requires_grad_() for weight in weights]


def definition(x: Tensor, share: Tensor, expert_C: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """[N, H] in the inputs' dtype, one expert after the other. Choices of experts without weights add
    nothing."""
    up, down, *biases = weights
    choices = len(share) // len(x)
    token_C = torch.arange(len(x), device=x.device).repeat_interleave(choices)
    out = torch.zeros_like(x)
    for expert in range(len(up)):
        own = (expert_C == expert).nonzero().flatten()
        inner = x[token_C[own]] @ up[expert].T
        if biases:
            inner = inner + biases[0].view(len(up), -1)[expert]
        rows = inner.relu().square() @ down[expert].T
        if biases:
            rows = rows + biases[1].view(len(up), -1)[expert]
        out = out.index_add(0, token_C[own], share[own, None] * rows)
    return out


def kernels(
    x: Tensor,
    share: Tensor,
    expert_C: Tensor,
    weights: Sequence[Tensor],
    direction: Tensor,
    choices: int,
    calls: int = 1,
    group: ProcessGroup | None = None,
    beside: tuple[Tensor, ...] = (),
) -> Outcome:
    """Output and gradients of the kernels; of a weight with a buffer what is there after `calls` calls.
    With a group, of one rank, there may be choices of other ranks' experts, which come after all weights."""
    up, down, *biases = weights
    up_bias, down_bias = biases or (None, None)
    order = expert_C.argsort(stable=True)
    inverse, tokens = order.argsort(), expert_C.bincount(minlength=len(up))[: len(up)]
    leaves = [x, share, *weights]
    for _ in range(calls):
        out = experts_gpu.mixture(
            x, share, up, down, up_bias, down_bias, order, inverse, tokens, choices, group, beside
        )
        gradients = torch.autograd.grad(out, [*leaves, *beside], direction)
        assert all(torch.equal(gradient, direction) for gradient in gradients[len(leaves) :])
    found = [getattr(leaf, "main_grad", gradient) for leaf, gradient in zip(leaves, gradients, strict=False)]
    return named(out.detach(), found)


def named(out: Tensor, gradients: Sequence[Tensor]) -> Outcome:
    names = ("x", "share", "up", "down", "up bias", "down bias")
    return {"out": out, **dict(zip(names, gradients, strict=False))}


def mixtures(
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    hidden: int,
    width: int,
    *,
    choices: int = 4,
    chosen: Sequence[int] = (5, 1, 2, 6),
    experts: int = 8,
    biased: bool = True,
    buffered: bool = False,
    group: ProcessGroup | None = None,
    beside: int = 0,
    stored: bool = False,
) -> Outcome:
    """Experts that are not `chosen` get nothing. With `buffered`, gradients are added to fp32 buffers in two
    calls; with `stored` too, those of matrices are stored in the first, in buffers of NaN. `group` as in
    `kernels`; `beside`: number of tensors that are added to the output. Returns what the kernels found."""
    expert_C = random_choices(chosen, tokens, choices, device)
    x = torch.randn(tokens, hidden, device=device).to(dtype).requires_grad_()
    share = torch.rand(tokens * choices, device=device).requires_grad_()
    weights = random_weights(device, dtype, experts, hidden, width, biased)
    direction = torch.randn(tokens, hidden, device=device).to(dtype)
    calls = 2 if buffered else 1
    before = [torch.randn(weight.shape, device=device) if buffered else None for weight in weights]
    for weight, buffer in zip(weights, before, strict=True):
        if buffer is not None:
            weight.main_grad = buffer.clone()  # type: ignore[attr-defined]
            weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    empty = torch.ones((), dtype=torch.int32, device=device)
    for weight, buffer in zip(weights[:2], before, strict=False):
        if stored and buffer is not None:
            buffer.zero_()
            weight.main_grad.fill_(torch.nan)  # type: ignore[attr-defined]
            weight.empty_main_grad = empty  # type: ignore[attr-defined]
    # what the allocator hands out next for gradients is not zero
    dirty = [torch.full_like(weight, torch.nan) for weight in weights for _ in range(4)]
    del dirty
    others = tuple(torch.randn_like(x).requires_grad_() for _ in range(beside))
    if stored:
        kernels(x, share, expert_C, weights, direction, choices, 1, group, others)
        empty.zero_()
    found = kernels(x, share, expert_C, weights, direction, choices, calls - stored, group, others)
    exact = [leaf.detach().double().requires_grad_() for leaf in (x, share, *weights)]
    out = definition(exact[0], exact[1], expert_C, exact[2:])
    out = out + sum(other.detach().double() for other in others)
    wanted = named(out.detach(), torch.autograd.grad(out, exact, direction.double()))
    empty = [expert for expert in range(experts) if not (expert_C == expert).any()]
    for (name, other), buffer in zip(wanted.items(), [None, None, None, *before], strict=True):
        one = found[name]
        if buffer is not None:
            assert (one - buffer).view(experts, -1)[empty].eq(0).all(), name
            assert one.dtype == torch.float32
            one = one.double() - buffer.double()
        elif name not in ("out", "x", "share"):
            assert one.view(experts, -1)[empty].eq(0).all(), name
        error, norm = (one.double() - calls_of(name, calls) * other).norm(), other.norm()
        assert error <= ROUNDED * calls_of(name, calls) * norm, (name, float(error / norm))
    assert all(getattr(weight, "grad_added_to_main_grad", True) for weight in weights)
    return found


def calls_of(name: str, calls: int) -> int:
    return 1 if name in ("out", "x", "share") else calls


def other_ranks_choices(device: torch.device, dtype: torch.dtype, tokens: int) -> None:
    """Two of four experts are another rank's, and tokens have no, some or all of their choices there. Memory
    that no kernel has written is NaN. Needs the default group, of one rank."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for buffered in (False, True):
            mixtures(
                device,
                dtype,
                tokens,
                64,
                16,
                chosen=[2, 1, 3],
                experts=2,
                choices=2,
                buffered=buffered,
                group=dist.group.WORLD,
            )
    finally:
        torch.use_deterministic_algorithms(False)


def no_rows(device: torch.device, dtype: torch.dtype) -> None:
    """As on a rank whose experts nobody chose: gradients of weights are zero."""
    weights = random_weights(device, dtype, 3, 64, 16, True)
    x, share = torch.zeros(0, 64, device=device, dtype=dtype), torch.zeros(0, device=device)
    found = kernels(
        x.requires_grad_(),
        share.requires_grad_(),
        torch.zeros(0, device=device, dtype=torch.int64),
        weights,
        torch.zeros_like(x),
        choices=1,
    )
    assert found["out"].shape == x.shape
    assert all((found[name] == 0).all() for name in ("up", "down", "up bias", "down bias"))


def tiles(device: torch.device, tokens: list[int]) -> None:
    """Every row of an expert is in one tile, and a tile has rows of one expert."""
    ends, found = experts_gpu._tiles_of(torch.tensor(tokens, device=device), sum(tokens))
    wanted = [
        [expert, sum(tokens[:expert]) + first]
        for expert, rows in enumerate(tokens)
        for first in range(0, rows, experts_gpu.ROWS)
    ]
    assert ends.tolist() == torch.tensor(tokens).cumsum(0).tolist()
    assert found[: len(wanted)].tolist() == wanted
    assert (found[len(wanted) :, 0] == -1).all()


def main() -> None:
    torch.manual_seed(1)
    cpu = torch.device("cpu")
    tiles(cpu, [0, 300, 128, 0, 1, 129])
    tiles(cpu, [0, 0, 0])
    mixtures(cpu, torch.float16, 75, 64, 16, beside=2)
    mixtures(cpu, torch.float16, 20, 128, 32, choices=2, biased=False)
    mixtures(cpu, torch.float16, 150, 64, 16, choices=1, buffered=True)
    mixtures(cpu, torch.float16, 40, 64, 16, buffered=True, stored=True)
    no_rows(cpu, torch.float16)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    other_ranks_choices(cpu, torch.float16, 150)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
