"""plan(): a test for each line of its docstring, then failures, suspension, deletion, expiry and
conditions."""

import random
from datetime import timedelta
from typing import Any

import pytest
from distill_operator.actions import (
    ClearBucket,
    CreateChild,
    DeleteChild,
    DeleteRun,
    KeepBucket,
    SetFinalizer,
)
from distill_operator.events import events_between
from distill_operator.gpu_scheduler import Decision, waits_for_gpus
from distill_operator.observe import ChildObservation, NameConflict, ObservedChildren, State
from distill_operator.plan import plan
from distill_operator.pod_diagnosis import Failure
from distill_operator.pod_records import ProgressReading

from tests.fakes.simulated_cluster import (
    ADMITTED,
    ALL_KINDS,
    ERROR,
    EVALUATED,
    EVICTED,
    ONPOLICY,
    PERMANENT,
    RETRIABLE,
    SETTINGS,
    START,
    UNREADABLE,
    SimulatedCluster,
    condition,
    observed_run,
    onpolicy_run,
    progress,
    rescoring_run,
    training_run,
    waiting_run,
)
from vpmoe.api.status import MESSAGE, ChildRef, Status


def test_a_run_from_its_first_reconcile_to_succeeded() -> None:
    cluster = SimulatedCluster()
    assert cluster.reconcile().actions == (CreateChild("preprocess", 1),)
    assert (cluster.status.phase, cluster.status.step, cluster.status.steps[0].state) == (
        "Running",
        "preprocess",
        "Running",
    )
    cluster.set_child_state("Succeeded")
    cluster.set_progress(progress("preprocess", state="Succeeded", done=4))
    assert cluster.reconcile().actions == (), "nothing is decided about its GPUs yet"
    assert (cluster.status.phase, cluster.status.holds_gpus) == ("Running", False)
    assert cluster.reconcile().actions == (CreateChild("vanilla", 1),)
    assert cluster.status.provenance is not None
    assert cluster.status.provenance.dataset is not None
    assert cluster.status.provenance.folder == "s3://vpmoe/here/runs/team/first-0a1b2c3d"
    cluster.set_child_state("Running")
    cluster.set_progress(progress("vanilla", iteration=3, done=500, tokensPerSecond=10.0, loss=2.5))
    cluster.reconcile()
    assert (cluster.status.progress, cluster.status.loss, cluster.status.tokens_per_second) == (
        "52%",
        2.5,
        10.0,
    )
    cluster.set_child_state("Succeeded")
    cluster.set_progress(progress("vanilla", state="Succeeded", iteration=6, done=1000, loss=2.0))
    decided = cluster.reconcile()
    assert (cluster.status.phase, cluster.status.progress, cluster.created) == (
        "Succeeded",
        "100%",
        ["first-preprocess-a1", "first-vanilla-a1"],
    )
    assert condition(decided, "Succeeded") == ("True", "Succeeded")
    assert condition(decided, "Progressing")[0] == "False"


def test_the_status_has_all_six_conditions_with_the_generation() -> None:
    conditions = SimulatedCluster().reconcile().status.conditions
    assert [c.type for c in conditions] == [
        "Ready",
        "Progressing",
        "Suspended",
        "Stalled",
        "Failed",
        "Succeeded",
    ]
    assert {c.observed_generation for c in conditions} == {1}


def test_a_finished_step_is_never_created_again_even_if_its_child_is_gone() -> None:
    cluster = training_run()
    cluster.set_child_state("Succeeded")
    cluster.set_progress(progress("vanilla", state="Succeeded", iteration=6, done=1000))
    cluster.reconcile()
    cluster.children.clear()
    cluster.reconcile_repeatedly()
    assert (cluster.status.phase, len(cluster.created)) == ("Succeeded", 2)


def test_a_step_whose_child_was_gone_before_its_success_was_observed_is_not_created_again() -> None:
    cluster = training_run()
    cluster.children.clear()
    cluster.set_progress(progress("vanilla", state="Succeeded", iteration=6, done=1000))
    cluster.reconcile()
    assert (cluster.status.phase, len(cluster.created)) == ("Succeeded", 2)


def test_no_child_is_created_before_status_names_it() -> None:
    cluster = SimulatedCluster()
    decided = cluster.reconcile(crash_after=0)
    assert cluster.status.steps[0].child is not None
    assert cluster.status.steps[0].child.name == "first-preprocess-a1"
    assert decided.actions == cluster.reconcile().actions == (CreateChild("preprocess", 1),), (
        "the next reconcile executes what the status intends"
    )


@pytest.mark.parametrize(
    "decision, phase",
    [pytest.param(ADMITTED, "Running", id="fits"), pytest.param(Decision(False, "no"), "Queued", id="not")],
)
def test_no_child_with_gpus_is_created_unless_the_run_is_admitted(decision: Decision, phase: str) -> None:
    cluster = waiting_run(decision)
    decided = cluster.reconcile()
    assert (decided.status.phase, bool(decided.actions)) == (phase, decision.admitted)
    assert decided.status.message == ("no" if phase == "Queued" else decided.status.message)


def test_a_run_is_preprocessed_without_gpus_whatever_the_queue_decides() -> None:
    cluster = SimulatedCluster(decision=Decision(False, "no"))
    assert cluster.reconcile().actions == (CreateChild("preprocess", 1),)
    for state in ("Waiting", "Running"):
        cluster.set_child_state(state, message="pod first-preprocess-a1-0 cannot be scheduled: no 64 CPUs")
        cluster.reconcile()
        assert (cluster.status.phase, cluster.status.holds_gpus) == ("Running", False)
    cluster.set_child_state("Failed", ERROR)
    assert cluster.reconcile().status.phase == "Running"
    assert cluster.reconcile().requeue_at == cluster.now + timedelta(seconds=10)
    assert not cluster.status.holds_gpus


def test_a_run_holds_its_gpus_from_the_first_step_that_needs_them_to_its_end() -> None:
    cluster = waiting_run(stages=ALL_KINDS, evaluation=EVALUATED)
    held = []
    while cluster.status.phase != "Succeeded":
        cluster.reconcile()
        held.append(cluster.status.holds_gpus)
        for step in cluster.status.running:
            cluster.set_progress(progress(step.name, state="Succeeded", iteration=1, done=4))
            cluster.set_child_state("Failed" if not step.failures else "Succeeded", ERROR, step.name)
        cluster.advance(60)
    assert held == [True] * (len(held) - 1) + [False], "through every retry and between the steps"


def test_a_run_that_is_too_large_for_the_pool_is_stalled() -> None:
    decided = waiting_run(Decision(False, "16 of 8", unschedulable=True)).reconcile()
    assert condition(decided, "Stalled") == ("True", "PoolTooSmall")
    assert decided.status.phase == "Queued"


