"""Questions are a function of the seed; figures equal those computed by hand."""

import json
import math
import tomllib
import unicodedata
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes.completions import ANALYSIS, ASSISTANT, FINAL_END, FINAL_RETURN, ids
from tests.fakes.students import new_seed
from vpmoe.api import DistillRun
from vpmoe.data import canary, vocabulary, vocabulary_file
from vpmoe.evaluation import measures, questions
from vpmoe.failure import Permanent
from vpmoe.rollout import evaluation_record
from vpmoe.rollout.validity import VALIDITIES
from vpmoe.storage import Bucket
from vpmoe.trainer.data.held_out import held_out_rows

ROOT = Path(__file__).parents[3]


def random_lengths(random: np.random.Generator, parts: int) -> list[np.ndarray]:
    return [random.integers(1, 65, random.integers(0, 30)).astype(np.int32) for _ in range(parts)]


def test_held_out_documents_equal_the_trainers() -> None:
    random = np.random.default_rng(new_seed())
    for documents in (1, 7, 1000):
        lengths = [*random_lengths(random, 4), np.array([5], np.int32)]
        rows = held_out_rows(lengths, documents, 1234, 64)
        assert sorted(questions.held_out_documents(lengths, documents, 1234)) == sorted(
            document for row in rows for document in row
        )


def test_each_document_is_sampled_at_each_effort() -> None:
    lengths = [np.array([9, 8, 7], np.int32), np.array([6, 5], np.int32)]
    sampling_questions = questions.sampling_questions(lengths, 12, 1234)
    assert [one.effort for one in sampling_questions] == ["low", "medium", "high"] * 4
    assert (
        [one.document for one in sampling_questions[::3]]
        == [one.document for one in sampling_questions[1::3]]
        == [one.document for one in sampling_questions[2::3]]
    )
    assert [one.document for one in sampling_questions[::3]] == questions.held_out_documents(lengths, 4, 1234)
    assert sampling_questions[:7] == questions.sampling_questions(lengths, 7, 1234)[:7], (
        "more completions only add questions"
    )
    assert questions.sampling_questions(lengths, 7, 1235)[0].seed != sampling_questions[0].seed


def test_too_few_documents_are_repeated_with_other_seeds() -> None:
    sampling_questions = questions.sampling_questions([np.array([9, 8], np.int32)], 100, 7)
    assert set(Counter(one.document for one in sampling_questions).values()) <= {48, 49, 50, 51, 52}
    assert Counter(one.effort for one in sampling_questions) == {"low": 34, "medium": 33, "high": 33}
    assert len({one.seed for one in sampling_questions}) == 100 and all(
        0 <= one.seed < 1 << 63 for one in sampling_questions
    )
    with pytest.raises(ValueError, match="no document"):
        questions.sampling_questions([np.array([], np.int32)], 1, 7)
    assert questions.sampling_questions([np.array([], np.int32)], 0, 7) == []


def test_a_request_seed_has_its_recorded_value() -> None:
    """Otherwise a run that resumes with newer code would compare its stages on different samples."""
    assert questions.request_seed(1234, 0) == 5724229415998475180


@pytest.mark.parametrize(
    "stage, low",
    [
        pytest.param("first", 11, id="the-next"),
        pytest.param("second", 11, id="its-own"),
        pytest.param("third", 22, id="the-next-of-two"),
        pytest.param("fourth", 22, id="its-own-of-two"),
        pytest.param("fifth", 22, id="the-previous"),
    ],
)
def test_completion_limits_are_those_of_an_on_policy_stage(
    run_spec: dict[str, Any], stage: str, low: int
) -> None:
    def on_policy(name: str, low: int) -> dict[str, Any]:
        settings = {
            "optimizer": {"minLearningRate": 1e-6},
            "require": {"validity": 0},
            "rollout": {"maxTokens": {"low": low}},
        }
        return {"name": name, "kind": "OnPolicy", "tokens": 4096, **settings}

    spec = run_spec["spec"]
    spec["student"]["gpus"] = 2
    vanilla = [{"name": name, "kind": "Vanilla", "tokens": 4096} for name in ("first", "third", "fifth")]
    spec["stages"] = [vanilla[0], on_policy("second", 11), vanilla[1], on_policy("fourth", 22), vanilla[2]]
    assert questions.completion_limits(DistillRun.parse(run_spec), stage).low == low
    spec["stages"] = vanilla
    assert questions.completion_limits(DistillRun.parse(run_spec), "first").low == 1024


def test_validity_and_lengths_are_counted_by_effort() -> None:
    """The validity of single completions is tested in test_prompts.py."""
    answers = [
        ("low", ANALYSIS + ASSISTANT + FINAL_RETURN),
        ("low", FINAL_RETURN),
        ("low", FINAL_END),
        ("high", "<|channel|>analysis<|message|>hm<|return|>"),
        ("high", ANALYSIS + "<|return|>"),
        ("high", FINAL_END + ASSISTANT + FINAL_RETURN),
        ("high", ANALYSIS + ASSISTANT + FINAL_RETURN),
    ]
    found = measures.measure_efforts((effort, ids(text)) for effort, text in answers)
    assert list(found) == ["low", "high"], "an effort without completions has no counts"
    assert found["low"].validity == dict.fromkeys(VALIDITIES, 0) | {"valid": 2, "truncated": 1}
    assert found["high"].validity == {
        "valid": 1,
        "noFinal": 1,
        "unclosedReasoning": 1,
        "wrongOrder": 1,
        "truncated": 0,
    }
    low_lengths = [len(ids(text)) for effort, text in answers if effort == "low"]
    assert (found["low"].mean_tokens, found["low"].most_tokens) == (sum(low_lengths) / 3, max(low_lengths))
    assert measures.total_validity(found.values()) == {
        "valid": 3,
        "noFinal": 1,
        "unclosedReasoning": 1,
        "wrongOrder": 1,
        "truncated": 1,
    }
    assert evaluation_record.valid_share(found["low"].validity) == 2 / 3
    assert measures.total_validity([]) == {}


