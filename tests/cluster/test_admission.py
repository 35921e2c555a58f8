"""The API server accepts and rejects the same runs as the models, with the same messages and defaults.

Tests use --dry-run=server and the installed CRD, except for immutability: it needs a stored status, which a
running operator would overwrite. It is tested on the same CRD in another group.
"""

import json
import os
import re
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from devcluster.access import Cluster
from tests.fakes import invalid_specs, valid_specs
from tests.fakes.waiting import wait_until
from vpmoe.api import DistillRun, load_run
from vpmoe.api.crd import crd
from vpmoe.api.run import GROUP, PLURAL
from vpmoe.api.runtime import RuntimeSpec

MANIFESTS = Path(__file__).parents[2] / "manifests"
EXAMPLES = [
    *sorted((MANIFESTS / "examples").glob("*.yaml")),
    Path(__file__).parents[1] / "fakes" / "contract.yaml",
]
VALID = {
    name: valid_specs.manifest(changes, f"good-{i}")
    for i, (name, changes) in enumerate(valid_specs.VALID.items())
}
INVALID = {
    name: valid_specs.manifest(bad.changes, f"bad-{i}")
    for i, (name, bad) in enumerate(invalid_specs.INVALID.items())
}
NULL_IS_NOT_ABSENT = {"a conversation without a date"}
"""Cases in which null is not the same as absent. Client-side apply drops null."""


