"""A microbatch: packed rows of documents with everything that the student, the head and the objectives need.

A batch is built on the CPU, where reading lengths costs no synchronisation, and moved as a whole.
vpmoe/data/packing.py decides which documents are in which row. Positions are derived here from the documents,
so the two always agree.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from vpmoe.data.spans import SPANS
from vpmoe.model import spans


@dataclass(frozen=True, eq=False)
class Batch:
    """b rows of S tokens; T = b·S positions in row order. Create it with `from_rows`."""

    tokens: Tensor
    """[b, S] int64"""
    position: Tensor
    """[b, S] int64, counted from 0 in every document"""
    padding: Tensor
    """[b, S] bool"""
    target: Tensor
    """[T] int64, the token that each position predicts, or spans.NO_TARGET"""
    span: Tensor
    """[T] uint8, the span of that token, or 0"""
    target_rows: Tensor
    """[N] int64, the positions that have a target, in order"""
    boundaries: Tensor
    """[documents + 1] int32 over T: the start of each run of one document or of padding, then T. Attention
    never crosses a boundary."""
    longest: int
    """Length of the longest run."""
    runs: Tensor
    """[2, T] int32, `runs_of` the boundaries"""
    counts: Tensor
    """[3] int64, always on the CPU: positions that are not padding, then targets by span number."""
    teacher_logp: Tensor | None = None
    """[T] fp32, the teacher's stored log p of each position's target, NaN without a target; None in a batch
    without scores."""
    sampler_logp: Tensor | None = None
    """[T] fp32, the sampler's log p of each position's target, NaN without a target; None in a batch without
    sampled completions."""

    @classmethod
    def from_rows(
        cls,
        tokens: Tensor,
        span_of_tokens: Tensor,
        documents: Tensor,
        logp_of_tokens: Tensor | None = None,
        sampler_logp_of_tokens: Tensor | None = None,
    ) -> "Batch":
        """Build a batch from CPU tensors [b, S]: tokens int64, the span of each token uint8, documents int32.

        `documents` has one number per document; neighbouring documents of a row have different numbers, and a
        negative number is padding. `logp_of_tokens` (the teacher's) and `sampler_logp_of_tokens` are fp32, at
        the token that they score. A batch without targets is valid. Raises ValueError if the shapes differ.
        """
        if tokens.dim() != 2 or tokens.shape != span_of_tokens.shape or tokens.shape != documents.shape:
            raise ValueError(
                f"tokens {list(tokens.shape)}, spans {list(span_of_tokens.shape)} and documents "
                f"{list(documents.shape)} must all be [rows, positions]."
            )
        starts_bS = torch.ones_like(documents, dtype=torch.bool)
        starts_bS[:, 1:] = documents[:, 1:] != documents[:, :-1]
        starts = starts_bS.flatten().nonzero().squeeze(1)
        boundaries = torch.cat([starts, torch.tensor([documents.numel()])])
        runs = runs_of(boundaries)
        position = torch.arange(documents.numel()) - runs[0]
        padding = documents < 0
        target, span = spans.targets(tokens, span_of_tokens, documents)
        return cls(
            tokens=tokens,
            position=position.view(documents.shape),
            padding=padding,
            target=target,
            span=span,
            target_rows=spans.target_rows(target),
            boundaries=boundaries.int(),
            longest=int(boundaries.diff().max()),
            runs=runs.int(),
            counts=torch.stack([(~padding).sum(), *((span == number).sum() for number in SPANS.values())]),
            teacher_logp=None if logp_of_tokens is None else spans.shift_to_targets(logp_of_tokens, target),
            sampler_logp=None
            if sampler_logp_of_tokens is None
            else spans.shift_to_targets(sampler_logp_of_tokens, target),
        )

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device; `counts` stays on the CPU.

        Goes to a GPU through pinned memory: from other memory a copy would wait for what the GPU was given
        before.
        """
        moved = {
            field.name: (value.pin_memory() if device.type == "cuda" else value).to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor) and field.name != "counts"
        }
        return Batch(**moved, longest=self.longest, counts=self.counts)


def runs_of(boundaries: Tensor) -> Tensor:
    """[2, T]: for each position where its run begins, then for each where it ends. From Batch.boundaries."""
    return torch.stack([boundaries[:-1], boundaries[1:]]).repeat_interleave(boundaries.diff(), 1)
