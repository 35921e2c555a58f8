"""Runs jobs as local processes on one bucket, without a cluster, and reads what they write."""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.fakes.store import S3
from vpmoe.api import DistillRun
from vpmoe.api.progress import Progress
from vpmoe.checkpoint.train_state import load_stage_end
from vpmoe.storage import Bucket, paths
from vpmoe.storage.manifest import Manifest

ROOT = Path(__file__).parents[2]


@dataclass
class LocalJobs:
    """Starts jobs for the runs of one bucket."""

    bucket: Bucket
    folder: Path
    spec: dict[str, Any]
    started: list["subprocess.Popen[str]"] = field(default_factory=list)

    def run_file(self, name: str, **student: int) -> Path:
        """Writes the manifest of a run, with changes to spec.student. Returns its path."""
        path = self.folder / f"{name}.yaml"
        spec = {**self.spec, "student": {**self.spec["student"], **student}}
        path.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "vpmoe.dev/v1alpha1",
                    "kind": "DistillRun",
                    "metadata": {"name": name},
                    "spec": spec,
                }
            )
        )
        return path

    def start(
        self, job: str, file: Path, *arguments: str, package: str = "jobs", **environment: str
    ) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-m", f"{package}.{job}", "--run", str(file), *arguments],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_NUM_THREADS": "1",
                "TMPDIR": str(self.folder),
                **environment,
            },
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def finish(self, job: str, file: Path, *arguments: str) -> str:
        """Run a job until it succeeds. Returns its log."""
        process = self.start(job, file, *arguments)
        _, log = process.communicate(timeout=400)
        assert process.returncode == 0, log
        return log

    def kill(self) -> None:
        """Kill what still runs, because a test failed."""
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def prepared_bucket(
    s3: S3, rows: list[Path], folder: Path, stages: list[dict[str, Any]], teacher: Path | None = None
) -> Iterator[LocalJobs]:
    """A bucket with the dataset of these rows and the teacher, for runs with these stages. Stages that need a
    teacher need it from preprocessing on, which reads its configuration.
    """
    name = f"by-hand-{secrets.token_hex(4)}"
    (s3.folder / name).mkdir()
    spec = {
        "dataset": {
            "source": f"s3://{name}/input/*.parquet",
            "maxLength": 512,
            "validFraction": 0.15,
            "workers": 1,
        },
        "teacher": {"model": f"s3://{name}/models/teacher"},
        "student": {"shape": "tiny", "gpus": 1},
        "training": {
            "sequenceLength": 512,
            "globalBatchTokens": 1024,
            "optimizer": {"learningRate": 1.0e-2, "minLearningRate": 1.0e-3, "warmupTokens": 1000},
            "checkpoint": {"everyTokens": 1300, "keep": 3},
        },
        "stages": stages,
        "evaluation": {"everyTokens": "1M", "documents": 4, "completions": 0},
        "storage": {"endpoint": s3.endpoint, "bucket": name, "credentialsSecret": None},
    }
    it = LocalJobs(None, folder, spec)  # type: ignore[arg-type]
    file = it.run_file("prepare")
    it.bucket = Bucket.open(DistillRun.parse(yaml.safe_load(file.read_text())).spec.storage)
    for number, path in enumerate(rows):
        it.bucket.put_file(f"input/{number:03d}.parquet", path, {})
    for path in teacher.iterdir() if teacher is not None else ():
        it.bucket.put_file(f"models/teacher/{path.name}", path, {})
    it.finish("preprocess", file)
    yield it
    it.kill()
    shutil.rmtree(s3.folder / name)  # checkpoints are 300 MB each


def read_run(file: Path) -> DistillRun:
    return DistillRun.parse(yaml.safe_load(file.read_text()))


def read_progress(jobs: LocalJobs, file: Path, step: str = "vanilla") -> Progress:
    return Progress.model_validate(jobs.bucket.get_json(paths.progress(read_run(file), step)))


def metrics_lines(jobs: LocalJobs, file: Path, event: str, step: str = "vanilla") -> list[dict[str, Any]]:
    keys = [found.key for found in jobs.bucket.list(f"{paths.run(read_run(file))}/steps/{step}/metrics/")]
    every = [json.loads(text) for key in keys for text in jobs.bucket.get(key).decode().splitlines()]
    return [line for line in every if line["event"] == event]


def last_checkpoint(jobs: LocalJobs, file: Path, step: str = "vanilla") -> Manifest:
    """The last checkpoint of a finished stage."""
    reached = load_stage_end(jobs.bucket, paths.checkpoints(read_run(file), step))
    assert reached is not None
    return reached[0]


def checkpoint_digests(jobs: LocalJobs, file: Path, step: str = "vanilla") -> dict[str, str]:
    """sha256 of each file of a stage's last checkpoint: weights, moments, expert biases, random state."""
    return {name: subject.sha256 for name, subject in last_checkpoint(jobs, file, step).subjects.items()}


def logged_steps(jobs: LocalJobs, file: Path, step: str = "vanilla") -> list[int]:
    """The steps with a metrics line, in order."""
    return [line["step"] for line in metrics_lines(jobs, file, "step", step)]


def run_until(process: "subprocess.Popen[str]", pattern: str, stop: Callable[[], None]) -> str:
    """Call `stop` when the log matches. Returns the whole log after the process has ended."""
    assert process.stderr is not None
    log = ""
    for line in process.stderr:
        log += line
        if re.search(pattern, line):
            stop()
            break
    log += process.stderr.read()
    process.wait()
    return log
