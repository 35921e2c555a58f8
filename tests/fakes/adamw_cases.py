"""The GPU's AdamW beside torch's in float64. `python -m tests.fakes.adamw_cases` runs it in Triton's
interpreter, which has to be chosen before Triton is imported."""

import os

import torch
from torch import Tensor

from vpmoe.model.adamw_gpu import BLOCK, STEPS, AdamW, Updated

BETAS, EPSILON = (0.9, 0.95), 1e-8
RATE, DECAY, FACTOR = 3e-2, 0.1, 0.25
LENGTHS = (1, BLOCK, 0, 3 * BLOCK + 7, 2 * STEPS * BLOCK + 4)
"""Less than a block, whole blocks, nothing, blocks and a rest, several programs."""
RTOL, ATOL = 1e-5, 1e-6
"""Of fp32 arithmetic: a dozen roundings of 6e-8, and roots and quotients that a GPU approximates by two units
in the last place. Weights are about 1, and a step moves them by RATE."""


def parameters(device: torch.device, shift: int, generator: torch.Generator) -> list[Updated]:
    """Of each length one that decays and has a rounded weight, and one that has neither. All begin `shift`
    elements after an aligned address."""

    def flat(length: int) -> Tensor:
        return torch.randn(shift + length, generator=generator).to(device)[shift:]

    return [
        Updated(
            gradient=flat(length),
            main=flat(length),
            exp_avg=torch.zeros(shift + length, device=device)[shift:],
            exp_avg_sq=torch.zeros(shift + length, device=device)[shift:],
            weight=torch.zeros(shift + length, dtype=torch.bfloat16, device=device)[shift:] if kind else None,
            decays=kind,
        )
        for length in LENGTHS
        for kind in (True, False)
    ]


def assert_equal_to_float64(device: torch.device, shift: int, seed: int) -> None:
    """Three steps, each with new gradients at the same addresses."""
    generator = torch.Generator().manual_seed(seed)
    updated = parameters(device, shift, generator)
    exact = [one.main.double().clone().requires_grad_() for one in updated]
    groups = [
        {
            "params": [x for x, one in zip(exact, updated, strict=True) if one.decays == decays],
            "weight_decay": DECAY * decays,
        }
        for decays in (True, False)
    ]
    reference = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=EPSILON)
    step = AdamW(updated, BETAS, EPSILON)
    for number in (1, 2, 3):
        for one, wanted in zip(updated, exact, strict=True):
            one.gradient.copy_(torch.randn(one.gradient.shape, generator=generator))
            wanted.grad = one.gradient.double() * FACTOR
        reference.step()
        squares = sum(float(one.gradient.double().square().sum()) for one in updated)
        # a thousand fp32 numbers in a row at most, and as many sums
        assert abs(float(step.squares()) - squares) <= 1e-5 * squares
        step.step(number, FACTOR, RATE, DECAY)
    for one, wanted in zip(updated, exact, strict=True):
        moments = reference.state[wanted]
        for found, right in (
            (one.main, wanted.detach()),
            (one.exp_avg, moments["exp_avg"]),
            (one.exp_avg_sq, moments["exp_avg_sq"]),
        ):
            torch.testing.assert_close(found.double(), right, rtol=RTOL, atol=ATOL)
        if one.weight is not None:  # the interpreter cuts numbers off where a GPU rounds them
            error = 0.0 if device.type == "cuda" else 2**-7
            torch.testing.assert_close(one.weight, one.main.bfloat16(), rtol=error, atol=0)


if __name__ == "__main__":
    assert os.environ["TRITON_INTERPRET"] == "1"
    for shift in (0, 1):
        assert_equal_to_float64(torch.device("cpu"), shift, seed=shift)
