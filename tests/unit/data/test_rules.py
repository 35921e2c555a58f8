"""The rules of preprocessing: which rows are dropped, sampled and held out, which objects a source matches,
and what decides a dataset's id."""

from hashlib import blake2b

import numpy as np
import pytest

from vpmoe.data.dataset import dataset_id
from vpmoe.data.inputs import Inputs, InputShard, glob_pattern
from vpmoe.data.preprocess import sampling
from vpmoe.data.preprocess.encode import row_identity
from vpmoe.data.preprocess.filters import contradicted, quality
from vpmoe.data.preprocess.sampling import (
    BINS,
    FOREIGN,
    MEMORIZATION,
    Thresholds,
    choose_thresholds,
    row_class,
)
from vpmoe.failure import Permanent


@pytest.mark.parametrize(
    "answer, constraints, reason",
    [
        ("Paris.", None, None),
        ("Paris.", "", None),
        (None, None, "blankAnswer"),
        ("", None, "blankAnswer"),
        (" \n\t", "result: 4", "blankAnswer"),
        ("42", "result:Failed after maximum attempts", "failedGeneration"),
        ("42", "attempts: 5\nRESULT:  failed AFTER maximum Attempts", "failedGeneration"),
        ("41", "result: 42", "contradictedResult"),
        ("B) Paris", "result: C", "contradictedResult"),
        (
            "A guide said that the mission failed after maximum attempts",
            "<source_1>failed after maximum attempts</source_1>",
            None,
        ),
    ],
)
def test_a_dropped_row_has_one_reason(
    answer: str | None, constraints: str | None, reason: str | None
) -> None:
    assert quality(answer, constraints) == reason


@pytest.mark.parametrize(
    "result, line, contradicts",
    [
        ("B", "B", False),
        ("B", "b", False),
        ("B", "**B**", False),
        ("B", "(B)", False),
        ("B", "B) Paris", False),
        ("B", "B. Paris", False),
        ("B", "Answer: B", False),
        ("B", "The correct answer is B.", False),
        ("(b)", "The answer is **(B)** Paris", False),
        ("B", "C", True),
        ("B", "c)", False),
        ("B", "C) Rome", True),
        ("B", "Answer: C", True),
        ("B", "The correct option is (C)", True),
        ("B", "\\boxed{C}", True),
        ("B", "Paris", False),
        ("B", "A good start is to compare both.", False),
        ("A", "I think so", False),
        ("42", "42", False),
        ("42", "**42**", False),
        ("42", "The answer is 42.", False),
        ("42", "x = 42 apples", False),
        ("42.0", "42", False),
        ("42", "41", True),
        ("42", "The answer is 41.", True),
        ("42", "420", True),
        ("-3", "3", True),
        ("-3", "−3", False),
        ("42", "First, 6 boxes of 7: 42", False),
        ("42", "It cannot be said.", False),
        ("1,234", "1234", False),
        ("1234.5", "1.234,5", False),
        ("3,5", "3.5", False),
        ("25 %", "25 percent", False),
        ("$20", "20 dollars", False),
        ("1/2", "0.7", False),
        ("a long explanation with 7", "8", False),
        ("yes", "no", False),
    ],
)
def test_only_a_clear_choice_or_number_in_the_first_line_contradicts_the_result(
    result: str, line: str, contradicts: bool
) -> None:
    assert (
        contradicted(f"steps: 3\nresult: {result}", f"{line}\n\nLater lines may say C or 17.") is contradicts
    )


@pytest.mark.parametrize(
    "language, exercise, expected",
    [
        (None, None, 0),
        ("", " ", 0),
        ("en", "mcq", 0),
        ("EN", None, 0),
        ("English", None, 0),
        ("en-GB", None, 0),
        ("de", None, FOREIGN),
        ("German", "rag", FOREIGN),
        ("la", "", FOREIGN),
        ("en", "memorization", MEMORIZATION),
        (None, " Memorization ", MEMORIZATION),
        ("fr", "memorization", FOREIGN | MEMORIZATION),
    ],
)
def test_a_row_without_language_or_exercise_is_neither_foreign_nor_memorization(
    language: str | None, exercise: str | None, expected: int
) -> None:
    assert row_class(language, exercise) == expected


def census(seed: int, other: int, memorization: int, foreign: int, both: int) -> sampling.Histogram:
    random = np.random.default_rng(seed)
    return np.stack(
        [
            np.bincount(random.integers(BINS, size=rows), minlength=BINS)
            for rows in (other, memorization, foreign, both)
        ]
    )


def rows_kept(rows_4B: sampling.Histogram, chosen: Thresholds) -> list[int]:
    return [int(rows_4B[number, :bins].sum()) for number, bins in enumerate(chosen.bins)]


