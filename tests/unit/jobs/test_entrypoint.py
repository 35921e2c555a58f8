"""Start and end of a job: context, rejected arguments, exit code, log and termination record."""

import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.entrypoint import JobContext, entrypoint, exit_on_error, first_difference
from vpmoe.api import DistillRun, Invalid
from vpmoe.api.progress import Amount, Progress
from vpmoe.clock import now
from vpmoe.failure import Permanent, Retriable, Terminated, read_record
from vpmoe.process.board import ProgressBoard
from vpmoe.process.launcher import free_port
from vpmoe.provenance import CHECKOUT, git_sha
from vpmoe.storage import Bucket, StorageError, paths

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z [A-Z]+ [\w.]+: .*")
PROGRESS = Progress(step="preprocess", attempt=1, state="Running", updated=now())
Start = Callable[..., tuple[DistillRun, JobContext]]


@pytest.fixture(autouse=True)
def restored_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Restore the state that a job changes in its process; write the termination message to a file of the
    test."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(tempfile, "tempdir", tempfile.gettempdir())
    monkeypatch.setenv("TMPDIR", tempfile.gettempdir())
    monkeypatch.setenv("VPMOE_TERMINATION_LOG", str(tmp_path / "termination"))
    root, handler = logging.getLogger(), signal.getsignal(signal.SIGTERM)
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def start(tmp_path: Path, run_spec: dict[str, Any]) -> Start:
    """Start a job with the current state of the test's run."""

    def start(role: str = "preprocess", *arguments: str) -> tuple[DistillRun, JobContext]:
        file = tmp_path / "any-name.yaml"
        file.write_text(yaml.safe_dump(run_spec))
        return entrypoint(role, ["--run", str(file), *arguments])

    return start


