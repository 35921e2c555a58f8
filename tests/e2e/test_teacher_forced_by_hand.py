"""A TeacherForced stage with real jobs and without a cluster: two students and their teacher, each killed
once."""

import json
import random
import secrets
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.fakes import tiny_teacher
from tests.fakes.local_jobs import (
    LocalJobs,
    checkpoint_digests,
    last_checkpoint,
    logged_steps,
    metrics_lines,
    prepared_bucket,
    read_progress,
    run_until,
)
from tests.fakes.store import S3
from tests.fakes.students import new_seed
from vpmoe.model.shapes import SHAPES
from vpmoe.process.launcher import free_port

WIDTH = 96
"""Width of the teacher's hidden states. The student's width differs, so that there is a projection."""
STAGES = [
    {
        "name": "forced",
        "kind": "TeacherForced",
        "tokens": 9000,
        "loss": {"ce": 0.1, "kl": 2.0, "hidden": 0.5, "temperature": 2.0},
    },
    {"name": "after", "kind": "Vanilla", "tokens": 1000},
]


@pytest.fixture(scope="module")
def jobs(
    s3: S3, sample_parquet: list[Path], real_parquet: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalJobs]:
    """A bucket with a dataset and a teacher."""
    folder = tmp_path_factory.mktemp("forced")
    teacher = tiny_teacher.write(folder / "teacher", hidden_size=WIDTH)
    with prepared_bucket(s3, [*sample_parquet, *real_parquet], folder, STAGES, teacher) as it:
        yield it


@pytest.fixture(scope="module")
def uninterrupted(jobs: LocalJobs) -> Path:
    """The run of two students and their teacher without interruption, and of the next stage."""
    file = jobs.run_file("alone", gpus=2)
    jobs.finish("train", file)
    jobs.finish("train", file)
    return file


def processes(launcher: int) -> tuple[list[psutil.Process], psutil.Process]:
    """The students' processes by rank, and the teacher's."""
    found = psutil.Process(launcher).children()
    (teacher,) = [process for process in found if process.environ().get("VPMOE_PART") == "teacher"]
    return sorted(
        (process for process in found if process != teacher),
        key=lambda process: process.environ()["RANK"],
    ), teacher


def stop_one(
    jobs: LocalJobs, file: Path, target: str, within: range, steps: int, attempt: int
) -> tuple[int, dict[str, Any]]:
    """Train, and at a random time after a random step in `within` send SIGKILL to the teacher or a student,
    or SIGTERM to the launcher (`target`).

    Returns the launcher's exit code and its termination message.
    """
    seed = secrets.randbelow(1 << 32)
    print(f"{target}: seed {seed}")
    rng = random.Random(seed)
    step, delay = rng.choice(within), rng.uniform(0, 0.5)
    termination = jobs.folder / f"termination-{target}"
    process = jobs.start(
        "train", file, "--step", "forced", "--attempt", str(attempt), VPMOE_TERMINATION_LOG=str(termination)
    )

    def stop() -> None:
        students, teacher = processes(process.pid)
        time.sleep(delay)
        if target == "launcher":
            process.send_signal(signal.SIGTERM)
        else:
            (teacher if target == "teacher" else students[1]).kill()

    print(run_until(process, rf"step {step} of {steps}:", stop))
    return process.returncode, json.loads(termination.read_bytes())


def test_two_pods_with_the_teacher_in_the_first_end_with_the_same_bits(
    jobs: LocalJobs, uninterrupted: Path
) -> None:
    file = jobs.run_file("pods", gpus=2, gpusPerPod=1)
    port = str(free_port())
    pods = [
        jobs.start(
            "train",
            file,
            "--step",
            "forced",
            PET_NNODES="2",
            PET_NODE_RANK=str(node),
            PET_MASTER_ADDR="127.0.0.1",
            PET_MASTER_PORT=port,
            RANK=str(node),
            WORLD_SIZE="2",
        )
        for node in range(2)
    ]
    logs = [pod.communicate(timeout=400)[1] for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], logs
    assert checkpoint_digests(jobs, file, "forced") == checkpoint_digests(jobs, uninterrupted, "forced")


