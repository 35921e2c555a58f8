"""Training with real jobs and no cluster: a killed run ends with the same bits as an undisturbed one, with 1
and 2 processes.

One dataset, from the sample and further real rows; runs of a few steps. A process spends ten seconds on
imports, so tests share runs.
"""

import json
import os
import random
import re
import secrets
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.local_jobs import (
    LocalJobs,
    checkpoint_digests,
    last_checkpoint,
    logged_steps,
    metrics_lines,
    prepared_bucket,
    read_progress,
    read_run,
    run_until,
)
from tests.fakes.store import S3
from vpmoe.checkpoint.train_state import list_iterations
from vpmoe.model.shapes import SHAPES
from vpmoe.storage import paths


@pytest.fixture(scope="module")
def jobs(
    s3: S3, sample_parquet: list[Path], real_parquet: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalJobs]:
    """A bucket with a prepared dataset, for two Vanilla stages."""
    stages = [
        {"name": "vanilla", "kind": "Vanilla", "tokens": 4100},
        {"name": "second", "kind": "Vanilla", "tokens": 1000},
    ]
    with prepared_bucket(
        s3, [*sample_parquet, *real_parquet], tmp_path_factory.mktemp("by-hand"), stages
    ) as it:
        yield it


def kill_somewhere(jobs: LocalJobs, file: Path, first: int, steps: int, *arguments: str) -> None:
    """Train, and kill -9 all processes in a random step, from `first` to the last but one."""
    seed = secrets.randbelow(1 << 32)
    print(f"killed by seed {seed}")
    chosen = random.Random(seed)
    step, delay = chosen.randint(first, steps - 1), chosen.uniform(0, 1.0)
    process = jobs.start("train", file, "--step", "vanilla", *arguments)

    def kill() -> None:
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGKILL)

    run_until(process, rf"step {step} of {steps}:", kill)
    assert process.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def left_alone(jobs: LocalJobs) -> Path:
    """One process, both stages, not interrupted."""
    file = jobs.run_file("alone")
    jobs.finish("train", file)
    jobs.finish("train", file)
    return file


