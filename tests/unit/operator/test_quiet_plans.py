"""A plan says when the next one may differ: without events nothing changes before `requeue_at`.

The operator reconciles a run only then, after an event, if a resync finds another version of an object, and
while it polls.
"""

import random
import secrets
from datetime import timedelta

import pytest
from distill_operator.gpu_scheduler import Decision, waits_for_gpus
from distill_operator.observe import ChildObservation, NameConflict, ObservedChild, ObservedChildren, State
from distill_operator.plan import plan
from distill_operator.plan_builder import Plan
from distill_operator.pod_records import PodAddress, ProgressReading

from tests.fakes.simulated_cluster import (
    ADMITTED,
    ALL_KINDS,
    ERROR,
    EVALUATED,
    EVICTED,
    ONPOLICY,
    PERMANENT,
    SETTINGS,
    UNREADABLE,
    SimulatedCluster,
    observed_run,
    onpolicy_run,
    progress,
    training_run,
    waiting_run,
)

FOR_EVER = timedelta(days=3)


def assert_quiet(cluster: SimulatedCluster, decided: Plan) -> None:
    """Plan again, at once and at the last moment before the requeue: nothing may be different."""
    if decided.actions:  # their results are events
        return
    if waits_for_gpus(observed_run(cluster.status, **cluster.spec), SETTINGS):  # admission requeues it
        return
    now, uptime = cluster.now, cluster.uptime
    left = decided.requeue_at - now if decided.requeue_at is not None else FOR_EVER
    for later in (timedelta(), left - timedelta(seconds=1)):
        if later >= timedelta() and later < left:
            cluster.now, cluster.uptime = now + later, uptime + later.total_seconds()
            again = cluster.plan()
            before = dict(decided.status)
            changed = {name: value for name, value in again.status if value != before[name]}
            assert (changed, again.actions) == ({}, ()), later
    cluster.now, cluster.uptime = now, uptime


ENDS = ("fail", "evict", "refuse", "vanish", "end")
SPECS = {
    "three kinds": {"stages": ALL_KINDS},
    "on-policy, evaluated": {"stages": [ONPOLICY, ALL_KINDS[0]], "evaluation": EVALUATED},
}


@pytest.mark.parametrize("on_stall", ["Report", "Restart"])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("index", range(3))
def test_nothing_changes_before_the_requeue(index: int, name: str, on_stall: str) -> None:
    """Over whole runs with everything that can happen to children. Often the next reconcile is at the time of
    the requeue, as in the operator, so that each timer acts.
    """
    seed = f"{secrets.randbelow(1 << 32)} {index}"
    print(f"seed {seed}")
    rng = random.Random(seed)
    runtime = {"attempts": 50, "interruptions": 100, "stalledAfter": "10m", "onStall": on_stall}
    cluster = SimulatedCluster({"runtime": runtime, **SPECS[name]})
    done = 0
    for _ in range(150):
        cluster.decision = ADMITTED if rng.random() < 0.8 else Decision(False, "no")
        cluster.spec["suspend"] = rng.random() < 0.1
        decided = cluster.reconcile()
        assert_quiet(cluster, decided)
        if cluster.status.phase == "Succeeded":
            break
        for step in cluster.status.steps:
            child = cluster.children.get(step.child.name) if step.child is not None else None
            if child is None or not child.alive or rng.random() < 0.4:
                continue
            states: dict[State, list[str]] = {
                "Ending": ["vanish", "stay"],
                "Waiting": ["run", "run", "hold", "wait"],
                "Running": ["save", "save", "work", "hide", "wait", *ENDS],
            }
            event = rng.choice(states.get(child.state, ["stay"]))
            done += event in ("save", "work")
            trains = step.name in ("onpolicy", *(stage["name"] for stage in ALL_KINDS))
            iteration = done if event == "save" and trains else 0
            report = progress(step.name, step.attempt, iteration=iteration, done=min(done, 4))
            lingering = rng.random() < 0.3
            if event == "vanish":
                cluster.remove_children(step.name)
            elif event in ("run", "wait", "hold"):
                state: State = "Running" if event == "run" else "Waiting"
                cluster.set_child_state(state, step=step.name, suspended=event == "hold")
            elif event == "hide":
                cluster.readings[step.name] = UNREADABLE
            elif event in ("save", "work"):
                cluster.set_progress(report)
            elif event in (failures := {"fail": ERROR, "evict": EVICTED, "refuse": PERMANENT}):
                cluster.set_child_state("Failed", failures[event], step.name, lingering=lingering)
            elif event == "end":
                cluster.set_progress(progress(step.name, step.attempt, "Succeeded", done=4))
                cluster.set_child_state("Succeeded", step=step.name, lingering=lingering)
        if decided.requeue_at is not None and rng.random() < 0.5:
            cluster.advance(max(0.0, (decided.requeue_at - cluster.now).total_seconds()))
        else:
            cluster.advance(rng.choice([0, 10, 70]))


