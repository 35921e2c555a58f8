"""The API server accepts and rejects the same runs as the models: same messages, same defaults.

Everything but immutability is tested with --dry-run=server against the installed CRD. Immutability needs a
stored status, which a running operator would overwrite: it is tested on the same CRD under another group.
"""

import json
import os
import re
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from devcluster.access import Cluster
from tests.fakes import invalid_specs, valid_specs
from vpmoe.api import DistillRun, load_run
from vpmoe.api.crd import crd
from vpmoe.api.run import GROUP, PLURAL

MANIFESTS = Path(__file__).parents[2] / "manifests"
EXAMPLES = sorted((MANIFESTS / "examples").glob("*.yaml"))
GOOD = {
    name: valid_specs.manifest(changes, f"good-{i}")
    for i, (name, changes) in enumerate(valid_specs.VALID.items())
}
BAD = {
    name: valid_specs.manifest(bad.changes, f"bad-{i}")
    for i, (name, bad) in enumerate(invalid_specs.INVALID.items())
}
DROPPED = {"a conversation without a date"}
"""Specs in which null is not the same as absent. Client-side apply drops null."""


def kubectl(cluster: Cluster, *arguments: str) -> tuple[str, str]:
    """stdout and stderr of kubectl."""
    environment = {**os.environ, "KUBECONFIG": str(cluster.kubeconfig)}
    ended = subprocess.run(
        [cluster.kubectl_path, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    return ended.stdout, ended.stderr


def files(objects: dict[str, dict[str, Any]], folder: Path) -> Path:
    for i, body in enumerate(objects.values()):
        (folder / f"{i:03d}.json").write_text(json.dumps(body), encoding="utf-8")
    return folder


def stored(printed: str) -> dict[str, dict[str, Any]]:
    """Objects by name from kubectl's JSON: one object, or a List of them."""
    answer = json.loads(printed)
    return {
        item["metadata"]["name"]: item for item in (answer["items"] if answer["kind"] == "List" else [answer])
    }


@pytest.fixture(scope="module")
def applied(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every good run as the API server returns it, by name."""
    folder = files(GOOD, tmp_path_factory.mktemp("good"))
    printed, errors = kubectl(
        cluster, "apply", "--server-side", "--dry-run=server", "--output=json", "--filename", str(folder)
    )
    assert errors == ""
    return stored(printed)


@pytest.fixture(scope="module")
def rejections(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The API server's message for every bad run, by the case's name. A run that it accepts is not in it."""
    folder = files(BAD, tmp_path_factory.mktemp("bad"))
    _, errors = kubectl(cluster, "apply", "--dry-run=server", "--filename", str(folder))
    numbered = {
        int(found["i"]): line
        for line in errors.splitlines()
        if (found := re.search(r"/(?P<i>\d{3})\.json\"", line))
    }
    return {name: numbered[i] for i, name in enumerate(BAD) if i in numbered}


def test_the_installed_crd_is_that_of_the_models(cluster: Cluster) -> None:
    installed = json.loads(cluster.kubectl("get", "crd", f"{PLURAL}.{GROUP}", "--output=json"))
    assert installed["spec"]["versions"][0]["schema"] == crd()["spec"]["versions"][0]["schema"]


def test_client_side_apply_takes_the_crd(cluster: Cluster) -> None:
    cluster.kubectl("apply", "--dry-run=server", "--filename", str(MANIFESTS / "crd.yaml"))


@pytest.mark.parametrize("name", GOOD)
def test_a_good_run_is_accepted_with_the_defaults_of_the_models(
    applied: dict[str, dict[str, Any]], name: str
) -> None:
    answer = applied[GOOD[name]["metadata"]["name"]]
    assert DistillRun.parse(answer).config() == DistillRun.parse(GOOD[name]).config()


@pytest.mark.parametrize("name", BAD)
def test_a_bad_run_is_rejected_with_its_field_and_the_remedy(rejections: dict[str, str], name: str) -> None:
    bad = invalid_specs.INVALID[name]
    assert name in rejections, "accepted"
    if bad.server:
        assert bad.server in rejections[name]
    else:
        assert f"{bad.field}: Invalid value: " in rejections[name] and bad.message in rejections[name]
    assert "no such key" not in rejections[name] and "evaluating rule" not in rejections[name], (
        "a rule raised an error"
    )


def test_null_and_absent_mean_the_same_unless_the_field_says_otherwise(
    cluster: Cluster, tmp_path: Path
) -> None:
    folder = files({name: body for name, body in GOOD.items() if name not in DROPPED}, tmp_path)
    answers = stored(
        kubectl(cluster, "apply", "--dry-run=server", "--output=json", "--filename", str(folder))[0]
    )
    for body in GOOD.values():
        if (answer := answers.get(body["metadata"]["name"])) is not None:
            assert DistillRun.parse(answer).config_hash == DistillRun.parse(body).config_hash, body
    assert len(answers) == len(GOOD) - len(DROPPED)


AS_TEXT = """
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
    "plain": AS_TEXT.format(name="plain", date='"2026-02-03"', tokens="1000000", rate="0.0003"),
    "as-people-write": AS_TEXT.format(
        name="as-people-write", date="2026-02-03", tokens="1_000_000", rate="3e-4"
    ),
    "with-exponents": AS_TEXT.format(name="with-exponents", date="2026-02-03", tokens="1e6", rate="3.0E-4"),
}


@pytest.fixture(scope="module")
def texts(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[Path, dict[str, Any]]:
    """YAML files, and each as the API server returns it."""
    folder = tmp_path_factory.mktemp("texts")
    for name, text in SCALARS.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    paths = [*EXAMPLES, *folder.iterdir()]
    named = [argument for path in paths for argument in ("--filename", str(path))]
    answers = stored(cluster.kubectl("apply", "--dry-run=server", "--output=json", *named))
    return {path: answers[load_run(path).metadata.name] for path in paths}


def test_kubectl_reads_an_example_as_the_models_do(texts: dict[Path, dict[str, Any]]) -> None:
    for path in EXAMPLES:
        assert DistillRun.parse(texts[path]).config_hash == load_run(path).config_hash, path


def test_kubectl_reads_dates_and_numbers_as_the_models_do(texts: dict[Path, dict[str, Any]]) -> None:
    hashes = [
        hash
        for path, answer in texts.items()
        if path.stem in SCALARS
        for hash in (load_run(path).config_hash, parsed(answer))
    ]
    assert len(hashes) == 2 * len(SCALARS) and len(set(hashes)) == 1


def parsed(answer: dict[str, Any]) -> str:
    return DistillRun.parse(answer).config_hash


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
    "config": "0123456789abcdef",
    "steps": [
        {"name": "preprocess", "state": "Succeeded", "started": "2026-01-01T00:00:00Z"},
        {"name": "first", "state": "Running", "started": "2026-01-01T00:01:00Z"},
    ],
}


@pytest.fixture(scope="module")
def twin(cluster: Cluster) -> Iterator[str]:
    """The same CRD in a group that no operator watches, with an object `started` after its first step.

    Returns the resource's name.
    """
    group = f"t{secrets.token_hex(4)}.{GROUP}"
    resource = f"twins.{group}"
    body = crd()
    body["metadata"]["name"] = resource
    body["spec"] |= {"group": group, "names": {"kind": "Twin", "plural": "twins"}}
    cluster.kubectl("create", "--filename", "-", input=json.dumps(body))
    try:
        cluster.kubectl("wait", "--for=condition=Established", f"crd/{resource}", "--timeout=30s")
        cluster.kubectl("create", "--filename", "-", input=json.dumps(run_of(group)))
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
    finally:
        cluster.kubectl("delete", "crd", resource, "--timeout=60s")


def run_of(group: str) -> dict[str, Any]:
    changes = {
        "metadata.namespace": "default",
        "spec.stages": [*valid_specs.MINIMAL["spec"]["stages"], valid_specs.ONPOLICY],
    }
    return {**valid_specs.manifest(changes, "started"), "apiVersion": f"{group}/v1alpha1", "kind": "Twin"}


FROZEN = (
    "cannot change after the first step has started: "
    "only suspend, ttlAfterFinished, deletionPolicy and runtime.attempts can."
)


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
        pytest.param("spec.runtime.backend", {"runtime": {"backend": "Job"}}, id="the backend"),
        pytest.param("spec.runtime.nodeSelector", {"runtime": {"nodeSelector": {"a": "b"}}}, id="the nodes"),
        pytest.param(
            "spec.resumeFrom",
            {"resumeFrom": "s3://vpmoe/runs/default/other-01234567"},
            id="resumeFrom",
        ),
    ],
)
def test_the_configuration_of_a_started_run_cannot_change(
    cluster: Cluster, twin: str, field: str, change: dict[str, Any]
) -> None:
    patch = json.dumps({"spec": change})
    _, errors = kubectl(
        cluster, "patch", twin, "started", "--type=merge", "--dry-run=server", "--patch", patch
    )
    assert f"{field}: Invalid value: " in errors and FROZEN in errors
    assert errors.count(FROZEN) == 1


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"suspend": True}, id="suspend"),
        pytest.param({"ttlAfterFinished": "1d"}, id="ttlAfterFinished"),
        pytest.param({"deletionPolicy": "Delete"}, id="deletionPolicy"),
        pytest.param({"runtime": {"attempts": 9}}, id="attempts"),
        pytest.param({"student": {"gpus": 7}}, id="the same value"),
    ],
)
def test_other_fields_of_a_started_run_may_change(
    cluster: Cluster, twin: str, change: dict[str, Any]
) -> None:
    cluster.kubectl(
        "patch", twin, "started", "--type=merge", "--dry-run=server", "--patch", json.dumps({"spec": change})
    )


def test_a_run_may_change_until_its_first_step_has_started(cluster: Cluster, twin: str) -> None:
    group = twin.partition(".")[2]
    waiting = {**run_of(group), "metadata": {"name": "waiting", "namespace": "default"}}
    cluster.kubectl("create", "--filename", "-", input=json.dumps(waiting))
    queued = {"status": {"phase": "Queued", "steps": [{"name": "preprocess", "state": "Queued"}]}}
    cluster.kubectl(
        "patch", twin, "waiting", "--subresource=status", "--type=merge", "--patch", json.dumps(queued)
    )
    cluster.kubectl(
        "patch", twin, "waiting", "--type=merge", "--patch", json.dumps({"spec": {"training": {"seed": 1}}})
    )


def test_kubectl_get_shows_the_progress_of_a_run(cluster: Cluster, twin: str) -> None:
    def columns(*arguments: str) -> dict[str, str]:
        header, row = cluster.kubectl("get", twin, "started", *arguments).splitlines()
        return dict(zip(header.split(), row.split(), strict=True))

    shown = {
        "NAME": "started",
        "PHASE": "Running",
        "STEP": "first",
        "PROGRESS": "42%",
        "TOKENS/S": "12345",
        "LOSS": "2.3456",
    }
    narrow, wide = columns(), columns("--output=wide")
    assert {key: value for key, value in narrow.items() if key != "AGE"} == shown
    assert {key: wide[key] for key in ("TEACHER", "CONFIG")} == {
        "TEACHER": "s3://models/gpt-oss-120b",
        "CONFIG": "0123456789abcdef",
    }