def test_a_run_hears_that_it_is_too_large_for_the_pool_while_it_preprocesses() -> None:
    cluster = SimulatedCluster(decision=Decision(False, "16 of 8", unschedulable=True))
    decided = cluster.reconcile()
    assert decided.actions == (CreateChild("preprocess", 1),)
    assert (decided.status.phase, condition(decided, "Stalled")) == ("Running", ("True", "PoolTooSmall"))
    undecided = plan(observed_run(cluster.status), ObservedChildren(), {}, None, SETTINGS, START)
    assert condition(undecided, "Stalled") == ("True", "PoolTooSmall"), "an operator that has just started"
    cluster.decision = ADMITTED
    cluster.set_child_state("Succeeded")
    cluster.set_progress(progress("preprocess", state="Succeeded", done=4))
    cluster.reconcile()
    assert condition(cluster.reconcile(), "Stalled")[0] == "False"
    assert cluster.status.holds_gpus


@pytest.mark.parametrize(
    "chart, runtime, admitted",
    [
        pytest.param("Queued", {}, False, id="queued by the chart"),
        pytest.param("Queued", {"scheduling": "Immediate"}, True, id="immediate by the run"),
        pytest.param("Immediate", {}, True, id="immediate by the chart"),
        pytest.param("Immediate", {"scheduling": "Queued"}, False, id="queued by the run"),
        pytest.param("Queued", {"queueName": "team"}, True, id="Kueue admits it"),
        pytest.param("Immediate", {"scheduling": "Queued", "queueName": "team"}, True, id="Kueue, not we"),
    ],
)
def test_only_runs_with_scheduling_queued_wait_for_this_operators_queue(
    chart: str, runtime: dict[str, Any], admitted: bool
) -> None:
    settings = SETTINGS.model_copy(update={"scheduling": chart})
    cluster = waiting_run()
    decided = plan(
        observed_run(cluster.status, runtime=runtime), ObservedChildren(), {}, None, settings, cluster.now
    )
    assert decided.actions == ((CreateChild("vanilla", 1),) if admitted else ())


@pytest.mark.parametrize("ending", [True, False])
def test_no_child_is_created_while_another_object_has_its_name(ending: bool) -> None:
    cluster = SimulatedCluster()
    cluster.reconcile(crash_after=0)
    conflict = NameConflict("Job first-preprocess-a1 was not created by the operator", ending)
    decided = plan(
        observed_run(cluster.status),
        ObservedChildren({"preprocess": ChildObservation(name_conflict=conflict)}),
        {},
        None,
        SETTINGS,
        START,
    )
    assert decided.actions == ()
    assert condition(decided, "Stalled") == (("False", "NotStalled") if ending else ("True", "NameTaken"))
    assert "Job first-preprocess-a1 was not created by the operator" in decided.status.message


def test_no_step_ends_or_starts_again_while_its_child_may_appear_yet() -> None:
    """A request to create it had no answer: its pods would run beside those of the next attempt."""
    unseen = SimulatedCluster({"suspend": False})
    unseen.reconcile(crash_after=0)
    deleted, finished = training_run(), onpolicy_run()
    unseen.spec["suspend"] = True
    deleted.remove_children("vanilla")
    finished.remove_children("onpolicy-sampler")
    finished.set_child_state("Succeeded", step="onpolicy")
    for cluster, step, after in (
        (unseen, "preprocess", "Suspended"),
        (deleted, "vanilla", "Retrying"),
        (finished, "onpolicy-sampler", "Succeeded"),
    ):
        name = f"first-{step}-a1"
        cluster.may_appear = {name}
        decided = cluster.reconcile()
        assert not any(isinstance(action, CreateChild) for action in decided.actions)
        assert (cluster.step(step).state, decided.poll) == ("Running", True)
        assert f"{name} cannot appear any more" in cluster.step(step).message
        cluster.may_appear = set()
        cluster.reconcile()
        assert cluster.step(step).state == after


def test_the_bucket_is_not_cleared_while_a_child_may_appear_yet() -> None:
    cluster = training_run(deletionPolicy="Delete")
    cluster.remove_children("vanilla")
    cluster.deleting, cluster.may_appear = True, {"first-vanilla-a1"}
    decided = cluster.reconcile()
    assert (decided.actions, decided.poll) == ((), True)
    assert "a request to create one had no answer" in decided.status.message
    cluster.may_appear = set()
    assert cluster.reconcile().actions == (ClearBucket(),)


def test_a_child_that_the_api_server_rejects_is_reported_and_retried() -> None:
    cluster = SimulatedCluster()
    cluster.reconcile(crash_after=0)
    seen = ObservedChildren({"preprocess": ChildObservation(create_error="POST …/jobs: 403 exceeded quota")})
    decided = plan(observed_run(cluster.status), seen, {}, None, SETTINGS, START)
    assert condition(decided, "Stalled") == ("True", "ChildRefused")
    assert "exceeded quota" in decided.status.message
    assert decided.actions == (CreateChild("preprocess", 1),)


def test_a_run_never_starts_with_gpus_without_the_schedulers_decision() -> None:
    for cluster in (waiting_run(), training_run()):
        cluster.spec["suspend"] = True
        cluster.reconcile()
        cluster.children.clear()
        cluster.reconcile()
        cluster.spec["suspend"] = False
        decided = plan(observed_run(cluster.status), ObservedChildren(), {}, None, SETTINGS, START)
        assert (decided.actions, decided.status.holds_gpus) == ((), False)


def test_a_run_with_an_invalid_spec_never_starts() -> None:
    cluster = SimulatedCluster({"nonsense": 1})
    decided = cluster.reconcile_repeatedly()
    assert (decided.status.phase, decided.actions, decided.status.started) == ("Failed", (), None)
    assert condition(decided, "Failed") == ("True", "Invalid")
    assert "nonsense" in decided.status.message
    cluster.spec = {}
    assert cluster.reconcile().actions == (CreateChild("preprocess", 1),), (
        "a run whose spec is corrected before its start starts"
    )
    assert cluster.status.finished is None


def test_a_run_started_by_a_version_with_fewer_steps_gets_the_missing_ones() -> None:
    cluster = training_run(evaluation=EVALUATED)
    cluster.status = Status.model_validate(
        {**cluster.status.dump(), "steps": [step.dump() for step in cluster.status.steps[:2]]}
    )
    assert [step.name for step in cluster.reconcile().status.steps] == [
        "preprocess",
        "vanilla",
        "vanilla-evaluate",
    ]
    cluster.set_child_state("Succeeded")
    cluster.set_progress(progress("vanilla", state="Succeeded", iteration=6, done=1000))
    assert cluster.reconcile().actions == (CreateChild("vanilla-evaluate", 1),)


