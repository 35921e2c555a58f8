"""Bits per byte of the canary, measured by the trainer between two steps: the same windows and the same
figure as those of the evaluation after a stage (vpmoe/data/canary.py).

Which kinds of stage measure it, and when, is decided in vpmoe/trainer/stages.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from vpmoe.api.microbatch import Microbatch
from vpmoe.data import canary, packing
from vpmoe.data.canary import CanaryText
from vpmoe.data.packing import PackedDocument
from vpmoe.data.spans import FINAL
from vpmoe.model import distributed
from vpmoe.model.batch import Batch
from vpmoe.model.learner import Learner
from vpmoe.rollout.evaluation_record import CanaryResult
from vpmoe.trainer.data import collate


class CanaryWindows:
    """This rank's share of the canary's windows, kept in memory for all evaluations."""

    def __init__(self, texts: Sequence[CanaryText], sequence_length: int, microbatch: Microbatch) -> None:
        """`texts` have at least one token to count; `load_texts` has checked that."""
        self._bytes = sum(text.size for text in texts)
        self._sha256 = canary.texts_digest(texts)
        windows = [
            (text.ids_T, window)
            for text in texts
            for window in canary.split_windows(len(text.ids_T), sequence_length)
        ]
        lengths = np.array([window.stop - window.start for _, window in windows], np.int32)
        places, starts = packing.pack_sequences(lengths, sequence_length)
        rows = [
            [PackedDocument(0, int(number), int(lengths[number])) for number in places[start:stop]]
            for start, stop in pairwise(starts)
        ]
        rank, ranks = distributed.rank(), distributed.world_size()
        # With expert parallelism every rank must take part in every batch, so all get equally many rows.
        rows += [[] for _ in range(-len(rows) % ranks)]

        def read(document: PackedDocument) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
            ids_T, window = windows[document.number]
            spans_T = np.zeros(document.length, np.uint8)
            spans_T[window.first - window.start :] = FINAL  # which span it is makes no difference
            return ids_T[window.start : window.stop], spans_T

        self.batches: list[Batch] = collate.microbatches(rows[rank::ranks], read, sequence_length, microbatch)

    def measure(self, learner: Learner) -> CanaryResult:
        """Over all ranks. Raises ArithmeticError on every rank if the figure is not finite."""
        found = learner.evaluate(self.batches)
        nats = (found.cross_entropy["final"] or 0.0) * found.tokens["final"]
        if not math.isfinite(nats):
            raise ArithmeticError(f"the canary's bits per byte ({nats})")
        return CanaryResult(
            bits_per_byte=nats / math.log(2) / self._bytes, bytes=self._bytes, sha256=self._sha256
        )
