"""A TeacherForced stage with real jobs and no cluster: two students and their teacher, each killed once."""

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
"""Of the teacher's hidden states. The student's differ, so there is a projection."""
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
    with prepared_bucket(s3, [*sample_parquet, *real_parquet], folder, STAGES) as it:
        for path in tiny_teacher.write(folder / "teacher", hidden_size=WIDTH).iterdir():
            it.bucket.put_file(f"models/teacher/{path.name}", path, {})
        yield it


@pytest.fixture(scope="module")
def left_alone(jobs: LocalJobs) -> Path:
    """Two students and their teacher, not interrupted, and the next stage."""
    file = jobs.run_file("alone", gpus=2)
    jobs.finish("train", file)
    jobs.finish("train", file)
    return file


def processes(launcher: int) -> tuple[list[psutil.Process], psutil.Process]:
    """The students' processes by rank, and the teacher's."""
    found = psutil.Process(launcher).children()
    (teacher,) = [one for one in found if one.environ().get("VPMOE_PART") == "teacher"]
    return sorted((one for one in found if one != teacher), key=lambda one: one.environ()["RANK"]), teacher


def stop_one(
    jobs: LocalJobs, file: Path, who: str, within: range, steps: int, attempt: int
) -> tuple[int, dict[str, Any]]:
    """Train, and at a random moment after a random step of `within` kill -9 the teacher or a student, or stop
    the launcher (`who`).

    Returns the launcher's exit code and its termination message.
    """
    seed = secrets.randbelow(1 << 32)
    print(f"{who}: seed {seed}")
    chosen = random.Random(seed)
    step, delay = chosen.choice(within), chosen.uniform(0, 0.5)
    termination = jobs.folder / f"termination-{who}"
    process = jobs.start(
        "train", file, "--step", "forced", "--attempt", str(attempt), VPMOE_TERMINATION_LOG=str(termination)
    )

    def stop() -> None:
        students, teacher = processes(process.pid)
        time.sleep(delay)
        if who == "launcher":
            process.send_signal(signal.SIGTERM)
        else:
            (teacher if who == "teacher" else students[1]).kill()

    print(run_until(process, rf"step {step} of {steps}:", stop))
    return process.returncode, json.loads(termination.read_bytes())


def test_two_pods_of_which_the_first_has_the_teacher_end_at_the_same_bits(
    jobs: LocalJobs, left_alone: Path
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
    logs = [pod.communicate(timeout=200)[1] for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], logs
    assert checkpoint_digests(jobs, file, "forced") == checkpoint_digests(jobs, left_alone, "forced")


def test_the_student_comes_nearer_to_its_teacher(jobs: LocalJobs, left_alone: Path) -> None:
    steps = metrics_lines(jobs, left_alone, "step", "forced")
    first, newest = steps[0], steps[-1]
    assert (
        read_progress(jobs, left_alone, "forced").state == "Succeeded"
        and newest["loss"] < first["loss"] - 0.3
    )
    for span in ("reasoning", "final"):
        assert (
            newest["kl"][span] < first["kl"][span] - 0.005
        )  # of 0.27: a random teacher's tokens are almost equally likely
        assert newest["cosine"][span] > first["cosine"][span] + 0.05
    # The loss is the sum of its terms: span weights are 1, term weights those of the stage.
    terms = [
        0.1 * newest["lossBySpan"][span] + 2 * 4 * newest["kl"][span] + 0.5 * (1 - newest["cosine"][span])
        for span in newest["kl"]
    ]
    assert newest["loss"] == pytest.approx(sum(terms), rel=1e-5)


def test_a_teacher_of_another_vocabulary_ends_the_stage_before_its_first_step(
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
    _, log = process.communicate(timeout=200)
    said = json.loads(termination.read_bytes())
    assert process.returncode == 65 and said["class"] == "Permanent" and said["rank"] is None, log
    assert said["message"].startswith("teacher.model: config.json says vocab_size 1000") and not logged_steps(
        jobs, file, "forced"
    )


def test_students_and_teacher_that_are_stopped_while_they_wait_for_each_other_say_so(jobs: LocalJobs) -> None:
    """At any moment: some not started, the teacher loading, or all at work."""
    delay = random.Random(new_seed()).uniform(0.5, 8)
    process = jobs.start("train", jobs.run_file("early", gpus=2), "--step", "forced")
    time.sleep(delay)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=200)
    assert process.returncode in (143, -signal.SIGTERM), (
        f"after {delay} s: {log}"
    )  # the signal itself, before the launcher listens


def test_checkpoints_name_the_teacher_and_the_stage_after_needs_neither(
    jobs: LocalJobs, left_alone: Path
) -> None:
    made = last_checkpoint(jobs, left_alone, "forced")
    assert made.inputs["teacher"].uri == f"s3://{jobs.bucket.name}/models/teacher"
    assert read_progress(jobs, left_alone, "after").state == "Succeeded"
    assert "kl" not in metrics_lines(jobs, left_alone, "step", "after")[0]
    sizes = [
        sum(file.size for file in last_checkpoint(jobs, left_alone, step).subjects.values())
        for step in ("forced", "after")
    ]
    assert sizes[0] - sizes[1] == pytest.approx(3 * 4 * WIDTH * SHAPES["tiny"].hidden, abs=2000), (
        "a projection and its moments"
    )


def test_a_killed_or_stopped_process_does_not_change_the_bits_of_the_result(
    jobs: LocalJobs, left_alone: Path
) -> None:
    file = jobs.run_file("killed", gpus=2)
    steps = len(logged_steps(jobs, left_alone, "forced"))
    ends = {
        "teacher": (75, "Retriable", "the teacher was killed by SIGKILL"),
        "launcher": (143, "Terminated", "Stopped after step"),
        "student": (75, "Retriable", "rank 1 was killed by SIGKILL"),
    }
    for attempt, (who, (code, kind, words)) in enumerate(ends.items(), start=1):
        saved = read_progress(jobs, file, "forced").checkpoint if attempt > 1 else None
        first = saved.iteration + 1 if saved else 1
        # Leave enough steps to the later attempts, and to one that is asked to stop.
        last_step = max(first, steps * attempt // 4)
        found, said = stop_one(jobs, file, who, range(first, last_step + 1), steps, attempt)
        assert (found, said["class"]) == (code, kind) and said["message"].startswith(words)
    jobs.finish("train", file, "--step", "forced", "--attempt", "4")
    assert checkpoint_digests(jobs, file, "forced") == checkpoint_digests(jobs, left_alone, "forced")
    assert logged_steps(jobs, file, "forced") == logged_steps(jobs, left_alone, "forced")
