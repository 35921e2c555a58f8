"""Teacher of an OnPolicy stage on a real S3 store with real vLLM: each window is scored once, with the values
of transformers."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from tests.fakes.reference_scores import TOLERANCE, expected
from tests.fakes.store import S3
from tests.fakes.students import new_seed
from tests.fakes.teacher_steps import UniformTeacher, provenance, score_windows_here
from tests.fakes.tiny_teacher import Remote
from tests.fakes.waiting import wait_until
from vpmoe.api import DistillRun
from vpmoe.data.vocabulary import VOCABULARY_SIZE
from vpmoe.failure import Permanent, Terminated
from vpmoe.rollout.part_files import (
    PartHeader,
    PartScoresHeader,
    RolloutKey,
    part_bytes,
    part_scores_bytes,
    read_part,
    read_part_scores,
)
from vpmoe.rollout.window_files import (
    Rollout,
    RolloutHeader,
    ScoresHeader,
    WindowRollouts,
    read_rollouts,
    read_scores,
    rollouts_bytes,
    scores_bytes,
)
from vpmoe.storage import Bucket, StorageError, paths
from vpmoe.teacher import model, score_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROOT = Path(__file__).parents[3]
SCRATCH: Path


@pytest.fixture(scope="module", autouse=True)
def scratch(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Set SCRATCH: the folder of the downloaded teacher, shared by the tests of this module."""
    global SCRATCH
    SCRATCH = tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def reference(teacher: Path) -> "PreTrainedModel":
    """The checkpoint in transformers, eager and in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        teacher, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(autouse=True)
def poll_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_windows, "POLL_SECONDS", 0.02)


@pytest.fixture
def spec(run_spec: dict[str, Any], stored_teacher: str) -> dict[str, Any]:
    """A run with an OnPolicy stage."""
    run_spec["spec"]["teacher"]["model"] = stored_teacher
    run_spec["spec"]["student"]["gpus"] = 2
    run_spec["spec"]["stages"].append(
        {"name": "onpolicy", "kind": "OnPolicy", "tokens": 4096, "require": {"validity": 0}}
    )
    run_spec["spec"]["stages"][1]["optimizer"] = {"minLearningRate": 1.0e-6}
    return run_spec


def score_windows_of(
    spec: dict[str, Any],
    scorer: Remote | UniformTeacher | None,
    worker: int | None = None,
    stopping: threading.Event | None = None,
    attempt: int = 1,
) -> int:
    return score_windows_here(spec, scorer, SCRATCH, worker, stopping, attempt)


def rollout_header(spec: dict[str, Any], window: int, last: bool = False) -> RolloutHeader:
    run = DistillRun.parse(spec)
    return RolloutHeader(
        run=provenance(run, "onpolicy-teacher").run,
        config=run.config_hash,
        stage="onpolicy",
        window=window,
        version=0,
        weights="w" * 64,
        phase=0,
        seen=0,
        tokens=1,
        last=last,
        turns=0,
    )


def random_rollouts(random: np.random.Generator, count: int = 3, longest: int = 150) -> list[Rollout]:
    """Prompts and completions of random ids, one of them of length `longest`."""
    rollouts = []
    for prompt in range(count):
        prompt_length, completion_length = (int(length) for length in random.integers(1, 60, 2))
        if prompt == 1:
            completion_length = longest - prompt_length
        ids_T = random.integers(0, VOCABULARY_SIZE, prompt_length + completion_length, np.int32)
        logp_C = np.full(completion_length, -1, np.float32)
        rollouts.append(
            Rollout(prompt, 0, 7, "low", "valid", ids_T, np.full(completion_length, 1, np.uint8), logp_C)
        )
    return rollouts


def key(spec: dict[str, Any], window: int, kind: str) -> str:
    return paths.window(DistillRun.parse(spec), "onpolicy", window, kind)  # type: ignore[arg-type]


def write_rollouts(
    spec: dict[str, Any],
    bucket: Bucket,
    window: int,
    random: np.random.Generator,
    last: bool = False,
    longest: int = 150,
) -> WindowRollouts:
    """Write a window's rollouts as the sampler does."""
    data = rollouts_bytes(rollout_header(spec, window, last), random_rollouts(random, longest=longest))
    assert bucket.create(key(spec, window, "rollouts"), data, {})
    return read_rollouts(data, "here")


