"""The files of one part: an input shard's documents, split, shuffled and written as Megatron's IndexedDataset.

Documents arrive in the shard's order and go to a scratch file at once; when all are there they are copied into their final order.
So memory holds no more than the documents' lengths and labels (some 30 MB of a SYNTH shard), and the disk holds a part's tokens
twice, or thrice while the next part is encoded. Where the files go is dataset.py's business.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vpmoe.data.dataset import SPLITS, UNKNOWN
from vpmoe.data.index import index_bytes
from vpmoe.data.preprocess.encode import Encoded
from vpmoe.data.preprocess.text import Unreadable
from vpmoe.data.spans import spans_of_documents
from vpmoe.storage.paths import PartFile, Split

FILES: tuple[PartFile, ...] = ("tokens.bin", "tokens.idx", "spans.bin", "spans.idx", "documents.parquet")

COPY_TOKENS = 1 << 20
"""Tokens that are brought into order at a time."""

LISTED = 100
"""Unreadable rows that a record names; all of them are counted, and in the log."""

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


@dataclass
class SplitDocuments:
    """What has arrived of one split."""

    lengths: list[NDArray[np.int64]] = field(default_factory=list)
    order: list[NDArray[np.uint64]] = field(default_factory=list)
    labels: list[tuple[str, str | None, str | None]] = field(default_factory=list)


class Part:
    """One part in the making, in a scratch folder of its own below TMPDIR, until it is discarded."""

    def __init__(self, number: int) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix=f"vpmoe-part-{number:05d}-")
        self._folder = Path(self._scratch.name)
        self._splits = {split: SplitDocuments() for split in SPLITS}
        self._arrived = {split: (self._folder / f"{split}.arrived").open("wb") for split in SPLITS}
        self.rows = 0
        self.dropped: Counter[str] = Counter()
        self.unreadable: list[Unreadable] = []
        self.surrogates = 0
        self._named = 0

    def discard(self) -> None:
        """Remove the scratch folder; counts stay."""
        for file in self._arrived.values():
            file.close()
        self._scratch.cleanup()

    def add(self, encoded: Encoded) -> None:
        """Take the next documents. Raises OSError where the disk is full."""
        tokens_D = encoded.lengths_D3.sum(axis=1) + 1
        for split, wanted in zip(SPLITS, (False, True), strict=True):
            chosen_D = encoded.valid_D == wanted
            documents = self._splits[split]
            documents.lengths.append(encoded.lengths_D3[chosen_D])
            documents.order.append(encoded.order_D[chosen_D])
            documents.labels.extend(
                label for label, chosen in zip(encoded.labels_D, chosen_D, strict=True) if chosen
            )
            if chosen_D.any():
                self._arrived[split].write(
                    encoded.ids_T if chosen_D.all() else encoded.ids_T[np.repeat(chosen_D, tokens_D)]
                )
        self.rows += encoded.rows
        self.dropped += encoded.dropped
        self.unreadable += [Unreadable(row, row + 1, why) for row, why in sorted(encoded.unreadable.items())]
        self.surrogates += encoded.surrogates

    def skip(self, unreadable: Unreadable) -> None:
        """Count rows that never became text."""
        self.rows += unreadable.stop - unreadable.first
        self.unreadable.append(unreadable)

    def unnamed(self) -> list[Unreadable]:
        """Unreadable rows that were not asked for yet."""
        new = self.unreadable[self._named :]
        self._named = len(self.unreadable)
        return new

    @property
    def unreadable_rows(self) -> int:
        return sum(found.stop - found.first for found in self.unreadable)

    def write(self) -> dict[Split, dict[PartFile, Path]]:
        """Write the part's files into its folder, in final order. Nothing can be added any more. Raises OSError where the disk is full."""
        written: dict[Split, dict[PartFile, Path]] = {}
        for split in SPLITS:
            self._arrived[split].close()
            files = {file: self._folder / f"{split}.{file}" for file in FILES}
            write_split(self._splits[split], Path(self._arrived[split].name), files)
            Path(self._arrived[split].name).unlink()
            written[split] = files
        return written

    def facts(self) -> dict[str, Any]:
        """What became of the shard's rows, for the part's record. `dataset.merge` adds these up."""
        unreadable = sorted(
            self.unreadable, key=lambda rows: rows.first
        )  # damaged row groups are known before the rows ahead of them
        return {
            "rows": self.rows,
            "dropped": dict(sorted(self.dropped.items())),
            "unreadable": {
                "rows": self.unreadable_rows,
                "first": [[u.first, u.stop, u.why] for u in unreadable[:LISTED]],
            },
            "surrogates": self.surrogates,
            "splits": {split: split_facts(self._splits[split]) for split in SPLITS},
        }


def split_facts(documents: SplitDocuments) -> dict[str, Any]:
    """Documents and tokens of a split: altogether, by span, by language and by exercise."""
    lengths_D3 = together(documents.lengths, (0, 3), np.int64)
    tokens_D = lengths_D3.sum(axis=1) + 1
    by: dict[str, dict[str, dict[str, int]]] = {"languages": {}, "exercises": {}}
    for tokens, (_, language, exercise) in zip(tokens_D.tolist(), documents.labels, strict=True):
        for kind, label in (("languages", language), ("exercises", exercise)):
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


def write_split(documents: SplitDocuments, arrived: Path, files: dict[PartFile, Path]) -> None:
    """Bring a split's documents into their final order and write its five files."""
    lengths_D3 = together(documents.lengths, (0, 3), np.int64)
    order_D = np.argsort(together(documents.order, (0,), np.uint64), kind="stable")
    tokens_D = lengths_D3.sum(axis=1) + 1
    starts_D = np.cumsum(tokens_D) - tokens_D
    ids_T = (
        np.memmap(arrived, dtype="<i4", mode="r").view(np.ndarray) if len(order_D) else np.empty(0, np.int32)
    )
    with files["tokens.bin"].open("wb") as tokens_file, files["spans.bin"].open("wb") as spans_file:
        for chosen in runs(order_D, tokens_D):
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
    ids, languages, exercises = (
        zip(*(documents.labels[d] for d in order_D), strict=True) if len(order_D) else ((), (), ())
    )
    columns = [
        ids,
        languages,
        exercises,
        *(values[order_D].astype(np.int32) for values in (tokens_D, lengths_D3[:, 1], lengths_D3[:, 2])),
    ]
    pq.write_table(
        pa.table([pa.array(c, f.type) for c, f in zip(columns, DOCUMENTS, strict=True)], schema=DOCUMENTS),
        files["documents.parquet"],
        compression="zstd",
    )


def runs(order_D: NDArray[np.intp], tokens_D: NDArray[np.int64]) -> Iterator[NDArray[np.intp]]:
    """Consecutive documents of an order, some COPY_TOKENS at a time."""
    ends_D = np.cumsum(tokens_D[order_D])
    first = 0
    while first < len(order_D):
        before = int(ends_D[first - 1]) if first else 0
        stop = max(first + 1, int(np.searchsorted(ends_D, before + COPY_TOKENS, side="right")))
        yield order_D[first:stop]
        first = stop


def together(arrays: list[Any], shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
    """All of them in one; of none, an empty array of that shape."""
    return np.concatenate(arrays) if arrays else np.empty(shape, dtype)