def test_the_loss_is_the_mean_over_all_tokens_of_a_span() -> None:
    sums = measures.SpanSums()
    sums.add(np.array([np.nan, -1.0, -2.0, -4.0], np.float32), np.array([0, 1, 1, 2], np.uint8))
    sums.add(np.array([-8.0], np.float32), np.array([1], np.uint8))
    assert sums.loss().dump() == {"reasoning": (1 + 2 + 8) / 3, "final": 4.0}
    assert measures.SpanSums().loss().dump() == {}


@pytest.mark.parametrize("worst", [-math.inf, math.nan, math.inf])
def test_a_log_probability_that_is_not_finite_is_an_error(worst: float) -> None:
    logp = np.array([-1.0, worst], np.float32)
    with pytest.raises(Permanent, match=r"NonFinite: the held-out loss.*log-probability -?(inf|nan)"):
        measures.SpanSums().add(logp, np.array([1, 2], np.uint8))
    with pytest.raises(Permanent, match=r"NonFinite: the canary"):
        measures.total_bits(logp)


@given(st.integers(0, 200), st.integers(2, 70))
def test_every_token_of_a_text_is_scored_once_after_at_least_half_a_window(tokens: int, length: int) -> None:
    found = canary.split_windows(tokens, length)
    counted = [token for window in found for token in range(window.first, window.stop)]
    assert counted == list(range(1, tokens))
    for window in found:
        assert 0 <= window.start < window.first < window.stop <= window.start + length
        assert window.start == 0 or window.first - window.start >= length // 2


def test_the_canary_is_a_text_or_a_folder_of_texts(bucket: Bucket) -> None:
    texts = {
        "canary.txt": "A pond.",
        "canary.txt.old": "no",
        "canary/b.txt": "≈ 3 m <|end|>",
        "canary/deep/a": "ab",
        "canary/none": "",
    }
    for key, text in texts.items():
        bucket.put_bytes(key, text.encode(), {})
    (single,) = canary.read_texts(f"s3://{bucket.name}/canary.txt", bucket)
    assert (
        single.size == len(b"A pond.") - len(b"A")
        and vocabulary_file.encoding().decode(single.ids_T.tolist()) == "A pond."
    )
    found = canary.read_texts(f"s3://{bucket.name}/canary/", bucket)
    assert [vocabulary_file.encoding().decode(text.ids_T.tolist()) for text in found] == [
        "≈ 3 m <|end|>",
        "ab",
        "",
    ]
    assert max(found[0].ids_T) < vocabulary.TEXT_IDS, "special tokens in a text are encoded as text"
    assert [text.size for text in found] == [len("≈ 3 m <|end|>".encode()) - len("≈".encode()), 0, 0]
    digest = canary.texts_digest(found)
    bucket.put_bytes("canary/b.txt", b"another text", {})
    assert canary.texts_digest(canary.read_texts(f"s3://{bucket.name}/canary", bucket)) != digest


def test_the_packaged_canary_is_prompts_and_texts_in_several_languages(bucket: Bucket) -> None:
    stored = json.loads((files("vpmoe.data") / "canary.json").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert stored["licence"] == project["license"], "the texts have the licence of the code"
    written = [text for kind in ("prompts", "texts") for of in stored[kind].values() for text in of]
    assert len(set(written)) == len(written) and all(text == text.strip() for text in written[:33])
    counts = [sum(map(len, stored[kind].values())) for kind in ("prompts", "texts")]
    assert counts == [33, 15] and set(stored["prompts"]) == set(stored["texts"])
    scripts = {unicodedata.name(text[0]).split()[0] for text in written}
    assert {"LATIN", "CYRILLIC", "ARABIC", "CJK"} <= scripts and len(stored["prompts"]) == 11
    found = canary.load_texts(None, bucket)
    assert [vocabulary_file.encoding().decode(text.ids_T.tolist()) for text in found] == written
    assert sum(len(text.ids_T) for text in found) < 2000, "it is measured often, so it is small"
    assert canary.texts_digest(found).startswith("a38eee201c4d44a1"), (
        "figures of different texts cannot be compared: changing one is a change for users (CHANGELOG.md)"
    )


@pytest.mark.parametrize(
    "key, data, message",
    [
        pytest.param(
            "other", b"text", "there is no text at s3://.*/canary. Put UTF-8 text there", id="no-object"
        ),
        pytest.param("canary", b"a", "there is no text at", id="one-token"),
        pytest.param("canary/x", b"\xff\xfe\x00", "/canary/x cannot be encoded as text", id="binary"),
    ],
)
def test_a_canary_that_is_not_text_is_rejected(bucket: Bucket, key: str, data: bytes, message: str) -> None:
    bucket.put_bytes(key, data, {})
    with pytest.raises(Permanent, match=f"evaluation.canary: .*{message}"):
        canary.read_texts(f"s3://{bucket.name}/canary", bucket)
