"""The commands that README and docs tell a user: README's are run, and what the others name exists."""

import ast
import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

from tests.fakes import chart, clean_environment
from tests.fakes.documented_commands import Command, calls, console_commands, text_commands
from vpmoe.cli.main import SUBCOMMANDS, main
from vpmoe.rollout import __main__ as rollout

ROOT = Path(__file__).parents[3]
README = ROOT / "README.md"
FILES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PACKAGES = {
    **dict.fromkeys(("benchmarks", "demo", "devcluster", "jobs", "tests", "vpmoe"), ROOT),
    "distill_operator": ROOT / "operator",
}


@dataclass(frozen=True)
class RunHere:
    """A command that the tests below run as written, in a copy of the checkout."""

    shows: str
    """Part of its output."""
    added: str = ""
    """An option for a machine without a cluster."""


@dataclass(frozen=True)
class RunBy:
    """A command that other tests run."""

    tests: tuple[str, ...]
    differs: str = ""
    """How what they run differs from the command as written."""


@dataclass(frozen=True)
class NotRun:
    """A command that no test runs."""

    needs: str


IMAGES = "tests/kind/test_images.py::test_a_run_is_preprocessed_trained_and_evaluated_in_containers"
RUN = "tests/e2e/test_run.py::test_a_run_succeeds_and_its_loss_decreases_in_both_spans"
CHART = "tests/cluster/test_operator_chart.py::test_the_installed_operator_is_ready_and_unprivileged"
STUDENT = "tests/e2e/test_run.py::test_the_exported_student_answers_from_the_bucket"
KUBECTL = "tests/e2e/test_run.py::test_kubectl_shows_status_events_and_documentation"
EXAMPLES = "tests/cluster/test_admission.py::test_kubectl_parses_the_examples_like_the_models"
LIFECYCLE = "tests/devcluster/test_lifecycle.py"

PROOFS: dict[str, RunHere | RunBy | NotRun] = {
    "make demo CLUSTER=kind": RunBy((IMAGES, RUN, STUDENT), "in parts: `make test-kind` runs them on kind"),
    "make demo": RunBy(
        (
            f"{LIFECYCLE}::test_after_up_gpus_are_allocatable_and_pytorchjobs_are_validated",
            CHART,
            RUN,
            "tests/e2e/test_stages.py::test_a_run_of_all_kinds_of_stages_succeeds",
            STUDENT,
            "tests/unit/demo/test_commands.py::test_the_student_is_exported_and_asked_a_question_of_the_sample",
        ),
        "in parts, with smaller runs",
    ),
    "make cluster": RunBy((f"{LIFECYCLE}::test_a_second_up_keeps_the_node",), "python -m devcluster up"),
    "make down": RunBy((f"{LIFECYCLE}::test_down_restores_the_machine",), "python -m devcluster down"),
    "make check": NotRun("nothing: it runs this test"),
    "make test": NotRun("nothing: it runs this test"),
    "make test-kind": NotRun("Docker, and half an hour"),
    "make test-cuda-images": NotRun("Docker, and 30 GB of disk"),
    "pip install .": RunBy(
        ("tests/unit/package/test_wheel.py::test_the_wheel_requires_pydantic_and_yaml_only",),
        "the wheel that pip would build, installed by uv without a package index",
    ),
    "vpmoe validate manifests/examples/full.yaml": RunHere("full is valid: stages vanilla (Vanilla)"),
    "vpmoe count --shape vpmoe-6b": RunHere("6,029,894,927"),
    "vpmoe plan manifests/examples/full.yaml": RunHere("GPU hours on 8 GPUs"),
    "make images push REGISTRY=registry.example.com/vpmoe": RunBy(
        (IMAGES,), "the images that `make images` builds; to push them needs a registry"
    ),
    "helm install distill-operator charts/distill-operator --namespace vpmoe-system --create-namespace "
    "--wait --set images.registry=registry.example.com/vpmoe "
    '--set images.tag="$(git rev-parse --short=12 HEAD)"': RunHere(
        "registry.example.com/vpmoe/operator:", "--dry-run=client"
    ),
    "kubectl create secret generic vpmoe-s3 --from-literal=AWS_ACCESS_KEY_ID=… "
    "--from-literal=AWS_SECRET_ACCESS_KEY=…": RunHere("secret/vpmoe-s3 created", "--dry-run=client"),
    "kubectl apply -f manifests/examples/onpolicy.yaml": RunBy((EXAMPLES,), "with --dry-run=server"),
    "kubectl get distillruns --output=wide": RunBy((KUBECTL,)),
    "kubectl get distillruns --watch": RunBy((KUBECTL,), "without --watch"),
    "kubectl distill status onpolicy --watch": RunBy(
        (
            "tests/cluster/test_follow.py::test_the_plugin_runs_under_kubectl",
            "tests/cluster/test_follow.py::test_a_run_is_watched_until_it_succeeds_and_its_logs_are_followed",
        ),
        "of another run",
    ),
    "kubectl explain distillrun.spec": RunBy((KUBECTL,), "of distillrun.spec.stages"),
    ".venv/bin/python -m vpmoe export s3://vpmoe/runs/default/demo-338abf4f --to .devcluster/model": RunBy(
        (STUDENT,), "of that test's run"
    ),
    ".venv/bin/python -m vpmoe chat .devcluster/model "
    "'Why does the Moon always show the same face to Earth?' "
    "--effort high --max-tokens 192": RunBy((STUDENT,), "another question, and a shorter answer"),
    "python -m jobs.init": RunBy((RUN,), "in the pods of the run"),
    "helm install": RunBy((CHART,), "helm upgrade --install"),
}
"""Each command of README → what shows that it works."""