def read_window_scores(
    spec: dict[str, Any], bucket: Bucket, window_rollouts: WindowRollouts
) -> list[NDArray[np.float32]]:
    object_key = key(spec, window_rollouts.header.window, "scores")
    return read_scores(bucket.get(object_key), object_key, window_rollouts)


def score_objects(spec: dict[str, Any], bucket: Bucket, count: int) -> list[bytes]:
    return [bucket.get(key(spec, window, "scores")) for window in range(count)]


def delete_scores(spec: dict[str, Any], bucket: Bucket, count: int) -> None:
    """Delete all scores of windows."""
    for window in range(count):
        bucket.delete(key(spec, window, "scores"))


def progress(spec: dict[str, Any], bucket: Bucket, step: str = "onpolicy-teacher") -> dict[str, Any]:
    content: dict[str, Any] = bucket.get_json(paths.progress(DistillRun.parse(spec), step))
    return content


def finish_stage(spec: dict[str, Any], bucket: Bucket) -> None:
    """Report the stage as succeeded, as the trainer does at its end."""
    bucket.write_json(paths.progress(DistillRun.parse(spec), "onpolicy"), {"state": "Succeeded"})


def metrics_lines(spec: dict[str, Any], bucket: Bucket) -> list[dict[str, Any]]:
    folder = paths.metrics(DistillRun.parse(spec), "onpolicy-teacher", "").removesuffix(".jsonl")
    return [bucket.get_json(found.key) for found in bucket.list(folder)]


@contextmanager
def running_in_thread(*arguments: Any, **more: Any) -> Iterator[list[object]]:
    """Run the teacher in a thread. After the block, the yielded list holds its result or its error."""
    outcomes: list[object] = []

    def work() -> None:
        try:
            outcomes.append(score_windows_of(*arguments, **more))
        except (Permanent, Terminated) as error:
            outcomes.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield outcomes
    finally:
        thread.join(timeout=120)
        assert not thread.is_alive()


def test_every_sampled_token_has_the_log_probability_of_transformers(
    spec: dict[str, Any], bucket: Bucket, scorer: Remote, reference: "PreTrainedModel"
) -> None:
    random = np.random.default_rng(new_seed())
    written = [
        write_rollouts(spec, bucket, window, random, last=window == 1, longest=512) for window in range(2)
    ]
    assert score_windows_of(spec, scorer) == 2
    for one in written:
        for rollout, logp_C in zip(one.rollouts, read_window_scores(spec, bucket, one), strict=True):
            wanted_T = expected(reference, rollout.ids_T)
            assert np.abs(logp_C - wanted_T[rollout.prompt_length :]).max() <= TOLERANCE
    status = progress(spec, bucket)
    assert (status["state"], status["parts"]) == ("Succeeded", {"done": 2, "total": 2})
    lines = metrics_lines(spec, bucket)
    assert [(line["event"], line["window"], line["tokens"]) for line in lines] == [
        ("window", window, sum(len(rollout.ids_T) for rollout in one.rollouts))
        for window, one in enumerate(written)
    ]
    assert all(
        line["seconds"] > 0 and line["tokensPerSecond"] == line["tokens"] / line["seconds"] for line in lines
    )
    assert all(line["gpu"]["reason"] == "not measured" for line in lines), "the job gives it a meter"


def test_windows_are_scored_as_they_appear_and_waits_are_measured(
    spec: dict[str, Any], bucket: Bucket, scorer: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_windows, "REPORT_SECONDS", 0.0)
    random = np.random.default_rng(new_seed())
    waited = []
    with running_in_thread(spec, scorer) as outcomes:
        wait_until(
            lambda: bucket.exists(paths.progress(DistillRun.parse(spec), "onpolicy-teacher")),
            "the teacher has started",
        )
        for window in range(3):
            wait_until(
                lambda window=window: progress(spec, bucket)["message"] == f"Waiting for window {window}",
                "the teacher waits",
            )
            since = time.monotonic()
            write_rollouts(spec, bucket, window, random, last=window == 2)
            waited.append(time.monotonic() - since)
            wait_until(
                lambda window=window: bucket.exists(key(spec, window, "scores")), "the window is scored"
            )
    assert outcomes == [3]
    assert all(
        line["waitRollouts"] >= least for line, least in zip(metrics_lines(spec, bucket), waited, strict=True)
    )


