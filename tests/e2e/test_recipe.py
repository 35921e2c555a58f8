"""benchmarks.recipe with tiny models on the CPU: an OnPolicy stage by real jobs, of which an engine is
killed, and the time limit; and its pods beside the operator's.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distill_operator.attempt import Attempt, Origin
from distill_operator.children import build_child

from tests.fakes.local_pods import Settings, command, environment, parse_placement
from tests.fakes.pod_overrides import customization
from tests.fakes.simulated_cluster import SETTINGS, pod_templates
from tests.fakes.store import S3
from vpmoe.api import DistillRun

ROOT = Path(__file__).parents[2]
SMALL = (
    "--student tiny --teacher tiny --gpus teacher=0 sampler=1 trainer=2 --sequence 512 --batch-tokens 512 "
    "--prompts 2 --completion 16 --windows 4 --anchor 0 --documents 60 --held-out 0"
)


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder with a short path: sockets are below it."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture
def recipe(s3: S3, scratch: Path) -> Any:
    """Runs the benchmark on the CPU: its arguments → exit code and output. `s3` is not used by it, but has
    the store's program compiled."""

    def run(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "benchmarks.recipe",
                *SMALL.split(),
                "--scratch",
                str(scratch),
                *arguments,
            ],
            cwd=ROOT,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT}:{ROOT / 'operator'}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout

    return run


def alive(folder: Path) -> list[str]:
    """The command lines of processes with this folder in their command line or environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line, variables = ((process / name).read_bytes() for name in ("cmdline", "environ"))
        except OSError:  # it has ended
            continue
        if str(folder).encode() in line + variables:
            found.append(line.decode())
    return found


def test_a_stage_ends_although_an_engine_is_killed_and_nothing_is_left(recipe: Any, scratch: Path) -> None:
    speeds = ("--speeds", "train=1000", "sample=100000", "score=1000")
    code, output = recipe("--limit", "500", "--kill", "sampler", *speeds)
    assert code == 0, output
    assert re.search(r"onpolicy-sampler: killed process \d+ of attempt 1\n", output), output
    assert "onpolicy-sampler: ended with exit code 75" in output
    for step in ("preprocess", "onpolicy-sampler", "onpolicy-teacher", "onpolicy"):
        assert f"{step}: succeeded" in output
    windows = re.findall(r"(sampler|teacher): (\d+) windows", output)
    assert len(windows) == 2 and len({number for _, number in windows}) == 1 and int(windows[0][1]) >= 3
    assert re.search(r"bucket: \d+\.\d\d GB/s in, \d+\.\d\d GB/s out\n", output), output
    assert re.search(r"from step to sampling: \d+\.\d s \(version 1\)", output), output
    for figure in (
        "onpolicy: tokens/s",
        "trainer busy, %",
        "teacher busy, %",
        "trainer waits for uploads, %",
        "from step to bucket, s",
        "between steps, with a version, s",
    ):
        assert re.search(rf"^\| {figure} \| [\d.,]+ \| [\d.,]+ \| .*\|$", output, re.MULTILINE), output
    assert not alive(scratch) and not list(scratch.iterdir())


def test_nothing_is_left_at_the_limit(recipe: Any, scratch: Path) -> None:
    code, output = recipe("--limit", "2")
    assert code == 1 and "the time limit has passed (--limit)" in output, output
    assert not alive(scratch) and not list(scratch.iterdir())


NOT_HERE = {
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "TMPDIR",
    "HOME",
    "VPMOE_IMAGE",
}
"""Variables of the operator's pods that are not in `environment`: this machine's are used, and there is no
image. TMPDIR is set for each pod."""


def test_pods_are_the_operators(tmp_path: Path) -> None:
    """Their number, GPUs, command and variables, for each step of a run with all kinds of stages."""
    kinds = ("Vanilla", "Rescored", "TeacherForced", "OnPolicy")
    stages: list[dict[str, Any]] = [{"name": kind.lower(), "kind": kind} for kind in kinds]
    stages[0]["stop"] = {"minValidity": 0.5}
    stages[-1]["sampler"] = {"gpus": 2}
    runtime = {"teacherCache": {"claimName": "teachers"}, "weightsVolume": {"claimName": "weights"}}
    run = DistillRun.parse(
        {
            "apiVersion": "vpmoe.dev/v1alpha1",
            "kind": "DistillRun",
            "metadata": {"name": "recipe", "namespace": "default", "uid": "0123456789"},
            "spec": {
                "dataset": {"source": "s3://bucket/*.parquet", "workers": 2},
                "teacher": {"model": "s3://bucket/teacher", "gpus": 2},
                "student": {"shape": "tiny", "gpus": 5},
                "stages": stages,
                "storage": {"bucket": "bucket"},
                "runtime": runtime,
            },
        }
    )
    placed = parse_placement(["teacher=0,1", "sampler=2,3", "trainer=4,5,6"], [])
    here = Settings(run, Path("/etc/vpmoe/run.yaml"), placed, tmp_path, tmp_path, tmp_path, tmp_path, None)
    for step in run.steps():
        child = build_child(Attempt(run, step, 2, Origin(run.config_hash, None), SETTINGS))
        ((_, template),) = pod_templates(child)
        (container,) = template["spec"]["containers"]
        pods = placed.pods(run, step)
        assert len(pods) == child["spec"].get("completions", 1), step
        limits = container["resources"].get("limits", {})
        assert {len(gpus) for gpus in pods} == {limits.get("nvidia.com/gpu", 0)}, step
        assert command(here, step, 2)[1:] == container["command"][1:], step
        indexed = {"JOB_COMPLETION_INDEX"} if child["spec"].get("completionMode") == "Indexed" else set()
        expected = {variable["name"] for variable in container["env"]} - NOT_HERE | indexed
        assert set(environment(here, step, 0)) == expected, step


@pytest.mark.parametrize(
    "gpus, shares, message",
    [
        (["teacher=0", "sampler=0", "trainer=1"], [], r"teacher and sampler share GPU 0, .* --share"),
        (["teacher=0", "sampler=0", "trainer=1"], ["teacher=0.6", "sampler=0.5"], "more than the whole"),
        (["teacher=0", "sampler=1", "trainer=1"], ["sampler=0.1"], "sampler and trainer share GPU 1"),
        (["teacher=0", "trainer=1"], [], "--gpus: sampler has none"),
        (["teacher=0", "sampler=1", "trainer=2", "other=3"], [], "--gpus other=3: write ROLE=N"),
        (["teacher=0", "sampler=", "trainer=2"], [], "--gpus sampler=: write ROLE=N"),
        (["teacher=0", "sampler=1", "trainer=2"], ["export=0.5"], "--share export=0.5: write"),
        (["teacher=0", "sampler=1", "trainer=2"], ["teacher=x"], "--share teacher=x: write"),
    ],
)
def test_a_placement_that_cannot_be_is_refused(gpus: list[str], shares: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_placement(gpus, shares)


def test_a_student_with_fewer_layers_takes_less_memory(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(customization(20, 1.0, tmp_path))
    code = (
        "from vpmoe.model.shapes import SHAPES; from vpmoe.api.memory import STUDENTS\n"
        "print(SHAPES['vpmoe-6b'].layers, STUDENTS['vpmoe-6b'] == SHAPES['vpmoe-6b'].size())"
    )
    variables = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    printed = subprocess.run(
        [sys.executable, "-c", code], env=variables, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert printed.split() == ["20", "True"]
