"""What a student asks the teacher: the ids of a microbatch and where its documents lie, as two tensors of the host."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vpmoe.model.batch import Batch


class Run(NamedTuple):
    """A document in a microbatch: positions [start, start + length) of T."""

    start: int
    length: int


class Question(NamedTuple):
    """Ids [T] int32 in the order of positions, and the documents among them; what belongs to none is padding."""

    tokens: Tensor
    documents: Sequence[Run]

    @property
    def header(self) -> Tensor:
        """[positions, documents] int64: how long `body` is."""
        return torch.tensor([len(self.tokens), len(self.documents)])

    @property
    def body(self) -> Tensor:
        """[T + 2·documents] int32: ids, then start and length of each document."""
        return torch.cat([self.tokens, torch.tensor(self.documents, dtype=torch.int32).flatten()])


NO_MORE = torch.zeros(2, dtype=torch.int64)
"""The header that no question has: the student will not ask again."""


def question_of(batch: Batch) -> Question:
    """The question about a microbatch that lies on the CPU."""
    starts, lengths = batch.boundaries[:-1], batch.boundaries.diff()
    padding = batch.padding.flatten()[starts.long()]
    runs = zip(starts[~padding].tolist(), lengths[~padding].tolist(), strict=True)
    return Question(batch.tokens.flatten().int(), [Run(start, length) for start, length in runs])


def read(header: Tensor, body: Tensor) -> Question:
    """The question that these two are."""
    tokens, documents = torch.split(body, [int(header[0]), 2 * int(header[1])])
    return Question(tokens, [Run(start, length) for start, length in documents.view(-1, 2).tolist()])
