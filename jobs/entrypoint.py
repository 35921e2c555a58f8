"""What every job does before its work: arguments, logging, signals, run, bucket, provenance; and how it
reports its end.

The work itself, and what only one role needs, is in the role's own module.
"""

import argparse
import functools
import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

from jobs import pod_server
from vpmoe import failure
from vpmoe.api import DistillRun, load_run
from vpmoe.clock import timestamp
from vpmoe.process.board import ProgressBoard
from vpmoe.process.environment import check_env_from, check_environment, check_rank, worker_index
from vpmoe.process.exporter import MetricsExporter
from vpmoe.process.step_worker import step_succeeded
from vpmoe.provenance import Provenance, git_sha, harmony_package
from vpmoe.storage import Bucket, paths
from vpmoe.storage.bucket import json_bytes
from vpmoe.storage.scratch import use_own_folder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobContext:
    """What a job needs to know beside its run.

    bucket: the run's, tested. stopping: set on SIGTERM; the job then saves what the next attempt needs and
    raises Terminated. board: where the job publishes its progress. worker: index among the pods of an Indexed
    Job, None if the job has one pod.
    """

    step: str
    attempt: int
    bucket: Bucket
    provenance: Provenance
    stopping: threading.Event
    board: ProgressBoard
    worker: int | None


def entrypoint(role: str, arguments: list[str] | None = None) -> tuple[DistillRun, JobContext]:
    """Start a job: `python -m jobs.<role> --run FILE [--step NAME] [--attempt N]`.

    Afterwards an uncaught error is one line in the log and a record in the termination message, and its class
    decides the exit code (vpmoe.failure). With VPMOE_SERVE_PORT set, the job serves its progress from here
    on. Raises Permanent, Invalid or StorageError if the job cannot start.
    """
    board, stopping = ProgressBoard(), threading.Event()
    prepare_process(board)
    signal.signal(signal.SIGTERM, lambda number, frame: request_stop(stopping, number, frame))
    if role == "train" and "LOCAL_RANK" in os.environ:
        check_rank()
    given = parse_arguments(role, arguments)
    worker = worker_index()
    port = os.environ.get(pod_server.PORT_VARIABLE)
    if port and serves_progress(role, os.environ):
        pod_server.serve(board, port)
    run = read_run(given.run, os.environ.get("VPMOE_CONFIG_HASH", ""))
    bucket = Bucket.open(run.spec.storage)
    bucket.probe()
    step = given.step or first_step(role, run, bucket)
    if step not in run.steps():
        raise failure.Permanent(
            f"--step {step}: the run has no such step. Choose one of {', '.join(run.steps())}."
        )
    if run.role(step) != role:
        raise failure.Permanent(f"--step {step} is not a step of jobs.{role}. Start jobs.{run.role(step)}.")
    register_run(run, bucket)
    metadata, stage = run.metadata, run.stage_of(step)
    board.metrics = MetricsExporter(run=metadata.name, stage=stage.name if stage else "", role=role)
    provenance = Provenance(
        git_sha=git_sha(),
        image=os.environ.get("VPMOE_IMAGE") or None,
        config=run.config_hash,
        namespace=metadata.namespace,
        name=metadata.name,
        uid8=run.uid8,
        step=step,
        attempt=given.attempt,
        started=timestamp(),
        harmony=harmony_package(),
    )
    log.info("%s of %s, attempt %d, at %s", step, provenance.run, given.attempt, bucket.url(paths.run(run)))
    return run, JobContext(step, given.attempt, bucket, provenance, stopping, board, worker)


def prepare_process(board: ProgressBoard) -> None:
    """Set logging, and how an uncaught error ends the process. Clear an earlier process's termination
    message. Find out the commit, before a checkout can move on. Take a temporary folder of its own.

    Raises Permanent or Retriable if the environment is unusable.
    """
    sys.excepthook = functools.partial(exit_on_error, board)
    configure_logging()
    git_sha()
    if "LOCAL_RANK" not in os.environ and (message := failure.termination_log_path()):
        with suppress(OSError):  # write_record says so, at the end
            message.write_bytes(b"")  # from an earlier process on this machine; ranks share their launcher's
    check_env_from()
    check_environment()
    use_own_folder()


def serves_progress(role: str, environment: Mapping[str, str]) -> bool:
    """Whether this process serves its pod's port: of a training pod the process of rank 0, which has the
    progress.

    RANK alone does not tell: in a PyTorchJob the launcher has one too.
    """
    return role != "train" or ("LOCAL_RANK" in environment and environment.get("RANK") == "0")


def read_run(path: Path, recorded_hash: str) -> DistillRun:
    """The run in a file, with the configuration hash that an older version has recorded for it, if any.

    Raises Permanent if there is no such file or the hash is none, Invalid if it is not a DistillRun.
    """
    try:
        run = load_run(path)
    except OSError as error:
        raise failure.Permanent(f"--run {path}: {error.strerror}. Give the file of a DistillRun.") from error
    try:
        return run.with_recorded_hash(recorded_hash) if recorded_hash else run
    except ValueError as error:
        raise failure.Permanent(f"VPMOE_CONFIG_HASH: {error}. Unset it.") from None


