"""Packing of random parts: every document is in one sequence per epoch, undivided, and a step does not depend
on the number of ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpmoe.data import packing
from vpmoe.data.packing import SequenceStream, rank_sequences

SEQUENCE = 64
parts = st.lists(st.lists(st.integers(1, SEQUENCE), max_size=60), min_size=1, max_size=70).filter(
    lambda parts: any(parts)
)
arrays = parts.map(lambda parts: [np.asarray(part, np.int32) for part in parts])


def documents_of_epoch(stream: SequenceStream, epoch: int) -> list[tuple[int, int]]:
    number, found = 0, []
    while stream.locate(number)[0] <= epoch:
        if stream.locate(number)[0] == epoch:
            found += [(document.part, document.number) for document in stream.sequence(number)]
        number += 1
    return found


@settings(max_examples=30, deadline=None, print_blob=True)
@given(arrays, st.integers(0, 2**31), st.integers(0, 2))
def test_every_document_is_undivided_in_exactly_one_sequence_of_an_epoch(lengths, seed, epoch):
    stream = SequenceStream(lengths, seed, SEQUENCE)
    all_documents = [(part, index) for part in range(len(lengths)) for index in range(len(lengths[part]))]
    assert sorted(documents_of_epoch(stream, epoch)) == all_documents
    number = 0
    while stream.locate(number)[0] <= epoch:
        contained = stream.sequence(number)
        assert 0 < sum(document.length for document in contained) <= SEQUENCE
        assert all(document.length == lengths[document.part][document.number] for document in contained)
        number += 1


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 6), st.integers(0, 50))
def test_ranks_partition_a_step_and_their_number_does_not_change_it(first, ranks, sequences_per_rank, step):
    all_ranks = list(rank_sequences(0, 1, first, ranks * sequences_per_rank, step))
    assert [
        number
        for rank in range(ranks)
        for number in rank_sequences(rank, ranks, first, ranks * sequences_per_rank, step)
    ] == all_ranks
    assert rank_sequences(0, 1, first, ranks * sequences_per_rank, step + 1).start == all_ranks[-1] + 1


@settings(max_examples=30, deadline=None, print_blob=True)
@given(arrays, st.integers(0, 2**31), st.integers(0, 40), st.integers(1, 9), st.integers(1, 20_000))
def test_a_stage_ends_with_the_first_step_that_reaches_its_tokens(
    lengths, seed, first, sequences_per_step, tokens
):
    stream = SequenceStream(lengths, seed, SEQUENCE)
    seen = stream.tokens_after_steps(first, sequences_per_step, tokens)
    assert seen[-1] >= tokens and (len(seen) == 1 or seen[-2] < tokens)
    count = 0
    for step in range(min(len(seen), 20)):
        count += sum(
            document.length
            for number in rank_sequences(0, 1, first, sequences_per_step, step)
            for document in stream.sequence(number)
        )
        assert seen[step] == count


@pytest.mark.parametrize(
    "documents",
    [
        pytest.param([3000] * 70, id="many-parts"),
        pytest.param([5000, 7], id="two-parts"),
        pytest.param([900], id="one-part"),
    ],
)
def test_the_order_depends_on_seed_and_epoch_only(documents):
    first = packing.epoch_order(documents, seed=7, epoch=0)
    assert np.array_equal(first, packing.epoch_order(documents, seed=7, epoch=0))
    assert np.array_equal(np.sort(first), np.arange(sum(documents)))
    assert not np.array_equal(first, packing.epoch_order(documents, seed=7, epoch=1))
    assert not np.array_equal(first, packing.epoch_order(documents, seed=8, epoch=0))


def test_at_least_32_parts_are_interleaved():
    visited = packing.epoch_order([2000] * 100, seed=3, epoch=0)
    for start in range(0, len(visited) - 4000, 4000):
        assert len(set(visited[start : start + 4000] // 2000)) >= 32


def test_a_part_is_read_almost_sequentially():
    """A part is read from a seeded start to its end and then from its beginning, and a document is at most
    2 · SHUFFLE_DISTANCE away from its place in this order."""
    visited = packing.epoch_order([50_000] * 40, seed=3, epoch=0)
    offsets = visited[visited // 50_000 == 17] % 50_000
    distance = (offsets - offsets[0]) % 50_000
    assert (
        np.abs((distance - np.arange(len(offsets)) + 25_000) % 50_000 - 25_000).max()
        <= 2 * packing.SHUFFLE_DISTANCE
    )


def test_padding_is_below_2_percent_for_lengths_like_those_of_synth():
    random = np.random.default_rng(0)
    lengths = np.clip(np.exp(random.normal(6.8, 0.7, 60_000)), 40, 8192).astype(np.int32)
    epoch = packing.build_epoch([lengths], 0, 0, 8192)
    assert epoch.tokens_N.sum() == lengths.sum()
    assert lengths.sum() / (len(epoch.tokens_N) * 8192) > 0.98


def test_the_order_has_not_changed_since_it_was_recorded():
    """A resumed run must continue in the same order after an update. Another order needs a new version of the
    data order."""
    stream = SequenceStream(
        [np.arange(1, 40, dtype=np.int32), np.arange(5, 30, dtype=np.int32)],
        seed=1234,
        sequence_length=SEQUENCE,
    )
    assert [(document.part, document.number) for document in stream.sequence(3)] == [
        (0, 19),
        (0, 15),
        (1, 7),
        (1, 8),
    ]


@pytest.mark.parametrize(
    "lengths, message",
    [
        pytest.param([[], []], "no part has any document", id="empty-split"),
        pytest.param([[5], [SEQUENCE + 1]], "65 tokens does not fit into a sequence of 64", id="too-long"),
    ],
)
def test_parts_that_cannot_be_packed_are_rejected(lengths, message):
    with pytest.raises(ValueError, match=message):
        SequenceStream([np.asarray(part, np.int32) for part in lengths], 0, SEQUENCE)
