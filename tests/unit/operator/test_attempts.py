"""Attempts of a step: how many there are, when they are Stalled, when a hung one is restarted, what other
containers of their pods change, and what a wall clock that jumps changes.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from distill_operator.actions import CreateChild, DeleteChild, DeleteRun
from distill_operator.pod_diagnosis import Failure
from distill_operator.pod_records import ProgressReading
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes.simulated_cluster import (
    ALL_KINDS,
    ERROR,
    EVICTED,
    PERMANENT,
    RETRIABLE,
    UNREADABLE,
    SimulatedCluster,
    condition,
    observed_run,
    onpolicy_run,
    progress,
    rescoring_run,
    training_run,
)
from vpmoe.api.status import INTERRUPTIONS_EXHAUSTED, Status
from vpmoe.api.termination import TerminationRecord

DAY = 86400
RESYNC = 10
NO_REPORT = ProgressReading(attempted=True)
STORE_AWAY = Failure("Interrupted", "pod x, exit 75. Last line: the store did not answer")
"""As pod_diagnosis has it from the job's record."""
Ending = Callable[[SimulatedCluster], None]


def fail(failure: Failure, reading: ProgressReading = NO_REPORT) -> Ending:
    """An attempt that ends with this failure, without having reported anything that can be read."""

    def end(cluster: SimulatedCluster) -> None:
        cluster.set_progress(reading)
        cluster.set_child_state("Failed", failure)

    return end


def vanish(cluster: SimulatedCluster) -> None:
    cluster.set_progress(NO_REPORT)
    cluster.remove_children("vanilla")


def lose_pod(cluster: SimulatedCluster) -> None:
    """The training operator would replace the pod: the operator deletes the child, which then is gone."""
    cluster.set_progress(NO_REPORT)
    cluster.set_child_state("Running")
    cluster.reconcile()
    cluster.set_child_state("Waiting", missing_pod="first-vanilla-a1-master-0")
    cluster.reconcile()
    cluster.remove_children("vanilla")


def repeat_work(cluster: SimulatedCluster) -> None:
    """An attempt that trains on the same tokens as the one before, and is evicted before its checkpoint."""
    step = cluster.step("vanilla")
    cluster.set_child_state("Running")
    for done in (10, 20, 30):
        cluster.set_progress(progress("vanilla", step.attempt, done=done))
        cluster.reconcile()
        cluster.advance(20)
    cluster.set_child_state("Failed", EVICTED)


ENDINGS: dict[str, Ending] = {
    "evicted": fail(EVICTED),
    "fails": fail(ERROR),
    "the store is away": fail(STORE_AWAY),
    "retriable": fail(RETRIABLE),
    "deleted": vanish,
    "its pod deleted": lose_pod,
    "evicted after the same tokens": repeat_work,
}
INTERRUPTIONS = [name for name in ENDINGS if name not in ("fails", "retriable")]


def run_for(cluster: SimulatedCluster, seconds: float, end: Ending, lasts: float = 130) -> list[str]:
    """Let time pass. Each attempt ends in this way after it has lasted `lasts` seconds.

    Returns the status of the condition Stalled at each reconcile, without repetitions.
    """
    stop, started, stalled = cluster.uptime + seconds, cluster.uptime, ["False"]
    while cluster.uptime < stop and cluster.status.phase != "Failed":
        attempt = cluster.step("vanilla").attempt
        decided = cluster.reconcile(crash_after=0 if attempt % 2 else None)
        found = condition(decided, "Stalled")[0]
        stalled += [found] if found != stalled[-1] else []
        if cluster.step("vanilla").attempt > attempt:
            started = cluster.uptime
        elif cluster.step("vanilla").state == "Running" and cluster.uptime >= started + lasts:
            end(cluster)
            continue
        wait = (decided.requeue_at - cluster.now).total_seconds() if decided.requeue_at else RESYNC
        cluster.advance(min(max(wait, 1.0), RESYNC))
    return stalled


