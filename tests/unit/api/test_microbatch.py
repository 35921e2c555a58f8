"""The choice of the microbatch: it never exceeds the card, gets no worse with more memory or ranks, and few
shapes hold all rows."""

import random
from dataclasses import replace

import pytest

from tests.fakes.students import new_seed
from vpmoe.api.card import GIB
from vpmoe.api.memory import LEAST, STUDENTS, StudentSize, least_memory, least_rows, training_memory
from vpmoe.api.microbatch import FIXED, MOST, Microbatch, _time, choose, memory_of, on_cpu

LARGE = STUDENTS["vpmoe-6b"]


def random_size(draw: random.Random) -> StudentSize:
    """A student of some billion parameters whose layers keep 5 to 100 kB a position."""
    parameters = draw.randrange(10**8, 2 * 10**10)
    return replace(
        LARGE,
        parameters=parameters,
        expert_parameters=draw.randrange(parameters),
        layers=draw.randrange(1, 120),
        hidden=64 * draw.randrange(1, 64),
        kept=draw.randrange(5_000, 100_000),
        shared=draw.randrange(10_000),
        shared_backward=draw.randrange(50_000),
        stem=draw.randrange(50_000),
        backward=draw.randrange(100_000),
        backward_weights=draw.randrange(10**9),
    )


def test_the_card_holds_what_is_chosen_and_more_memory_or_ranks_make_it_no_slower() -> None:
    draw = random.Random(new_seed())
    fitted = 0
    for _ in range(150):
        size, parallel = draw.choice([LARGE, random_size(draw)]), draw.choice([1, 1, 2, 4])
        ranks, length = parallel * draw.randrange(1, 12), draw.choice([64, 1000, 4096, 8192, 20_000, 131_072])
        card, sequences = draw.randrange(16, 200) * GIB, draw.randrange(1, 300)
        width = draw.choice([None, None, 2880])

        def chosen(ranks: int, card: int, s: StudentSize = size, k: int = parallel) -> Microbatch | None:
            return choose(
                s,
                card,
                ranks=ranks,
                expert_parallel=k,
                sequence_length=length,  # noqa: B023 (called here alone)
                sequences=sequences,  # noqa: B023
                teacher_width=width,  # noqa: B023
            )

        one = chosen(ranks, card)
        fits = least_memory(size, ranks, parallel, length, width).total <= card
        assert (one is not None) == fits
        if one is None:
            continue
        fitted += 1
        assert memory_of(one, size, ranks, parallel, length, width).total <= card
        assert one.rows == least_rows(length) or (one.rows * length <= MOST and one.rows <= sequences)
        assert 0 <= one.recomputed_layers <= size.layers and (not one.sharded_gradients or ranks > 1)
        fewer = one.recomputed_layers - 1
        if fewer >= 0:  # no layer is recomputed that need not be
            less = one.model_copy(update={"recomputed_layers": fewer})
            assert memory_of(less, size, ranks, parallel, length, width).total > card
        time = _time(one, size, ranks, length, sequences)
        more, others = chosen(ranks, card + 8 * GIB), chosen(2 * ranks, card)
        assert more is not None and _time(more, size, ranks, length, sequences) <= time
        if not one.sharded_gradients:  # more ranks send more of sharded gradients
            assert others is not None and _time(others, size, 2 * ranks, length, sequences) <= time
    assert fitted > 30


@pytest.mark.parametrize("item", ["positions", "ranks", "recomputed_layers"])
def test_memory_grows_with_positions_and_falls_with_ranks_and_recomputed_layers(item: str) -> None:
    values = {"positions": range(8192, 65_537, 8192), "ranks": range(9, 1, -1)}.get(item, range(79, -1, -1))
    at = {"ranks": 4, "expert_parallel": 1, "positions": 16_384, "recomputed_layers": 40}
    for sharded in (False, True):
        totals = [
            training_memory(LARGE, **at | {item: value}, sharded_gradients=sharded).total for value in values
        ]
        assert totals == sorted(totals) and totals[0] < totals[-1]


def test_two_microbatches_without_recomputation_go_before_one_twice_as_long_with_it() -> None:
    """The rule's examples; a card that holds just as much."""
    for rows, wanted in ((2, 2), (1, 1)):
        whole = Microbatch(rows=rows, few_shapes=True)
        card = memory_of(whole, LARGE, 7, 1, 8192).total
        longer = Microbatch(rows=2 * rows, recomputed_layers=LARGE.layers, few_shapes=True)
        assert _time(whole, LARGE, 7, 8192, 16) < _time(longer, LARGE, 7, 8192, 16)
        found = choose(LARGE, card, ranks=7, expert_parallel=1, sequence_length=8192, sequences=wanted)
        assert found == whole


def test_gradients_are_sharded_where_nothing_else_fits_as_well() -> None:
    found = [
        choose(LARGE, 79 * GIB, ranks=n, expert_parallel=1, sequence_length=8192, sequences=15)
        for n in (1, 2, 3, 7)
    ]
    assert found[0] is None
    assert [one is not None and one.sharded_gradients for one in found[1:]] == [True, False, False]


@pytest.mark.parametrize("length", [16, 64, 3000, 8192, 65_536])
def test_few_shapes_hold_all_rows_and_pad_less_than_another_microbatch_costs(length: int) -> None:
    draw = random.Random(new_seed())
    for _ in range(200):
        one = Microbatch(rows=draw.randrange(1, 40), few_shapes=True)
        rows = draw.randrange(1, 200)
        sizes = one.sizes(rows, length)
        assert set(sizes) <= set(one.shapes) and len(one.shapes) <= one.rows.bit_length() + 1
        assert sorted(sizes, reverse=True) == sizes and sum(sizes[:-1]) < rows <= sum(sizes)
        assert (sum(sizes) - rows) * length <= FIXED * len(one.shapes)
        assert sizes[: rows // one.rows] == [one.rows] * (rows // one.rows)


def test_the_time_of_a_step_is_that_of_its_microbatches() -> None:
    """And takes no longer to compute of a step of so many that their sizes are no list any more."""
    draw = random.Random(new_seed())
    for _ in range(100):
        one = Microbatch(
            rows=draw.randrange(1, 40),
            recomputed_layers=draw.randrange(LARGE.layers + 1),
            few_shapes=draw.random() < 0.8,
        )
        rows, length = draw.randrange(1, 300), draw.choice([16, 3000, 8192])
        again = 3 * LARGE.layers + one.recomputed_layers
        each = [size * length * again + 3 * LARGE.layers * FIXED for size in one.sizes(rows, length)]
        assert _time(one, LARGE, 1, length, rows) == sum(each)
        many = rows + 10**12 * one.rows
        whole = one.rows * length * again + 3 * LARGE.layers * FIXED
        assert _time(one, LARGE, 1, length, many) == sum(each) + 10**12 * whole


@pytest.mark.parametrize("rows, sizes", [(0, []), (3, [3]), (8, [4, 4]), (11, [4, 4, 3])])
def test_without_few_shapes_the_last_microbatch_has_what_is_left(rows: int, sizes: list[int]) -> None:
    assert Microbatch(rows=4).sizes(rows, 8192) == sizes


def test_the_cpu_has_the_shortest_microbatch_and_no_padding() -> None:
    for length in (16, 5000, 8192, 8193):
        assert on_cpu(length) == Microbatch(rows=max(1, LEAST // length))
