"""Small students and ragged random batches for the tests of model and objectives."""

import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vpmoe.data.canary import CanaryText
from vpmoe.model import state
from vpmoe.model.batch import Batch
from vpmoe.model.learner import Learner
from vpmoe.model.shapes import LOCKED_PARTS, PARTS, SHAPES, Shape
from vpmoe.model.student import Student, build

WITHOUT: dict[str, Any] = {name: getattr(Shape, name) for name in PARTS}
"""The value of each part of the architecture that is left out."""

SMALL = replace(
    SHAPES["tiny"],
    name="small",
    layers=3,
    vocabulary=512,
    hidden=32,
    dense_width=64,
    expert_width=16,
    shared_width=32,
    **WITHOUT,
)
"""`tiny` with a small vocabulary and small layers, for speed, and no part of the architecture; the number of
experts and groups is the same."""

LOCKED = replace(SMALL, name="locked", layers=SHAPES["tiny"].layers, **LOCKED_PARTS)
"""Of that size, with the parts of the registered shapes."""

COMPLETE = replace(
    SMALL,
    name="complete",
    layers=5,
    **LOCKED_PARTS | {"local_window": 8, "router_bias": True},
)
"""Every part of the architecture, the router's bias too. Layer 4 is global; documents are longer than the
window. `learner` and `perturbed` recompute its layers."""


def new_seed() -> int:
    seed = secrets.randbelow(1 << 32)
    print(f"seed {seed}")
    return seed


def perturbed(shape: Shape, device: torch.device, recomputed_layers: int | None = None) -> Student:
    """A student in which every part affects the output: no vector has its initial value."""
    torch.manual_seed(new_seed())
    layers = _recomputed(shape) if recomputed_layers is None else recomputed_layers
    built = build(shape, device, sequence_length=4096, seed=1234, recomputed_layers=layers)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name == "log_frequency":
                parameter += torch.randn_like(parameter)
            elif parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
            else:
                parameter.normal_(std=0.15)
    return built


def learner(device: torch.device, shape: Shape = SMALL, **kwargs: int | None) -> Learner:
    kwargs = {"recomputed_layers": _recomputed(shape)} | kwargs
    return Learner.build(
        shape, device, sequence_length=256, seed=1234, weight_decay=0.1, gradient_clip=1.0, **kwargs
    )


def _recomputed(shape: Shape) -> int:
    return shape.layers if shape.name == COMPLETE.name else 0


def load_canary(url: str | None, bucket: object) -> list[CanaryText]:
    """In the place of vpmoe.data.canary.load_texts: a canary of the small vocabulary."""
    random = np.random.default_rng(7)
    return [
        CanaryText(f"{number}" * 64, random.integers(0, SMALL.vocabulary, tokens, np.int32), 250)
        for number, tokens in enumerate((40, 200, 3, 64))
    ]


def documents(
    generator: torch.Generator, lengths: list[int], row: int, vocabulary: int = SMALL.vocabulary
) -> tuple[torch.Tensor, ...]:
    """Tokens, spans and document numbers of one row, each [1, row]: random documents of these lengths, then
    padding. A third of each document is prompt (span 0)."""
    tokens = torch.randint(0, vocabulary, (1, row), generator=generator)
    numbers = torch.full((1, row), -1, dtype=torch.int32)
    spans = torch.zeros((1, row), dtype=torch.uint8)
    start = 0
    for number, length in enumerate(lengths):
        numbers[0, start : start + length] = number
        learned = torch.randint(1, 3, (length,), generator=generator, dtype=torch.uint8)
        learned[: length // 3 + 1] = 0
        spans[0, start : start + length] = learned
        start += length
    return tokens, spans, numbers


def ragged_batches(
    generator: torch.Generator,
    microbatches: int,
    vocabulary: int = SMALL.vocabulary,
    shapes: int | None = None,
) -> list[Batch]:
    """Microbatches of 1 to 3 rows of different lengths, documents and padding. After `shapes` of them their
    shapes repeat."""
    batches: list[Batch] = []
    for number in range(microbatches):
        if shapes is not None and number >= shapes:
            rows, row = batches[number - shapes].tokens.shape
        else:
            rows, row = (
                int(torch.randint(1, 4, (), generator=generator)),
                int(torch.randint(20, 60, (), generator=generator)),
            )
        packed = []
        for _ in range(rows):
            lengths: list[int] = []
            while sum(lengths) < row - 15:
                lengths.append(int(torch.randint(1, 15, (), generator=generator)))
            packed.append(documents(generator, lengths, row, vocabulary))
        batches.append(Batch.from_rows(*(torch.cat(parts) for parts in zip(*packed, strict=True))))
    return batches


def copy_slices(learner: Learner) -> dict[str, list[tuple[int, torch.Tensor]]]:
    """A copy of this rank's slices by name: start and values of each."""
    copied: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for piece in state.slices(learner):
        assert piece.stop - piece.start == piece.tensor.numel()
        copied.setdefault(piece.name, []).append((piece.start, piece.tensor.clone()))
    return copied


def join_slices(
    ranks: list[dict[str, list[tuple[int, torch.Tensor]]]], sizes: dict[str, int]
) -> dict[str, torch.Tensor]:
    """The tensors, joined from the slices of all ranks. Fails unless the slices cover each tensor exactly
    once."""
    tensors = {}
    assert {name for rank in ranks for name in rank} == set(sizes)
    for name, size in sizes.items():
        slices = sorted((piece for rank in ranks for piece in rank.get(name, [])), key=lambda piece: piece[0])
        ends = [0, *(start + len(numbers) for start, numbers in slices)]
        assert [start for start, _ in slices] == ends[:-1] and ends[-1] == size, name
        tensors[name] = torch.cat([numbers for _, numbers in slices])
    return tensors


def read_from(tensors: dict[str, torch.Tensor]) -> state.ReadTensor:
    return lambda name, start, stop: tensors[name][start:stop]


def hidden_and_embeddings(model: Student, batch: Batch) -> tuple[Tensor, Tensor]:
    """Hidden states, and the embeddings that they were computed from, for gradients."""
    kept = []
    handle = model.embedding.register_forward_hook(lambda module, inputs, output: kept.append(output))
    hidden = model(batch)
    handle.remove()
    return hidden, kept[0]


def check_isolation(model: Student, hidden: Tensor, embeddings: Tensor, lengths: Sequence[int]) -> None:
    """Of documents that begin the first row: the gradient of each one's loss is not 0 for its own embeddings,
    and exactly 0 for all others."""
    begin = 0
    for length in lengths:
        own = slice(begin, begin + length)
        loss = hidden[own].pow(2).sum() + (hidden[own] @ model.output.T).logsumexp(1).sum()
        (gradient,) = torch.autograd.grad(loss, embeddings, retain_graph=True)
        outside = torch.ones(gradient.shape[:2], dtype=torch.bool)
        outside[0, own] = False
        assert (gradient[0, own] != 0).any() and (gradient[outside] == 0).all()
        begin += length


def with_weights(shape: Shape, device: torch.device, weights: dict[str, Tensor]) -> Student:
    """A student with these weights, by the names and in the shapes of its parameters and selection biases."""
    built = build(shape, device, sequence_length=256, seed=1)
    held = {f"main/{name}": parameter for name, parameter in built.named_parameters()}
    held |= {
        f"buffer/{name}": buffer for name, buffer in built.named_buffers() if name.endswith(".expert_bias")
    }
    assert {name: part.shape for name, part in held.items()} == {
        name: part.shape for name, part in weights.items()
    }
    with torch.no_grad():
        for name, part in held.items():
            part.copy_(weights[name])
    return built