@pytest.mark.parametrize("ending", ENDINGS)
def test_attempts_without_progress_are_bounded_whatever_ends_them(ending: str) -> None:
    cluster = training_run(runtime={"attempts": 3, "interruptions": 12, "stalledAfter": "15m"})
    run_for(cluster, 7 * DAY, ENDINGS[ending])
    step = cluster.step("vanilla")
    assert cluster.status.phase == "Failed"
    bound = 12 if ending in INTERRUPTIONS else 3
    assert step.attempt == bound
    assert (step.failures, step.interruptions) == ((0, 12) if ending in INTERRUPTIONS else (3, 0))
    reason = INTERRUPTIONS_EXHAUSTED if ending in INTERRUPTIONS else "AttemptsExhausted"
    assert condition(cluster.reconcile(), "Failed") == ("True", reason)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(seed=st.integers(0, 2**32), attempts=st.integers(1, 4), interruptions=st.integers(1, 6))
def test_attempts_of_mixed_endings_are_bounded(seed: int, attempts: int, interruptions: int) -> None:
    rng = random.Random(seed)
    cluster = training_run(runtime={"attempts": attempts, "interruptions": interruptions})
    run_for(cluster, 7 * DAY, lambda c: rng.choice([*ENDINGS.values()])(c), lasts=0)
    assert cluster.status.phase == "Failed"
    assert cluster.step("vanilla").attempt <= attempts + interruptions - 1


@pytest.mark.parametrize("ending", INTERRUPTIONS)
def test_a_step_that_makes_no_progress_becomes_stalled_and_stays_it_however_many_attempts_it_takes(
    ending: str,
) -> None:
    cluster = training_run(runtime={"interruptions": 30, "stalledAfter": "15m"})
    assert run_for(cluster, 3600, ENDINGS[ending]) == ["False", "True"]
    assert condition(cluster.reconcile(), "Progressing")[0] == "False"
    assert cluster.status.phase == "Running"
    end = cluster.uptime + 600
    while cluster.step("vanilla").state != "Running" and cluster.uptime < end:
        cluster.advance(RESYNC)
        cluster.reconcile()
    cluster.set_child_state("Running")
    cluster.set_progress(progress("vanilla", cluster.step("vanilla").attempt, iteration=1, done=40))
    decided = cluster.reconcile()
    assert condition(decided, "Stalled")[0] == "False", "a checkpoint is progress"
    assert condition(decided, "Progressing") == ("True", "Running")
    assert (cluster.step("vanilla").interruptions, cluster.step("vanilla").failures) == (0, 0)


def test_one_interruption_does_not_make_what_the_next_attempt_repeats_count_as_nothing() -> None:
    cluster = training_run(runtime={"stalledAfter": "15m"})
    cluster.set_child_state("Failed", EVICTED)
    cluster.reconcile()
    cluster.reconcile()
    cluster.set_child_state("Running")
    for minute in range(60):
        cluster.set_progress(progress("vanilla", 2, done=minute))
        assert condition(cluster.reconcile(), "Stalled")[0] == "False"
        cluster.advance(60)


def test_time_in_a_queue_is_no_stall_and_does_not_hide_one() -> None:
    cluster = training_run(runtime={"queueName": "team", "stalledAfter": "15m", "interruptions": 30})
    stalled = []
    for _ in range(6):
        cluster.advance(240)
        fail(EVICTED)(cluster)
        cluster.reconcile()
        while cluster.step("vanilla").state == "Retrying":
            cluster.advance(RESYNC)
            cluster.reconcile()
        cluster.set_child_state("Waiting", suspended=True)
        for _ in range(90):
            cluster.reconcile()
            cluster.advance(60)
        cluster.set_child_state("Running", suspended=False)
        stalled.append(condition(cluster.reconcile(), "Stalled")[0])
    assert stalled == ["False", "False", "False", "True", "True", "True"]


@pytest.mark.parametrize("raised", ["attempts", "interruptions"])
def test_a_run_whose_interruptions_are_exhausted_continues_if_interruptions_is_raised(raised: str) -> None:
    cluster = training_run(runtime={"interruptions": 2, "stalledAfter": "15m"})
    run_for(cluster, DAY, fail(EVICTED))
    assert cluster.status.phase == "Failed"
    assert "interruption 2 of 2 in a row" in cluster.status.message
    assert "raise runtime.interruptions" in cluster.status.message
    cluster.advance(DAY)
    assert cluster.reconcile_repeatedly().actions == ()
    cluster.spec["runtime"][raised] = 4
    decided = cluster.reconcile()
    if raised == "attempts":
        assert decided.actions == ()
        return
    assert decided.actions == (CreateChild("vanilla", 3),)
    assert condition(decided, "Stalled")[0] == "False", "that a person lets it continue counts from now"
    run_for(cluster, DAY, fail(EVICTED))
    assert (cluster.status.phase, cluster.step("vanilla").attempt) == ("Failed", 4)


