"""Subset of a Rescored stage: its documents fit the budget, are balanced over languages and exercises, and
are the same for every worker."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpmoe.api.stages import Subset
from vpmoe.teacher import subset

EN, FR, NONE = ("en", "mcq"), ("fr", "mcq"), ("unknown", "unknown")


def part(*documents: tuple[tuple[str | None, str | None], int, int]) -> subset.DocumentLabels:
    """The labels of a part with these documents (label, reasoning tokens, final tokens)."""
    rows = [
        {"language": label[0], "exercise": label[1], "reasoning": reasoning, "final": final}
        for label, reasoning, final in documents
    ]
    schema = pa.schema(
        [
            ("language", pa.string()),
            ("exercise", pa.string()),
            ("reasoning", pa.int32()),
            ("final", pa.int32()),
        ]
    )
    return subset.document_labels(pa.Table.from_pylist(rows, schema=schema))


def picked(parts: list[subset.DocumentLabels], seed: str = "d", **fields: Any) -> list[list[int]]:
    """The numbers of the picked documents of each part."""
    return [
        np.flatnonzero(of_part).tolist()
        for of_part in subset.pick_documents(parts, Subset.model_validate({"fraction": 1.0} | fields), seed)
    ]


PARTS = [part((EN, 10, 10), (EN, 40, 10), (FR, 30, 10)), part((EN, 20, 10), (FR, 0, 10), (NONE, 5, 5))]
"""160 assistant tokens: en 20 + 50 + 30, fr 40 + 10, unknown 10."""


@pytest.mark.parametrize("blank", [None, "", " ", "\t\n", "\u00a0", "\u3000"])
def test_every_blank_label_is_unknown(blank: str | None) -> None:
    found = part(
        ((blank, blank), 1, 1), (NONE, 1, 1), (("en", blank), 1, 1), ((" en ", "mcq"), 1, 1), (EN, 1, 1)
    )
    assert sorted(found.labels) == sorted({NONE, ("en", "unknown"), EN})
    assert [found.labels[index] for index in found.label_D] == [NONE, NONE, ("en", "unknown"), EN, EN]
    assert picked([found], exercises=["unknown"]) == [[0, 1, 2]]


@pytest.mark.parametrize(
    "fields, expected",
    [
        pytest.param({}, [[0, 1, 2], [0, 1, 2]], id="all"),
        pytest.param({"tokens": 90}, [[2], [2]], id="tokens-balanced"),
        pytest.param({"fraction": 0.57}, [[2], [2]], id="fraction"),
        pytest.param({"fraction": 0.57, "tokens": 10_000}, [[2], [2]], id="smaller-of-fraction-and-tokens"),
        pytest.param({"tokens": 110}, [[1, 2], [1, 2]], id="others-get-what-a-small-group-leaves"),
        pytest.param({"languages": ["fr"]}, [[2], [1]], id="listed-language"),
        pytest.param({"exercises": ["unknown"]}, [[], [2]], id="unknown-is-a-value"),
        pytest.param({"exercises": ["mcq"], "languages": ["en"], "tokens": 80}, [[1], [0]], id="both-lists"),
        pytest.param({"exercises": ["cooking"]}, [[], []], id="no-such-exercise"),
        pytest.param({"tokens": 9}, [[], []], id="nothing-fits"),
        pytest.param(
            {"tokens": 89, "languages": ["en"]}, [[1], [0]], id="the-first-that-does-not-fit-ends-the-group"
        ),
    ],
)
def test_picked_documents(fields: dict[str, Any], expected: list[list[int]]) -> None:
    assert picked(PARTS, **fields) == expected


def test_equal_documents_are_picked_in_dataset_order() -> None:
    parts = [part((EN, 5, 5), (EN, 5, 5)), part((EN, 5, 5), (EN, 5, 5))]
    assert picked(parts, tokens=30) == [[0, 1], [0]]


def test_missing_labels_are_unknown() -> None:
    table = pa.table(
        {
            "language": pa.array(["en", None, None], pa.string()),
            "exercise": pa.array([None, "mcq", None], pa.string()),
            "reasoning": pa.array([1, 2, 3], pa.int32()),
            "final": pa.array([1, 1, 1], pa.int32()),
        }
    )
    found = subset.document_labels(table)
    assert [found.labels[label] for label in found.label_D] == [
        ("en", "unknown"),
        ("unknown", "mcq"),
        ("unknown", "unknown"),
    ]
    assert found.assistant_D.tolist() == [2, 3, 4]


def test_the_seeded_order_depends_on_the_dataset_and_the_part() -> None:
    parts = [part(*[(EN, 5, 5)] * 50) for _ in range(3)]
    first = picked(parts, prefer="none", tokens=500)
    assert sum(map(len, first)) == 50
    assert (
        first
        == picked(parts, prefer="none", tokens=500)
        != picked(parts, seed="e", prefer="none", tokens=500)
    )
    assert len({tuple(of_part) for of_part in first}) == 3, "the order differs between parts"
    assert set(first[0]) <= set(picked(parts, prefer="none", tokens=700)[0]), (
        "a larger budget only adds documents"
    )


labels = st.sampled_from([("en", "mcq"), ("en", "rag"), ("fr", "mcq"), ("unknown", "rag")])
documents = st.lists(st.tuples(labels, st.integers(0, 30), st.integers(1, 20)), max_size=25)
subsets = st.builds(
    Subset,
    tokens=st.integers(1, 600),
    fraction=st.floats(0.01, 1),
    prefer=st.sampled_from(["longReasoning", "none"]),
    exercises=st.sampled_from([(), ("mcq",), ("rag", "cooking")]),
    languages=st.sampled_from([(), ("en",)]),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(documents, min_size=1, max_size=4), subsets)
def test_invariants_of_any_subset(rows: list[list[Any]], subset_settings: Subset) -> None:
    parts = [part(*of_part) for of_part in rows]
    result = subset.pick_documents(parts, subset_settings, "d")
    assert [len(of_part) for of_part in result] == [len(of_part) for of_part in rows]
    all_documents = [
        (place, number, *row) for place, of_part in enumerate(rows) for number, row in enumerate(of_part)
    ]
    chosen = {(place, number) for place, number, *_ in all_documents if result[place][number]}
    budget = min(
        subset_settings.tokens,
        int(subset_settings.fraction * sum(reasoning + final for *_, reasoning, final in all_documents)),
    )
    tokens: Counter[Any] = Counter()
    for place, number, label, reasoning, final in all_documents:
        if (place, number) in chosen:
            assert subset.is_eligible(label, subset_settings), (
                "only documents of listed exercises and languages are picked"
            )
            tokens[label] += reasoning + final
    assert tokens.total() <= budget, "the picked documents fit the budget"
    groups = sorted(
        {label for *_, label, _, _ in all_documents if subset.is_eligible(label, subset_settings)}
    )
    supply = [sum(r + f for *_, label, r, f in all_documents if label == group) for group in groups]
    shares = dict(zip(groups, subset.share_budget(supply, budget), strict=True))
    for group in groups:
        ordered = [row for row in all_documents if row[2] == group]
        if subset_settings.prefer == "longReasoning":
            ordered.sort(key=lambda row: -row[3])
            flags = [row[:2] in chosen for row in ordered]
            assert flags == sorted(flags, reverse=True), (
                "a document is picked only if all documents before it in its group's order are"
            )
            rest = [row for row in ordered if row[:2] not in chosen]
            assert not rest or tokens[group] + rest[0][3] + rest[0][4] > shares[group], (
                "the next document did not fit"
            )


@given(st.lists(st.integers(0, 100), max_size=12), st.integers(0, 500))
def test_shares_of_the_budget_are_as_equal_as_the_supply_allows(supply: list[int], budget: int) -> None:
    shares = subset.share_budget(supply, budget)
    assert sum(shares) == min(budget, sum(supply))
    assert all(0 <= share <= available for share, available in zip(shares, supply, strict=True))
    unsatisfied = [share for share, available in zip(shares, supply, strict=True) if share < available]
    assert not unsatisfied or max(shares) - min(unsatisfied) <= 1
