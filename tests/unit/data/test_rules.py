"""The rules of preprocessing: which rows are sampled and held out, which objects a source matches, and what
decides a dataset's id. Which rows are dropped is in test_filters.py."""

from hashlib import blake2b

import numpy as np
import pytest

from vpmoe.api.effort import effort_shares
from vpmoe.data.dataset import clean_label, dataset_id
from vpmoe.data.glob import glob_pattern
from vpmoe.data.inputs import Inputs, InputShard
from vpmoe.data.preprocess import sampling
from vpmoe.data.preprocess.encode import row_identity
from vpmoe.data.preprocess.sampling import (
    BINS,
    FOREIGN,
    MEMORIZATION,
    Thresholds,
    choose_thresholds,
    draw_effort,
    hash_bin,
    is_valid,
    row_class,
)
from vpmoe.failure import Permanent


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


def test_a_row_without_id_is_identified_by_the_key_of_its_file_and_its_number() -> None:
    assert row_identity("mcq_1", "x/a.parquet", 3) == "mcq_1"
    for missing in (None, "", " ", "\t\n", "\u3000"):
        assert row_identity(missing, "x/a.parquet", 3) == "x/a.parquet#3"
    assert row_identity(None, "y/a.parquet", 3) != row_identity(None, "x/a.parquet", 3)


@pytest.mark.parametrize(
    "url, key",
    [
        ("s3://corpora/a.parquet", "a.parquet"),
        ("s3://corpora/en/part-0.parquet", "en/part-0.parquet"),
        ("s3://corpora/de/part-0.parquet", "de/part-0.parquet"),
        ("s3://corpora//a//b.parquet", "/a//b.parquet"),
        ("s3://corpora/a@b/c#1?.parquet", "a@b/c#1?.parquet"),
        (f"hf://datasets/PleIAs/SYNTH@{'0' * 40}/synth_001.parquet", "synth_001.parquet"),
        (f"hf://datasets/PleIAs/SYNTH@{'0' * 40}/data/x@y/synth_001.parquet", "data/x@y/synth_001.parquet"),
        (f"hf://datasets/squad@{'0' * 40}/plain_text/train.parquet", "plain_text/train.parquet"),
    ],
)
def test_a_shards_key_is_its_whole_path_without_bucket_or_commit(url: str, key: str) -> None:
    assert InputShard(url, 1, "").key == key


@pytest.mark.parametrize("blank", [None, "", " ", "\t", "\r\n", "\u00a0", "\u3000 "])
def test_every_blank_label_is_none(blank: str | None) -> None:
    assert clean_label(blank) is None
    assert row_class(blank, blank) == 0
    assert row_class("fr", blank) == FOREIGN
    assert row_class(blank, "memorization") == MEMORIZATION


@pytest.mark.parametrize("label", ["en", " en", "en\n", "\u00a0en "])
def test_blanks_around_a_label_do_not_matter(label: str) -> None:
    assert clean_label(label) == "en"


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


MIXES = ["low=0.32,medium=0.42,high=0.26", "low=0.000001,high=0.999999", "medium=0.5,high=0.5", "low"]


@pytest.mark.parametrize("mix", MIXES)
def test_efforts_are_drawn_in_their_shares_in_each_split_and_below_each_threshold(mix: str) -> None:
    """Of n rows, the number at an effort of share p is within five standard deviations of np, √(np(1 − p)).

    A uniform hash misses that once in two million counts, for p near 0 more often: hence the 2 rows. The ids
    are those of SYNTH, so the result is always the same.
    """
    ids = [f"memorization_94_{n}" for n in range(20_000)]
    drawn = {row_id: draw_effort(row_id, mix) for row_id in ids}
    groups = {
        "all": ids,
        "held out": [row_id for row_id in ids if is_valid(row_id, 0.1)],
        "not held out": [row_id for row_id in ids if not is_valid(row_id, 0.1)],
        "sampled": [row_id for row_id in ids if hash_bin(row_id) < BINS // 3],
    }
    for name, rows in groups.items():
        for effort, share in effort_shares(mix).items():
            found = sum(drawn[row_id] == effort for row_id in rows)
            n, p = len(rows), float(share)
            assert abs(found - n * p) <= 5 * np.sqrt(n * p * (1 - p)) + 2, (name, effort)
    assert set(drawn.values()) <= set(effort_shares(mix))


def test_an_effort_follows_from_the_id_and_the_shares_alone() -> None:
    """Recomputed in floating point from the definition; recorded, because a dataset that is built again must
    be the same."""
    mix, recorded = "low=0.25,medium=0.5,high=0.25", []
    for row_id in (f"rag_{n}" for n in range(12)):
        digest = blake2b(row_id.encode(), digest_size=8, person=b"vpmoe.doc_effort").digest()
        u = int.from_bytes(digest, "big") / 2**64
        assert draw_effort(row_id, mix) == ("low" if u < 0.25 else "medium" if u < 0.75 else "high")
        recorded.append(draw_effort(row_id, mix)[0])
    assert "".join(recorded) == "hhlhmlmlhmmm"
