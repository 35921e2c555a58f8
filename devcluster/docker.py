"""Runs commands of Docker and kind."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from devcluster import ClusterError, needs


def run(*command: str | Path, **variables: str) -> str:
    """Run a program, with further environment variables; returns its stdout.

    Raises ClusterError with its last lines.
    """
    environment = {**os.environ, **variables}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        shown = " ".join([Path(command[0]).name, *map(str, command[1:])])
        raise ClusterError(
            f"{shown}: status {ended.returncode}: {needs.last_lines(ended.stderr or ended.stdout, 8)}"
        )
    return ended.stdout


def pipe(source: Sequence[str], target: Sequence[str]) -> None:
    """Run two programs, the stdout of one into the stdin of the other.

    Raises ClusterError with the last lines.
    """
    with subprocess.Popen(source, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as writer:
        reader = subprocess.run(target, stdin=writer.stdout, capture_output=True, text=True, check=False)
        assert writer.stdout and writer.stderr
        writer.stdout.close()  # ends the writer if the reader has failed
        errors = writer.stderr.read()
    for command, status, message in (
        (target, reader.returncode, reader.stderr),
        (source, writer.returncode, errors),
    ):
        if status != 0:
            raise ClusterError(f"{' '.join(command)}: status {status}: {needs.last_lines(message, 8)}")


def image_id(name: str) -> str | None:
    """The id of the image that Docker has by this name; None if it has none."""
    command = ["docker", "image", "inspect", "--format={{.Id}}", name]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    return ended.stdout.strip() if ended.returncode == 0 else None


def check_engine() -> None:
    """Raise ClusterError unless Docker's engine answers."""
    if not needs.found("docker"):
        raise ClusterError(f"CLUSTER=kind needs Docker: install it. {needs.ELSEWHERE}")
    run("docker", "version", "--format={{.Server.Version}}")
