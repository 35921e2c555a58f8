"""Blocks: order, number in memory, ranges and hashes."""

import hashlib
import io
import random
import threading
from collections.abc import Iterator

import pytest

from vpmoe.storage.blocks import BLOCK, block_range, hash_bytes, in_order, read_blocks


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
