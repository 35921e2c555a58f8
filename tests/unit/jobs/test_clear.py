"""The job that deletes a run's folder: it deletes that folder whole, and nothing else."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from vpmoe.api import DistillRun
from vpmoe.api.termination import TerminationRecord
from vpmoe.failure import read_record
from vpmoe.provenance import CHECKOUT
from vpmoe.storage import Bucket

UID = "0a1b2c3d-0000-4000-8000-000000000001"


@pytest.fixture
def run(run_spec: dict[str, Any], tmp_path: Path) -> DistillRun:
    """A run as the operator gives it to the job: with a uid, and a prefix."""
    run_spec["metadata"]["uid"] = UID
    run_spec["spec"]["storage"]["prefix"] = "team/a"
    parsed = DistillRun.parse(run_spec)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(parsed.document()))
    return parsed


def clear(folder: Path, **environment: str) -> tuple[int, TerminationRecord | None]:
    """Exit code and record of the job."""
    code = subprocess.run(
        [sys.executable, "-m", "jobs.clear", "--run", str(folder / "run.yaml")],
        cwd=CHECKOUT,
        env={**os.environ, "VPMOE_TERMINATION_LOG": str(folder / "log"), **environment},
        check=False,
    ).returncode
    return code, read_record(folder / "log")


def test_the_folder_of_the_run_is_deleted_and_nothing_else(
    run: DistillRun, bucket: Bucket, tmp_path: Path
) -> None:
    own = [
        f"team/a/{run.folder}/{name}" for name in ("run.json", "steps/vanilla/progress.json", "manifest.json")
    ]
    others = [
        f"team/a/{run.folder}0/run.json",
        "team/a/runs/default/tiny-run-ffffffff/run.json",
        "team/a/datasets/x/manifest.json",
        "team/a/scores/x/manifest.json",
        f"{run.folder}/run.json",
        f"team/b/{run.folder}/run.json",
    ]
    for key in (*own, *others):
        bucket.put_bytes(key, b"x", {})
    code, record = clear(tmp_path)
    assert code == 0 and sorted(found.key for found in bucket.list("")) == sorted(others)
    assert record is not None and record.progress is not None and record.progress.parts is not None
    assert (record.kind, record.progress.parts.done) == ("Succeeded", 3)
    code, record = clear(tmp_path)
    assert code == 0 and record is not None and record.progress is not None
    assert record.progress.parts is not None and record.progress.parts.done == 0, "it may be repeated"


@pytest.mark.parametrize(
    "environment, code, message",
    [
        pytest.param({"AWS_SECRET_ACCESS_KEY": "wrong"}, 65, "denied", id="wrong-key"),
        pytest.param({"AWS_SECRET_ACCESS_KEY": "line\n"}, 65, "contains a line break", id="malformed-key"),
        pytest.param({"AWS_ENDPOINT_URL": "http://under_score:9000"}, 65, "storage.endpoint", id="endpoint"),
    ],
)
def test_a_folder_that_cannot_be_deleted_is_reported(
    run: DistillRun, tmp_path: Path, environment: dict[str, str], code: int, message: str
) -> None:
    found, record = clear(tmp_path, **environment)
    assert (found, record and record.exit) == (code, code)
    assert record is not None and message in record.message
