"""Writes the files of one part: an input shard's documents, split, shuffled and stored as Megatron's
IndexedDataset.

Documents are appended to a scratch file in the shard's order; when all are there, they are copied into their
final order. So memory holds only the documents' lengths and labels (some 30 MB for a SYNTH shard), and the
disk holds a part's tokens twice, or three times while the next part is encoded. step.py uploads the files.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vpmoe.api.effort import Effort
from vpmoe.data.dataset import SPLITS, UNKNOWN
from vpmoe.data.index import index_bytes
from vpmoe.data.preprocess.encode import EncodedChunk
from vpmoe.data.preprocess.text import UnreadableRows
from vpmoe.data.spans import spans_of_documents
from vpmoe.storage.paths import PartFile, Split

FILES: tuple[PartFile, ...] = ("tokens.bin", "tokens.idx", "spans.bin", "spans.idx", "documents.parquet")

COPY_TOKENS = 1 << 20
"""Tokens that are copied into the final order at a time."""

LISTED_UNREADABLE = 100
"""Unreadable rows that are listed in a record. All of them are counted and logged."""

LISTED_CONTRADICTIONS = 3
"""Rows dropped as contradictedResult that are listed in a record. All of them are counted."""

LISTED_CHARACTERS = 100
"""Characters of a listed row's id, result and answer; the rest is cut off."""

DOCUMENTS = pa.schema(
    [
        ("synth_id", pa.string()),
        ("language", pa.string()),
        ("exercise", pa.string()),
        ("tokens", pa.int32()),
        ("reasoning", pa.int32()),
        ("final", pa.int32()),
    ]
)

DRAWN_EFFORT = pa.field("effort", pa.string())
"""The further column of DOCUMENTS in a dataset whose documents have different efforts. A dataset of one
effort has neither the column nor the counts by effort: its files are the same bytes as before there were
shares."""


@dataclass
class SplitDocuments:
    """The documents of one split that were added so far."""

    lengths: list[NDArray[np.int64]] = field(default_factory=list)
    order: list[NDArray[np.uint64]] = field(default_factory=list)
    labels: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    efforts: list[Effort] = field(default_factory=list)


class PartWriter:
    """Collects one part in its own scratch folder below TMPDIR, until `discard`."""

    def __init__(self, number: int, *, drawn_efforts: bool) -> None:
        """`drawn_efforts`: the documents have different efforts."""
        self._drawn_efforts = drawn_efforts
        self._scratch = tempfile.TemporaryDirectory(prefix=f"vpmoe-part-{number:05d}-")
        self._folder = Path(self._scratch.name)
        self._splits = {split: SplitDocuments() for split in SPLITS}
        self._arrived = {split: (self._folder / f"{split}.arrived").open("wb") for split in SPLITS}
        self.rows = 0
        self.dropped: Counter[str] = Counter()
        self.unreadable: list[UnreadableRows] = []
        self.surrogates = 0
        self.empty_queries = 0
        self.contradictions: list[dict[str, Any]] = []
        self._hashes: list[NDArray[np.uint64]] = []
        self._logged = 0

    def discard(self) -> None:
        """Remove the scratch folder. The counts remain available."""
        for file in self._arrived.values():
            file.close()
        self._scratch.cleanup()

    def add(self, encoded: EncodedChunk) -> None:
        """Add the next documents. Raises OSError if the disk is full."""
        tokens_D = encoded.lengths_D3.sum(axis=1) + 1
        for split, wanted in zip(SPLITS, (False, True), strict=True):
            chosen_D = encoded.valid_D == wanted
            documents = self._splits[split]
            documents.lengths.append(encoded.lengths_D3[chosen_D])
            documents.order.append(encoded.order_D[chosen_D])
            documents.labels.extend(
                label for label, chosen in zip(encoded.labels_D, chosen_D, strict=True) if chosen
            )
            documents.efforts.extend(
                effort for effort, chosen in zip(encoded.efforts_D, chosen_D, strict=True) if chosen
            )
            if chosen_D.any():
                self._arrived[split].write(
                    encoded.ids_T if chosen_D.all() else encoded.ids_T[np.repeat(chosen_D, tokens_D)]
                )
        self.rows += encoded.rows
        self.dropped += encoded.dropped
        self.unreadable += [
            UnreadableRows(row, row + 1, reason) for row, reason in sorted(encoded.unreadable.items())
        ]
        self.surrogates += encoded.surrogates
        self.empty_queries += encoded.empty_queries
        self._hashes.append(encoded.hashes_2D)
        for row, (row_id, found) in encoded.contradictions.items():
            if len(self.contradictions) < LISTED_CONTRADICTIONS:
                texts = {"id": row_id, "result": found.result, "answer": found.answer}
                self.contradictions.append(
                    {"row": row, **{name: text[:LISTED_CHARACTERS] for name, text in texts.items()}}
                )

    def skip_rows(self, unreadable: UnreadableRows) -> None:
        """Count rows that could not be read at all."""
        self.rows += unreadable.stop - unreadable.first
        self.unreadable.append(unreadable)

    def take_unlogged(self) -> list[UnreadableRows]:
        """The unreadable rows since the previous call."""
        new = self.unreadable[self._logged :]
        self._logged = len(self.unreadable)
        return new

    @property
    def unreadable_rows(self) -> int:
        return sum(found.stop - found.first for found in self.unreadable)

    def hashes_2D(self) -> NDArray[np.uint64]:
        """The fingerprints of all documents' ids and user messages, in the shard's order."""
        return np.concatenate([np.empty((2, 0), np.uint64), *self._hashes], axis=1)

    def write(self) -> dict[Split, dict[PartFile, Path]]:
        """Write the part's files into its scratch folder and close it for `add`. Raises OSError if the disk
        is full.

        A split without documents has no files: Megatron's IndexedDataset cannot map an empty .bin.
        """
        written: dict[Split, dict[PartFile, Path]] = {}
        for split in SPLITS:
            self._arrived[split].close()
            documents = self._splits[split]
            if any(len(lengths_D3) for lengths_D3 in documents.lengths):
                written[split] = {file: self._folder / f"{split}.{file}" for file in FILES}
                arrived = Path(self._arrived[split].name)
                write_split(documents, arrived, written[split], drawn_efforts=self._drawn_efforts)
            Path(self._arrived[split].name).unlink()
        return written

    def counts(self) -> dict[str, Any]:
        """The counts of the shard's rows for the part's record. dataset_manifest.merge_records adds them
        up."""
        # Sorted, because damaged row groups are found before the rows ahead of them are encoded.
        unreadable = sorted(self.unreadable, key=lambda rows: rows.first)
        return {
            "rows": self.rows,
            "dropped": dict(sorted(self.dropped.items())),
            "unreadable": {
                "rows": self.unreadable_rows,
                "first": [[u.first, u.stop, u.reason] for u in unreadable[:LISTED_UNREADABLE]],
            },
            "surrogates": self.surrogates,
            "emptyQueries": self.empty_queries,
            "contradictions": self.contradictions,
            "splits": {
                split: split_counts(self._splits[split], drawn_efforts=self._drawn_efforts)
                for split in SPLITS
            },
        }