def test_the_student_becomes_more_like_its_teacher(jobs: LocalJobs, uninterrupted: Path) -> None:
    steps = metrics_lines(jobs, uninterrupted, "step", "forced")
    first, last = steps[0], steps[-1]
    assert (
        read_progress(jobs, uninterrupted, "forced").state == "Succeeded"
        and last["loss"] < first["loss"] - 0.3
    )
    for span in ("reasoning", "final"):
        assert (
            last["kl"][span] < first["kl"][span] - 0.005
        )  # from 0.27: the tokens of a random teacher are almost equally likely
        assert last["cosine"][span] > first["cosine"][span] + 0.05
    # The loss is the sum of its terms. Span weights are 1; the weights of the terms are those of the stage.
    terms = [
        0.1 * last["lossBySpan"][span] + 2 * 4 * last["kl"][span] + 0.5 * (1 - last["cosine"][span])
        for span in last["kl"]
    ]
    assert last["loss"] == pytest.approx(sum(terms), rel=1e-5)


def test_a_teacher_with_another_vocabulary_is_rejected_before_the_first_step(
    jobs: LocalJobs, tmp_path: Path
) -> None:
    name = jobs.spec["teacher"]["model"]
    for path in tiny_teacher.write(tmp_path, vocab_size=1000, pad_token_id=0, eos_token_id=1).iterdir():
        jobs.bucket.put_file(f"models/other/{path.name}", path, {})
    jobs.spec["teacher"]["model"] = f"s3://{jobs.bucket.name}/models/other"
    file = jobs.run_file("other", gpus=1)
    jobs.spec["teacher"]["model"] = name
    termination = jobs.folder / "termination-other"
    process = jobs.start("train", file, "--step", "forced", VPMOE_TERMINATION_LOG=str(termination))
    _, log = process.communicate(timeout=400)
    message = json.loads(termination.read_bytes())
    assert process.returncode == 65 and message["class"] == "Permanent" and message["rank"] is None, log
    assert message["message"].startswith(
        "teacher.model: config.json says vocab_size 1000"
    ) and not logged_steps(jobs, file, "forced")


def test_students_and_teacher_stopped_while_they_wait_for_each_other_exit_as_terminated(
    jobs: LocalJobs,
) -> None:
    """The delay is random: some processes may not have started, the teacher may be loading, or all are
    training."""
    delay = random.Random(new_seed()).uniform(0.5, 8)
    process = jobs.start("train", jobs.run_file("early", gpus=2), "--step", "forced")
    time.sleep(delay)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=400)
    assert process.returncode in (143, -signal.SIGTERM), (
        f"after {delay} s: {log}"
    )  # −SIGTERM before the launcher has its handler


def test_checkpoints_name_the_teacher_and_the_next_stage_needs_neither_it_nor_a_projection(
    jobs: LocalJobs, uninterrupted: Path
) -> None:
    checkpoint = last_checkpoint(jobs, uninterrupted, "forced")
    assert checkpoint.inputs["teacher"].uri == f"s3://{jobs.bucket.name}/models/teacher"
    assert read_progress(jobs, uninterrupted, "after").state == "Succeeded"
    assert "kl" not in metrics_lines(jobs, uninterrupted, "step", "after")[0]
    sizes = [
        sum(file.size for file in last_checkpoint(jobs, uninterrupted, step).subjects.values())
        for step in ("forced", "after")
    ]
    assert sizes[0] - sizes[1] == pytest.approx(3 * 4 * WIDTH * SHAPES["tiny"].hidden, abs=2000), (
        "the projection and its moments"
    )


def test_a_killed_or_stopped_process_does_not_change_the_bits(jobs: LocalJobs, uninterrupted: Path) -> None:
    file = jobs.run_file("killed", gpus=2)
    steps = len(logged_steps(jobs, uninterrupted, "forced"))
    ends = {
        "teacher": (75, "Retriable", "teacher 0 was killed by SIGKILL"),
        "launcher": (143, "Terminated", "Stopped after step"),
        "student": (75, "Retriable", "rank 1 was killed by SIGKILL"),
    }
    for attempt, (target, (code, kind, expected_start)) in enumerate(ends.items(), start=1):
        saved = read_progress(jobs, file, "forced").checkpoint if attempt > 1 else None
        first = saved.iteration + 1 if saved else 1
        # Leave enough steps for the later attempts, and for stopping.
        last_step = max(first, steps * attempt // 4)
        code_found, message = stop_one(jobs, file, target, range(first, last_step + 1), steps, attempt)
        assert (code_found, message["class"]) == (code, kind) and message["message"].startswith(
            expected_start
        )
    jobs.finish("train", file, "--step", "forced", "--attempt", "4")
    assert checkpoint_digests(jobs, file, "forced") == checkpoint_digests(jobs, uninterrupted, "forced")
    assert logged_steps(jobs, file, "forced") == logged_steps(jobs, uninterrupted, "forced")
