"""The operator's decisions: each line of plan()'s docstring, and what follows from failures, suspensions, deletions and finds."""

import random
from datetime import timedelta
from typing import Any

import pytest
from distill_operator.actions import ClearBucket, Create, Delete, DeleteRun, Finalizer, KeepBucket
from distill_operator.gpu_scheduler import Decision
from distill_operator.observe import ChildObservation, NameConflict, Observed
from distill_operator.plan import plan
from distill_operator.pod_diagnosis import Failure
from distill_operator.step_progress import ProgressReading

from tests.fakes.simulated_cluster import (
    ADMITTED,
    ALL_KINDS,
    AWAY,
    ERROR,
    EVALUATED,
    EVICTED,
    ONPOLICY,
    PERMANENT,
    RETRIABLE,
    SETTINGS,
    START,
    World,
    beside,
    live,
    progress,
    together,
    told,
    training,
)
from vpmoe.api.status import MESSAGE, Status


def test_a_run_goes_from_its_first_look_to_succeeded() -> None:
    world = World()
    assert world.look().actions == (Create("preprocess", 1),)
    assert (world.status.phase, world.status.step, world.status.steps[0].state) == (
        "Running",
        "preprocess",
        "Running",
    )
    world.becomes("Succeeded")
    world.tells(progress("preprocess", state="Succeeded", done=4))
    assert world.look().actions == (Create("vanilla", 1),)
    assert world.status.provenance is not None
    assert world.status.provenance.dataset is not None
    assert world.status.provenance.folder == "s3://vpmoe/here/runs/team/first-0a1b2c3d"
    world.becomes("Running")
    world.tells(progress("vanilla", iteration=3, done=500, tokensPerSecond=10.0, loss=2.5))
    world.look()
    assert (world.status.progress, world.status.loss, world.status.tokens_per_second) == ("52%", 2.5, 10.0)
    world.becomes("Succeeded")
    world.tells(progress("vanilla", state="Succeeded", iteration=6, done=1000, loss=2.0))
    decided = world.look()
    assert (world.status.phase, world.status.progress, world.made) == (
        "Succeeded",
        "100%",
        ["first-preprocess-a1", "first-vanilla-a1"],
    )
    assert told(decided, "Succeeded") == ("True", "Succeeded")
    assert told(decided, "Progressing")[0] == "False"


def test_the_status_says_all_six_conditions_with_the_generation() -> None:
    conditions = World().look().status.conditions
    assert [c.type for c in conditions] == [
        "Ready",
        "Progressing",
        "Suspended",
        "Stalled",
        "Failed",
        "Succeeded",
    ]
    assert {c.observed_generation for c in conditions} == {1}


def test_a_step_that_has_finished_is_never_made_again_even_when_its_child_is_gone() -> None:
    world = training()
    world.becomes("Succeeded")
    world.tells(progress("vanilla", state="Succeeded", iteration=6, done=1000))
    world.look()
    world.children.clear()
    world.settle()
    assert (world.status.phase, len(world.made)) == ("Succeeded", 2)


def test_a_step_whose_child_went_before_its_success_was_seen_is_not_made_again() -> None:
    world = training()
    world.children.clear()
    world.tells(progress("vanilla", state="Succeeded", iteration=6, done=1000))
    world.look()
    assert (world.status.phase, len(world.made)) == ("Succeeded", 2)


def test_no_child_is_made_before_status_names_it() -> None:
    world = World()
    decided = world.look(crash_after=0)
    assert world.status.steps[0].child is not None
    assert world.status.steps[0].child.name == "first-preprocess-a1"
    assert decided.actions == world.look().actions == (Create("preprocess", 1),), (
        "the next look carries out what was intended"
    )


