"""The API reference as Markdown, made from the CRD: `python -m vpmoe.api.reference > docs/reference/api.md`.

It holds what `kubectl explain distillrun.spec --recursive` shows, one table for each object. A test proves
that the committed page is equal to what this prints.
"""

import re
import sys
from collections.abc import Iterator

from vpmoe.api.crd import crd
from vpmoe.api.structural import Schema

HEADER = """# API reference

<!-- Made by `make manifests` from the models in vpmoe/api. Do not edit. -->

`DistillRun`, `vpmoe.dev/v1alpha1`, namespaced, short name `drun`. Token counts are integers (`1000000`) or
strings (`"1M"`, `"1.5B"`). A required field is marked with *.
"""


def render() -> str:
    """The text of docs/reference/api.md."""
    fields = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    tables = [*_tables("spec", fields["spec"]), *_tables("status", fields["status"])]
    return HEADER + "".join(f"\n{table}" for table in tables)


def _tables(path: str, schema: Schema) -> Iterator[str]:
    """One section for an object, then those of the objects below it, depth first."""
    required = schema.get("required", [])
    rows = [_row(path, name, field, name in required) for name, field in schema["properties"].items()]
    head = ["| field | type | default | description |", "|---|---|---|---|"]
    yield "\n".join([f"## {path}", "", _one_line(schema.get("description", "")), "", *head, *rows, ""])
    for name, field in schema["properties"].items():
        if "properties" in (below := field.get("items", field)):
            yield from _tables(_section(path, name, field), below)


def _section(path: str, name: str, field: Schema) -> str:
    """The heading of an object field's own section."""
    return f"{path}.{name}" + ("[]" if "items" in field else "")


def _row(path: str, name: str, field: Schema, required: bool) -> str:
    label = f"`{name}`"
    if "properties" in field.get("items", field):
        label = f"[{label}](#{_slug(_section(path, name, field))})"
    words = re.sub(r" Default: .*$", "", _one_line(field.get("description", "")))
    return f"| {label}{'*' if required else ''} | {_type(field)} | {_default(field)} | {words} |"


def _default(field: Schema) -> str:
    value = field.get("default")
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return "" if value in (None, "", {}, []) else f"`{value}`"


def _type(field: Schema) -> str:
    """The field's type and bounds, for people."""
    if field.get("x-kubernetes-int-or-string"):
        return "integer or string"
    if "enum" in field:
        return " \\| ".join(f"`{value}`" for value in field["enum"])
    if field["type"] == "array":
        return f"list of {_type(field['items'])}"
    if "additionalProperties" in field:
        return f"map of {_type(field['additionalProperties'])}"
    low, high = field.get("minimum"), field.get("maximum")
    least = [] if low is None else [f"{'>' if field.get('exclusiveMinimum') else '≥'} {low:,}"]
    most = [] if high is None else [f"{'<' if field.get('exclusiveMaximum') else '≤'} {high:,}"]
    return ", ".join([field["type"], *least, *most])


def _slug(heading: str) -> str:
    """The anchor that GitHub gives a heading of letters, dots and brackets."""
    return "".join(c for c in heading.lower() if c.isalnum() or c in "-_")


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(render())
