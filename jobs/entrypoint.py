"""What every job does before its work: arguments, logging, signals, run, bucket, provenance; and how it ends
on an error.

The work itself, and what only one role needs, is in the role's own module.
"""

import argparse
import json
import logging
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from vpmoe import failure
from vpmoe.api import DistillRun, load_run
from vpmoe.clock import timestamp
from vpmoe.process.step_worker import step_succeeded
from vpmoe.provenance import Provenance, git_sha
from vpmoe.storage import Bucket, paths
from vpmoe.storage.bucket import json_bytes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobContext:
    """What a job needs to know beside its run.

    bucket: the run's, tested. stopping: set on SIGTERM; the job then saves what the next attempt needs and
    raises Terminated. worker: index among the pods of an Indexed Job, None if the job has one pod.
    """

    step: str
    attempt: int
    bucket: Bucket
    provenance: Provenance
    stopping: threading.Event
    worker: int | None


def entrypoint(role: str, arguments: list[str] | None = None) -> tuple[DistillRun, JobContext]:
    """Start a job: `python -m jobs.<role> --run FILE [--step NAME] [--attempt N]`.

    Afterwards an uncaught error is one line in the log and in the termination message, and its class decides
    the exit code (vpmoe.failure). Raises Permanent, Invalid or StorageError if the job cannot start.
    """
    sys.excepthook = exit_on_error
    configure_logging()
    if "LOCAL_RANK" not in os.environ and (message := failure.termination_log_path()):
        message.write_bytes(b"")  # from an earlier process on this machine; ranks share their launcher's file
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: request_stop(stopping, number, frame))
    given = parse_arguments(role, arguments)
    try:
        run = load_run(given.run)
    except OSError as error:
        raise failure.Permanent(
            f"--run {given.run}: {error.strerror}. Give the file of a DistillRun."
        ) from error
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
    metadata = run.metadata
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
    )
    index = os.environ.get("JOB_COMPLETION_INDEX")
    log.info("%s of %s, attempt %d, at %s", step, provenance.run, given.attempt, bucket.url(paths.run(run)))
    return run, JobContext(step, given.attempt, bucket, provenance, stopping, int(index) if index else None)


def parse_arguments(role: str, arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line, which is the same for all jobs."""
    parser = argparse.ArgumentParser(prog=f"python -m jobs.{role}")
    parser.add_argument("--run", type=Path, required=True, metavar="FILE", help="the DistillRun, in YAML")
    parser.add_argument(
        "--step",
        metavar="NAME",
        help="which step of the run (default: the first of this role that is not finished)",
    )
    parser.add_argument(
        "--attempt", type=int, default=1, metavar="N", help="recorded in provenance (default: 1)"
    )
    return parser.parse_args(arguments)


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
    """The default step: the role's first that has not reported success, or its last if all have."""
    steps = [step for step in run.steps() if run.role(step) == role]
    if not steps:
        raise failure.Permanent(
            f"jobs.{role} has nothing to do: the run's steps are {', '.join(run.steps())}. Start another job."
        )
    return next((step for step in steps if not step_succeeded(run, bucket, step)), steps[-1])


def register_run(run: DistillRun, bucket: Bucket) -> None:
    """Write the resolved configuration, or verify that it is the stored one.

    Raises Permanent if it is not.
    """
    key = paths.run_json(run)
    ours = run.document()
    if bucket.create(key, json_bytes(ours), {"config": run.config_hash}):
        return
    changed = first_difference(bucket.get_json(key), ours)
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


def exit_on_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """sys.excepthook: write the log and the termination message, and exit with the error's exit code."""
    if isinstance(error, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    rank = os.environ.get("RANK")
    found = failure.classify_error(error, int(rank) if rank else None)
    if found.kind == "Internal":
        sys.__excepthook__(kind, error, trace)
    log.error("%s: %s", found.kind, found.message)
    path = failure.termination_log_path()
    if path:
        failure.write_termination_message(found, path)
    raise SystemExit(found.exit_code)
