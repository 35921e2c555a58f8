"""Rows of o200k from another vocabulary: pieces as `tokenizers` splits, orthogonal matching pursuit as by
definition."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteFallback
from tokenizers.models import BPE, WordLevel
from tokenizers.normalizers import Replace
from tokenizers.trainers import BpeTrainer

from tests.fakes.dense_models import TEXT, byte_tokenizer
from tests.fakes.students import new_seed
from vpmoe.data import vocabulary_file
from vpmoe.data.vocabulary import START, VOCABULARY_SIZE
from vpmoe.failure import Permanent
from vpmoe.upcycle.omp import combine
from vpmoe.upcycle.source_tokenizer import SourceTokenizer, load_source_tokenizer
from vpmoe.upcycle.vocabulary import ANCHORS, Rows, VocabularyMap, map_vocabulary

ROWS, SIZE = 600, 4_000
"""Rows of the source's embeddings; rows of the student's vocabulary that most tests make."""


def sentencepiece_tokenizer() -> Tokenizer:
    """As Llama 2's: over characters, ▁ for a blank, <0x00> … <0xFF> for what is no character of the
    vocabulary."""
    trained = Tokenizer(BPE(unk_token="<unk>"))
    trained.normalizer = Replace(" ", "▁")
    letters = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained.train_from_iterator(TEXT, BpeTrainer(vocab_size=400, special_tokens=letters, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(BPE(model["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer, tokenizer.decoder = trained.normalizer, ByteFallback()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def loaded(tokenizer: Tokenizer, folder: Path) -> SourceTokenizer:
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_source_tokenizer(folder, ROWS)


@pytest.fixture
def source(tmp_path: Path) -> SourceTokenizer:
    return loaded(byte_tokenizer(), tmp_path)


def texts(count: int) -> list[str]:
    """Random tokens of o200k that are whole characters."""
    generator = np.random.default_rng(new_seed())
    encoding, found = vocabulary_file.encoding(), []
    for token in generator.integers(0, 199_998, 2 * count):
        content = encoding.decode_single_token_bytes(int(token))
        try:
            found.append(content.decode())
        except UnicodeDecodeError:
            continue
    return found[:count]


@pytest.mark.parametrize("make", [byte_tokenizer, sentencepiece_tokenizer])
def test_pieces_are_those_of_tokenizers(make: Any, tmp_path: Path) -> None:
    tokenizer = make()
    own = loaded(tokenizer, tmp_path)
    tokenizer.pre_tokenizer = None if make is sentencepiece_tokenizer else tokenizer.pre_tokenizer
    longer = 0
    for text in [*TEXT, *texts(400)]:
        for word in text.split(" ") if make is byte_tokenizer else [text]:
            if word and not any(mark in word for mark in "'\n\r\t"):  # where the pattern splits words
                want = tokenizer.encode(word, add_special_tokens=False).ids
                if make is byte_tokenizer and len(tokenizer.pre_tokenizer.pre_tokenize_str(word)) > 1:
                    continue
                assert own.pieces(word.encode()) == want, word
                longer += len(want) > 1
    assert longer > 100


@pytest.mark.parametrize("make", [byte_tokenizer, sentencepiece_tokenizer])
def test_any_bytes_are_encoded(make: Any, tmp_path: Path) -> None:
    own = loaded(make(), tmp_path)
    spelled = {token: content for content, token in own.ids.items()}
    for content in (b"\xe6\xb1", b"\xff\x00a", " été über".encode(), "汉".encode()[1:]):
        assert b"".join(spelled[piece] for piece in own.pieces(content)) == content


def test_a_shared_token_keeps_its_row_and_others_are_their_pieces(source: SourceTokenizer) -> None:
    table = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(new_seed()))
    found = map_vocabulary(source, SIZE)
    embeddings, outputs = found.embeddings(table, 1), found.outputs(table, 1)
    assert embeddings.shape == outputs.shape == (SIZE, 8)
    encoding = vocabulary_file.encoding()
    for token in range(SIZE):
        pieces = source.pieces(encoding.decode_single_token_bytes(token))
        if len(pieces) == 1:
            assert found.origins[token] == "copied"
            assert torch.equal(embeddings[token], table[pieces[0]])
            assert torch.equal(outputs[token], table[pieces[0]])
        else:
            assert found.origins[token] == "combined"
            weights = torch.arange(1.0, len(pieces) + 1, dtype=torch.float64)
            weights /= weights.sum()
            for got, weight in ((embeddings, weights), (outputs, weights.flip(0))):
                want = (weight.unsqueeze(1) * table[pieces].double()).sum(0)
                torch.testing.assert_close(got[token].double(), want, rtol=1e-5, atol=1e-6)
    assert 200 < found.origins.count("copied") < SIZE


def test_numbers_of_the_same_digits_differ(tmp_path: Path) -> None:
    """A source that splits numbers into digits, as Qwen does. o200k has every number of three digits as one
    token."""
    digits = loaded(byte_tokenizer(["a"], 257), tmp_path)
    encoding = vocabulary_file.encoding()
    ids = [encoding.encode_single_token(text) for text in ("123", "132", "213", "231", "312", "321")]
    table = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(new_seed()))
    found = map_vocabulary(digits, max(ids) + 1)
    assert {found.kinds[token] for token in ids} == {"number"}
    assert {found.origins[token] for token in ids} == {"combined"}
    for rows in (found.embeddings(table, 1)[ids], found.outputs(table, 1)[ids]):
        assert torch.cdist(rows, rows).add(torch.eye(6)).min() > 0.01


def test_kinds_and_origins_of_the_whole_vocabulary(source: SourceTokenizer) -> None:
    found = map_vocabulary(source, VOCABULARY_SIZE)
    counts = found.as_json()
    assert sum(counts[origin] for origin in ("copied", "combined", "drawn")) == VOCABULARY_SIZE
    # Of the special tokens, the source has one of the same name.
    assert counts["byKind"]["special"] == {"copied": 1, "drawn": VOCABULARY_SIZE - 199_998 - 1}
    # o200k has all numbers of one to three digits, written 0 … 9, and more in other scripts.
    assert sum(counts["byKind"]["number"].values()) >= 1_110
    assert counts["method"] == "pieces" and found.origins[START] == "drawn"


def test_drawn_rows_have_mean_and_deviation_of_the_source(tmp_path: Path) -> None:
    """2,000 drawn rows of 4 columns: mean and deviation known to 2 %, tested to 10 %."""
    mean, deviation = torch.tensor([0.0, 1.0, -2.0, 0.5]), torch.tensor([1.0, 0.1, 0.5, 2.0])
    table = mean + deviation * torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(new_seed()))
    nothing = Rows(np.zeros(2_001, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
    drawn = VocabularyMap(nothing, nothing, ("drawn",) * 2_000, ("special",) * 2_000, "pieces")
    rows = drawn.embeddings(table, 1)
    torch.testing.assert_close(rows.std(0), table.std(0), rtol=0.1, atol=0)
    assert ((rows.mean(0) - table.mean(0)).abs() < 0.1 * table.std(0)).all()
    assert torch.equal(rows, drawn.embeddings(table, 1)) and not torch.equal(rows, drawn.embeddings(table, 2))


def pursuit(anchors: np.ndarray, vector: np.ndarray, atoms: int) -> np.ndarray:
    """The definition in float64: coefficients of all anchors."""
    found, left = [], vector
    for _ in range(atoms):
        products = np.abs(anchors @ left) / np.linalg.norm(anchors, axis=1)
        products[found] = -1
        found.append(int(products.argmax()))
        solved, *_ = np.linalg.lstsq(anchors[found].T, vector, rcond=None)
        left = vector - solved @ anchors[found]
    coefficients = np.zeros(len(anchors))
    coefficients[found] = solved
    return coefficients


def test_combinations_are_those_of_the_definition_in_float64() -> None:
    """fp32 chooses between anchors that are nearly equally good by rounding, so seeds are fixed."""
    generator = torch.Generator().manual_seed(3)
    anchors, vectors = torch.randn(50, 24, generator=generator), torch.randn(700, 24, generator=generator)
    chosen, weights = combine(anchors, vectors, range(700), 5)
    for vector, picks, values in zip(vectors, chosen, weights, strict=True):
        got = np.zeros(50)
        got[picks] = values
        want = pursuit(anchors.double().numpy(), vector.double().numpy(), 5)
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)


def test_sparse_combinations_are_found_again_and_pursuit_stops_there() -> None:
    """Three of 40 anchors in 64 dimensions; a vector of zeros has none."""
    generator = torch.Generator().manual_seed(new_seed())
    anchors = torch.randn(40, 64, generator=generator)
    want = torch.zeros(20, 40)
    for row in want[:-1]:
        row[torch.randperm(40, generator=generator)[:3]] = torch.tensor([1.0, -2.0, 3.0])
    chosen, weights = combine(anchors, want @ anchors, range(20), 8)
    got = torch.zeros_like(want)
    for row, picks, values in zip(got, chosen, weights, strict=True):
        row[picks] = torch.tensor(values)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert [len(picks) for picks in chosen] == [3] * 19 + [0]


def test_a_donors_combinations_are_applied_to_the_source(source: SourceTokenizer) -> None:
    """Unshared rows of the donor are combinations of two shared ones: the source's rows are the same
    combinations."""
    generator = torch.Generator().manual_seed(new_seed())
    table, donor = torch.randn(ROWS, 8, generator=generator), torch.randn(SIZE, 512, generator=generator)
    shared = [n for n, origin in enumerate(map_vocabulary(source, SIZE).origins) if origin == "copied"]
    assert len(shared) < ANCHORS
    planted = {}
    for token in sorted({*range(SIZE)} - {*shared}):
        first, second = (shared[i] for i in torch.randperm(len(shared), generator=generator)[:2])
        planted[token] = (first, second)
        donor[token] = 2 * donor[first] - donor[second]
    found = map_vocabulary(source, SIZE, donor)
    rows = found.embeddings(table, 1)
    for token, (first, second) in planted.items():
        torch.testing.assert_close(rows[token], 2 * rows[first] - rows[second], rtol=1e-3, atol=1e-3)
    assert found.method == "donor" and torch.equal(rows, found.outputs(table, 1))
    plain = map_vocabulary(source, SIZE).embeddings(table, 1)
    assert torch.equal(rows[shared], plain[shared])


def _word_level() -> Tokenizer:
    return Tokenizer(WordLevel({"a": 0}, unk_token="a"))


def _without_bytes() -> Tokenizer:
    return Tokenizer(BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))


def _too_large() -> Tokenizer:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(f"word{n}") for n in range(ROWS)])
    return tokenizer


@pytest.mark.parametrize(
    "make, message",
    [
        (_word_level, "model.type is WordLevel. Use a model with byte-pair encoding"),
        (_without_bytes, "neither pre_tokenizer nor decoder is ByteLevel"),
        (_too_large, "has no row in the embeddings, which have 600"),
    ],
)
def test_another_tokenizer_is_refused(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(Permanent, match=message):
        loaded(make(), tmp_path)


def test_an_added_word_is_a_token(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("pond")])
    own = loaded(tokenizer, tmp_path)
    assert own.pieces(b"pond") == [tokenizer.token_to_id("pond")]