@pytest.mark.parametrize(
    "verdict, phase",
    [pytest.param(ADMITTED, "Running", id="fits"), pytest.param(Decision(False, "no"), "Queued", id="not")],
)
def test_no_child_is_made_unless_the_run_is_admitted(verdict: Decision, phase: str) -> None:
    world = World(verdict=verdict)
    decided = world.look()
    assert (decided.status.phase, bool(decided.actions)) == (phase, verdict.admitted)
    assert decided.status.message == ("no" if phase == "Queued" else decided.status.message)


def test_a_run_that_can_never_fit_says_so() -> None:
    decided = World(verdict=Decision(False, "16 of 8", hopeless=True)).look()
    assert told(decided, "Stalled") == ("True", "PoolTooSmall")
    assert decided.status.phase == "Queued"


@pytest.mark.parametrize("ending", [True, False])
def test_no_child_is_made_while_another_object_has_its_name(ending: bool) -> None:
    world = World()
    world.look(crash_after=0)
    stranger = NameConflict("Job first-preprocess-a1 was not made by the operator", ending)
    decided = plan(
        live(world.status),
        Observed({"preprocess": ChildObservation(stranger=stranger)}),
        {},
        None,
        SETTINGS,
        START,
    )
    assert decided.actions == ()
    assert told(decided, "Stalled") == (("False", "NotStalled") if ending else ("True", "NameTaken"))
    assert "Job first-preprocess-a1 was not made by the operator" in decided.status.message


def test_a_child_that_the_api_server_refuses_is_told_and_asked_for_again() -> None:
    world = World()
    world.look(crash_after=0)
    seen = Observed({"preprocess": ChildObservation(refused="POST …/jobs: 403 exceeded quota")})
    decided = plan(live(world.status), seen, {}, None, SETTINGS, START)
    assert told(decided, "Stalled") == ("True", "ChildRefused")
    assert "exceeded quota" in decided.status.message
    assert decided.actions == (Create("preprocess", 1),)


def test_a_run_never_starts_without_the_pools_word() -> None:
    with pytest.raises(ValueError, match="nobody has asked"):
        plan(live(), Observed(), {}, None, SETTINGS, START)


def test_a_run_that_cannot_be_carried_out_never_starts() -> None:
    world = World({"nonsense": 1})
    decided = world.settle()
    assert (decided.status.phase, decided.actions, decided.status.started) == ("Failed", (), None)
    assert told(decided, "Failed") == ("True", "Invalid")
    assert "nonsense" in decided.status.message
    world.spec = {}
    assert world.look().actions == (Create("preprocess", 1),), "mended before it started, it runs"
    assert world.status.finished is None


def test_a_run_that_was_started_by_a_version_with_fewer_steps_goes_on_with_all() -> None:
    world = training(evaluation=EVALUATED)
    world.status = Status.model_validate(
        {**world.status.dump(), "steps": [step.dump() for step in world.status.steps[:2]]}
    )
    assert [step.name for step in world.look().status.steps] == ["preprocess", "vanilla", "vanilla-evaluate"]
    world.becomes("Succeeded")
    world.tells(progress("vanilla", state="Succeeded", iteration=6, done=1000))
    assert world.look().actions == (Create("vanilla-evaluate", 1),)


def test_a_run_that_becomes_invalid_while_it_runs_keeps_its_child() -> None:
    world = training()
    world.spec = {"nonsense": 1}
    decided = world.look()
    assert (decided.status.phase, decided.actions) == ("Running", ())
    assert told(decided, "Stalled") == ("True", "Invalid")


def test_a_finished_run_stays_as_it_is_except_that_a_failed_one_goes_on_when_attempts_is_raised() -> None:
    world = training(runtime={"attempts": 1})
    world.becomes("Failed", ERROR)
    world.look()
    failed = world.status
    assert failed.phase == "Failed"
    world.wait(3600)
    assert world.settle().actions == ()
    assert world.status == failed
    world.spec = {"runtime": {"attempts": 2}}
    assert world.look().actions == (Create("vanilla", 2),)
    assert (world.status.phase, world.status.finished) == ("Running", None)


