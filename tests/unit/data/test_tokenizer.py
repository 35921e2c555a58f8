"""The fast tokenizer against tiktoken: wherever their Unicode tables differ tiktoken has the word, and an
error of either is noticed."""

import secrets
from collections.abc import Iterator

import gigatoken
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpmoe.data import vocabulary_file
from vpmoe.data.tokenizer import CHECK_INTERVAL, Tokenizer, _known, tokenizer
from vpmoe.failure import Permanent

ASSIGNED = [*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xE0200), 0xF0000, 0x10FFFF]
"""Every code point that Unicode has, or may have next; one of each private plane."""
YOUNG = "\u088f\u1acf\U00032718\U000323b0"
"""Letters and a mark of Unicode 17."""


def characters() -> Iterator[str]:
    return map(chr, ASSIGNED)


@pytest.mark.parametrize("probe", ["{}'s", "!{}a A{}'LL\n"], ids=["before-a-contraction", "between"])
def test_the_two_differ_only_about_characters_that_are_looked_up(probe: str) -> None:
    fast = gigatoken.Tokenizer.from_tiktoken(
        vocabulary_file.install() / vocabulary_file.FOR_HARMONY, "o200k", {}
    )
    slow = vocabulary_file.encoding()
    texts = [(character, probe.replace("{}", character)) for character in characters()]
    differ = [
        character for character, text in texts if fast.encode(text).tolist() != slow.encode_ordinary(text)
    ]
    assert not any(_known(character) for character in differ)
    pieces = [tokenizer()._piece_V[slow.encode_ordinary(character)].all() for character in differ]
    assert all(pieces), "a character that has a token of its own would not be looked up"


@pytest.mark.parametrize("text", [f"a{young}'s {young}{young}B\r\n{young}'LL" for young in YOUNG])
def test_characters_younger_than_the_tables_are_tiktokens(text: str) -> None:
    assert tokenizer().encode(text).tolist() == vocabulary_file.encoding().encode_ordinary(text)


@given(st.text(st.sampled_from(f"aZ1 \n\r\t's'LL!→é漢\u0301\u093e😀{YOUNG}"), max_size=60))
def test_any_text_has_tiktokens_ids(text: str) -> None:
    ids = tokenizer().encode(text)
    assert ids.dtype == np.int32 and ids.tolist() == vocabulary_file.encoding().encode_ordinary(text)


def test_long_runs_and_marks_have_tiktokens_ids() -> None:
    for text in (
        "x" * 100_000,
        "\n" * 100_000,
        "1" * 99_999,
        "漢" * 50_000,
        "\0" * 1000,
        " " * 5_000 + "end",
        "→ ⟨H≈0.5⟩ ├─ ☐" * 999,
    ):
        assert tokenizer().encode(text).tolist() == vocabulary_file.encoding().encode_ordinary(text)


def test_a_text_that_tiktoken_cannot_take_is_refused_only_where_it_must_be_asked() -> None:
    assert len(tokenizer().encode(" " * 1_000_000)) > 7000
    with pytest.raises(ValueError):
        tokenizer().encode(" " * 1_000_000 + YOUNG)


def test_an_error_of_either_tokenizer_is_noticed() -> None:
    it = Tokenizer()
    it._gigatoken = gigatoken.Tokenizer.from_tiktoken(
        vocabulary_file.install() / vocabulary_file.FOR_HARMONY, "gpt2", {}
    )  # takes digits in other groups
    with pytest.raises(
        Permanent, match=r"gigatoken and tiktoken give different ids for '1234567 .* one of them has an error"
    ):
        for _ in range(CHECK_INTERVAL):
            it.encode("1234567 " + secrets.token_hex(2))
