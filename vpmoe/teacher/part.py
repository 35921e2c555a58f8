"""The files of one part of the scores: a log-probability for every token of the dataset's part, and a row per
document.

They are made in a scratch folder, so memory holds only the documents' labels and lengths; the disk holds 7
bytes per token (a part of SYNTH has some 200 million). rescore.py scores the documents and uploads the files.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vpmoe.data.dataset import UNKNOWN, clean_label
from vpmoe.data.index import index_bytes, read_index
from vpmoe.data.spans import SPANS
from vpmoe.data.tokenizer import Ids
from vpmoe.failure import Permanent
from vpmoe.storage import Bucket, paths
from vpmoe.storage.manifest import Manifest
from vpmoe.storage.paths import PartFile, ScoresFile
from vpmoe.teacher.histogram import CODES, sparse
from vpmoe.teacher.uniform import UniformCheck

MIN_LOGP = np.float32(-100.0)
"""Lowest log-probability that is stored: exact in float16, and exp() of it is 0 there."""
NOT_SCORED = np.float16(np.nan)
COPY_TOKENS = 1 << 20

DOCUMENTS = pa.schema(
    [
        ("synth_id", pa.string()),
        ("language", pa.string()),
        ("exercise", pa.string()),
        ("scored", pa.bool_()),
        ("reasoning", pa.float32()),
        ("final", pa.float32()),
    ]
)

LABELS = ["synth_id", "language", "exercise"]
"""Columns that are those of the dataset's part."""


