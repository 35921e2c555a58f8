"""What a step came to, and how far it is: from what its pods serve, and from what they recorded at their
end."""

from datetime import timedelta
from typing import Any

import pytest
from distill_operator.pod_records import ProgressReading

from tests.fakes.simulated_cluster import (
    ALL_KINDS,
    ERROR,
    EVICTED,
    START,
    UNREADABLE,
    SimulatedCluster,
    condition,
    progress,
    rescoring_run,
    training_run,
)
from vpmoe.api.progress import Progress
from vpmoe.api.status import Status
from vpmoe.api.termination import TerminationRecord


def record(kind: str, reading: ProgressReading | None = None, message: str = "") -> TerminationRecord:
    """A record with the progress of that reading."""
    return TerminationRecord.model_validate(
        {"class": kind, "message": message, "progress": reading and reading.progress}
    )


def test_a_step_succeeds_with_what_its_pods_recorded() -> None:
    cluster = SimulatedCluster({"stages": ALL_KINDS})
    cluster.reconcile()
    done = progress("preprocess", state="Succeeded", done=4, reused=True)
    cluster.set_child_state("Succeeded", record=record("Succeeded", done, "Complete"))
    cluster.reconcile()
    step = cluster.step("preprocess")
    assert (step.state, step.message, step.reused, step.parts_done) == ("Succeeded", "Complete", True, 4)
    assert cluster.status.provenance is not None and cluster.status.provenance.dataset is not None
    assert cluster.status.provenance.dataset.id == "d" * 64


def test_a_step_whose_succeeded_pods_are_gone_has_succeeded_with_the_last_known_progress() -> None:
    cluster = training_run()
    cluster.set_progress(progress("vanilla", iteration=3, done=500, loss=2.5))
    cluster.reconcile()
    cluster.set_child_state("Succeeded")
    assert cluster.reconcile().status.phase == "Succeeded"
    step = cluster.step("vanilla")
    assert (step.tokens_done, step.checkpoint and step.checkpoint.iteration) == (500, 3)


@pytest.mark.parametrize("reading", [UNREADABLE, ProgressReading()], ids=["unreadable", "never read"])
def test_a_step_of_pods_that_serve_and_record_nothing_succeeds(reading: ProgressReading) -> None:
    """They are of the version before."""
    cluster = training_run()
    cluster.set_progress(reading)
    cluster.reconcile()
    cluster.set_child_state("Succeeded")
    assert (cluster.reconcile().status.phase, cluster.step("vanilla").message) == ("Succeeded", "finished")


@pytest.mark.parametrize("live, recorded, expected", [(2, 3, 3), (3, 2, 3)])
def test_the_newest_of_what_is_served_and_recorded_counts(live: int, recorded: int, expected: int) -> None:
    cluster = rescoring_run()
    cluster.set_progress(progress("rescore", done=live))
    cluster.set_child_state(
        "Failed", ERROR, step="rescore", record=record("Internal", progress("rescore", done=recorded))
    )
    cluster.reconcile()
    assert cluster.step("rescore").parts_done == expected


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(progress("rescore", attempt=1, done=3, message="of before"), id="attempt"),
        pytest.param(progress("vanilla", attempt=2, done=3, message="of another"), id="step"),
        pytest.param(progress("rescore", attempt=2, done=3, run="team/first-ffffffff"), id="run"),
        pytest.param(progress("rescore", attempt=2, done=2**60, message="too many"), id="count"),
    ],
)
def test_a_report_of_something_else_is_ignored(other: ProgressReading) -> None:
    cluster = rescoring_run()
    cluster.set_child_state("Failed", ERROR, step="rescore")
    cluster.reconcile()
    cluster.advance(60)
    cluster.reconcile()
    cluster.set_child_state("Running", step="rescore", record=record("Internal", other))
    cluster.readings["rescore"] = other
    cluster.reconcile()
    step = cluster.step("rescore")
    assert (step.attempt, step.message, step.parts_done) == (2, "attempt 2 is running", 0)


