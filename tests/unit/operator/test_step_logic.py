"""Two steps of a run at work at once: each goes its own way, and together they make one headline."""

from datetime import timedelta
from typing import Any

import pytest
from distill_operator.actions import ClearBucket, Create, Delete, Finalizer
from distill_operator.gpu_scheduler import Decision
from distill_operator.observe import Child, ChildObservation, NameConflict, Observed
from distill_operator.plan import plan
from distill_operator.plan_builder import Plan
from distill_operator.pod_diagnosis import Failure
from distill_operator.step_progress import ProgressReading

from tests.fakes.simulated_cluster import (
    ADMITTED,
    ALL_KINDS,
    AWAY,
    ERROR,
    EVICTED,
    PERMANENT,
    SETTINGS,
    World,
    beside,
    live,
    progress,
    told,
    training,
)

TWO = ("rescore", "vanilla")


def created(decided: Plan) -> list[str]:
    return [f"{action.step}-a{action.attempt}" for action in decided.actions if isinstance(action, Create)]


def deleted(decided: Plan) -> list[str]:
    return [action.child.name for action in decided.actions if isinstance(action, Delete)]


def test_a_run_of_all_kinds_goes_from_its_first_look_to_succeeded() -> None:
    world = World({"stages": ALL_KINDS})
    assert created(world.look()) == ["preprocess-a1"]
    assert [step.message for step in world.status.steps[1:]] == [
        "waits for preprocess",
        "waits for preprocess",
        "waits for vanilla and rescore",
        "waits for rescored and rescore",
    ]
    world.becomes("Succeeded")
    world.tells(progress("preprocess", state="Succeeded", done=4))
    assert created(world.look()) == ["rescore-a1", "vanilla-a1"]
    assert (world.status.step, world.status.message) == (
        "vanilla",
        "vanilla: attempt 1 is being made as PyTorchJob first-vanilla-a1",
    )
    for step in TWO:
        world.becomes("Running", step=step)
    world.tells(progress("rescore", done=2, message="2 of 4 parts"))
    world.tells(progress("vanilla", iteration=3, done=500, tokensPerSecond=10.0, loss=2.5, message="step 3"))
    world.look()
    assert (world.status.step, world.status.message, world.status.progress) == (
        "vanilla",
        "vanilla: step 3",
        "22%",
    )
    assert (world.status.tokens_per_second, world.status.loss) == (10.0, 2.5)
    assert (world.step("rescore").parts_done, world.step("rescore").message) == (2, "2 of 4 parts")
    world.becomes("Succeeded", step="vanilla")
    world.tells(progress("vanilla", state="Succeeded", iteration=6, done=1000, loss=2.0))
    assert created(world.look()) == []
    assert (world.status.step, world.status.message) == (
        "rescore",
        "rescore: 2 of 4 parts; rescored waits for it",
    )
    assert (world.status.tokens_per_second, world.status.loss) == (None, 2.0), (
        "the loss of the latest optimizer step"
    )
    assert world.step("rescored").message == "waits for rescore"
    world.becomes("Succeeded", step="rescore")
    world.tells(progress("rescore", state="Succeeded", done=4))
    assert created(world.look()) == ["rescored-a1"]
    for step in ("rescored", "forced"):
        world.becomes("Succeeded", step=step)
        world.tells(progress(step, state="Succeeded", iteration=9, done=1000))
        world.look()
    assert (world.status.phase, world.status.progress, len(world.made)) == ("Succeeded", "100%", 5)


def test_vanilla_goes_on_where_rescoring_is_done_first() -> None:
    world = beside()
    world.becomes("Succeeded", step="rescore")
    world.tells(progress("rescore", state="Succeeded", done=4))
    assert created(world.look()) == []
    assert (world.status.phase, world.status.step, world.step("rescored").message) == (
        "Running",
        "vanilla",
        "waits for vanilla",
    )


def test_what_was_in_the_bucket_already_is_said_to_be_reused() -> None:
    world = beside()
    world.becomes("Succeeded", step="rescore")
    world.tells(progress("rescore", state="Succeeded", done=4, message="Reused"))
    world.look()
    assert (world.step("rescore").reused, world.step("rescore").message, world.step("preprocess").reused) == (
        True,
        "Reused",
        False,
    )