def test_the_bucket_is_cleared_only_when_nothing_can_write_to_it_any_more() -> None:
    world = training(deletionPolicy="Delete")
    assert world.finalizer, "the finalizer is there before the first child"
    world.deleting = True
    child = world.child()
    assert [type(action) for action in world.look().actions] == [Delete]
    assert world.look().actions == (), "its pods are ending"
    del world.children[child.name]
    assert world.look().actions == (ClearBucket(), Finalizer(False))


def test_every_message_fits_into_the_status() -> None:
    world = training()
    world.becomes("Failed", Failure("Error", "x" * 5000))
    decided = world.look()
    assert max(len(c.message) for c in decided.status.conditions) <= MESSAGE
    assert len(decided.status.message) <= MESSAGE


STAGES: dict[str, dict[str, Any]] = {
    "Vanilla": {},
    "three kinds": {"stages": ALL_KINDS},
    "the teacher first": {"stages": [ALL_KINDS[2], ALL_KINDS[0], ALL_KINDS[1]]},
    "all kinds, evaluated": {"stages": [*ALL_KINDS, ONPOLICY], "evaluation": EVALUATED},
    "on-policy first": {"stages": [ONPOLICY, ALL_KINDS[1], {**ONPOLICY, "name": "again"}]},
}


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("seed", range(10))
def test_at_most_one_child_a_step_is_alive_and_it_is_the_one_that_status_names(
    seed: int, stages: str
) -> None:
    """Children that do as they like, an operator that dies anywhere, a user who suspends and resumes: and it always finishes.

    On the way no step starts before those that it needs, the living never ask for more GPUs than the run has (the world looks after
    both), and a run that has failed has nothing alive.
    """
    chance = random.Random(f"{stages}-{seed}")
    world = World({"runtime": {"attempts": 50}, **STAGES[stages]})
    iteration = 0
    for turn in range(400):
        calm = turn > 240
        world.verdict = ADMITTED if calm or chance.random() < 0.7 else Decision(False, "no")
        world.spec["suspend"] = not calm and chance.random() < 0.2
        world.look(crash_after=None if calm or chance.random() < 0.6 else chance.randrange(3))
        assert set(world.alive()) <= {
            step.child.name for step in world.status.running if step.child is not None
        }
        if world.status.phase == "Succeeded":
            break
        if world.status.phase == "Failed":
            assert not world.alive()
            world.spec["runtime"]["attempts"] += 1
        for step in world.status.steps:
            child = world.children.get(step.child.name) if step.child is not None else None
            if child is None or not child.alive:
                continue
            if child.state == "Ending" and chance.random() < 0.5:
                world.ends(step.name)
            elif child.state == "Waiting":
                world.becomes("Running", step=step.name)
            elif child.state == "Running":
                what = (
                    chance.choice(["run", "save", "save", "fail", "evict", "refuse", "vanish", "end"])
                    if not calm
                    else "end"
                )
                what = "run" if what == "end" and not calm and chance.random() < 0.8 else what
                iteration += what == "save"
                state = "Succeeded" if what == "end" else "Running"
                world.tells(
                    progress(step.name, step.attempt, state, iteration=iteration, done=min(iteration, 4))
                )
                if what in (ends := {"fail": ERROR, "evict": EVICTED, "refuse": PERMANENT}):
                    world.becomes("Failed", ends[what], step.name)
                elif what == "vanish":
                    world.ends(step.name)
                elif what == "end":
                    world.becomes("Succeeded", step=step.name)
        world.wait(70 if calm else chance.choice([0, 10, 70]))
    assert world.status.phase == "Succeeded"
    assert len(world.made) == len(set(world.made))


