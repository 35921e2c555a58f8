"""Which documents are scored: within the budget, balanced over language and exercise, the same for every
worker."""

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


def part(*documents: tuple[tuple[str, str], int, int]) -> subset.DocumentLabels:
    """A part with the documents (label, reasoning tokens, final tokens)."""
    rows = [
        {"language": of[0], "exercise": of[1], "reasoning": reasoning, "final": final}
        for of, reasoning, final in documents
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
    """For each part, the numbers of the documents that are picked."""
    return [
        np.flatnonzero(of_part).tolist()
        for of_part in subset.pick_documents(parts, Subset.model_validate({"fraction": 1.0} | fields), seed)
    ]


ONE = [part((EN, 10, 10), (EN, 40, 10), (FR, 30, 10)), part((EN, 20, 10), (FR, 0, 10), (NONE, 5, 5))]
"""160 assistant tokens: en 20 + 50 + 30, fr 40 + 10, unknown 10."""


@pytest.mark.parametrize(
    "fields, expected",
    [
        pytest.param({}, [[0, 1, 2], [0, 1, 2]], id="all"),
        pytest.param({"tokens": 90}, [[2], [2]], id="tokens-balanced"),
        pytest.param({"fraction": 0.57}, [[2], [2]], id="fraction"),
        pytest.param({"fraction": 0.57, "tokens": 10_000}, [[2], [2]], id="the-smaller-of-both"),
        pytest.param({"tokens": 110}, [[1, 2], [1, 2]], id="what-a-small-group-leaves-goes-to-the-others"),
        pytest.param({"languages": ["fr"]}, [[2], [1]], id="listed-language"),
        pytest.param({"exercises": ["unknown"]}, [[], [2]], id="unknown-is-a-value"),
        pytest.param({"exercises": ["mcq"], "languages": ["en"], "tokens": 80}, [[1], [0]], id="both-lists"),
        pytest.param({"exercises": ["cooking"]}, [[], []], id="none-of-that"),
        pytest.param({"tokens": 9}, [[], []], id="nothing-fits"),
        pytest.param(
            {"tokens": 89, "languages": ["en"]}, [[1], [0]], id="the-first-that-does-not-fit-ends-the-group"
        ),
    ],
)
def test_what_is_picked(fields: dict[str, Any], expected: list[list[int]]) -> None:
    assert picked(ONE, **fields) == expected


def test_equal_documents_come_in_their_place() -> None:
    parts = [part((EN, 5, 5), (EN, 5, 5)), part((EN, 5, 5), (EN, 5, 5))]
    assert picked(parts, tokens=30) == [[0, 1], [0]]


def test_a_document_without_labels_belongs_to_unknown() -> None:
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


def test_a_seeded_order_is_of_the_data_set_and_of_the_place_in_it() -> None:
    many = [part(*[(EN, 5, 5)] * 50) for _ in range(3)]
    first = picked(many, prefer="none", tokens=500)
    assert sum(map(len, first)) == 50
    assert (
        first == picked(many, prefer="none", tokens=500) != picked(many, seed="e", prefer="none", tokens=500)
    )
    assert len({tuple(of_part) for of_part in first}) == 3, "each part has an order of its own"
    assert set(first[0]) <= set(picked(many, prefer="none", tokens=700)[0]), "a larger budget only adds"


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
def test_the_invariants_hold(rows: list[list[Any]], chosen: Subset) -> None:
    parts = [part(*of_part) for of_part in rows]
    result = subset.pick_documents(parts, chosen, "d")
    assert [len(of_part) for of_part in result] == [len(of_part) for of_part in rows]
    all_documents = [
        (place, number, *row) for place, of_part in enumerate(rows) for number, row in enumerate(of_part)
    ]
    taken = {(place, number) for place, number, *_ in all_documents if result[place][number]}
    budget = min(
        chosen.tokens, int(chosen.fraction * sum(reasoning + final for *_, reasoning, final in all_documents))
    )
    tokens: Counter[Any] = Counter()
    for place, number, label, reasoning, final in all_documents:
        if (place, number) in taken:
            assert subset.is_eligible(label, chosen), "only listed exercises and languages are picked"
            tokens[label] += reasoning + final
    assert tokens.total() <= budget, "the documents picked have at most the budget"
    groups = sorted({label for *_, label, _, _ in all_documents if subset.is_eligible(label, chosen)})
    supply = [sum(r + f for *_, label, r, f in all_documents if label == group) for group in groups]
    shares = dict(zip(groups, subset.share_budget(supply, budget), strict=True))
    for group in groups:
        ordered = [row for row in all_documents if row[2] == group]
        if chosen.prefer == "longReasoning":
            ordered.sort(key=lambda row: -row[3])
            flags = [row[:2] in taken for row in ordered]
            assert flags == sorted(flags, reverse=True), (
                "a document is picked only if all before it in its group's order are"
            )
            rest = [row for row in ordered if row[:2] not in taken]
            assert not rest or tokens[group] + rest[0][3] + rest[0][4] > shares[group], (
                "the next one did not fit"
            )


@given(st.lists(st.integers(0, 100), max_size=12), st.integers(0, 500))
def test_no_group_gets_more_than_its_share_while_another_has_less_and_wants_more(
    supply: list[int], budget: int
) -> None:
    given = subset.share_budget(supply, budget)
    assert sum(given) == min(budget, sum(supply))
    assert all(0 <= share <= most for share, most in zip(given, supply, strict=True))
    hungry = [share for share, most in zip(given, supply, strict=True) if share < most]
    assert not hungry or max(given) - min(hungry) <= 1
