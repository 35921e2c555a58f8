"""Batches: positions, boundaries, padding and counts are derived from the rows."""

import pytest
import torch

from vpmoe.model.batch import Batch


def batch_of(*documents: list[int]) -> Batch:
    numbers = torch.tensor(documents, dtype=torch.int32)
    return Batch.from_rows(
        torch.zeros_like(numbers, dtype=torch.int64), torch.ones_like(numbers, dtype=torch.uint8), numbers
    )


@pytest.mark.parametrize(
    "documents, position, boundaries, longest, counts",
    [
        pytest.param([[0, 0, 0, 0]], [[0, 1, 2, 3]], [0, 4], 4, [4, 3, 0], id="one-document"),
        pytest.param([[0, 0, 1, 1]], [[0, 1, 0, 1]], [0, 2, 4], 2, [4, 2, 0], id="positions-restart"),
        pytest.param(
            [[7, 3, 3, -1]], [[0, 0, 1, 0]], [0, 1, 3, 4], 2, [3, 1, 0], id="any-numbers-and-padding"
        ),
        pytest.param(
            [[0, 0], [0, 0]],
            [[0, 1], [0, 1]],
            [0, 2, 4],
            2,
            [4, 2, 0],
            id="equal-numbers-in-different-rows",
        ),
        pytest.param([[-1, -1], [-1, -1]], [[0, 1], [0, 1]], [0, 2, 4], 2, [0, 0, 0], id="all-padding"),
    ],
)
def test_positions_boundaries_padding_and_counts_are_derived_from_the_rows(
    documents: list[list[int]],
    position: list[list[int]],
    boundaries: list[int],
    longest: int,
    counts: list[int],
) -> None:
    batch = batch_of(*documents)
    assert (
        batch.position.tolist() == position
        and batch.boundaries.tolist() == boundaries
        and batch.longest == longest
    )
    assert batch.counts.tolist() == counts and batch.padding.tolist() == [
        [number < 0 for number in row] for row in documents
    ]
    assert batch.boundaries.dtype == torch.int32


def test_runs_are_where_those_of_each_position_begin_and_end() -> None:
    batch = batch_of([7, 3, 3, -1], [-1, -1, 5, 5])
    assert batch.runs.tolist() == [[0, 1, 1, 3, 4, 4, 6, 6], [1, 3, 3, 4, 6, 6, 8, 8]]
    assert batch.runs.dtype == torch.int32


def test_target_rows_are_the_positions_with_a_target() -> None:
    batch = batch_of([0, 0, 1, 1, 1, -1], [-1, -1, -1, -1, -1, -1], [4, 4, 4, 5, 6, 6])
    assert batch.target_rows.tolist() == [0, 2, 3, 12, 13, 16] and batch.target_rows.dtype == torch.int64
    assert batch.target_rows.equal((batch.target >= 0).nonzero().squeeze(1))


def test_counts_stay_on_the_cpu_when_a_batch_is_moved() -> None:
    moved = batch_of([0, 0, -1]).to(torch.device("meta"))
    assert moved.tokens.is_meta and moved.boundaries.is_meta and moved.counts.device.type == "cpu"


def test_rows_of_different_shapes_are_rejected() -> None:
    with pytest.raises(
        ValueError,
        match=r"tokens \[1, 3\], spans \[1, 2\] and documents \[1, 3\] must all be \[rows, positions\]",
    ):
        Batch.from_rows(
            torch.zeros(1, 3, dtype=torch.int64),
            torch.zeros(1, 2, dtype=torch.uint8),
            torch.zeros(1, 3, dtype=torch.int32),
        )
