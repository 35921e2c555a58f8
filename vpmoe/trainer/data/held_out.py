"""Held-out loss by span: always the same documents of the valid split, chosen by the seed and not by the order of files.

Which steps are followed by an evaluation is schedule.py's business; Harmony validity of samples is not measured here.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from vpmoe.api.progress import SpanLoss
from vpmoe.data import packing
from vpmoe.data.packing import PackedDocument
from vpmoe.data.reader import DatasetReader
from vpmoe.model import distributed
from vpmoe.model.batch import Batch
from vpmoe.model.learner import Learner
from vpmoe.trainer.data import collate


def held_out_rows(
    lengths: Sequence[NDArray[np.int32]], documents: int, seed: int, sequence_length: int
) -> list[list[PackedDocument]]:
    """The first `documents` documents of the split in the plan's order for epoch 0, packed into rows. All of them where there are fewer."""
    visited = packing.held_out(lengths, documents, seed)
    first_document = packing.firsts([len(part) for part in lengths])
    places, starts = packing.pack(np.concatenate(lengths)[visited], sequence_length)
    return [
        packing.documents(visited[places[start:stop]], first_document, lengths)
        for start, stop in pairwise(starts)
    ]


class HeldOutDocuments:
    """This rank's share of the held-out documents, kept in memory: every evaluation scores the same."""

    def __init__(self, valid: DatasetReader, documents: int, seed: int, sequence_length: int) -> None:
        """The split must not be empty, which stage.dataset has made sure of."""
        self.documents = min(documents, sum(len(part) for part in valid.lengths))
        rows = held_out_rows(valid.lengths, documents, seed, sequence_length)
        rank, ranks = distributed.rank(), distributed.world_size()
        rows += [
            [] for _ in range(-len(rows) % ranks)
        ]  # experts that ranks share want every rank to take part in every batch
        rows = rows[rank::ranks]
        valid.prefetch(document for row in rows for document in row)
        self.batches: list[Batch] = collate.microbatches(rows, valid.read, sequence_length)

    def loss(self, learner: Learner) -> SpanLoss:
        """Mean negative log-likelihood of each span's tokens over all ranks, in nats."""
        found = learner.evaluate(self.batches).cross_entropy
        return SpanLoss(reasoning=found["reasoning"], final=found["final"])
