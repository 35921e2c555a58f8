"""Messages that name an environment variable say how a run sets it: nobody can export one in a pod."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from vpmoe.api.crd import crd
from vpmoe.api.environment import IN_A_POD, EnvVar

ROOT = Path(__file__).parents[2]
VARIABLE = re.compile(r"\b(?:(?:HF|HTTPS?|ALL|NO|SSL|AWS|OMP|CUDA|NCCL)_[A-Z0-9_]*[A-Z0-9]|TMPDIR)\b")
"""Variables that a person sets. Those of torch.distributed and PET_* are never their doing in a pod."""
TABLE = (
    (ROOT / "docs/reference/exit-codes.md")
    .read_text()
    .split("## Variables that messages name")[1]
    .split("\n## ")[0]
)


def messages(tree: ast.Module) -> Iterator[str]:
    """Texts of a module with a space in them, and what f-strings insert of its constants. No docstrings."""
    constants = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name) and isinstance(node.value.value, str)
    } | {"IN_A_POD": IN_A_POD}
    skipped = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)
    }  # docstrings, of fields too
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = []
            for part in node.values:
                skipped.add(id(part))
                if isinstance(part, ast.Constant):
                    parts.append(str(part.value))
                elif isinstance(part, ast.FormattedValue) and isinstance(part.value, ast.Name):
                    used.add(part.value.id)
                    parts.append(str(constants.get(part.value.id, "")))
            yield "".join(parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            inserted = any(constants.get(name) == node.value for name in used)
            if " " in node.value and not inserted:
                yield node.value


def named() -> dict[str, list[tuple[str, str]]]:
    """(file, message) by variable."""
    found = defaultdict(list)
    for folder in ("vpmoe", "jobs"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.is_relative_to(ROOT / "vpmoe/api"):
                continue  # what is said of the fields themselves
            for message in messages(ast.parse(path.read_text())):
                for variable in set(VARIABLE.findall(message)):
                    found[variable].append((str(path.relative_to(ROOT)), message))
    return dict(found)


NAMED = named()


def is_accepted(variable: str) -> bool:
    """Whether runtime.env can set it from a Secret."""
    source = {"secretKeyRef": {"name": "a", "key": "b"}}
    try:
        EnvVar.model_validate({"name": variable, "valueFrom": source})
    except ValidationError:
        return False
    return True


def test_the_messages_are_found() -> None:
    assert {
        "HF_TOKEN",
        "HF_ENDPOINT",
        "HTTPS_PROXY",
        "NO_PROXY",
        "AWS_PROFILE",
        "SSL_CERT_FILE",
        "TMPDIR",
    } <= (NAMED.keys())


@pytest.mark.parametrize("variable", sorted(NAMED))
def test_every_variable_of_a_message_is_in_the_table_with_the_field_that_sets_it(variable: str) -> None:
    (row,) = [
        line for line in TABLE.splitlines() if line.startswith("|") and f"`{variable}`" in line.split("|")[1]
    ]
    field = re.search(r"`((?:runtime|storage)\.[A-Za-z]+)`", row.split("|")[2])
    assert field is not None, row
    of, name = field[1].split(".")
    spec = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    assert name in spec[of]["properties"]
    assert is_accepted(variable) == (name in ("env", "envFrom")), (
        "runtime.env rejects it, or the table is wrong"
    )


@pytest.mark.parametrize("variable", sorted(variable for variable in NAMED if is_accepted(variable)))
def test_a_message_with_a_variable_that_a_run_can_set_names_runtime_env(variable: str) -> None:
    silent = [f"{file}: {message}" for file, message in NAMED[variable] if "runtime.env" not in message]
    assert silent == []
