"""The request of a student to the teacher: the ids of a microbatch and where its documents are, as two host
tensors."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vpmoe.data.tokenizer import Ids
from vpmoe.model.batch import Batch

WIRE = {"cpu": torch.float32, "cuda": torch.bfloat16}
"""Type in which hidden states and the output matrix travel, by device: that of the students' weights."""


class DocumentRange(NamedTuple):
    """A document in a microbatch: positions [start, start + length) of T."""

    start: int
    length: int


class Question(NamedTuple):
    """Ids [T] int32 in the order of positions, and the documents among them. Positions of no document are
    padding."""

    tokens: Tensor
    documents: Sequence[DocumentRange]

    @property
    def header(self) -> Tensor:
        """[positions, documents] int64: what the length of `body` follows from."""
        return torch.tensor([len(self.tokens), len(self.documents)])

    @property
    def ids(self) -> list[Ids]:
        """The ids of each document."""
        tokens_T: Ids = self.tokens.numpy()
        return [tokens_T[start : start + length] for start, length in self.documents]

    @property
    def body(self) -> Tensor:
        """[T + 2·documents] int32: ids, then start and length of each document."""
        return torch.cat([self.tokens, torch.tensor(self.documents, dtype=torch.int32).flatten()])


NO_MORE = torch.zeros(2, dtype=torch.int64)
"""The header that no question has: the student has no more questions."""


def question_of(batch: Batch) -> Question:
    """The question about a microbatch, which must be on the CPU."""
    starts, lengths = batch.boundaries[:-1], batch.boundaries.diff()
    padding = batch.padding.flatten()[starts.long()]
    ranges = zip(starts[~padding].tolist(), lengths[~padding].tolist(), strict=True)
    return Question(batch.tokens.flatten().int(), [DocumentRange(start, length) for start, length in ranges])


def parse_question(header: Tensor, body: Tensor) -> Question:
    """The question with this header and body."""
    tokens, documents = torch.split(body, [int(header[0]), 2 * int(header[1])])
    return Question(
        tokens, [DocumentRange(start, length) for start, length in documents.view(-1, 2).tolist()]
    )


def ranks_of(teacher: int, teachers: int, students: int) -> range:
    """The ranks that learn from one of a stage's teachers: they are dealt in turn."""
    return range(teacher, students, teachers)
