"""Token counts and durations mean what people write."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpmoe.api.quantities import MOST_TOKENS, format_duration, format_tokens, parse_duration, parse_tokens


@pytest.mark.parametrize(
    "written, count",
    [
        (0, 0),
        (1_000_000, 1_000_000),
        (1e9, 10**9),
        ("1000000", 10**6),
        ("1_000_000", 10**6),
        ("500k", 500_000),
        ("500K", 500_000),
        ("20M", 20 * 10**6),
        ("1.5B", 1_500_000_000),
        ("0.001k", 1),
        ("2T", 2 * 10**12),
        ("1.10B", 1_100_000_000),
    ],
)
def test_a_token_count_is_read(written: object, count: int) -> None:
    assert parse_tokens(written) == count


@pytest.mark.parametrize(
    "written",
    [
        "",
        "B",
        "1b",
        "1 B",
        "-1",
        "1e9",
        "1.5",
        "1.0001k",
        ".5M",
        "1.M",
        "0x10",
        "1BB",
        "٣",
        "1" * 30,
        1.5,
        True,
        None,
        [],
        float("nan"),
    ],
)
def test_what_is_no_token_count_is_refused_with_what_to_write(written: object) -> None:
    with pytest.raises(ValueError, match="must be a whole number of tokens"):
        parse_tokens(written)


@given(st.integers(0, MOST_TOKENS))
def test_a_token_count_survives_being_written(count: int) -> None:
    assert parse_tokens(format_tokens(count)) == count


@given(st.integers(1, 10**6), st.sampled_from(["k", "M", "B"]))
def test_a_round_token_count_is_written_short(count: int, suffix: str) -> None:
    assert len(format_tokens(parse_tokens(f"{count}{suffix}"))) <= len(f"{count}{suffix}") + 1


@pytest.mark.parametrize(
    "count, text",
    [(0, "0"), (999, "999"), (1000, "1k"), (1_500_000, "1.5M"), (665_000_000, "665M"), (10**12, "1T")],
)
def test_a_token_count_is_written(count: int, text: str) -> None:
    assert format_tokens(count) == text


@pytest.mark.parametrize(
    "written, seconds",
    [("90s", 90), ("15m", 900), ("1h30m", 5400), ("7d", 604_800), ("1d1h1m1s", 90_061), ("0s", 0)],
)
def test_a_duration_is_read(written: str, seconds: int) -> None:
    assert parse_duration(written) == seconds


@pytest.mark.parametrize(
    "written", ["", "15", "m", "1m1h", "1w", "-1m", "1.5h", " 1m", "1m ", "1m\n", 15, None, "1" * 24 + "s"]
)
def test_what_is_no_duration_is_refused_with_what_to_write(written: object) -> None:
    with pytest.raises(ValueError, match="must be a duration such as"):
        parse_duration(written)


@given(st.integers(0, 10**9))
def test_a_duration_survives_being_written(seconds: int) -> None:
    assert parse_duration(format_duration(seconds)) == seconds
