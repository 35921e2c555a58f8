"""Initial values of the student's parameters, by name. No megatron-core: what makes a student from another
model (vpmoe.upcycle) begins new parts as the trainer does.
"""

import hashlib
import math

import torch
from torch import Tensor

from vpmoe.model.shapes import Shape

FREQUENCY_SCALE = 16
"""A learned frequency is exp(log_frequency / FREQUENCY_SCALE), so a step of the optimizer changes it by a
sixteenth of what it would change an exponent."""

VALUE_MIX = 4.0
"""Initial value_mix of the value residual: λ = sigmoid(4) = 0.982, so layers begin with nearly their own
values, and the sigmoid still has a slope."""

WRITES_TO_RESIDUAL = ("linear_proj.weight", "linear_fc2.weight", "experts.down")
"""Matrices whose product is added to the residual stream. There are 2·layers of them, so their initial
standard deviation is divided by √(2·layers)."""

INITIAL_VECTORS = {"norm.weight": 1.0, "bias": 0.0, ".offset": 0.0, ".value_mix": VALUE_MIX}
"""Ending of a vector's name → its initial value."""


def initial_vector(name: str) -> float:
    """The value that all elements of a vector start with: norms 1, biases and softmax offsets 0."""
    return next(start for ending, start in INITIAL_VECTORS.items() if name.endswith(ending))


def initial_std(name: str, shape: Shape) -> float:
    """Standard deviation of the normal distribution that a matrix is drawn from."""
    std = shape.embedding_std if name == "embedding.weight" else shape.init_std
    return std / math.sqrt(2 * shape.layers) if name.endswith(WRITES_TO_RESIDUAL) else std


def generator_for(name: str, seed: int, device: torch.device) -> torch.Generator:
    """The random numbers of one parameter: they depend on (seed, name) only, not on the order of parameters
    or the layout."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest))


def log_frequencies(width: int, base: float) -> Tensor:
    """log_frequency [width / 2] of a rotation whose frequencies are base^(−2i / width); float64."""
    exponent = torch.arange(0, width, 2, dtype=torch.float64) / width
    return -FREQUENCY_SCALE * exponent * math.log(base)
