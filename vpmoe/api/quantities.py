"""Token counts, durations and Kubernetes quantities as text, and the types of the fields that hold them.

In Python a field holds a plain int (tokens or seconds). A duration is serialized as its shortest text.
"""

import re
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from typing import Annotated, Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from vpmoe.api.base import cel_string, invalid_text

MOST_TOKENS = 10**15
"""Largest token count: far below 2^53, above which CEL's doubles and JSON's numbers are not exact."""

TOKENS_WORDS = 'must be a whole number of tokens, such as 1000000, "1_000_000", "500k", "20M" or "1.5B"'
DURATION_WORDS = 'must be a duration such as "90s", "15m", "1h30m" or "7d"'
QUANTITY_WORDS = 'must be a quantity such as 4, "500m" or "64Gi"'

_TOKENS = r"[0-9][0-9_]*(\.[0-9]+)?[kKMBT]?"
_ZEROS = {"k": 3, "K": 3, "M": 6, "B": 9, "T": 12}
_DURATION = r"([0-9]+d)?([0-9]+h)?([0-9]+m)?([0-9]+s)?"
_QUANTITY = r"[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei|e[0-9]+)?"
_UNITS = {
    "": 1.0,
    "m": 1e-3,
    **{unit: 1000.0**power for power, unit in enumerate("kMGTPE", 1)},
    **{f"{unit}i": 1024.0**power for power, unit in enumerate("KMGTPE", 1)},
}
"""Suffix of a Kubernetes quantity → its factor."""
_LONGEST = 24
_CENTURY = 36_525 * 86_400
_SECONDS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}


