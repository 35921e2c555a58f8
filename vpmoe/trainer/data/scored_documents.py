"""The documents of the training split that the teacher has scored, with the teacher's log-probability of each
token.

They are numbered among themselves, so they have a batch plan like any other documents. Scores are read block
by block through the cache of the dataset's parts. vpmoe.teacher makes them.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray

from vpmoe.data.packing import PackedDocument
from vpmoe.data.reader import BlockCache, DatasetReader
from vpmoe.failure import Permanent
from vpmoe.storage import Subject
from vpmoe.storage.manifest import Manifest


class ScoredDocuments:
    """`lengths[p]` are the lengths in tokens of the scored documents of part p. The number of a
    PackedDocument counts scored ones alone."""

    def __init__(self, documents: DatasetReader, scores: Manifest, cache: BlockCache) -> None:
        """Reads which documents were scored.

        Raises StorageError if an object is not what the manifest says; Permanent if scores and dataset
        have different documents, or nothing was scored.
        """
        self._documents = documents
        self._scores = scores
        self._cache = cache
        self._places = [self._scored_in(part, len(lengths)) for part, lengths in enumerate(documents.lengths)]
        """By part, the numbers of its scored documents among all of its documents."""
        self.lengths: Sequence[NDArray[np.int32]] = [
            of[places] for of, places in zip(documents.lengths, self._places, strict=True)
        ]
        if not sum(map(len, self._places)):
            raise Permanent(
                f"{scores.key}: the teacher scored no document. Raise subset.tokens or subset.fraction, or "
                "set mix to 0."
            )

    def read_document(self, document: PackedDocument) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """(tokens, span of each token) of one document."""
        return self._documents.read_document(self._original(document))

    def logp(self, document: PackedDocument) -> NDArray[np.float16]:
        """The teacher's log-probability of each token [T]. Raises Permanent if a supervised token has
        none."""
        original = self._original(document)
        start, stop = self._documents.token_range(original)
        logp_T = np.frombuffer(
            self._cache.read_range(self._subject(document.part), 2 * start, 2 * stop), "<f2"
        )
        _, spans_T = self._documents.read_document(original)
        if np.isnan(logp_T[spans_T > 0]).any():
            raise Permanent(
                f"{self._scores.key}: document {original.number} of {self._documents.stem(original.part)} "
                "counts as scored, but some of its supervised tokens have no score. Rescoring does not write "
                "such scores. Delete their folder to have them made again."
            )
        return logp_T

    def prefetch(self, documents: Iterable[PackedDocument]) -> None:
        """Begin to fetch the blocks of these documents and of their scores."""
        originals = [self._original(document) for document in documents]
        self._documents.prefetch(originals)
        self._documents.prefetch_file(originals, self._subject, 2)

    def exercise_shares(self, documents: Iterable[PackedDocument]) -> dict[str, float]:
        """See DatasetReader."""
        return self._documents.exercise_shares(self._original(document) for document in documents)

    def numbers_by_part(self, documents: Iterable[PackedDocument]) -> dict[str, tuple[int, ...]]:
        """See DatasetReader: the numbers are those among all documents."""
        return self._documents.numbers_by_part(self._original(document) for document in documents)

    def _original(self, document: PackedDocument) -> PackedDocument:
        """The document with its number among all documents of its part."""
        return PackedDocument(
            document.part, int(self._places[document.part][document.number]), document.length
        )

    def _subject(self, part: int) -> Subject:
        return self._scores.subjects[f"{self._documents.stem(part)}.logp.bin"]

    def _scored_in(self, part: int, documents: int) -> NDArray[np.int64]:
        if not documents:  # of a dataset of an older version, in which such a part has files
            return np.empty(0, np.int64)
        name = f"{self._documents.stem(part)}.documents.parquet"
        if name not in self._scores.subjects:
            raise Permanent(
                f"{self._scores.key}: there is no {name}, so the scores are of another dataset. Delete their "
                "folder."
            )
        subject = self._scores.subjects[name]
        content = pyarrow.BufferReader(self._cache.read_range(subject, 0, subject.size))
        scored_D = pyarrow.parquet.read_table(content, columns=["scored"])["scored"].to_numpy()
        if len(scored_D) != documents:
            raise Permanent(
                f"{self._scores.key}: {name} has {len(scored_D)} rows, but the dataset's part has "
                f"{documents} documents. Delete the scores' folder to have them made again."
            )
        return np.flatnonzero(scored_D)
