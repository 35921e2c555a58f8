"""A process with an engine that several tests share, for as long as they need it."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.fakes import pod_user
from tests.fakes.waiting import wait_until


@contextmanager
def engine_process(module: str, model: Path, scratch: Path) -> Iterator[str]:
    """Start `python -m module` with a model; yields its socket once the model is loaded.

    It has the rights of a pod: a user without name and home who reads all files and writes to TMPDIR.
    """
    from tests.fakes.tiny_teacher import LONGEST

    scratch.chmod(0o777)
    address = str(scratch / "socket")
    with (scratch / "log").open("wb") as log:
        process = subprocess.Popen(
            [*pod_user.COMMAND, sys.executable, "-m", module, address, str(model), str(LONGEST)],
            cwd=Path(__file__).parents[2],
            env=pod_user.environment(scratch),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until(
            lambda: Path(address).exists() or process.poll() is not None,
            f"{module} has loaded its model",
            240,
            every=0.2,
        )
        assert process.poll() is None, (scratch / "log").read_text()
        yield address
    finally:
        process.kill()
        process.wait()