UPCYCLED: dict[str, Any] = {
    "student": {"shape": "tiny", "gpus": 2, "init": {"upcycle": {"model": "s3://models/dense"}}}
}


def test_the_first_stage_waits_for_its_initial_weights_which_are_made_beside_preprocessing() -> None:
    cluster = SimulatedCluster(UPCYCLED)
    assert cluster.reconcile().actions == (CreateChild("init", 1), CreateChild("preprocess", 1))
    assert [step.name for step in cluster.status.steps] == ["init", "preprocess", "vanilla"]
    cluster.set_child_state("Running", step="init")
    cluster.set_child_state("Succeeded", step="preprocess")
    cluster.set_progress(progress("preprocess", state="Succeeded", done=4))
    cluster.set_progress(progress("init", done=1, message="Writing file 2 of 4"))
    cluster.reconcile_repeatedly()
    assert cluster.step("vanilla").message == "waiting for init"
    assert (cluster.status.phase, cluster.status.holds_gpus) == ("Running", False)
    assert cluster.status.message == "init: Writing file 2 of 4; stage vanilla is waiting for it"
    cluster.set_child_state("Succeeded", step="init")
    cluster.set_progress(progress("init", state="Succeeded", done=4))
    cluster.reconcile()
    assert cluster.reconcile().actions == (CreateChild("vanilla", 1),)
    assert (cluster.step("init").state, cluster.step("init").parts_done) == ("Succeeded", 4)


def test_a_dense_model_that_cannot_be_used_fails_the_run_before_it_has_gpus() -> None:
    cluster = SimulatedCluster(UPCYCLED)
    cluster.reconcile()
    cluster.set_child_state("Failed", PERMANENT, step="init")
    cluster.reconcile_repeatedly()
    assert cluster.alive_children() == ["first-preprocess-a1"], "it stops first"
    cluster.remove_children()
    status = cluster.reconcile_repeatedly().status
    assert (status.phase, status.gpu_step_started, cluster.created) == (
        "Failed",
        False,
        ["first-init-a1", "first-preprocess-a1"],
    )
    assert status.message.startswith("step init failed (attempt 1): pod x, exit 65.")


EXPORTED: dict[str, Any] = {"export": {"stages": ["vanilla"]}}


def trained_run(**spec: Any) -> SimulatedCluster:
    """A run whose stage has succeeded just now."""
    cluster = training_run(**spec)
    cluster.set_child_state("Succeeded")
    cluster.set_progress(progress("vanilla", state="Succeeded", iteration=6, done=1000))
    return cluster


def test_an_export_starts_after_the_last_stage_and_the_run_releases_its_gpus() -> None:
    cluster = trained_run(**EXPORTED)
    cluster.decision = Decision(False, "no GPU is free")
    assert cluster.reconcile().actions == (CreateChild("vanilla-export", 1),)
    assert (cluster.status.phase, cluster.status.holds_gpus, cluster.gpus_in_use()) == ("Running", False, 0)
    assert not waits_for_gpus(observed_run(cluster.status, **cluster.spec), SETTINGS)
    cluster.set_child_state("Running")
    cluster.set_progress(progress("vanilla-export", done=1, message="Uploading config.json"))
    status = cluster.reconcile().status
    assert (status.step, status.progress, status.message) == (
        "vanilla-export",
        "99%",
        "vanilla-export: Uploading config.json",
    )
    cluster.set_child_state("Failed", ERROR)
    cluster.reconcile()
    cluster.advance(70)
    assert cluster.reconcile().actions == (CreateChild("vanilla-export", 2),), "it needs no admission either"
    cluster.set_child_state("Succeeded")
    model = "s3://vpmoe/here/runs/team/first-0a1b2c3d/models/vanilla"
    cluster.set_progress(progress("vanilla-export", 2, "Succeeded", done=4, model=model))
    status = cluster.reconcile().status
    assert (status.phase, status.model, status.step_status("vanilla-export").model) == (  # type: ignore[union-attr]
        "Succeeded",
        model,
        model,
    )
    assert status.message.endswith(f"Model: {model}")


REPORTED: dict[str, Any] = {
    "stages": [{"name": name, "kind": "Vanilla", "tokens": 1000} for name in ("vanilla", "second")],
    "runtime": {"report": True, "attempts": 1, "interruptions": 1},
}


def test_a_report_runs_beside_the_next_stage_and_the_last_one_ends_the_run() -> None:
    cluster = trained_run(**REPORTED)
    assert cluster.reconcile().actions == (CreateChild("vanilla-report", 1), CreateChild("second", 1))
    cluster.set_child_state("Running", step="second")
    cluster.set_child_state("Succeeded", step="vanilla-report")
    assert cluster.reconcile().status.step == "second", "people watch the step that trains"
    assert cluster.step("vanilla-report").state == "Succeeded"
    cluster.set_child_state("Succeeded", step="second")
    assert cluster.reconcile().actions == (CreateChild("second-report", 1),)
    assert (cluster.status.phase, cluster.status.holds_gpus) == ("Running", False)
    cluster.set_child_state("Succeeded", step="second-report")
    assert cluster.reconcile().status.phase == "Succeeded"


@pytest.mark.parametrize(
    "failure",
    [
        pytest.param(ERROR, id="error"),
        pytest.param(Failure("Permanent", "an object is damaged"), id="permanent"),
        pytest.param(Failure("Interrupted", "node drained"), id="interrupted"),
    ],
)
def test_a_report_that_fails_for_good_fails_no_run(failure: Failure) -> None:
    cluster = trained_run(**REPORTED)
    cluster.reconcile()
    cluster.set_child_state("Running", step="second")
    cluster.set_child_state("Failed", failure, step="vanilla-report")
    status = cluster.reconcile().status
    step = cluster.step("vanilla-report")
    assert (status.phase, status.step, step.state) == ("Running", "second", "Succeeded")
    assert failure.message in step.message
    assert step.message.endswith("The run goes on without it: vpmoe report makes it at any time.")
    cluster.set_child_state("Succeeded", step="second")
    cluster.reconcile()
    cluster.set_child_state("Failed", failure, step="second-report")
    assert cluster.reconcile().status.phase == "Succeeded"


NO_ROOM = "pod first-second-report-a1-x7 cannot be scheduled: 0/3 nodes are available: 3 Insufficient cpu."


def run_with_only_its_report_left(**runtime: Any) -> SimulatedCluster:
    """Its pod, the last one of the run, cannot be scheduled."""
    cluster = trained_run(**{**REPORTED, "runtime": {**REPORTED["runtime"], **runtime}})
    cluster.reconcile()
    for step in ("vanilla-report", "second"):
        cluster.set_child_state("Succeeded", step=step)
    cluster.reconcile()
    cluster.set_child_state("Waiting", step="second-report", message=NO_ROOM)
    cluster.reconcile()
    return cluster


