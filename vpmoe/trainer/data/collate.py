"""Microbatches from packed rows: documents are laid side by side whole, and the rest of a row is padded.

Positions, targets and counts are derived in vpmoe/model/batch.py.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray

from vpmoe.api.microbatch import Microbatch
from vpmoe.data.packing import PackedDocument
from vpmoe.data.vocabulary import PADDING
from vpmoe.model.batch import Batch

ReadDocument = Callable[[PackedDocument], tuple[NDArray[np.int32], NDArray[np.uint8]]]
"""(token ids, span of each) of a document."""
LogpOf = Callable[[PackedDocument], NDArray[np.floating]]
"""A log-probability of each token of a document, the teacher's or the sampler's; NaN if it has none."""


def microbatches(
    rows: Sequence[Sequence[PackedDocument]],
    read: ReadDocument,
    sequence_length: int,
    microbatch: Microbatch,
    teacher_logp: LogpOf | None = None,
    sampler_logp: LogpOf | None = None,
) -> list[Batch]:
    """The rows in order as microbatches of Microbatch.sizes, the last one filled up with rows of padding. See
    `assemble`.

    Rows of padding add nothing to losses, gradients, counts and the router's load; sums of other tensors may
    be rounded differently beside them.
    """
    sizes = microbatch.sizes(len(rows), sequence_length)
    padded = [*rows, *([] for _ in range(sum(sizes) - len(rows)))]
    return [
        assemble(padded[stop - size : stop], read, sequence_length, teacher_logp, sampler_logp)
        for size, stop in zip(sizes, accumulate(sizes), strict=True)
    ]


def assemble(
    rows: Sequence[Sequence[PackedDocument]],
    read: ReadDocument,
    sequence_length: int,
    teacher_logp: LogpOf | None = None,
    sampler_logp: LogpOf | None = None,
) -> Batch:
    """One microbatch of b packed rows; a row without documents is all padding. Raises ValueError if a row
    overflows.

    With `teacher_logp` the batch has the teacher's log-probabilities, with `sampler_logp` the sampler's.
    """
    shape = (len(rows), sequence_length)
    tokens_bS = np.full(shape, PADDING, np.int64)
    spans_bS = np.zeros(shape, np.uint8)
    documents_bS = np.full(shape, -1, np.int32)
    stored = [(logp_of, np.full(shape, np.nan, np.float32)) for logp_of in (teacher_logp, sampler_logp)]
    for row, documents in enumerate(rows):
        at = 0
        for number, document in enumerate(documents):
            tokens, spans = read(document)
            if at + len(tokens) > sequence_length:
                raise ValueError(f"row {row} overflows {sequence_length} positions with {document}")
            place = (row, slice(at, at + len(tokens)))
            tokens_bS[place] = tokens
            spans_bS[place] = spans
            documents_bS[place] = number
            for logp_of, logp_bS in stored:
                if logp_of is not None:
                    logp_bS[place] = logp_of(document)
            at += len(tokens)
    teacher_bS, sampler_bS = (
        None if logp_of is None else torch.from_numpy(logp_bS) for logp_of, logp_bS in stored
    )
    return Batch.from_rows(
        torch.from_numpy(tokens_bS),
        torch.from_numpy(spans_bS),
        torch.from_numpy(documents_bS),
        teacher_bS,
        sampler_bS,
    )