class ScoredPart:
    """Part `number` of the scores while it is made, in `folder`.

    `picked_D`: which of its documents are scored.
    """

    def __init__(
        self, dataset: Manifest, number: int, picked_D: NDArray[np.bool_], bucket: Bucket, folder: Path
    ) -> None:
        """Download the dataset's part, if it has documents.

        Raises StorageError if it is not what its manifest says, OSError if the disk is full.
        """
        self._folder = folder
        self.number = number
        wanted: list[PartFile] = ["tokens.idx", "documents.parquet"] if len(picked_D) else []
        if picked_D.any():
            wanted += ["spans.bin", "tokens.bin"]
        for file in wanted:
            name = paths.dataset_part(dataset.facts["id"], "train", number, file).removeprefix(
                paths.dataset(dataset.facts["id"]) + "/"
            )
            bucket.download(dataset.subjects[name], folder / file)
        lengths_D = read_index(folder / "tokens.idx").lengths if len(picked_D) else np.empty(0, np.int32)
        self._starts = np.concatenate([[0], np.cumsum(lengths_D, dtype=np.int64)])
        self._labels = (
            pq.read_table(folder / "documents.parquet", columns=LABELS)
            if len(picked_D)
            else pa.schema([DOCUMENTS.field(name) for name in LABELS]).empty_table()
        )
        if not len(lengths_D) == len(picked_D) == self._labels.num_rows:
            raise Permanent(
                f"{dataset.key}: training part {number} has {len(lengths_D)} documents in its index and "
                f"{self._labels.num_rows} rows. It was not written by preprocess; delete the dataset's "
                "folder to have it built again."
            )
        self._picked_D = picked_D
        self._tokens_T = self._mapped("tokens.bin", np.int32)
        self._spans_T = self._mapped("spans.bin", np.uint8)
        self._means_D = {name: np.full(len(picked_D), np.nan, np.float32) for name in SPANS}
        self._counts = {name: np.zeros(CODES, np.int64) for name in SPANS}
        self._tokens_of = np.zeros(len(picked_D), np.int64)
        self._uniform = UniformCheck(f"training part {number}")
        with (folder / "logp.bin").open("wb") as empty:
            for start in range(0, int(self._starts[-1]), COPY_TOKENS):
                empty.write(np.full(min(COPY_TOKENS, int(self._starts[-1]) - start), NOT_SCORED).tobytes())
        self._logp = (folder / "logp.bin").open("r+b")

    def _mapped(self, file: PartFile, dtype: type[np.generic]) -> NDArray[Any]:
        """A file as a memory map; an empty array if the file is empty or was not downloaded."""
        path = self._folder / file
        return (
            np.memmap(path, dtype, "r").view(np.ndarray)
            if path.exists() and path.stat().st_size
            else np.empty(0, dtype)
        )

    @property
    def picked(self) -> Sequence[int]:
        """The documents to score, in the part's order."""
        return [int(document) for document in np.flatnonzero(self._picked_D)]

    def ids(self, document: int) -> Ids:
        """Token ids of a document, [T]."""
        ids_T: Ids = self._tokens_T[self._starts[document] : self._starts[document + 1]]
        return ids_T

    def add(self, document: int, logp_T: NDArray[np.float32]) -> None:
        """Add a document's log-probabilities, [T].

        Raises Permanent if a supervised token has none, or if all of the part so far are uniform; OSError if
        the disk is full.
        """
        start, stop = int(self._starts[document]), int(self._starts[document + 1])
        span_T = self._spans_T[start:stop]
        stored_T = to_float16(logp_T)
        missing = np.flatnonzero((span_T > 0) & np.isnan(stored_T))
        if len(missing):
            raise Permanent(
                f"teacher.model: document {document} of training part {self.number} "
                f"({self._labels['synth_id'][document]}): the teacher gave {len(missing)} of its tokens no "
                f"probability, the first at {missing[0]} of {stop - start}. Its weights may hold numbers "
                "that are not finite, or overflow in their dtype; try another checkpoint."
            )
        self._uniform.add(logp_T[span_T > 0])
        self._logp.seek(stored_T.itemsize * start)
        self._logp.write(stored_T.tobytes())
        for name, span in SPANS.items():
            of_span = stored_T[span_T == span]
            self._counts[name] += np.bincount(of_span.view(np.uint16), minlength=CODES)
            self._tokens_of[document] += len(of_span)
            if len(of_span):
                self._means_D[name][document] = of_span.mean(dtype=np.float64)

    def write(self) -> dict[ScoresFile, Path]:
        """Finish the files; returns their paths. A part without documents has none.

        Nothing can be added afterwards. Raises OSError if the disk is full.
        """
        self._logp.close()
        if not len(self._picked_D):
            return {}
        (self._folder / "logp.idx").write_bytes(index_bytes(np.diff(self._starts), np.float16))
        means = [pa.array(values, pa.float32(), mask=np.isnan(values)) for values in self._means_D.values()]
        columns = [*self._labels.columns, pa.array(self._picked_D), *means]
        table = pa.table(
            [column.cast(field.type) for column, field in zip(columns, DOCUMENTS, strict=True)],
            schema=DOCUMENTS,
        )
        pq.write_table(table, self._folder / "scores.parquet", compression="zstd")
        return {
            "logp.bin": self._folder / "logp.bin",
            "logp.idx": self._folder / "logp.idx",
            "documents.parquet": self._folder / "scores.parquet",
        }

    def counts(self) -> dict[str, Any]:
        """Counts for the part's record; scores.merge_records adds them up.

        `tokens` counts supervised tokens.
        """
        by: dict[str, dict[str, dict[str, int]]] = {"languages": {}, "exercises": {}}
        for kind, column in (("languages", "language"), ("exercises", "exercise")):
            labels = self._labels[column].filter(pa.array(self._picked_D)).to_pylist()
            for label, tokens in zip(labels, self._tokens_of[self._picked_D].tolist(), strict=True):
                entry = by[kind].setdefault(clean_label(label) or UNKNOWN, {"documents": 0, "tokens": 0})
                entry["documents"] += 1
                entry["tokens"] += tokens
        return {
            "documents": int(self._picked_D.sum()),
            "tokens": {name: int(counts.sum()) for name, counts in self._counts.items()},
            "histogram": {name: sparse(counts) for name, counts in self._counts.items()},
            **by,
        }


def to_float16(logp_T: NDArray[np.float32]) -> NDArray[np.float16]:
    """Log-probabilities as they are stored: float16, at least MIN_LOGP, and one bit pattern of NaN, as bytes
    are compared."""
    half_T = np.maximum(logp_T, MIN_LOGP).astype(np.float16)
    half_T[np.isnan(half_T)] = NOT_SCORED
    return half_T
