"""The training tokenizer as files for transformers and vLLM: tokenizer.json and tokenizer_config.json.

tokenizer.json is in the format of the package `tokenizers`. It is made from the vocabulary file, with the
splitting pattern and the special tokens of tiktoken's o200k_harmony, and gives tiktoken's ids:

- `tokenizer(text, split_special_tokens=True)`, as the training tokenizer: special tokens in the text are
  ordinary text.
- `tokenizer(text)`: special tokens in the text are special tokens, as in a rendered conversation.
- `tokenizer.apply_chat_template(messages)`: special tokens in a message are ordinary text. The chat template
  marks them with ESCAPE, and the tokenizer's normalizer removes the mark: special tokens are recognised
  before it, ordinary text after it.
"""

import json
from collections.abc import Mapping
from typing import Any

from vpmoe.data import vocabulary_file
from vpmoe.data.byte_level import CHARACTERS
from vpmoe.data.vocabulary import PADDING, RETURN, TEXT_IDS, VOCABULARY_SIZE

ESCAPE = "\ufdd0"
"""What the chat template writes after the `<` of `<|` in a message. The tokenizer removes one ESCAPE after
every `<`. Unicode has reserved this character for such purposes: it is not for interchange and has no token.
"""

ENDS = ["<|end|>", "<|return|>", "<|call|>"]
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|start|>assistant",
    "fields": {
        field: {"open": f"<|channel|>{channel}<|message|>", "close": ENDS, "content_args": {"strip": False}}
        for field, channel in (("thinking", "analysis"), ("content", "final"))
    },
}
"""How transformers (`tokenizer.parse_response`) and vLLM (`--reasoning-parser hf`) separate an answer into
reasoning and final message. Text outside of both is in neither."""


def tokenizer_json() -> str:
    """The content of tokenizer.json, about 12 MB."""
    encoding = vocabulary_file.encoding()
    ranks: Mapping[bytes, int] = encoding._mergeable_ranks
    text = {token: "".join(map(CHARACTERS.__getitem__, token)) for token in ranks}
    split = {
        "type": "Split",
        "pattern": {"Regex": encoding._pat_str},
        "behavior": "Isolated",
        "invert": False,
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token, name in special_tokens().items()
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": f"<{ESCAPE}"}, "content": "<"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {text[token]: rank for token, rank in ranks.items()},
            "merges": [[text[left], text[right]] for left, right in merges(ranks)],
        },
    }
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


def tokenizer_config(positions: int) -> dict[str, Any]:
    """The content of tokenizer_config.json. `positions`: the longest sequence of the student, in tokens."""
    names = special_tokens()
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": names[RETURN],
        "pad_token": names[PADDING],
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
        "model_max_length": positions,
        "model_input_names": ["input_ids", "attention_mask"],
        "response_template": RESPONSE_TEMPLATE,
    }


def special_tokens() -> dict[int, str]:
    """The name of every special token, which are all ids from TEXT_IDS to the end of the vocabulary.

    Id 200018 has two names in tiktoken; here it has the first, `<|endofprompt|>`.
    """
    names: dict[int, str] = {}
    for name, token in vocabulary_file.encoding()._special_tokens.items():
        names.setdefault(token, name)
    return {token: names[token] for token in range(TEXT_IDS, VOCABULARY_SIZE)}


def merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs of tokens that together are a token, the lower rank of the whole first.

    tiktoken merges the neighbours whose whole has the lowest rank; `tokenizers` those whose pair comes first
    in this list.
    """
    pairs = []
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        halves = ((token[:length], token[length:]) for length in range(1, len(token)))
        found = [(left, right) for left, right in halves if left in ranks and right in ranks]
        pairs += sorted(found, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return pairs
