"""The three steps of an OnPolicy stage and its evaluation: started together, retried separately, stopped
together."""

from datetime import timedelta

import pytest
from distill_operator.actions import CreateChild, DeleteChild
from distill_operator.plan_builder import Plan
from distill_operator.pod_diagnosis import Failure
from distill_operator.run_status import percent_done

from tests.fakes.simulated_cluster import (
    ALL_KINDS,
    ERROR,
    EVALUATED,
    EVICTED,
    ONPOLICY,
    PERMANENT,
    SimulatedCluster,
    condition,
    observed_run,
    onpolicy_run,
    progress,
    training_run,
    waiting_run,
)

SAMPLER, TEACHER, TRAINER = TRIO = ("onpolicy-sampler", "onpolicy-teacher", "onpolicy")


def created(decided: Plan) -> list[str]:
    return [
        f"{action.step}-a{action.attempt}" for action in decided.actions if isinstance(action, CreateChild)
    ]


def deleted(decided: Plan) -> list[str]:
    return [action.child.name for action in decided.actions if isinstance(action, DeleteChild)]


def test_a_stage_from_its_first_reconcile_to_its_evaluation() -> None:
    cluster = SimulatedCluster({"stages": [ONPOLICY], "evaluation": EVALUATED})
    assert created(cluster.reconcile()) == ["preprocess-a1"]
    cluster.set_child_state("Succeeded")
    cluster.set_progress(progress("preprocess", state="Succeeded", done=4))
    assert created(cluster.reconcile()) == []
    assert created(cluster.reconcile()) == [f"{step}-a1" for step in TRIO], "all three in one plan"
    assert cluster.gpus_in_use() == 3
    for step in TRIO:
        cluster.set_child_state("Running", step=step)
    cluster.set_progress(progress(SAMPLER, done=3, message="window 3"))
    cluster.set_progress(progress(TEACHER, done=2, message="window 2"))
    cluster.set_progress(
        progress(TRAINER, iteration=2, done=500, tokensPerSecond=10.0, loss=2.5, message="step 2")
    )
    cluster.reconcile()
    assert (cluster.status.step, cluster.status.message, cluster.status.tokens_per_second) == (
        TRAINER,
        "onpolicy: step 2",
        10.0,
    )
    assert [(cluster.step(step).parts_done, cluster.step(step).message) for step in (SAMPLER, TEACHER)] == [
        (3, "window 3"),
        (2, "window 2"),
    ]
    assert (cluster.step(TRAINER).tokens_total, cluster.step(SAMPLER).tokens_total) == (1000, None)
    for step, reading in zip(
        TRIO,
        [progress(SAMPLER, state="Succeeded", done=4), progress(TEACHER, state="Succeeded", done=4)],
        strict=False,
    ):
        cluster.set_child_state("Succeeded", step=step)
        cluster.set_progress(reading)
        assert created(cluster.reconcile()) == [], "the others continue"
    assert (cluster.status.phase, [cluster.step(step).state for step in TRIO]) == (
        "Running",
        ["Succeeded", "Succeeded", "Running"],
    )
    cluster.set_child_state("Succeeded", step=TRAINER)
    cluster.set_progress(progress(TRAINER, state="Succeeded", iteration=4, done=1000))
    assert created(cluster.reconcile()) == ["onpolicy-evaluate-a1"]
    cluster.set_child_state("Succeeded", step="onpolicy-evaluate")
    message = "validity 83 % (low 90, medium 85, high 75), held-out reasoning 2.1, final 1.9"
    cluster.set_progress(
        progress("onpolicy-evaluate", state="Succeeded", done=4, message=message, validity=0.83)
    )
    cluster.reconcile()
    assert (cluster.status.phase, cluster.status.validity) == ("Succeeded", 0.83)
    assert (cluster.step("onpolicy-evaluate").message, cluster.step("onpolicy-evaluate").validity) == (
        message,
        0.83,
    )


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_an_operator_that_crashes_while_creating_three_children_creates_each_once(after: int) -> None:
    cluster = waiting_run(stages=[ONPOLICY])
    cluster.reconcile(crash_after=after)
    cluster.reconcile_repeatedly()
    assert cluster.created[1:] == [f"first-{step}-a1" for step in TRIO] == cluster.alive_children()


