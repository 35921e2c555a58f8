"""Reasoning efforts, and texts that say how often each of them occurs: "high", or
"low=0.3,medium=0.4,high=0.3".

A text and not a mapping, because the field that holds it also accepts the name of one effort: a CRD has no
type for "a string or an object", and the API server checks no rule of a field without a type.
"""

import re
from collections.abc import Mapping
from fractions import Fraction
from functools import cache
from typing import Annotated, Any, Literal, get_args

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from vpmoe.api.base import cel_string, invalid_text

Effort = Literal["low", "medium", "high"]
EFFORTS: tuple[Effort, ...] = get_args(Effort)

EFFORT_WORDS = (
    "must be low, medium or high, or shares in this order with at most six decimals, such as "
    '"low=0.3,medium=0.4,high=0.3"'
)
SUM_WORDS = "has shares that do not add up to 1. Change them to add up to 1."

_LONGEST = 64
_MILLION = 1_000_000
_OFF = 1
"""Millionths by which the sum of the shares may differ from 1: three thirds with six decimals do."""
_SHARE = r"[01](\.[0-9]{1,6})?"
_PATTERN = (
    "low|medium|high|"
    rf"low={_SHARE}(,medium={_SHARE})?(,high={_SHARE})?|medium={_SHARE}(,high={_SHARE})?|high={_SHARE}"
)


class EffortText:
    """Annotation of a str field: an effort, or the share of each. Python has it in its shortest form."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._shortest, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        well_formed = f"self.matches({cel_string(f'^(?:{_PATTERN})$')})"
        millionths = f"self.split(',').map(p, int(double(p.split('=')[1]) * {_MILLION}.0 + 0.5)).sum()"
        adds_up = f"[{millionths}].all(t, t >= {_MILLION - _OFF} && t <= {_MILLION + _OFF})"
        return {
            "type": "string",
            "maxLength": _LONGEST,
            "x-kubernetes-validations": [
                {"rule": well_formed, "message": EFFORT_WORDS},
                {
                    "rule": f"!{well_formed} || !self.contains('=') || {adds_up}",
                    "message": SUM_WORDS,
                },
            ],
        }

    def _shortest(self, text: object) -> str:
        if not isinstance(text, str) or len(text) > _LONGEST or re.fullmatch(_PATTERN, text) is None:
            raise invalid_text(EFFORT_WORDS)
        if "=" not in text:
            return text
        written = _millionths(text)
        if abs(sum(written.values()) - _MILLION) > _OFF:
            raise invalid_text(SUM_WORDS)
        return _as_text(written)


EffortMix = Annotated[str, EffortText()]
"""An effort, or the share of each: "high", "low=0.3,medium=0.4,high=0.3"."""


@cache
def effort_shares(mix: str) -> Mapping[Effort, Fraction]:
    """The share of each effort that occurs in an EffortMix, in the order of EFFORTS. They add up to exactly
    1."""
    found = {effort: 1 for effort in EFFORTS if effort == mix} or _millionths(mix)
    return {effort: Fraction(share, sum(found.values())) for effort, share in found.items() if share}


def write_mix(shares: Mapping[Effort, Fraction]) -> str:
    """The EffortMix that is closest to shares that add up to 1: rounded to millionths that add up to 1."""
    exact = {effort: shares.get(effort, Fraction(0)) * _MILLION for effort in EFFORTS}
    rounded = {effort: int(share) for effort, share in exact.items()}
    largest_rest = sorted(EFFORTS, key=lambda effort: rounded[effort] - exact[effort])
    for effort in largest_rest[: _MILLION - sum(rounded.values())]:
        rounded[effort] += 1
    return _as_text(rounded)


def most_frequent(mix: str) -> Effort:
    """The effort with the largest share of an EffortMix; of equal shares, the higher effort."""
    shares = effort_shares(mix)
    return max(shares, key=lambda effort: (shares[effort], EFFORTS.index(effort)))


def _millionths(mix: str) -> dict[Effort, int]:
    """The shares of a text that has them."""
    pairs = dict(share.split("=") for share in mix.split(","))
    return {effort: int(Fraction(pairs.get(effort, "0")) * _MILLION) for effort in EFFORTS}


def _as_text(millionths: Mapping[Effort, int]) -> str:
    """The shortest text; the name alone of an effort that is the only one."""
    found = [(effort, share) for effort, share in millionths.items() if share]
    if len(found) == 1:
        return found[0][0]
    decimals = {effort: f"{share // _MILLION}.{share % _MILLION:06d}".rstrip("0") for effort, share in found}
    return ",".join(f"{effort}={share}" for effort, share in decimals.items())
