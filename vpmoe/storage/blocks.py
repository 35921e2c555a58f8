"""Blocks: the unit in which content is hashed, uploaded and read. Pure; no I/O on buckets.

A hash of the whole object cannot verify a range read, so every object also has one sha256 for each 8 MiB. A
block is one part of a multipart upload.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

BLOCK = 8 * 1024 * 1024
"""Bytes in every block of an object but the last."""


@dataclass(frozen=True)
class Stored:
    """An object as it was written: its key below the bucket's prefix, bytes, sha256 in hex, and the sha256 of
    each block."""

    key: str
    size: int
    sha256: str
    blocks: tuple[str, ...]

    def subject(self, folder: str) -> "Subject":
        """The object as the manifest of `folder` names it. Raises ValueError if it is not in that folder."""
        name = self.key.removeprefix(folder.rstrip("/") + "/")
        if name == self.key:
            raise ValueError(f"{self.key} does not lie in {folder}, whose manifest is to name it")
        return Subject(self.key, self.size, self.sha256, self.blocks, name)


@dataclass(frozen=True)
class Subject(Stored):
    """An object that a manifest names; `name` is its key relative to the manifest's folder."""

    name: str


class Hasher:
    """sha256 of the whole and of each block, computed from content that is seen once."""

    def __init__(self) -> None:
        self.size = 0
        self._whole = hashlib.sha256()
        self._blocks: list[str] = []

    def add(self, block: bytes) -> None:
        """Add the next block: BLOCK bytes, fewer only for the last."""
        self.size += len(block)
        self._whole.update(block)
        self._blocks.append(hashlib.sha256(block).hexdigest())

    def stored(self, key: str) -> Stored:
        """The description of the content, with the key that it was written to."""
        return Stored(key, self.size, self._whole.hexdigest(), tuple(self._blocks))


def hash_bytes(key: str, data: bytes) -> Stored:
    """The description of an object that holds `data`."""
    hasher = Hasher()
    for start in range(0, len(data), BLOCK):
        hasher.add(data[start : start + BLOCK])
    return hasher.stored(key)


def hash_file(key: str, path: Path) -> Stored:
    """The description of an object that holds the content of a file, which is read a block at a time."""
    hasher = Hasher()
    with path.open("rb") as file:
        for block in read_blocks(file):
            hasher.add(block)
    return hasher.stored(key)


def hash_files(files: Mapping[str, Path], threads: int) -> list[Stored]:
    """As `hash_file` of each key and path, in `threads` threads. A file's own sha256 takes one thread, so no
    number of them is faster than the largest file."""
    with ThreadPoolExecutor(threads) as pool:
        wholes = [pool.submit(_hash_whole, path) for path in files.values()]
        sizes = [path.stat().st_size for path in files.values()]
        blocks = [
            [pool.submit(hash_block, path, index) for index in range(-(-size // BLOCK))]
            for path, size in zip(files.values(), sizes, strict=True)
        ]
        return [
            Stored(key, size, whole.result(), tuple(block.result() for block in of_file))
            for key, size, whole, of_file in zip(files, sizes, wholes, blocks, strict=True)
        ]


def _hash_whole(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_block(path: Path, index: int) -> str:
    """sha256, in hex, of a file's block `index`."""
    with path.open("rb", buffering=0) as file:
        return hashlib.sha256(os.pread(file.fileno(), BLOCK, index * BLOCK)).hexdigest()


def file_fault(
    path: Path, stored: Stored, threads: int, check_stop: Callable[[], None] = lambda: None
) -> str:
    """What is wrong with a file that is to hold the content of an object; empty if nothing is.

    All blocks are read, in `threads` threads. `check_stop` is called for each and may raise.
    """
    if (size := path.stat().st_size) != stored.size:
        return f"has {size} bytes, and its manifest says {stored.size}"

    def is_whole(index: int) -> bool:
        check_stop()
        return hash_block(path, index) == stored.blocks[index]

    for index, whole in enumerate(in_order(is_whole, range(len(stored.blocks)), threads)):
        if not whole:
            start, stop = block_range(size, index)
            return f"was altered: the sha256 of bytes {start} to {stop} is not that of its manifest"
    return ""


def read_blocks(file: BinaryIO) -> Iterator[bytes]:
    """Consecutive blocks of an open file. The last is shorter; an empty file has none."""
    while block := file.read(BLOCK):
        yield block


def join_blocks(parts: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    """The bytes of all parts together in blocks. The last is shorter; without a byte there is none."""
    pieces: list[memoryview] = []
    room = BLOCK
    for part in parts:
        rest = memoryview(part)
        while rest:
            pieces.append(rest[:room])
            rest, room = rest[room:], room - len(pieces[-1])
            if not room:
                yield b"".join(pieces)
                pieces, room = [], BLOCK
    if pieces:
        yield b"".join(pieces)


def block_range(size: int, index: int) -> tuple[int, int]:
    """Start and stop of block `index` in an object of `size` bytes."""
    return index * BLOCK, min((index + 1) * BLOCK, size)


def read_range(block: Callable[[int], bytes], start: int, stop: int, threads: int) -> bytearray:
    """Bytes [start, stop) of an object, start < stop. `block` returns a block by its index, and is called in
    `threads` threads."""
    data = bytearray(stop - start)
    indices = range(start // BLOCK, -(-stop // BLOCK))
    for index, found in zip(indices, in_order(block, indices, threads), strict=True):
        begin = max(start, index * BLOCK)
        part = memoryview(found)[begin - index * BLOCK : stop - index * BLOCK]
        data[begin - start : begin - start + len(part)] = part
    return data


def in_order[A, B](function: Callable[[A], B], items: Iterable[A], threads: int) -> Iterator[B]:
    """Results of `function` in the order of `items`, computed in `threads` threads. Holds at most that many
    results."""
    with ThreadPoolExecutor(threads) as pool:
        running: deque[Future[B]] = deque()
        for item in items:
            if len(running) == threads:
                yield running.popleft().result()
            running.append(pool.submit(function, item))
        while running:
            yield running.popleft().result()