@pytest.mark.parametrize("after", [0, 1, 2], ids=["before any", "between the two", "after both"])
def test_an_operator_that_dies_while_it_makes_two_children_makes_each_once(after: int) -> None:
    world = World({"stages": ALL_KINDS})
    world.look()
    world.becomes("Succeeded")
    world.tells(progress("preprocess", state="Succeeded", done=4))
    world.look(crash_after=after)
    world.settle()
    assert world.made == ["first-preprocess-a1", "first-rescore-a1", "first-vanilla-a1"]
    assert sorted(world.alive()) == ["first-rescore-a1", "first-vanilla-a1"]


@pytest.mark.parametrize("step, other", [TWO, TWO[::-1]])
@pytest.mark.parametrize(
    "failure, failures, pause", [(ERROR, 1, 10), (EVICTED, 0, 0)], ids=["fails", "is evicted"]
)
def test_a_step_is_tried_again_by_itself_while_the_other_goes_on(
    step: str, other: str, failure: Failure, failures: int, pause: int
) -> None:
    world = beside()
    world.becomes("Failed", failure, step)
    decided = world.look()
    assert (decided.actions, decided.again) == ((), world.now + timedelta(seconds=pause))
    assert (world.step(step).state, world.step(step).failures, world.step(other).state) == (
        "Retrying",
        failures,
        "Running",
    )
    assert (world.status.phase, world.status.step) == ("Running", "vanilla"), (
        "the training step speaks, whatever it is doing"
    )
    assert told(decided, "Progressing") == ("True", "Retrying" if step == "vanilla" else "Running")
    world.wait(pause)
    assert created(world.look()) == [f"{step}-a2"]
    assert world.child(other).name.endswith("-a1")


def test_a_new_part_clears_the_failures_of_rescoring() -> None:
    world = beside()
    for attempt in range(1, 6):
        world.becomes("Failed", ERROR, "rescore")
        world.tells(progress("rescore", attempt, done=attempt))
        world.look()
        world.wait(60)
        world.look()
    assert (world.status.phase, world.step("rescore").attempt, world.step("rescore").failures) == (
        "Running",
        6,
        1,
    )


def test_a_pod_of_training_that_is_lost_costs_rescoring_nothing() -> None:
    world = beside()
    world.becomes("Waiting", step="vanilla", lost="first-vanilla-a1-master-0")
    assert deleted(world.look()) == ["first-vanilla-a1"]
    world.ends("vanilla")
    world.look()
    assert created(world.look()) == ["vanilla-a2"]
    assert (world.step("rescore").state, world.step("rescore").attempt) == ("Running", 1)


@pytest.mark.parametrize("first", TWO)
def test_suspend_stops_both_and_is_done_when_both_are_gone(first: str) -> None:
    world = beside()
    world.spec["suspend"] = True
    assert deleted(world.look()) == ["first-rescore-a1", "first-vanilla-a1"]
    world.ends(first)
    decided = world.look()
    (last,) = {*TWO} - {first}
    assert (decided.actions, decided.status.phase, told(decided, "Suspended")[0]) == (
        (),
        "Running",
        "False",
    ), "GPUs are still held"
    assert decided.status.message == f"{last}: stopping at a checkpoint"
    assert (world.step(first).state, world.step(last).state) == ("Suspended", "Running")
    world.ends(last)
    decided = world.look()
    assert (decided.status.phase, told(decided, "Suspended")) == ("Suspended", ("True", "Suspended"))
    assert world.settle().actions == ()
    world.spec["suspend"] = False
    world.verdict = Decision(False, "others hold them")
    assert (world.look().status.phase, [world.step(step).state for step in TWO]) == (
        "Queued",
        ["Queued", "Queued"],
    )
    world.verdict = ADMITTED
    assert created(world.look()) == ["rescore-a2", "vanilla-a2"]
    assert [(world.step(step).failures, world.step(step).interruptions) for step in TWO] == [(0, 0), (0, 0)]