def test_a_last_report_that_cannot_be_scheduled_stalls_the_run_and_says_what_it_waits_for() -> None:
    """As every pod that cannot be scheduled: Kubernetes fails none, because there may be room at any time."""
    cluster = run_with_only_its_report_left(stalledAfter="10m")
    assert NO_ROOM in cluster.status.message and not cluster.status.holds_gpus
    cluster.advance(600)
    before = cluster.status
    decided = cluster.reconcile()
    assert (decided.status.phase, condition(decided, "Stalled")) == ("Running", ("True", "PodPending"))
    stalled = decided.status.condition("Stalled")
    assert stalled is not None and NO_ROOM in stalled.message and "spec.runtime.report" in stalled.message
    (event,) = events_between(before, decided.status)
    assert (event.type, event.reason, event.message) == ("Warning", "PodPending", stalled.message)
    cluster.set_child_state("Succeeded", step="second-report")
    assert cluster.reconcile().status.phase == "Succeeded"


def test_a_started_run_goes_on_without_reports_when_it_is_told_to() -> None:
    """runtime.report may change while the run is suspended. The status then names steps that it lacks."""
    cluster = run_with_only_its_report_left()
    cluster.spec["suspend"] = True
    assert cluster.reconcile().actions == (
        DeleteChild(ChildRef(kind="Job", name="first-second-report-a1", uid=cluster.child().uid)),
    )
    cluster.remove_children("second-report")
    assert cluster.reconcile().status.phase == "Suspended"
    cluster.spec |= {"suspend": False, "runtime": {**REPORTED["runtime"], "report": False}}
    decided = cluster.reconcile()
    assert (decided.actions, decided.status.phase) == ((), "Succeeded")
    assert [step.name for step in decided.status.steps] == ["preprocess", "vanilla", "second"]


def test_of_several_exported_stages_the_status_names_the_model_of_the_latest() -> None:
    cluster = SimulatedCluster({"stages": ALL_KINDS[:2], "export": {"stages": ["rescored", "vanilla"]}})
    for _ in range(12):
        cluster.reconcile()
        for step in cluster.status.running[::-1]:
            name = step.name
            more = {"model": f"s3://vpmoe/{name}"} if name.endswith("-export") else {}
            cluster.set_child_state("Succeeded", step=name)
            cluster.set_progress(progress(name, step.attempt, "Succeeded", iteration=6, done=4, **more))
    assert (cluster.status.phase, cluster.status.model) == ("Succeeded", "s3://vpmoe/rescored-export")
    assert cluster.created[-2:] == ["first-vanilla-export-a1", "first-rescored-export-a1"]


def test_a_run_of_a_version_without_exports_gets_one_unless_it_has_succeeded() -> None:
    """A run that trains, or has failed, exports its last stage in the end. One that has succeeded does not
    change."""
    older = training_run()
    assert [step.name for step in older.status.steps] == ["preprocess", "vanilla"]
    older.spec = {"export": {}}
    assert [step.name for step in older.reconcile().status.steps] == [
        "preprocess",
        "vanilla",
        "vanilla-export",
    ]
    assert older.status.holds_gpus
    older.set_child_state("Succeeded")
    older.set_progress(progress("vanilla", state="Succeeded", iteration=6, done=1000))
    assert older.reconcile().actions == (CreateChild("vanilla-export", 1),)

    ended = trained_run()
    ended.reconcile()
    succeeded = ended.status
    assert succeeded.phase == "Succeeded"
    ended.spec = {"export": {}}
    assert ended.reconcile_repeatedly().actions == ()
    assert ended.status == succeeded

    failed = training_run(runtime={"attempts": 1})
    failed.set_child_state("Failed", ERROR)
    assert failed.reconcile().status.phase == "Failed"
    failed.spec = {"export": {}, "runtime": {"attempts": 1}}
    decided = failed.reconcile_repeatedly()
    assert (decided.status.phase, decided.actions) == ("Failed", ())
    failed.spec = {"export": {}, "runtime": {"attempts": 2}}
    assert failed.reconcile().actions == (CreateChild("vanilla", 2),)


def test_a_suspended_export_frees_nothing_and_continues_without_gpus() -> None:
    cluster = trained_run(**EXPORTED)
    cluster.reconcile()
    cluster.set_child_state("Running")
    cluster.spec["suspend"] = True
    assert [type(action) for action in cluster.reconcile().actions] == [DeleteChild]
    cluster.remove_children("vanilla-export")
    assert cluster.reconcile().status.phase == "Suspended"
    cluster.spec["suspend"], cluster.decision = False, Decision(False, "no GPU is free")
    assert cluster.reconcile().actions == (CreateChild("vanilla-export", 2),)


def test_a_run_that_becomes_invalid_while_it_runs_keeps_its_child() -> None:
    cluster = training_run()
    cluster.spec = {"nonsense": 1}
    decided = cluster.reconcile()
    assert (decided.status.phase, decided.actions) == ("Running", ())
    assert condition(decided, "Stalled") == ("True", "Invalid")


def test_a_finished_run_does_not_change_except_that_a_failed_one_continues_if_attempts_is_raised() -> None:
    cluster = training_run(runtime={"attempts": 1})
    cluster.set_child_state("Failed", ERROR)
    cluster.reconcile()
    failed = cluster.status
    assert failed.phase == "Failed"
    cluster.advance(3600)
    assert cluster.reconcile_repeatedly().actions == ()
    assert cluster.status == failed
    cluster.spec = {"runtime": {"attempts": 2}}
    assert cluster.reconcile().actions == (CreateChild("vanilla", 2),)
    assert (cluster.status.phase, cluster.status.finished) == ("Running", None)


def test_the_bucket_is_cleared_only_when_nothing_can_write_to_it_any_more() -> None:
    cluster = training_run(deletionPolicy="Delete")
    assert cluster.has_finalizer, "the finalizer is set before the first child is created"
    cluster.deleting = True
    child = cluster.child()
    assert [type(action) for action in cluster.reconcile().actions] == [DeleteChild]
    assert cluster.reconcile().actions == (), "the child's pods are terminating"
    del cluster.children[child.name]
    assert cluster.reconcile().actions == (ClearBucket(),)


def test_every_message_fits_into_the_status() -> None:
    cluster = training_run()
    cluster.set_child_state("Failed", Failure("Error", "x" * 5000))
    decided = cluster.reconcile()
    assert max(len(c.message) for c in decided.status.conditions) <= MESSAGE
    assert len(decided.status.message) <= MESSAGE


