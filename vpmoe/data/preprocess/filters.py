"""Which rows are not worth training on, and why. Pure: a row's texts in, the reason or None out.

How much of what is left is kept is sampling.py's business; a row that cannot be decoded never comes here (rows.py).
"""

import re
from typing import Literal

Dropped = Literal["blankAnswer", "failedGeneration", "contradictedResult", "notSampled", "tooLong"]
"""Every reason for which a readable row is left out; the manifest counts each. The first that holds, in this order."""

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
    """Why a row is not worth training on: no answer, a generation that was given up, an answer that its own check contradicts."""
    if answer is None or not answer.strip():
        return "blankAnswer"
    if constraints is None:
        return None
    if FAILED.search(constraints):
        return "failedGeneration"
    return "contradictedResult" if contradicted(constraints, answer) else None


def contradicted(constraints: str, answer: str) -> bool:
    """Whether a `result:` line of the constraints is a choice or a number that the first line of the answer gives otherwise.

    Only what is certain counts. A result that is neither one letter nor one number, or an answer whose first line names none, is
    not contradicted: constraints also carry prose (RAG evidence), and answers may open with a sentence.
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
    """The letter that a line answers with: `B`, `B) Paris`, `Answer: B`, `The correct option is (B)`; of `A good start`, none."""
    found = CHOICE_FIRST.match(line) or CHOICE_NAMED.search(line)
    return found[1].upper() if found else None


def _readings(text: str) -> set[float]:
    """The values that a number may have: separators mark thousands in one country and decimals in another. `1,234` is 1234 or 1.234."""
    text = text.replace("−", "-")
    as_thousands = text.replace(",", ""), text.replace(".", "").replace(",", ".")
    return {round(float(reading), 9) for reading in as_thousands if reading.count(".") <= 1}