def test_resumed_half_way_what_has_stopped_goes_on_while_the_other_still_stops() -> None:
    world = beside()
    world.spec["suspend"] = True
    world.look()
    world.ends("vanilla")
    world.look()
    world.spec["suspend"] = False
    assert created(world.look()) == ["vanilla-a2"]
    assert (world.status.phase, world.step("rescore").attempt) == ("Running", 1)
    world.ends("rescore")
    world.look()
    assert created(world.look()) == ["rescore-a2"]


def test_a_suspended_run_keeps_what_ends_meanwhile() -> None:
    world = beside()
    world.spec["suspend"] = True
    world.becomes("Succeeded", step="rescore")
    world.tells(progress("rescore", state="Succeeded", done=4))
    world.look()
    world.ends("vanilla")
    assert world.look().status.phase == "Suspended"
    world.spec["suspend"] = False
    assert created(world.look()) == ["vanilla-a2"]


def test_success_that_cannot_be_read_yet_is_not_deleted_by_suspend() -> None:
    world = beside()
    world.spec["suspend"] = True
    world.becomes("Succeeded", step="rescore")
    world.readings["rescore"] = AWAY
    assert deleted(world.look()) == ["first-vanilla-a1"]
    world.ends("vanilla")
    assert told(world.look(), "Progressing") == ("True", "StorageUnreachable")
    world.tells(progress("rescore", state="Succeeded", done=4))
    assert world.look().status.phase == "Suspended"
    assert world.step("rescore").state == "Succeeded"


def test_attempts_raised_while_the_others_still_stop_lets_all_go_on() -> None:
    world = beside()
    world.becomes("Failed", PERMANENT, "rescore")
    world.look()
    world.spec["runtime"] = {"attempts": 9}
    assert created(world.look()) == ["rescore-a2"]
    world.ends("vanilla")
    world.look()
    assert created(world.look()) == ["vanilla-a2"]
    assert (world.status.phase, world.step("vanilla").failures) == ("Running", 0)


def test_a_step_between_attempts_does_not_hold_up_a_failure() -> None:
    world = beside()
    world.becomes("Failed", ERROR, "vanilla")
    world.look()
    world.becomes("Failed", PERMANENT, "rescore")
    decided = world.look()
    assert (decided.status.phase, decided.status.step, world.step("vanilla").state) == (
        "Failed",
        "rescore",
        "Suspended",
    )
    world.wait(3600)
    assert world.settle().actions == ()


def test_a_child_that_is_not_there_yet_is_not_made_for_a_run_that_fails() -> None:
    world = beside()
    world.becomes("Failed", ERROR, "vanilla")
    world.look()
    world.wait(60)
    world.look(crash_after=0)
    world.becomes("Failed", PERMANENT, "rescore")
    assert (world.look().actions, world.status.phase, world.step("vanilla").state) == (
        (),
        "Failed",
        "Suspended",
    )


def test_a_deleted_run_waits_for_both_children_before_its_bucket_is_cleared() -> None:
    world = beside(deletionPolicy="Delete")
    world.deleting = True
    decided = world.look()
    assert deleted(decided) == ["first-rescore-a1", "first-vanilla-a1"]
    assert decided.status.message.startswith(
        "waiting for Job first-rescore-a1 and PyTorchJob first-vanilla-a1 to end"
    )
    world.ends("vanilla")
    assert world.look().actions == ()
    world.ends("rescore")
    assert world.look().actions == (ClearBucket(), Finalizer(False))


@pytest.mark.parametrize("step", TWO)
def test_a_run_is_stalled_where_either_step_is_and_speaks_of_training(step: str) -> None:
    world = beside(runtime={"stalledAfter": "10m"})
    world.wait(300)
    (other,) = {*TWO} - {step}
    world.tells(progress(other, done=1))
    world.look()
    world.wait(300)
    decided = world.look()
    stalled = decided.status.condition("Stalled")
    assert stalled is not None
    assert (told(decided, "Stalled"), stalled.message.split()[0]) == (("True", "NoProgress"), step)
    assert (decided.status.phase, decided.status.step) == ("Running", "vanilla")
    world.tells(progress(step, done=2))
    assert told(world.look(), "Stalled")[0] == "False"