def test_a_new_attempt_has_its_own_message() -> None:
    cluster = rescoring_run()
    cluster.set_progress(progress("rescore", done=1, message="Scored part 1"))
    cluster.reconcile()
    assert cluster.step("rescore").message == "Scored part 1"
    cluster.set_child_state("Failed", EVICTED, step="rescore")
    cluster.reconcile()
    cluster.reconcile()
    cluster.set_child_state("Running", step="rescore")
    cluster.reconcile()
    assert (cluster.step("rescore").attempt, cluster.step("rescore").message) == (2, "attempt 2 is running")
    cluster.set_progress(progress("rescore", attempt=2, done=1, message="Loading the teacher"))
    cluster.reconcile()
    assert cluster.step("rescore").message == "Loading the teacher"


def fail(cluster: SimulatedCluster, **more: Any) -> None:
    """One attempt of vanilla fails, and the next one runs."""
    cluster.set_child_state("Failed", ERROR, **more)
    cluster.reconcile()
    cluster.advance(60)
    cluster.reconcile()
    cluster.set_child_state("Running")
    cluster.reconcile()


def test_the_record_of_an_attempt_that_saved_work_clears_the_failures_before_it() -> None:
    cluster = training_run()
    cluster.set_progress(UNREADABLE)
    for attempt in range(1, 6):
        saved = record("Internal", progress("vanilla", attempt, iteration=attempt, done=attempt))
        fail(cluster, record=saved)
        assert cluster.step("vanilla").failures == 1


def test_what_an_attempt_finds_shows_that_those_before_it_saved_work() -> None:
    """They were killed, and recorded nothing."""
    cluster = training_run()
    cluster.set_progress(progress("vanilla", 1, iteration=2))
    cluster.reconcile()
    for attempt in range(1, 6):
        cluster.set_progress(ProgressReading())
        fail(cluster)
        assert cluster.step("vanilla").failures == 1
        cluster.set_progress(progress("vanilla", attempt + 1, iteration=attempt + 4))
        cluster.reconcile()
        assert cluster.step("vanilla").failures == 0


def test_attempts_that_find_what_those_before_them_found_are_failures_in_a_row() -> None:
    cluster = training_run()
    cluster.set_progress(progress("vanilla", 1, iteration=2))
    for attempt in (1, 2):
        fail(cluster)
        cluster.set_progress(progress("vanilla", attempt + 1, iteration=2))
        cluster.reconcile()
        assert cluster.step("vanilla").failures == attempt
    cluster.set_child_state("Failed", ERROR)
    assert cluster.reconcile().status.phase == "Failed"


def test_attempts_that_fall_back_and_get_as_far_as_before_are_failures_in_a_row() -> None:
    cluster = training_run()
    cluster.set_progress(progress("vanilla", 1, iteration=4))
    for attempt in (1, 2):
        fail(cluster)
        for iteration in (2, 3, 4):
            cluster.set_progress(progress("vanilla", attempt + 1, iteration=iteration))
            cluster.reconcile()
            assert cluster.step("vanilla").failures == attempt
            assert cluster.step("vanilla").furthest == (None if iteration == 4 else 4)
    cluster.set_progress(progress("vanilla", 3, iteration=5))
    cluster.reconcile()
    assert cluster.step("vanilla").failures == 0


def test_a_pod_that_knows_of_fewer_parts_lowers_nothing() -> None:
    cluster = rescoring_run()
    for found in (3, 2, 3):
        cluster.set_progress(progress("rescore", done=found))
        cluster.reconcile()
        assert cluster.step("rescore").parts_done == 3


