"""Rows of the student's vocabulary (o200k) as sparse combinations of a source's rows.

A token that the source has as ONE token keeps that row. Another is a combination, in one of two ways:

pieces: of the tokens that the source's tokenizer splits it into. Their weights fall linearly: in the
embeddings from the last piece back, since what follows a token depends most on its end; in the output from
the first piece on, since the source predicts the first piece where the student predicts the token. So tokens
of the same pieces in another order ("12" and "21" of a model that splits numbers into digits) differ.

donor: of shared tokens, found in the embeddings of a model with the student's vocabulary, such as GPT-OSS, by
orthogonal matching pursuit (arXiv 2506.06607; omp.py), and applied to the source's rows.

Tokens that have neither are drawn: special tokens of Harmony, and bytes that the source cannot encode.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tiktoken
import torch
from numpy.typing import NDArray
from torch import Tensor

from vpmoe.data import vocabulary_file
from vpmoe.data.vocabulary import TEXT_IDS
from vpmoe.model.initial import generator_for
from vpmoe.upcycle.omp import ATOMS, combine
from vpmoe.upcycle.source_tokenizer import SourceTokenizer

Kind = Literal["text", "number", "bytes", "special"]
"""number: digits, also after a blank. bytes: begins or ends inside a character."""
Origin = Literal["copied", "combined", "drawn"]

ANCHORS = 16_384
"""Most shared tokens that are combined: those with the lowest ids, which are the most frequent and so the
best trained in both models."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows as weighted sums: row v is Σ weight · source row, over entries [starts[v], starts[v + 1])."""

    starts: NDArray[np.int64]
    """[V + 1]"""
    ids: NDArray[np.int64]
    weights: NDArray[np.float32]

    def apply(self, table: Tensor) -> Tensor:
        """The rows [V, H] in fp32 of a source's table [rows, H]; a row without entries is 0. A single entry
        of weight 1 is copied exactly."""
        return torch.nn.functional.embedding_bag(
            torch.from_numpy(self.ids),
            table,
            torch.from_numpy(self.starts),
            mode="sum",
            per_sample_weights=torch.from_numpy(self.weights),
            include_last_offset=True,
        )


@dataclass(frozen=True, eq=False)
class VocabularyMap:
    """How each of the student's V rows is made."""

    embedding: Rows
    output: Rows
    origins: tuple[Origin, ...]
    kinds: tuple[Kind, ...]
    method: str
    """pieces or donor."""

    def embeddings(self, table: Tensor, seed: int) -> Tensor:
        """The student's embeddings [V, H] of the source's [rows, H], fp32."""
        return self._drawn(self.embedding.apply(table), table, "embedding.weight", seed)

    def outputs(self, table: Tensor, seed: int) -> Tensor:
        """The student's output matrix [V, H] of the source's [rows, H], fp32."""
        return self._drawn(self.output.apply(table), table, "output", seed)

    def _drawn(self, rows: Tensor, table: Tensor, name: str, seed: int) -> Tensor:
        """Fills drawn rows from a normal distribution with mean and deviation of the source's columns."""
        which = torch.tensor(
            [n for n, origin in enumerate(self.origins) if origin == "drawn"], dtype=torch.int64
        )
        generator = generator_for(name, seed, torch.device("cpu"))
        noise = torch.randn((len(which), table.shape[1]), generator=generator)
        rows[which] = table.mean(0) + noise * table.std(0)
        return rows

    def table(self) -> list[str]:
        """The counts as lines of text."""
        counts = self.as_json()
        lines = [
            f"rows      {len(self.origins):,} of the vocabulary; tokens that the source has not: "
            f"{self.method}"
        ]
        for kind, numbers in counts["byKind"].items():
            said = ", ".join(f"{number:,} {origin}" for origin, number in numbers.items())
            lines.append(f"          {kind}: {said}")
        return lines

    def as_json(self) -> dict[str, Any]:
        """Counts for a manifest: rows by origin, in all and by kind of token."""
        both = Counter(zip(self.kinds, self.origins, strict=True))
        by_kind: dict[str, dict[str, int]] = {}
        for (kind, origin), number in sorted(both.items()):
            by_kind.setdefault(kind, {})[origin] = number
        return {
            "method": self.method,
            **{origin: self.origins.count(origin) for origin in ("copied", "combined", "drawn")},
            "byKind": by_kind,
        }


def token_texts(encoding: tiktoken.Encoding, size: int) -> tuple[list[bytes], dict[int, str]]:
    """The bytes of the first `size` ids that are text, and the names of those that are special tokens."""
    texts = [encoding.decode_single_token_bytes(token) for token in range(min(size, TEXT_IDS))]
    names: dict[int, str] = {}
    for name, token in encoding._special_tokens.items():
        if token < size:
            names.setdefault(token, name)
    return texts, names


def map_vocabulary(tokenizer: SourceTokenizer, size: int, donor: Tensor | None = None) -> VocabularyMap:
    """How the first `size` rows of o200k_harmony are made of a source's. `donor` [≥ size, D]: embeddings of a
    model with the student's vocabulary; None: tokens that the source has not are made of their pieces."""
    texts, names = token_texts(vocabulary_file.encoding(), size)
    kinds: list[Kind] = [_kind(content) for content in texts]
    entries: list[list[int]] = [tokenizer.pieces(content) for content in texts]
    for token in range(len(texts), size):
        kinds.append("special")
        same = tokenizer.special.get(names.get(token, ""))
        entries.append([] if same is None else [same])
    copied = {token: pieces[0] for token, pieces in enumerate(entries) if len(pieces) == 1}
    if donor is None:
        origins = [_origin(len(pieces)) for pieces in entries]
        rising, falling = ([_linear(len(p), up) for p in entries] for up in (True, False))
        return VocabularyMap(
            _rows(entries, rising), _rows(entries, falling), tuple(origins), tuple(kinds), "pieces"
        )
    anchors = [token for token in copied if token < len(texts)][:ANCHORS]
    targets = [token for token in range(size) if token not in copied]
    chosen, weights = combine(donor[torch.tensor(anchors)].float(), donor, targets, ATOMS)
    combined = {
        token: [copied[anchors[one]] for one in row] for token, row in zip(targets, chosen, strict=True)
    }
    of = dict(zip(targets, weights, strict=True))
    rows = _rows(
        [[copied[token]] if token in copied else combined[token] for token in range(size)],
        [[1.0] if token in copied else of[token] for token in range(size)],
    )
    origins = ["copied" if token in copied else _origin(2 * bool(combined[token])) for token in range(size)]
    return VocabularyMap(rows, rows, tuple(origins), tuple(kinds), "donor")


def _origin(pieces: int) -> Origin:
    return "drawn" if pieces == 0 else "copied" if pieces == 1 else "combined"


def _linear(pieces: int, rising: bool) -> list[float]:
    """Weights that add up to 1: 1, 2, 3, … or …, 3, 2, 1, divided by their sum."""
    total = pieces * (pieces + 1) / 2
    weights = [(number + 1) / total for number in range(pieces)]
    return weights if rising else weights[::-1]


def _rows(entries: Sequence[Sequence[int]], weights: Sequence[Sequence[float]]) -> Rows:
    lengths = np.array([len(row) for row in entries], dtype=np.int64)
    return Rows(
        np.concatenate([np.zeros(1, np.int64), lengths.cumsum()]),
        np.array([one for row in entries for one in row], dtype=np.int64),
        np.array([one for row in weights for one in row], dtype=np.float32),
    )


def _kind(content: bytes) -> Kind:
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return "bytes"
    return "number" if text.removeprefix(" ").isdecimal() else "text"
