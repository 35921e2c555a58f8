"""Progress reports, status and labels: the records that processes exchange through S3 and the API server."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import ValidationError

from tests.fakes import valid_specs
from vpmoe.api import DistillRun, labels
from vpmoe.api.progress import Amount, CheckpointStatus, HeldOut, Progress, ProgressCondition, SpanLoss
from vpmoe.api.run import STEP_NAME
from vpmoe.api.status import MESSAGE, MOST_STEPS, ChildRef, Condition, Status, StepStatus

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
SHA = "ab" * 32


def test_progress_is_read_as_it_was_written() -> None:
    progress = Progress(
        step="first",
        attempt=2,
        state="Running",
        updated=NOW,
        tokens=Amount(done=5, total=10),
        tokens_per_second=1.5,
        held_out=HeldOut(before=SpanLoss(reasoning=2.0)),
        checkpoint=CheckpointStatus(iteration=7, tokens=5, manifest="s3://b/m.json", sha256=SHA),
    )
    document = progress.dump()
    assert document["tokensPerSecond"] == 1.5
    assert document["heldOut"] == {"before": {"reasoning": 2.0}}
    assert document["updated"] == "2026-01-02T03:04:05Z"
    assert Progress.model_validate(document) == progress


def test_a_message_may_hold_a_file_name_that_is_not_utf_8() -> None:
    slow = ProgressCondition(type="Slow", status="True", reason="Slow", message="\udcff")
    progress = Progress(
        step="first",
        attempt=1,
        state="Running",
        updated=NOW,
        message="reading \udcff.parquet",
        conditions=(slow,),
    )
    read = Progress.model_validate_json(progress.to_json())
    assert (read.message, read.conditions[0].message) == ("reading ?.parquet", "?")


def test_progress_of_a_newer_writer_is_read() -> None:
    document = Progress(step="first", attempt=1, state="Succeeded", updated=NOW).dump() | {"mood": "fine"}
    assert Progress.model_validate(document).state == "Succeeded"


@pytest.mark.parametrize(
    "broken", [{"attempt": 0}, {"state": "Failed"}, {"updated": "soon"}, {"loss": float("nan")}]
)
def test_invalid_progress_is_rejected(broken: dict[str, object]) -> None:
    good = {"step": "first", "attempt": 1, "state": "Running", "updated": NOW}
    with pytest.raises(ValidationError):
        Progress.model_validate(good | broken)


def test_a_status_omits_unknown_fields() -> None:
    assert Status().dump() == {
        "observedGeneration": 0,
        "phase": "Pending",
        "message": "",
        "conditions": [],
        "steps": [],
    }


def test_a_message_that_is_too_long_is_shortened_and_not_rejected() -> None:
    step = StepStatus(name="first", message="x" * 5000)
    condition = Condition(
        type="Ready", status="False", reason="Because", message="y" * 5000, last_transition_time=NOW
    )
    assert (len(step.message), step.message[-1], len(condition.message)) == (MESSAGE, "…", MESSAGE)


def test_the_longest_status_is_much_smaller_than_the_limit_of_etcd() -> None:
    stages = [{**valid_specs.ONPOLICY, "name": f"{i}".rjust(16, "b")} for i in range(8)]
    export = {"stages": [stage["name"] for stage in stages]}
    init = {"upcycle": {"model": "s3://models/dense"}}
    changes = {"spec.stages": stages, "spec.export": export, "spec.student.init": init}
    steps = DistillRun.parse(valid_specs.manifest(changes)).steps()
    assert (len(steps), max(map(len, steps))) == (MOST_STEPS, STEP_NAME)
    facts = CheckpointStatus(iteration=10**9, tokens=10**15, manifest="s3://" + "m" * 2043, sha256=SHA)
    child = ChildRef(kind="PyTorchJob", name="n" * 63, uid="u" * 36)
    steps_status = [
        StepStatus(
            name=name, state="Succeeded", message="é" * MESSAGE, started=NOW, child=child, checkpoint=facts
        )
        for name in steps
    ]
    conditions = [
        Condition(
            type=f"T{i}", status="True", reason="R" * 128, message="é" * MESSAGE, last_transition_time=NOW
        )
        for i in range(16)
    ]
    status = Status(message="é" * MESSAGE, steps=tuple(steps_status), conditions=tuple(conditions))
    assert len(json.dumps(status.dump(), ensure_ascii=False).encode()) < 300_000, (
        "etcd rejects objects of 1.5 MB"
    )


def test_conditions_and_steps_of_a_status_are_found_by_name() -> None:
    ready = Condition(type="Ready", status="True", reason="Trained", last_transition_time=NOW)
    status = Status(
        conditions=(ready,), steps=(StepStatus(name="preprocess"), StepStatus(name="first", attempt=2))
    )
    found = status.step_status("first")
    assert found is not None and found.attempt == 2
    assert status.step_status("second") is None
    assert (status.condition("Ready"), status.condition("Stalled")) == (ready, None)
    assert Status.model_validate(status.dump()) == status


def test_labels_are_shortened_and_annotations_are_not() -> None:
    facts: dict[str, Any] = {
        "step": "first",
        "attempt": 3,
        "config": SHA,
        "dataset": SHA,
    }
    label_values = labels.labels("run", **facts)
    assert label_values[labels.CONFIG] == label_values[labels.DATASET] == SHA[:16]
    assert label_values[labels.ATTEMPT] == "3"
    assert labels.annotations("run", **facts) | label_values == {
        **labels.annotations("run", **facts),
        **label_values,
    }
    assert labels.annotations("run", **facts)[labels.CONFIG] == SHA


@pytest.mark.parametrize("commit", ["", "ab" * 20, "cd" * 32, None])
def test_a_progress_keeps_a_commit_and_says_whether_there_is_none(commit: str | None) -> None:
    progress = Progress(step="first", attempt=1, state="Running", updated=NOW, commit=commit)
    assert ("commit" in progress.dump()) is (commit is not None)
    assert Progress.model_validate_json(progress.to_json()) == progress


@pytest.mark.parametrize("wrong", ["main", "ab" * 19, "AB" * 20, "ab" * 20 + "\n", "x" * 10**6, 7, ["a"], {}])
def test_a_wrong_commit_does_not_count_and_hides_nothing_else(wrong: Any) -> None:
    whole = {"step": "first", "attempt": 1, "state": "Running", "updated": NOW, "message": "fine"}
    progress = Progress.model_validate({**whole, "commit": wrong})
    assert (progress.commit, progress.message) == (None, "fine")


def test_an_unknown_dataset_has_no_label() -> None:
    assert labels.DATASET not in labels.labels("run", step="preprocess", attempt=1, config=SHA)


@pytest.mark.parametrize("value", ["a b", "-a", "a" * 64, "é", "a/b"])
def test_a_value_that_kubernetes_rejects_as_a_label_is_rejected(value: str) -> None:
    with pytest.raises(ValueError, match=r"label vpmoe.dev/run: .* is not a label value"):
        labels.label_value(labels.RUN, value)
