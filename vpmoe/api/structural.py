"""Converts pydantic's JSON schema to a structural schema, the dialect of CRDs.

Structural schemas have no $ref, no null type, no union of objects and no exclusive bounds as numbers. The
only union here is that of the stages: it becomes one object with the fields of every kind, and rules that
restrict each field to its kinds.
"""

import json
from collections.abc import Callable
from typing import Any

from vpmoe.api.base import cel_string
from vpmoe.api.invalid import only_of_kinds
from vpmoe.api.quantities import format_duration, format_tokens

Schema = dict[str, Any]

_KEPT = (
    "type",
    "format",
    "enum",
    "pattern",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "maxProperties",
    "x-kubernetes-int-or-string",
    "x-kubernetes-validations",
)
_RULES = "x-kubernetes-validations"


def structural(schema: Schema) -> Schema:
    """The structural schema that is equivalent to `schema`, a model's JSON schema with $defs."""
    return _node(schema, schema.get("$defs", {}))


def without_defaults(schema: Schema) -> Schema:
    """The structural schema without defaults: the API server then leaves absent fields absent."""
    return _everywhere(schema, lambda node: {key: value for key, value in node.items() if key != "default"})


def with_defaults_described(schema: Schema) -> Schema:
    """The structural schema with each default also in its description, because `kubectl explain` shows no
    defaults."""

    def describe(node: Schema) -> Schema:
        if node.get("default") in (None, "", {}, []):
            return node
        return {**node, "description": f"{node['description']} Default: {_json(node['default'])}."}

    return _everywhere(schema, describe)


def _everywhere(schema: Schema, change: Callable[[Schema], Schema]) -> Schema:
    """The structural schema with `change` applied to every node."""
    changed = dict(change(schema))
    if "properties" in changed:
        changed["properties"] = {
            name: _everywhere(member, change) for name, member in changed["properties"].items()
        }
    for key in ("items", "additionalProperties"):
        if key in changed:
            changed[key] = _everywhere(changed[key], change)
    return changed


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _node(node: Schema, defs: dict[str, Schema]) -> Schema:
    if "$ref" in node:
        node = {
            **defs[node["$ref"].rpartition("/")[2]],
            **{key: value for key, value in node.items() if key != "$ref"},
        }
    if "oneOf" in node:
        return _union([_node(option, defs) for option in node["oneOf"]])
    options = [option for option in node.get("anyOf", []) if option != {"type": "null"}]
    nullable = len(options) < len(node.get("anyOf", []))
    if len(options) == 1:
        node = {**options[0], **{key: value for key, value in node.items() if key != "anyOf"}}
        return {**_node(node, defs), "nullable": True} if nullable else _node(node, defs)
    made: Schema = {"description": " ".join(node["description"].split())} if "description" in node else {}
    made |= {key: node[key] for key in _KEPT if key in node}
    if options:
        made["anyOf"] = options
    if "const" in node:
        made["enum"] = [node["const"]]
    for bound, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if exclusive in node:
            made |= {bound: node[exclusive], exclusive: True}
    if "listMapKey" in node:
        made |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [node["listMapKey"]]}
    if "items" in node:
        made["items"] = _node(node["items"], defs)
    made |= _members(node, defs)
    if node.get("default") is not None:
        made["default"] = _default(made, node["default"], node.get("unit"))
    return made


def _members(node: Schema, defs: dict[str, Schema]) -> Schema:
    if "propertyNames" in node and "enum" in node["propertyNames"]:  # a mapping with known keys
        return {
            "properties": {
                name: _node(node["additionalProperties"], defs) for name in node["propertyNames"]["enum"]
            }
        }
    if isinstance(node.get("additionalProperties"), dict):
        return {"additionalProperties": _node(node["additionalProperties"], defs)}
    if "properties" not in node:
        return {}
    properties, inherited = {}, []
    for name, written in node["properties"].items():
        properties[name] = _node(written, defs)
        if "inherits" in written:  # filled in from another field, which the API server cannot do
            inherited.append(name)
            properties[name] = without_defaults(properties[name])
            if "properties" in properties[name]:  # its rules need members that may be filled in later
                properties[name].pop(_RULES, None)
    required = [name for name in node.get("required", []) if name not in inherited]
    return {"properties": properties, **({"required": required} if required else {})}


def _default(made: Schema, value: Any, unit: str | None) -> Any:
    if "properties" in made:
        return {}  # the API server then applies the members' defaults
    if unit == "seconds":
        return format_duration(value)
    return format_tokens(value) if made.get("x-kubernetes-int-or-string") else value


def _union(kinds: list[Schema]) -> Schema:
    """One object schema for stages of all kinds.

    Defaults are in the descriptions only: in the schema, the default of one kind would apply to every kind.
    """
    names = [kind["properties"]["kind"]["enum"][0] for kind in kinds]
    rules: list[Schema] = []
    properties: dict[str, Schema] = {}
    for field in dict.fromkeys(field for kind in kinds for field in kind["properties"]):
        having = {
            name: kind["properties"][field]
            for name, kind in zip(names, kinds, strict=True)
            if field in kind["properties"]
        }
        properties[field] = {
            **next(iter(having.values())),
            **_of_kinds(field, having, len(having) == len(kinds)),
        }
        properties[field].pop("default", None)
        if len(having) < len(kinds):
            is_one = " || ".join(f"self.kind == {cel_string(name)}" for name in having)
            rules.append(
                {
                    "rule": f"{is_one} || !has(self.{field})",
                    "message": only_of_kinds(list(having), field),
                    "fieldPath": f".{field}",
                }
            )
    properties["kind"]["enum"] = names
    for name, kind in zip(names, kinds, strict=True):
        for rule in kind.get(_RULES, []):
            shared = all(rule in other.get(_RULES, []) for other in kinds)
            guarded = (
                rule if shared else {**rule, "rule": f"self.kind != {cel_string(name)} || ({rule['rule']})"}
            )
            rules += [guarded] if guarded not in rules else []
    required = [field for field in properties if all(field in kind.get("required", []) for kind in kinds)]
    return {"type": "object", "properties": properties, "required": required, _RULES: rules}


def _of_kinds(field: str, having: dict[str, Schema], everywhere: bool) -> Schema:
    """The description of a stage's field, with the kinds that have it and its default in each kind."""
    text = next(iter(having.values()))["description"]
    if not everywhere:
        text = f"{' and '.join(having)} only. {text}"
    defaults = {
        name: schema["default"] for name, schema in having.items() if schema.get("default") not in (None, {})
    }
    if any(isinstance(value, list) for value in defaults.values()):
        defaults = {}
    if len(defaults) == 1:
        text += f" Default: {_json(next(iter(defaults.values())))}."
    elif defaults:
        text += (
            f" Default: {', '.join(f'{_json(value)} in {name} stages' for name, value in defaults.items())}."
        )
    return {"description": text}
