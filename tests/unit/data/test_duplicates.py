"""Documents with the id or the user message of another are counted exactly, over all parts."""

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from vpmoe.data.preprocess import duplicates
from vpmoe.data.preprocess.duplicates import count_duplicates, count_repeated, fingerprint, hashes_bytes
from vpmoe.storage import Bucket, StorageError, paths


@pytest.mark.parametrize(
    "numbers, repeated",
    [
        ([], 0),
        ([7], 0),
        ([7, 7], 1),
        ([7, 8, 7, 7], 2),
        ([0, 2**64 - 1, 0, 2**64 - 1, 2**63], 2),
        (list(range(100)), 0),
        ([5] * 100, 99),
    ],
)
@pytest.mark.parametrize("compared", [1, 3, 1 << 20])
def test_repeated_numbers_are_counted_across_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numbers: list[int], repeated: int, compared: int
) -> None:
    monkeypatch.setattr(duplicates, "COMPARED", compared)
    path = tmp_path / "numbers"
    path.write_bytes(np.array(numbers, "<u8").tobytes())
    assert count_repeated(path) == repeated


def test_random_documents_of_several_parts(bucket: Bucket) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    generator = random.Random(seed)
    ids: list[str] = []
    queries: list[str] = []
    for part in range(4):
        count = generator.choice([0, 1, 50, 300])
        of_part = [f"id {generator.randrange(400)}" for _ in range(count)]
        asked = [f"query {generator.randrange(90)}" for _ in range(count)]
        hashes = [[fingerprint(text) for text in texts] for texts in (of_part, asked)]
        data = hashes_bytes(np.array(hashes, np.uint64).reshape(2, count))
        bucket.put_bytes(paths.document_hashes("d", part), data, {})
        ids, queries = ids + of_part, queries + asked
    expected = {
        name: sum(count - 1 for count in Counter(texts).values())
        for name, texts in (("ids", ids), ("queries", queries))
    }
    assert count_duplicates("d", 4, bucket, lambda: None) == expected


def test_missing_or_altered_hashes_are_named(bucket: Bucket) -> None:
    with pytest.raises(StorageError, match=r"datasets/d/hashes/part-00000\.bin"):
        count_duplicates("d", 1, bucket, lambda: None)
    bucket.put_bytes(paths.document_hashes("d", 0), bytes(16), {})
    bucket.put_bytes(paths.document_hashes("d", 1), b"three", {})
    with pytest.raises(StorageError, match=r"hashes/part-00001\.bin: 5 bytes are not two hashes a document"):
        count_duplicates("d", 2, bucket, lambda: None)