def kubectl(cluster: Cluster, *arguments: str) -> tuple[str, str]:
    """stdout and stderr of kubectl."""
    environment = {**os.environ, "KUBECONFIG": str(cluster.kubeconfig)}
    completed = subprocess.run(
        [cluster.kubectl_path, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    return completed.stdout, completed.stderr


def write_files(objects: dict[str, dict[str, Any]], folder: Path) -> Path:
    for i, body in enumerate(objects.values()):
        (folder / f"{i:03d}.json").write_text(json.dumps(body), encoding="utf-8")
    return folder


def objects_by_name(printed: str) -> dict[str, dict[str, Any]]:
    """Objects by name from kubectl's JSON: one object, or a List of them."""
    returned = json.loads(printed)
    return {
        item["metadata"]["name"]: item
        for item in (returned["items"] if returned["kind"] == "List" else [returned])
    }


@pytest.fixture(scope="module")
def applied(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every valid run as the API server returns it, by name."""
    folder = write_files(VALID, tmp_path_factory.mktemp("good"))
    printed, errors = kubectl(
        cluster, "apply", "--server-side", "--dry-run=server", "--output=json", "--filename", str(folder)
    )
    assert errors == ""
    return objects_by_name(printed)


@pytest.fixture(scope="module")
def rejections(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The API server's message for every invalid run that it rejects, by the case's name."""
    folder = write_files(INVALID, tmp_path_factory.mktemp("bad"))
    _, errors = kubectl(cluster, "apply", "--dry-run=server", "--filename", str(folder))
    by_number = {
        int(found["i"]): line
        for line in errors.splitlines()
        if (found := re.search(r"/(?P<i>\d{3})\.json\"", line))
    }
    return {name: by_number[i] for i, name in enumerate(INVALID) if i in by_number}


def test_the_installed_crd_is_that_of_the_models(cluster: Cluster) -> None:
    installed = json.loads(cluster.kubectl("get", "crd", f"{PLURAL}.{GROUP}", "--output=json"))
    assert installed["spec"]["versions"][0]["schema"] == crd()["spec"]["versions"][0]["schema"]


def test_client_side_apply_accepts_the_crd(cluster: Cluster) -> None:
    cluster.kubectl("apply", "--dry-run=server", "--filename", str(MANIFESTS / "crd.yaml"))


@pytest.mark.parametrize("name", VALID)
def test_a_valid_run_is_accepted_with_the_defaults_of_the_models(
    applied: dict[str, dict[str, Any]], name: str
) -> None:
    returned = applied[VALID[name]["metadata"]["name"]]
    assert DistillRun.parse(returned).spec == DistillRun.parse(VALID[name]).spec


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_run_is_rejected_with_the_field_and_the_remedy(
    rejections: dict[str, str], name: str
) -> None:
    bad = invalid_specs.INVALID[name]
    assert name in rejections, "the API server accepted the run"
    if bad.server:
        assert bad.server in rejections[name]
    else:
        assert f"{bad.field}: Invalid value: " in rejections[name] and bad.message in rejections[name]
    assert "no such key" not in rejections[name] and "evaluating rule" not in rejections[name], (
        "evaluating a rule failed"
    )


def test_null_means_absent_except_in_documented_fields(cluster: Cluster, tmp_path: Path) -> None:
    folder = write_files(
        {name: body for name, body in VALID.items() if name not in NULL_IS_NOT_ABSENT}, tmp_path
    )
    returned_by_name = objects_by_name(
        kubectl(cluster, "apply", "--dry-run=server", "--output=json", "--filename", str(folder))[0]
    )
    for body in VALID.values():
        if (returned := returned_by_name.get(body["metadata"]["name"])) is not None:
            assert DistillRun.parse(returned).config_hash == DistillRun.parse(body).config_hash, body
    assert len(returned_by_name) == len(VALID) - len(NULL_IS_NOT_ABSENT)


RUN_TEXT = """
apiVersion: vpmoe.dev/v1alpha1
kind: DistillRun
metadata: {{name: {name}}}
spec:
  dataset: {{source: "s3://corpora/a", conversation: {{date: {date}}}}}
  teacher: {{model: "s3://models/a"}}
  training: {{globalBatchTokens: {tokens}, optimizer: {{learningRate: {rate}}}}}
  storage: {{bucket: vpmoe}}
  stages: [{{name: first, kind: Vanilla}}]
"""
SCALARS = {
    "plain": RUN_TEXT.format(name="plain", date='"2026-02-03"', tokens="1000000", rate="0.0003"),
    "as-people-write": RUN_TEXT.format(
        name="as-people-write", date="2026-02-03", tokens="1_000_000", rate="3e-4"
    ),
    "with-exponents": RUN_TEXT.format(name="with-exponents", date="2026-02-03", tokens="1e6", rate="3.0E-4"),
}


@pytest.fixture(scope="module")
def runs_by_file(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[Path, dict[str, Any]]:
    """The runs of YAML files as the API server returns them, by file."""
    folder = tmp_path_factory.mktemp("texts")
    for name, text in SCALARS.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    paths = [*EXAMPLES, *folder.iterdir()]
    arguments = [argument for path in paths for argument in ("--filename", str(path))]
    returned_by_name = objects_by_name(
        cluster.kubectl("apply", "--dry-run=server", "--output=json", *arguments)
    )
    return {path: returned_by_name[load_run(path).metadata.name] for path in paths}


def test_kubectl_parses_the_examples_like_the_models(runs_by_file: dict[Path, dict[str, Any]]) -> None:
    for path in EXAMPLES:
        assert DistillRun.parse(runs_by_file[path]).config_hash == load_run(path).config_hash, path


def test_kubectl_parses_dates_and_numbers_like_the_models(runs_by_file: dict[Path, dict[str, Any]]) -> None:
    hashes = [
        hash
        for path, returned in runs_by_file.items()
        if path.stem in SCALARS
        for hash in (load_run(path).config_hash, parsed_hash(returned))
    ]
    assert len(hashes) == 2 * len(SCALARS) and len(set(hashes)) == 1


def parsed_hash(returned: dict[str, Any]) -> str:
    return DistillRun.parse(returned).config_hash


def test_kubectl_explain_describes_a_stage(cluster: Cluster) -> None:
    explained = " ".join(cluster.kubectl("explain", "distillrun.spec.stages").split())
    for text in (
        "kind <string> -required- enum: Vanilla, Rescored, TeacherForced, OnPolicy",
        "tokens <Object> Positions that enter the student in this stage, padding excluded",
        'Default: "1B" in Vanilla stages, "2B" in Rescored stages, "665M" in TeacherForced stages, '
        '"8B" in OnPolicy stages.',
        "mix <number> Rescored only. Share of batches that come from the scored subset",
    ):
        assert text in explained


STATUS = {
    "phase": "Running",
    "step": "first",
    "progress": "42%",
    "tokensPerSecond": 12345,
    "loss": 2.3456,
    "eta": "2026-01-02T03:04Z",
    "config": "0123456789abcdef",
    "model": "s3://vpmoe/models/first",
    "steps": [
        {"name": "preprocess", "state": "Succeeded", "started": "2026-01-01T00:00:00Z"},
        {"name": "first", "state": "Running", "started": "2026-01-01T00:01:00Z"},
    ],
}


@pytest.fixture(scope="module")
def twin_crd(cluster: Cluster) -> Iterator[str]:
    """The resource's name of the same CRD in a group that no operator watches. Its object `started` has
    started its first step."""
    with created_twin_crd(cluster, twin_definition()) as resource:
        group = resource.partition(".")[2]
        cluster.kubectl("create", "--filename", "-", input=json.dumps(twin_manifest(group)))
        cluster.kubectl(
            "patch",
            resource,
            "started",
            "--subresource=status",
            "--type=merge",
            "--patch",
            json.dumps({"status": STATUS}),
        )
        yield resource


def twin_definition() -> dict[str, Any]:
    """The same CRD in another group."""
    group, body = f"t{secrets.token_hex(4)}.{GROUP}", crd()
    body["metadata"]["name"] = f"twins.{group}"
    body["spec"] |= {"group": group, "names": {"kind": "Twin", "plural": "twins"}}
    return body


@contextmanager
def created_twin_crd(cluster: Cluster, definition: dict[str, Any]) -> Iterator[str]:
    """The resource's name of a CRD that exists until the end of the block."""
    resource = definition["metadata"]["name"]
    cluster.kubectl("create", "--filename", "-", input=json.dumps(definition))
    try:
        cluster.kubectl("wait", "--for=condition=Established", f"crd/{resource}", "--timeout=30s")
        yield resource
    finally:
        cluster.kubectl("delete", "crd", resource, "--timeout=60s")


def twin_manifest(group: str) -> dict[str, Any]:
    changes = {
        "metadata.namespace": "default",
        "spec.stages": [*valid_specs.MINIMAL["spec"]["stages"], valid_specs.ONPOLICY],
    }
    return {**valid_specs.manifest(changes, "started"), "apiVersion": f"{group}/v1alpha1", "kind": "Twin"}


IMMUTABLE = (
    "cannot change after the first step has started: "
    "only suspend, ttlAfterFinished, deletionPolicy and runtime can."
)
FIXED_WHILE_ALIVE = (
    "cannot change while the run is alive: only attempts, interruptions, onStall and scheduling can. "
    "Set spec.suspend to true, wait for "
    "phase Suspended, change it, and set spec.suspend to false."
)
ALWAYS = {
    field: valid_specs.RUNTIME[field] for field in ("attempts", "interruptions", "onStall", "scheduling")
}
"""A change to every field of spec.runtime that may change at any time."""
RUNTIME = {field: value for field, value in valid_specs.RUNTIME.items() if field not in ALWAYS}
"""A change to every other field of spec.runtime."""


@pytest.mark.parametrize(
    "field, change",
    [
        pytest.param("spec.dataset", {"dataset": {"validFraction": 0.5}}, id="the dataset"),
        pytest.param("spec.teacher", {"teacher": {"effort": "high"}}, id="the teacher"),
        pytest.param("spec.student", {"student": {"gpus": 1}}, id="the layout"),
        pytest.param("spec.training", {"training": {"seed": 1}}, id="the seed"),
        pytest.param(
            "spec.stages", {"stages": [{"name": "first", "kind": "Vanilla"}]}, id="the list of stages"
        ),
        pytest.param("spec.evaluation", {"evaluation": {"documents": 1}}, id="the evaluation"),
        pytest.param("spec.storage", {"storage": {"prefix": "elsewhere"}}, id="the bucket"),
        pytest.param(
            "spec.resumeFrom",
            {"resumeFrom": "s3://vpmoe/runs/default/other-01234567"},
            id="resumeFrom",
        ),
    ],
)
def test_the_configuration_of_a_started_run_cannot_change(
    cluster: Cluster, twin_crd: str, field: str, change: dict[str, Any]
) -> None:
    patch = json.dumps({"spec": change})
    _, errors = kubectl(
        cluster, "patch", twin_crd, "started", "--type=merge", "--dry-run=server", "--patch", patch
    )
    assert f"{field}: Invalid value: " in errors and IMMUTABLE in errors
    assert errors.count(IMMUTABLE) == 1


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"suspend": True}, id="suspend"),
        pytest.param({"ttlAfterFinished": "1d"}, id="ttlAfterFinished"),
        pytest.param({"deletionPolicy": "Delete"}, id="deletionPolicy"),
        pytest.param({"runtime": {"attempts": 9}}, id="attempts"),
        pytest.param({"runtime": {"interruptions": 9, "onStall": "Restart"}}, id="interruptions, onStall"),
        pytest.param({"runtime": {"scheduling": "Immediate"}}, id="scheduling"),
        pytest.param({"student": {"gpus": 7}}, id="the same value"),
    ],
)
def test_other_fields_of_a_started_run_may_change(
    cluster: Cluster, twin_crd: str, change: dict[str, Any]
) -> None:
    cluster.kubectl(
        "patch",
        twin_crd,
        "started",
        "--type=merge",
        "--dry-run=server",
        "--patch",
        json.dumps({"spec": change}),
    )