@pytest.fixture(scope="module")
def two_pods(jobs: LocalJobs) -> Path:
    """Two processes, each started like a pod of a PyTorchJob: a Master and a Worker."""
    file = jobs.run_file("pods", gpus=2, gpusPerPod=1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    pods = [
        jobs.start(
            "train",
            file,
            "--step",
            "vanilla",
            PET_NNODES="2",
            PET_NODE_RANK=str(node),
            PET_MASTER_ADDR="127.0.0.1",
            PET_MASTER_PORT=port,
            RANK=str(node),
            WORLD_SIZE="2",
        )
        for node in range(2)
    ]
    logs = [pod.communicate(timeout=200)[1] for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], logs
    return file


def test_the_loss_goes_down_on_real_rows_in_both_spans(jobs: LocalJobs, left_alone: Path) -> None:
    said = read_progress(jobs, left_alone)
    assert (
        said.state == "Succeeded"
        and said.held_out is not None
        and said.checkpoint is not None
        and said.dataset is not None
    )
    before, after = said.held_out.before, said.held_out.latest
    assert before is not None and after is not None
    # 0.88 and 0.49 nats in the four steps of this recipe on the sample and real rows together
    assert after.reasoning < before.reasoning - 0.25 and after.final < before.final - 0.25  # type: ignore[operator]
    losses = [line["loss"] for line in metrics_lines(jobs, left_alone, "step")]
    assert (
        len(losses) >= 4 and losses[-1] < losses[0] - 0.5
    )  # 0.88 to 1.7: the order of the documents is another in every bucket
    assert said.tokens is not None and said.tokens.done == said.tokens.total >= 4100


def test_a_line_of_metrics_has_everything_that_is_always_logged(jobs: LocalJobs, left_alone: Path) -> None:
    line = metrics_lines(jobs, left_alone, "step")[-1]
    assert {
        "loss",
        "lossBySpan",
        "learningRate",
        "gradientNorm",
        "tokensPerSecond",
        "router",
        "exercises",
        "gpu",
        "epoch",
    } <= set(line)
    assert sum(line["exercises"].values()) == pytest.approx(1) and line["learningRate"] == pytest.approx(1e-3)
    assert line["gpu"] == {"utilisation": None, "memoryHeadroom": None, "reason": "computed on the CPU"}
    assert sum(line["router"]["histogram"]["experts"]) == SHAPES["tiny"].moe_layers * SHAPES["tiny"].experts
    assert set(line["router"]["maxOverMean"]) == {"layers.1", "layers.2"}
    first, second = metrics_lines(jobs, left_alone, "evaluation")
    assert (first["step"], second["step"]) == (0, line["step"]) and second["heldOut"]["final"] < first[
        "heldOut"
    ]["final"]


def test_the_next_stage_goes_on_where_the_one_before_ended(jobs: LocalJobs, left_alone: Path) -> None:
    ended = last_checkpoint(jobs, left_alone)
    (begun,) = metrics_lines(jobs, left_alone, "start", "second")
    first = metrics_lines(jobs, left_alone, "step", "second")[0]
    assert (
        begun["from"] == "from the end of stage vanilla"
        and first["iteration"] == logged_steps(jobs, left_alone)[-1] + 1
        and first["step"] == 1
    )
    assert first["loss"] < metrics_lines(jobs, left_alone, "step")[0]["loss"] - 0.5
    second = read_progress(jobs, left_alone, "second")
    assert (
        second.held_out is not None
        and second.held_out.before == read_progress(jobs, left_alone).held_out.latest
    )  # type: ignore[union-attr]
    reached = last_checkpoint(jobs, left_alone, "second")
    assert reached.facts["position"]["firstSequence"] == ended.facts["position"]["nextSequence"]
    assert reached.inputs["checkpoint"].digest == {"sha256": ended.sha256}


def test_a_finished_stage_is_not_trained_again(jobs: LocalJobs, left_alone: Path) -> None:
    before, steps = checkpoint_digests(jobs, left_alone), logged_steps(jobs, left_alone)
    jobs.bucket.delete(paths.progress(read_run(left_alone), "vanilla"))  # as if killed before its last report
    assert f"Stage vanilla has already finished: {len(steps)} steps" in jobs.finish(
        "train", left_alone, "--step", "vanilla", "--attempt", "2"
    )
    said = read_progress(jobs, left_alone)
    assert said.state == "Succeeded" and said.message == "Finished by attempt 1" and said.held_out is not None
    assert checkpoint_digests(jobs, left_alone) == before and logged_steps(jobs, left_alone) == steps


def test_a_killed_run_ends_at_the_same_bits_and_so_does_one_that_lost_a_checkpoint(
    jobs: LocalJobs, left_alone: Path, s3: S3
) -> None:
    file = jobs.run_file("killed")
    steps = len(logged_steps(jobs, left_alone))
    kill_somewhere(jobs, file, 1, steps)
    jobs.finish("train", file, "--step", "vanilla", "--attempt", "2")
    assert checkpoint_digests(jobs, file) == checkpoint_digests(jobs, left_alone)
    assert logged_steps(jobs, file) == logged_steps(jobs, left_alone)

    folder = paths.checkpoints(read_run(file), "vanilla")
    jobs.bucket.delete_prefix(f"{folder}/{steps}")  # as if killed again before its end
    newest, _ = list_iterations(jobs.bucket, folder)
    damaged = s3.folder / jobs.bucket.name / folder / str(newest) / "rank-00000.safetensors"
    with damaged.open("r+b") as content:
        content.seek(10**8)
        content.write(b"damage")
    log = jobs.finish("train", file, "--step", "vanilla", "--attempt", "3")
    assert re.search(
        rf"ERROR.*REJECTED: checkpoint .*/checkpoints/vanilla/{newest} cannot be used.*sha256 of block 11 is",
        log,
    )
    assert [condition.type for condition in read_progress(jobs, file).conditions] == ["CheckpointRefused"]
    assert checkpoint_digests(jobs, file) == checkpoint_digests(jobs, left_alone)


def test_two_processes_stopped_and_killed_end_at_the_same_bits_as_two_pods(
    jobs: LocalJobs, two_pods: Path
) -> None:
    file = jobs.run_file("stopped", gpus=2)
    termination = jobs.folder / "termination-log"
    termination.touch()
    steps = len(logged_steps(jobs, two_pods))
    process = jobs.start("train", file, "--step", "vanilla", VPMOE_TERMINATION_LOG=str(termination))
    run_until(process, f"step 1 of {steps}:", lambda: process.send_signal(signal.SIGTERM))
    said = json.loads(termination.read_bytes())
    assert process.returncode == 143 and (said["class"], said["exit"]) == ("Terminated", 143)
    stopped = read_progress(jobs, file)
    assert (
        stopped.state == "Running"
        and stopped.checkpoint is not None
        and f"after step {stopped.checkpoint.iteration} of" in said["message"]
    )

    kill_somewhere(jobs, file, stopped.checkpoint.iteration + 1, steps, "--attempt", "2")
    jobs.finish("train", file, "--step", "vanilla", "--attempt", "3")
    assert checkpoint_digests(jobs, file) == checkpoint_digests(jobs, two_pods)
    assert set(checkpoint_digests(jobs, file)) == {
        "buffers.safetensors",
        "rank-00000.safetensors",
        "rank-00001.safetensors",
    }
    assert logged_steps(jobs, file) == logged_steps(jobs, two_pods)


def test_two_ranks_lose_what_one_does(jobs: LocalJobs, left_alone: Path, two_pods: Path) -> None:
    """Span means are over the global batch, so they do not depend on the number of ranks."""
    one, two = metrics_lines(jobs, left_alone, "step"), metrics_lines(jobs, two_pods, "step")
    for ours, theirs in zip(two, one, strict=True):
        assert (
            ours["targets"] == theirs["targets"]
            and ours["exercises"] == theirs["exercises"]
            and ours["tokens"] == theirs["tokens"]
        )
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-4)
        assert ours["gradientNorm"] == pytest.approx(theirs["gradientNorm"], rel=1e-2)
