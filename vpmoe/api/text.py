"""Reads YAML as kubectl does, so that a file has one meaning, and writes YAML that both read back unchanged.

PyYAML alone reads 2026-01-01 as a date and 3e-4 as a string, silently takes the last of two equal keys, and
writes the string "3e-4" without quotes.
"""

import re
from collections.abc import Callable, Hashable
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """SafeLoader with the numbers of YAML 1.2, without dates, that rejects duplicate keys and reports every
    value that it cannot convert with its position."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own class attribute)
        first: [
            (tag, regex)
            for tag, regex in found
            if tag not in ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:float")
        ]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError) as error:  # what PyYAML's constructors raise
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"this is no {kind} ({error}). Quote it if it is a text", node.start_mark
            ) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        if not isinstance(node, yaml.MappingNode):
            return super().construct_mapping(node, deep)  # which says that it is none
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value} appears twice in one mapping", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes strings which look like YAML 1.2 numbers, and uses no aliases for equal
    parts."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Plain style if it is safe. PyYAML alone writes U+0085 unescaped and reads it back as a space."""
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if "\x85" in data else None)


_FLOAT = re.compile(
    r"^[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
    r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF|nan|NaN|NAN))$"
)
_Dumper.add_representer(str, _Dumper.represent_str)
for resolver in (_Loader, _Dumper):
    resolver.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def read_yaml(text: str) -> Any:
    """The only document in `text`. Raises yaml.YAMLError, with the position, if it cannot be read."""
    return _read(lambda: yaml.load(text, Loader=_Loader))


def read_yaml_documents(text: str) -> list[Any]:
    """All documents in `text`, without empty ones. Raises yaml.YAMLError, with the position, if one cannot be
    read."""
    return _read(lambda: [found for found in yaml.load_all(text, Loader=_Loader) if found is not None])


def _read[T](load: Callable[[], T]) -> T:
    try:
        return load()
    except RecursionError:
        raise yaml.YAMLError("lists and mappings are nested too deeply") from None
    except (ValueError, OverflowError) as error:  # of PyYAML's scanner, for an escape such as "\UFFFFFFFF"
        raise yaml.YAMLError(f"an escape is no character of Unicode ({error})") from error


def write_yaml(value: Any) -> str:
    """Plain data as one YAML document that read_yaml and kubectl read back unchanged; keys keep their
    order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=140, allow_unicode=True)
