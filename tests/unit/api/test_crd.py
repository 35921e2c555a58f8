"""The CRD follows from the models, and the committed file is up to date."""

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from vpmoe.api.crd import ALIVE, RELEASE_ANNOTATION, STARTED, crd, render
from vpmoe.api.run import DistillRun
from vpmoe.api.runtime import RuntimeSpec
from vpmoe.api.spec import Spec
from vpmoe.api.status import Status

MANIFESTS = Path(__file__).parents[3] / "manifests"
GUIDE = MANIFESTS.parent / "docs/guides/run.md"
MAX_ANNOTATION_BYTES = 262_144
"""Client-side apply stores the whole object in an annotation, and this is the limit of its size."""


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    schema: dict[str, Any] = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return schema


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, member in schema.get("properties", {}).items():
        yield from nodes(member, f"{path}.{name}")
    for key, mark in (("items", "[]"), ("additionalProperties", "{}")):
        if key in schema:
            yield from nodes(schema[key], path + mark)


def test_the_committed_file_is_up_to_date() -> None:
    assert (MANIFESTS / "crd.yaml").read_text(encoding="utf-8") == render(), "run: make manifests"


def test_it_carries_the_release_of_the_project_and_of_the_chart() -> None:
    project = tomllib.loads((MANIFESTS.parent / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((MANIFESTS.parent / "charts/distill-operator/Chart.yaml").read_text())
    assert crd()["metadata"]["annotations"] == {RELEASE_ANNOTATION: project}
    assert chart["appVersion"] == project


def test_it_is_much_smaller_than_the_limit_of_an_annotation() -> None:
    assert len(json.dumps(crd())) < 0.6 * MAX_ANNOTATION_BYTES


def test_the_kustomization_includes_it() -> None:
    assert yaml.safe_load((MANIFESTS / "kustomization.yaml").read_text(encoding="utf-8"))["resources"] == [
        "crd.yaml"
    ]


def test_every_field_is_described(schema: dict[str, Any]) -> None:
    generated = (".metadata", ".metadata.name", ".metadata.namespace")
    undescribed = [
        path
        for path, node in nodes(schema)
        if "description" not in node and path not in generated and not path.endswith(("[]", "{}"))
    ]
    undescribed = [
        path for path in undescribed if not path.startswith(".spec.runtime.resources.")
    ]  # described by the names of the roles
    assert undescribed == []


def test_it_uses_only_keywords_of_structural_schemas(schema: dict[str, Any]) -> None:
    unknown = {
        "$ref",
        "$defs",
        "title",
        "oneOf",
        "allOf",
        "const",
        "inherits",
        "unit",
        "listMapKey",
        "propertyNames",
        "discriminator",
    }
    for path, node in nodes(schema):
        assert not unknown & set(node), path
        assert "type" in node or node.get("x-kubernetes-int-or-string"), path
        assert not isinstance(node.get("additionalProperties"), bool), path
        for bound in ("exclusiveMinimum", "exclusiveMaximum"):
            assert node.get(bound) in (None, True), path
        for option in node.get("anyOf", []):
            assert set(option) == {"type"}, f"{path}: bounds are beside anyOf, never inside"


def test_every_field_of_a_status_is_bounded_and_has_no_default(schema: dict[str, Any]) -> None:
    for path, node in nodes(schema["properties"]["status"]):
        assert "default" not in node, path
        assert node.get("type") != "array" or "maxItems" in node, path
        assert node.get("type") != "string" or {"maxLength", "enum", "format"} & set(node), path


def test_every_field_of_the_spec_is_bounded(schema: dict[str, Any]) -> None:
    for path, node in nodes(schema["properties"]["spec"]):
        assert node.get("type") != "array" or "maxItems" in node, path
        assert node.get("type") != "string" or {"maxLength", "enum"} & set(node), path
        assert "additionalProperties" not in node or "maxProperties" in node, path


def test_the_parent_of_a_default_has_a_default(schema: dict[str, Any]) -> None:
    spec = schema["properties"]["spec"]
    for path, node in nodes(spec):
        if ".stages" in path or "{}" in path:
            continue  # there the defaults of an object apply if the object is given
        for name, member in node.get("properties", {}).items():
            child_defaults = [child for child in member.get("properties", {}).values() if "default" in child]
            assert (
                not child_defaults
                or "default" in member
                or name in node.get("required", [])
                or member.get("nullable")  # its defaults apply if it is given
                or path.endswith("resources")
            ), f"{path}.{name}"


def test_stages_have_no_defaults_that_depend_on_their_kind(schema: dict[str, Any]) -> None:
    stage = schema["properties"]["spec"]["properties"]["stages"]["items"]
    assert [name for name, member in stage["properties"].items() if "default" in member] == []
    assert [path for path, node in nodes(stage["properties"]["optimizer"]) if "default" in node] == []
    assert stage["required"] == ["name", "kind"]
    assert (
        'Default: "1B" in Vanilla stages, "2B" in Rescored stages'
        in stage["properties"]["tokens"]["description"]
    )
    assert stage["properties"]["mix"]["description"].startswith("Rescored only. ")


def fixed_fields(schema: dict[str, Any], condition: str) -> set[str]:
    """The fields that cannot change while the condition, CEL, holds."""
    return {
        rule["fieldPath"]
        for rule in schema["x-kubernetes-validations"]
        if rule["rule"].endswith(f" || !({condition})")
    }


def test_all_fields_but_runtime_are_immutable_once_started_except_these(schema: dict[str, Any]) -> None:
    fields = {f".spec.{name}" for name in schema["properties"]["spec"]["properties"]}
    assert fields - fixed_fields(schema, STARTED) == {
        ".spec.suspend",
        ".spec.ttlAfterFinished",
        ".spec.deletionPolicy",
        ".spec.runtime",
    }


def test_all_fields_of_runtime_are_fixed_while_the_run_is_alive_except_attempts(
    schema: dict[str, Any],
) -> None:
    runtime = schema["properties"]["spec"]["properties"]["runtime"]["properties"]
    fixed = fixed_fields(schema, ALIVE)
    assert {f".spec.runtime.{name}" for name in runtime} - fixed == {
        ".spec.runtime.attempts",
        ".spec.runtime.interruptions",
        ".spec.runtime.onStall",
        ".spec.runtime.scheduling",
    }
    assert fixed & fixed_fields(schema, STARTED) == set()


def test_messages_descriptions_and_the_guide_name_the_fields_that_may_change(schema: dict[str, Any]) -> None:
    """All of them, and no other: the fields without a rule are the reference."""
    spec = schema["properties"]["spec"]["properties"]
    runtime = spec["runtime"]["properties"]
    always = {f"spec.{name}" for name in spec if f".spec.{name}" not in fixed_fields(schema, STARTED)}
    always_runtime = {name for name in runtime if f".spec.runtime.{name}" not in fixed_fields(schema, ALIVE)}
    messages = {rule["fieldPath"]: rule["message"] for rule in schema["x-kubernetes-validations"]}
    (only,) = re.findall(r"only (.*?) can\.", messages[".spec.dataset"])
    assert {f"spec.{name}" for name in re.split(", | and ", only)} == always
    (only,) = re.findall(r"only (.*?) can\.", messages[".spec.runtime.backend"])
    assert set(re.split(", | and ", only)) == always_runtime

    (of_the_field,) = re.findall(r"Failed; (.*?) at any time", spec["runtime"]["description"])
    (of_the_model,) = re.findall(r"retries\. (.*?) can\s+be changed at any", str(RuntimeSpec.__doc__))
    for listed in (of_the_field, of_the_model.replace("`", "")):
        assert set(re.split(", | and ", listed)) == always_runtime
    (guide,) = re.findall(
        r"After the first step has started, only (.*?) and, while", GUIDE.read_text(), re.DOTALL
    )
    assert set(re.findall(r"`(.*?)`", guide)) == {
        *(name.removeprefix("spec.") for name in always - {"spec.runtime"}),
        *(f"runtime.{name}" for name in always_runtime),
    }


def test_the_crd_has_every_field_of_the_models(schema: dict[str, Any]) -> None:
    for model, part in ((Spec, "spec"), (Status, "status")):
        assert set(schema["properties"][part]["properties"]) == {
            str(field.alias) for field in model.model_fields.values()
        }
    assert DistillRun.__doc__ == schema["description"]


def test_a_rule_of_spec_lets_a_stored_run_that_breaks_it_change_its_other_fields(
    schema: dict[str, Any],
) -> None:
    """The API server checks the rules of spec whenever a field of spec changes, such as suspend."""
    (rule,) = [
        rule
        for rule in schema["properties"]["spec"]["x-kubernetes-validations"]
        if "minValidity" in rule["rule"]
    ]
    assert rule["optionalOldSelf"] and rule["rule"].startswith(
        "(oldSelf.hasValue() && oldSelf.value().stages == self.stages "
        "&& oldSelf.value().evaluation == self.evaluation) || "
    )