def test_a_job_has_its_run_step_and_bucket(
    start: Start,
    bucket: Bucket,
    run_spec: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in {"VPMOE_IMAGE": "img", "VPMOE_GIT_SHA": "lie", "JOB_COMPLETION_INDEX": "3"}.items():
        monkeypatch.setenv(name, value)
    run, context = start("preprocess", "--attempt", "2")
    assert run == DistillRun.parse(run_spec)
    assert (context.step, context.attempt, context.worker, context.stopping.is_set()) == (
        "preprocess",
        2,
        3,
        False,
    )
    provenance = context.provenance
    assert (provenance.run, provenance.config, provenance.step, provenance.attempt) == (
        f"default/tiny-run-{run.config_hash[:8]}",
        run.config_hash,
        "preprocess",
        2,
    )
    assert (provenance.git_sha, provenance.image) == (git_sha(), "img")
    assert context.bucket.get_json(paths.run_json(run)) == run.document()
    assert [found.key for found in bucket.list("")] == [paths.run_json(run)]
    logging.getLogger("some.module").warning("two\nlines")
    lines = capsys.readouterr().err.splitlines()
    assert all(LINE.fullmatch(line) for line in lines) and lines[-1].endswith(
        r"Z WARNING some.module: two\nlines"
    )


def test_a_job_outside_an_indexed_job_has_no_worker_index(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JOB_COMPLETION_INDEX", raising=False)
    assert start()[1].worker is None


def test_a_new_process_clears_an_old_termination_message_and_a_rank_does_not(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "termination").write_text("old")
    of_launcher = {
        "LOCAL_RANK": "0",
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "::1",
        "MASTER_PORT": "1",
    }
    of_launcher |= {"MASTER_PORT": "1", "VPMOE_LAUNCHER": "1", "VPMOE_SCRATCH": "/none"}
    for name, value in of_launcher.items():
        monkeypatch.setenv(name, value)
    start("train")
    assert (tmp_path / "termination").read_text() == "old"
    monkeypatch.delenv("LOCAL_RANK")
    start("train")
    assert (tmp_path / "termination").read_text() == ""


@pytest.mark.parametrize(
    "error, code, kind",
    [
        (Permanent("no\nway"), 65, "Permanent"),
        (Retriable("later"), 75, "Retriable"),
        (Terminated("saved"), 143, "Terminated"),
        (StorageError("away", "Unreachable"), 75, "Retriable"),
        (ZeroDivisionError("by zero"), 70, "Internal"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_error_ends_the_job_with_its_code_and_one_line(
    error: Exception,
    code: int,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", "5")
    with pytest.raises(SystemExit) as exit:
        exit_on_error(ProgressBoard(PROGRESS), type(error), error, None)
    assert exit.value.code == code
    record = read_record(tmp_path / "termination")
    assert record is not None and (record.kind, record.rank, record.exit) == (kind, 5, code)
    assert str(error) in record.message and record.progress == PROGRESS
    assert [logged.getMessage() for logged in caplog.records] == [f"{kind}: {record.message}"]
    assert (type(error).__name__ in capsys.readouterr().err) == (kind == "Internal")


@pytest.mark.parametrize(
    "arguments, message",
    [
        pytest.param(
            ["--step", "rescored"],
            "--step rescored: the run has no such step. Choose one of preprocess, vanilla, vanilla-export, "
            "vanilla-report.",
            id="step",
        ),
        pytest.param(
            ["--step", "vanilla"],
            "--step vanilla is not a step of jobs.preprocess. Start jobs.train.",
            id="role",
        ),
        pytest.param(
            ["--run", "/no.yaml"],
            "--run /no.yaml: No such file or directory. Give the file of a DistillRun.",
            id="no-file",
        ),
    ],
)
def test_invalid_arguments_are_rejected_with_the_remedy(
    start: Start, bucket: Bucket, arguments: list[str], message: str
) -> None:
    with pytest.raises(Permanent, match=re.escape(message)):
        start("preprocess", *arguments)
    assert not list(bucket.list(""))


def test_an_invalid_run_is_rejected_before_the_store_is_accessed(
    start: Start, run_spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    run_spec["spec"]["dataset"]["maxLength"] = -1
    with pytest.raises(Invalid, match=r"spec\.dataset\.maxLength"):
        start()


def test_a_changed_configuration_of_a_started_run_is_rejected(start: Start, run_spec: dict[str, Any]) -> None:
    run_spec["metadata"]["uid"] = "01234567-89ab-cdef-0123-456789abcdef"
    start()
    run_spec["spec"]["suspend"] = True
    start()
    run_spec["spec"]["training"]["seed"] = 7
    with pytest.raises(
        Permanent,
        match=r"run.json: spec.training.seed is 1234 there and 7 here. A run's configuration cannot change",
    ):
        start()


def test_a_run_that_an_older_version_started_goes_on_with_its_hash(
    start: Start, bucket: Bucket, run_spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That version stored spec.runtime with the configuration, hashed it, and did not know every field."""
    run_spec["metadata"]["uid"] = "01234567-89ab-cdef-0123-456789abcdef"
    run_spec["spec"]["runtime"] = {"queueName": "then"}
    run = DistillRun.parse(run_spec)
    stored = run.document()
    stored["spec"]["runtime"] = run_spec["spec"]["runtime"]
    del stored["spec"]["resumeFrom"], stored["spec"]["evaluation"]["documents"]
    run_spec["spec"]["evaluation"].pop("documents")
    bucket.write_json(paths.run_json(run), stored)
    run_spec["spec"]["runtime"] = {"queueName": "now"}
    monkeypatch.setenv("VPMOE_CONFIG_HASH", "0f" * 32)
    started, context = start()
    assert (started.config_hash, context.provenance.config) == ("0f" * 32, "0f" * 32)
    assert started.config_hash != run.config_hash
    assert bucket.get_json(paths.run_json(run)) == stored, "the record stays as it is"


def test_a_recorded_hash_that_is_none_is_rejected(
    start: Start, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VPMOE_CONFIG_HASH", "main")
    with pytest.raises(Permanent, match="VPMOE_CONFIG_HASH: 'main' is not the hash of a configuration"):
        start()
    assert not list(bucket.list(""))


@pytest.mark.parametrize(
    "stored, given, message",
    [
        ({"a": {"b": [1, {"c": 2}]}}, {"a": {"b": [1, {"c": 3}]}}, "a.b[1].c is 2 there and 3 here"),
        ({"b": 1, "a": 1}, {"a": 2, "b": 2}, "a is 1 there and 2 here"),
        ({"a": [1]}, {"a": [1, 2]}, "a is [1] there and [1, 2] here"),
        ({"a": 1}, {}, "a is 1 there and null here"),
        ({"a": {"b": 1}}, {"a": None}, 'a is {"b": 1} there and null here'),
        ({"a": None}, {}, None),
        ({"a": [{"b": 1}]}, {"a": [{"b": 1}]}, None),
    ],
)
def test_the_first_difference_is_named(stored: object, given: object, message: str | None) -> None:
    assert first_difference(stored, given) == message


@pytest.mark.parametrize(
    "role, suffix",
    [("train", "")] + [(role, f"-{role}") for role in ("sampler", "teacher", "evaluate", "export")],
)
def test_a_job_runs_the_first_unfinished_step_of_its_role(
    start: Start, bucket: Bucket, run_spec: dict[str, Any], role: str, suffix: str
) -> None:
    stages = [
        {"name": name, "kind": "OnPolicy", "tokens": 16384, "require": {"validity": 0}}
        for name in ("one", "two")
    ]
    run_spec["spec"] |= {
        "stages": stages,
        "evaluation": {"completions": 1},
        "export": {"stages": ["one", "two"]},
        "student": {"shape": "tiny", "gpus": 2},
    }
    run_spec["spec"]["training"].pop("optimizer")
    run = DistillRun.parse(run_spec)
    first, second = f"one{suffix}", f"two{suffix}"
    assert start(role)[1].step == first
    for reported_step, state, step in (
        (first, "Running", first),
        (first, "Succeeded", second),
        (second, "Succeeded", second),
    ):
        bucket.write_json(paths.progress(run, reported_step), {"state": state})
        assert start(role)[1].step == step
    assert start(role, "--step", first)[1].provenance.step == first


def test_a_job_without_a_step_in_the_run_is_rejected(start: Start) -> None:
    with pytest.raises(
        Permanent,
        match=r"jobs\.sampler has nothing to do: the run's steps are preprocess, vanilla, vanilla-export, "
        r"vanilla-report\.",
    ):
        start("sampler")


JOB = """
from jobs.entrypoint import entrypoint, record_success
from vpmoe.api.progress import Amount, Progress
from vpmoe.clock import now
from vpmoe.failure import Permanent, Terminated
run, context = entrypoint("preprocess")

def report(done, state="Running"):
    context.board.progress = Progress(
        step=context.step, attempt=context.attempt, state=state, message=f"part {done}", updated=now(),
        parts=Amount(done=done, total=4),
    )

report(1)
print("ready", flush=True)
context.stopping.wait(WAIT)
report(2)
END
"""


@pytest.mark.parametrize(
    "end, stopped, code, kind, message, done",
    [
        pytest.param(
            "report(4, 'Succeeded'); record_success(context.board)",
            False,
            0,
            "Succeeded",
            "part 4",
            4,
            id="succeeds",
        ),
        pytest.param("raise Permanent('no')", False, 65, "Permanent", "no", 2, id="fails"),
        pytest.param("raise Terminated('saved')", True, 143, "Terminated", "saved", 2, id="is stopped"),
    ],
)
def test_a_job_serves_its_progress_and_records_its_end(
    run_spec: dict[str, Any],
    tmp_path: Path,
    end: str,
    stopped: bool,
    code: int,
    kind: str,
    message: str,
    done: int,
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_spec))
    port = free_port()
    script = JOB.replace("WAIT", "30" if stopped else "0").replace("END", end)
    process = subprocess.Popen(
        [sys.executable, "-c", script, "--run", str(tmp_path / "run.yaml"), "--attempt", "3"],
        cwd=CHECKOUT,
        env={**os.environ, "VPMOE_SERVE_PORT": str(port)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    if stopped:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/progress") as answer:
            served = Progress.model_validate_json(answer.read())
        assert (served.step, served.attempt, served.message) == ("preprocess", 3, "part 1")
        process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert all(LINE.fullmatch(line) for line in err.splitlines())
    assert ("Received SIGTERM, saving and stopping" in err) is stopped
    record = read_record(tmp_path / "termination")
    assert record is not None and (record.kind, record.exit, record.message) == (kind, code, message)
    assert record.progress is not None and record.progress.parts == Amount(done=done, total=4)


def test_a_job_that_cannot_start_records_why(tmp_path: Path) -> None:
    """Not even the bucket is known yet."""
    command = [sys.executable, "-m", "jobs.preprocess", "--run", str(tmp_path / "none.yaml")]
    assert subprocess.run(command, cwd=CHECKOUT, check=False, stderr=subprocess.DEVNULL).returncode == 65
    record = read_record(tmp_path / "termination")
    assert record is not None and record.message.endswith("Give the file of a DistillRun.")
    assert record.progress is None