def set_status(cluster: Cluster, resource: str, name: str, status: dict[str, Any]) -> None:
    """Replace phase and steps of a run's status, as the operator does."""
    cluster.kubectl(
        "patch",
        resource,
        name,
        "--subresource=status",
        "--type=merge",
        "--patch",
        json.dumps({"status": status}),
    )


def step_states(*states: str) -> list[dict[str, str]]:
    """A step of each state, of which the first has started."""
    steps = [{"name": f"step{i}", "state": state} for i, state in enumerate(states)]
    return [{**steps[0], "started": "2026-01-01T00:00:00Z"}, *steps[1:]]


NOT_ALIVE = {
    "not started": {"phase": "Pending", "steps": [{"name": "preprocess", "state": "Pending"}]},
    "queued": {"phase": "Queued", "steps": step_states("Succeeded", "Queued")},
    "pending": {"phase": "Pending", "steps": step_states("Succeeded", "Pending")},
    "suspended": {"phase": "Suspended", "steps": step_states("Succeeded", "Suspended", "Pending")},
    "failed": {"phase": "Failed", "steps": step_states("Succeeded", "Failed", "Pending")},
    "without a status": {"phase": None, "steps": None},
}
ALIVE = {
    "running": {"phase": "Running", "steps": step_states("Succeeded", "Running")},
    "between two attempts": {"phase": "Running", "steps": step_states("Succeeded", "Retrying")},
    "held by Kueue": {"phase": "Queued", "steps": step_states("Succeeded", "Running")},
}