def test_progress_that_cannot_be_read_is_a_condition_and_changes_nothing_else() -> None:
    cluster = training_run()
    cluster.set_progress(progress("vanilla", iteration=3, done=500, loss=2.5, tokensPerSecond=10.0))
    before = cluster.reconcile().status
    assert condition(cluster.plan(), "ProgressReadable") == ("True", "Answered")
    cluster.set_progress(UNREADABLE)
    decided = cluster.reconcile()
    assert condition(decided, "ProgressReadable") == ("False", "Unreachable")
    assert (decided.status.phase, decided.status.loss, decided.status.tokens_per_second) == (
        "Running",
        before.loss,
        before.tokens_per_second,
    )
    step = cluster.step("vanilla")
    assert (step.tokens_done, step.unreadable_since, step.failures) == (500, cluster.now, 0)
    cluster.set_progress(progress("vanilla", iteration=3, done=500, loss=2.5))
    assert condition(cluster.reconcile(), "ProgressReadable") == ("True", "Answered")
    assert cluster.step("vanilla").unreadable_since is None


def test_progress_that_cannot_be_read_is_never_a_stall_and_its_time_does_not_count() -> None:
    cluster = training_run(runtime={"stalledAfter": "10m"})
    cluster.set_progress(progress("vanilla", done=10))
    cluster.reconcile()
    cluster.advance(300)
    cluster.set_progress(UNREADABLE)
    for _ in range(100):
        assert condition(cluster.reconcile(), "Stalled")[0] == "False"
        cluster.advance(3600)
    cluster.set_progress(progress("vanilla", done=10))
    decided = cluster.reconcile()
    assert condition(decided, "Stalled")[0] == "False"
    assert decided.requeue_at == cluster.now + timedelta(seconds=300), "five minutes are left"
    cluster.advance(300)
    assert condition(cluster.reconcile(), "Stalled") == ("True", "NoProgress")


def test_an_operator_that_was_away_does_not_report_a_stall_before_it_has_read_the_progress() -> None:
    cluster = training_run(runtime={"stalledAfter": "10m"})
    cluster.advance(3600)
    cluster.set_progress(ProgressReading())
    assert condition(cluster.reconcile(), "Stalled")[0] == "False"
    cluster.set_progress(progress("vanilla"))
    assert condition(cluster.reconcile(), "Stalled") == ("True", "NoProgress")


def test_a_job_that_never_reports_is_stalled() -> None:
    cluster = training_run(runtime={"stalledAfter": "10m"})
    cluster.set_progress(ProgressReading(attempted=True))
    cluster.advance(600)
    assert condition(cluster.reconcile(), "Stalled") == ("True", "NoProgress")


def test_a_run_without_running_pods_has_no_condition_about_them() -> None:
    cluster = training_run()
    cluster.set_progress(UNREADABLE)
    assert condition(cluster.reconcile(), "ProgressReadable")[0] == "False"
    cluster.set_child_state("Succeeded")
    assert cluster.reconcile().status.condition("ProgressReadable") is None
    assert cluster.status.phase == "Succeeded"


def test_the_condition_of_the_version_before_is_removed() -> None:
    cluster = training_run()
    old = {
        "type": "StorageReachable",
        "status": "False",
        "reason": "SecretMissing",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
    status = cluster.status.dump()
    cluster.status = Status.model_validate({**status, "conditions": [*status["conditions"], old]})
    assert cluster.reconcile().status.condition("StorageReachable") is None


def test_a_job_cannot_set_the_conditions_of_the_operator() -> None:
    cluster = training_run()
    faked = [
        {"type": name, "status": "False", "reason": "Faked"}
        for name in ("Ready", "Stalled", "ProgressReadable", "StorageReachable")
    ]
    cluster.set_progress(progress("vanilla", conditions=faked))
    assert "Faked" not in {one.reason for one in cluster.reconcile().status.conditions}


def test_a_progress_of_the_version_before_has_not_reused_anything() -> None:
    old = {"step": "preprocess", "attempt": 1, "state": "Running", "message": "Reused", "updated": START}
    assert not Progress.model_validate(old).reused