def split_counts(documents: SplitDocuments, *, drawn_efforts: bool) -> dict[str, Any]:
    """Documents and tokens of a split: in total, by span, by language, by exercise and by drawn effort."""
    lengths_D3 = concatenate(documents.lengths, (0, 3), np.int64)
    tokens_D = lengths_D3.sum(axis=1) + 1
    labels: dict[str, Sequence[str | None]] = {
        "languages": [language for _, language, _ in documents.labels],
        "exercises": [exercise for _, _, exercise in documents.labels],
    }
    if drawn_efforts:
        labels["efforts"] = documents.efforts
    by: dict[str, dict[str, dict[str, int]]] = {kind: {} for kind in labels}
    for kind, of_documents in labels.items():
        for tokens, label in zip(tokens_D.tolist(), of_documents, strict=True):
            entry = by[kind].setdefault(label or UNKNOWN, {"documents": 0, "tokens": 0})
            entry["documents"] += 1
            entry["tokens"] += tokens
    return {
        "documents": len(tokens_D),
        "tokens": int(tokens_D.sum()),
        "reasoning": int(lengths_D3[:, 1].sum()),
        "final": int(lengths_D3[:, 2].sum()),
        **by,
    }


def write_split(
    documents: SplitDocuments, arrived: Path, files: dict[PartFile, Path], *, drawn_efforts: bool
) -> None:
    """Write the five files of a split that has documents, in their final order."""
    lengths_D3 = np.concatenate(documents.lengths)
    order_D = np.argsort(np.concatenate(documents.order), kind="stable")
    tokens_D = lengths_D3.sum(axis=1) + 1
    starts_D = np.cumsum(tokens_D) - tokens_D
    ids_T = np.memmap(arrived, dtype="<i4", mode="r").view(np.ndarray)
    with files["tokens.bin"].open("wb") as tokens_file, files["spans.bin"].open("wb") as spans_file:
        for chosen in document_batches(order_D, tokens_D):
            tokens_file.write(
                np.concatenate(
                    [
                        ids_T[start : start + n]
                        for start, n in zip(starts_D[chosen], tokens_D[chosen], strict=True)
                    ]
                )
            )
            spans_file.write(spans_of_documents(lengths_D3[chosen]))
    files["tokens.idx"].write_bytes(index_bytes(tokens_D[order_D], np.int32))
    files["spans.idx"].write_bytes(index_bytes(tokens_D[order_D], np.uint8))
    ids, languages, exercises = zip(*(documents.labels[d] for d in order_D), strict=True)
    columns = [
        ids,
        languages,
        exercises,
        *(values[order_D].astype(np.int32) for values in (tokens_D, lengths_D3[:, 1], lengths_D3[:, 2])),
    ]
    schema = DOCUMENTS
    if drawn_efforts:
        columns.append([documents.efforts[d] for d in order_D])
        schema = DOCUMENTS.append(DRAWN_EFFORT)
    pq.write_table(
        pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema),
        files["documents.parquet"],
        compression="zstd",
    )


def document_batches(order_D: NDArray[np.intp], tokens_D: NDArray[np.int64]) -> Iterator[NDArray[np.intp]]:
    """The documents of an order in consecutive batches of about COPY_TOKENS tokens."""
    ends_D = np.cumsum(tokens_D[order_D])
    first = 0
    while first < len(order_D):
        before = int(ends_D[first - 1]) if first else 0
        stop = max(first + 1, int(np.searchsorted(ends_D, before + COPY_TOKENS, side="right")))
        yield order_D[first:stop]
        first = stop


def concatenate(arrays: list[Any], shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
    """The concatenation; an empty array of `shape` if there are no arrays."""
    return np.concatenate(arrays) if arrays else np.empty(shape, dtype)