@pytest.mark.parametrize("step", TRIO)
@pytest.mark.parametrize(
    "failure, failures, pause", [(ERROR, 1, 10), (EVICTED, 0, 0)], ids=["fails", "is evicted"]
)
def test_each_of_the_three_is_retried_separately(
    step: str, failure: Failure, failures: int, pause: int
) -> None:
    cluster = onpolicy_run()
    cluster.set_child_state("Failed", failure, step)
    decided = cluster.reconcile()
    assert (decided.actions, decided.requeue_at) == ((), cluster.now + timedelta(seconds=pause))
    assert (cluster.step(step).state, cluster.step(step).failures, cluster.status.step) == (
        "Retrying",
        failures,
        TRAINER,
    )
    cluster.advance(pause)
    assert created(cluster.reconcile()) == [f"{step}-a2"]
    assert [cluster.step(other).attempt for other in TRIO if other != step] == [1, 1]


def test_a_new_window_clears_the_failures_of_sampler_and_teacher() -> None:
    cluster = onpolicy_run()
    for attempt in range(1, 6):
        for step in (SAMPLER, TEACHER):
            cluster.set_child_state("Failed", ERROR, step)
            cluster.set_progress(progress(step, attempt, done=attempt))
        cluster.reconcile()
        cluster.advance(60)
        cluster.reconcile()
    assert [(cluster.step(step).attempt, cluster.step(step).failures) for step in (SAMPLER, TEACHER)] == [
        (6, 1),
        (6, 1),
    ]


@pytest.mark.parametrize("step", TRIO)
def test_a_permanent_failure_of_one_fails_the_run_when_the_others_have_stopped(step: str) -> None:
    cluster = onpolicy_run()
    cluster.set_child_state("Failed", PERMANENT, step)
    others = [other for other in TRIO if other != step]
    decided = cluster.reconcile()
    assert deleted(decided) == [f"first-{other}-a1" for other in others]
    assert f"because step {step} failed (attempt 1): pod x, exit 65" in decided.status.message
    cluster.remove_children(*others)
    decided = cluster.reconcile()
    assert (decided.status.phase, decided.status.step, condition(decided, "Failed")) == (
        "Failed",
        step,
        ("True", "PermanentFailure"),
    )
    cluster.spec["runtime"] = {"attempts": 9}
    assert created(cluster.reconcile()) == [f"{each}-a2" for each in TRIO]


def test_a_stage_succeeds_if_training_succeeds_although_another_step_failed() -> None:
    cluster = onpolicy_run()
    cluster.set_child_state("Failed", PERMANENT, SAMPLER)
    cluster.reconcile()
    cluster.set_child_state("Succeeded", step=TRAINER)
    cluster.set_progress(progress(TRAINER, state="Succeeded", iteration=6, done=1000))
    cluster.remove_children(TEACHER)
    assert (cluster.reconcile().status.phase, [cluster.step(step).failures for step in TRIO]) == (
        "Succeeded",
        [0, 0, 0],
    )


def test_suspend_stops_all_three_and_resume_starts_them_together() -> None:
    cluster = onpolicy_run()
    cluster.spec["suspend"] = True
    assert deleted(cluster.reconcile()) == [f"first-{step}-a1" for step in TRIO]
    cluster.remove_children(SAMPLER, TRAINER)
    assert cluster.reconcile().status.phase == "Running", "a GPU is still held"
    cluster.remove_children(TEACHER)
    assert cluster.reconcile().status.phase == "Suspended"
    cluster.spec["suspend"] = False
    assert created(cluster.reconcile()) == [f"{step}-a2" for step in TRIO]
    assert [(cluster.step(step).failures, cluster.step(step).interruptions) for step in TRIO] == [(0, 0)] * 3


