"""Failure class, exit code and termination message of each kind of error."""

import json
import random
from pathlib import Path

import pytest

from vpmoe import failure
from vpmoe.api import Invalid
from vpmoe.failure import Failure, Permanent, Retriable, Terminated
from vpmoe.storage import StorageError


@pytest.mark.parametrize(
    "error, kind, code, message",
    [
        (Permanent("no such field"), "Permanent", 65, "no such field"),
        (Invalid(["spec.x: 1 is wrong"]), "Permanent", 65, "DistillRun:\n  spec.x: 1 is wrong"),
        (StorageError("altered", "Altered"), "Permanent", 65, "altered"),
        (StorageError("denied", "Denied"), "Permanent", 65, "denied"),
        (StorageError("away", "Unreachable"), "Retriable", 75, "away"),
        (StorageError("disk full", "Local"), "Retriable", 75, "disk full"),
        (Retriable("later"), "Retriable", 75, "later"),
        (Terminated("saved"), "Terminated", 143, "saved"),
        (ZeroDivisionError("division by zero"), "Internal", 70, "ZeroDivisionError: division by zero"),
    ],
    ids=lambda value: f"{type(value).__name__}-{value.reason}" if isinstance(value, StorageError) else None,
)
def test_each_error_has_its_class_and_code(error: Exception, kind: str, code: int, message: str) -> None:
    assert failure.classify_error(error, rank=3) == Failure(kind, 3, code, message)


def test_a_message_of_any_length_fits_the_limit_of_kubernetes() -> None:
    seed = random.randrange(2**32)
    generator = random.Random(seed)
    for _ in range(40):
        message = "".join(
            generator.choice('aé中😀"\\\n\x00\ud800')
            for _ in range(generator.choice((10, 3900, 4000, 5000, 20000)))
        )
        line = Failure("Internal", 6, 70, message).to_json_line()
        assert len(line) <= 4096 and b"\n" not in line, seed
        found = json.loads(line)
        assert (found["class"], found["rank"], found["exit"]) == ("Internal", 6, 70), seed
        assert message.encode(errors="replace").decode().startswith(found["message"].removesuffix("…")), seed
        assert len(line) > 4000 or found["message"] == message.encode(errors="replace").decode(), seed


def test_a_message_that_fits_is_not_cut() -> None:
    assert json.loads(Failure("Permanent", None, 65, "x" * 4000).to_json_line()) == {
        "class": "Permanent",
        "rank": None,
        "exit": 65,
        "message": "x" * 4000,
    }


def test_the_first_failure_of_a_container_keeps_its_message(tmp_path: Path) -> None:
    path = tmp_path / "log"
    assert failure.read_termination_message(path) is None
    path.touch()
    assert failure.read_termination_message(path) is None
    first = Failure("Permanent", 3, 65, "the cause")
    failure.write_termination_message(first, path)
    failure.write_termination_message(Failure("Internal", 0, 70, "a consequence"), path)
    assert failure.read_termination_message(path) == first


def test_the_environment_sets_the_path_of_the_termination_log(tmp_path: Path) -> None:
    assert failure.termination_log_path({"VPMOE_TERMINATION_LOG": str(tmp_path / "log")}) == tmp_path / "log"
    assert failure.termination_log_path({"VPMOE_TERMINATION_LOG": str(tmp_path / "none" / "log")}) is None
    assert failure.termination_log_path({}) is None or Path("/dev/termination-log").is_file()