def test_two_workers_alternate_and_write_the_same_scores_as_one(
    spec: dict[str, Any], bucket: Bucket, scorer: Remote
) -> None:
    random = np.random.default_rng(new_seed())
    written = [write_rollouts(spec, bucket, window, random, last=window == 4) for window in range(5)]
    score_windows_of(spec, scorer)
    by_one_worker = score_objects(spec, bucket, 5)
    spec["spec"]["teacher"]["gpus"] = 2
    spec["metadata"]["name"] = "two"
    for one in written:
        bucket.create(
            key(spec, one.header.window, "rollouts"),
            rollouts_bytes(header_for_run(spec, one), one.rollouts),
            {},
        )
    assert score_windows_of(spec, scorer, worker=0) == 3
    assert progress(spec, bucket)["state"] == "Running" and progress(spec, bucket)["parts"] == {
        "done": 3,
        "total": 5,
    }
    assert [window for window in range(5) if bucket.exists(key(spec, window, "scores"))] == [0, 2, 4]
    assert score_windows_of(spec, scorer, worker=1) == 2
    assert progress(spec, bucket)["state"] == "Succeeded" and progress(spec, bucket)["parts"] == {
        "done": 5,
        "total": 5,
    }
    for one, other in zip(score_objects(spec, bucket, 5), by_one_worker, strict=True):
        assert logp_bytes(one) == logp_bytes(other), "only the headers, which name the run, differ"
    assert score_windows_of(spec, None, worker=0) == score_windows_of(spec, None, worker=1) == 0, (
        "no teacher is loaded if nothing is left to score"
    )


def header_for_run(spec: dict[str, Any], written: WindowRollouts) -> RolloutHeader:
    header = rollout_header(spec, written.header.window, written.header.last)
    return written.header.model_copy(update={"run": header.run, "config": header.config})


def logp_bytes(data: bytes) -> list[bytes]:
    import pyarrow as pa

    return [
        row.values.to_numpy().tobytes() for row in pa.ipc.open_file(pa.BufferReader(data)).read_all()["logp"]
    ]


@pytest.mark.parametrize("worker", [0, 1])
@pytest.mark.parametrize("windows", [1, 2, 3, 4])
def test_a_worker_ends_whether_or_not_the_last_window_is_its_own(
    spec: dict[str, Any], bucket: Bucket, scorer: Remote, worker: int, windows: int
) -> None:
    spec["spec"]["teacher"]["gpus"] = 3
    random = np.random.default_rng(new_seed())
    for window in range(windows):
        write_rollouts(spec, bucket, window, random, last=window == windows - 1)
    expected_count = len(range(worker, windows, 3))
    assert score_windows_of(spec, scorer if expected_count else None, worker=worker) == expected_count


def test_a_stage_that_ended_early_needs_no_more_scores(
    spec: dict[str, Any], bucket: Bucket, scorer: Remote
) -> None:
    random = np.random.default_rng(new_seed())
    write_rollouts(spec, bucket, 0, random)
    with running_in_thread(spec, scorer) as outcomes:
        wait_until(lambda: bucket.exists(key(spec, 0, "scores")), "the window is scored")
        finish_stage(spec, bucket)
    assert outcomes == [1] and progress(spec, bucket)["state"] == "Succeeded"
    write_rollouts(spec, bucket, 1, random)
    assert score_windows_of(spec, None) == 0


SCORE_PROCESS = """
import pathlib, sys, yaml
from tests.fakes.tiny_teacher import Remote
from tests.fakes.teacher_steps import score_windows_here
from vpmoe.teacher import score_windows
score_windows.POLL_SECONDS = 0.02
score_windows_here(
    yaml.safe_load(open(sys.argv[1])), Remote(sys.argv[2], 640), pathlib.Path(sys.argv[3]),
    attempt=int(sys.argv[4]),
)
"""