def commands(file: Path) -> list[Command]:
    """All commands of a file."""
    return [*console_commands(file), *text_commands(file)]


def where(command: Command) -> str:
    return f"{command.file.relative_to(ROOT)}:{command.line}: {command.text}"


def test_every_command_of_the_readme_has_a_proof() -> None:
    found = commands(README)
    for command in found:
        assert command.text in PROOFS, (
            f"{where(command)} has no proof. Add it to PROOFS in {Path(__file__).relative_to(ROOT)}: "
            "RunHere, if a machine without cluster, GPU and registry runs it within seconds; RunBy with the "
            "tests that run it; or NotRun with what it needs."
        )
    gone = PROOFS.keys() - {command.text for command in found}
    assert not gone, f"no longer in README, remove from PROOFS: {gone}"


def test_the_tests_that_run_commands_of_the_readme_exist() -> None:
    for text, proof in PROOFS.items():
        for test in proof.tests if isinstance(proof, RunBy) else ():
            file, _, name = test.partition("::")
            defined = {
                node.name
                for node in ast.parse((ROOT / file).read_text()).body
                if isinstance(node, ast.FunctionDef)
            }
            assert name in defined, (
                f"PROOFS[{text!r}]: {test} does not exist. Name the test that runs it now."
            )


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout."""
    return clean_environment.copy_checkout(tmp_path_factory.mktemp("checkout") / "vpmoe")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of a shell that finds `vpmoe`, the commit of the copy, and no cluster."""
    programs = tmp_path_factory.mktemp("programs")
    program = programs / "vpmoe"  # an installed one is in tests/unit/package/test_wheel.py
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m vpmoe "$@"\n')
    program.chmod(0o755)
    git = subprocess.check_output(["git", "rev-parse", "--absolute-git-dir"], cwd=ROOT, text=True).strip()
    return clean_environment.environment(
        PATH=f"{programs}{os.pathsep}{os.environ['PATH']}",
        KUBECONFIG=str(programs / "none"),
        GIT_DIR=git,
        HOME=str(programs),
    )


def run_as_written(text: str, folder: Path, environment: dict[str, str]) -> None:
    proof = PROOFS[text]
    assert isinstance(proof, RunHere)
    ended = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"{text} {proof.added}"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert proof.shows in ended.stdout


HERE = [text for text, proof in PROOFS.items() if isinstance(proof, RunHere)]
WITH_HELM = [text for text in HERE if text.startswith(("helm ", "kubectl "))]


@pytest.mark.parametrize("text", [text for text in HERE if text not in WITH_HELM])
def test_a_command_of_the_readme_runs_as_written(text: str, copy: Path, environment: dict[str, str]) -> None:
    run_as_written(text, copy, environment)


@pytest.mark.parametrize("text", WITH_HELM)
def test_a_command_with_helm_or_kubectl_runs_as_written(
    text: str, copy: Path, environment: dict[str, str], helm: Path
) -> None:
    run_as_written(text, copy, {**environment, "PATH": f"{helm.parent}{os.pathsep}{environment['PATH']}"})


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_console_blocks_are_shell(file: Path) -> None:
    lines = {
        command.line: command.text.replace("[", "").replace("]", "") for command in console_commands(file)
    }
    script = "\n".join(lines.values()) + "\n"
    ended = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, f"{file}: {ended.stderr}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_what_commands_name_exists(file: Path) -> None:
    """Targets and variables of make; modules, subcommands and options of Python; values of the chart."""
    found = commands(file)
    function = any(command.text.startswith("vpmoe()") for command in found)  # it wraps `docker run`
    faults = [
        f"{where(command)}: {fault}"
        for command in found
        for words in calls(command.text.replace("[", "").replace("]", ""))
        for fault in unknown(words, function)
    ]
    assert not faults, "\n".join(faults)


