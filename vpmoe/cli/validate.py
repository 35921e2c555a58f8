"""Check DistillRuns in YAML or JSON files as the API server checks them, without a cluster.

Every problem is one line with the field, its value and what to write instead. A file may hold several
documents and objects of other kinds, which are not checked.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from vpmoe.api import DistillRun, Invalid
from vpmoe.api.quantities import format_tokens
from vpmoe.api.run import GROUP, KIND, MOST_BYTES
from vpmoe.api.termination import EXIT_CODES
from vpmoe.api.text import read_yaml_documents

HELP = "check DistillRuns in files, without a cluster"
STANDARD_INPUT = "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help=f"DistillRuns in YAML or JSON; {STANDARD_INPUT} is standard input",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print a line for each valid run and one for each problem. Returns 0 if there is no problem, else 65."""
    problems = 0
    for file in arguments.files:
        source = "standard input" if file == STANDARD_INPUT else file
        try:
            found = runs_in(read(file), source)
        except OSError as error:
            found = [Invalid([f"cannot be read: {error.strerror}"], source)]
        except Invalid as error:
            found = [error]
        for each in found:
            if isinstance(each, Invalid):
                problems += 1
                sys.stderr.write(f"{each}\n")
            else:
                sys.stdout.write(f"{source}: {summary(each)}\n")
    return EXIT_CODES["Permanent"] if problems else 0


def read(file: str) -> bytes:
    """The content of a file, at most one byte more than MOST_BYTES. Raises OSError."""
    if file == STANDARD_INPUT:
        return sys.stdin.buffer.read(MOST_BYTES + 1)
    with Path(file).open("rb") as opened:
        return opened.read(MOST_BYTES + 1)


def runs_in(content: bytes, source: str) -> list[DistillRun | Invalid]:
    """Each DistillRun of a file, or what is wrong with it. `source` names the file in messages.

    A file with one object is taken for a DistillRun whatever its kind says. Raises Invalid if the file is not
    YAML or has no DistillRun.
    """
    if len(content) > MOST_BYTES:
        raise Invalid([f"is larger than {MOST_BYTES} bytes, the most that a cluster stores"], source)
    try:
        objects = list(_objects(read_yaml_documents(content.decode())))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Invalid([f"is not YAML: {error}"], source) from None
    if len(objects) > 1:
        objects = [each for each in objects if not _is_other(each)]
    if not objects:
        raise Invalid([f"has no object of kind {KIND}. Give the file of a DistillRun"], source)
    return [
        _parse(written, source if len(objects) == 1 else f"{source}, DistillRun {number} of {len(objects)}")
        for number, written in enumerate(objects, 1)
    ]


def _objects(documents: list[Any]) -> Iterator[Any]:
    """The objects of a file: its documents, and the items of a List, as `kubectl get -o yaml` prints."""
    for document in documents:
        is_list = isinstance(document, dict) and document.get("kind") in ("List", f"{KIND}List")
        items = document.get("items") if is_list else None
        yield from items if isinstance(items, list) else [document]


def _is_other(written: Any) -> bool:
    """Whether this is an object of another kind and API group."""
    if not isinstance(written, dict) or not isinstance(written.get("kind"), str):
        return False
    return written["kind"] != KIND and not str(written.get("apiVersion")).startswith(f"{GROUP}/")


def _parse(written: Any, source: str) -> DistillRun | Invalid:
    try:
        return DistillRun.parse(written, source)
    except Invalid as error:
        return error


def summary(run: DistillRun) -> str:
    """What a valid run is: stages, tokens, GPUs and the hash of its configuration."""
    stages = ", ".join(f"{stage.name} ({stage.kind})" for stage in run.spec.stages)
    tokens = format_tokens(sum(stage.tokens for stage in run.spec.stages))
    return (
        f"{run.metadata.namespace}/{run.metadata.name} is valid: stages {stages}; {tokens} tokens; teacher "
        f"{run.spec.teacher.gpus} and student {run.spec.student.gpus} GPUs; configuration "
        f"{run.config_hash[:16]}"
    )
