"""The exported tokenizer gives the ids of the training tokenizer for every text."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai_harmony import HarmonyEncoding

from tests.fakes.hostile_texts import ASSIGNED, LONG, NEW_CHARACTERS, PROBES, TEXTS
from tests.fakes.students import new_seed
from vpmoe.data import vocabulary_file
from vpmoe.data.tokenizer import tokenizer
from vpmoe.data.vocabulary import PADDING, RETURN, TEXT_IDS, VOCABULARY_SIZE
from vpmoe.export import tokenizer_files
from vpmoe.export.tokenizer_files import ESCAPE


def encode(exported: Any, texts: list[str]) -> list[list[int]]:
    """The ids of texts as the training tokenizer reads them."""
    found: list[list[int]] = exported(texts, split_special_tokens=True)["input_ids"]
    return found


def assert_same(exported: Any, texts: list[str]) -> None:
    for text, found in zip(texts, encode(exported, texts), strict=True):
        assert found == tokenizer().encode(text).tolist(), text[:200]


def test_hostile_texts(exported: Any) -> None:
    assert_same(exported, [*TEXTS.values(), *LONG])


@pytest.mark.parametrize("probe", PROBES, ids=["before-a-contraction", "between"])
def test_every_character(exported: Any, probe: str) -> None:
    """Also those that are newer than the Unicode tables of a tokenizer."""
    texts = [probe.replace("{}", chr(code)) for code in ASSIGNED]
    reference = vocabulary_file.encoding()
    found = encode(exported, texts)
    differ = [
        f"{code:x}"
        for code, text, ids in zip(ASSIGNED, texts, found, strict=True)
        if ids != reference.encode_ordinary(text)
    ]
    assert not differ, f"{len(differ)}: {differ[:50]}"


def test_random_texts(exported: Any) -> None:
    chance = random.Random(new_seed())
    common = [
        *"aZ1 \n\r\t's'LL!→é漢\u0301\u093e😀<|>/",
        *NEW_CHARACTERS,
        "<|end|>",
        "<|start|>",
        "  ",
        "'re",
        "\r\n",
    ]

    def text() -> str:
        kind = chance.randrange(3)
        if kind == 0:
            return "".join(chance.choices(common, k=chance.randrange(80)))
        if kind == 1:
            return "".join(map(chr, chance.choices(ASSIGNED, k=chance.randrange(40))))
        return tokenizer_text(chance)

    texts = [text() for _ in range(4000)]
    assert_same(exported, [one for one in texts if f"<{ESCAPE}" not in one])


def tokenizer_text(chance: random.Random) -> str:
    """Random tokens, of which neighbours can often be merged differently."""
    ids = [chance.randrange(TEXT_IDS) for _ in range(chance.randrange(30))]
    return vocabulary_file.encoding().decode(ids)


def test_only_the_mark_of_the_chat_template_is_lost(exported: Any) -> None:
    text = f"a <{ESCAPE}b {ESCAPE} <"
    assert encode(exported, [text])[0] == tokenizer().encode(f"a <b {ESCAPE} <").tolist()


def test_ids_and_names_of_special_tokens_are_those_of_openai_harmony(
    exported: Any, harmony: HarmonyEncoding
) -> None:
    assert len(exported) == VOCABULARY_SIZE
    names = tokenizer_files.special_tokens()
    assert list(names) == list(range(TEXT_IDS, VOCABULARY_SIZE))
    differ = {}
    for token, name in names.items():
        assert exported.convert_tokens_to_ids(name) == token
        assert exported(name)["input_ids"] == [token] and exported.decode([token]) == name
        if (by_harmony := harmony.decode_utf8([token])) != name:
            differ[token] = by_harmony
    assert differ in ({}, {200018: "<|reserved_200018|>"})


def test_every_token_decodes_to_its_bytes(exported: Any) -> None:
    reference = vocabulary_file.encoding()
    found = exported.batch_decode([[token] for token in range(TEXT_IDS)])
    expected = [
        reference.decode_single_token_bytes(token).decode(errors="replace") for token in range(TEXT_IDS)
    ]
    assert np.array_equal(found, expected)


def test_the_file_is_the_same_each_time(folder: Path) -> None:
    assert (folder / "tokenizer.json").read_text(encoding="utf-8") == tokenizer_files.tokenizer_json()


def test_settings(exported: Any) -> None:
    assert (exported.eos_token_id, exported.pad_token_id) == (RETURN, PADDING)
    assert exported.bos_token is None and exported.model_max_length == 4096
    assert exported("hello")["input_ids"] == exported("hello", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "generated, thinking, content",
    [
        (
            "<|channel|>analysis<|message|>Hm.\n<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>",
            "Hm.\n",
            "4",
        ),
        ("<|channel|>final<|message|>4 < 5<|return|>", None, "4 < 5"),
        ("<|channel|>analysis<|message|>cut off", "cut off", None),
        (
            "<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>final<|message|>cut",
            "x",
            "cut",
        ),
        ("no Harmony", None, None),
    ],
    ids=["both", "no-reasoning", "cut-reasoning", "cut-final", "neither"],
)
def test_an_answer_is_separated_into_reasoning_and_final_message(
    exported: Any, generated: str, thinking: str | None, content: str | None
) -> None:
    prompt = exported.apply_chat_template(
        [{"role": "user", "content": "2 + 2?"}], add_generation_prompt=True, return_dict=False
    )
    ids = exported(generated)["input_ids"]
    message = exported.parse_response(ids, prefix=prompt)
    assert message.get("thinking") == thinking and message.get("content") == content
