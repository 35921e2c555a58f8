"""Two steps that run at the same time: each is decided separately, and the run has one summary."""

from datetime import timedelta
from typing import Any

import pytest
from distill_operator.actions import ClearBucket, CreateChild, DeleteChild
from distill_operator.gpu_scheduler import Decision
from distill_operator.observe import ChildObservation, NameConflict, ObservedChild, ObservedChildren
from distill_operator.plan import plan
from distill_operator.plan_builder import Plan
from distill_operator.pod_diagnosis import Failure
from distill_operator.pod_records import ProgressReading

from tests.fakes.simulated_cluster import (
    ADMITTED,
    ALL_KINDS,
    ERROR,
    EVICTED,
    PERMANENT,
    SETTINGS,
    UNREADABLE,
    SimulatedCluster,
    condition,
    observed_run,
    progress,
    rescoring_run,
    training_run,
    waiting_run,
)

TWO = ("rescore", "vanilla")


def created(decided: Plan) -> list[str]:
    return [
        f"{action.step}-a{action.attempt}" for action in decided.actions if isinstance(action, CreateChild)
    ]


def deleted(decided: Plan) -> list[str]:
    return [action.child.name for action in decided.actions if isinstance(action, DeleteChild)]


def test_a_run_of_three_kinds_from_its_first_reconcile_to_succeeded() -> None:
    cluster = SimulatedCluster({"stages": ALL_KINDS})
    assert created(cluster.reconcile()) == ["preprocess-a1"]
    assert [step.message for step in cluster.status.steps[1:]] == [
        "waiting for preprocess",
        "waiting for preprocess",
        "waiting for vanilla and rescore",
        "waiting for rescored and rescore",
    ]
    cluster.set_child_state("Succeeded")
    cluster.set_progress(progress("preprocess", state="Succeeded", done=4))
    assert created(cluster.reconcile()) == []
    assert created(cluster.reconcile()) == ["rescore-a1", "vanilla-a1"]
    assert (cluster.status.step, cluster.status.message) == (
        "vanilla",
        "Creating PyTorchJob first-vanilla-a1 (attempt 1)",
    )
    for step in TWO:
        cluster.set_child_state("Running", step=step)
    cluster.set_progress(progress("rescore", done=2, message="2 of 4 parts"))
    cluster.set_progress(
        progress("vanilla", iteration=3, done=500, tokensPerSecond=10.0, loss=2.5, message="step 3")
    )
    cluster.reconcile()
    assert (cluster.status.step, cluster.status.message, cluster.status.progress) == (
        "vanilla",
        "vanilla: step 3",
        "22%",
    )
    assert (cluster.status.tokens_per_second, cluster.status.loss) == (10.0, 2.5)
    assert (cluster.step("rescore").parts_done, cluster.step("rescore").message) == (2, "2 of 4 parts")
    cluster.set_child_state("Succeeded", step="vanilla")
    cluster.set_progress(progress("vanilla", state="Succeeded", iteration=6, done=1000, loss=2.0))
    assert created(cluster.reconcile()) == []
    assert (cluster.status.step, cluster.status.message) == (
        "rescore",
        "rescore: 2 of 4 parts; stage rescored is waiting for it",
    )
    assert (cluster.status.tokens_per_second, cluster.status.loss) == (None, 2.0), (
        "the loss of the latest optimizer step"
    )
    assert cluster.step("rescored").message == "waiting for rescore"
    cluster.set_child_state("Succeeded", step="rescore")
    cluster.set_progress(progress("rescore", state="Succeeded", done=4))
    assert created(cluster.reconcile()) == ["rescored-a1"]
    for step in ("rescored", "forced"):
        cluster.set_child_state("Succeeded", step=step)
        cluster.set_progress(progress(step, state="Succeeded", iteration=9, done=1000))
        cluster.reconcile()
    assert (cluster.status.phase, cluster.status.progress, len(cluster.created)) == ("Succeeded", "100%", 5)


def test_vanilla_continues_if_rescoring_finishes_first() -> None:
    cluster = rescoring_run()
    cluster.set_child_state("Succeeded", step="rescore")
    cluster.set_progress(progress("rescore", state="Succeeded", done=4))
    assert created(cluster.reconcile()) == []
    assert (cluster.status.phase, cluster.status.step, cluster.step("rescored").message) == (
        "Running",
        "vanilla",
        "waiting for vanilla",
    )


