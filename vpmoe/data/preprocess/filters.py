"""Decides which rows are not worth training on, and why. Pure: takes a row's texts, returns the reason or
None.

Rows that cannot be decoded are handled in text.py; how many of the remaining rows are kept is decided in
sampling.py.
"""

import re
from typing import Literal

Dropped = Literal["blankAnswer", "failedGeneration", "contradictedResult", "notSampled", "tooLong"]
"""The reasons for dropping a readable row, counted in the manifest. The first that applies, in this order,
counts."""

FAILED = re.compile(r"result\s*:\s*failed after maximum attempts", re.IGNORECASE)
RESULT = re.compile(r"\bresult\s*:[ \t]*([^\n;]*)", re.IGNORECASE)

CHOICE = r"\(?([A-J])\)?"
CHOICE_ALONE = re.compile(rf"{CHOICE}[.):]?", re.IGNORECASE)
CHOICE_FIRST = re.compile(rf"{CHOICE}(?:[.):,–—]|\s-|\s*$)")
CHOICE_NAMED = re.compile(rf"\b(?:answer|option|choice)\b(?:\s+is)?\s*:?\s*{CHOICE}(?![\w'’])", re.IGNORECASE)
MARKDOWN = re.compile(r"[*_`#>$\\]|boxed|[{}]")
NUMBER = re.compile(r"[-+−]?\d+(?:[.,]\d+)*")
NUMBER_ALONE = re.compile(rf"[€£]?\s*({NUMBER.pattern})\s*[%€£]?\.?")


def quality(answer: str | None, constraints: str | None) -> Dropped | None:
    """Why a row is not worth training on: no answer, a failed generation, or an answer that contradicts the
    row's own check."""
    if answer is None or not answer.strip():
        return "blankAnswer"
    if constraints is None:
        return None
    if FAILED.search(constraints):
        return "failedGeneration"
    return "contradictedResult" if contradicted(constraints, answer) else None


def contradicted(constraints: str, answer: str) -> bool:
    """Whether a `result:` line of the constraints is a choice or a number, and the first line of the answer
    has a different one.

    Only certain contradictions count. There is none if the result is neither one letter nor one number, or if
    the first line of the answer has no letter or number: constraints also contain prose (RAG evidence), and
    answers may begin with a sentence.
    """
    line = MARKDOWN.sub("", answer.strip().partition("\n")[0]).strip()
    return any(
        _contradicts(MARKDOWN.sub("", found.group(1)).strip(), line) for found in RESULT.finditer(constraints)
    )


def _contradicts(result: str, line: str) -> bool:
    if expected := CHOICE_ALONE.fullmatch(result):
        given = _choice(line)
        return given is not None and given != expected[1].upper()
    if number := NUMBER_ALONE.fullmatch(result):
        values = [_readings(text) for text in NUMBER.findall(line)]
        return bool(values) and not any(_readings(number[1]) & value for value in values)
    return False


def _choice(line: str) -> str | None:
    """The letter that a line chooses: `B`, `B) Paris`, `Answer: B`, `The correct option is (B)`; None for `A
    good start`."""
    found = CHOICE_FIRST.match(line) or CHOICE_NAMED.search(line)
    return found[1].upper() if found else None


def _readings(text: str) -> set[float]:
    """The possible values of a number, because separators differ by country: `1,234` is 1234 or 1.234."""
    text = text.replace("−", "-")
    as_thousands = text.replace(",", ""), text.replace(".", "").replace(",", ".")
    return {round(float(reading), 9) for reading in as_thousands if reading.count(".") <= 1}
