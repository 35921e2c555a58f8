"""Experts divided over two GPUs, beside all experts on each: losses and gradients of the same global batch,
with and without CUDA graphs. No layer waits for the GPU: expert_parallel_ranks.py tries it.

Also a stage of jobs.train with divided experts, to its end and to the failure of a rank: NCCL can wait for
ever at the end of a process whose CUDA graphs have collectives.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.fakes import datasets, local_jobs
from tests.fakes.failing_train import FAULT
from tests.fakes.local_jobs import LocalJobs
from tests.fakes.store import S3, small_run
from tests.fakes.students import new_seed
from vpmoe.api.termination import EXIT_CODES
from vpmoe.failure import read_record
from vpmoe.model.shapes import SHAPES
from vpmoe.storage import Bucket

GRADIENT, FLOOR = 5e-2, 1e-3
"""Allowed relative error of a gradient's norm, beside 1e-3 of the largest of all parameters. A token's sum
over its experts is rounded to bf16 (2⁻⁹) once a rank and once more, and so is its gradient. Without what the
other rank's experts add to the outputs most are 0.1 and more."""
LOSS, NORM = 5e-3, 5e-2
"""Allowed relative differences of the loss and of the gradient's norm where routers may choose otherwise: by
such an error, about one choice in a hundred of each layer after the first mixture."""

GPUS = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1")
ENDING = 30.0
"""Seconds after which the processes of a stage are killed if a rank has failed and they have not ended."""


@dataclass(frozen=True)
class Attempt:
    """At the Vanilla stage of a run of its own; all its processes have ended."""

    jobs: LocalJobs
    file: Path
    """Of the run."""
    record: Path
    """Its termination record."""
    code: int
    log: str


def attempt(jobs: LocalJobs, job: str, package: str) -> Attempt:
    """Train on two GPUs with experts divided."""
    file = jobs.run_file(job.replace("_", "-"), gpus=2, expertParallel=2)
    datasets.resolve(local_jobs.read_run(file), jobs.bucket)
    record = file.with_suffix(".record")
    process = jobs.start(
        job, file, package=package, CUDA_VISIBLE_DEVICES=GPUS, VPMOE_TERMINATION_LOG=str(record)
    )
    late = threading.Timer(ENDING, os.killpg, (process.pid, signal.SIGKILL))
    log = local_jobs.run_until(process, FAULT, late.start)  # reads until every rank has closed it
    late.cancel()
    return Attempt(jobs, file, record, process.returncode, log)


@pytest.fixture(scope="module")
def attempts(
    gpu: torch.device, s3: S3, store: Bucket, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Attempt]]]:
    """One of jobs.train and one of failing_train, which run beside other tests."""
    spec = small_run(s3)["spec"]
    bucket, random = store.other(spec["storage"]["bucket"]), np.random.default_rng(new_seed())
    documents, held_out = (datasets.random_documents(random, count, 300) for count in (100, 20))
    datasets.write_dataset(bucket, [documents], [held_out])
    spec["stages"] = [{"name": "vanilla", "kind": "Vanilla", "tokens": 10_000}]
    jobs = LocalJobs(bucket, tmp_path_factory.mktemp("attempts"), spec)
    with ThreadPoolExecutor(2) as threads:
        yield {
            job: threads.submit(attempt, jobs, job, package)
            for job, package in (("train", "jobs"), ("failing_train", "tests.fakes"))
        }
        jobs.kill()


@pytest.fixture(scope="module")
def ranks(on_two_gpus: Callable[[str], list[Any]], attempts: dict[str, Future[Attempt]]) -> list[Any]:
    """What each rank found, while the attempts run."""
    return on_two_gpus("tests.fakes.expert_parallel_ranks")


def test_divided_experts_have_the_gradients_of_whole_ones(ranks: list[Any]) -> None:
    """Of every parameter of a dense layer and a mixture, which chooses the same experts."""
    wanted, found = (ranks[0]["one mixture", parallel] for parallel in (1, 2))
    assert torch.equal(wanted["load"], found["load"])
    assert found["loss"] == pytest.approx(wanted["loss"], rel=LOSS)
    floor = FLOOR * max(float(gradient.norm()) for gradient in wanted["gradients"].values())
    errors = {}
    for name, gradient in wanted["gradients"].items():
        assert gradient.norm() > 0, name
        errors[name] = float((found["gradients"][name] - gradient).norm() / (gradient.norm() + floor))
    print(errors)
    assert not {name: error for name, error in errors.items() if error > GRADIENT}


def test_divided_experts_have_the_loss_of_whole_ones_in_every_layer(ranks: list[Any]) -> None:
    wanted, found = (ranks[0]["every layer", parallel] for parallel in (1, 2))
    norms = [
        sum(float(gradient.double().square().sum()) for gradient in one["gradients"].values()) ** 0.5
        for one in (wanted, found)
    ]
    print(wanted["loss"], found["loss"], norms, (wanted["load"] - found["load"]).abs().sum(1).tolist())
    assert found["loss"] == pytest.approx(wanted["loss"], rel=LOSS)
    assert norms[1] == pytest.approx(norms[0], rel=NORM)


def test_graphs_change_no_bit(ranks: list[Any]) -> None:
    for rank in ranks:
        without, found = (rank["graphs", graphs] for graphs in (False, True))
        assert found["losses"] == without["losses"]
        different = [name for name, x in without["weights"].items() if not x.equal(found["weights"][name])]
        assert not different


def test_a_stage_with_divided_experts_trains_to_its_end(attempts: dict[str, Future[Attempt]]) -> None:
    ended = attempts["train"].result()
    assert ended.code == 0, ended.log
    assert f"Captured CUDA graphs of {SHAPES['tiny'].layers} layers" in ended.log
    assert local_jobs.read_progress(ended.jobs, ended.file).state == "Succeeded"
    losses = [line["loss"] for line in local_jobs.metrics_lines(ended.jobs, ended.file, "step")]
    assert len(losses) >= 4 and losses[-1] < losses[0] - 0.5


def test_a_stage_ends_if_a_rank_fails_between_replays(attempts: dict[str, Future[Attempt]]) -> None:
    """With the fault of the rank that failed, not with what it did to the other one."""
    ended = attempts["failing_train"].result()
    assert ended.code == EXIT_CODES["Internal"], ended.log
    assert "Rank 1 failed with exit code 70" in ended.log
    record = read_record(ended.record)
    assert record is not None and (record.kind, record.rank) == ("Internal", 1) and FAULT in record.message