def test_a_step_that_finds_its_output_in_the_bucket_is_reused() -> None:
    cluster = rescoring_run()
    cluster.set_child_state("Succeeded", step="rescore")
    cluster.set_progress(progress("rescore", state="Succeeded", done=4, message="Reused", reused=True))
    cluster.reconcile()
    assert (
        cluster.step("rescore").reused,
        cluster.step("rescore").message,
        cluster.step("preprocess").reused,
    ) == (
        True,
        "Reused",
        False,
    )


@pytest.mark.parametrize("after", [0, 1, 2], ids=["before any", "between the two", "after both"])
def test_an_operator_that_crashes_while_creating_two_children_creates_each_once(after: int) -> None:
    cluster = SimulatedCluster({"stages": ALL_KINDS})
    cluster.reconcile()
    cluster.set_child_state("Succeeded")
    cluster.set_progress(progress("preprocess", state="Succeeded", done=4))
    cluster.reconcile(crash_after=after)
    cluster.reconcile_repeatedly()
    assert cluster.created == ["first-preprocess-a1", "first-rescore-a1", "first-vanilla-a1"]
    assert sorted(cluster.alive_children()) == ["first-rescore-a1", "first-vanilla-a1"]


@pytest.mark.parametrize("step, other", [TWO, TWO[::-1]])
@pytest.mark.parametrize(
    "failure, failures, delay", [(ERROR, 1, 10), (EVICTED, 0, 0)], ids=["fails", "is evicted"]
)
def test_a_step_is_retried_while_the_other_continues(
    step: str, other: str, failure: Failure, failures: int, delay: int
) -> None:
    cluster = rescoring_run()
    cluster.set_child_state("Failed", failure, step)
    decided = cluster.reconcile()
    assert (decided.actions, decided.requeue_at) == ((), cluster.now + timedelta(seconds=delay))
    assert (cluster.step(step).state, cluster.step(step).failures, cluster.step(other).state) == (
        "Retrying",
        failures,
        "Running",
    )
    assert (cluster.status.phase, cluster.status.step) == ("Running", "vanilla"), (
        "the run's summary is that of the training step, whatever its state"
    )
    assert condition(decided, "Progressing") == ("True", "Retrying" if step == "vanilla" else "Running")
    cluster.advance(delay)
    assert created(cluster.reconcile()) == [f"{step}-a2"]
    assert cluster.child(other).name.endswith("-a1")


def test_a_new_part_clears_the_failures_of_rescoring() -> None:
    cluster = rescoring_run()
    for attempt in range(1, 6):
        cluster.set_child_state("Failed", ERROR, "rescore")
        cluster.set_progress(progress("rescore", attempt, done=attempt))
        cluster.reconcile()
        cluster.advance(60)
        cluster.reconcile()
    assert (cluster.status.phase, cluster.step("rescore").attempt, cluster.step("rescore").failures) == (
        "Running",
        6,
        1,
    )


def test_a_deleted_pod_of_training_does_not_affect_rescoring() -> None:
    cluster = rescoring_run()
    cluster.set_child_state("Waiting", step="vanilla", missing_pod="first-vanilla-a1-master-0")
    assert deleted(cluster.reconcile()) == ["first-vanilla-a1"]
    cluster.remove_children("vanilla")
    cluster.reconcile()
    assert created(cluster.reconcile()) == ["vanilla-a2"]
    assert (cluster.step("rescore").state, cluster.step("rescore").attempt) == ("Running", 1)


@pytest.mark.parametrize("first", TWO)
def test_a_run_is_suspended_when_both_children_are_gone(first: str) -> None:
    cluster = rescoring_run()
    cluster.spec["suspend"] = True
    assert deleted(cluster.reconcile()) == ["first-rescore-a1", "first-vanilla-a1"]
    cluster.remove_children(first)
    decided = cluster.reconcile()
    (last,) = {*TWO} - {first}
    assert (decided.actions, decided.status.phase, condition(decided, "Suspended")[0]) == (
        (),
        "Running",
        "False",
    ), "GPUs are still held"
    assert decided.status.message == f"{last}: stopping at a checkpoint"
    assert (cluster.step(first).state, cluster.step(last).state) == ("Suspended", "Running")
    cluster.remove_children(last)
    decided = cluster.reconcile()
    assert (decided.status.phase, condition(decided, "Suspended")) == ("Suspended", ("True", "Suspended"))
    assert cluster.reconcile_repeatedly().actions == ()
    cluster.spec["suspend"] = False
    cluster.decision = Decision(False, "others hold them")
    assert (cluster.reconcile().status.phase, [cluster.step(step).state for step in TWO]) == (
        "Queued",
        ["Queued", "Queued"],
    )
    cluster.decision = ADMITTED
    assert created(cluster.reconcile()) == ["rescore-a2", "vanilla-a2"]
    assert [(cluster.step(step).failures, cluster.step(step).interruptions) for step in TWO] == [
        (0, 0),
        (0, 0),
    ]


