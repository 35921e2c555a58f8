"""Indexes written without megatron-core are read by megatron-core, and the other way round."""

from pathlib import Path

import numpy as np
import pytest

from vpmoe.data.index import index_bytes, read_index


def write(folder: Path, name: str, documents: list[np.ndarray], dtype: type) -> Path:
    (folder / f"{name}.bin").write_bytes(b"".join(document.astype(dtype).tobytes() for document in documents))
    (folder / f"{name}.idx").write_bytes(index_bytes(np.array([len(d) for d in documents], np.int64), dtype))
    return folder / name


@pytest.mark.parametrize("dtype", [np.int32, np.uint8])
@pytest.mark.parametrize(
    "lengths", [[5, 1, 300, 7], [1], [0, 3, 0], []], ids=["some", "one", "with-empty", "none"]
)
def test_megatron_reads_our_index(tmp_path: Path, dtype: type, lengths: list[int]) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    random = np.random.default_rng(7)
    documents = [random.integers(0, 255, length) for length in lengths]
    prefix = write(tmp_path, "part", documents, dtype)
    for mmap in (True, False) if sum(lengths) else (False,):  # an empty file cannot be mapped
        dataset = IndexedDataset(str(prefix), mmap=mmap)
        assert len(dataset) == len(documents)
        assert dataset.document_indices.tolist() == list(range(len(documents) + 1))
        assert dataset.sequence_lengths.tolist() == lengths
        for number, document in enumerate(documents):
            assert dataset[number].dtype == dtype
            assert dataset[number].tolist() == document.tolist()


def test_megatron_reads_float16_as_the_uint16_of_its_bits(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

    assert not hasattr(DType, "float16"), "megatron-core now has a code for float16: write that code"
    documents = [
        np.array([-0.5, np.nan, -100, -0.0, 6e-8], np.float16),
        np.array([], np.float16),
        np.full(300, np.nan, np.float16),
    ]
    dataset = IndexedDataset(str(write(tmp_path, "logp", documents, np.float16)))
    assert dataset.sequence_lengths.tolist() == [5, 0, 300]
    for number, document in enumerate(documents):
        assert dataset[number].dtype == np.uint16
        assert dataset[number].view(np.float16).tobytes() == document.tobytes()
    assert read_index(tmp_path / "logp.idx").dtype == np.float16


def test_we_read_megatrons_index(tmp_path: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.int32)
    for length in (4, 2, 9):
        builder.add_document(torch.arange(length), [length])
    builder.finalize(str(tmp_path / "m.idx"))
    index = read_index(tmp_path / "m.idx")
    assert (index.lengths.tolist(), index.offsets.tolist(), index.dtype) == (
        [4, 2, 9],
        [0, 16, 24],
        np.dtype(np.int32),
    )
    assert (tmp_path / "m.idx").read_bytes() == index_bytes(np.array([4, 2, 9]), np.int32)


def test_an_index_has_lengths_and_byte_offsets(tmp_path: Path) -> None:
    (tmp_path / "a.idx").write_bytes(index_bytes(np.array([3, 0, 2]), np.int32))
    index = read_index(tmp_path / "a.idx")
    assert (index.lengths.dtype, index.offsets.dtype) == (np.int32, np.int64)
    assert (index.lengths.tolist(), index.offsets.tolist()) == ([3, 0, 2], [0, 12, 12])


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda data: b"", "does not begin"),
        (lambda data: b"PAR1" + data[4:], "does not begin"),
        (lambda data: data[:-1], "expected version 1"),
        (lambda data: data + b"\0", "expected version 1"),
        (lambda data: data[:9] + b"\2" + data[10:], "version 2"),
        (lambda data: data[:17] + b"\7" + data[18:], "type code 7"),
    ],
    ids=["empty", "other", "short", "long", "version", "type"],
)
def test_a_file_that_is_not_an_index_is_rejected_by_name(tmp_path: Path, damage, message: str) -> None:
    path = tmp_path / "bad.idx"
    path.write_bytes(damage(index_bytes(np.array([3, 2]), np.int32)))
    with pytest.raises(ValueError, match=f"bad.idx.*{message}"):
        read_index(path)


@pytest.mark.parametrize(
    "lengths, dtype, message",
    [
        ([1], np.float64, "float64: an IndexedDataset"),
        ([2**31], np.int32, "do not fit into int32"),
        ([-1], np.int32, "do not fit"),
    ],
)
def test_values_that_the_format_cannot_hold_are_rejected(
    lengths: list[int], dtype: type, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        index_bytes(np.array(lengths), dtype)
