"""The CustomResourceDefinition of DistillRun, made from the models: `python -m vpmoe.api.crd > manifests/crd.yaml`.

The committed file is proved equal to what this prints.
"""

import sys
from typing import Any

from vpmoe.api.run import GROUP, KIND, PLURAL, RUN_NAME, VERSION, DistillRun
from vpmoe.api.spec import MUTABLE, MUTABLE_RUNTIME, Spec
from vpmoe.api.status import Status
from vpmoe.api.structural import Schema, saying_defaults, structural, without_defaults
from vpmoe.api.text import write_yaml

COLUMNS = (
    ("Phase", "string", ".status.phase", 0, "What has become of the run."),
    (
        "Step",
        "string",
        ".status.step",
        0,
        "The step that is running or was last running; of several, the one that trains.",
    ),
    ("Progress", "string", ".status.progress", 0, "How much of the whole run is done."),
    ("Tokens/s", "number", ".status.tokensPerSecond", 0, "Speed of that step."),
    (
        "Loss",
        "number",
        ".status.loss",
        0,
        "What the stage minimises, in nats a token: the reverse KL in an OnPolicy stage, else the cross-entropy.",
    ),
    ("Age", "date", ".metadata.creationTimestamp", 0, "Time since the run was applied."),
    ("Teacher", "string", ".spec.teacher.model", 1, "The model that is distilled from."),
    ("Config", "string", ".status.config", 1, "First 16 hex of the configuration's hash."),
)


def immutable(spec: Schema) -> list[dict[str, str]]:
    """Once the first step has started, only what is in MUTABLE may change. They read status, so they are rules of the whole object."""
    started = (
        "has(oldSelf.status) && has(oldSelf.status.steps) && oldSelf.status.steps.exists(s, has(s.started))"
    )
    only = "cannot change after the first step has started: only suspend, ttlAfterFinished, deletionPolicy and runtime.attempts can. "
    parts = [
        ("spec", spec, (*MUTABLE, "runtime")),
        ("spec.runtime", spec["properties"]["runtime"], MUTABLE_RUNTIME),
    ]
    return [
        {
            "rule": f"!({started}) || {_same(parent, field, schema)}",
            "message": f"{only}Apply a run of another name, or delete this one first.",
            "fieldPath": f".{parent}.{field}",
        }
        for parent, schema, mutable in parts
        for field in schema["properties"]
        if field not in mutable
    ]


def _same(parent: str, field: str, schema: Schema) -> str:
    """CEL that holds where a field of the spec has not changed."""
    new, old = f"self.{parent}.{field}", f"oldSelf.{parent}.{field}"
    if field in schema.get("required", []) or "default" in schema["properties"][field]:
        return f"{new} == {old}"
    return f"(has({new}) ? has({old}) && {new} == {old} : !has({old}))"


def crd() -> dict[str, Any]:
    """The whole CustomResourceDefinition."""
    spec = saying_defaults(structural(Spec.model_json_schema()))
    status = without_defaults(structural(Status.model_json_schema()))
    named = {
        "rule": f"self.metadata.name.matches('^(?:{RUN_NAME.pattern})$')",
        "message": RUN_NAME.words,
        "fieldPath": ".metadata.name",
    }
    schema = {
        "type": "object",
        "description": DistillRun.__doc__,
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": f"{GROUP}/{VERSION}."},
            "kind": {"type": "string", "description": f"{KIND}."},
            "metadata": {"type": "object", "properties": {"name": {"type": "string", "maxLength": 253}}},
            "spec": spec,
            "status": status,
        },
        "x-kubernetes-validations": [named, *immutable(spec)],
    }
    columns = [
        {
            "name": name.upper(),
            "type": kind,
            "jsonPath": path,
            "priority": priority,
            "description": description,
        }
        for name, kind, path, priority, description in COLUMNS
    ]
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": KIND.lower(),
                "shortNames": ["drun"],
                "categories": ["vpmoe"],
            },
            "scope": "Namespaced",
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": columns,
                    "schema": {"openAPIV3Schema": schema},
                }
            ],
        },
    }


def render() -> str:
    """The text of manifests/crd.yaml."""
    return "# Made by `python -m vpmoe.api.crd`; a test proves that the two are equal.\n" + write_yaml(crd())


if __name__ == "__main__":
    sys.stdout.write(render())
