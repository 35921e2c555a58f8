"""The CustomResourceDefinition of DistillRun, made from the models: `python -m vpmoe.api.crd >
manifests/crd.yaml`.

A test checks that the committed file is equal to the output.
"""

import sys
from collections.abc import Iterable
from typing import Any

from vpmoe.api.run import GROUP, KIND, PLURAL, RUN_NAME, VERSION, DistillRun
from vpmoe.api.spec import MUTABLE, MUTABLE_RUNTIME, Spec
from vpmoe.api.status import Status
from vpmoe.api.structural import Schema, structural, with_defaults_described, without_defaults
from vpmoe.api.text import write_yaml

RELEASE = "0.1.0"
"""The release of this project. The CRD carries it: an operator of an older release leaves it alone."""
RELEASE_ANNOTATION = f"{GROUP}/release"

COLUMNS = (
    ("Phase", "string", ".status.phase", 0, "State of the run."),
    (
        "Step",
        "string",
        ".status.step",
        0,
        "The step that is running or ran last; if several run, the one that trains.",
    ),
    ("Progress", "string", ".status.progress", 0, "Share of the whole run that is done."),
    ("Tokens/s", "number", ".status.tokensPerSecond", 0, "Tokens per second of that step."),
    (
        "Loss",
        "number",
        ".status.loss",
        0,
        "What the stage minimises, in nats per token: cross-entropy, or the reverse KL in an OnPolicy stage.",
    ),
    ("Age", "date", ".metadata.creationTimestamp", 0, "Time since the run was created."),
    ("ETA", "string", ".status.eta", 1, "When all stages will have been trained and evaluated, about."),
    ("Teacher", "string", ".spec.teacher.model", 1, "The teacher model."),
    ("Model", "string", ".status.model", 1, "Folder of the exported model."),
    ("Config", "string", ".status.config", 1, "First 16 hex digits of the configuration's hash."),
)

_HAS_STEPS = "has(oldSelf.status) && has(oldSelf.status.steps)"
STARTED = f"{_HAS_STEPS} && oldSelf.status.steps.exists(s, has(s.started))"
"""CEL: the first step has started."""
ALIVE = (
    "has(oldSelf.status) && has(oldSelf.status.phase) && oldSelf.status.phase == 'Running' || "
    f"{_HAS_STEPS} && oldSelf.status.steps.exists(s, has(s.state) && s.state == 'Running')"
)
"""CEL: the run has children, or holds GPUs between two attempts. A child that waits in Kueue's queue counts:
it has its pod template already, although the phase is Queued."""


def _and(names: Iterable[str]) -> str:
    """The names as words: a, b and c."""
    *first, last = names
    return f"{', '.join(first)} and {last}"


FIXED = (
    f"cannot change after the first step has started: only {_and((*MUTABLE, 'runtime'))} can. Apply a run "
    "with another name, or delete this run first."
)
SUSPEND_FIRST = (
    f"cannot change while the run is alive: only {_and(MUTABLE_RUNTIME)} can. "
    "Set spec.suspend to true, wait for phase Suspended, change it, and set spec.suspend to false."
)


def immutability_rules(spec: Schema) -> list[dict[str, str]]:
    """One rule per field that cannot always change. Fields of runtime are fixed while a step is alive, all
    others but MUTABLE once the first step has started.

    The rules read status, so they belong to the whole object and not to spec.
    """
    runtime = spec["properties"]["runtime"]
    return [
        *(
            _immutable("spec", spec, field, STARTED, FIXED)
            for field in spec["properties"]
            if field not in (*MUTABLE, "runtime")
        ),
        *(
            _immutable("spec.runtime", runtime, field, ALIVE, SUSPEND_FIRST)
            for field in runtime["properties"]
            if field not in MUTABLE_RUNTIME
        ),
    ]


def _immutable(parent: str, schema: Schema, field: str, when: str, message: str) -> dict[str, str]:
    return {
        # Compared first, because the API server evaluates the rule at each write of the status too, where
        # nothing of spec has changed.
        "rule": f"{_cel_unchanged(parent, field, schema)} || !({when})",
        "message": message,
        "fieldPath": f".{parent}.{field}",
    }


def _cel_unchanged(parent: str, field: str, schema: Schema) -> str:
    """CEL that is true if the field has not changed."""
    new, old = f"self.{parent}.{field}", f"oldSelf.{parent}.{field}"
    if field in schema.get("required", []) or "default" in schema["properties"][field]:
        return f"{new} == {old}"
    return f"(has({new}) ? has({old}) && {new} == {old} : !has({old}))"


def crd() -> dict[str, Any]:
    """The CustomResourceDefinition as a mapping."""
    spec = with_defaults_described(structural(Spec.model_json_schema()))
    status = without_defaults(structural(Status.model_json_schema()))
    name_rule = {
        "rule": f"self.metadata.name.matches('^(?:{RUN_NAME.pattern})$')",
        "message": RUN_NAME.message,
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
        "x-kubernetes-validations": [name_rule, *immutability_rules(spec)],
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
        "metadata": {"name": f"{PLURAL}.{GROUP}", "annotations": {RELEASE_ANNOTATION: RELEASE}},
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
    return "# Made by `make manifests` from the models in vpmoe/api. Do not edit.\n" + write_yaml(crd())


if __name__ == "__main__":
    sys.stdout.write(render())
