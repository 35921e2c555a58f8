"""The step that measures the validity of a stage's checkpoints: it starts when the teacher's GPUs are free,
and ends with the training."""

import pytest
from distill_operator.actions import CreateChild, DeleteChild
from distill_operator.plan_builder import Plan
from distill_operator.run_status import percent_done

from tests.fakes.simulated_cluster import (
    ERROR,
    EVALUATED,
    EVICTED,
    PERMANENT,
    SimulatedCluster,
    observed_run,
    progress,
    training_run,
)

STOP = {"minValidity": 0.9}
VANILLA = {"name": "vanilla", "kind": "Vanilla", "tokens": 1000, "stop": STOP}
RESCORED = {"name": "rescored", "kind": "Rescored", "tokens": 1000, "stop": STOP}
VALIDITY = "vanilla-validity"


def created(decided: Plan) -> list[str]:
    return [
        f"{action.step}-a{action.attempt}" for action in decided.actions if isinstance(action, CreateChild)
    ]


def deleted(decided: Plan) -> list[str]:
    return [action.child.name for action in decided.actions if isinstance(action, DeleteChild)]


def run_with_two_stages() -> SimulatedCluster:
    return training_run(
        stages=[VANILLA, RESCORED],
        evaluation=EVALUATED,
        teacher={"model": "s3://models/teacher", "gpus": 1},
    )


def test_it_starts_when_rescoring_has_ended_and_ends_with_the_training() -> None:
    cluster = run_with_two_stages()
    assert cluster.alive_children() == ["first-rescore-a1", "first-vanilla-a1"]
    assert cluster.step(VALIDITY).message == "waiting for rescore"
    cluster.set_child_state("Succeeded", step="rescore")
    assert created(cluster.reconcile()) == [f"{VALIDITY}-a1"]
    assert cluster.gpus_in_use() == 3, "its GPU is the teacher's"
    cluster.set_child_state("Running", step=VALIDITY)
    cluster.set_progress(progress(VALIDITY, done=1, validity=0.7, message="Waiting for a checkpoint"))
    cluster.set_progress(progress("vanilla", iteration=2, done=500, message="step 2"))
    cluster.reconcile()
    assert (cluster.status.step, cluster.status.message) == ("vanilla", "vanilla: step 2")
    assert cluster.step(VALIDITY).validity == cluster.status.validity == 0.7
    cluster.set_child_state("Succeeded", step="vanilla")
    decided = cluster.reconcile()
    assert (created(decided), deleted(decided)) == ([], [f"first-{VALIDITY}-a1"]), "its GPU is not free yet"
    cluster.remove_children(VALIDITY)
    cluster.reconcile()
    assert (cluster.step(VALIDITY).state, cluster.step(VALIDITY).validity) == ("Succeeded", 0.7)
    assert cluster.alive_children() == ["first-vanilla-evaluate-a1"]
    cluster.set_child_state("Succeeded", step="vanilla-evaluate")
    cluster.reconcile()
    cluster.reconcile()
    assert cluster.alive_children() == ["first-rescored-validity-a1", "first-rescored-a1"]


def test_a_stage_that_ends_before_rescoring_is_never_measured() -> None:
    cluster = run_with_two_stages()
    cluster.set_child_state("Succeeded", step="vanilla")
    cluster.reconcile_repeatedly()
    assert (cluster.step(VALIDITY).state, cluster.step(VALIDITY).attempt) == ("Succeeded", 0)
    assert cluster.alive_children() == ["first-rescore-a1", "first-vanilla-evaluate-a1"]


@pytest.mark.parametrize("failure", [ERROR, EVICTED], ids=["fails", "is evicted"])
def test_it_is_retried_beside_the_training(failure: object) -> None:
    cluster = training_run(stages=[VANILLA], evaluation=EVALUATED)
    cluster.set_child_state("Failed", failure, VALIDITY)  # type: ignore[arg-type]
    cluster.reconcile()
    cluster.advance(30)
    assert created(cluster.reconcile()) == [f"{VALIDITY}-a2"]
    assert cluster.step("vanilla").attempt == 1


def test_a_permanent_failure_stops_the_training_at_a_checkpoint() -> None:
    cluster = training_run(stages=[VANILLA], evaluation=EVALUATED)
    cluster.set_child_state("Failed", PERMANENT, VALIDITY)
    assert deleted(cluster.reconcile()) == ["first-vanilla-a1"]
    cluster.remove_children("vanilla")
    cluster.reconcile()
    assert (cluster.status.phase, cluster.status.step) == ("Failed", VALIDITY)


def test_it_is_not_stalled_while_the_training_advances_and_counts_for_no_progress() -> None:
    cluster = training_run(stages=[VANILLA], evaluation=EVALUATED, runtime={"stalledAfter": "60s"})
    run = observed_run(**cluster.spec).run
    assert run is not None
    cluster.set_progress(progress("vanilla", iteration=1, done=500))
    cluster.reconcile()
    done = percent_done(run, cluster.status)
    cluster.set_progress(progress(VALIDITY, done=4))
    cluster.reconcile()
    assert percent_done(run, cluster.status) == done
    for iteration in range(2, 6):
        cluster.advance(40)
        cluster.set_progress(progress("vanilla", iteration=iteration, done=500 + iteration))
        decided = cluster.reconcile()
        stalled = decided.status.condition("Stalled")
        assert stalled is None or stalled.status == "False"


@pytest.mark.parametrize("gpus", [0, 1, 2])
def test_its_pod_has_one_gpu_of_the_teacher_or_none_if_the_teacher_has_none(gpus: int) -> None:
    cluster = training_run(
        stages=[VANILLA],
        evaluation=EVALUATED,
        teacher={"model": "s3://models/teacher", "gpus": gpus},
    )
    assert cluster.requested_gpus[f"first-{VALIDITY}-a1"] == min(1, gpus)
    assert cluster.gpus_in_use() <= 2 + gpus