TRIO = ("onpolicy-sampler", "onpolicy-teacher", "onpolicy")
SHAPES = [
    pytest.param({}, {"rescore", "vanilla"}, 3, id="a teacher and two students"),
    pytest.param(
        {"teacher": {"model": "s3://models/t", "gpus": 3}}, {"rescore", "vanilla"}, 5, id="three teachers"
    ),
    pytest.param(
        {"student": {"shape": "tiny", "gpus": 4, "gpusPerPod": 1}}, {"rescore", "vanilla"}, 5, id="four pods"
    ),
    pytest.param(
        {"stages": [ALL_KINDS[2], ALL_KINDS[1]]}, {"forced"}, 3, id="the teacher's process and the students"
    ),
    pytest.param(
        {"stages": [ONPOLICY, *ALL_KINDS], "evaluation": EVALUATED},
        {*TRIO},
        3,
        id="sampler, teacher and trainer",
    ),
    pytest.param(
        {
            "stages": [{**ONPOLICY, "sampler": {"gpus": 3}}, ALL_KINDS[0]],
            "student": {"shape": "tiny", "gpus": 7},
            "training": {"sequenceLength": 512, "globalBatchTokens": 8192},
        },
        {*TRIO},
        8,
        id="three GPUs sample, one scores, four train",
    ),
    pytest.param(
        {"stages": [ALL_KINDS[1]], "student": {"shape": "tiny", "gpus": 4}},
        {"rescored"},
        4,
        id="never beside what needs it",
    ),
]


@pytest.mark.parametrize("spec, most, gpus", SHAPES)
def test_the_gpus_of_all_living_children_are_at_most_teacher_gpus_and_student_gpus(
    spec: dict[str, Any], most: set[str], gpus: int
) -> None:
    world = World({"stages": ALL_KINDS, **spec})
    seen: dict[int, set[str]] = {}
    while world.status.phase != "Succeeded":
        world.look()
        seen.setdefault(world.gpus(), {step.name for step in world.status.running})
        for step in world.status.running[::-1][:1]:  # the ones before stay alive beside it as long as may be
            world.becomes("Succeeded", step=step.name)
            world.tells(progress(step.name, step.attempt, "Succeeded", iteration=6, done=4))
    assert (max(seen), seen[max(seen)]) == (gpus, most)
    run = live(**world.spec).run
    assert run is not None
    assert max(seen) <= run.spec.teacher.gpus + run.spec.student.gpus


RESCORED = ["preprocess", "rescore", "vanilla", "vanilla-evaluate", "rescored"]


@pytest.mark.parametrize(
    "evaluated, done, started",
    [
        pytest.param(False, [], ["preprocess"], id="nothing is there"),
        pytest.param(False, ["preprocess"], ["rescore", "vanilla"], id="the data set"),
        pytest.param(False, ["preprocess", "vanilla"], ["rescore"], id="a student without scores"),
        pytest.param(False, ["preprocess", "rescore"], ["vanilla"], id="scores without a student"),
        pytest.param(False, ["preprocess", "rescore", "vanilla"], ["rescored"], id="both"),
        pytest.param(False, ["preprocess", "rescore", "vanilla", "rescored"], [*TRIO], id="three at once"),
        pytest.param(
            True,
            ["preprocess", "vanilla"],
            ["rescore", "vanilla-evaluate"],
            id="a student without scores, and not evaluated",
        ),
        pytest.param(True, RESCORED, ["rescored-evaluate"], id="the stage is trained"),
        pytest.param(True, [*RESCORED, "rescored-evaluate"], [*TRIO], id="the stage is evaluated"),
        pytest.param(True, [*RESCORED, "rescored-evaluate", *TRIO], ["onpolicy-evaluate"], id="all three"),
        pytest.param(
            True,
            [*RESCORED, "rescored-evaluate", *TRIO, "onpolicy-evaluate"],
            ["forced"],
            id="all but the last",
        ),
    ],
)
def test_no_step_starts_before_the_steps_that_it_needs_have_succeeded(
    evaluated: bool, done: list[str], started: list[str]
) -> None:
    spec = {
        "stages": [*ALL_KINDS[:2], ONPOLICY, ALL_KINDS[2]],
        **({"evaluation": EVALUATED} if evaluated else {}),
    }
    fresh = World(spec, verdict=Decision(False, "no")).look().status
    steps = [{**step.dump(), **({"state": "Succeeded"} if step.name in done else {})} for step in fresh.steps]
    world = World(spec, status=Status.model_validate({**fresh.dump(), "steps": steps}))
    assert [action.step for action in world.look().actions if isinstance(action, Create)] == started


