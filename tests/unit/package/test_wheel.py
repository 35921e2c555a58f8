"""The wheel has the packages and nothing else, and runs where only what it requires is installed."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.fakes import clean_environment

ROOT = Path(__file__).parents[3]
PACKAGES = {"vpmoe": ROOT, "jobs": ROOT, "distill_operator": ROOT / "operator"}
FULL = ROOT / "manifests/examples/full.yaml"


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that has only the wheel and what it requires."""
    return clean_environment.install_with_its_requirements(wheel, tmp_path_factory.mktemp("clean") / "venv")


def run(folder: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env=clean_environment.environment(), capture_output=True, text=True
    )


def test_the_wheel_has_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    expected = {
        file.relative_to(folder).as_posix()
        for package, folder in PACKAGES.items()
        for file in (folder / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        found = set(archive.namelist())
    metadata = {name for name in found if name.partition("/")[0].endswith(".dist-info")}
    assert found - metadata == expected
    assert {name.partition("/")[2] for name in metadata} == {
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "licenses/LICENSE",
        "top_level.txt",
    }


def test_the_wheel_requires_pydantic_and_yaml_only(programs: Path) -> None:
    """Beside the standard library, `vpmoe validate` finds these and nothing else."""
    python = programs / "python"
    listed = run(programs, sys.executable, "-m", "uv", "pip", "list", "--format=freeze", "--python", python)
    names = {line.partition("==")[0] for line in listed.stdout.splitlines()}
    assert names == {
        "annotated-types",
        "pydantic",
        "pydantic-core",
        "pyyaml",
        "typing-extensions",
        "typing-inspection",
        "vpmoe",
    }


def test_validate_runs_on_any_machine(programs: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(FULL.read_text())
    for command in ([programs / "vpmoe"], [programs / "python", "-m", "vpmoe"]):
        valid = run(tmp_path, *command, "validate", "run.yaml")
        assert (valid.returncode, valid.stderr) == (0, "")
        assert valid.stdout.startswith("run.yaml: default/full is valid: stages vanilla (Vanilla), ")
    file.write_text(FULL.read_text().replace("gpus: 6", "gpus: 0"))
    invalid = run(tmp_path, programs / "vpmoe", "validate", "run.yaml")
    assert (invalid.returncode, invalid.stdout) == (65, "")
    assert "spec.student.gpus: 0 must be at least 1" in invalid.stderr


@pytest.mark.parametrize(
    "extra, arguments",
    [
        ("data", ["verify", "s3://bucket"]),
        ("kubectl", ["status", "first"]),
        ("kubectl", ["logs", "first"]),
        ("kubectl", ["report", "first"]),
        ("report", ["report", "s3://bucket/runs/default/first-0a1b2c3d"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_subcommand_whose_extra_is_missing_names_it(
    extra: str, arguments: list[str], programs: Path, tmp_path: Path
) -> None:
    found = run(tmp_path, programs / "vpmoe", *arguments)
    assert (found.returncode, found.stdout) == (65, "")
    assert found.stderr.startswith(f"vpmoe {arguments[0]}: the Python package ")
    assert found.stderr.endswith(
        f" is not installed. Install vpmoe with the extra {extra}: pip install 'vpmoe[{extra}]'\n"
    )


def test_kubectl_finds_the_same_command_as_its_plugin(programs: Path, tmp_path: Path) -> None:
    """kubectl runs kubectl-distill from PATH for `kubectl distill`."""
    found = run(tmp_path, programs / "kubectl-distill", "--help")
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.startswith("usage: kubectl distill ")
    assert run(tmp_path, programs / "kubectl-distill", "plan", FULL).returncode == 0


def test_help_names_every_subcommand(programs: Path, tmp_path: Path) -> None:
    from vpmoe.cli.main import SUBCOMMANDS

    found = run(tmp_path, programs / "vpmoe", "--help")
    assert (found.returncode, found.stderr) == (0, "")
    assert all(f"\n    {name} " in found.stdout for name in SUBCOMMANDS)


def test_an_installed_package_does_not_come_from_this_checkout(programs: Path, tmp_path: Path) -> None:
    """Otherwise the tests above would show nothing."""
    code = f"import {', '.join(PACKAGES)}; print({', '.join(f'{package}.__file__' for package in PACKAGES)})"
    found = run(tmp_path, programs / "python", "-c", code)
    assert found.stdout.split() == [
        str(programs.parent / clean_environment.SITE / package / "__init__.py") for package in PACKAGES
    ]