def test_a_step_that_an_older_operator_interrupted_more_often_is_retried_until_its_next_interruption() -> (
    None
):
    cluster = training_run()
    steps = [{**step.dump(), "interruptions": 1516} for step in cluster.status.steps]
    cluster.status = Status.model_validate({**cluster.status.dump(), "steps": steps})
    assert cluster.reconcile_repeatedly().status.phase == "Running"
    cluster.set_child_state("Failed", EVICTED)
    assert cluster.reconcile().status.phase == "Failed"


def test_raising_attempts_continues_a_run_that_an_older_operator_failed_after_many_interruptions() -> None:
    cluster = training_run(runtime={"attempts": 1})
    cluster.set_child_state("Failed", ERROR)
    cluster.reconcile()
    steps = [{**step.dump(), "interruptions": 1516} for step in cluster.status.steps]
    cluster.status = Status.model_validate({**cluster.status.dump(), "steps": steps})
    cluster.spec["runtime"]["attempts"] = 2
    assert cluster.reconcile().actions == (CreateChild("vanilla", 2),)


def test_a_lower_number_of_parts_found_by_the_next_attempt_is_no_progress_when_it_rises_again() -> None:
    cluster = rescoring_run(runtime={"attempts": 3})
    cluster.set_progress(progress("rescore", done=3))
    cluster.reconcile()
    for attempt in (1, 2, 3):
        cluster.set_child_state("Running", step="rescore")
        for found in (0, 2, 3):
            cluster.set_progress(progress("rescore", attempt, done=found))
            cluster.reconcile()
        cluster.set_child_state("Failed", ERROR, "rescore")
        cluster.reconcile()
        cluster.advance(60)
        cluster.reconcile()
    assert (cluster.step("rescore").state, cluster.step("rescore").failures) == ("Failed", 3)


@pytest.mark.parametrize("state, message", [("Waiting", "pod x is starting"), ("Running", "")])
def test_a_new_attempt_has_its_own_message_and_speed(state: Any, message: str) -> None:
    cluster = training_run()
    said = {"message": "step 3 of 6", "tokensPerSecond": 10.0, "loss": 2.5}
    cluster.set_progress(progress("vanilla", 1, iteration=3, done=500, **said))
    assert cluster.reconcile().status.tokens_per_second == 10.0
    cluster.set_child_state("Failed", EVICTED)
    cluster.reconcile()
    cluster.reconcile()
    assert cluster.step("vanilla").message == "Creating PyTorchJob first-vanilla-a2 (attempt 2)"
    cluster.set_child_state(state, message=message)
    decided = cluster.reconcile()
    expected = message or "attempt 2 is running"
    assert (cluster.step("vanilla").message, decided.status.message) == (expected, f"vanilla: {expected}")
    assert (decided.status.tokens_per_second, decided.status.loss) == (None, 2.5)
    cluster.set_child_state("Running", message="")
    cluster.set_progress(progress("vanilla", 2, iteration=3, done=501, message="step 4 of 6"))
    assert cluster.reconcile().status.message == "vanilla: step 4 of 6"


def lingering(cluster: SimulatedCluster, failure: Failure | None = None, step: str = "vanilla") -> None:
    """The step's own containers have ended, and a sidecar keeps its pods alive."""
    state: Any = "Failed" if failure else "Succeeded"
    cluster.set_child_state(state, failure, step, lingering=True)


@contextmanager
def removal_of(cluster: SimulatedCluster, step: str = "vanilla") -> Iterator[None]:
    """The step's child is deleted once, is Ending for some reconciles, and is then gone."""
    child = cluster.child(step)
    decided = cluster.reconcile()
    deleted = [one.child.name for one in decided.actions if isinstance(one, DeleteChild)]
    assert deleted == [child.name]
    assert not [one for one in decided.actions if isinstance(one, CreateChild)]
    assert cluster.children[child.name].state == "Ending"
    assert cluster.reconcile_repeatedly().actions == ()
    yield
    del cluster.children[child.name]