def parse_arguments(role: str, arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line, which is the same for all jobs."""
    parser = job_parser(role)
    parser.add_argument(
        "--step",
        metavar="NAME",
        help="which step of the run (default: the first of this role that is not finished)",
    )
    parser.add_argument(
        "--attempt", type=attempt_number, default=1, metavar="N", help="recorded in provenance (default: 1)"
    )
    return parser.parse_args(arguments)


class JobParser(argparse.ArgumentParser):
    """A command line whose errors end the job as others of its configuration do."""

    def error(self, message: str) -> NoReturn:
        raise failure.Permanent(f"{self.prog}: {message}. {self.format_usage().strip()}")


def job_parser(role: str) -> JobParser:
    """The command line of a job, with the argument that all jobs have."""
    parser = JobParser(prog=f"python -m jobs.{role}")
    parser.add_argument("--run", type=Path, required=True, metavar="FILE", help="the DistillRun, in YAML")
    return parser


def attempt_number(text: str) -> int:
    """The number of an attempt. Raises ArgumentTypeError if it is none."""
    if not re.fullmatch(r"[1-9][0-9]{0,8}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to 999999999")
    return int(text)


def configure_logging() -> None:
    """Log to stderr, one line per record, with times in UTC."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        OneLine("%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")
    )
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    # At INFO it logs where it found its credentials, for every client.
    logging.getLogger("botocore").setLevel(logging.WARNING)


class OneLine(logging.Formatter):
    """Formats a record, traceback included, as one line, so that readers of a pod's log by line get all of
    it."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        """The record with line breaks escaped."""
        return super().format(record).replace("\n", "\\n")


def request_stop(stopping: threading.Event, number: int, frame: FrameType | None) -> None:
    """Signal handler: ask the job to save and end."""
    log.warning("Received %s, saving and stopping", signal.Signals(number).name)
    stopping.set()


def first_step(role: str, run: DistillRun, bucket: Bucket) -> str:
    """The default step: the role's first that has not reported success, or its last if all have. A step that
    serves a trainer which has finished counts as finished."""
    steps = [step for step in run.steps() if run.role(step) == role]
    if not steps:
        raise failure.Permanent(
            f"jobs.{role} has nothing to do: the run's steps are {', '.join(run.steps())}. Start another job."
        )
    return next((step for step in steps if not _finished(run, bucket, step)), steps[-1])


def _finished(run: DistillRun, bucket: Bucket, step: str) -> bool:
    if step_succeeded(run, bucket, step):
        return True
    trainer = run.stage_of(step) if run.serves_trainer(step) else None
    return trainer is not None and step_succeeded(run, bucket, trainer.name)


def register_run(run: DistillRun, bucket: Bucket) -> None:
    """Write the resolved configuration, or verify that it is the stored one.

    Raises Permanent if it is not. The stored one is read as a run, so that fields which its version did not
    have count as their defaults, and its spec.runtime, which an older version stored, as nothing.
    """
    key = paths.run_json(run)
    ours = run.document()
    if bucket.create(key, json_bytes(ours), {"config": run.config_hash}):
        return
    stored = DistillRun.parse(bucket.get_json(key), source=bucket.url(key), stored=True).document()
    changed = first_difference(stored, ours)
    if changed:
        raise failure.Permanent(
            f"{bucket.url(key)}: {changed}. A run's configuration cannot change once it has started. Start "
            "a run of another name, or delete this one's folder."
        )


def first_difference(stored: Any, given: Any, where: str = "") -> str | None:
    """The first field in which two configurations differ, with both values; None if they are equal.

    Absent equals null.
    """
    if isinstance(stored, dict) and isinstance(given, dict):
        fields = [
            (f"{where}.{name}".lstrip("."), stored.get(name), given.get(name))
            for name in sorted({*stored, *given})
        ]
    elif isinstance(stored, list) and isinstance(given, list) and len(stored) == len(given):
        fields = [(f"{where}[{index}]", *pair) for index, pair in enumerate(zip(stored, given, strict=True))]
    else:
        return (
            None if stored == given else f"{where} is {json.dumps(stored)} there and {json.dumps(given)} here"
        )
    return next(
        (found for name, *pair in fields if (found := first_difference(pair[0], pair[1], name))), None
    )


def record_success(board: ProgressBoard) -> None:
    """Write the termination record of a job that has done its work."""
    failure.write_record(failure.success_record(board.progress))


def exit_on_error(
    board: ProgressBoard, kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """sys.excepthook: write the log and the termination record, and exit with the error's exit code."""
    if isinstance(error, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    rank = os.environ.get("RANK", "")
    found = failure.classify_error(
        error, int(rank) if re.fullmatch(r"[0-9]{1,9}", rank) else None, board.progress
    )
    if found.kind == "Internal":
        sys.__excepthook__(kind, error, trace)
    log.error("%s: %s", found.kind, found.message)
    failure.write_record(found)
    raise SystemExit(found.exit)
