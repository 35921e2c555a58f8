"""Training with real jobs and without a cluster: a killed run ends with the same bits as an uninterrupted
one, with one and with two processes.

All runs have a few steps and one dataset of the sample and further real rows. Tests share runs, because a
process needs ten seconds for its imports.
"""

import os
import random
import re
import secrets
import signal
import socket
import time
import urllib.request
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
from vpmoe.api.progress import Progress
from vpmoe.checkpoint.train_state import list_iterations
from vpmoe.failure import read_record
from vpmoe.model.shapes import SHAPES
from vpmoe.process.launcher import free_port
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


def kill_in_random_step(jobs: LocalJobs, file: Path, first: int, steps: int, *arguments: str) -> None:
    """Train, and send SIGKILL to all processes in a random step from `first` to the last but one."""
    seed = secrets.randbelow(1 << 32)
    print(f"killed by seed {seed}")
    rng = random.Random(seed)
    step, delay = rng.randint(first, steps - 1), rng.uniform(0, 1.0)
    process = jobs.start("train", file, "--step", "vanilla", *arguments)

    def kill() -> None:
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGKILL)

    run_until(process, rf"step {step} of {steps}:", kill)
    assert process.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def uninterrupted(jobs: LocalJobs) -> Path:
    """The run of one process without interruption, both stages."""
    file = jobs.run_file("alone")
    jobs.finish("train", file)
    jobs.finish("train", file)
    return file


@pytest.fixture(scope="module")
def two_pods(jobs: LocalJobs) -> Path:
    """The run of two processes, each started like a pod of a PyTorchJob: a Master and a Worker."""
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
            VPMOE_TERMINATION_LOG=str(jobs.folder / f"pod-{node}"),
        )
        for node in range(2)
    ]
    logs = [pod.communicate(timeout=400)[1] for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], logs
    return file


def test_both_pods_record_their_success_and_the_first_the_progress(jobs: LocalJobs, two_pods: Path) -> None:
    first, second = (read_record(jobs.folder / f"pod-{node}") for node in range(2))
    assert first is not None and second is not None
    assert (first.kind, second.kind, second.progress) == ("Succeeded", "Succeeded", None)
    assert first.progress == read_progress(jobs, two_pods)


def test_the_loss_decreases_on_real_rows_in_both_spans(jobs: LocalJobs, uninterrupted: Path) -> None:
    progress = read_progress(jobs, uninterrupted)
    assert (
        progress.state == "Succeeded"
        and progress.held_out is not None
        and progress.checkpoint is not None
        and progress.dataset is not None
    )
    before, after = progress.held_out.before, progress.held_out.latest
    assert before is not None and after is not None
    # 0.88 and 0.49 nats in the four steps of this recipe, with the sample and real rows
    assert after.reasoning < before.reasoning - 0.25 and after.final < before.final - 0.25  # type: ignore[operator]
    losses = [line["loss"] for line in metrics_lines(jobs, uninterrupted, "step")]
    assert (
        len(losses) >= 4 and losses[-1] < losses[0] - 0.5
    )  # 0.88 to 1.7: the order of the documents differs between buckets
    assert progress.tokens is not None and progress.tokens.done == progress.tokens.total >= 4100


def test_a_metrics_line_has_every_field_that_is_always_logged(jobs: LocalJobs, uninterrupted: Path) -> None:
    line = metrics_lines(jobs, uninterrupted, "step")[-1]
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
    shape = SHAPES["tiny"]
    assert sum(line["router"]["histogram"]["experts"]) == shape.moe_layers * shape.experts
    mixtures = range(shape.dense_layers, shape.layers)
    assert set(line["router"]["maxOverMean"]) == {f"layers.{layer}" for layer in mixtures}
    first, second = metrics_lines(jobs, uninterrupted, "evaluation")
    assert (first["step"], second["step"]) == (0, line["step"]) and second["heldOut"]["final"] < first[
        "heldOut"
    ]["final"]


def test_the_next_stage_continues_from_the_end_of_the_one_before(
    jobs: LocalJobs, uninterrupted: Path
) -> None:
    first_checkpoint = last_checkpoint(jobs, uninterrupted)
    (start,) = metrics_lines(jobs, uninterrupted, "start", "second")
    first = metrics_lines(jobs, uninterrupted, "step", "second")[0]
    assert (
        start["from"] == "from the end of stage vanilla"
        and first["iteration"] == logged_steps(jobs, uninterrupted)[-1] + 1
        and first["step"] == 1
    )
    assert first["loss"] < metrics_lines(jobs, uninterrupted, "step")[0]["loss"] - 0.5
    second = read_progress(jobs, uninterrupted, "second")
    assert (
        second.held_out is not None
        and second.held_out.before == read_progress(jobs, uninterrupted).held_out.latest
    )  # type: ignore[union-attr]
    second_checkpoint = last_checkpoint(jobs, uninterrupted, "second")
    assert (
        second_checkpoint.facts["position"]["firstSequence"]
        == first_checkpoint.facts["position"]["nextSequence"]
    )
    assert second_checkpoint.inputs["checkpoint"].digest == {"sha256": first_checkpoint.sha256}