STAGES: dict[str, dict[str, Any]] = {
    "Vanilla": {},
    "three kinds": {"stages": ALL_KINDS},
    "the teacher first": {"stages": [ALL_KINDS[2], ALL_KINDS[0], ALL_KINDS[1]]},
    "all kinds, evaluated": {"stages": [*ALL_KINDS, ONPOLICY], "evaluation": EVALUATED},
    "exported": {"stages": [*ALL_KINDS[:2], ONPOLICY], "export": {"stages": ["vanilla", "onpolicy"]}},
    "on-policy first": {"stages": [ONPOLICY, ALL_KINDS[1], {**ONPOLICY, "name": "again"}]},
}


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("seed", range(14))
def test_at_most_one_child_per_step_is_alive_and_it_is_the_one_that_status_names(
    seed: int, stages: str
) -> None:
    """The run always succeeds, although children end at random, some only when their pods are deleted, the
    operator crashes at random and a user suspends and resumes the run. With the last seeds, requests to
    create children are carried out late.

    SimulatedCluster asserts that no step starts before the steps that it needs, and that the children alive
    never request more GPUs than the run has. A Failed run has no child alive.
    """
    rng = random.Random(f"{stages}-{seed}")
    cluster = SimulatedCluster({"runtime": {"attempts": 50}, **STAGES[stages]})
    iteration, late = 0, seed >= 10
    for reconcile in range(400):
        undisturbed = reconcile > 240
        cluster.unanswered = lambda: late and not undisturbed and rng.random() < 0.4  # noqa: B023
        while cluster.late and (undisturbed or rng.random() < 0.3):
            cluster.deliver(rng.random() < 0.7)
        cluster.decision = ADMITTED if undisturbed or rng.random() < 0.7 else Decision(False, "no")
        cluster.spec["suspend"] = not undisturbed and rng.random() < 0.2
        cluster.reconcile(crash_after=None if undisturbed or rng.random() < 0.6 else rng.randrange(3))
        assert set(cluster.alive_children()) <= {
            step.child.name for step in cluster.status.running if step.child is not None
        }
        if cluster.status.phase == "Succeeded":
            break
        if cluster.status.phase == "Failed":
            assert not cluster.alive_children()
            cluster.spec["runtime"]["attempts"] += 1
        for step in cluster.status.steps:
            child = cluster.children.get(step.child.name) if step.child is not None else None
            if child is None or not child.alive:
                continue
            if child.state == "Ending" and rng.random() < 0.5:
                cluster.remove_children(step.name)
            elif child.state == "Waiting":
                cluster.set_child_state("Running", step=step.name)
            elif child.state == "Running":
                event = (
                    rng.choice(["run", "save", "save", "fail", "evict", "refuse", "vanish", "end"])
                    if not undisturbed
                    else "end"
                )
                event = "run" if event == "end" and not undisturbed and rng.random() < 0.8 else event
                iteration += event == "save"
                state = "Succeeded" if event == "end" else "Running"
                cluster.set_progress(
                    progress(step.name, step.attempt, state, iteration=iteration, done=min(iteration, 4))
                )
                lingering = rng.random() < 0.3  # a sidecar keeps its pods alive until the child is deleted
                if event in (failures := {"fail": ERROR, "evict": EVICTED, "refuse": PERMANENT}):
                    cluster.set_child_state("Failed", failures[event], step.name, lingering=lingering)
                elif event == "vanish":
                    cluster.remove_children(step.name)
                elif event == "end":
                    cluster.set_child_state("Succeeded", step=step.name, lingering=lingering)
        cluster.advance(70 if undisturbed else rng.choice([0, 10, 70]))
    assert cluster.status.phase == "Succeeded"
    assert late or len(cluster.created) == len(set(cluster.created))


