"""The three of an OnPolicy stage, and what evaluates a stage: started together, restarted alone, ended together."""

from datetime import timedelta

import pytest
from distill_operator.actions import Create, Delete
from distill_operator.plan_builder import Plan
from distill_operator.pod_diagnosis import Failure
from distill_operator.share import share

from tests.fakes.simulated_cluster import (
    ALL_KINDS,
    ERROR,
    EVALUATED,
    EVICTED,
    ONPOLICY,
    PERMANENT,
    World,
    live,
    progress,
    together,
    told,
    training,
)

SAMPLER, TEACHER, TRAINER = TRIO = ("onpolicy-sampler", "onpolicy-teacher", "onpolicy")


def created(decided: Plan) -> list[str]:
    return [f"{action.step}-a{action.attempt}" for action in decided.actions if isinstance(action, Create)]


def deleted(decided: Plan) -> list[str]:
    return [action.child.name for action in decided.actions if isinstance(action, Delete)]


def test_a_stage_goes_from_its_first_look_to_evaluated() -> None:
    world = World({"stages": [ONPOLICY], "evaluation": EVALUATED})
    assert created(world.look()) == ["preprocess-a1"]
    world.becomes("Succeeded")
    world.tells(progress("preprocess", state="Succeeded", done=4))
    assert created(world.look()) == [f"{step}-a1" for step in TRIO], "in one plan"
    assert world.gpus() == 3
    for step in TRIO:
        world.becomes("Running", step=step)
    world.tells(progress(SAMPLER, done=3, message="window 3"))
    world.tells(progress(TEACHER, done=2, message="window 2"))
    world.tells(progress(TRAINER, iteration=2, done=500, tokensPerSecond=10.0, loss=2.5, message="step 2"))
    world.look()
    assert (world.status.step, world.status.message, world.status.tokens_per_second) == (
        TRAINER,
        "onpolicy: step 2",
        10.0,
    )
    assert [(world.step(step).parts_done, world.step(step).message) for step in (SAMPLER, TEACHER)] == [
        (3, "window 3"),
        (2, "window 2"),
    ]
    assert (world.step(TRAINER).tokens_total, world.step(SAMPLER).tokens_total) == (1000, None)
    for step, reading in zip(
        TRIO,
        [progress(SAMPLER, state="Succeeded", done=4), progress(TEACHER, state="Succeeded", done=4)],
        strict=False,
    ):
        world.becomes("Succeeded", step=step)
        world.tells(reading)
        assert created(world.look()) == [], "done early: the others go on"
    assert (world.status.phase, [world.step(step).state for step in TRIO]) == (
        "Running",
        ["Succeeded", "Succeeded", "Running"],
    )
    world.becomes("Succeeded", step=TRAINER)
    world.tells(progress(TRAINER, state="Succeeded", iteration=4, done=1000))
    assert created(world.look()) == ["onpolicy-evaluate-a1"]
    world.becomes("Succeeded", step="onpolicy-evaluate")
    words = "validity 83 % (low 90, medium 85, high 75), held-out reasoning 2.1, final 1.9"
    world.tells(progress("onpolicy-evaluate", state="Succeeded", done=4, message=words, validity=0.83))
    world.look()
    assert (world.status.phase, world.status.validity) == ("Succeeded", 0.83)
    assert (world.step("onpolicy-evaluate").message, world.step("onpolicy-evaluate").validity) == (
        words,
        0.83,
    )


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_an_operator_that_dies_while_it_makes_three_children_makes_each_once(after: int) -> None:
    world = World({"stages": [ONPOLICY]})
    world.look()
    world.becomes("Succeeded")
    world.tells(progress("preprocess", state="Succeeded", done=4))
    world.look(crash_after=after)
    world.settle()
    assert world.made[1:] == [f"first-{step}-a1" for step in TRIO] == world.alive()


@pytest.mark.parametrize("step", TRIO)
@pytest.mark.parametrize(
    "failure, failures, pause", [(ERROR, 1, 10), (EVICTED, 0, 0)], ids=["fails", "is evicted"]
)
def test_each_of_the_three_is_tried_again_alone(
    step: str, failure: Failure, failures: int, pause: int
) -> None:
    world = together()
    world.becomes("Failed", failure, step)
    decided = world.look()
    assert (decided.actions, decided.again) == ((), world.now + timedelta(seconds=pause))
    assert (world.step(step).state, world.step(step).failures, world.status.step) == (
        "Retrying",
        failures,
        TRAINER,
    )
    world.wait(pause)
    assert created(world.look()) == [f"{step}-a2"]
    assert [world.step(other).attempt for other in TRIO if other != step] == [1, 1]


def test_a_new_window_clears_the_failures_of_sampler_and_teacher() -> None:
    world = together()
    for attempt in range(1, 6):
        for step in (SAMPLER, TEACHER):
            world.becomes("Failed", ERROR, step)
            world.tells(progress(step, attempt, done=attempt))
        world.look()
        world.wait(60)
        world.look()
    assert [(world.step(step).attempt, world.step(step).failures) for step in (SAMPLER, TEACHER)] == [
        (6, 1),
        (6, 1),
    ]