def running(**changes: object) -> ObservedChild:
    """The child of a step that runs, with pods that are known."""
    return ObservedChild("Job", "j", "u", **{"state": "Running", **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "child, silently",
    [
        pytest.param(running(), False, id="runs, pods not listed"),
        pytest.param(running(pods=(PodAddress("p", "10.0.0.1"),)), False, id="runs, pods known"),
        pytest.param(running(pods=()), True, id="runs, no pod has an address"),
        pytest.param(running(hidden=True), True, id="runs, and its containers may end unseen"),
        pytest.param(running(lingering=True), True, id="kept alive by others"),
        pytest.param(running(state="Succeeded", lingering=True), True, id="succeeded, kept alive by others"),
        pytest.param(running(state="Waiting"), True, id="its pods do not run yet"),
        pytest.param(running(state="Waiting", suspended=True), False, id="waits in a queue"),
        pytest.param(running(state="Ending"), True, id="ends"),
        pytest.param(running(state="Ending", suspended=True), True, id="ends, suspended"),
        pytest.param(running(state="Succeeded"), False, id="has succeeded"),
        pytest.param(running(state="Failed"), False, id="has failed"),
    ],
)
def test_a_run_is_polled_while_its_child_may_change_without_an_event(
    child: ObservedChild, silently: bool
) -> None:
    assert child.changes_silently is silently
    cluster = training_run()
    cluster.children[cluster.child().name] = ObservedChild(
        **{**vars(child), "name": cluster.child().name, "failure": ERROR if child.state == "Failed" else None}
    )
    assert cluster.plan().poll is silently


def test_a_run_is_polled_while_another_object_has_the_name_of_its_child() -> None:
    cluster = training_run()
    observed = observed_run(cluster.status)
    for temporary in (True, False):
        found = ChildObservation(name_conflict=NameConflict("Job x is somebody's", temporary))
        readings: dict[str, ProgressReading] = {}
        decided = plan(
            observed, ObservedChildren({"vanilla": found}), readings, ADMITTED, SETTINGS, cluster.now
        )
        assert decided.poll


def test_a_run_is_polled_while_the_cluster_does_not_serve_its_backend() -> None:
    cluster = waiting_run()
    cluster.backend_missing = True
    assert cluster.reconcile().poll
    assert cluster.reconcile().poll
    cluster.spec["suspend"] = True
    assert not cluster.reconcile().poll, "it waits for nothing"


def test_a_run_is_polled_while_its_folder_is_deleted() -> None:
    cluster = training_run(deletionPolicy="Delete")
    cluster.reconcile()
    cluster.deleting = True
    assert cluster.reconcile_repeatedly(2).poll, "its child ends"
    cluster.remove_children()
    assert cluster.reconcile().poll
    cluster.set_clear_job("Running")
    assert cluster.reconcile().poll


@pytest.mark.parametrize("phase", ["Succeeded", "Failed", "Suspended"])
def test_a_run_that_has_ended_or_is_suspended_needs_no_reconcile(phase: str) -> None:
    cluster = training_run(runtime={"attempts": 1})
    if phase == "Suspended":
        cluster.spec["suspend"] = True
        cluster.reconcile_repeatedly(2)
        cluster.remove_children()
    else:
        cluster.set_child_state("Succeeded" if phase == "Succeeded" else "Failed", ERROR)
    decided = cluster.reconcile_repeatedly(3)
    assert cluster.status.phase == phase
    assert (decided.requeue_at, decided.poll) == (None, False)


def test_a_finished_run_that_expires_is_requeued_for_that_time_alone() -> None:
    cluster = training_run(ttlAfterFinished="1h")
    cluster.set_child_state("Succeeded")
    decided = cluster.reconcile_repeatedly(2)
    assert (decided.requeue_at, decided.poll) == (cluster.now + timedelta(hours=1), False)


@pytest.mark.parametrize("on_stall", ["Report", "Restart"])
def test_a_steady_step_is_requeued_only_for_the_time_at_which_it_would_be_stalled(on_stall: str) -> None:
    cluster = training_run(runtime={"stalledAfter": "30m", "onStall": on_stall})
    cluster.advance(600)
    decided = cluster.reconcile()
    assert (decided.requeue_at, decided.poll) == (cluster.now + timedelta(minutes=20), False)
    assert decided.status.condition("Stalled") is not None


def test_a_step_that_hangs_is_restarted_in_time_although_a_new_operator_watches_it_from_later_on() -> None:
    """It is Stalled since before the restart of the operator, but only what this process saw may end it."""
    cluster = training_run(runtime={"stalledAfter": "30m", "onStall": "Restart"})
    cluster.advance(3600)
    cluster.restart_operator()
    decided = cluster.reconcile()
    assert decided.actions == ()
    assert decided.requeue_at == cluster.now + timedelta(minutes=30)
    cluster.advance(1800)
    assert cluster.reconcile().actions


def test_the_teacher_of_a_hanging_trainer_is_requeued_for_its_own_time() -> None:
    cluster = onpolicy_run(runtime={"stalledAfter": "30m", "onStall": "Restart"})
    cluster.advance(600)
    cluster.set_progress(progress("onpolicy-teacher", done=1))
    decided = cluster.reconcile()
    assert decided.requeue_at == cluster.now + timedelta(minutes=20)
    cluster.advance(1200)
    decided = cluster.reconcile()
    assert decided.actions, "the trainer and its sampler are restarted"
    assert decided.requeue_at == cluster.now + timedelta(minutes=10)
