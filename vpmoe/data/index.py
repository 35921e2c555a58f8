"""Megatron's IndexedDataset in numpy: the .idx file next to a .bin of consecutive documents. No torch, no
megatron.

Each document is one sequence and one document of the format. The .bin holds only the values. Layout of the
.idx, little-endian (megatron/core/datasets/indexed_dataset.py): 9 bytes magic, uint64 version 1, uint8 type
code, uint64 B, uint64 B + 1, int32 lengths [B], int64 byte offsets [B], int64 document boundaries [B + 1].
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
"""Megatron's codes of the element types that we write. It has none for float16: 8 is its uint16, which has
the same bits (view them as float16). We write no real uint16."""


@dataclass(frozen=True)
class Index:
    """Length and byte offset of each document of a .bin."""

    lengths: NDArray[np.int32]
    """[B] values in each document"""
    offsets: NDArray[np.int64]
    """[B] bytes from the start of the .bin to each document"""
    dtype: np.dtype[np.generic]


def index_bytes(lengths_B: NDArray[np.integer], dtype: DTypeLike) -> bytes:
    """The .idx for documents of these lengths, stored in the .bin in this order without gaps.

    Raises ValueError if the format has no code for the type or its int32 cannot hold a length.
    """
    dtype = np.dtype(dtype)
    if dtype not in CODES:
        raise ValueError(f"{dtype}: an IndexedDataset can hold only {', '.join(map(str, CODES))}")
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
    """Read an .idx. Raises ValueError, with the path and the fault, if the file is not in this format."""
    content = path.read_bytes()
    if len(content) < HEADER.size or not content.startswith(MAGIC):
        raise ValueError(f"{path}: not the .idx of an IndexedDataset: it does not begin with {MAGIC!r}")
    _, version, code, documents, boundaries = HEADER.unpack_from(content)
    size = HEADER.size + 12 * documents + 8 * boundaries
    names: dict[int, np.dtype[np.generic]] = {number: dtype for dtype, number in CODES.items()}
    if version != 1 or code not in names or boundaries != documents + 1 or len(content) != size:
        raise ValueError(
            f"{path}: version {version}, type code {code}, {documents} documents, {boundaries} boundaries, "
            f"{len(content)} bytes; expected version 1, a type code in {sorted(names)}, "
            f"{documents + 1} boundaries, {size} bytes"
        )
    lengths_B = np.frombuffer(content, "<i4", documents, HEADER.size)
    offsets_B = np.frombuffer(content, "<i8", documents, HEADER.size + 4 * documents)
    return Index(lengths_B, offsets_B, names[code])