def parse_tokens(value: object) -> int:
    """A token count from a whole number, or from a text with k, M, B or T for 10^3, 10^6, 10^9, 10^12.

    Raises ValueError, which says what to write, for anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(TOKENS_WORDS)
    if isinstance(value, str):
        if len(value) > _LONGEST or re.fullmatch(_TOKENS, value) is None:
            raise ValueError(TOKENS_WORDS)
        number = Decimal(value.rstrip("kKMBT")).scaleb(_ZEROS.get(value[-1], 0))
    else:
        number = Decimal(value)
    if not number.is_finite() or number != number.to_integral_value():
        raise ValueError(TOKENS_WORDS)
    return int(number)


def format_tokens(count: int) -> str:
    """The shortest text that parse_tokens reads as exactly `count`: 1500000 is "1.5M", 1001 is "1001"."""
    for suffix, zeros in (("T", 12), ("B", 9), ("M", 6), ("k", 3)):
        if count >= 10**zeros and count % 10 ** (zeros - 3) == 0:
            return f"{Decimal(count).scaleb(-zeros).normalize():f}{suffix}"
    return str(count)


def format_count(value: float) -> str:
    """A count with three digits, for people: 1234567 is "1.23M", 10^15 is "1,000T"."""
    rounded = Decimal(f"{value:.3g}")
    if 0 < rounded < 1:
        return "<1"
    return f"{rounded.scaleb(-12):,.0f}T" if rounded >= 10**15 else format_tokens(int(rounded))


def parse_duration(value: object) -> int:
    """Seconds in a text such as "1h30m", with d, h, m, s in this order. Raises ValueError, which says what to
    write."""
    if (
        not isinstance(value, str)
        or not value
        or len(value) > _LONGEST
        or re.fullmatch(_DURATION, value) is None
    ):
        raise ValueError(DURATION_WORDS)
    return sum(int(number) * _SECONDS[unit] for number, unit in re.findall(r"([0-9]+)([dhms])", value))


def format_duration(seconds: int) -> str:
    """The text that parse_duration reads as `seconds`: 5400 is "1h30m", 0 is "0s"."""
    parts = []
    for unit, size in _SECONDS.items():
        count, seconds = divmod(seconds, size)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts) or "0s"


def as_timedelta(seconds: int) -> timedelta:
    """A duration for sums with times of today. One above a century, which the API allows, is a century: no
    datetime is after the year 9999."""
    return timedelta(seconds=min(seconds, _CENTURY))


def parse_quantity(text: str) -> float:
    """The number of a Kubernetes quantity: "500m" is 0.5, "4" is 4, "1Ki" is 1024. Raises ValueError."""
    if re.fullmatch(_QUANTITY, text) is None:
        raise ValueError(f"{text!r} {QUANTITY_WORDS}")
    number = re.match(r"[0-9.]+(e[0-9]+)?", text)
    assert number is not None
    return float(number[0]) * _UNITS[text[number.end() :]]


def cel_is_tokens(value: str) -> str:
    """CEL that is true if `value`, an int-or-string, has the form of a token count."""
    return f"(type({value}) == int || {value}.matches({cel_string(f'^{_TOKENS}$')}))"


def cel_tokens(value: str) -> str:
    """CEL for the token count, as a double, of `value`, an int-or-string for which cel_is_tokens holds."""
    text = f"string({value}).replace('_', '')"
    for suffix, zeros in _ZEROS.items():
        text += f".replace('{suffix}', 'e{zeros}')"
    return f"double({text})"


@dataclass(frozen=True)
class TokenCount:
    """Annotation of an int field that holds tokens: int-or-string in the CRD, parsed and bounded in
    Python."""

    least: int

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._parse, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        well_formed, count = cel_is_tokens("self"), cel_tokens("self")
        return {
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "x-kubernetes-int-or-string": True,
            "maxLength": _LONGEST,
            "x-kubernetes-validations": [
                {
                    "rule": f"{well_formed} && "
                    f"({count} > {MOST_TOKENS}.0 || {count} == double(int({count})))",
                    "message": TOKENS_WORDS,
                },
                {
                    "rule": f"!{well_formed} || ({count} >= {self.least}.0 && {count} <= {MOST_TOKENS}.0)",
                    "message": self._bounds(),
                },
            ],
        }

    def _bounds(self) -> str:
        return f"must be from {self.least} to {MOST_TOKENS} tokens"

    def _parse(self, value: object) -> int:
        try:
            count = parse_tokens(value)
        except ValueError as error:
            raise invalid_text(str(error)) from None
        if not self.least <= count <= MOST_TOKENS:
            raise invalid_text(self._bounds())
        return count


class DurationText:
    """Annotation of an int field that holds seconds and is written as a duration such as "15m"."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        write = core_schema.plain_serializer_function_ser_schema(format_duration)
        return core_schema.no_info_before_validator_function(
            self._parse, handler(source), serialization=write
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        rule = f"self != '' && self.matches({cel_string(f'^{_DURATION}$')})"
        rules = [{"rule": rule, "message": DURATION_WORDS}]
        return {"type": "string", "unit": "seconds", "maxLength": _LONGEST, "x-kubernetes-validations": rules}

    def _parse(self, value: object) -> int:
        try:
            return parse_duration(value)
        except ValueError as error:
            raise invalid_text(str(error)) from None


class QuantityText:
    """Annotation of a str field that holds a Kubernetes quantity. A whole number is converted to text."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._parse, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        rule = f"type(self) == int ? self >= 0 : self.matches({cel_string(f'^{_QUANTITY}$')})"
        return {
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "x-kubernetes-int-or-string": True,
            "maxLength": _LONGEST,
            "x-kubernetes-validations": [{"rule": rule, "message": QUANTITY_WORDS}],
        }

    def _parse(self, value: object) -> str:
        text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
        if not isinstance(text, str) or len(text) > _LONGEST or re.fullmatch(_QUANTITY, text) is None:
            raise invalid_text(QUANTITY_WORDS)
        return text


Tokens = Annotated[int, TokenCount(least=1)]
"""A number of tokens, at least 1."""

TokensOrNone = Annotated[int, TokenCount(least=0)]
"""A number of tokens that may be 0."""

Duration = Annotated[int, DurationText()]
"""A duration in seconds, written as "15m"."""