def test_a_killed_teacher_resumes_at_the_first_window_without_scores_with_the_same_bytes(
    spec: dict[str, Any], bucket: Bucket, scorer: Remote, teacher_address: str, tmp_path: Path
) -> None:
    seed = new_seed()
    random, chance = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    for window in range(6):
        write_rollouts(spec, bucket, window, random, last=window == 5)
    score_windows_of(spec, scorer)
    uninterrupted = score_objects(spec, bucket, 6)
    delete_scores(spec, bucket, 6)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(spec))
    scorer.close()  # the teacher serves one client at a time
    etags: dict[int, str] = {}
    for attempt, finished in enumerate((0, 1, 3), 1):
        command = [
            sys.executable,
            "-c",
            SCORE_PROCESS,
            str(tmp_path / "run.yaml"),
            teacher_address,
            str(SCRATCH),
            str(attempt),
        ]
        process = subprocess.Popen(command, cwd=ROOT)
        try:
            wait_until(
                lambda n=finished: bucket.exists(key(spec, n, "scores")),
                "a window is scored",
                120,
                every=0.01,
            )
            time.sleep(chance.uniform(0, 0.3))
        finally:
            process.kill()
            process.wait()
        for window, etag in etags.items():
            assert bucket.head(key(spec, window, "scores")).etag == etag, (
                "existing scores are not written again"
            )
        etags = {
            window: bucket.head(object_key).etag
            for window in range(6)
            if bucket.exists(object_key := key(spec, window, "scores"))
        }
    with Remote(teacher_address, scorer.max_length) as remote:
        assert score_windows_of(spec, remote, attempt=4) == 6 - len(etags)
    assert score_objects(spec, bucket, 6) == uninterrupted
    assert [line["window"] for line in metrics_lines(spec, bucket)] == list(range(6)), (
        "each window has one line, whichever attempt scored it"
    )


def test_a_missing_window_is_scored_and_later_ones_are_unchanged(
    spec: dict[str, Any], bucket: Bucket, scorer: Remote
) -> None:
    random = np.random.default_rng(new_seed())
    written = [write_rollouts(spec, bucket, window, random, last=window == 3) for window in range(4)]
    score_windows_of(spec, scorer)
    before = score_objects(spec, bucket, 4)
    bucket.delete(key(spec, 1, "scores"))
    assert score_windows_of(spec, scorer) == 1 and score_objects(spec, bucket, 4) == before
    assert len(read_window_scores(spec, bucket, written[1])) == len(written[1].rollouts)