@pytest.mark.parametrize("restarted", [False, True])
def test_a_step_whose_sidecar_does_not_end_has_succeeded_when_its_pods_are_removed(restarted: bool) -> None:
    cluster = training_run(
        stages=ALL_KINDS[:1] + ALL_KINDS[2:], teacher={"model": "s3://models/t", "gpus": 1}
    )
    cluster.set_progress(progress("vanilla", state="Succeeded", iteration=6, done=1000, message="Finished"))
    lingering(cluster)
    with removal_of(cluster):
        assert cluster.step("vanilla").state == "Running", "its pods hold the GPUs of the next step"
        cluster.set_progress(UNREADABLE)
        if restarted:
            cluster.restart_operator()
    assert cluster.reconcile().actions == (CreateChild("forced", 1),)
    step = cluster.step("vanilla")
    assert (step.state, step.message, step.attempt, step.outcome) == ("Succeeded", "Finished", 1, None)
    assert "first-vanilla-a1" not in cluster.children


def test_success_beside_a_sidecar_is_recorded_with_what_the_pod_recorded() -> None:
    cluster = training_run()
    done = progress("vanilla", state="Succeeded", iteration=6, done=1000, reused=True)
    record = {"class": "Succeeded", "message": "Finished", "progress": done.progress}
    lingering(cluster)
    cluster.set_child_state("Succeeded", lingering=True, record=TerminationRecord.model_validate(record))
    cluster.set_progress(UNREADABLE)
    with removal_of(cluster):
        cluster.restart_operator()
    assert cluster.reconcile().status.phase == "Succeeded"
    step = cluster.step("vanilla")
    assert (step.message, step.reused, step.checkpoint and step.checkpoint.iteration) == ("Finished", True, 6)


@pytest.mark.parametrize(
    "failure, state, failures, interruptions",
    [
        pytest.param(PERMANENT, "Failed", 3, 0, id="permanent"),
        pytest.param(ERROR, "Retrying", 1, 0, id="error"),
        pytest.param(EVICTED, "Retrying", 0, 1, id="evicted"),
        pytest.param(RETRIABLE, "Retrying", 1, 0, id="retriable"),
        pytest.param(STORE_AWAY, "Retrying", 0, 1, id="the store is away"),
    ],
)
@pytest.mark.parametrize("suspended", [False, True])
def test_the_failure_of_a_step_whose_sidecar_does_not_end_is_kept_until_its_pods_are_removed(
    failure: Failure, state: str, failures: int, interruptions: int, suspended: bool
) -> None:
    cluster = training_run()
    cluster.set_progress(NO_REPORT)
    lingering(cluster, failure)
    with removal_of(cluster):
        assert failure.message in cluster.status.message
        cluster.restart_operator()
        cluster.spec["suspend"] = suspended
        decided = cluster.reconcile()
        assert (decided.actions, "removing its pods" in decided.status.message) == ((), True)
    cluster.reconcile()
    step = cluster.step("vanilla")
    assert step.state == (state if state == "Failed" or not suspended else "Suspended")
    assert (step.failures, step.interruptions, step.outcome) == (failures, interruptions, None)
    assert suspended or failure.message in step.message


def test_an_operator_that_crashes_before_it_removes_pods_removes_them_later() -> None:
    cluster = training_run()
    cluster.set_progress(progress("vanilla", state="Succeeded", iteration=6, done=1000))
    lingering(cluster)
    cluster.reconcile(crash_after=0)
    cluster.restart_operator()
    with removal_of(cluster):
        pass
    assert cluster.reconcile().status.phase == "Succeeded"


HUNG = {"runtime": {"stalledAfter": "15m", "onStall": "Restart", "attempts": 2}}


def hang(cluster: SimulatedCluster, seconds: float) -> list[str]:
    """Reconcile with unchanged children and progress. Returns the children that were deleted meanwhile."""
    deleted, end = [], cluster.uptime + seconds
    while cluster.uptime < end:
        decided = cluster.reconcile()
        deleted += [one.child.name for one in decided.actions if isinstance(one, DeleteChild)]
        if deleted:
            break
        cluster.advance(RESYNC)
    return deleted


