"""The tokens of a source model as bytes, and any bytes as its tokens, from its tokenizer.json.

Byte-pair encoding only, in the two forms that Llama and Qwen have: over bytes (GPT-2's alphabet), and over
characters with a token for each byte (SentencePiece's). Texts are not split into words first, because what is
encoded here is one token of another vocabulary, which nearly always is part of one word.
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpmoe.checkpoint.safetensors_header import InvalidCheckpoint, read_json_object
from vpmoe.data.byte_level import BYTES, CHARACTERS
from vpmoe.failure import Permanent

FILE = "tokenizer.json"
BLANK = "▁"
"""What SentencePiece writes for a blank."""
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""SentencePiece's token of one byte."""


@dataclass(frozen=True)
class SourceTokenizer:
    """A byte-pair encoding."""

    ids: Mapping[bytes, int]
    """The id of every token of text by its bytes."""
    special: Mapping[str, int]
    """The id of every special token by its name."""
    symbols: Mapping[str, int]
    """The id of every token by its spelling in the file."""
    ranks: Mapping[tuple[str, str], int]
    """The order in which pairs of spellings are merged."""
    over_bytes: bool

    def pieces(self, content: bytes) -> list[int]:
        """The ids of the tokens that `content` consists of; none if it cannot be encoded."""
        if (whole := self.ids.get(content)) is not None:
            return [whole]
        parts = list(self._smallest(content))
        while len(parts) > 1:
            pairs = [self.ranks.get(pair, len(self.ranks)) for pair in itertools.pairwise(parts)]
            if (best := min(pairs)) == len(self.ranks):
                break
            first = pairs.index(best)
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        ids = [self.symbols.get(part) for part in parts]
        return [] if None in ids else [one for one in ids if one is not None]

    def _smallest(self, content: bytes) -> Iterator[str]:
        """Spellings of bytes; SentencePiece: of characters that are tokens, and of the bytes of others."""
        if self.over_bytes:
            yield from (CHARACTERS[byte] for byte in content)
            return
        # Bytes that are no UTF-8 become lone surrogates, which are no token.
        for character in content.decode(errors="surrogateescape"):
            spelling = BLANK if character == " " else character
            if spelling in self.symbols:
                yield spelling
            else:
                yield from (f"<0x{byte:02X}>" for byte in character.encode(errors="surrogateescape"))


def load_source_tokenizer(folder: Path, rows: int) -> SourceTokenizer:
    """The tokenizer of the model in `folder`, whose embeddings have `rows` rows.

    Raises Permanent if there is no tokenizer.json, or it is none of the two forms, or an id has no row.
    """
    path = folder / FILE
    try:
        content = read_json_object(path)
    except InvalidCheckpoint as error:
        raise Permanent(
            f"{path}: {error} The tokenizer is needed beside the weights: save it with the model's "
            "save_pretrained."
        ) from error
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else None
        raise Permanent(f"{path}: model.type is {kind}. Use a model with byte-pair encoding: BPE.")
    over_bytes = '"ByteLevel"' in json.dumps([content.get("pre_tokenizer"), content.get("decoder")])
    if not over_bytes and not model.get("byte_fallback"):
        raise Permanent(
            f"{path}: neither pre_tokenizer nor decoder is ByteLevel, and model.byte_fallback is not true. "
            "Use a model whose tokenizer can encode every byte."
        )
    symbols: dict[str, int] = model["vocab"]
    added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    ids = {
        spelled: token
        for symbol, token in symbols.items()
        if symbol not in added and (spelled := _bytes(symbol, over_bytes)) is not None
    }
    for token in content.get("added_tokens", []):
        if not token.get("special"):
            ids[token["content"].encode()] = token["id"]
    if (largest := max([*symbols.values(), *added.values()], default=0)) >= rows:
        raise Permanent(
            f"{path}: id {largest:,} has no row in the embeddings, which have {rows:,} (config.json: "
            "vocab_size). The tokenizer is of another model: copy both again."
        )
    return SourceTokenizer(ids, added, symbols, _ranks(model), over_bytes)


def _ranks(model: Mapping[str, Any]) -> dict[tuple[str, str], int]:
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    return {(left, right): rank for rank, (left, right) in enumerate(pairs)}


def _bytes(symbol: str, over_bytes: bool) -> bytes | None:
    """The bytes of a token; None if its spelling is not of the alphabet."""
    if over_bytes:
        found = [BYTES.get(character) for character in symbol]
        return None if None in found else bytes(byte for byte in found if byte is not None)
    if byte := BYTE.fullmatch(symbol):
        return bytes([int(byte[1], 16)])
    return symbol.replace(BLANK, " ").encode()