@pytest.mark.parametrize(
    "rows",
    [
        (1000, 0, 0, 0),
        (1000, 1000, 1000, 1000),
        (100, 900, 0, 0),
        (100, 0, 900, 0),
        (10, 10, 10, 970),
        (300_000, 900_000, 300_000, 900_000),
        (200_000, 700_000, 60_000, 240_000),
        (3, 7, 1, 1),
        (500, 300, 0, 200),
    ],
    ids=str,
)
@pytest.mark.parametrize("keep", [1.0, 0.3])
def test_shares_are_at_most_their_bounds_and_close_to_those_that_apply(
    rows: tuple[int, int, int, int], keep: float
) -> None:
    rows_4B = census(sum(rows), *rows)
    chosen = choose_thresholds(rows_4B, keep, 0.70, 0.30)
    kept_rows = rows_kept(rows_4B, chosen)
    total = sum(kept_rows)
    memorization, foreign = kept_rows[1] + kept_rows[3], kept_rows[2] + kept_rows[3]
    assert memorization <= 0.70 * total
    assert foreign <= 0.30 * total
    if sum(rows) > 100_000:  # both bounds apply to the first of these, only memorizationMax to the second
        assert memorization == pytest.approx(0.70 * total, rel=0.01)
        assert foreign == pytest.approx((0.30 if rows[2] > 100_000 else 0.248) * total, rel=0.01)
        assert kept_rows[0] == pytest.approx(keep * rows[0], rel=0.01)


def test_all_rows_are_kept_if_no_bound_applies() -> None:
    assert choose_thresholds(census(1, 70, 20, 10, 0), 1.0, 0.7, 0.3).bins == (BINS,) * 4
    assert choose_thresholds(census(2, 0, 50, 0, 50), 1.0, 1.0, 1.0).bins == (BINS,) * 4
    assert choose_thresholds(census(3, 0, 0, 0, 0), 1.0, 0.7, 0.3).bins == (BINS,) * 4


@pytest.mark.parametrize(
    "rows, message",
    [
        ((0, 9, 0, 0), "9 are memorization .memorizationMax 0.7."),
        ((0, 0, 9, 0), "9 are not English .nonEnglishMax 0.3."),
    ],
    ids=["all-memorization", "all-foreign"],
)
def test_a_bound_that_would_drop_everything_is_an_error(
    rows: tuple[int, int, int, int], message: str
) -> None:
    with pytest.raises(Permanent, match=message):
        choose_thresholds(census(1, *rows), 1.0, 0.7, 0.3)


def test_hashes_have_not_changed() -> None:
    """Other values would change the split and the sample of every dataset."""
    ids = ["memorization_94_6343", "memorization_german_10_150696", "mcq_201_33", "ü\0"]
    assert [sampling.hash_bin(one) for one in ids] == [418, 318, 572, 652]
    fractions = {
        one: int.from_bytes(blake2b(one.encode(), digest_size=8).digest(), "big") / 2**64 for one in ids
    }
    for one, fraction in fractions.items():
        assert sampling.is_valid(one, fraction + 1e-9)
        assert not sampling.is_valid(one, fraction - 1e-9)
    assert not any(sampling.is_valid(one, 0.0) for one in ids)


def test_the_held_out_fraction_is_right_and_independent_of_sampling() -> None:
    ids = [f"memorization_{number}_{number * 7}" for number in range(100_000)]
    held_out = [one for one in ids if sampling.is_valid(one, 0.01)]
    assert 900 < len(held_out) < 1100
    lower_half = sum(sampling.hash_bin(one) < BINS // 2 for one in held_out)
    assert 400 < lower_half < 600


def test_a_row_without_id_is_identified_by_file_and_number() -> None:
    assert row_identity("mcq_1", "a.parquet", 3) == "mcq_1"
    assert row_identity(None, "a.parquet", 3) == row_identity(" ", "a.parquet", 3) == "a.parquet#3"


@pytest.mark.parametrize(
    "glob, matching, others",
    [
        (
            "synth/*.parquet",
            ["synth/a.parquet", "synth/.parquet"],
            ["synth/x/a.parquet", "synth/a.parquet.tmp", "other/a.parquet"],
        ),
        ("synth/**/*.parquet", ["synth/a.parquet", "synth/x/y/a.parquet"], ["a.parquet"]),
        (
            "synth/synth_00?.parquet",
            ["synth/synth_001.parquet"],
            ["synth/synth_010.parquet", "synth/synth_00/.parquet"],
        ),
        ("synth/synth_[12]*.parquet", ["synth/synth_100.parquet"], ["synth/synth_300.parquet"]),
        ("a+b/(x).parquet", ["a+b/(x).parquet"], ["aab/(x).parquet"]),
    ],
)
def test_only_a_double_star_matches_across_folders(glob: str, matching: list[str], others: list[str]) -> None:
    pattern = glob_pattern(glob)
    assert all(pattern.fullmatch(key) for key in matching)
    assert not any(pattern.fullmatch(key) for key in others)


def test_everything_that_changes_a_datasets_bytes_changes_its_id() -> None:
    shard = InputShard("s3://corpora/a.parquet", 10, "etag")
    base = Inputs("s3://corpora/*.parquet", None, (shard,))
    settings = {"maxLength": 512}
    ids = {
        dataset_id(settings, base),
        dataset_id({"maxLength": 513}, base),
        dataset_id(settings, Inputs(base.source, None, (InputShard(shard.url, 11, "etag"),))),
        dataset_id(settings, Inputs(base.source, None, (InputShard(shard.url, 10, "other"),))),
        dataset_id(settings, Inputs(base.source, None, (InputShard("s3://corpora/b.parquet", 10, "etag"),))),
        dataset_id(settings, Inputs(base.source, None, (shard, shard))),
        dataset_id(settings, Inputs(base.source, "0" * 40, (shard,))),
    }
    assert len(ids) == 7
    assert dataset_id(settings, base) == dataset_id(dict(settings), Inputs(base.source, None, (shard,)))
