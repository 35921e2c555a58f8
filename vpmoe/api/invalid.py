"""Validation errors as text: one line per problem, which names the field, the value and the remedy."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from vpmoe.api.base import show
from vpmoe.api.stages import KINDS

_KIND_NAMES = tuple(kind.__name__ for kind in KINDS)


SHOWN = 200
"""Characters of a value in a message; a longer value is cut off."""


class Invalid(ValueError):
    """A DistillRun that does not validate. `problems` has one line per problem."""

    def __init__(self, problems: Iterable[str], source: str = "DistillRun") -> None:
        self.problems = tuple(problems)
        super().__init__(f"{source}:\n" + "\n".join(f"  {line}" for line in self.problems))


def problems(error: ValidationError, written: Mapping[str, Any]) -> list[str]:
    """Every problem that pydantic found in the mapping `written`, each once.

    If several fields inherit an invalid value, only the field where it was written is named.
    """
    found = [(_path(detail), detail) for detail in error.errors(include_url=False) if not _miscounted(detail)]
    own = [(path, detail) for path, detail in found if _was_written(written, path, detail["type"])]
    return [line for path, detail in own or found for line in _lines(_dotted(path), detail)]


def _miscounted(detail: ErrorDetails) -> bool:
    """Whether this is a false "too short": pydantic counts valid items only, so one invalid stage would be
    "no stages"."""
    return detail["type"] == "too_short" and len(detail["input"]) >= detail["ctx"]["min_length"]


def _path(detail: ErrorDetails) -> tuple[str | int, ...]:
    """The path of the problem without the union tag that pydantic adds after a stage's index."""
    loc = detail["loc"]
    return tuple(
        part for i, part in enumerate(loc) if not (i and isinstance(loc[i - 1], int) and part in _KIND_NAMES)
    )


def _dotted(path: tuple[str | int, ...]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path if part != "[key]")
    return text.removeprefix(".")


def _was_written(written: Any, path: tuple[str | int, ...], kind: str) -> bool:
    for part in path[:-1] if kind == "missing" else path:
        known = (
            range(len(written))
            if isinstance(written, list | tuple)
            else written
            if isinstance(written, Mapping)
            else ()
        )
        if part in known:
            written = written[part]
        elif part != "[key]":
            return False
    return True


def _lines(path: str, detail: ErrorDetails) -> list[str]:
    context = detail.get("ctx", {})
    if detail["type"] == "rules":
        return [
            f"{'.'.join(filter(None, (path, field)))}: {message}" for field, message in context["problems"]
        ]
    if detail["type"] == "missing":
        return [f"{path}: is required"]
    if detail["type"] == "union_tag_not_found":
        return [f"{path}.kind: is required. It must be one of {', '.join(_KIND_NAMES)}"]
    if detail["type"] == "union_tag_invalid":
        return [f'{path}.kind: "{context["tag"]}" must be one of {", ".join(_KIND_NAMES)}']
    return [f"{path}: {_value(detail['input'])} {_message(detail, context)}"]


def _value(value: object) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and abs(value) >= 10**SHOWN:  # Python prints none of more than 4,300 digits
        return f"a number of more than {SHOWN} digits"
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return f"{text[:SHOWN]}… ({len(text)} characters)" if len(text) > SHOWN else text


def _message(detail: ErrorDetails, context: Mapping[str, Any]) -> str:
    match detail["type"]:
        case "invalid_text":
            return str(context["message"])
        case "extra_forbidden":
            return _unknown(str(detail["loc"][-1]))
        case "literal_error" | "enum":
            expected = str(context["expected"]).replace("'", "").replace(" or ", ", ")
            return f"must be {'one of ' * (', ' in expected)}{expected}"
        case "greater_than_equal":
            return f"must be at least {show(context['ge'])}"
        case "greater_than":
            return f"must be more than {show(context['gt'])}"
        case "less_than_equal":
            return f"must be at most {show(context['le'])}"
        case "less_than":
            return f"must be less than {show(context['lt'])}"
        case "too_short":
            return f"must have at least {context['min_length']} items"
        case "too_long":
            return f"may have at most {context['max_length']} items"
        case "string_too_short":
            return "may not be empty"
        case "string_too_long":
            return f"may not be longer than {context['max_length']} characters"
        case "string_type":
            return "must be a string: quote it"
        case "int_type" | "int_from_float":
            return "must be a whole number"
        case "float_type" | "finite_number":
            return "must be a number"
        case "bool_type":
            return "must be true or false"
        case "dict_type" | "model_type" | "model_attributes_type":
            return "must be a mapping"
        case "tuple_type" | "list_type":
            return "must be a list"
    return detail["msg"]


def only_of_kinds(kinds: list[str], field: str) -> str:
    """Message for a field in a stage of a kind that does not have the field."""
    return f"is given, but only stages of kind {' or '.join(kinds)} have {field}"


def _unknown(field: str) -> str:
    kinds = [kind.__name__ for kind in KINDS if field in (info.alias for info in kind.model_fields.values())]
    if kinds:
        return only_of_kinds(kinds, field)
    return "is given, but there is no such field. Check the spelling and the indentation"


def not_utf8(value: object, path: tuple[str | int, ...] = ()) -> Iterator[str]:
    """A problem for each text in the values of a run that UTF-8 cannot express, so that no file or object can
    hold it: half of a surrogate pair, which YAML and JSON can write as an escape sequence."""
    if isinstance(value, str):
        if half := re.search("[\ud800-\udfff]", value):
            yield (
                f"{_dotted(path)}: has \\u{ord(half[0]):04x}, half of a character. Write the character "
                "itself, or both halves."
            )
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from not_utf8(key, path)
            yield from not_utf8(inner, (*path, str(key)))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from not_utf8(inner, (*path, number))
