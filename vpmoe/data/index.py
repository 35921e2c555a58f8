"""Megatron's IndexedDataset in numpy: the .idx file beside a .bin of consecutive documents. No torch, no megatron.

One document is one sequence and one document of the format. The .bin holds nothing but the values, so whoever writes it needs no
code of ours. Layout of the .idx (megatron/core/datasets/indexed_dataset.py), little-endian: 9 bytes magic, uint64 version 1, uint8
type code, uint64 B, uint64 B + 1, then int32 lengths [B], int64 byte offsets [B], int64 document boundaries [B + 1].
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike, NDArray

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
CODES: dict[np.dtype[np.generic], int] = {
    np.dtype(np.uint8): 1,
    np.dtype(np.int32): 4,
    np.dtype(np.float16): 8,
}
"""Megatron's codes of the element types that we write. It has none for float16: 8 is its uint16, which gives it the bits (view them as
float16), and nothing of ours holds real uint16."""


@dataclass(frozen=True)
class Index:
    """Where the documents of a .bin lie: values and byte offset of each."""

    lengths: NDArray[np.int32]
    """[B] values in each document"""
    offsets: NDArray[np.int64]
    """[B] bytes from the start of the .bin to each document"""
    dtype: np.dtype[np.generic]


def index_bytes(lengths_B: NDArray[np.integer], dtype: DTypeLike) -> bytes:
    """The .idx of documents of these lengths, which lie in the .bin in this order with nothing between them.

    Raises ValueError for a type that the format has no code for, or a length that its int32 cannot hold.
    """
    dtype = np.dtype(dtype)
    if dtype not in CODES:
        raise ValueError(f"{dtype}: an IndexedDataset is written as one of {', '.join(map(str, CODES))}")
    documents = len(lengths_B)
    if documents and not 0 <= int(lengths_B.min()) <= int(lengths_B.max()) <= np.iinfo(np.int32).max:
        raise ValueError(f"lengths from {lengths_B.min()} to {lengths_B.max()} do not fit into int32")
    ends_B = np.cumsum(lengths_B, dtype=np.int64)
    offsets_B = (ends_B - lengths_B) * dtype.itemsize
    return b"".join(
        (
            HEADER.pack(MAGIC, 1, CODES[dtype], documents, documents + 1),
            lengths_B.astype("<i4").tobytes(),
            offsets_B.astype("<i8").tobytes(),
            np.arange(documents + 1, dtype="<i8").tobytes(),
        )
    )


def read_index(path: Path) -> Index:
    """The index of a .bin. Raises ValueError where the file is not an .idx of this format, names the path and what is wrong."""
    content = path.read_bytes()
    if len(content) < HEADER.size or not content.startswith(MAGIC):
        raise ValueError(f"{path}: not an IndexedDataset's .idx: it does not begin with {MAGIC!r}")
    _, version, code, documents, boundaries = HEADER.unpack_from(content)
    size = HEADER.size + 12 * documents + 8 * boundaries
    names: dict[int, np.dtype[np.generic]] = {number: dtype for dtype, number in CODES.items()}
    if version != 1 or code not in names or boundaries != documents + 1 or len(content) != size:
        raise ValueError(
            f"{path}: version {version}, type code {code}, {documents} documents, {boundaries} boundaries, {len(content)} bytes; expected "
            f"version 1, a code of {sorted(names)}, a boundary more than documents, {size} bytes"
        )
    lengths_B = np.frombuffer(content, "<i4", documents, HEADER.size)
    offsets_B = np.frombuffer(content, "<i8", documents, HEADER.size + 4 * documents)
    return Index(lengths_B, offsets_B, names[code])
