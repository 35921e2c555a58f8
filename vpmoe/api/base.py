"""What every model of the API is made of: strict fields, and rules between fields that Python and the API server both keep.

A rule is written once, with one wording; here it is evaluated in Python, and crd.py writes it into the CRD as CEL. What the rules
say is the business of the models that list them.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, model_validator
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

NO_TERMS: Mapping[str, str] = {}


@dataclass(frozen=True)
class Rule:
    """One sentence that must hold between the fields of a model.

    `broken(model, item)` gives the values of the message's {terms} where the sentence does not hold, otherwise None; `cel` is the
    same sentence for the API server (true where it holds) and `terms` the CEL of each {term}. With `each`, the
    sentence is about every item of that list, which CEL calls `s`; without, `item` is the model itself.
    """

    path: str
    """The field that the problem is reported at, relative to the model; "" is the model itself."""
    message: str
    cel: str
    broken: Callable[[Any, Any], Mapping[str, object] | None]
    terms: Mapping[str, str] = field(default_factory=lambda: NO_TERMS)
    each: str = ""

    def problems(self, model: BaseModel) -> list[str]:
        items = getattr(model, self.each) if self.each else (model,)
        found = (self.broken(model, item) for item in items)
        return [
            self.message.format(**{name: show(value) for name, value in terms.items()})
            for terms in found
            if terms is not None
        ]

    def validation(self) -> dict[str, str]:
        """The rule as an entry of x-kubernetes-validations."""
        holds, words = self.cel, cel_format(self.message, self.terms)
        if self.each:
            holds = f"self.{self.each}.all(s, {self.cel})"
            words = f"self.{self.each}.filter(s, !({self.cel})).map(s, {words})[0]"
        entry = (
            {"rule": holds, "messageExpression": words}
            if self.terms
            else {"rule": holds, "message": self.message}
        )
        return {**entry, "fieldPath": f".{self.path}"} if self.path else entry


def cel_format(message: str, terms: Mapping[str, str]) -> str:
    """CEL that puts the terms into the message. One format() call: of a concatenation the API server would estimate an unbounded cost."""
    values = [terms[name] for name in re.findall(r"\{([a-z]+)\}", message)]
    return f"{cel_string(re.sub(r'{[a-z]+}', '%s', message))}.format([{', '.join(values)}])"


def show(value: object) -> str:
    """A value as CEL's format() writes it: whole numbers without a fraction, everything else as Python does."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


@dataclass(frozen=True)
class TextPattern:
    """Annotation of a string field: the whole text must match a pattern that RE2 and Python read alike, or the words say what to write."""

    pattern: str
    words: str
    max_length: int = 256

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        rule = f"self.matches({cel_string(f'^(?:{self.pattern})$')})"
        return {
            **handler(schema),
            "maxLength": self.max_length,
            "x-kubernetes-validations": [{"rule": rule, "message": self.words}],
        }

    def _check(self, text: str) -> str:
        if len(text) > self.max_length or re.fullmatch(self.pattern, text) is None:
            raise PydanticCustomError("words", "{words}", {"words": self.words})
        return text


def cel_string(text: str) -> str:
    """A CEL string literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


class ApiModel(BaseModel):
    """A part of a DistillRun as the user writes it: camelCase, nothing unknown, nothing converted in silence."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )
    rules: ClassVar[tuple[Rule, ...]] = ()

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        described = handler.resolve_ref_schema(handler(schema))
        if cls.rules:
            described["x-kubernetes-validations"] = [rule.validation() for rule in cls.rules]
        return described

    @model_validator(mode="after")
    def _rules_hold(self) -> Self:
        problems = [(rule.path, words) for rule in self.rules for words in rule.problems(self)]
        if problems:
            raise PydanticCustomError("rules", "{first}", {"first": problems[0][1], "problems": problems})
        return self


class Record(BaseModel):
    """A part of what our own programs tell each other: progress and status. Unknown keys are ignored, for the writer may be newer."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        extra="ignore",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    def dump(self) -> dict[str, Any]:
        """As JSON: camelCase, fields that are None left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)
