"""A recorded run with stages of all four kinds, in the test's store: whole, or changed."""

import json
import secrets
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fakes.recorded import BUCKET, FOLDER, documents
from tests.fakes.store import S3

RUN = "runs/team/inflight-0a1b2c3d"
STORED = ("tiny/runs/", "tiny/scores/", "tiny/datasets/")
DOCUMENTS = documents()


def store(s3: S3, change: Callable[[Path], object] | None = None) -> str:
    """URL of the run's folder, in a new bucket of the store. `change` is called with that folder's path."""
    bucket = f"{BUCKET}-{secrets.token_hex(4)}"
    with zipfile.ZipFile(FOLDER / "run_in_flight.zip") as archive:
        archive.extractall(
            s3.folder / bucket, [name for name in archive.namelist() if name.startswith(STORED)]
        )
    if change is not None:
        change(s3.folder / bucket / "tiny" / RUN)
    return f"s3://{bucket}/tiny/{RUN}"


def keep_only(*names: str) -> Callable[[Path], None]:
    """A change that leaves only these files and folders of the run."""

    def change(folder: Path) -> None:
        for path in sorted(folder.rglob("*"), reverse=True):
            name = path.relative_to(folder).as_posix()
            if not any(
                f"{name}/".startswith(f"{kept}/") or f"{kept}/".startswith(f"{name}/") for kept in names
            ):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def lines(step: str, event: str | None = None) -> list[dict[str, Any]]:
    """The metrics of a step in order, straight from the recorded documents."""
    names = sorted(name for name in DOCUMENTS if name.startswith(f"tiny/{RUN}/steps/{step}/metrics/"))
    found = [json.loads(line) for name in names for line in DOCUMENTS[name].splitlines()]
    return [line for line in found if event in (None, line["event"])]