def unknown(words: list[str], vpmoe_is_a_function: bool) -> Iterator[str]:
    """What the words of one call name and does not exist."""
    if words[0] == "make":
        yield from _unknown_to_make(tuple(words[1:]))
    if words[0] == "helm":
        for option, value in pairwise(words):
            name = value.partition("=")[0]
            if option == "--set" and name not in dict(chart.fields()):
                yield f"the chart has no value {name}"
    if words[:2] == ["kubectl", "distill"] and len(words) > 2:
        yield from _unknown_to_vpmoe(words[2:])
    for place, word in enumerate(words):
        rest = words[place + 1 :]
        if word.endswith("python") and rest[:1] == ["-m"]:
            yield from _unknown_module(rest[1], rest[2:])
        elif word == "vpmoe" and rest and (place > 0) == vpmoe_is_a_function and words[place - 1] != "-m":
            yield from _unknown_to_vpmoe(rest)


@cache
def _unknown_to_make(arguments: tuple[str, ...]) -> tuple[str, ...]:
    makefiles = [ROOT / "Makefile", ROOT / "docker/images.sh", *(ROOT / "devcluster").glob("*.py")]
    text = "\n".join(file.read_text() for file in makefiles)
    variables = [argument.partition("=")[0] for argument in arguments if "=" in argument]
    faults = [f"nothing reads {name}" for name in variables if not re.search(rf"\b{name}\b", text)]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))
    }
    ended = subprocess.run(
        ["make", "--dry-run", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return (*faults, *([ended.stderr.strip()] if ended.returncode else []))


def _unknown_module(name: str, arguments: list[str]) -> Iterator[str]:
    top, *others = name.split(".")
    if "…" in name or name != name.lower():  # a placeholder
        return
    if top not in PACKAGES:
        if find_spec(top) is None:
            yield f"no module {top}"
        return
    path = PACKAGES[top].joinpath(top, *others)
    file = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__main__.py"
    if not file.exists():
        yield f"python -m {name} starts nothing"
    elif name == "vpmoe":
        yield from _unknown_to_vpmoe(arguments)
    else:
        source = "\n".join(each.read_text() for each in file.parent.glob("*.py"))
        options = [word.partition("=")[0] for word in arguments if word.startswith("--")]
        yield from (f"{name} has no option {option}" for option in options if f'"{option}"' not in source)


def _unknown_to_vpmoe(arguments: list[str]) -> Iterator[str]:
    name = arguments[0] if arguments else ""
    if name in ("", "SUBCOMMAND") or name.startswith("--"):
        name, arguments = "", [word for word in arguments if word != "SUBCOMMAND"]
    elif name not in SUBCOMMANDS:
        yield f"vpmoe has no subcommand {name}"
        return
    options = {word.partition("=")[0] for word in arguments if word.startswith("--")}
    words = [name, *(arguments[1:2] if name in WITH_COMMANDS else [])]
    known = _options_of_vpmoe(" ".join(words))
    yield from (f"vpmoe {' '.join(words)} has no option {option}" for option in options - known)


WITH_COMMANDS = {"metrics"}
"""Subcommands with commands of their own."""


@cache
def _options_of_vpmoe(subcommand: str) -> set[str]:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        main([*subcommand.split(), "--help"])
    return set(re.findall(r"--[a-z][a-z-]*", shown.getvalue()))


def test_a_name_that_does_not_exist_is_found() -> None:
    """Otherwise the test above would show nothing."""
    wrong = (
        "make nonsense",
        "make demo CLUSTRE=kind",
        "python -m jobs.prepare --run run.yaml",
        "python -m jobs.train --runs run.yaml",
        "vpmoe check run.yaml",
        "vpmoe plan run.yaml --gpus 8",
        "kubectl distill statuses first",
        "kubectl distill logs first --pods 0",
        "vpmoe metrics sync s3://vpmoe/runs --too mlflow",
        'X=1 helm install a b --set "image.tag=$(vpmoe show)"',
    )
    found = Counter(text for text in wrong for words in calls(text) for _ in unknown(words, False))
    assert found == Counter({**dict.fromkeys(wrong, 1), wrong[-1]: 2})


SHOWN = [
    command
    for command in console_commands(ROOT / "docs/reference/cli.md")
    if command.text.startswith("vpmoe validate manifests/")
]


@pytest.mark.parametrize("command", SHOWN, ids=where)
def test_the_reference_shows_what_validate_prints(
    command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(shlex.split(command.text)[1:]) == 0
    assert capsys.readouterr().out == command.output


def test_the_guide_shows_the_forecast_of_an_onpolicy_stage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    guide = (ROOT / "docs/guides/size-a-run.md").read_text()
    shown = re.search(
        r"`python -m vpmoe.rollout (plan .*?)`.*?for `(.*?)`:\n\n```\n(.*?)```", guide, re.DOTALL
    )
    assert shown is not None
    arguments = shlex.split(re.sub(r"[\[\]]", "", shown[1]).replace("run.yaml", shown[2]))
    assert rollout.main(arguments) == 0
    assert shown[3] in capsys.readouterr().out
