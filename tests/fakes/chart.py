"""Renders the Helm chart with the compiled helm. Needs no cluster."""

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Json = dict[str, Any]

FOLDER = Path(__file__).parents[2] / "charts/distill-operator"
APP_VERSION = yaml.safe_load((FOLDER / "Chart.yaml").read_text())["appVersion"]
VALUES: Json = yaml.safe_load((FOLDER / "values.yaml").read_text())
SCHEMA: Json = json.loads((FOLDER / "values.schema.json").read_text())
REQUIRED: Json = {"images": {"registry": "r.example.com/vpmoe"}}
"""The values without a default."""


@dataclass(frozen=True)
class Chart:
    """The chart, rendered by this helm."""

    helm: Path

    def run(self, *arguments: str, values: Json) -> subprocess.CompletedProcess[str]:
        """Run helm with these values on top of the chart's defaults."""
        return subprocess.run(
            [self.helm, *arguments, "--values", "-"],
            input=json.dumps(values),
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "GOGC": "off"},  # helm ends before it needs memory back
        )

    def render(
        self, values: Json | None = None, release: str = "distill-operator", namespace: str = "vpmoe-system"
    ) -> list[Json]:
        """The objects, with the required values and `values`. Fails with helm's message."""
        place = ["template", release, str(FOLDER), "--namespace", namespace]
        ended = self.run(*place, values={**REQUIRED, **(values or {})})
        assert ended.returncode == 0, ended.stderr
        loader = yaml.CSafeLoader  # in Python, to load a dashboard takes longer than to render it
        return [obj for obj in yaml.load_all(ended.stdout, loader) if obj]

    def rejection(self, values: Json) -> str:
        """Helm's message about values that it must not accept. Required values are not added."""
        ended = self.run("template", "x", str(FOLDER), values=values)
        assert ended.returncode != 0, "helm accepts these values"
        return ended.stderr


def find(objects: list[Json], kind: str, suffix: str = "") -> Json:
    """The only object of the kind whose name ends with `suffix`."""
    (found,) = [obj for obj in objects if obj["kind"] == kind and obj["metadata"]["name"].endswith(suffix)]
    return found


def settings(objects: list[Json]) -> Json:
    """The operator's settings file."""
    (file,) = [obj["data"]["operator.yaml"] for obj in objects if "operator.yaml" in obj.get("data", {})]
    found: Json = yaml.safe_load(file)
    return found


def resolved(schema: Json) -> Json:
    """A part of the values' schema with its $ref, if it has one, filled in."""
    reference = schema.get("$ref", "").removeprefix("#/definitions/")
    return {**SCHEMA["definitions"][reference], **schema} if reference else schema


def fields(schema: Json = SCHEMA, path: str = "") -> Iterator[tuple[str, Json]]:
    """Path and schema of every value that is no map of further values, such as images.tag."""
    for name, found in schema["properties"].items():
        part, where = resolved(found), f"{path}.{name}".lstrip(".")
        if part.get("additionalProperties") is False:
            yield from fields(part, where)
        else:
            yield where, part


def nested(path: str, value: Any) -> Json:
    """{"a": {"b": value}} of the path a.b."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return dict(value)


def operator_rules(objects: list[Json], namespace: str) -> list[Json]:
    """The rules of all roles that are bound to the operator's service account of this namespace."""
    account = find(objects, "Deployment")["spec"]["template"]["spec"]["serviceAccountName"]
    subject = {"kind": "ServiceAccount", "name": account, "namespace": namespace}
    bound = {
        (obj["roleRef"]["kind"], obj["roleRef"]["name"])
        for obj in objects
        if obj["kind"] in ("RoleBinding", "ClusterRoleBinding") and obj["subjects"] == [subject]
    }
    return [
        rule for obj in objects if (obj["kind"], obj["metadata"]["name"]) in bound for rule in obj["rules"]
    ]


def permissions(rules: list[Json]) -> set[tuple[str, str, str]]:
    """(API group, resource, verb) of every permission in the rules."""
    return {
        (group, resource, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
