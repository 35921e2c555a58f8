"""DatasetReader and BlockCache: documents are verified when they are read, and the cache stays within its
limit."""

from pathlib import Path

import numpy as np
import pytest

from tests.fakes import datasets
from tests.fakes.store import S3
from vpmoe.data.packing import PackedDocument
from vpmoe.data.reader import BlockCache, DatasetReader
from vpmoe.storage import BLOCK, Bucket, StorageError


def test_every_document_is_read_as_it_was_written(bucket: Bucket, tmp_path: Path) -> None:
    random = np.random.default_rng(7)
    written = [datasets.random_documents(random, count) for count in (7, 0, 40)]
    reader = DatasetReader(
        datasets.write_dataset(bucket, written, [[]]), "train", BlockCache(bucket, tmp_path)
    )
    assert [len(part) for part in reader.lengths] == [7, 0, 40]
    for part, documents in enumerate(written):
        for number, (tokens, spans) in enumerate(documents):
            found_tokens, found_spans = reader.read_document(PackedDocument(part, number, len(tokens)))
            assert np.array_equal(found_tokens, tokens) and np.array_equal(found_spans, spans)
    reader.close()


def test_exercise_shares_count_tokens_and_include_unknown(bucket: Bucket, tmp_path: Path) -> None:
    document = np.zeros(30, np.int32), np.ones(30, np.uint8)
    reader = DatasetReader(
        datasets.write_dataset(bucket, [[document] * 4], [[]]), "train", BlockCache(bucket, tmp_path)
    )
    assert reader.exercise_shares(
        [PackedDocument(0, 0, 30), PackedDocument(0, 2, 30), PackedDocument(0, 1, 20)]
    ) == {
        "even": 0.75,
        "unknown": 0.25,
    }
    reader.close()


def test_the_cache_stays_within_its_limit_and_fetches_dropped_blocks_again(
    bucket: Bucket, tmp_path: Path
) -> None:
    data = np.random.default_rng(0).bytes(4 * BLOCK + 1000)
    (tmp_path / "file").write_bytes(data)
    stored = bucket.put_file("some/object", tmp_path / "file", {})
    cache = BlockCache(bucket, tmp_path / "blocks", limit=2 * BLOCK)
    for start, stop in ((0, 10), (BLOCK - 5, 3 * BLOCK + 5), (4 * BLOCK, 4 * BLOCK + 1000), (5, 20), (0, 0)):
        assert cache.read_range(stored, start, stop) == data[start:stop]
        kept = [path for path in (tmp_path / "blocks").iterdir() if not path.name.startswith(".")]
        assert sum(path.stat().st_size for path in kept) <= 2 * BLOCK


def test_a_cached_block_is_not_fetched_again(bucket: Bucket, s3: S3, tmp_path: Path) -> None:
    stored = bucket.put_bytes("some/object", b"content", {})
    cache = BlockCache(bucket, tmp_path)
    assert cache.read_range(stored, 0, 7) == b"content"
    bucket.delete("some/object")
    assert (
        BlockCache(bucket, tmp_path).read_range(stored, 1, 3) == b"on"
    )  # as another process of the same pod


def test_an_altered_part_is_rejected(bucket: Bucket, s3: S3, tmp_path: Path) -> None:
    written = [datasets.random_documents(np.random.default_rng(1), 5)]
    dataset = datasets.write_dataset(bucket, written, [[]])
    path = s3.folder / bucket.name / dataset.subjects["train/part-00000.tokens.bin"].key
    content = bytearray(path.read_bytes())
    content[9] ^= 1
    path.write_bytes(content)
    reader = DatasetReader(dataset, "train", BlockCache(bucket, tmp_path))
    with pytest.raises(StorageError, match=r"part-00000\.tokens\.bin: sha256 of block 0 is"):
        reader.read_document(PackedDocument(0, 0, len(written[0][0][0])))
    reader.close()