@pytest.fixture(scope="module")
def changing(cluster: Cluster, twin_crd: str) -> str:
    """A run whose status tests replace."""
    body = {
        **twin_manifest(twin_crd.partition(".")[2]),
        "metadata": {"name": "changing", "namespace": "default"},
    }
    cluster.kubectl("create", "--filename", "-", input=json.dumps(body))
    return "changing"


def patch_runtime(cluster: Cluster, resource: str, name: str, runtime: dict[str, Any]) -> str:
    """Errors of a change to spec.runtime that is not stored."""
    patch = json.dumps({"spec": {"runtime": runtime}})
    return kubectl(cluster, "patch", resource, name, "--type=merge", "--dry-run=server", "--patch", patch)[1]


def test_the_cases_change_every_field_of_runtime() -> None:
    assert {*RUNTIME, *ALWAYS} == {str(field.alias) for field in RuntimeSpec.model_fields.values()}


@pytest.mark.parametrize("status", [pytest.param(status, id=name) for name, status in NOT_ALIVE.items()])
def test_runtime_may_change_while_nothing_of_the_run_is_alive(
    cluster: Cluster, twin_crd: str, changing: str, status: dict[str, Any]
) -> None:
    set_status(cluster, twin_crd, changing, status)
    assert patch_runtime(cluster, twin_crd, changing, RUNTIME) == ""


@pytest.mark.parametrize("status", [pytest.param(status, id=name) for name, status in ALIVE.items()])
def test_runtime_of_a_live_run_cannot_change_and_the_message_says_to_suspend(
    cluster: Cluster, twin_crd: str, changing: str, status: dict[str, Any]
) -> None:
    set_status(cluster, twin_crd, changing, status)
    errors = patch_runtime(cluster, twin_crd, changing, {**RUNTIME, **ALWAYS})
    assert errors.count(FIXED_WHILE_ALIVE) == len(RUNTIME)
    assert {field for field in RUNTIME if f"spec.runtime.{field}: Invalid value: " in errors} == set(RUNTIME)
    assert patch_runtime(cluster, twin_crd, changing, ALWAYS) == ""


