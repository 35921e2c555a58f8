"""Rows and microbatches of whole documents and padding; held-out documents are a function of the seed."""

import numpy as np
import pytest
import torch

from tests.fakes import datasets
from vpmoe.api.microbatch import Microbatch
from vpmoe.data.packing import PackedDocument
from vpmoe.data.vocabulary import PADDING
from vpmoe.trainer.data import held_out
from vpmoe.trainer.data.collate import assemble, microbatches

RANDOM = np.random.default_rng(5)
PARTS = [datasets.random_documents(RANDOM, 30), datasets.random_documents(RANDOM, 11)]
LENGTHS = [np.asarray([len(tokens) for tokens, _ in part], np.int32) for part in PARTS]


def read_document(document: PackedDocument) -> tuple[np.ndarray, np.ndarray]:
    return PARTS[document.part][document.number]


def packed_document(part: int, number: int) -> PackedDocument:
    return PackedDocument(part, number, len(PARTS[part][number][0]))


def test_a_row_has_its_documents_in_order_then_padding() -> None:
    rows = [[packed_document(0, 3), packed_document(1, 2)], []]
    batch = assemble(rows, read_document, 96)
    first, second = PARTS[0][3][0], PARTS[1][2][0]
    filled = len(first) + len(second)
    assert batch.tokens[0].tolist() == [*first.tolist(), *second.tolist(), *[PADDING] * (96 - filled)]
    assert batch.position[0, : len(first) + 1].tolist() == [*range(len(first)), 0]
    assert batch.padding.sum().item() == 2 * 96 - filled and bool(batch.padding[1].all())
    assert batch.counts[0].item() == filled


def test_a_row_that_overflows_is_an_error() -> None:
    with pytest.raises(ValueError, match="row 0 overflows 20 positions"):
        assemble(
            [[packed_document(0, 0), packed_document(0, 1), packed_document(0, 2), packed_document(0, 3)]],
            read_document,
            20,
        )


@pytest.mark.parametrize("few_shapes, last", [(False, 3), (True, 4)], ids=["as they are", "padded"])
def test_microbatches_have_all_rows_in_order(few_shapes: bool, last: int) -> None:
    rows = [[packed_document(0, number)] for number in range(11)]
    batches = microbatches(rows, read_document, 64, Microbatch(rows=4, few_shapes=few_shapes))
    assert [len(batch.tokens) for batch in batches] == [4, 4, last]
    padding = batches[2].padding[3:]
    assert padding.all() and len(padding) == last - 3
    assert torch.equal(
        torch.cat([batch.tokens for batch in batches])[:11], assemble(rows, read_document, 64).tokens
    )
    counts = torch.stack([batch.counts for batch in batches]).sum(0)
    assert torch.equal(counts, assemble(rows, read_document, 64).counts)


@pytest.mark.parametrize(
    "count, expected", [pytest.param(17, 17, id="some"), pytest.param(1000, 41, id="more-than-available")]
)
def test_held_out_documents_are_a_function_of_the_seed(count: int, expected: int) -> None:
    rows = held_out.held_out_rows(LENGTHS, count, seed=1, sequence_length=64)
    chosen = [(one.part, one.number) for row in rows for one in row]
    assert len(chosen) == len(set(chosen)) == expected
    assert all(sum(one.length for one in row) <= 64 for row in rows)
    assert rows == held_out.held_out_rows(LENGTHS, count, seed=1, sequence_length=64)
    if expected == 17:
        assert rows != held_out.held_out_rows(LENGTHS, count, seed=2, sequence_length=64)
        assert {part for part, _ in chosen} == {0, 1}