@pytest.mark.parametrize("first, other", [("rescore", "vanilla"), ("vanilla", "rescore")])
def test_a_run_that_fails_has_failed_once_nothing_of_it_is_alive_with_its_first_cause(
    first: str, other: str
) -> None:
    world = beside()
    world.becomes("Failed", PERMANENT, first)
    decided = world.look()
    assert [(type(action), action.child.name) for action in decided.actions] == [
        (Delete, world.child(other).name)
    ]
    assert (decided.status.phase, told(decided, "Progressing")) == ("Running", ("True", "Stopping"))
    assert decided.status.message.startswith(
        f"{other}: stopping at a checkpoint, because step {first} failed (attempt 1): pod x, exit 65"
    )
    assert world.look().actions == (), "it saves its checkpoint"
    if other == "rescore":
        world.becomes("Failed", ERROR, other)
        world.spec["runtime"] = {"attempts": 1}
    else:
        world.ends(other)
    world.wait(1)
    decided = world.look()
    assert (decided.status.phase, decided.status.step, told(decided, "Failed")) == (
        "Failed",
        first,
        ("True", "PermanentFailure"),
    )
    assert decided.status.message == world.step(first).message
    assert world.step(other).state == ("Failed" if other == "rescore" else "Suspended")
    assert world.settle().actions == ()
    world.spec["runtime"] = {"attempts": 9}
    assert {action.step for action in world.look().actions if isinstance(action, Create)} == {first, other}
    assert (world.status.phase, world.status.finished, world.step(other).attempt) == ("Running", None, 2)


def test_what_worked_beside_training_that_has_succeeded_ends_and_counts_as_succeeded_once_it_has() -> None:
    world = together(evaluation=EVALUATED)
    world.becomes("Failed", ERROR, "onpolicy-teacher")
    world.look()
    assert world.step("onpolicy-teacher").state == "Retrying"
    world.becomes("Succeeded", step="onpolicy")
    world.tells(progress("onpolicy", state="Succeeded", iteration=6, done=1000))
    decided = world.look()
    assert [(type(action), action.child.name) for action in decided.actions] == [
        (Delete, "first-onpolicy-sampler-a1")
    ]
    assert [world.step(step).state for step in TRIO] == ["Running", "Succeeded", "Succeeded"]
    assert (decided.status.phase, decided.status.message) == (
        "Running",
        "onpolicy-sampler: training has succeeded: it ends",
    )
    world.wait(600)
    assert world.look().actions == (), "its pods hold their GPUs until they are gone, and nothing retries"
    world.ends("onpolicy-sampler")
    assert world.look().actions == (Create("onpolicy-evaluate", 1),)
    for step in TRIO:
        found = world.step(step)
        assert (found.state, found.attempt, found.failures, found.interruptions) == ("Succeeded", 1, 0, 0)


def test_failures_are_counted_and_wait_longer_each_time() -> None:
    world = training()
    pauses = []
    for attempt in (1, 2):
        world.becomes("Failed", ERROR)
        decided = world.look()
        assert decided.again is not None
        pauses.append((decided.again - world.now).total_seconds())
        assert decided.status.steps[1].state == "Retrying"
        assert world.look().actions == (), "not before its time"
        world.wait(60)
        assert world.look().actions == (Create("vanilla", attempt + 1),)
    world.becomes("Failed", ERROR)
    decided = world.look()
    assert pauses == [10, 20]
    assert (decided.status.phase, told(decided, "Failed")) == ("Failed", ("True", "AttemptsExhausted"))
    assert "attempt 3 of 3" in decided.status.message
    assert "exit 137 (killed)" in decided.status.message