def test_a_hung_step_is_restarted_which_counts_as_a_failure() -> None:
    cluster = training_run(**HUNG)
    cluster.set_progress(progress("vanilla", done=10))
    assert hang(cluster, 899) == []
    assert hang(cluster, 2 * RESYNC) == ["first-vanilla-a1"]
    assert condition(cluster.reconcile(), "Stalled") == ("True", "NoProgress")
    assert "no progress for 15m (runtime.stalledAfter) while its pods ran" in cluster.status.message
    cluster.restart_operator()
    assert cluster.reconcile_repeatedly().actions == (), "it saves a checkpoint, or is killed after its grace"
    cluster.remove_children("vanilla")
    cluster.reconcile()
    assert (cluster.step("vanilla").failures, cluster.step("vanilla").state) == (1, "Retrying")
    assert "step vanilla failed (attempt 1 of 2): no progress for 15m" in cluster.step("vanilla").message
    cluster.advance(RESYNC)
    assert cluster.reconcile().actions == (CreateChild("vanilla", 2),)
    assert condition(cluster.reconcile(), "Stalled")[0] == "True", "a new attempt is no progress"
    cluster.set_child_state("Running")
    assert hang(cluster, 899) == [], "it has stalledAfter of its own"
    assert hang(cluster, 2 * RESYNC) == ["first-vanilla-a2"]
    cluster.remove_children("vanilla")
    assert condition(cluster.reconcile(), "Failed") == ("True", "AttemptsExhausted")


@pytest.mark.parametrize(
    "runtime, state, reading",
    [
        pytest.param({"onStall": "Report"}, "Running", NO_REPORT, id="Report"),
        pytest.param({}, "Waiting", NO_REPORT, id="not all pods run"),
        pytest.param({}, "Ending", NO_REPORT, id="being deleted"),
    ],
)
def test_a_stall_of_another_kind_restarts_nothing(
    runtime: dict[str, Any], state: Any, reading: ProgressReading
) -> None:
    cluster = training_run(runtime={**HUNG["runtime"], **runtime})
    cluster.set_child_state(state, message="pod x", deleting=state == "Ending")
    cluster.set_progress(reading)
    assert hang(cluster, 3600) == []
    assert condition(cluster.reconcile(), "Stalled")[0] == "True"


@pytest.mark.parametrize("reading", [UNREADABLE, ProgressReading()], ids=["cannot be read", "not read yet"])
def test_a_step_whose_progress_is_not_known_is_neither_stalled_nor_restarted(
    reading: ProgressReading,
) -> None:
    cluster = training_run(**HUNG)
    cluster.set_progress(reading)
    assert hang(cluster, 3600) == []
    assert condition(cluster.reconcile(), "Stalled")[0] == "False"


@pytest.mark.parametrize("unknown", [UNREADABLE, ProgressReading()], ids=["cannot be read", "not read yet"])
def test_time_in_which_progress_was_not_known_does_not_count_against_a_step(unknown: ProgressReading) -> None:
    cluster = training_run(**HUNG)
    report = progress("vanilla", done=10)
    for reading, seconds in ((report, 600), (unknown, 1200), (report, 890)):
        cluster.set_progress(reading)
        assert hang(cluster, seconds) == []
    assert hang(cluster, 2 * RESYNC) == ["first-vanilla-a1"]


def test_time_in_which_not_all_pods_ran_does_not_count_against_a_step() -> None:
    cluster = training_run(**HUNG)
    cluster.set_child_state("Waiting", message="pod x is starting")
    assert hang(cluster, 600) == []
    cluster.set_child_state("Running", message="")
    assert hang(cluster, 890) == []
    assert hang(cluster, 3 * RESYNC) == ["first-vanilla-a1"]


def test_a_step_that_moves_is_not_restarted_however_long_it_is_stalled() -> None:
    cluster = training_run(runtime={**HUNG["runtime"], "attempts": 9})
    for _ in (1, 2):
        cluster.set_child_state("Failed", ERROR)
        cluster.reconcile()
        cluster.advance(60)
        cluster.reconcile()
        cluster.set_child_state("Running")
    for minute in range(120):
        cluster.set_progress(progress("vanilla", 3, done=minute))
        assert cluster.reconcile().actions == ()
        cluster.advance(60)
    assert condition(cluster.reconcile(), "Stalled") == ("True", "NoProgress"), "it has saved nothing"


