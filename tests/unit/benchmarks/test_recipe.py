"""benchmarks.recipe without its jobs: the bucket's speed, and what is printed when a role has failed."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import recipe
from tests.fakes.local_pods import RunFailed, Span, StepRunner
from vpmoe.model.shapes import SHAPES
from vpmoe.storage import Bucket

GIVEN = "recipe --limit 100 --student tiny --teacher tiny"


def given(monkeypatch: pytest.MonkeyPatch, *more: str) -> Any:
    """The options of a command line."""
    monkeypatch.setattr(sys, "argv", [*GIVEN.split(), *more])
    return recipe.arguments()


@pytest.fixture
def no_jobs(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The bucket of tests in place of the benchmark's, and neither teacher nor rows. The list gets the spans
    of each report."""
    reported: list[Any] = []

    class FakeReport:
        def __init__(self, *fields: Any) -> None:
            reported.append(dict(fields[3]))

        def print(self) -> None:
            print("figures")

    @contextlib.contextmanager
    def store(*_: Any) -> Iterator[tuple[str, Path]]:
        yield "http://127.0.0.1:1", tmp_path

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(recipe, "store_of", store)
    monkeypatch.setattr(Bucket, "open", lambda *_: bucket)
    monkeypatch.setattr(recipe, "prepare", lambda *_: 1e12)
    monkeypatch.setattr(recipe, "tables", lambda _: iter(()))
    monkeypatch.setattr(recipe, "Report", FakeReport)
    return reported


def test_steps_that_have_ended_have_figures_although_a_later_one_fails(
    no_jobs: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ended: dict[str, Span] = {}

    def run_all(runner: StepRunner) -> None:
        runner.spans.update(ended)
        raise RunFailed("the limit has passed")

    monkeypatch.setattr(StepRunner, "run_all", run_all)
    assert recipe.run_recipe(given(monkeypatch), tmp_path) == 1
    assert not no_jobs and "the limit has passed" in capfd.readouterr().err
    ended["onpolicy"] = Span(1.0, 2.0)
    assert recipe.run_recipe(given(monkeypatch), tmp_path) == 1
    output = capfd.readouterr()
    assert no_jobs == [ended] and "figures" in output.out and "the limit has passed" in output.err
    monkeypatch.setattr(StepRunner, "run_all", lambda runner: runner.spans.update(ended))
    assert recipe.run_recipe(given(monkeypatch), tmp_path) == 0 and no_jobs == [ended, ended]


def test_the_plan_computes_with_the_slower_way_of_the_bucket(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Unless another speed is given. Nothing of the measurement is left."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    runner = StepRunner(None, bucket, 0.0, [])  # type: ignore[arg-type]
    speed = recipe.measure_bucket(runner, tmp_path)
    shown = capfd.readouterr().out
    assert f"{speed:.2f} GB/s" in shown and "GB/s in, " in shown and "GB/s out" in shown
    assert not list(tmp_path.iterdir()) and not list(bucket.list(""))
    shape = SHAPES["tiny"]
    assert recipe.plan_options(given(monkeypatch), shape, 0.387)[:2] == ["--gigabytes-per-second", "0.387"]
    options = recipe.plan_options(given(monkeypatch, "--gigabytes-per-second", "2"), shape, 0.387)
    assert options[:2] == ["--gigabytes-per-second", "2"]


@pytest.mark.parametrize(
    "gpus, stages, message",
    [
        (["teacher=0", "sampler=0", "trainer=0"], "OnPolicy", None),
        (["teacher=0", "sampler=0", "trainer=1"], "Vanilla,OnPolicy", None),
        (["teacher=0", "sampler=1", "trainer=2"], "TeacherForced", None),
        (
            ["teacher=1", "sampler=0", "trainer=1,0"],
            "OnPolicy,Vanilla",
            "Vanilla trains on the GPUs of trainer and sampler, a rank on each, and GPU 0 is there twice",
        ),
        (
            ["teacher=0", "sampler=0", "trainer=1"],
            "Vanilla,TeacherForced",
            "TeacherForced trains on the GPUs of trainer and sampler and teacher, a rank on each, and GPU 0",
        ),
    ],
)
def test_two_ranks_of_a_stage_on_one_gpu_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    gpus: list[str],
    stages: str,
    message: str | None,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    options = ["--gpus", *gpus, "--share", "teacher=0.3", "sampler=0.3", "trainer=0.3", "--stages", stages]
    if message is None:
        assert given(monkeypatch, *options).stages == stages.split(",")
        return
    with pytest.raises(SystemExit):
        given(monkeypatch, *options)
    assert message in capsys.readouterr().err