def test_a_run_may_change_until_its_first_step_has_started(cluster: Cluster, twin_crd: str) -> None:
    group = twin_crd.partition(".")[2]
    not_started = {**twin_manifest(group), "metadata": {"name": "waiting", "namespace": "default"}}
    cluster.kubectl("create", "--filename", "-", input=json.dumps(not_started))
    queued = {"status": {"phase": "Queued", "steps": [{"name": "preprocess", "state": "Queued"}]}}
    cluster.kubectl(
        "patch", twin_crd, "waiting", "--subresource=status", "--type=merge", "--patch", json.dumps(queued)
    )
    cluster.kubectl(
        "patch",
        twin_crd,
        "waiting",
        "--type=merge",
        "--patch",
        json.dumps({"spec": {"training": {"seed": 1}}}),
    )


LATER_RULES = ("a validity that a TeacherForced stage cannot measure", "a validity that no step measures")


def test_a_stored_run_that_breaks_a_later_rule_can_be_suspended(cluster: Cluster) -> None:
    """It was stored before the CRD had the rule. Only a change of what the rule is about is checked."""
    definition = twin_definition()
    earlier = json.loads(json.dumps(definition))
    spec = earlier["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    for node in (spec, spec["properties"]["stages"]["items"]):
        rules = node["x-kubernetes-validations"]
        node["x-kubernetes-validations"] = [rule for rule in rules if "minValidity" not in rule["rule"]]
        assert len(node["x-kubernetes-validations"]) == len(rules) - 1
    with created_twin_crd(cluster, earlier) as resource:
        for i, name in enumerate(LATER_RULES):
            changes = {**invalid_specs.INVALID[name].changes, "metadata.namespace": "default"}
            body = valid_specs.manifest(changes, f"stored-{i}")
            body |= {"apiVersion": f"{resource.partition('.')[2]}/v1alpha1", "kind": "Twin"}
            cluster.kubectl("create", "--filename", "-", input=json.dumps(body))
        cluster.kubectl("replace", "--filename", "-", input=json.dumps(definition))
        for i, name in enumerate(LATER_RULES):
            stages = json.loads(cluster.kubectl("get", resource, f"stored-{i}", "--output=json"))["spec"][
                "stages"
            ]
            changed = json.dumps({"spec": {"stages": [{**stages[0], "tokens": "7M"}, *stages[1:]]}})
            patch = ("patch", resource, f"stored-{i}", "--type=merge", "--patch")
            message = invalid_specs.INVALID[name].message
            wait_until(
                lambda: message in kubectl(cluster, *patch, changed, "--dry-run=server")[1],  # noqa: B023
                f"the API server checks the rule about {name}",
            )
            cluster.kubectl(*patch, json.dumps({"spec": {"suspend": True}}))
            cluster.kubectl(*patch, json.dumps({"status": STATUS}), "--subresource=status")


def test_kubectl_get_shows_the_progress_of_a_run(cluster: Cluster, twin_crd: str) -> None:
    def columns(*arguments: str) -> dict[str, str]:
        header, row = cluster.kubectl("get", twin_crd, "started", *arguments).splitlines()
        return dict(zip(header.split(), row.split(), strict=True))

    expected = {
        "NAME": "started",
        "PHASE": "Running",
        "STEP": "first",
        "PROGRESS": "42%",
        "TOKENS/S": "12345",
        "LOSS": "2.3456",
    }
    narrow, wide = columns(), columns("--output=wide")
    assert {key: value for key, value in narrow.items() if key != "AGE"} == expected
    assert {key: wide[key] for key in ("ETA", "TEACHER", "MODEL", "CONFIG")} == {
        "ETA": "2026-01-02T03:04Z",
        "TEACHER": "s3://models/gpt-oss-120b",
        "MODEL": "s3://vpmoe/models/first",
        "CONFIG": "0123456789abcdef",
    }
