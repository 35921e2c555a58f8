"""The tokenizer gives tiktoken's ids, also for characters that the Unicode tables of gigatoken and tiktoken
classify differently, and detects errors of either."""

import secrets
from collections.abc import Iterator

import gigatoken
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes.hostile_texts import ASSIGNED, LONG, NEW_CHARACTERS, PROBES
from vpmoe.data import vocabulary_file
from vpmoe.data.tokenizer import CHECK_INTERVAL, Tokenizer, _known, tokenizer
from vpmoe.failure import Permanent


def assigned_characters() -> Iterator[str]:
    return map(chr, ASSIGNED)


@pytest.mark.parametrize("probe", PROBES, ids=["before-a-contraction", "between"])
def test_gigatoken_differs_from_tiktoken_only_for_characters_passed_to_tiktoken(probe: str) -> None:
    fast = gigatoken.Tokenizer.from_tiktoken(
        vocabulary_file.install() / vocabulary_file.FOR_HARMONY, "o200k", {}
    )
    slow = vocabulary_file.encoding()
    texts = [(character, probe.replace("{}", character)) for character in assigned_characters()]
    differ = [
        character for character, text in texts if fast.encode(text).tolist() != slow.encode_ordinary(text)
    ]
    assert not any(_known(character) for character in differ)
    pieces = [tokenizer()._piece_V[slow.encode_ordinary(character)].all() for character in differ]
    assert all(pieces), "characters that have their own token are not passed to tiktoken"


@pytest.mark.parametrize(
    "text", [f"a{character}'s {character}{character}B\r\n{character}'LL" for character in NEW_CHARACTERS]
)
def test_new_characters_have_tiktokens_ids(text: str) -> None:
    assert tokenizer().encode(text).tolist() == vocabulary_file.encoding().encode_ordinary(text)


@given(st.text(st.sampled_from(f"aZ1 \n\r\t's'LL!→é漢\u0301\u093e😀{NEW_CHARACTERS}"), max_size=60))
def test_any_text_has_tiktokens_ids(text: str) -> None:
    ids = tokenizer().encode(text)
    assert ids.dtype == np.int32 and ids.tolist() == vocabulary_file.encoding().encode_ordinary(text)


def test_long_runs_and_marks_have_tiktokens_ids() -> None:
    for text in LONG:
        assert tokenizer().encode(text).tolist() == vocabulary_file.encoding().encode_ordinary(text)


def test_a_text_that_tiktoken_cannot_encode_is_rejected_only_if_it_needs_tiktoken() -> None:
    assert len(tokenizer().encode(" " * 1_000_000)) > 7000
    with pytest.raises(ValueError):
        tokenizer().encode(" " * 1_000_000 + NEW_CHARACTERS)


def test_different_ids_of_the_two_tokenizers_are_an_error() -> None:
    mismatched = Tokenizer()
    mismatched._gigatoken = gigatoken.Tokenizer.from_tiktoken(
        vocabulary_file.install() / vocabulary_file.FOR_HARMONY, "gpt2", {}
    )  # groups digits differently
    with pytest.raises(
        Permanent, match=r"gigatoken and tiktoken give different ids for '1234567 .* one of them has an error"
    ):
        for _ in range(CHECK_INTERVAL):
            mismatched.encode("1234567 " + secrets.token_hex(2))