@pytest.mark.parametrize("moving", [(), ("onpolicy",), ("onpolicy-sampler",), ("onpolicy-teacher",)])
def test_sampler_and_teacher_are_restarted_with_a_hung_trainer_unless_they_make_progress(
    moving: tuple[str, ...],
) -> None:
    cluster = onpolicy_run(**HUNG)
    deleted: list[str] = []
    for minute in range(16):
        for step in moving:
            cluster.set_progress(progress(step, done=minute))
        deleted += hang(cluster, 60)
    hung = {"onpolicy", "onpolicy-sampler", "onpolicy-teacher"} - {*moving}
    assert set(deleted) == ({f"first-{step}-a1" for step in hung} if "onpolicy" in hung else set())


@pytest.mark.parametrize("jump", [-DAY, DAY, -30, 30])
@pytest.mark.parametrize("restarted", [False, True])
def test_a_retry_waits_its_pause_whatever_the_wall_clock_does(jump: float, restarted: bool) -> None:
    cluster = training_run()
    for _ in range(2):
        cluster.set_child_state("Failed", ERROR)
        cluster.reconcile()
        if cluster.step("vanilla").failures == 2:
            break
        cluster.advance(60)
        cluster.reconcile()
    cluster.reconcile()
    cluster.advance(5)
    cluster.step_clock(jump)
    if restarted:
        cluster.restart_operator()
    waited, decided = 5.0, cluster.reconcile()
    while not decided.actions:
        assert decided.requeue_at is not None
        assert decided.requeue_at - cluster.now <= timedelta(seconds=20), "the pause"
        cluster.advance(1)
        waited, decided = waited + 1, cluster.reconcile()
    assert decided.actions == (CreateChild("vanilla", 2 + 1),)
    if not restarted:
        assert waited == 20
    else:  # all that a new process knows is the wall clock
        assert waited == (5 if jump > 0 else 25)


@pytest.mark.parametrize("on_stall", ["Report", "Restart"])
def test_a_wall_clock_that_jumps_makes_no_step_look_hung_and_hides_none(on_stall: str) -> None:
    for jump in (DAY, -DAY):
        cluster = training_run(runtime={**HUNG["runtime"], "onStall": on_stall})
        cluster.reconcile()
        cluster.step_clock(jump)
        decided = cluster.reconcile()
        assert (condition(decided, "Stalled")[0], decided.actions) == ("False", ())
        hang(cluster, 870)
        assert condition(cluster.reconcile(), "Stalled")[0] == "False"
        cluster.advance(40)
        assert condition(cluster.reconcile(), "Stalled")[0] == "True"


def test_a_new_process_restarts_no_step_that_it_has_not_watched_for_stalled_after() -> None:
    cluster = training_run(**HUNG)
    hang(cluster, 600)
    cluster.restart_operator()
    cluster.step_clock(DAY)
    decided = cluster.reconcile()
    assert (condition(decided, "Stalled")[0], decided.actions) == ("True", ())
    assert hang(cluster, 899) == []
    assert hang(cluster, 2 * RESYNC) == ["first-vanilla-a1"]


def test_a_finished_run_expires_by_the_wall_clock_as_a_job_does() -> None:
    """pkg/controller/ttlafterfinished: deleted when finish + TTL has passed, later if it finished in the
    future.
    """
    for jump in (0, DAY, -DAY):
        cluster = training_run(ttlAfterFinished="1h")
        cluster.set_child_state("Succeeded")
        cluster.set_progress(progress("vanilla", state="Succeeded", iteration=6, done=1000))
        cluster.reconcile()
        cluster.step_clock(jump)
        decided = cluster.reconcile()
        if jump > 0:
            assert decided.actions == (DeleteRun(),)
            continue
        assert (decided.actions, decided.requeue_at) == ((), cluster.now + timedelta(seconds=3600 - jump))
        cluster.step_clock(-jump)
        cluster.advance(3599)
        assert cluster.reconcile().actions == ()
        cluster.advance(1)
        assert cluster.reconcile().actions == (DeleteRun(),)


def test_neither_limit_is_part_of_the_configuration() -> None:
    """Pods of a run that an older operator has started would refuse to start."""
    plain, changed = observed_run().run, observed_run(runtime={"interruptions": 3, "onStall": "Restart"}).run
    assert plain is not None
    assert changed is not None
    assert plain.config_hash == changed.config_hash
    assert plain.document() == changed.document()