def test_a_new_checkpoint_clears_the_failures() -> None:
    world = training()
    for attempt in range(1, 8):
        world.becomes("Failed", ERROR)
        world.tells(progress("vanilla", attempt, iteration=attempt))
        world.look()
        world.wait(60)
        world.look()
    assert (world.status.phase, world.status.steps[1].attempt, world.status.steps[1].failures) == (
        "Running",
        8,
        1,
    )


def test_a_new_part_clears_the_failures_of_preprocessing() -> None:
    world = World()
    world.look()
    for attempt in range(1, 5):
        world.becomes("Failed", ERROR)
        world.tells(progress("preprocess", attempt, done=attempt))
        world.look()
        world.wait(60)
        world.look()
    assert world.status.steps[0].failures == 1


def test_interruptions_do_not_count_and_the_first_one_waits_for_nothing() -> None:
    world = training(runtime={"attempts": 1})
    pauses = []
    for _ in range(4):
        world.becomes("Failed", EVICTED)
        decided = world.look()
        assert decided.again is not None
        pauses.append((decided.again - world.now).total_seconds())
        world.wait(60)
        world.look()
    assert pauses == [0, 20, 40, 60]
    assert (world.status.phase, world.status.steps[1].failures, world.status.steps[1].interruptions) == (
        "Running",
        0,
        4,
    )


def test_a_permanent_failure_is_not_retried_until_attempts_is_raised() -> None:
    world = training()
    world.becomes("Failed", PERMANENT)
    decided = world.look()
    assert told(decided, "Failed") == ("True", "PermanentFailure")
    world.spec = {"runtime": {"attempts": 4}}
    assert world.look().actions == (Create("vanilla", 2),)


@pytest.mark.parametrize(
    "reading, failures",
    [pytest.param(AWAY, 0, id="away"), pytest.param(ProgressReading(asked=True), 1, id="answers")],
)
def test_a_job_that_gave_up_on_the_bucket_counts_only_while_the_bucket_answers_us(
    reading: ProgressReading, failures: int
) -> None:
    world = training()
    world.becomes("Failed", RETRIABLE)
    world.tells(reading)
    world.look()
    assert world.status.steps[1].failures == failures


def test_a_bucket_that_is_away_changes_nothing_but_a_condition() -> None:
    world = training()
    world.tells(progress("vanilla", iteration=3, done=500, loss=2.5))
    known = world.look().status
    world.tells(AWAY)
    decided = world.look()
    assert told(decided, "StorageReachable") == ("False", "Unreachable")
    assert (decided.status.phase, decided.status.loss, decided.status.steps) == (
        "Running",
        known.loss,
        known.steps,
    )
    world.tells(progress("vanilla", iteration=3, done=500, loss=2.5))
    assert told(world.look(), "StorageReachable") == ("True", "Answered")


def test_a_child_that_succeeds_while_the_bucket_is_away_succeeds_when_it_is_back() -> None:
    world = training()
    world.becomes("Succeeded")
    world.tells(AWAY)
    assert world.look().status.phase == "Running"
    world.tells(progress("vanilla", state="Succeeded", iteration=6, done=1000))
    assert world.look().status.phase == "Succeeded"


def test_suspend_deletes_the_child_and_is_done_when_it_is_gone() -> None:
    world = training()
    name = world.child().name
    world.spec = {"suspend": True}
    assert [type(action) for action in world.look().actions] == [Delete]
    assert (world.status.phase, told(world.look(), "Suspended")[0]) == ("Running", "False"), (
        "its GPUs are not free yet"
    )
    del world.children[name]
    decided = world.look()
    assert (decided.status.phase, told(decided, "Suspended")) == ("Suspended", ("True", "Suspended"))
    assert world.settle().actions == ()