def test_a_child_that_is_refused_or_whose_name_is_taken_keeps_only_its_own_step_waiting() -> None:
    world = World({"stages": ALL_KINDS})
    world.look()
    world.becomes("Succeeded")
    world.tells(progress("preprocess", state="Succeeded", done=4))
    world.look(crash_after=0)
    for sight, reason in (
        (ChildObservation(refused="403 quota"), "ChildRefused"),
        (ChildObservation(stranger=NameConflict("Job x is not ours", False)), "NameTaken"),
    ):
        seen = Observed(
            {
                "rescore": sight,
                "vanilla": ChildObservation(Child("PyTorchJob", "first-vanilla-a1", "uid", "Running")),
            }
        )
        decided = plan(live(world.status, **world.spec), seen, {}, None, SETTINGS, world.now)
        assert (told(decided, "Stalled"), told(decided, "Ready")) == (("True", reason), ("False", "Running"))
        assert created(decided) == (["rescore-a1"] if sight.refused else [])


def test_rescoring_is_watched_where_pytorchjobs_cannot_be() -> None:
    world = beside()
    world.backend_missing = True
    world.becomes("Succeeded", step="rescore")
    world.tells(progress("rescore", state="Succeeded", done=4))
    decided = world.look()
    assert (world.step("rescore").state, told(decided, "Stalled")) == (
        "Succeeded",
        ("True", "KubeflowMissing"),
    )
    assert (decided.actions, decided.status.phase, world.step("vanilla").state) == ((), "Running", "Running")


@pytest.mark.parametrize(
    "held, phase, message",
    [
        pytest.param(TWO, "Queued", "vanilla: ", id="both"),
        pytest.param(("vanilla",), "Running", "rescore: ", id="training"),
        pytest.param(("rescore",), "Running", "vanilla: ", id="rescoring"),
    ],
)
def test_kueue_admits_each_step_by_itself(held: tuple[str, ...], phase: str, message: str) -> None:
    world = beside(runtime={"queueName": "team", "backend": "Job"})
    for step in held:
        world.becomes("Waiting", step=step, held=True, why=f"Job first-{step}-a1 is suspended by its queue")
    decided = world.look()
    assert decided.status.phase == phase
    assert decided.status.message.startswith(message)
    assert [world.step(step).reason for step in TWO] == [
        "Held" if step in held else "Running" for step in TWO
    ]


def test_a_bucket_that_is_away_is_said_once_and_a_speed_stays_only_with_its_step() -> None:
    world = beside()
    world.tells(progress("vanilla", iteration=3, done=500, tokensPerSecond=10.0, loss=2.5))
    world.look()
    world.readings["rescore"] = AWAY
    assert told(world.look(), "StorageReachable") == ("False", "Unreachable")
    world.tells(AWAY)
    world.look()
    assert (world.status.tokens_per_second, world.status.loss) == (10.0, 2.5)
    world.readings["vanilla"] = progress("vanilla", state="Succeeded", iteration=6, done=1000, loss=2.0)
    world.becomes("Succeeded", step="vanilla")
    world.look()
    assert (world.status.step, world.status.tokens_per_second, world.status.loss) == ("rescore", None, 2.0)


def test_what_both_jobs_report_becomes_conditions() -> None:
    world = beside()
    said: list[dict[str, Any]] = [
        {"type": name, "status": "True", "reason": "Found"} for name in ("RouterCollapse", "TeacherSlow")
    ]
    world.tells(progress("vanilla", conditions=said[:1]))
    world.tells(progress("rescore", conditions=said[1:]))
    decided = world.look()
    assert (told(decided, "RouterCollapse"), told(decided, "TeacherSlow")) == (
        ("True", "Found"),
        ("True", "Found"),
    )


def test_a_look_that_finds_nothing_new_changes_no_byte_of_the_status() -> None:
    for world in (beside(), beside(runtime={"backend": "Job"}), training(stages=ALL_KINDS[2:])):
        before = world.look().status
        world.wait(5)
        assert world.look().status == before


def test_a_step_that_has_told_nothing_is_waited_for() -> None:
    world = beside()
    world.tells(ProgressReading(asked=True))
    decided = world.look()
    assert (decided.status.phase, decided.status.message) == ("Running", "vanilla: attempt 1 is running")
