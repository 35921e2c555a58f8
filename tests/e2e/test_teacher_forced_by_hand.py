"""A TeacherForced stage as jobs do it, by hand on this machine: two students and their teacher, whichever of them is killed."""

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
from tests.fakes.local_jobs import Hand, end, last, lines, logged, prepared, progress, stop_after
from tests.fakes.store import S3
from tests.fakes.students import new_seed
from vpmoe.model.shapes import SHAPES
from vpmoe.process.launcher import free_port

WIDTH = 96
"""Of the teacher's hidden states: not the student's, so there is a projection."""
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
def hand(
    s3: S3, sample_parquet: list[Path], real_parquet: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Hand]:
    """A bucket with a data set and a teacher."""
    folder = tmp_path_factory.mktemp("forced")
    with prepared(s3, [*sample_parquet, *real_parquet], folder, STAGES) as it:
        for path in tiny_teacher.write(folder / "teacher", hidden_size=WIDTH).iterdir():
            it.bucket.put_file(f"models/teacher/{path.name}", path, {})
        yield it


@pytest.fixture(scope="module")
def left_alone(hand: Hand) -> Path:
    """Two students and their teacher, never disturbed, and the stage after."""
    file = hand.run_file("alone", gpus=2)
    hand.finish("train", file)
    hand.finish("train", file)
    return file


def processes(launcher: int) -> tuple[list[psutil.Process], psutil.Process]:
    """The students' and the teacher's."""
    found = psutil.Process(launcher).children()
    (teacher,) = [one for one in found if one.environ().get("VPMOE_PART") == "teacher"]
    return sorted((one for one in found if one != teacher), key=lambda one: one.environ()["RANK"]), teacher


def stop_one(
    hand: Hand, file: Path, who: str, within: range, steps: int, attempt: int
) -> tuple[int, dict[str, Any]]:
    """Train until the teacher or a student is killed -9, or the launcher told to stop, at a random moment after a random step of `within`.

    Returns the launcher's exit code and its last word.
    """
    seed = secrets.randbelow(1 << 32)
    print(f"{who}: seed {seed}")
    chosen = random.Random(seed)
    step, delay = chosen.choice(within), chosen.uniform(0, 0.5)
    termination = hand.folder / f"termination-{who}"
    process = hand.start(
        "train", file, "--step", "forced", "--attempt", str(attempt), VPMOE_TERMINATION_LOG=str(termination)
    )

    def stop() -> None:
        students, teacher = processes(process.pid)
        time.sleep(delay)
        if who == "launcher":
            process.send_signal(signal.SIGTERM)
        else:
            (teacher if who == "teacher" else students[1]).kill()

    print(stop_after(process, rf"step {step} of {steps}:", stop))
    return process.returncode, json.loads(termination.read_bytes())


def test_two_pods_of_which_the_first_has_the_teacher_end_at_the_same_bits(
    hand: Hand, left_alone: Path
) -> None:
    file = hand.run_file("pods", gpus=2, gpusPerPod=1)
    port = str(free_port())
    pods = [
        hand.start(
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
    assert end(hand, file, "forced") == end(hand, left_alone, "forced")


def test_the_student_comes_nearer_to_its_teacher(hand: Hand, left_alone: Path) -> None:
    steps = lines(hand, left_alone, "step", "forced")
    first, newest = steps[0], steps[-1]
    assert progress(hand, left_alone, "forced").state == "Succeeded" and newest["loss"] < first["loss"] - 0.3
    for span in ("reasoning", "final"):
        assert (
            newest["kl"][span] < first["kl"][span] - 0.005
        )  # of 0.27: a random teacher's tokens are nearly equally likely
        assert newest["cosine"][span] > first["cosine"][span] + 0.05
    # the loss is what it says: the spans' weights are 1, the terms' those of the stage
    terms = [
        0.1 * newest["lossBySpan"][span] + 2 * 4 * newest["kl"][span] + 0.5 * (1 - newest["cosine"][span])
        for span in newest["kl"]
    ]
    assert newest["loss"] == pytest.approx(sum(terms), rel=1e-5)


def test_a_teacher_of_another_vocabulary_ends_the_stage_before_its_first_step(
    hand: Hand, tmp_path: Path
) -> None:
    name = hand.spec["teacher"]["model"]
    for path in tiny_teacher.write(tmp_path, vocab_size=1000, pad_token_id=0, eos_token_id=1).iterdir():
        hand.bucket.put_file(f"models/other/{path.name}", path, {})
    hand.spec["teacher"]["model"] = f"s3://{hand.bucket.name}/models/other"
    file = hand.run_file("other", gpus=1)
    hand.spec["teacher"]["model"] = name
    termination = hand.folder / "termination-other"
    process = hand.start("train", file, "--step", "forced", VPMOE_TERMINATION_LOG=str(termination))
    _, log = process.communicate(timeout=200)
    said = json.loads(termination.read_bytes())
    assert process.returncode == 65 and said["class"] == "Permanent" and said["rank"] is None, log
    assert said["message"].startswith("teacher.model: config.json says vocab_size 1000") and not logged(
        hand, file, "forced"
    )


def test_students_and_teacher_that_are_stopped_while_they_wait_for_each_other_say_so(hand: Hand) -> None:
    """Wherever they are: some not started, the teacher loading, or all at work."""
    delay = random.Random(new_seed()).uniform(0.5, 8)
    process = hand.start("train", hand.run_file("early", gpus=2), "--step", "forced")
    time.sleep(delay)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=200)
    assert process.returncode in (143, -signal.SIGTERM), (
        f"after {delay} s: {log}"
    )  # the signal itself, before the launcher listens


def test_checkpoints_name_the_teacher_and_the_stage_after_needs_neither(hand: Hand, left_alone: Path) -> None:
    made = last(hand, left_alone, "forced")
    assert made.inputs["teacher"].uri == f"s3://{hand.bucket.name}/models/teacher"
    assert progress(hand, left_alone, "after").state == "Succeeded"
    assert "kl" not in lines(hand, left_alone, "step", "after")[0]
    sizes = [
        sum(file.size for file in last(hand, left_alone, step).subjects.values())
        for step in ("forced", "after")
    ]
    assert sizes[0] - sizes[1] == pytest.approx(3 * 4 * WIDTH * SHAPES["tiny"].hidden, abs=2000), (
        "a projection and its moments"
    )


def test_whoever_is_killed_or_stopped_the_run_ends_at_the_same_bits(hand: Hand, left_alone: Path) -> None:
    file = hand.run_file("killed", gpus=2)
    steps = len(logged(hand, left_alone, "forced"))
    ends = {
        "teacher": (75, "Retriable", "the teacher was killed by SIGKILL"),
        "launcher": (143, "Terminated", "Stopped after step"),
        "student": (75, "Retriable", "rank 1 was killed by SIGKILL"),
    }
    for attempt, (who, (code, kind, words)) in enumerate(ends.items(), start=1):
        saved = progress(hand, file, "forced").checkpoint if attempt > 1 else None
        first = saved.iteration + 1 if saved else 1
        last = max(
            first, steps * attempt // 4
        )  # so that enough steps are left for those who come after, and for one that is told to stop
        found, said = stop_one(hand, file, who, range(first, last + 1), steps, attempt)
        assert (found, said["class"]) == (code, kind) and said["message"].startswith(words)
    hand.finish("train", file, "--step", "forced", "--attempt", "4")
    assert end(hand, file, "forced") == end(hand, left_alone, "forced")
    assert logged(hand, file, "forced") == logged(hand, left_alone, "forced")