def test_a_stage_suspended_when_training_succeeds_is_not_started_again() -> None:
    cluster = onpolicy_run(evaluation=EVALUATED)
    cluster.spec["suspend"] = True
    cluster.set_child_state("Succeeded", step=TRAINER)
    cluster.set_progress(progress(TRAINER, state="Succeeded", iteration=6, done=1000))
    assert deleted(cluster.reconcile()) == [f"first-{step}-a1" for step in (SAMPLER, TEACHER)]
    cluster.remove_children(SAMPLER, TEACHER)
    assert (cluster.reconcile().status.phase, [cluster.step(step).state for step in TRIO]) == (
        "Suspended",
        ["Succeeded"] * 3,
    )
    cluster.spec["suspend"] = False
    assert created(cluster.reconcile()) == ["onpolicy-evaluate-a1"]


def test_a_trainer_that_waits_too_long_stalls_the_run_and_names_what_it_waits_for() -> None:
    cluster = onpolicy_run(runtime={"stalledAfter": "10m"})
    cluster.set_progress(progress(TRAINER, iteration=2, done=500, message="waits for rollouts of window 12"))
    cluster.reconcile()
    cluster.advance(599)
    assert condition(cluster.reconcile(), "Stalled")[0] == "False"
    cluster.advance(1)
    cluster.set_progress(progress(SAMPLER, done=1, message="window 1"))
    decided = cluster.reconcile()
    stalled = decided.status.condition("Stalled")
    assert stalled is not None
    assert condition(decided, "Stalled") == ("True", "NoProgress")
    assert (
        stalled.message
        == "onpolicy has made no progress since 2026-01-01 00:00:00 UTC: waits for rollouts of window 12"
    )
    cluster.set_progress(progress(TRAINER, iteration=2, done=600, message="step 3"))
    assert condition(cluster.reconcile(), "Stalled")[0] == "False"


def test_a_waiting_sampler_and_teacher_do_not_stall_the_run_while_training_progresses() -> None:
    cluster = onpolicy_run(runtime={"stalledAfter": "10m"})
    cluster.advance(600)
    cluster.set_progress(progress(TRAINER, iteration=2, done=500))
    assert condition(cluster.reconcile(), "Stalled")[0] == "False"


def test_a_sampler_that_cannot_start_is_reported_and_stalls_the_run() -> None:
    cluster = onpolicy_run(runtime={"stalledAfter": "10m"})
    cluster.set_progress(progress(TRAINER, iteration=2, done=500, message="waits for rollouts of window 12"))
    cluster.set_child_state("Waiting", step=SAMPLER, message="pod x cannot be scheduled: 0/1 nodes")
    cluster.reconcile()
    assert (
        cluster.status.message
        == "onpolicy: waits for rollouts of window 12; onpolicy-sampler: pod x cannot be scheduled: 0/1 nodes"
    )
    cluster.advance(600)
    cluster.set_progress(progress(TRAINER, iteration=2, done=600, message="waits for rollouts of window 13"))
    assert condition(cluster.reconcile(), "Stalled") == ("True", "PodPending")


def test_the_message_of_rescoring_names_the_stage_that_waits_for_it() -> None:
    cluster = training_run(stages=[ALL_KINDS[0], ONPOLICY, ALL_KINDS[1]])
    cluster.set_child_state("Succeeded", step="vanilla")
    cluster.set_progress(progress("vanilla", state="Succeeded", iteration=6, done=1000))
    assert (
        cluster.reconcile().status.message
        == "rescore: attempt 1 is running; stage onpolicy is waiting for it"
    )


def test_progress_counts_an_evaluation_as_one_percent_and_steps_beside_training_as_zero() -> None:
    cluster = onpolicy_run(evaluation=EVALUATED)
    run = observed_run(**cluster.spec).run
    assert run is not None
    cluster.set_progress(progress(TRAINER, iteration=2, done=500))
    cluster.set_progress(progress(SAMPLER, done=4))
    assert percent_done(run, cluster.reconcile().status) == "52%"
    cluster.set_child_state("Succeeded", step=TRAINER)
    cluster.set_progress(progress(TRAINER, state="Succeeded", iteration=6, done=1000))
    cluster.remove_children(SAMPLER, TEACHER)
    cluster.reconcile()
    assert percent_done(run, cluster.status) == "99%"


def test_reconciling_without_changes_keeps_the_status() -> None:
    cluster = onpolicy_run()
    before = cluster.reconcile().status
    cluster.advance(5)
    assert cluster.reconcile().status == before
