"""Neighbouring ranges of an object are read as they were written; a block that they share is fetched once."""

import random
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from tests.fakes.store import S3
from vpmoe.storage import Bucket, StorageError
from vpmoe.storage.blocks import BLOCK, Stored
from vpmoe.storage.range_reader import KEPT, RangeReader


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Indices of the blocks that are fetched from a store, in order."""
    indices: list[int] = []
    block = Bucket.block

    def counted(bucket: Bucket, stored: Stored, index: int) -> bytes:
        indices.append(index)
        return block(bucket, stored, index)

    monkeypatch.setattr(Bucket, "block", counted)
    return indices


def put(bucket: Bucket, tmp_path: Path, key: str, size: int) -> tuple[Stored, bytes]:
    data = random.randbytes(size)
    path = tmp_path / "data"
    path.write_bytes(data)
    return bucket.put_file(key, path, {}), data


def test_a_block_that_ranges_share_is_fetched_once(
    bucket: Bucket, tmp_path: Path, fetched: list[int]
) -> None:
    stored, data = put(bucket, tmp_path, "x", 4 * BLOCK + 17)
    reader = RangeReader(bucket)
    cuts = [0, 5, 1000, BLOCK - 1, BLOCK + 1, 3 * BLOCK + 9, 4 * BLOCK, stored.size]
    for start, stop in pairwise(cuts):
        assert reader.read(stored, start, stop) == data[start:stop]
    assert sorted(fetched) == [0, 1, 2, 3, 4]
    assert reader.read(stored, 7, 7) == b""
    with pytest.raises(ValueError, match="is not a range of its"):
        reader.read(stored, 0, stored.size + 1)


def test_threads_read_any_ranges_of_several_objects(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vpmoe.storage.range_reader.KEPT", 2)
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    objects = [put(bucket, tmp_path, key, 2 * BLOCK + chance.randrange(BLOCK)) for key in ("x", "y")]
    reader = RangeReader(bucket)
    ranges = [(one, *sorted(chance.randrange(one[0].size) for _ in range(2))) for one in objects * 20]

    def is_right(wanted: tuple[tuple[Stored, bytes], int, int]) -> bool:
        (stored, data), start, stop = wanted
        return bytes(reader.read(stored, start, stop)) == data[start:stop]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(is_right, ranges)), seed


def test_no_more_blocks_are_kept_than_stated(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fetched: list[int]
) -> None:
    assert KEPT * BLOCK == 256 << 20
    monkeypatch.setattr("vpmoe.storage.range_reader.KEPT", 2)
    stored, _ = put(bucket, tmp_path, "x", 3 * BLOCK)
    reader = RangeReader(bucket)
    for index in (0, 1, 0, 2, 0, 1):  # 1 was used least when 2 came, and 2 when 1 came again
        reader.read(stored, index * BLOCK, index * BLOCK + 1)
    assert fetched == [0, 1, 2, 1]


def test_an_altered_block_is_rejected_each_time(s3: S3, bucket: Bucket, tmp_path: Path) -> None:
    stored, data = put(bucket, tmp_path, "x", BLOCK + 9)
    (s3.folder / bucket.name / (bucket.prefix + "x")).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    reader = RangeReader(bucket)
    assert reader.read(stored, 0, 5) == data[:5]
    for _ in range(2):
        with pytest.raises(StorageError, match="sha256 of block 1 is"):
            reader.read(stored, BLOCK, BLOCK + 9)