def test_a_stopped_step_of_a_resumed_run_continues_while_the_other_still_stops() -> None:
    cluster = rescoring_run()
    cluster.spec["suspend"] = True
    cluster.reconcile()
    cluster.remove_children("vanilla")
    cluster.reconcile()
    cluster.spec["suspend"] = False
    assert created(cluster.reconcile()) == ["vanilla-a2"]
    assert (cluster.status.phase, cluster.step("rescore").attempt) == ("Running", 1)
    cluster.remove_children("rescore")
    cluster.reconcile()
    assert created(cluster.reconcile()) == ["rescore-a2"]


def test_a_step_that_succeeds_while_the_run_is_suspended_is_recorded() -> None:
    cluster = rescoring_run()
    cluster.spec["suspend"] = True
    cluster.set_child_state("Succeeded", step="rescore")
    cluster.set_progress(progress("rescore", state="Succeeded", done=4))
    cluster.reconcile()
    cluster.remove_children("vanilla")
    assert cluster.reconcile().status.phase == "Suspended"
    cluster.spec["suspend"] = False
    assert created(cluster.reconcile()) == ["vanilla-a2"]


def test_raising_attempts_while_other_steps_stop_continues_all() -> None:
    cluster = rescoring_run()
    cluster.set_child_state("Failed", PERMANENT, "rescore")
    cluster.reconcile()
    cluster.spec["runtime"] = {"attempts": 9}
    assert created(cluster.reconcile()) == ["rescore-a2"]
    cluster.remove_children("vanilla")
    cluster.reconcile()
    assert created(cluster.reconcile()) == ["vanilla-a2"]
    assert (cluster.status.phase, cluster.step("vanilla").failures) == ("Running", 0)


def test_a_step_between_attempts_does_not_delay_a_failure() -> None:
    cluster = rescoring_run()
    cluster.set_child_state("Failed", ERROR, "vanilla")
    cluster.reconcile()
    cluster.set_child_state("Failed", PERMANENT, "rescore")
    decided = cluster.reconcile()
    assert (decided.status.phase, decided.status.step, cluster.step("vanilla").state) == (
        "Failed",
        "rescore",
        "Suspended",
    )
    cluster.advance(3600)
    assert cluster.reconcile_repeatedly().actions == ()


def test_a_child_that_does_not_exist_yet_is_not_created_for_a_run_that_fails() -> None:
    cluster = rescoring_run()
    cluster.set_child_state("Failed", ERROR, "vanilla")
    cluster.reconcile()
    cluster.advance(60)
    cluster.reconcile(crash_after=0)
    cluster.set_child_state("Failed", PERMANENT, "rescore")
    assert (cluster.reconcile().actions, cluster.status.phase, cluster.step("vanilla").state) == (
        (),
        "Failed",
        "Suspended",
    )


def test_a_deleted_run_waits_for_both_children_before_its_bucket_is_cleared() -> None:
    cluster = rescoring_run(deletionPolicy="Delete")
    cluster.deleting = True
    decided = cluster.reconcile()
    assert deleted(decided) == ["first-rescore-a1", "first-vanilla-a1"]
    assert decided.status.message.startswith(
        "Waiting for Job first-rescore-a1 and PyTorchJob first-vanilla-a1 to terminate"
    )
    cluster.remove_children("vanilla")
    assert cluster.reconcile().actions == ()
    cluster.remove_children("rescore")
    assert cluster.reconcile().actions == (ClearBucket(),)


@pytest.mark.parametrize("step", TWO)
def test_a_run_is_stalled_if_either_step_is_and_its_summary_is_that_of_training(step: str) -> None:
    cluster = rescoring_run(runtime={"stalledAfter": "10m"})
    cluster.advance(300)
    (other,) = {*TWO} - {step}
    cluster.set_progress(progress(other, done=1))
    cluster.reconcile()
    cluster.advance(300)
    decided = cluster.reconcile()
    stalled = decided.status.condition("Stalled")
    assert stalled is not None
    assert (condition(decided, "Stalled"), stalled.message.split()[0]) == (("True", "NoProgress"), step)
    assert (decided.status.phase, decided.status.step) == ("Running", "vanilla")
    cluster.set_progress(progress(step, done=2))
    assert condition(cluster.reconcile(), "Stalled")[0] == "False"