def test_resume_is_a_new_attempt_that_does_not_count_and_waits_for_gpus() -> None:
    world = training(runtime={"attempts": 1}, suspend=False)
    world.spec["suspend"] = True
    world.look()
    world.children.clear()
    world.look()
    world.spec["suspend"] = False
    world.verdict = Decision(False, "others hold them")
    assert world.look().status.phase == "Queued"
    world.verdict = ADMITTED
    assert world.look().actions == (Create("vanilla", 2),)
    assert world.status.steps[1].failures == 0


def test_resumed_while_it_still_stops_it_goes_on_as_soon_as_the_old_child_is_gone() -> None:
    world = training()
    name = world.child().name
    world.spec = {"suspend": True}
    world.look()
    world.spec = {}
    assert world.look().actions == (), "the old child still writes its checkpoint"
    del world.children[name]
    world.look()
    assert world.look().actions == (Create("vanilla", 2),)
    assert world.status.steps[1].failures == 0


@pytest.mark.parametrize("phase", ["fresh", "queued", "between attempts"])
def test_suspend_holds_a_run_that_has_no_child(phase: str) -> None:
    world = (
        World(verdict=Decision(False, "no"))
        if phase == "queued"
        else World()
        if phase == "fresh"
        else training()
    )
    if phase == "between attempts":
        world.becomes("Failed", ERROR)
    if phase != "fresh":
        world.look()
    world.spec = {"suspend": True}
    assert world.look().status.phase == "Suspended"
    world.wait(3600)
    assert world.settle().actions == ()


def test_a_failed_child_whose_pods_still_live_is_waited_for() -> None:
    world = training()
    world.becomes("Ending", why="pod first-vanilla-a1-worker-0 is ending")
    decided = world.look()
    assert (decided.actions, decided.status.phase) == ((), "Running")
    assert "worker-0 is ending" in decided.status.message


def test_a_pod_that_is_removed_while_it_runs_ends_the_attempt_and_counts_nothing() -> None:
    world = training(runtime={"attempts": 1})
    world.becomes("Waiting", lost="first-vanilla-a1-master-0")
    assert [type(action) for action in world.look().actions] == [Delete]
    assert world.look().actions == ()
    del world.children["first-vanilla-a1"]
    world.look()
    assert world.look().actions == (Create("vanilla", 2),)
    world.becomes("Waiting", lost="first-vanilla-a2-master-0")
    assert world.look().actions == (), "this one has not run yet"


@pytest.mark.parametrize(
    "state, reading, reason",
    [
        pytest.param("Running", progress("vanilla"), "NoProgress", id="hangs"),
        pytest.param("Running", AWAY, "StorageUnreachable", id="bucket away"),
        pytest.param("Waiting", ProgressReading(asked=True), "PodPending", id="pod pending"),
    ],
)
def test_stalled_says_why_a_step_does_not_get_on(state: Any, reading: ProgressReading, reason: str) -> None:
    world = training(runtime={"stalledAfter": "10m"})
    world.becomes(state, why="pod x cannot be placed: 0/1 nodes" if state == "Waiting" else "")
    world.tells(reading)
    assert world.look().again == world.now + timedelta(minutes=10)
    world.wait(599)
    assert told(world.look(), "Stalled")[0] == "False"
    world.wait(1)
    decided = world.look()
    assert told(decided, "Stalled") == ("True", reason)
    assert told(decided, "Progressing")[0] == "False"
    assert state != "Waiting" or "0/1 nodes" in decided.status.message
    world.becomes("Running", why="")
    world.tells(progress("vanilla", done=10))
    assert told(world.look(), "Stalled")[0] == "False"