def test_a_finished_stage_is_not_trained_again(jobs: LocalJobs, uninterrupted: Path) -> None:
    before, steps = checkpoint_digests(jobs, uninterrupted), logged_steps(jobs, uninterrupted)
    jobs.bucket.delete(
        paths.progress(read_run(uninterrupted), "vanilla")
    )  # as if it had been killed before its last report
    termination = jobs.folder / "finished"
    process = jobs.start(
        "train",
        uninterrupted,
        "--step",
        "vanilla",
        "--attempt",
        "2",
        VPMOE_TERMINATION_LOG=str(termination),
    )
    log = process.communicate(timeout=400)[1]
    assert process.returncode == 0 and f"Stage vanilla has already finished: {len(steps)} steps" in log
    progress = read_progress(jobs, uninterrupted)
    record = read_record(termination)
    assert record is not None and (record.kind, record.progress) == ("Succeeded", progress)
    assert (
        progress.state == "Succeeded"
        and progress.message == "Finished by attempt 1"
        and progress.held_out is not None
    )
    assert checkpoint_digests(jobs, uninterrupted) == before and logged_steps(jobs, uninterrupted) == steps


def test_a_run_that_was_killed_or_lost_a_checkpoint_ends_with_the_same_bits(
    jobs: LocalJobs, uninterrupted: Path, s3: S3
) -> None:
    file = jobs.run_file("killed")
    steps = len(logged_steps(jobs, uninterrupted))
    kill_in_random_step(jobs, file, 1, steps)
    jobs.finish("train", file, "--step", "vanilla", "--attempt", "2")
    assert checkpoint_digests(jobs, file) == checkpoint_digests(jobs, uninterrupted)
    assert logged_steps(jobs, file) == logged_steps(jobs, uninterrupted)

    folder = paths.checkpoints(read_run(file), "vanilla")
    jobs.bucket.delete_prefix(f"{folder}/{steps}")  # as if it had been killed before its end
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
    assert checkpoint_digests(jobs, file) == checkpoint_digests(jobs, uninterrupted)


def test_two_stopped_and_killed_processes_end_with_the_same_bits_as_two_pods(
    jobs: LocalJobs, two_pods: Path
) -> None:
    file = jobs.run_file("stopped", gpus=2)
    termination = jobs.folder / "termination-log"
    termination.touch()
    steps = len(logged_steps(jobs, two_pods))
    port = free_port()
    process = jobs.start(
        "train",
        file,
        "--step",
        "vanilla",
        VPMOE_TERMINATION_LOG=str(termination),
        VPMOE_SERVE_PORT=str(port),
    )
    served: dict[str, str] = {}

    def read_and_stop() -> None:
        for path in ("progress", "metrics"):
            served[path] = urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}").read().decode()
        process.send_signal(signal.SIGTERM)

    run_until(process, f"step 1 of {steps}:", read_and_stop)
    record = read_record(termination)
    assert process.returncode == 143
    assert record is not None and (record.kind, record.exit) == ("Terminated", 143)
    stopped = read_progress(jobs, file)
    assert (
        stopped.state == "Running"
        and stopped.checkpoint is not None
        and f"after step {stopped.checkpoint.iteration} of" in record.message
    )
    assert record.progress == stopped, "whichever rank wrote the record first"
    running = Progress.model_validate_json(served["progress"])
    assert (running.step, running.attempt, running.state) == ("vanilla", 1, "Running")
    assert 'vpmoe_train_step{role="train",run="stopped",stage="vanilla"}' in served["metrics"]

    kill_in_random_step(jobs, file, stopped.checkpoint.iteration + 1, steps, "--attempt", "2")
    jobs.finish("train", file, "--step", "vanilla", "--attempt", "3")
    assert checkpoint_digests(jobs, file) == checkpoint_digests(jobs, two_pods)
    assert set(checkpoint_digests(jobs, file)) == {
        "buffers.safetensors",
        "rank-00000.safetensors",
        "rank-00001.safetensors",
    }
    assert logged_steps(jobs, file) == logged_steps(jobs, two_pods)


def test_two_ranks_have_the_loss_of_one(jobs: LocalJobs, uninterrupted: Path, two_pods: Path) -> None:
    """Span means are over the global batch, so that they do not depend on the number of ranks."""
    one, two = metrics_lines(jobs, uninterrupted, "step"), metrics_lines(jobs, two_pods, "step")
    for line_of_two, line_of_one in zip(two, one, strict=True):
        assert (
            line_of_two["targets"] == line_of_one["targets"]
            and line_of_two["exercises"] == line_of_one["exercises"]
            and line_of_two["tokens"] == line_of_one["tokens"]
        )
        assert line_of_two["loss"] == pytest.approx(line_of_one["loss"], rel=2e-4)
        assert line_of_two["gradientNorm"] == pytest.approx(line_of_one["gradientNorm"], rel=1e-2)
