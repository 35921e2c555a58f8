"""Held-out loss by span: always over the same documents of the valid split, which the seed chooses, whatever
the order of files.

When it is measured is decided by schedule.py. Harmony validity of samples is measured in vpmoe.evaluation.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from vpmoe.api.microbatch import Microbatch
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
    """The first `documents` documents of the split in the order of epoch 0, packed into rows; all of them if
    there are fewer."""
    visited = packing.held_out_documents(lengths, documents, seed)
    first_document = packing.first_documents([len(part) for part in lengths])
    places, starts = packing.pack_sequences(np.concatenate(lengths)[visited], sequence_length)
    return [
        packing.packed_documents(visited[places[start:stop]], first_document, lengths)
        for start, stop in pairwise(starts)
    ]


class HeldOutDocuments:
    """This rank's share of the held-out documents, kept in memory for all evaluations."""

    def __init__(
        self, valid: DatasetReader, documents: int, seed: int, sequence_length: int, microbatch: Microbatch
    ) -> None:
        """The split must not be empty; load_training_dataset has checked that."""
        self.documents = min(documents, sum(len(part) for part in valid.lengths))
        rows = held_out_rows(valid.lengths, documents, seed, sequence_length)
        rank, ranks = distributed.rank(), distributed.world_size()
        # With expert parallelism every rank must take part in every batch, so all get equally many rows.
        rows += [[] for _ in range(-len(rows) % ranks)]
        rows = rows[rank::ranks]
        valid.prefetch(document for row in rows for document in row)
        self.batches: list[Batch] = collate.microbatches(
            rows, valid.read_document, sequence_length, microbatch
        )

    def loss(self, learner: Learner) -> SpanLoss:
        """Mean negative log-likelihood of each span's tokens over all ranks, in nats."""
        found = learner.evaluate(self.batches).cross_entropy
        return SpanLoss(reasoning=found["reasoning"], final=found["final"])
