"""`vpmoe validate`: every problem with field, value and remedy; several documents and kinds in one file."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import invalid_specs, valid_specs
from vpmoe.api.run import MOST_BYTES
from vpmoe.api.text import write_yaml
from vpmoe.cli.main import main

EXAMPLES = Path(__file__).parents[3] / "manifests" / "examples"
SECRET = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "vpmoe-s3"}}


def run(name: str, **changes: Any) -> dict[str, Any]:
    found = valid_specs.manifest(changes)
    return {**found, "metadata": {**found["metadata"], "name": name}}


def write(folder: Path, *documents: Any) -> str:
    path = folder / "run.yaml"
    path.write_text("---\n".join(map(write_yaml, documents)))
    return str(path)


def test_the_examples_are_valid(capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted(map(str, EXAMPLES.glob("*.yaml")))
    assert main(["validate", *files]) == 0
    out, err = capsys.readouterr()
    assert err == "" and [line.partition(": ")[0] for line in out.splitlines()] == files


@pytest.mark.parametrize("bad", [pytest.param(bad, id=name) for name, bad in invalid_specs.INVALID.items()])
def test_what_the_api_server_rejects_is_rejected(
    bad: invalid_specs.InvalidSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cluster's tests apply the same specs to an API server."""
    file = tmp_path / "run.json"
    file.write_text(json.dumps(valid_specs.manifest(bad.changes)))
    assert main(["validate", str(file)]) == 65
    out, err = capsys.readouterr()
    source, problem = err.splitlines()
    assert (out, source) == ("", f"{file}:")
    assert problem.startswith(f"  {bad.field}: ") and bad.message in problem


def test_each_document_is_checked_and_other_kinds_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, SECRET, run("one"), None, run("two", **{"spec.teacher.gpus": -1}), run("three"))
    assert main(["validate", file]) == 65
    out, err = capsys.readouterr()
    assert [line.split(" is valid")[0] for line in out.splitlines()] == [
        f"{file}: default/one",
        f"{file}: default/three",
    ]
    assert err == f"{file}, DistillRun 2 of 3:\n  spec.teacher.gpus: -1 must be at least 0\n"


def test_objects_of_a_cluster_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`kubectl get distillruns --output=yaml` prints a List of objects with a status."""
    stored = {**run("one"), "status": {"phase": "Running"}}
    file = write(tmp_path, {"apiVersion": "v1", "kind": "List", "items": [stored, SECRET, run("two")]})
    assert main(["validate", file]) == 0
    assert capsys.readouterr().out.count(" is valid: ") == 2


@pytest.mark.parametrize(
    "documents, problem",
    [
        pytest.param([SECRET, SECRET], "has no object of kind DistillRun", id="other-kinds"),
        pytest.param([None], "has no object of kind DistillRun", id="empty"),
        pytest.param(
            [{**valid_specs.manifest({}), "kind": "DistilRun"}],
            'kind: "DistilRun" must be DistillRun',
            id="misspelt-kind",
        ),
        pytest.param(
            [SECRET, {**valid_specs.manifest({}), "kind": "DistilRun"}],
            'kind: "DistilRun" must be DistillRun',
            id="misspelt-kind-beside-another-object",
        ),
        pytest.param(["text"], "a DistillRun is a mapping with apiVersion", id="text"),
    ],
)
def test_a_file_without_a_run_is_rejected(
    documents: list[Any], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, *documents)
    assert main(["validate", file]) == 65
    assert capsys.readouterr().err.startswith(f"{file}:\n  {problem}")


@pytest.mark.parametrize(
    "content, problem",
    [
        pytest.param(b"a: [", "is not YAML: while parsing", id="not-yaml"),
        pytest.param(b"\xff", "is not YAML: ", id="not-utf8"),
        pytest.param(b"a: 1\n---\nb: [\n", "is not YAML: ", id="second-document"),
        pytest.param(b" " * (MOST_BYTES + 1), f"is larger than {MOST_BYTES} bytes", id="large"),
    ],
)
def test_a_file_that_is_not_yaml_is_rejected(
    content: bytes, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    assert main(["validate", str(file)]) == 65
    assert capsys.readouterr().err.startswith(f"{file}:\n  {problem}")


def test_an_unreadable_file_does_not_hide_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", str(tmp_path), write(tmp_path, run("one"))]) == 65
    out, err = capsys.readouterr()
    assert err == f"{tmp_path}:\n  cannot be read: Is a directory\n" and " is valid: " in out


def test_standard_input_is_read(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(write_yaml(run("one")).encode())))
    assert main(["validate", "-"]) == 0
    assert capsys.readouterr().out.startswith("standard input: default/one is valid: ")


@pytest.mark.parametrize("arguments", [[], ["validate"], ["nothing"], ["validate", "--unknown", "x"]])
def test_a_wrong_command_line_ends_with_64(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 64 and capsys.readouterr().err.startswith("usage: vpmoe")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["validate", "--help"]])
def test_help_and_version_end_with_0(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0 and "vpmoe" in capsys.readouterr().out