@pytest.mark.parametrize("step", TRIO)
def test_one_that_fails_for_good_fails_the_run_once_the_others_have_stopped(step: str) -> None:
    world = together()
    world.becomes("Failed", PERMANENT, step)
    others = [other for other in TRIO if other != step]
    decided = world.look()
    assert deleted(decided) == [f"first-{other}-a1" for other in others]
    assert f"because step {step} failed (attempt 1): pod x, exit 65" in decided.status.message
    world.ends(*others)
    decided = world.look()
    assert (decided.status.phase, decided.status.step, told(decided, "Failed")) == (
        "Failed",
        step,
        ("True", "PermanentFailure"),
    )
    world.spec["runtime"] = {"attempts": 9}
    assert created(world.look()) == [f"{each}-a2" for each in TRIO]


def test_training_that_succeeds_while_the_others_fail_for_good_has_succeeded() -> None:
    world = together()
    world.becomes("Failed", PERMANENT, SAMPLER)
    world.look()
    world.becomes("Succeeded", step=TRAINER)
    world.tells(progress(TRAINER, state="Succeeded", iteration=6, done=1000))
    world.ends(TEACHER)
    assert (world.look().status.phase, [world.step(step).failures for step in TRIO]) == (
        "Succeeded",
        [0, 0, 0],
    )


def test_suspend_stops_all_three_and_they_go_on_together() -> None:
    world = together()
    world.spec["suspend"] = True
    assert deleted(world.look()) == [f"first-{step}-a1" for step in TRIO]
    world.ends(SAMPLER, TRAINER)
    assert world.look().status.phase == "Running", "a GPU is still held"
    world.ends(TEACHER)
    assert world.look().status.phase == "Suspended"
    world.spec["suspend"] = False
    assert created(world.look()) == [f"{step}-a2" for step in TRIO]
    assert [(world.step(step).failures, world.step(step).interruptions) for step in TRIO] == [(0, 0)] * 3


def test_suspended_as_training_succeeds_nothing_of_the_stage_is_made_again() -> None:
    world = together(evaluation=EVALUATED)
    world.spec["suspend"] = True
    world.becomes("Succeeded", step=TRAINER)
    world.tells(progress(TRAINER, state="Succeeded", iteration=6, done=1000))
    assert deleted(world.look()) == [f"first-{step}-a1" for step in (SAMPLER, TEACHER)]
    world.ends(SAMPLER, TEACHER)
    assert (world.look().status.phase, [world.step(step).state for step in TRIO]) == (
        "Suspended",
        ["Succeeded"] * 3,
    )
    world.spec["suspend"] = False
    assert created(world.look()) == ["onpolicy-evaluate-a1"]


def test_a_trainer_that_waits_for_long_stalls_the_run_and_says_what_for() -> None:
    world = together(runtime={"stalledAfter": "10m"})
    world.tells(progress(TRAINER, iteration=2, done=500, message="waits for rollouts of window 12"))
    world.look()
    world.wait(599)
    assert told(world.look(), "Stalled")[0] == "False"
    world.wait(1)
    world.tells(progress(SAMPLER, done=1, message="window 1"))
    decided = world.look()
    stalled = decided.status.condition("Stalled")
    assert stalled is not None
    assert told(decided, "Stalled") == ("True", "NoProgress")
    assert (
        stalled.message
        == "onpolicy has not got on since 2026-01-01 00:00:00 UTC: waits for rollouts of window 12"
    )
    world.tells(progress(TRAINER, iteration=2, done=600, message="step 3"))
    assert told(world.look(), "Stalled")[0] == "False"


def test_sampler_and_teacher_that_wait_for_a_trainer_that_gets_on_stall_nothing() -> None:
    world = together(runtime={"stalledAfter": "10m"})
    world.wait(600)
    world.tells(progress(TRAINER, iteration=2, done=500))
    assert told(world.look(), "Stalled")[0] == "False"


def test_the_run_tells_of_a_sampler_that_cannot_start_and_stalls() -> None:
    world = together(runtime={"stalledAfter": "10m"})
    world.tells(progress(TRAINER, iteration=2, done=500, message="waits for rollouts of window 12"))
    world.becomes("Waiting", step=SAMPLER, why="pod x cannot be placed: 0/1 nodes")
    world.look()
    assert (
        world.status.message
        == "onpolicy: waits for rollouts of window 12; onpolicy-sampler: pod x cannot be placed: 0/1 nodes"
    )
    world.wait(600)
    world.tells(progress(TRAINER, iteration=2, done=600, message="waits for rollouts of window 13"))
    assert told(world.look(), "Stalled") == ("True", "PodPending")


def test_rescoring_is_waited_for_by_the_stage() -> None:
    world = training(stages=[ALL_KINDS[0], ONPOLICY, ALL_KINDS[1]])
    world.becomes("Succeeded", step="vanilla")
    world.tells(progress("vanilla", state="Succeeded", iteration=6, done=1000))
    assert world.look().status.message == "rescore: attempt 1 is running; onpolicy waits for it"


def test_an_evaluation_is_a_hundredth_of_a_run_and_what_works_beside_training_nothing() -> None:
    world = together(evaluation=EVALUATED)
    run = live(**world.spec).run
    assert run is not None
    world.tells(progress(TRAINER, iteration=2, done=500))
    world.tells(progress(SAMPLER, done=4))
    assert share(run, world.look().status) == "52%"
    world.becomes("Succeeded", step=TRAINER)
    world.tells(progress(TRAINER, state="Succeeded", iteration=6, done=1000))
    world.ends(SAMPLER, TEACHER)
    world.look()
    assert share(run, world.status) == "99%"


def test_a_look_that_finds_nothing_new_changes_no_byte_of_the_status() -> None:
    world = together()
    before = world.look().status
    world.wait(5)
    assert world.look().status == before
