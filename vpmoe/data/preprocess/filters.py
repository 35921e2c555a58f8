"""Decides which rows are not worth training on, and why. Pure: takes a row's texts, returns the reason or
None.

Rows that cannot be decoded are handled in text.py; how many of the remaining rows are kept is decided in
sampling.py.
"""

import re
from dataclasses import dataclass
from typing import Literal

from vpmoe.data.preprocess.single_value import certainly_differ, read_value

Dropped = Literal["blankAnswer", "failedGeneration", "contradictedResult", "notSampled", "tooLong"]
"""The reasons for dropping a readable row, counted in the manifest. The first that applies, in this order,
counts."""

FAILED = re.compile(r"result\s*:\s*failed after maximum attempts", re.IGNORECASE)
FIELD = re.compile(r"[\s*•-]*(?P<key>[^\W\d](?:[^\W\d]|[ -]){0,40}?)[\s*]*:[\s*]*(?P<value>.*)")
LIST_START = re.compile(r"[*_]*(?:#+\s+[*_]*[01ai][.):]?|[(\[]?[01ai][.):])[*_]*", re.IGNORECASE)
"""A line that may be the mark of a list's first item if others follow: `1.`, `A)`, `# 1`."""


@dataclass(frozen=True)
class Contradiction:
    """The result of a row's own check, and the first line of its answer, which is another value."""

    result: str
    answer: str


def quality(answer: str | None, constraints: str | None) -> Dropped | None:
    """Why a row is not worth training on: no answer, a failed generation, or an answer that contradicts the
    row's own check."""
    if answer is None or not answer.strip():
        return "blankAnswer"
    if constraints is None:
        return None
    if FAILED.search(constraints):
        return "failedGeneration"
    return "contradictedResult" if contradiction(constraints, answer) else None


def contradiction(constraints: str, answer: str) -> Contradiction | None:
    """The contradiction between a row's check and its answer; None if there is none, or it is not certain.

    It is certain if the constraints are fields (`attempts: 3`) of which one is the `result`, the result and
    the first line of the answer are each one number or one option letter alone, in any usual notation
    (single_value.py), and no other line of the answer is one that may be the result. Constraints that contain
    prose are evidence, and prove nothing.
    """
    if (result := stated_result(constraints)) is None or (expected := read_value(result)) is None:
        return None
    first, *others = answer.strip().splitlines() or [""]
    if not certainly_differ(expected, read_value(first)) or (others and LIST_START.fullmatch(first.strip())):
        return None
    if any(value and not certainly_differ(expected, value) for value in map(read_value, others)):
        return None
    return Contradiction(result, first.strip())


def stated_result(constraints: str) -> str | None:
    """The value of the field `result`. None if there is not exactly one, or anything is not a field.

    Fields are separated by line ends or semicolons.
    """
    results = []
    for line in filter(str.strip, constraints.splitlines()):
        fields: list[tuple[str, str]] = []
        for text in line.split(";"):
            if found := FIELD.fullmatch(text):
                fields.append((found["key"], found["value"]))
            elif not fields:
                return None
            elif text.strip():  # the semicolon was part of the value
                fields[-1] = (fields[-1][0], f"{fields[-1][1]};{text}")
        results += [value.strip() for key, value in fields if key.strip().casefold() == "result"]
    return results[0] if len(results) == 1 else None
