"""What a stage says of itself: every step has one line whatever was killed, and a store that is away costs nothing but time."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fakes import datasets
from tests.fakes.fault_proxy import Fault, faulty
from tests.fakes.store import S3
from tests.fakes.waiting import wait_until
from vpmoe.api.progress import Amount, Progress, SpanLoss
from vpmoe.api.storage import StorageSpec
from vpmoe.clock import now
from vpmoe.storage import Bucket, Patience, paths
from vpmoe.trainer.checkpoint.resume import first
from vpmoe.trainer.context import StageContext
from vpmoe.trainer.reporting import metrics, uploader
from vpmoe.trainer.reporting.uploader import ProgressUploader


@pytest.fixture
def task(
    bucket: Bucket, run_spec: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> StageContext:
    monkeypatch.setattr(uploader, "PROGRESS_SECONDS", 0.05)
    return datasets.task(bucket, run_spec, tmp_path, datasets.write(bucket, [[]], [[]]))


def started(task: StageContext) -> ProgressUploader:
    return ProgressUploader(
        task,
        Progress(step="vanilla", attempt=1, state="Running", message="Starting", updated=now()),
    )


def line(event: str, step: int, **facts: Any) -> dict[str, Any]:
    return metrics.line(event, first("vanilla").model_copy(update={"steps": step}), 1, facts)


def written(task: StageContext) -> list[dict[str, Any]]:
    keys = [found.key for found in task.bucket.list(f"{paths.run(task.run)}/steps/vanilla/metrics/")]
    return [json.loads(text) for key in keys for text in task.bucket.get(key).decode().splitlines()]


def progress(task: StageContext) -> Progress:
    return Progress.model_validate(task.bucket.get_json(paths.progress(task.run, "vanilla")))


def test_each_step_has_one_line_however_often_training_was_killed(task: StageContext) -> None:
    """The first attempt is killed with lines unwritten, the second too, before it is where the first was; the third ends."""
    for begun, flushed, reached in ((0, 4, 6), (2, 3, 3), (4, 9, 9)):
        attempt = started(task)
        attempt.log(line("start", begun))
        for step in range(begun + 1, reached + 1):
            attempt.log(line("step", step), *([line("evaluation", step)] if step % 2 == 0 else []))
            if step == flushed:
                attempt.flush_metrics()
        attempt._stop()  # a kill: nothing more is written
    found = written(task)
    assert [each["step"] for each in found if each["event"] == "step"] == list(range(1, 10))
    assert [each["step"] for each in found if each["event"] == "evaluation"] == [2, 4, 6, 8]
    assert [each["step"] for each in found if each["event"] == "start"] == [0, 2, 4]


def test_progress_follows_the_loop_and_ends_with_its_last_word(task: StageContext) -> None:
    said = started(task)
    said.update(message="Training, step 1 of 2", tokens=Amount(done=5, total=10))
    wait_until(
        lambda: task.bucket.exists(paths.progress(task.run, "vanilla")) and progress(task).tokens is not None,
        "progress is written",
    )
    at = progress(task).updated
    said.log(line("step", 1))
    assert written(task) == []
    said.finish(state="Succeeded", message="Finished")
    assert progress(task).state == "Succeeded" and progress(task).updated > at and len(written(task)) == 1
    said.close()
    assert progress(task).message == "Finished"


def test_a_store_that_is_away_for_a_while_loses_no_word(
    task: StageContext, s3: S3, run_spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with faulty(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        patience = Patience(attempts=1, connect=1, read=5)
        away = StageContext(
            **{
                **vars(task),
                "bucket": Bucket.open(
                    StorageSpec.model_validate(run_spec["spec"]["storage"]), patience=patience
                ),
            }
        )
        said = started(away)
        proxy.faults = [Fault("503", "PUT", times=4)]
        said.log(line("step", 1))
        said.update(message="Training, step 1 of 2")
        wait_until(lambda: not proxy.faults[0].times, "four writes failed")
        said.check()
        said.finish(message="Finished")
    assert len(written(task)) == 1 and progress(task).message == "Finished"


def test_a_store_that_refuses_for_good_stops_training(
    task: StageContext, s3: S3, run_spec: dict[str, Any]
) -> None:
    said = started(task)
    (s3.folder / task.bucket.name).rename(s3.folder / f"{task.bucket.name}-gone")
    said.update(message="Training, step 1 of 2")
    wait_until(lambda: said._fault is not None, "the store refused")
    with pytest.raises(Exception, match="the bucket does not exist"):
        said.check()
    said.close()


def test_a_line_says_what_was_measured_and_null_where_nothing_was() -> None:
    assert metrics.weighted(SpanLoss(reasoning=2.0, final=3.0), {"reasoning": 1.0, "final": 0.5}) == 3.5
    assert metrics.weighted(SpanLoss(reasoning=None, final=3.0), {"reasoning": 1.0, "final": 0.5}) == 1.5
    found = json.loads(
        json.dumps(
            line("step", 7, gpu={"utilisation": None, "reason": "computed on the CPU"}), allow_nan=False
        )
    )
    assert (found["event"], found["step"], found["attempt"]) == ("step", 7, 1) and found["gpu"][
        "utilisation"
    ] is None


def test_the_histogram_counts_every_expert_of_every_layer() -> None:
    torch = pytest.importorskip("torch")
    from vpmoe.model.router import ExpertLoad

    tokens_LE = torch.tensor([[10] * 64, [0] * 63 + [640]])
    found = metrics.router(
        ExpertLoad(("layers.1", "layers.2"), tokens_LE, torch.ones(2, dtype=torch.float64))
    )
    assert found["maxOverMean"] == {"layers.1": 1.0, "layers.2": 64.0} and found["dead"] == {"layers.2": 63}
    bounds, counts = np.asarray(found["histogram"]["bounds"]), found["histogram"]["experts"]
    assert (
        sum(counts) == 128
        and counts[0] == 63
        and counts[-1] == 1
        and counts[int(np.searchsorted(bounds, 1.0))] == 64
    )
