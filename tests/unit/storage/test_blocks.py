"""Blocks: order, number in memory, ranges and hashes."""

import hashlib
import io
import os
import random
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from vpmoe.storage.blocks import (
    BLOCK,
    block_range,
    file_fault,
    hash_bytes,
    hash_files,
    in_order,
    join_blocks,
    read_blocks,
)


def test_results_are_in_order_and_few_items_are_in_memory() -> None:
    lock, held, most = threading.Lock(), 0, 0

    def items() -> Iterator[int]:
        nonlocal held, most
        for number in range(50):
            with lock:
                held += 1
                most = max(most, held)
            yield number

    results = []
    for result in in_order(lambda number: number * number, items(), threads=3):
        results.append(result)
        with lock:
            held -= 1
    assert results == [number * number for number in range(50)]
    assert most == 4, "three in progress or completed, and the one that was just read"


def test_the_first_error_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda number: 1 // number, [2, 1, 0, 5], threads=2))


def test_blocks_cover_every_byte_exactly_once() -> None:
    seed = random.randrange(2**32)
    for size in (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, random.Random(seed).randrange(3 * BLOCK)):
        data = bytes(size)
        stored = hash_bytes("k", data)
        ranges = [block_range(size, index) for index in range(len(stored.blocks))]
        assert [start for start, _ in ranges] + [size] == [0, *(stop for _, stop in ranges)], seed
        assert [len(block) for block in read_blocks(io.BytesIO(data))] == [
            stop - start for start, stop in ranges
        ], seed
        assert (stored.size, stored.sha256) == (size, hashlib.sha256(data).hexdigest())


def test_parts_of_any_length_are_joined_into_blocks() -> None:
    generator = random.Random(seed := random.randrange(1 << 32))
    print(f"seed {seed}")
    data = generator.randbytes(2 * BLOCK + 12_345)
    for ends in (
        [],
        [0, 0, 1],
        [BLOCK],
        [BLOCK - 1, BLOCK + 1, 2 * BLOCK],
        sorted(generator.choices(range(len(data)), k=50)),
    ):
        parts = [memoryview(data)[start:stop] for start, stop in pairwise([0, *ends, len(data)])]
        blocks = list(join_blocks(parts))
        assert [len(block) for block in blocks] == [BLOCK, BLOCK, 12_345] and b"".join(blocks) == data
    assert not list(join_blocks([])) and not list(join_blocks([b""]))


def test_files_that_are_hashed_in_threads_have_the_hashes_of_their_content(tmp_path: Path) -> None:
    contents = {f"folder/{size}": os.urandom(size) for size in (0, 1, BLOCK, 2 * BLOCK + 3)}
    for key, content in contents.items():
        (tmp_path / key.rpartition("/")[2]).write_bytes(content)
    files = {key: tmp_path / key.rpartition("/")[2] for key in contents}
    stored = hash_files(files, 3)
    assert stored == [hash_bytes(key, content) for key, content in contents.items()]
    assert [file_fault(files[one.key], one, 3) for one in stored] == [""] * 4


def test_the_first_block_that_differs_is_named(tmp_path: Path) -> None:
    content = bytearray(os.urandom(3 * BLOCK))
    stored = hash_bytes("x", bytes(content))
    content[2 * BLOCK - 1] ^= 1
    content[-1] ^= 1
    (tmp_path / "x").write_bytes(content)
    assert file_fault(tmp_path / "x", stored, 2) == (
        f"was altered: the sha256 of bytes {BLOCK} to {2 * BLOCK} is not that of its manifest"
    )
    os.truncate(tmp_path / "x", 5)
    assert file_fault(tmp_path / "x", stored, 2) == f"has 5 bytes, and its manifest says {3 * BLOCK}"