def test_a_child_that_is_rejected_or_whose_name_is_taken_blocks_only_its_own_step() -> None:
    cluster = waiting_run(stages=ALL_KINDS)
    cluster.reconcile(crash_after=0)
    for observation, reason in (
        (ChildObservation(create_error="403 quota"), "ChildRefused"),
        (ChildObservation(name_conflict=NameConflict("Job x is not ours", False)), "NameTaken"),
    ):
        seen = ObservedChildren(
            {
                "rescore": observation,
                "vanilla": ChildObservation(
                    ObservedChild("PyTorchJob", "first-vanilla-a1", "uid", "Running")
                ),
            }
        )
        decided = plan(observed_run(cluster.status, **cluster.spec), seen, {}, None, SETTINGS, cluster.now)
        assert (condition(decided, "Stalled"), condition(decided, "Ready")) == (
            ("True", reason),
            ("False", "Running"),
        )
        assert created(decided) == (["rescore-a1"] if observation.create_error else [])


def test_rescoring_is_monitored_if_pytorchjobs_are_not_available() -> None:
    cluster = rescoring_run()
    cluster.backend_missing = True
    cluster.set_child_state("Succeeded", step="rescore")
    cluster.set_progress(progress("rescore", state="Succeeded", done=4))
    decided = cluster.reconcile()
    assert (cluster.step("rescore").state, condition(decided, "Stalled")) == (
        "Succeeded",
        ("True", "KubeflowMissing"),
    )
    assert (decided.actions, decided.status.phase, cluster.step("vanilla").state) == (
        (),
        "Running",
        "Running",
    )


@pytest.mark.parametrize(
    "held, phase, message",
    [
        pytest.param(TWO, "Queued", "vanilla: ", id="both"),
        pytest.param(("vanilla",), "Running", "rescore: ", id="training"),
        pytest.param(("rescore",), "Running", "vanilla: ", id="rescoring"),
    ],
)
def test_kueue_admits_each_step_separately(held: tuple[str, ...], phase: str, message: str) -> None:
    cluster = rescoring_run(runtime={"queueName": "team", "backend": "Job"})
    for step in held:
        cluster.set_child_state(
            "Waiting", step=step, suspended=True, message=f"Job first-{step}-a1 is suspended until"
        )
    decided = cluster.reconcile()
    assert decided.status.phase == phase
    assert decided.status.message.startswith(message)
    assert [cluster.step(step).reason for step in TWO] == [
        "Held" if step in held else "Running" for step in TWO
    ]


def test_unreadable_progress_is_one_condition_and_speed_is_that_of_the_training_step() -> None:
    cluster = rescoring_run()
    cluster.set_progress(progress("vanilla", iteration=3, done=500, tokensPerSecond=10.0, loss=2.5))
    cluster.reconcile()
    cluster.readings["rescore"] = UNREADABLE
    assert condition(cluster.reconcile(), "ProgressReadable") == ("False", "Unreachable")
    cluster.set_progress(UNREADABLE)
    cluster.reconcile()
    assert (cluster.status.tokens_per_second, cluster.status.loss) == (10.0, 2.5)
    cluster.readings["vanilla"] = progress("vanilla", state="Succeeded", iteration=6, done=1000, loss=2.0)
    cluster.set_child_state("Succeeded", step="vanilla")
    cluster.reconcile()
    assert (cluster.status.step, cluster.status.tokens_per_second, cluster.status.loss) == (
        "rescore",
        None,
        2.0,
    )


def test_conditions_reported_by_both_jobs_are_conditions_of_the_run() -> None:
    cluster = rescoring_run()
    reported: list[dict[str, Any]] = [
        {"type": name, "status": "True", "reason": "Found"} for name in ("RouterCollapse", "TeacherSlow")
    ]
    cluster.set_progress(progress("vanilla", conditions=reported[:1]))
    cluster.set_progress(progress("rescore", conditions=reported[1:]))
    decided = cluster.reconcile()
    assert (condition(decided, "RouterCollapse"), condition(decided, "TeacherSlow")) == (
        ("True", "Found"),
        ("True", "Found"),
    )


def test_reconciling_without_changes_keeps_the_status() -> None:
    for cluster in (
        rescoring_run(),
        rescoring_run(runtime={"backend": "Job"}),
        training_run(stages=ALL_KINDS[2:]),
    ):
        before = cluster.reconcile().status
        cluster.advance(5)
        assert cluster.reconcile().status == before


def test_a_step_without_a_progress_report_is_running() -> None:
    cluster = rescoring_run()
    cluster.set_progress(ProgressReading(attempted=True))
    decided = cluster.reconcile()
    assert (decided.status.phase, decided.status.message) == ("Running", "vanilla: attempt 1 is running")
