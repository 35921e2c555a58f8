"""Class, exit code and termination record of each kind of end, and whose record stays."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from vpmoe import failure
from vpmoe.api import Invalid
from vpmoe.api.progress import Amount, Progress
from vpmoe.api.termination import TerminationRecord
from vpmoe.failure import Permanent, Retriable, Terminated, failure_record, success_record, write_record
from vpmoe.provenance import git_sha
from vpmoe.storage import StorageError


def progress(done: int) -> Progress:
    return Progress(
        step="vanilla",
        attempt=1,
        state="Running",
        message=f"step {done}",
        updated=datetime(2026, 1, 1, tzinfo=UTC),
        tokens=Amount(done=done, total=100),
    )


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file for the termination message."""
    monkeypatch.setenv("VPMOE_TERMINATION_LOG", str(tmp_path / "log"))
    return tmp_path / "log"


@pytest.mark.parametrize(
    "error, kind, code, reason, message",
    [
        (Permanent("no such field"), "Permanent", 65, "", "no such field"),
        (Invalid(["spec.x: 1 is wrong"]), "Permanent", 65, "", "DistillRun:\n  spec.x: 1 is wrong"),
        (StorageError("altered", "Altered"), "Permanent", 65, "Altered", "altered"),
        (StorageError("denied", "Denied"), "Permanent", 65, "Denied", "denied"),
        (StorageError("away", "Unreachable"), "Retriable", 75, "Unreachable", "away"),
        (StorageError("disk full", "Local"), "Retriable", 75, "Local", "disk full"),
        (Retriable("later"), "Retriable", 75, "", "later"),
        (Terminated("saved"), "Terminated", 143, "", "saved"),
        (ZeroDivisionError("division by zero"), "Internal", 70, "", "ZeroDivisionError: division by zero"),
        (FileNotFoundError("\udcff"), "Internal", 70, "", "FileNotFoundError: ?"),
    ],
    ids=lambda value: f"{type(value).__name__}-{value.reason}" if isinstance(value, StorageError) else None,
)
def test_each_error_has_its_class_and_code(
    error: Exception, kind: str, code: int, reason: str, message: str
) -> None:
    found = failure.classify_error(error, rank=3, progress=progress(7))
    assert (found.kind, found.rank, found.exit, found.reason, found.message, found.progress) == (
        kind,
        3,
        code,
        reason,
        message,
        progress(7),
    )


def test_a_record_is_read_as_it_was_written(log: Path) -> None:
    assert failure.read_record(log) is None
    log.touch()
    assert failure.read_record(log) is None
    write_record(success_record(progress(100)))
    found = failure.read_record(log)
    assert found == TerminationRecord(
        kind="Succeeded", exit=0, commit=git_sha() or "", message="step 100", progress=progress(100)
    )
    assert json.loads(log.read_text())["class"] == "Succeeded"


@pytest.mark.parametrize(
    "other", [success_record(progress(9)), failure_record("Internal", "a consequence", 0)]
)
def test_the_first_failure_of_a_container_stays(log: Path, other: TerminationRecord) -> None:
    write_record(failure_record("Permanent", "the cause", 3))
    write_record(other)
    found = failure.read_record(log)
    assert found is not None and (found.kind, found.rank, found.message) == ("Permanent", 3, "the cause")
    assert found.progress == other.progress, "the process that failed first did not know it"


def test_a_failure_replaces_a_success_and_keeps_its_progress(log: Path) -> None:
    write_record(success_record(progress(9)))
    write_record(failure_record("Internal", "failed while it ended", 1))
    found = failure.read_record(log)
    assert found is not None and (found.kind, found.message, found.progress) == (
        "Internal",
        "failed while it ended",
        progress(9),
    )


def test_a_record_of_an_image_without_its_commit_says_so(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failure, "git_sha", lambda: None)
    write_record(failure_record("Permanent", "the cause"))
    found = failure.read_record(log)
    assert found is not None and found.commit == ""


def test_a_killed_process_replaces_the_failures_that_it_caused(log: Path) -> None:
    write_record(failure_record("Internal", "rank 1 is gone", 0, progress=progress(9)))
    write_record(failure_record("Retriable", "rank 1 was killed", 1), overwrite=True)
    found = failure.read_record(log)
    assert found is not None and (found.message, found.progress) == ("rank 1 was killed", progress(9))


def test_without_a_file_for_it_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VPMOE_TERMINATION_LOG", str(tmp_path / "none" / "log"))
    write_record(success_record(None))
    assert not list(tmp_path.iterdir())


def test_the_environment_sets_the_path_of_the_termination_log(tmp_path: Path) -> None:
    assert failure.termination_log_path({"VPMOE_TERMINATION_LOG": str(tmp_path / "log")}) == tmp_path / "log"
    assert failure.termination_log_path({"VPMOE_TERMINATION_LOG": str(tmp_path / "none" / "log")}) is None
    assert failure.termination_log_path({}) is None or Path("/dev/termination-log").is_file()