TRIO = ("onpolicy-sampler", "onpolicy-teacher", "onpolicy")
SHAPES = [
    pytest.param({}, {"rescore", "vanilla"}, 3, id="one teacher and two students"),
    pytest.param(
        {"teacher": {"model": "s3://models/t", "gpus": 3}}, {"rescore", "vanilla"}, 5, id="three teachers"
    ),
    pytest.param(
        {"student": {"shape": "tiny", "gpus": 4, "gpusPerPod": 1}}, {"rescore", "vanilla"}, 5, id="four pods"
    ),
    pytest.param(
        {"stages": [ALL_KINDS[2], ALL_KINDS[1]]}, {"forced"}, 3, id="a student with its teacher's process"
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
    pytest.param({"rescore": {"gpus": 3}}, {"rescore"}, 3, id="rescoring on all GPUs, before the stages"),
    pytest.param(
        {"stages": [ALL_KINDS[1]], "student": {"shape": "tiny", "gpus": 4}},
        {"rescored"},
        4,
        id="rescoring and the stage that needs it",
    ),
]


@pytest.mark.parametrize("spec, steps_at_most, gpus", SHAPES)
def test_the_children_alive_use_at_most_teacher_gpus_and_student_gpus(
    spec: dict[str, Any], steps_at_most: set[str], gpus: int
) -> None:
    cluster = SimulatedCluster({"stages": ALL_KINDS, **spec})
    seen: dict[int, set[str]] = {}
    while cluster.status.phase != "Succeeded":
        cluster.reconcile()
        seen.setdefault(cluster.gpus_in_use(), {step.name for step in cluster.status.running})
        for step in cluster.status.running[::-1][
            :1
        ]:  # the earlier ones stay alive beside it as long as possible
            cluster.set_child_state("Succeeded", step=step.name)
            cluster.set_progress(progress(step.name, step.attempt, "Succeeded", iteration=6, done=4))
    assert (max(seen), seen[max(seen)]) == (gpus, steps_at_most)
    run = observed_run(**cluster.spec).run
    assert run is not None
    assert max(seen) <= run.spec.teacher.gpus + run.spec.student.gpus


RESCORED = ["preprocess", "rescore", "vanilla", "vanilla-evaluate", "rescored"]


@pytest.mark.parametrize(
    "evaluated, succeeded, started",
    [
        pytest.param(False, [], ["preprocess"], id="new"),
        pytest.param(False, ["preprocess"], ["rescore", "vanilla"], id="dataset"),
        pytest.param(False, ["preprocess", "vanilla"], ["rescore"], id="a student without scores"),
        pytest.param(False, ["preprocess", "rescore"], ["vanilla"], id="scores without a student"),
        pytest.param(False, ["preprocess", "rescore", "vanilla"], ["rescored"], id="scores and student"),
        pytest.param(
            False, ["preprocess", "rescore", "vanilla", "rescored"], [*TRIO], id="before the on-policy stage"
        ),
        pytest.param(
            True,
            ["preprocess", "vanilla"],
            ["rescore", "vanilla-evaluate"],
            id="a student without scores, and not evaluated",
        ),
        pytest.param(True, RESCORED, ["rescored-evaluate"], id="stage trained"),
        pytest.param(True, [*RESCORED, "rescored-evaluate"], [*TRIO], id="stage evaluated"),
        pytest.param(
            True, [*RESCORED, "rescored-evaluate", *TRIO], ["onpolicy-evaluate"], id="on-policy stage trained"
        ),
        pytest.param(
            True,
            [*RESCORED, "rescored-evaluate", *TRIO, "onpolicy-evaluate"],
            ["forced"],
            id="all but the last",
        ),
    ],
)
def test_no_step_starts_before_the_steps_that_it_needs_have_succeeded(
    evaluated: bool, succeeded: list[str], started: list[str]
) -> None:
    spec = {
        "stages": [*ALL_KINDS[:2], ONPOLICY, ALL_KINDS[2]],
        **({"evaluation": EVALUATED} if evaluated else {}),
    }
    fresh = SimulatedCluster(spec, decision=Decision(False, "no")).reconcile().status
    steps = [
        {**step.dump(), **({"state": "Succeeded"} if step.name in succeeded else {})} for step in fresh.steps
    ]
    cluster = SimulatedCluster(spec, status=Status.model_validate({**fresh.dump(), "steps": steps}))
    assert [
        action.step for action in cluster.reconcile().actions if isinstance(action, CreateChild)
    ] == started


@pytest.mark.parametrize("first, other", [("rescore", "vanilla"), ("vanilla", "rescore")])
def test_a_failing_run_is_failed_only_when_none_of_its_children_is_alive_with_the_first_cause(
    first: str, other: str
) -> None:
    cluster = rescoring_run()
    cluster.set_child_state("Failed", PERMANENT, first)
    decided = cluster.reconcile()
    assert [(type(action), action.child.name) for action in decided.actions] == [
        (DeleteChild, cluster.child(other).name)
    ]
    assert (decided.status.phase, condition(decided, "Progressing")) == ("Running", ("True", "Stopping"))
    assert decided.status.message.startswith(
        f"{other}: stopping at a checkpoint, because step {first} failed (attempt 1): pod x, exit 65"
    )
    assert cluster.reconcile().actions == (), "the other step is saving its checkpoint"
    if other == "rescore":
        cluster.set_child_state("Failed", ERROR, other)
        cluster.spec["runtime"] = {"attempts": 1}
    else:
        cluster.remove_children(other)
    cluster.advance(1)
    decided = cluster.reconcile()
    assert (decided.status.phase, decided.status.step, condition(decided, "Failed")) == (
        "Failed",
        first,
        ("True", "PermanentFailure"),
    )
    assert decided.status.message == cluster.step(first).message
    assert cluster.step(other).state == ("Failed" if other == "rescore" else "Suspended")
    assert cluster.reconcile_repeatedly().actions == ()
    cluster.spec["runtime"] = {"attempts": 9}
    assert {action.step for action in cluster.reconcile().actions if isinstance(action, CreateChild)} == {
        first,
        other,
    }
    assert (cluster.status.phase, cluster.status.finished, cluster.step(other).attempt) == (
        "Running",
        None,
        2,
    )


def test_when_training_has_succeeded_the_steps_beside_it_are_stopped_and_then_count_as_succeeded() -> None:
    cluster = onpolicy_run(evaluation=EVALUATED)
    cluster.set_child_state("Failed", ERROR, "onpolicy-teacher")
    cluster.reconcile()
    assert cluster.step("onpolicy-teacher").state == "Retrying"
    cluster.set_child_state("Succeeded", step="onpolicy")
    cluster.set_progress(progress("onpolicy", state="Succeeded", iteration=6, done=1000))
    decided = cluster.reconcile()
    assert [(type(action), action.child.name) for action in decided.actions] == [
        (DeleteChild, "first-onpolicy-sampler-a1")
    ]
    assert [cluster.step(step).state for step in TRIO] == ["Running", "Succeeded", "Succeeded"]
    assert (decided.status.phase, decided.status.message) == (
        "Running",
        "onpolicy-sampler: stopping, because training has succeeded",
    )
    cluster.advance(600)
    assert cluster.reconcile().actions == (), (
        "the sampler's pods hold their GPUs until they are gone, and no step is retried"
    )
    cluster.remove_children("onpolicy-sampler")
    assert cluster.reconcile().actions == (CreateChild("onpolicy-evaluate", 1),)
    for step in TRIO:
        found = cluster.step(step)
        assert (found.state, found.attempt, found.failures, found.interruptions) == ("Succeeded", 1, 0, 0)


def test_failures_are_counted_and_retried_after_increasing_delays() -> None:
    cluster = training_run()
    delays = []
    for attempt in (1, 2):
        cluster.set_child_state("Failed", ERROR)
        decided = cluster.reconcile()
        assert decided.requeue_at is not None
        delays.append((decided.requeue_at - cluster.now).total_seconds())
        assert decided.status.steps[1].state == "Retrying"
        assert cluster.reconcile().actions == (), "no attempt before retryAt"
        cluster.advance(60)
        assert cluster.reconcile().actions == (CreateChild("vanilla", attempt + 1),)
    cluster.set_child_state("Failed", ERROR)
    decided = cluster.reconcile()
    assert delays == [10, 20]
    assert (decided.status.phase, condition(decided, "Failed")) == ("Failed", ("True", "AttemptsExhausted"))
    assert "attempt 3 of 3" in decided.status.message
    assert "exit 137 (killed)" in decided.status.message


def test_a_new_checkpoint_clears_the_failures() -> None:
    cluster = training_run()
    for attempt in range(1, 8):
        cluster.set_child_state("Failed", ERROR)
        cluster.set_progress(progress("vanilla", attempt, iteration=attempt))
        cluster.reconcile()
        cluster.advance(60)
        cluster.reconcile()
    assert (cluster.status.phase, cluster.status.steps[1].attempt, cluster.status.steps[1].failures) == (
        "Running",
        8,
        1,
    )


def test_a_new_part_clears_the_failures_of_preprocessing() -> None:
    cluster = SimulatedCluster()
    cluster.reconcile()
    for attempt in range(1, 5):
        cluster.set_child_state("Failed", ERROR)
        cluster.set_progress(progress("preprocess", attempt, done=attempt))
        cluster.reconcile()
        cluster.advance(60)
        cluster.reconcile()
    assert cluster.status.steps[0].failures == 1


def test_interruptions_are_not_failures_and_the_first_is_retried_at_once() -> None:
    cluster = training_run(runtime={"attempts": 1})
    delays = []
    for _ in range(4):
        cluster.set_child_state("Failed", EVICTED)
        decided = cluster.reconcile()
        assert decided.requeue_at is not None
        delays.append((decided.requeue_at - cluster.now).total_seconds())
        cluster.advance(60)
        cluster.reconcile()
    assert delays == [0, 20, 40, 60]
    assert (
        cluster.status.phase,
        cluster.status.steps[1].failures,
        cluster.status.steps[1].interruptions,
    ) == (
        "Running",
        0,
        4,
    )


def test_a_permanent_failure_is_not_retried_until_attempts_is_raised() -> None:
    cluster = training_run()
    cluster.set_child_state("Failed", PERMANENT)
    decided = cluster.reconcile()
    assert condition(decided, "Failed") == ("True", "PermanentFailure")
    cluster.spec = {"runtime": {"attempts": 4}}
    assert cluster.reconcile().actions == (CreateChild("vanilla", 2),)


@pytest.mark.parametrize("reading", [UNREADABLE, ProgressReading(attempted=True)], ids=["unreadable", "none"])
def test_a_retriable_error_of_a_job_is_a_failure(reading: ProgressReading) -> None:
    cluster = training_run()
    cluster.set_child_state("Failed", RETRIABLE)
    cluster.set_progress(reading)
    cluster.reconcile()
    assert cluster.status.steps[1].failures == 1


def test_a_run_is_suspended_when_its_deleted_child_is_gone() -> None:
    cluster = training_run()
    name = cluster.child().name
    cluster.spec = {"suspend": True}
    assert [type(action) for action in cluster.reconcile().actions] == [DeleteChild]
    assert (cluster.status.phase, condition(cluster.reconcile(), "Suspended")[0]) == ("Running", "False"), (
        "the child's GPUs are not free yet"
    )
    del cluster.children[name]
    decided = cluster.reconcile()
    assert (decided.status.phase, condition(decided, "Suspended")) == ("Suspended", ("True", "Suspended"))
    assert cluster.reconcile_repeatedly().actions == ()


def test_resume_waits_for_gpus_and_starts_an_attempt_without_counting_a_failure() -> None:
    cluster = training_run(runtime={"attempts": 1}, suspend=False)
    cluster.spec["suspend"] = True
    cluster.reconcile()
    cluster.children.clear()
    cluster.reconcile()
    cluster.spec["suspend"] = False
    cluster.decision = Decision(False, "others hold them")
    assert cluster.reconcile().status.phase == "Queued"
    cluster.decision = ADMITTED
    assert cluster.reconcile().actions == (CreateChild("vanilla", 2),)
    assert cluster.status.steps[1].failures == 0


def test_a_run_resumed_while_stopping_continues_when_the_old_child_is_gone() -> None:
    cluster = training_run()
    name = cluster.child().name
    cluster.spec = {"suspend": True}
    cluster.reconcile()
    cluster.spec = {}
    assert cluster.reconcile().actions == (), "the old child is still writing its checkpoint"
    del cluster.children[name]
    cluster.reconcile()
    assert cluster.reconcile().actions == (CreateChild("vanilla", 2),)
    assert cluster.status.steps[1].failures == 0


@pytest.mark.parametrize("phase", ["fresh", "queued", "between attempts"])
def test_a_run_without_a_child_is_suspended_at_once(phase: str) -> None:
    cluster = (
        waiting_run(Decision(False, "no"))
        if phase == "queued"
        else SimulatedCluster()
        if phase == "fresh"
        else training_run()
    )
    if phase == "between attempts":
        cluster.set_child_state("Failed", ERROR)
    if phase != "fresh":
        cluster.reconcile()
    cluster.spec = {"suspend": True}
    assert cluster.reconcile().status.phase == "Suspended"
    cluster.advance(3600)
    assert cluster.reconcile_repeatedly().actions == ()


def test_a_failed_child_is_not_retried_while_its_pods_are_alive() -> None:
    cluster = training_run()
    cluster.set_child_state("Ending", message="pod first-vanilla-a1-worker-0 is ending")
    decided = cluster.reconcile()
    assert (decided.actions, decided.status.phase) == ((), "Running")
    assert "worker-0 is ending" in decided.status.message


@pytest.mark.parametrize("seen", ["Waiting", "Running"], ids=["before it is replaced", "afterwards"])
def test_a_pod_deleted_while_running_ends_the_attempt_without_counting_a_failure(seen: State) -> None:
    cluster = training_run(runtime={"attempts": 1})
    cluster.set_child_state(seen, missing_pod="first-vanilla-a1-master-0")
    assert [type(action) for action in cluster.reconcile().actions] == [DeleteChild]
    assert cluster.reconcile().actions == ()
    del cluster.children["first-vanilla-a1"]
    cluster.reconcile()
    assert cluster.reconcile().actions == (CreateChild("vanilla", 2),)
    cluster.set_child_state("Waiting", missing_pod="first-vanilla-a2-master-0")
    assert cluster.reconcile().actions == (), "attempt 2 has not run yet"


@pytest.mark.parametrize("seen_suspended", [True, False], ids=["operator up", "operator away"])
def test_a_child_that_kueue_preempts_and_resumes_keeps_its_attempt(seen_suspended: bool) -> None:
    cluster = training_run(runtime={"queueName": "team"})
    cluster.advance(60)
    if seen_suspended:
        cluster.set_child_state("Waiting", suspended=True, message="is suspended until Kueue admits it")
        assert (cluster.reconcile().actions, cluster.status.phase) == ((), "Queued")
        assert cluster.step("vanilla").reason == "Held"
        cluster.advance(60)
    cluster.set_child_state(
        "Waiting", suspended=False, missing_pod="first-vanilla-a1-master-0", resumed=cluster.now, message=""
    )
    cluster.advance(5)
    assert (cluster.reconcile().actions, cluster.status.phase) == ((), "Running")
    cluster.set_child_state("Running")
    cluster.reconcile()
    cluster.advance(60)
    cluster.set_child_state("Waiting")
    assert [type(action) for action in cluster.reconcile().actions] == [DeleteChild], "deleted after all"


@pytest.mark.parametrize("failure", [ERROR, EVICTED], ids=["failed", "interrupted"])
def test_a_later_attempt_that_kueue_admits_is_told_from_one_that_it_preempts(failure: Failure) -> None:
    """A later attempt is no progress, so the time of the last progress does not say when its pods started."""
    cluster = training_run(runtime={"queueName": "team"})
    for _ in range(2):
        cluster.set_child_state("Failed", failure)
        cluster.reconcile()
        cluster.advance(60)
        cluster.reconcile()
        cluster.set_child_state("Running", resumed=cluster.now)
        cluster.reconcile()
    cluster.advance(60)
    cluster.set_child_state("Waiting", missing_pod="first-vanilla-a3-master-0", resumed=cluster.now)
    assert cluster.reconcile().actions == (), "preempted and admitted again"
    cluster.set_child_state("Running")
    cluster.reconcile()
    cluster.set_child_state("Waiting")
    assert [type(action) for action in cluster.reconcile().actions] == [DeleteChild], "a pod was deleted"


@pytest.mark.parametrize(
    "state, reading, reason",
    [
        pytest.param("Running", progress("vanilla"), "NoProgress", id="no progress"),
        pytest.param("Waiting", ProgressReading(attempted=True), "PodPending", id="pod pending"),
    ],
)
def test_stalled_has_the_reason_for_the_lack_of_progress(
    state: Any, reading: ProgressReading, reason: str
) -> None:
    cluster = training_run(runtime={"stalledAfter": "10m"})
    cluster.set_child_state(
        state, message="pod x cannot be scheduled: 0/1 nodes" if state == "Waiting" else ""
    )
    cluster.set_progress(reading)
    assert cluster.reconcile().requeue_at == cluster.now + timedelta(minutes=10)
    cluster.advance(599)
    assert condition(cluster.reconcile(), "Stalled")[0] == "False"
    cluster.advance(1)
    decided = cluster.reconcile()
    assert condition(decided, "Stalled") == ("True", reason)
    assert condition(decided, "Progressing")[0] == "False"
    assert state != "Waiting" or "0/1 nodes" in decided.status.message
    cluster.set_child_state("Running", message="")
    cluster.set_progress(progress("vanilla", done=10))
    assert condition(cluster.reconcile(), "Stalled")[0] == "False"


def test_a_run_without_kubeflow_does_not_start_and_keeps_its_backend() -> None:
    cluster = SimulatedCluster(backend_missing=True)
    decided = cluster.reconcile()
    assert (decided.actions, decided.status.phase, condition(decided, "Stalled")) == (
        (),
        "Pending",
        ("True", "KubeflowMissing"),
    )
    cluster.backend_missing = False
    assert cluster.reconcile().actions == (CreateChild("preprocess", 1),)


def test_the_finalizer_follows_the_deletion_policy() -> None:
    cluster = SimulatedCluster({"deletionPolicy": "Delete"})
    assert cluster.reconcile().actions == (SetFinalizer(True), CreateChild("preprocess", 1))
    cluster.spec = {"deletionPolicy": "Retain"}
    assert cluster.reconcile().actions == (SetFinalizer(False),)


@pytest.mark.parametrize(
    "spec, actions",
    [
        pytest.param(
            {"deletionPolicy": "Retain"}, (SetFinalizer(False),), id="changed to Retain while deleting"
        ),
        pytest.param({"deletionPolicy": "Delete"}, (SetFinalizer(False),), id="Delete, and never started"),
    ],
)
def test_a_deleted_run_without_a_child_alive_is_finalized(
    spec: dict[str, Any], actions: tuple[Any, ...]
) -> None:
    cluster = SimulatedCluster(spec, deleting=True, has_finalizer=True)
    assert cluster.reconcile().actions == actions


def test_a_deleted_run_with_an_invalid_spec_keeps_its_bucket() -> None:
    cluster = SimulatedCluster({"nonsense": 1}, deleting=True, has_finalizer=True)
    assert [type(action) for action in cluster.plan().actions] == [KeepBucket, SetFinalizer]


def test_a_deleted_run_without_finalizer_is_left_to_garbage_collection() -> None:
    cluster = training_run()
    cluster.deleting = True
    assert cluster.reconcile().actions == ()


@pytest.mark.parametrize("failed", [False, True])
def test_a_finished_run_is_deleted_after_ttl_after_finished(failed: bool) -> None:
    cluster = training_run(ttlAfterFinished="1h", runtime={"attempts": 1})
    cluster.set_child_state("Failed" if failed else "Succeeded", ERROR if failed else None)
    cluster.set_progress(progress("vanilla", state="Succeeded", iteration=6, done=1000))
    assert cluster.reconcile().requeue_at == cluster.now + timedelta(hours=1)
    cluster.advance(3600)
    assert cluster.reconcile().actions == (DeleteRun(),)


def test_durations_beyond_the_calendar_are_never_reached() -> None:
    """The API server accepts them, and no datetime has them."""
    never = "9" * 23 + "d"
    cluster = training_run(ttlAfterFinished=never, runtime={"onStall": "Restart", "stalledAfter": never})
    cluster.advance(3600)
    assert cluster.reconcile().actions == ()
    cluster.set_child_state("Succeeded")
    cluster.set_progress(progress("vanilla", state="Succeeded", iteration=6, done=1000))
    assert cluster.reconcile().status.phase == "Succeeded"
    cluster.advance(3600)
    assert cluster.reconcile().actions == ()


def test_children_of_old_attempts_are_deleted() -> None:
    cluster = training_run()
    for attempt in range(1, 6):
        cluster.set_child_state("Failed", ERROR)
        cluster.set_progress(progress("vanilla", attempt, iteration=attempt))
        cluster.reconcile()
        cluster.advance(60)
        cluster.reconcile()
    kept = sorted(name for name in cluster.children if "vanilla" in name)
    assert kept == ["first-vanilla-a4", "first-vanilla-a5", "first-vanilla-a6"]


def test_a_run_with_a_queue_is_queued_until_kueue_admits_it() -> None:
    cluster = SimulatedCluster({"runtime": {"queueName": "team", "backend": "Job"}})
    cluster.reconcile()
    cluster.set_child_state(
        "Waiting", suspended=True, message="Job first-preprocess-a1 is suspended until Kueue admits it"
    )
    assert cluster.reconcile().status.phase == "Queued"
    cluster.set_child_state("Running", suspended=False, message="")
    assert cluster.reconcile().status.phase == "Running"


def test_a_condition_reported_by_a_job_stays_until_it_is_reported_again() -> None:
    cluster = training_run()
    reported = {"type": "RouterCollapse", "status": "True", "reason": "DeadExpert", "message": "layer 7"}
    cluster.set_progress(progress("vanilla", conditions=[reported]))
    assert condition(cluster.reconcile(), "RouterCollapse") == ("True", "DeadExpert")
    cluster.set_progress(UNREADABLE)
    assert condition(cluster.reconcile(), "RouterCollapse")[0] == "True"
    cluster.set_progress(progress("vanilla", conditions=[{**reported, "status": "False"}]))
    assert condition(cluster.reconcile(), "RouterCollapse")[0] == "False"


def test_reconciling_without_changes_keeps_the_status() -> None:
    cluster = training_run()
    cluster.set_progress(progress("vanilla", iteration=3, done=500, loss=2.5))
    before = cluster.reconcile().status
    cluster.advance(5)
    assert cluster.reconcile().status == before
    assert Status.model_validate(before.dump()) == before
