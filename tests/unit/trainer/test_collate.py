"""Rows and microbatches: documents whole and side by side, every position accounted for; held-out documents
that stay the same."""

import numpy as np
import pytest
import torch

from tests.fakes import datasets
from vpmoe.data.packing import PackedDocument
from vpmoe.data.vocabulary import PADDING
from vpmoe.trainer.data import collate, held_out
from vpmoe.trainer.data.collate import assemble, microbatches

RANDOM = np.random.default_rng(5)
WRITTEN = [datasets.random_documents(RANDOM, 30), datasets.random_documents(RANDOM, 11)]
LENGTHS = [np.asarray([len(tokens) for tokens, _ in part], np.int32) for part in WRITTEN]


def read(document: PackedDocument) -> tuple[np.ndarray, np.ndarray]:
    return WRITTEN[document.part][document.number]


def document(part: int, number: int) -> PackedDocument:
    return PackedDocument(part, number, len(WRITTEN[part][number][0]))


def test_a_row_holds_its_documents_in_order_and_then_padding() -> None:
    rows = [[document(0, 3), document(1, 2)], []]
    made = assemble(rows, read, 96)
    first, second = WRITTEN[0][3][0], WRITTEN[1][2][0]
    filled = len(first) + len(second)
    assert made.tokens[0].tolist() == [*first.tolist(), *second.tolist(), *[PADDING] * (96 - filled)]
    assert made.position[0, : len(first) + 1].tolist() == [*range(len(first)), 0]
    assert made.padding.sum().item() == 2 * 96 - filled and bool(made.padding[1].all())
    assert made.counts[0].item() == filled


def test_a_row_that_overflows_is_an_error_and_not_a_cut() -> None:
    with pytest.raises(ValueError, match="row 0 overflows 20 positions"):
        assemble([[document(0, 0), document(0, 1), document(0, 2), document(0, 3)]], read, 20)


def test_microbatches_hold_all_rows_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collate, "MICROBATCH", 200)
    rows = [[document(0, number)] for number in range(7)]
    made = microbatches(rows, read, 64)
    assert [len(one.tokens) for one in made] == [3, 3, 1]
    assert torch.equal(torch.cat([one.tokens for one in made]), assemble(rows, read, 64).tokens)


@pytest.mark.parametrize(
    "wanted, found", [pytest.param(17, 17, id="some"), pytest.param(1000, 41, id="more-than-there-are")]
)
def test_held_out_documents_are_chosen_once_for_all(wanted: int, found: int) -> None:
    rows = held_out.held_out_rows(LENGTHS, wanted, seed=1, sequence_length=64)
    chosen = [(one.part, one.number) for row in rows for one in row]
    assert len(chosen) == len(set(chosen)) == found
    assert all(sum(one.length for one in row) <= 64 for row in rows)
    assert rows == held_out.held_out_rows(LENGTHS, wanted, seed=1, sequence_length=64)
    if found == 17:
        assert rows != held_out.held_out_rows(LENGTHS, wanted, seed=2, sequence_length=64)
        assert {part for part, _ in chosen} == {0, 1}