def test_a_missing_kubeflow_stops_a_run_before_anything_is_spent_and_never_switches_the_backend() -> None:
    world = World(backend_missing=True)
    decided = world.look()
    assert (decided.actions, decided.status.phase, told(decided, "Stalled")) == (
        (),
        "Pending",
        ("True", "KubeflowMissing"),
    )
    world.backend_missing = False
    assert world.look().actions == (Create("preprocess", 1),)


def test_the_finalizer_follows_the_deletion_policy() -> None:
    world = World({"deletionPolicy": "Delete"})
    assert world.look().actions == (Finalizer(True), Create("preprocess", 1))
    world.spec = {"deletionPolicy": "Retain"}
    assert world.look().actions == (Finalizer(False),)


@pytest.mark.parametrize(
    "spec, actions",
    [
        pytest.param(
            {"deletionPolicy": "Retain"}, (Finalizer(False),), id="changed to Retain while deleting"
        ),
        pytest.param({"deletionPolicy": "Delete"}, (ClearBucket(), Finalizer(False)), id="Delete"),
    ],
)
def test_a_deleted_run_without_a_living_child(spec: dict[str, Any], actions: tuple[Any, ...]) -> None:
    world = World(spec, deleting=True, finalizer=True)
    assert world.look().actions == actions


def test_a_deleted_run_that_cannot_be_read_goes_without_its_bucket() -> None:
    world = World({"nonsense": 1}, deleting=True, finalizer=True)
    assert [type(action) for action in world.decide().actions] == [KeepBucket, Finalizer]


def test_a_deleted_run_without_finalizer_is_left_to_garbage_collection() -> None:
    world = training()
    world.deleting = True
    assert world.look().actions == ()


@pytest.mark.parametrize("failed", [False, True])
def test_a_finished_run_is_deleted_when_its_time_has_come(failed: bool) -> None:
    world = training(ttlAfterFinished="1h", runtime={"attempts": 1})
    world.becomes("Failed" if failed else "Succeeded", ERROR if failed else None)
    world.tells(progress("vanilla", state="Succeeded", iteration=6, done=1000))
    assert world.look().again == world.now + timedelta(hours=1)
    world.wait(3600)
    assert world.look().actions == (DeleteRun(),)


def test_children_of_old_attempts_are_removed() -> None:
    world = training()
    for attempt in range(1, 6):
        world.becomes("Failed", ERROR)
        world.tells(progress("vanilla", attempt, iteration=attempt))
        world.look()
        world.wait(60)
        world.look()
    kept = sorted(name for name in world.children if "vanilla" in name)
    assert kept == ["first-vanilla-a4", "first-vanilla-a5", "first-vanilla-a6"]


def test_kueue_admits_where_there_is_a_queue() -> None:
    world = World({"runtime": {"queueName": "team", "backend": "Job"}})
    world.look()
    world.becomes("Waiting", held=True, why="Job first-preprocess-a1 is suspended by its queue")
    assert world.look().status.phase == "Queued"
    world.becomes("Running", held=False, why="")
    assert world.look().status.phase == "Running"


def test_what_a_job_reports_becomes_a_condition_and_stays_until_it_says_otherwise() -> None:
    world = training()
    said = {"type": "RouterCollapse", "status": "True", "reason": "DeadExpert", "message": "layer 7"}
    world.tells(progress("vanilla", conditions=[said]))
    assert told(world.look(), "RouterCollapse") == ("True", "DeadExpert")
    world.tells(AWAY)
    assert told(world.look(), "RouterCollapse")[0] == "True"
    world.tells(progress("vanilla", conditions=[{**said, "status": "False"}]))
    assert told(world.look(), "RouterCollapse")[0] == "False"


def test_a_look_that_finds_nothing_new_changes_no_byte_of_the_status() -> None:
    world = training()
    world.tells(progress("vanilla", iteration=3, done=500, loss=2.5))
    before = world.look().status
    world.wait(5)
    assert world.look().status == before
    assert Status.model_validate(before.dump()) == before