def test_the_first_writer_of_a_windows_scores_wins_and_the_other_continues(
    spec: dict[str, Any], bucket: Bucket, scorer: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt that was presumed dead writes between the last check and the PUT, with other rounding."""
    random = np.random.default_rng(new_seed())
    written = [write_rollouts(spec, bucket, window, random, last=window == 1) for window in range(2)]
    score_batches = scorer.score
    theirs = [np.full(len(one.logp_C), -2, np.float32) for one in written[0].rollouts]
    header = ScoresHeader(
        run=written[0].header.run, stage="onpolicy", window=0, rollouts=written[0].sha256, teacher="t" * 64
    )

    def score(*arguments: Any) -> Iterator[NDArray[np.float32]]:
        yield from score_batches(*arguments)
        bucket.create(key(spec, 0, "scores"), scores_bytes(header, theirs), {})

    monkeypatch.setattr(scorer, "score", score)
    assert score_windows_of(spec, scorer) == 2
    assert all(
        (one == other).all()
        for one, other in zip(read_window_scores(spec, bucket, written[0]), theirs, strict=True)
    )
    assert progress(spec, bucket)["state"] == "Succeeded"


def test_existing_scores_of_other_rollouts_are_rejected(
    spec: dict[str, Any], bucket: Bucket, scorer: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = write_rollouts(spec, bucket, 0, np.random.default_rng(new_seed()), last=True)
    score_batches = scorer.score
    header = ScoresHeader(
        run=written.header.run, stage="onpolicy", window=0, rollouts="0" * 64, teacher="t" * 64
    )

    def score(*arguments: Any) -> Iterator[NDArray[np.float32]]:
        yield from score_batches(*arguments)
        bucket.create(
            key(spec, 0, "scores"), scores_bytes(header, [one.logp_C for one in written.rollouts]), {}
        )

    monkeypatch.setattr(scorer, "score", score)
    with pytest.raises(
        Permanent,
        match=r"s3://.*window-000000\.scores\.arrow: it has the scores of other rollouts .* delete it",
    ):
        score_windows_of(spec, scorer)


def with_first_changed(rollouts: Sequence[Rollout], **changes: Any) -> list[Rollout]:
    return [replace(rollouts[0], **changes), *rollouts[1:]]


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param(
            lambda a, r: (a.model_copy(update={"run": "default/other-01234567"}), r),
            "run is default/other-01234567",
            id="run",
        ),
        pytest.param(
            lambda a, r: (a.model_copy(update={"config": "c" * 64}), r),
            "config is c{64} there and",
            id="config",
        ),
        pytest.param(
            lambda a, r: (a.model_copy(update={"stage": "other"}), r),
            "stage is other there and onpolicy here",
            id="stage",
        ),
        pytest.param(
            lambda a, r: (a.model_copy(update={"window": 3}), r), "window is 3 there and 0 here", id="window"
        ),
        pytest.param(
            lambda a, r: (a, with_first_changed(r, ids_T=np.zeros(513, np.int32))),
            r"rollout 0 of prompt 0 has 513 tokens, .* is 512",
            id="long",
        ),
        pytest.param(
            lambda a, r: (a, with_first_changed(r, ids_T=np.append(r[0].ids_T, np.int32(201_088)))),
            "rollout 0 of prompt 0 has ids from .* to 201088",
            id="vocabulary",
        ),
    ],
)
def test_invalid_rollouts_are_rejected_with_their_object_name(
    spec: dict[str, Any], bucket: Bucket, scorer: Remote, change: Any, message: str
) -> None:
    header, rollouts = change(
        rollout_header(spec, 0, True), random_rollouts(np.random.default_rng(new_seed()))
    )
    bucket.create(key(spec, 0, "rollouts"), rollouts_bytes(header, rollouts), {})
    sequences_before = scorer.sequences
    with pytest.raises(Permanent, match=rf"s3://.*/window-000000\.rollouts\.arrow: {message}.* delete it"):
        score_windows_of(spec, scorer)
    assert scorer.sequences == sequences_before and not bucket.exists(key(spec, 0, "scores"))


def test_truncated_rollouts_are_rejected_with_their_object_name(
    spec: dict[str, Any], bucket: Bucket, scorer: Remote, s3: S3
) -> None:
    data = rollouts_bytes(rollout_header(spec, 0, True), random_rollouts(np.random.default_rng(new_seed())))
    bucket.create(key(spec, 0, "rollouts"), data[: len(data) // 2], {})
    with pytest.raises(Permanent, match=r"s3://.*/window-000000\.rollouts\.arrow: .* delete it"):
        score_windows_of(spec, scorer)
    bucket.delete(key(spec, 0, "rollouts"))
    bucket.create(key(spec, 0, "rollouts"), data, {})
    path = s3.folder / bucket.name / key(spec, 0, "rollouts")
    path.write_bytes(data[:-1])  # directly in the store's file
    with pytest.raises(
        StorageError, match=r"s3://.*/window-000000\.rollouts\.arrow: sha256 is .* delete it"
    ) as caught:
        score_windows_of(spec, scorer)
    assert not caught.value.retriable


def test_a_token_without_a_probability_is_rejected(
    spec: dict[str, Any], bucket: Bucket, scorer: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that overflow. The score is injected: no small real model overflows at one position of one
    rollout."""
    write_rollouts(spec, bucket, 0, np.random.default_rng(new_seed()), last=True)
    score_batches = scorer.score
    monkeypatch.setattr(
        scorer,
        "score",
        lambda *arguments: (
            np.where(np.arange(len(p)) == len(p) - 1, np.nan, p) for p in score_batches(*arguments)
        ),
    )
    with pytest.raises(
        Permanent,
        match=r"teacher.model: rollout 0 of prompt 0 of window 0: the teacher gave 1 of its tokens no prob",
    ):
        score_windows_of(spec, scorer)
    assert not bucket.exists(key(spec, 0, "scores"))


def test_a_teacher_whose_scores_are_uniform_is_rejected(spec: dict[str, Any], bucket: Bucket) -> None:
    """As without an output matrix. The window gets no scores."""
    write_rollouts(spec, bucket, 0, np.random.default_rng(new_seed()), last=True)
    with pytest.raises(Permanent, match=r"^teacher.model: window 0: all \d+ tokens .* is uniform"):
        score_windows_of(spec, UniformTeacher())
    assert not bucket.exists(key(spec, 0, "scores"))


def test_a_waiting_teacher_stops_at_once(
    spec: dict[str, Any], bucket: Bucket, scorer: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_windows, "POLL_SECONDS", 3600.0)
    stopping = threading.Event()
    with running_in_thread(spec, scorer, stopping=stopping) as outcomes:
        wait_until(
            lambda: bucket.exists(paths.progress(DistillRun.parse(spec), "onpolicy-teacher")),
            "the teacher has started",
        )
        time.sleep(0.2)
        stopping.set()
    (error,) = outcomes
    assert isinstance(error, Terminated) and "onpolicy-teacher was asked to stop" in str(error)


def test_a_scoring_teacher_stops_before_the_next_batch_and_writes_nothing(
    spec: dict[str, Any], bucket: Bucket, scorer: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.fakes.tiny_teacher.BATCH_TOKENS", 10)
    write_rollouts(spec, bucket, 0, np.random.default_rng(new_seed()), last=True)
    stopping = threading.Event()
    score_batches = scorer.score

    def score(*arguments: Any) -> Iterator[NDArray[np.float32]]:
        for logp_T in score_batches(*arguments):
            stopping.set()
            yield logp_T

    monkeypatch.setattr(scorer, "score", score)
    before = scorer.sequences
    with pytest.raises(Terminated):
        score_windows_of(spec, scorer, stopping=stopping)
    assert scorer.sequences == before + 1 and not bucket.exists(key(spec, 0, "scores"))


def test_a_stage_whose_requirement_is_not_met_is_not_scored(spec: dict[str, Any]) -> None:
    spec["spec"]["stages"][1]["require"] = {"validity": 0.9}
    spec["spec"]["evaluation"]["completions"] = 8
    with pytest.raises(
        Permanent,
        match=r"stage onpolicy: require\.validity is 0\.9, and s3://.* has no validity after stage vanilla",
    ):
        score_windows_of(spec, None)


def test_a_teacher_changed_after_the_run_began_is_rejected(
    spec: dict[str, Any], bucket: Bucket, scorer: Remote, teacher: Path, tmp_path: Path
) -> None:
    """The resolved teacher is used by all steps of the run."""
    spec["spec"]["teacher"]["model"] = bucket.url("models/teacher")
    for path in teacher.iterdir():
        bucket.put_file(f"models/teacher/{path.name}", path, {})
    write_rollouts(spec, bucket, 0, np.random.default_rng(new_seed()), last=True)
    run = DistillRun.parse(spec)
    model.resolve_teacher(run, bucket)
    bucket.put_bytes("models/teacher/config.json", b"{}", {})
    global SCRATCH
    SCRATCH = tmp_path
    with pytest.raises(StorageError, match=r"config\.json: .* was changed since"):
        score_windows_of(spec, scorer)


def test_the_job_stops_on_sigterm_and_resumes_when_restarted(
    spec: dict[str, Any],
    bucket: Bucket,
    scorer: Remote,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The first and the last attempt run as in a pod: with their own vLLM, or without one if nothing is left
    to score. The attempt in between uses the shared teacher."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(spec))
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "TMPDIR": str(tmp_path),
        "JOB_COMPLETION_INDEX": "0",
    }

    def start() -> "subprocess.Popen[str]":
        command = [
            sys.executable,
            "-m",
            "jobs.teacher",
            "--run",
            str(tmp_path / "run.yaml"),
            "--step",
            "onpolicy-teacher",
        ]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    random = np.random.default_rng(new_seed())
    write_rollouts(spec, bucket, 0, random)
    process = start()
    wait_until(
        lambda: bucket.exists(key(spec, 0, "scores")) or process.poll() is not None,
        "the window is scored",
        240,
    )
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 143, output
    write_rollouts(spec, bucket, 1, random, last=True)
    caplog.set_level("INFO")
    assert score_windows_of(spec, scorer, worker=0) == 1
    assert "Scored window 1: 3 rollouts" in caplog.text and "Scored window 0:" not in caplog.text
    process = start()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "Loading the teacher" not in output, output


def part_key(spec: dict[str, Any], number: int) -> str:
    return paths.part(DistillRun.parse(spec), "onpolicy", 0, number)


def part_scores_key(spec: dict[str, Any], number: int, worker: int = 0) -> str:
    return paths.part_scores(DistillRun.parse(spec), "onpolicy", 0, number, worker)


def write_part(
    spec: dict[str, Any], bucket: Bucket, number: int, rollouts: dict[RolloutKey, Rollout], **changes: Any
) -> None:
    """Write a part of version 0 as the sampler does. `changes`: of its header."""
    header = rollout_header(spec, 0)
    part = PartHeader(
        run=header.run, config=header.config, stage="onpolicy", version=0, weights=header.weights, part=number
    )
    assert bucket.create(part_key(spec, number), part_bytes(part.model_copy(update=changes), rollouts), {})


def windows_of_version_0(random: np.random.Generator, count: int = 2) -> dict[RolloutKey, Rollout]:
    """The rollouts of the first windows, three of each."""
    return {
        RolloutKey(window, one.prompt, one.rollout): one
        for window in range(count)
        for one in random_rollouts(random)
    }


def write_windows(
    spec: dict[str, Any], bucket: Bucket, rollouts: dict[RolloutKey, Rollout]
) -> list[WindowRollouts]:
    """Write the windows that have these rollouts; the stage ends with the last."""
    numbers = sorted({key.window for key in rollouts})
    found = []
    for window in numbers:
        of_window = [one for key, one in rollouts.items() if key.window == window]
        data = rollouts_bytes(rollout_header(spec, window, window == numbers[-1]), of_window)
        assert bucket.create(key(spec, window, "rollouts"), data, {})
        found.append(read_rollouts(data, "here"))
    return found


def check_scores(
    spec: dict[str, Any], bucket: Bucket, reference: "PreTrainedModel", written: list[WindowRollouts]
) -> None:
    for one in written:
        for rollout, logp_C in zip(one.rollouts, read_window_scores(spec, bucket, one), strict=True):
            wanted_T = expected(reference, rollout.ids_T)
            assert np.abs(logp_C - wanted_T[rollout.prompt_length :]).max() <= TOLERANCE


def score_parts_only(
    spec: dict[str, Any], bucket: Bucket, scorer: Remote, parts: Sequence[int], worker: int = 0
) -> None:
    """Run the teacher until these parts have scores, then stop it, as if it was killed before a window was
    there."""
    stopping = threading.Event()
    with running_in_thread(spec, scorer, worker=worker, stopping=stopping) as outcomes:
        for number in parts:
            wait_until(
                lambda number=number: bucket.exists(part_scores_key(spec, number, worker)),
                "the part is scored",
                120,
            )
        stopping.set()
    assert isinstance(outcomes[0], Terminated)


def test_parts_are_scored_before_their_windows_are_there(
    spec: dict[str, Any], bucket: Bucket, scorer: Remote, reference: "PreTrainedModel"
) -> None:
    """The windows' scores come from there, also after a restart. Nothing is scored twice."""
    rollouts = windows_of_version_0(np.random.default_rng(new_seed()))
    keys = list(rollouts)
    before = scorer.sequences
    for number, some in enumerate((keys[3:5], [keys[0], keys[5]])):
        write_part(spec, bucket, number, {each: rollouts[each] for each in some})
    score_parts_only(spec, bucket, scorer, [0, 1])
    assert scorer.sequences == before + 4
    etags = [bucket.head(part_scores_key(spec, number)).etag for number in (0, 1)]
    with running_in_thread(spec, scorer) as outcomes:
        write_part(spec, bucket, 2, {keys[1]: rollouts[keys[1]]})
        wait_until(lambda: bucket.exists(part_scores_key(spec, 2)), "the next part is scored", 120)
        written = write_windows(spec, bucket, rollouts)  # with keys[2], which is in no part
    assert outcomes == [2] and scorer.sequences == before + len(rollouts)
    check_scores(spec, bucket, reference, written)
    assert [bucket.head(part_scores_key(spec, number)).etag for number in (0, 1)] == etags
    assert [line["early"] for line in metrics_lines(spec, bucket)] == [2, 3]


def test_a_teacher_killed_between_part_and_window_takes_the_scores_of_the_part(
    spec: dict[str, Any], bucket: Bucket, scorer: Remote, reference: "PreTrainedModel"
) -> None:
    rollouts = windows_of_version_0(np.random.default_rng(new_seed()), count=1)
    write_part(spec, bucket, 0, rollouts)
    score_parts_only(spec, bucket, scorer, [0])
    written, before = write_windows(spec, bucket, rollouts), scorer.sequences
    assert score_windows_of(spec, scorer) == 1 and scorer.sequences == before
    check_scores(spec, bucket, reference, written)
    (line,) = metrics_lines(spec, bucket)
    assert line["early"] == 3 and line["tokensPerSecond"] == 0 and line["seconds"] > 0


@pytest.mark.parametrize("fault", ["other part", "other teacher", "truncated"])
def test_scores_of_a_part_that_are_not_valid_are_made_again(
    spec: dict[str, Any],
    bucket: Bucket,
    scorer: Remote,
    reference: "PreTrainedModel",
    s3: S3,
    caplog: pytest.LogCaptureFixture,
    fault: str,
) -> None:
    rollouts = windows_of_version_0(np.random.default_rng(new_seed()), count=1)
    write_part(spec, bucket, 0, rollouts)
    score_parts_only(spec, bucket, scorer, [0])
    if fault == "truncated":
        file = s3.folder / bucket.name / part_scores_key(spec, 0)
        os.truncate(file, file.stat().st_size // 2)
    else:
        part = read_part(bucket, part_key(spec, 0), {})
        found = read_part_scores(
            bucket.get(part_scores_key(spec, 0)), "here", part, resolved_teacher(spec, bucket)
        )
        header = PartScoresHeader(
            run=part.header.run,
            stage="onpolicy",
            version=0,
            part=0,
            worker=0,
            rollouts="0" * 64 if fault == "other part" else part.sha256,
            teacher="0" * 64 if fault == "other teacher" else resolved_teacher(spec, bucket),
        )
        data = part_scores_bytes(header, {each: one - 1 for each, one in found.items()})
        bucket.put_bytes(part_scores_key(spec, 0), data, {})
    before = scorer.sequences
    with running_in_thread(spec, scorer) as outcomes:
        wait_until(lambda: scorer.sequences == before + 3, "the part is scored again", 120)
        written = write_windows(spec, bucket, rollouts)
    assert outcomes == [1] and scorer.sequences == before + 3
    check_scores(spec, bucket, reference, written)
    (warning,) = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert part_scores_key(spec, 0) in warning and "Scoring its rollouts again." in warning


def resolved_teacher(spec: dict[str, Any], bucket: Bucket) -> str:
    return model.resolve_teacher(DistillRun.parse(spec), bucket).sha256


def test_a_rollout_with_other_ids_than_in_its_part_is_scored_again(
    spec: dict[str, Any],
    bucket: Bucket,
    scorer: Remote,
    reference: "PreTrainedModel",
    caplog: pytest.LogCaptureFixture,
) -> None:
    rollouts = windows_of_version_0(np.random.default_rng(new_seed()), count=1)
    write_part(spec, bucket, 0, rollouts)
    score_parts_only(spec, bucket, scorer, [0])
    (first, one), *_ = rollouts.items()
    changed = replace(one, ids_T=(one.ids_T + 1) % VOCABULARY_SIZE)
    written, before = write_windows(spec, bucket, rollouts | {first: changed}), scorer.sequences
    assert score_windows_of(spec, scorer) == 1 and scorer.sequences == before + 1
    check_scores(spec, bucket, reference, written)
    assert "1 of its rollouts have other ids than in the parts of version 0" in caplog.text


def test_two_workers_score_their_own_windows_rollouts_of_a_part(
    spec: dict[str, Any], bucket: Bucket, scorer: Remote, reference: "PreTrainedModel"
) -> None:
    spec["spec"]["teacher"]["gpus"] = 2
    rollouts = windows_of_version_0(np.random.default_rng(new_seed()))
    write_part(spec, bucket, 0, rollouts)
    before = scorer.sequences
    for worker in (0, 1):
        score_parts_only(spec, bucket, scorer, [0], worker)
    assert scorer.sequences == before + len(rollouts)
    written = write_windows(spec, bucket, rollouts)
    assert [score_windows_of(spec, scorer, worker=worker) for worker in (0, 1)] == [1, 1]
    assert scorer.sequences == before + len(rollouts)
    check_scores(spec, bucket, reference, written)


@pytest.mark.parametrize("fault", ["truncated", "config", "ids"])
def test_an_invalid_part_is_rejected_with_its_object_name(
    spec: dict[str, Any], bucket: Bucket, scorer: Remote, s3: S3, fault: str
) -> None:
    rollouts = windows_of_version_0(np.random.default_rng(new_seed()), count=1)
    (first, one), *_ = rollouts.items()
    if fault == "ids":
        rollouts[first] = replace(one, ids_T=one.ids_T + VOCABULARY_SIZE)
    write_part(spec, bucket, 0, rollouts, **({"config": "0" * 64} if fault == "config" else {}))
    if fault == "truncated":
        file = s3.folder / bucket.name / part_key(spec, 0)
        os.truncate(file, file.stat().st_size // 2)
    with pytest.raises((Permanent, StorageError), match=rf"s3://.*/{part_key(spec, 0)}: .* delete it"):
        score_windows_of(spec, scorer)
    assert not bucket.exists(part_scores_key(spec, 0))
