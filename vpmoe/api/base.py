"""Base classes of the API's models: strict fields, and rules that Python and the API server both check.

A rule is written once, with one message: Python evaluates it here, and crd.py writes it into the CRD as CEL.
The rules themselves are in the models and in rules.py.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationInfo,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

NO_TERMS: Mapping[str, str] = {}
STORED = "stored"
"""Validation context of a run that the API server has stored: an earlier version may have accepted it."""


@dataclass(frozen=True)
class Rule:
    """A condition between the fields of a model, checked in Python and, as CEL, by the API server."""

    path: str
    """The field at which a violation is reported, relative to the model; "" is the model itself."""
    message: str
    """What is reported, with {terms} in it."""
    cel: str
    """The condition as CEL: true if it holds. Must decide the same as `broken`."""
    broken: Callable[[Any, Any], Mapping[str, object] | None]
    """`(model, item)` -> the values of the message's terms if the condition is violated, otherwise None."""
    terms: Mapping[str, str] = field(default_factory=lambda: NO_TERMS)
    """CEL expression of each {term}."""
    each: str = ""
    """Name of a list field: the condition is then checked for every item, which CEL calls `s`. If empty,
    `item` is the model."""
    at_apply: bool = False
    """Whether a stored run may break it, because the rule is newer than the fields: such a run goes on. The
    API server does not check it again either, as long as the object with the rule stays as it is."""
    unchanged: tuple[str, ...] = ()
    """Fields that the API server compares with what is stored, and checks the rule only if one differs. For
    `at_apply` rules of spec: a stored run that breaks one could otherwise not be suspended, which changes
    another field of spec. The fields must be required or have defaults."""

    def problems(self, model: BaseModel) -> list[str]:
        """The messages of all violations in `model`."""
        items = getattr(model, self.each) if self.each else (model,)
        found = (self.broken(model, item) for item in items)
        return [
            self.message.format(**{name: show(value) for name, value in terms.items()})
            for terms in found
            if terms is not None
        ]

    def validation(self) -> dict[str, str | bool]:
        """The rule as an entry of x-kubernetes-validations."""
        holds, message = self.cel, cel_format(self.message, self.terms)
        if self.each:
            holds = f"self.{self.each}.all(s, {self.cel})"
            message = f"self.{self.each}.filter(s, !({self.cel})).map(s, {message})[0]"
        if self.unchanged:
            same = " && ".join(f"oldSelf.value().{name} == self.{name}" for name in self.unchanged)
            holds = f"(oldSelf.hasValue() && {same}) || ({holds})"
        entry: dict[str, str | bool] = (
            {"rule": holds, "messageExpression": message}
            if self.terms
            else {"rule": holds, "message": self.message}
        )
        if self.unchanged:
            entry["optionalOldSelf"] = True  # without it the rule would not be checked of a new run
        return {**entry, "fieldPath": f".{self.path}"} if self.path else entry


def cel_format(message: str, terms: Mapping[str, str]) -> str:
    """A CEL expression that inserts the terms into the message.

    It is one format() call, because the API server estimates an unbounded cost for a concatenation.
    """
    values = [terms[name] for name in re.findall(r"\{([a-z]+)\}", message)]
    return f"{cel_string(re.sub(r'{[a-z]+}', '%s', message))}.format([{', '.join(values)}])"


def show(value: object) -> str:
    """The value as CEL's format() writes it: whole numbers without a fraction, everything else as str()
    does."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


@dataclass(frozen=True)
class TextPattern:
    """Annotation of a string field: the whole text must match a pattern, and may have at most `max_length`
    characters."""

    pattern: str
    """Regular expression with the same meaning in RE2 (the API server) and in Python."""
    message: str
    """Reported for a text that does not match: what to write instead."""
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
            "x-kubernetes-validations": [{"rule": rule, "message": self.message}],
        }

    def _check(self, text: str) -> str:
        if len(text) > self.max_length or re.fullmatch(self.pattern, text) is None:
            raise invalid_text(self.message)
        return text


def invalid_text(message: str) -> PydanticCustomError:
    """The error of a field whose text is malformed. invalid.py puts the field and the value in front of
    `message`."""
    return PydanticCustomError("invalid_text", "{message}", {"message": message})


def cel_string(text: str) -> str:
    """`text` as a CEL string literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


class ApiModel(BaseModel):
    """Base of everything that a user writes: camelCase keys, unknown keys rejected, no implicit type
    conversion.

    Attribute docstrings become the CRD's descriptions.
    """

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
    def _rules_hold(self, info: ValidationInfo) -> Self:
        stored = info.context == STORED
        rules = [rule for rule in self.rules if not (stored and rule.at_apply)]
        problems = [(rule.path, message) for rule in rules for message in rule.problems(self)]
        if problems:
            raise PydanticCustomError("rules", "{first}", {"first": problems[0][1], "problems": problems})
        return self


class Record(BaseModel):
    """Base of everything that our programs write for each other, such as progress and status.

    Unknown keys are ignored, because the writer may be newer than the reader.
    """

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
        """The record as JSON values: camelCase keys, without fields that are None."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def _as_utf8(text: Any) -> Any:
    return text.encode(errors="replace").decode() if isinstance(text, str) else text


AnyText = Annotated[str, BeforeValidator(_as_utf8)]
"""A text of any origin, without what UTF-8 cannot express: a file name in an error may hold any byte."""
