"""Token counts and durations: parsing, formatting, and errors with the remedy."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpmoe.api.quantities import (
    MOST_TOKENS,
    format_count,
    format_duration,
    format_tokens,
    parse_duration,
    parse_quantity,
    parse_tokens,
)


@pytest.mark.parametrize(
    "text, count",
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
def test_a_token_count_is_parsed(text: object, count: int) -> None:
    assert parse_tokens(text) == count


@pytest.mark.parametrize(
    "text",
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
def test_an_invalid_token_count_is_rejected_with_the_remedy(text: object) -> None:
    with pytest.raises(ValueError, match="must be a whole number of tokens"):
        parse_tokens(text)


@given(st.integers(0, MOST_TOKENS))
def test_a_formatted_token_count_is_parsed_to_the_same_number(count: int) -> None:
    assert parse_tokens(format_tokens(count)) == count


@given(st.integers(1, 10**6), st.sampled_from(["k", "M", "B"]))
def test_a_round_token_count_is_formatted_with_a_suffix(count: int, suffix: str) -> None:
    assert len(format_tokens(parse_tokens(f"{count}{suffix}"))) <= len(f"{count}{suffix}") + 1


@pytest.mark.parametrize(
    "count, formatted",
    [(0, "0"), (999, "999"), (1000, "1k"), (1_500_000, "1.5M"), (665_000_000, "665M"), (10**12, "1T")],
)
def test_a_token_count_is_formatted(count: int, formatted: str) -> None:
    assert format_tokens(count) == formatted


@pytest.mark.parametrize(
    "count, text",
    [
        (0, "0"),
        (0.4, "<1"),
        (22.7, "22"),
        (999, "999"),
        (999.6, "1k"),
        (1234, "1.23k"),
        (1_234_567, "1.23M"),
        (8_000_000_000, "8B"),
        (8_295_610_452_459, "8.3T"),
        (MOST_TOKENS - 1, "1,000T"),
        (5.119e18, "5,120,000T"),
    ],
)
def test_a_count_is_printed_with_three_digits(count: float, text: str) -> None:
    assert format_count(count) == text


@pytest.mark.parametrize(
    "text, seconds",
    [("90s", 90), ("15m", 900), ("1h30m", 5400), ("7d", 604_800), ("1d1h1m1s", 90_061), ("0s", 0)],
)
def test_a_duration_is_parsed(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "15", "m", "1m1h", "1w", "-1m", "1.5h", " 1m", "1m ", "1m\n", 15, None, "1" * 24 + "s"]
)
def test_an_invalid_duration_is_rejected_with_the_remedy(text: object) -> None:
    with pytest.raises(ValueError, match="must be a duration such as"):
        parse_duration(text)


@given(st.integers(0, 10**9))
def test_a_formatted_duration_is_parsed_to_the_same_seconds(seconds: int) -> None:
    assert parse_duration(format_duration(seconds)) == seconds


@pytest.mark.parametrize(
    "text, number",
    [
        ("4", 4),
        ("0.5", 0.5),
        ("500m", 0.5),
        ("2k", 2000),
        ("1E", 1e18),
        ("1e3", 1000),
        ("1.5Gi", 1.5 * 2**30),
    ],
)
def test_a_kubernetes_quantity_is_parsed(text: str, number: float) -> None:
    assert parse_quantity(text) == number


@pytest.mark.parametrize("text", ["", "m", "1 m", "-1", "1KB", "1e"])
def test_text_that_is_no_quantity_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="must be a quantity"):
        parse_quantity(text)
