"""The operator on a real control plane, with real pods that run stand-in jobs."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from distill_operator.kube import JOB, POD, PYTORCHJOB

from devcluster import install
from devcluster.access import Cluster
from devcluster.configuration import HOST
from tests.fakes import run_harness
from tests.fakes.run_harness import STAGES, RunHarness, rejection
from tests.fakes.s3_proxy import S3Proxy

LONG = "steps=3000 pause=0.3 every=2 hurry=2"
"""Trains for fifteen minutes, so that a test can stop it. The next attempt finishes at once."""
RESCORING_SCRIPT = "steps=8 every=4 pause=0.5 parts=6 beside=vanilla kill=rescore@1:-103,rescored@1:5"
"""Rescoring is killed once and runs beside a Vanilla stage of four seconds. The Rescored stage is killed
once."""
ENDLESS_WINDOWS = "steps=6 every=2 pause=0.5 windows=3000 kill=onpolicy-sampler@1:-203"
"""The sampler is killed once. Sampler and teacher would continue long after the end of training."""
FOUR_GPUS: dict[str, Any] = {
    "teacher": {"model": "s3://models/none", "gpus": 2},
    "student": {"shape": "tiny", "gpus": 2},
    "stages": [
        STAGES[0],
        {"name": "onpolicy", "kind": "OnPolicy", "tokens": 6000, "require": {"validity": 0.8}},
    ],
    "evaluation": {"completions": 8},
}
"""Four GPUs: two teachers, one sampler, one trainer."""
THREE_GPUS: dict[str, Any] = {"teacher": {"model": "s3://models/none", "gpus": 2}, "stages": STAGES}
"""Three GPUs: two teachers and the student; in stage teacherforced one teacher and the student."""


@pytest.fixture(scope="module")
def s3_proxy(cluster: Cluster) -> Iterator[S3Proxy]:
    with S3Proxy(cluster.s3.endpoint, HOST) as s3_proxy:
        yield s3_proxy


@pytest.fixture(scope="module")
def harness(cluster: Cluster, namespace: str, s3_proxy: S3Proxy) -> Iterator[RunHarness]:
    """Apply most runs of this module at the same time, so that their pods start in parallel.

    The runs that hold a GPU until a test stops them must be fewer than the pool's eight GPUs. Otherwise a run
    that a test waits for might never get one.
    """
    run_harness.upgrade_operator(cluster, *run_harness.FAST)
    harness = RunHarness.create(cluster, namespace)
    harness.kubectl("apply", "--filename", "-", input=json.dumps(foreign_job("taken-preprocess-a1")))
    harness.apply("whole", RESCORING_SCRIPT, **THREE_GPUS)
    harness.observe_pods("whole")
    harness.apply("onpolicy", ENDLESS_WINDOWS, **FOUR_GPUS)
    harness.observe_pods("onpolicy")
    harness.apply("killed", "steps=6 every=2 kill=1:4")
    harness.apply("unkillable", "fail=1:0,2:0", runtime={"attempts": 2})
    harness.apply("refusing", "refuse=1:0")
    harness.apply("pair", "steps=3", student={"shape": "tiny", "gpus": 2, "gpusPerPod": 1})
    harness.apply("plain", "steps=3", runtime={"backend": "Job"}, ttlAfterFinished="1s")
    harness.apply("taken", "steps=1")
    harness.apply("keyless", "steps=1", storage=harness.storage("to-come"))
    harness.apply("suspended", LONG.replace("every=2", "every=2500"))
    harness.apply("evicted", LONG, runtime={"attempts": 1})
    harness.apply("removed", LONG, runtime={"attempts": 1})
    harness.apply("away", LONG, storage=harness.storage(install.SECRET, s3_proxy.endpoint))
    harness.apply("orphan", "steps=1", deletionPolicy="Delete", storage=harness.create_secret("brief"))
    yield harness
    run_harness.restore_operator(cluster)


def foreign_job(name: str) -> dict[str, Any]:
    """A Job that the operator did not create. It never starts a pod."""
    pod = {"restartPolicy": "Never", "containers": [{"name": "main", "image": run_harness.IMAGE}]}
    spec = {"suspend": True, "template": {"spec": pod}}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec}


def test_a_pod_killed_during_training_resumes_from_its_checkpoint_as_attempt_2(
    harness: RunHarness,
) -> None:
    status = harness.wait_for_phase("killed", "Succeeded", "Failed")
    assert status["phase"] == "Succeeded", status["message"]
    assert harness.starts("killed") == [(1, 0), (2, 4)]
    assert harness.child_names("killed") == ["killed-preprocess-a1", "killed-vanilla-a1", "killed-vanilla-a2"]
    reasons = {"StepStarted", "StepRetrying", "StepSucceeded", "RunSucceeded"}
    harness.wait_until(
        "killed", lambda: reasons <= set(harness.events("killed")), "all Events are posted"
    )  # they are posted after the status
    events = harness.events("killed")
    message = (
        "step vanilla failed (attempt 1 of 3): pod killed-vanilla-a1-master-0, "
        "container pytorch, exit 137 (killed)"
    )
    assert events["StepRetrying"].startswith(message)
    harness.kubectl("wait", "--for=condition=Succeeded", "distillrun/killed", "--timeout=5s")


def test_a_run_of_three_kinds_succeeds_and_rescores_beside_vanilla(harness: RunHarness) -> None:
    status = harness.wait_for_phase("whole", "Succeeded", "Failed")
    assert status["phase"] == "Succeeded", status["message"]
    steps_at_once, gpus = harness.observers["whole"].result()
    assert frozenset({"rescore", "vanilla"}) in steps_at_once
    assert all(len(steps) <= 1 or steps == {"rescore", "vanilla"} for steps in steps_at_once), steps_at_once
    assert gpus == 3, "two teachers and a student: at most teacher.gpus + student.gpus"
    steps = [
        "preprocess-a1",
        "rescore-a1",
        "rescore-a2",
        "rescored-a1",
        "rescored-a2",
        "teacherforced-a1",
        "vanilla-a1",
    ]
    assert harness.child_names("whole") == [f"whole-{step}" for step in steps]
    assert harness.starts("whole", "rescored") == [(1, 0), (2, 4)]
    assert [attempt for attempt, _ in harness.starts("whole", "rescore")].count(2) == 2
    (forced,) = [
        job
        for job in harness.objects("whole", PYTORCHJOB)
        if job["metadata"]["name"] == "whole-teacherforced-a1"
    ]
    (container,) = forced["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2, "a student and its teacher"


def test_the_three_steps_of_an_on_policy_stage_start_and_end_together_and_are_retried_separately(
    harness: RunHarness,
) -> None:
    status = harness.wait_for_phase("onpolicy", "Succeeded", "Failed")
    assert status["phase"] == "Succeeded", status["message"]
    steps_at_once, gpus = harness.observers["onpolicy"].result()
    trio = {"onpolicy-sampler", "onpolicy-teacher", "onpolicy"}
    assert frozenset(trio) in steps_at_once
    assert all(len(steps) <= 1 or steps <= trio for steps in steps_at_once), steps_at_once
    assert gpus == 4, "two teachers, a sampler and a trainer: at most teacher.gpus + student.gpus"
    steps = {step["name"]: (step["state"], step["attempt"], step["failures"]) for step in status["steps"]}
    assert steps == {step: ("Succeeded", 1 + (step == "onpolicy-sampler"), 0) for step in steps}
    assert list(steps) == [
        "preprocess",
        "vanilla",
        "vanilla-evaluate",
        *sorted(trio - {"onpolicy"}),
        "onpolicy",
        "onpolicy-evaluate",
    ]
    for step in ("onpolicy-sampler", "onpolicy-teacher"):
        assert harness.step("onpolicy", step)["message"] == "training has succeeded"
        assert 0 < harness.step("onpolicy", step)["partsDone"] < 3000
    children = {name for name in harness.child_names("onpolicy") if "-onpolicy-" in name}
    assert children == {
        "onpolicy-onpolicy-sampler-a1",
        "onpolicy-onpolicy-a1",
        "onpolicy-onpolicy-evaluate-a1",
    }, "sampler-a2 and teacher-a1 were stopped"
    assert (status["validity"], harness.step("onpolicy", "onpolicy-evaluate")["message"]) == (
        0.83,
        "validity 83 %",
    )
    message = "step onpolicy-sampler failed (attempt 1 of 3): pod onpolicy-onpolicy-sampler-a1"
    assert harness.events("onpolicy")["StepRetrying"].startswith(message)


def test_repeated_failures_fail_the_run_and_raising_attempts_continues_it(harness: RunHarness) -> None:
    status = harness.wait_for_phase("unkillable", "Failed", "Succeeded")
    assert status["phase"] == "Failed"
    assert "attempt 2 of 2" in status["message"]
    assert "stand-in fails at step 0" in status["message"]
    assert harness.condition("unkillable", "Failed")["reason"] == "AttemptsExhausted"
    harness.kubectl("wait", "--for=condition=Failed", "distillrun/unkillable", "--timeout=5s")
    harness.patch("unkillable", runtime={"attempts": 3})
    assert harness.wait_for_phase("unkillable", "Succeeded")["phase"] == "Succeeded"
    assert harness.step("unkillable")["attempt"] == 3


def test_a_permanent_failure_is_not_retried(harness: RunHarness) -> None:
    status = harness.wait_for_phase("refusing", "Failed", "Succeeded")
    assert status["phase"] == "Failed"
    assert "stand-in refuses at step 0" in status["message"]
    assert harness.condition("refusing", "Failed")["reason"] == "PermanentFailure"
    assert harness.child_names("refusing") == ["refusing-preprocess-a1", "refusing-vanilla-a1"]


def test_two_gpus_with_one_per_pod_are_a_master_and_a_worker(harness: RunHarness) -> None:
    harness.wait_for_phase("pair", "Succeeded")
    (job,) = harness.objects("pair", PYTORCHJOB)
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert {role: spec["replicas"] for role, spec in replicas.items()} == {"Master": 1, "Worker": 1}
    # The Master may finish before the Worker's init container, so only the attempts are certain.
    assert [attempt for attempt, _ in harness.starts("pair")] == [1, 1], "two processes"


def test_the_job_backend_needs_no_kubeflow_and_a_finished_run_expires(harness: RunHarness) -> None:
    harness.wait_until(
        "plain",
        lambda: not harness.get("plain") and not harness.child_names("plain"),
        "plain and its children are gone",
    )
    assert "RunSucceeded" in harness.events("plain")


def test_an_object_of_another_owner_is_never_adopted(harness: RunHarness) -> None:
    harness.wait_until(
        "taken",
        lambda: harness.condition("taken", "Stalled").get("reason") == "NameTaken",
        "taken is stalled",
    )
    assert "Job taken-preprocess-a1 was not created by the operator" in harness.status("taken")["message"]
    harness.kubectl("delete", "job", "taken-preprocess-a1")
    harness.wait_for_phase("taken", "Succeeded")


def test_a_pod_that_cannot_start_is_reported_and_starts_once_it_can(harness: RunHarness) -> None:
    harness.wait_until(
        "keyless",
        lambda: 'secret "to-come" not found' in harness.status("keyless").get("message", ""),
        "keyless reports the missing Secret",
    )
    assert harness.condition("keyless", "StorageReachable")["reason"] == "SecretMissing"
    harness.create_secret("to-come")
    harness.wait_for_phase("keyless", "Succeeded")


def test_a_child_rejected_by_a_quota_is_reported_blocks_no_other_and_is_created_once_allowed(
    harness: RunHarness,
) -> None:
    limits = {"hard": {"count/jobs.batch": "0"}}
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}, "spec": limits}
    harness.apply(
        "refused", "steps=1 pause=4", teacher={"model": "s3://models/none", "gpus": 1}, stages=STAGES[:2]
    )
    harness.wait_until(
        "refused",
        lambda: harness.child_names("refused") == ["refused-preprocess-a1"],
        "preprocessing is created",
    )
    harness.kubectl("apply", "--filename", "-", input=json.dumps(quota))
    harness.wait_until(
        "refused",
        lambda: harness.condition("refused", "Stalled").get("reason") == "ChildRefused",
        "refused is stalled",
    )
    assert "exceeded quota: none" in harness.condition("refused", "Stalled")["message"]
    harness.wait_until(
        "refused",
        lambda: harness.step("refused").get("state") == "Succeeded",
        "training is created and succeeds",
    )
    assert harness.child_names("refused") == ["refused-preprocess-a1", "refused-vanilla-a1"]
    assert harness.step("refused", "rescored")["message"] == "waiting for rescore"
    harness.kubectl("delete", "resourcequota", "none")
    harness.wait_for_phase("refused", "Succeeded")


def test_suspend_stops_at_a_checkpoint_and_resume_continues_from_it(harness: RunHarness) -> None:
    harness.wait_until(
        "suspended", lambda: (harness.step("suspended").get("tokensDone") or 0) > 0, "suspended trains"
    )
    harness.patch("suspended", suspend=True)
    harness.wait_for_phase("suspended", "Suspended")
    assert harness.condition("suspended", "Suspended")["status"] == "True"
    pods = [pod["metadata"]["name"] for pod in harness.objects("suspended", POD)]
    assert not any("vanilla" in name for name in pods), "no training pod exists and no GPU is held"
    harness.patch("suspended", suspend=False)
    harness.wait_for_phase("suspended", "Succeeded")
    assert harness.step("suspended")["failures"] == 0
    (_, first), (attempt, second) = harness.starts("suspended")
    assert (first, attempt) == (0, 2)
    assert 0 < second < 2500, "SIGTERM made it save a checkpoint, long before the first regular one"


def test_an_evicted_pod_is_an_interruption_and_not_a_failure(harness: RunHarness) -> None:
    harness.wait_for_checkpoint("evicted")
    pod = {"name": "evicted-vanilla-a1-master-0", "namespace": harness.namespace}
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": pod}
    path = f"/api/v1/namespaces/{harness.namespace}/pods/evicted-vanilla-a1-master-0/eviction"
    harness.cluster.kubectl("create", "--raw", path, "--filename", "-", input=json.dumps(eviction))
    status = harness.wait_for_phase("evicted", "Succeeded", "Failed")
    assert status["phase"] == "Succeeded", status["message"]
    (_, first), (attempt, second) = harness.starts("evicted")
    assert (first, attempt) == (0, 2)
    assert second > 0
    assert harness.step("evicted")["failures"] == 0


def test_a_pod_deleted_by_force_ends_the_attempt(harness: RunHarness) -> None:
    harness.wait_for_checkpoint("removed")
    harness.kubectl("delete", "pod", "removed-vanilla-a1-master-0", "--force", "--grace-period=0")
    status = harness.wait_for_phase("removed", "Succeeded", "Failed")
    assert status["phase"] == "Succeeded", status["message"]
    assert (harness.step("removed")["attempt"], harness.step("removed")["failures"]) == (2, 0)


def test_the_configuration_of_a_started_run_cannot_be_edited(harness: RunHarness) -> None:
    harness.apply("retained", LONG, deletionPolicy="Retain")
    harness.apply("deleted", LONG, deletionPolicy="Delete")
    harness.wait_until("retained", lambda: "started" in harness.status("retained"), "it has started")
    message = rejection(lambda: harness.patch("retained", training={"seed": 2}))
    assert "cannot change after the first step has started" in message
    harness.patch("retained", ttlAfterFinished="1h")


def test_a_run_continues_after_its_store_was_unreachable(harness: RunHarness, s3_proxy: S3Proxy) -> None:
    harness.wait_for_checkpoint("away")
    loss = harness.status("away")["loss"]
    s3_proxy.disconnect()
    harness.wait_until(
        "away",
        lambda: harness.condition("away", "StorageReachable").get("status") == "False",
        "the operator reports the store as unreachable",
    )
    status = harness.status("away")
    assert (status["phase"], status["loss"] <= loss) == ("Running", True), "the last known loss is kept"
    s3_proxy.connect()
    harness.wait_until(
        "away",
        lambda: harness.condition("away", "StorageReachable").get("status") == "True",
        "the operator reports the store as reachable",
    )
    done = harness.step("away")["tokensDone"]
    harness.wait_until("away", lambda: harness.step("away")["tokensDone"] > done, "training continues")
    assert (harness.step("away")["attempt"], harness.step("away")["failures"]) == (1, 0)
    assert {"StorageUnreachable", "StorageReachable"} <= set(harness.events("away"))
    harness.kubectl("delete", "distillrun", "away")


@pytest.mark.parametrize("name, kept", [("retained", True), ("deleted", False)])
def test_deletion_policy_decides_whether_a_deleted_runs_folder_is_kept(
    harness: RunHarness, name: str, kept: bool
) -> None:
    harness.wait_for_checkpoint(name)
    folder = harness.run_folder(name)
    harness.kubectl("delete", "distillrun", name, "--timeout=120s")
    harness.wait_until(
        name,
        lambda: not harness.child_names(name) and not harness.objects(name, POD),
        "its children and pods are gone",
    )
    assert harness.has_objects(folder) is kept


def test_a_run_deleted_without_its_secret_keeps_its_folder_and_reports_it(
    harness: RunHarness,
) -> None:
    harness.wait_for_phase("orphan", "Succeeded")
    folder = harness.run_folder("orphan")
    harness.kubectl("delete", "secret", "brief")
    harness.kubectl("delete", "distillrun", "orphan", "--timeout=120s")
    assert harness.has_objects(folder)
    assert "Secret brief does not exist in namespace" in harness.events("orphan")["BucketKept"]


def test_two_runs_of_8_gpus_run_one_after_the_other(harness: RunHarness) -> None:
    eight = {"teacher": {"model": "s3://models/none", "gpus": 1}, "student": {"shape": "tiny", "gpus": 7}}
    for name in ("eight-a", "eight-b"):
        harness.apply(name, "steps=4 pause=0.5", **eight)
    harness.wait_until(
        "eight-b",
        lambda: {harness.status(n).get("phase") for n in ("eight-a", "eight-b")} == {"Running", "Queued"},
        "one is queued",
    )
    first, second = sorted(
        ("eight-a", "eight-b"), key=lambda name: harness.status(name)["phase"] != "Running"
    )
    message = harness.status(second)["message"]
    assert message.startswith(
        "Needs 8 GPUs (1 teacher + 7 student); the pool has 8 on 1 ready node, of which"
    )
    assert f"{harness.namespace}/{first} (8)" in message
    assert harness.child_names(second) == []
    harness.wait_for_phase(first, "Succeeded")
    harness.wait_for_phase(second, "Succeeded")


def test_a_run_with_the_dataset_and_teacher_of_another_reuses_its_scores_and_reports_it(
    harness: RunHarness,
) -> None:
    harness.wait_for_phase("whole", "Succeeded")
    harness.apply("again", RESCORING_SCRIPT, **{**THREE_GPUS, "stages": STAGES[:2]})
    harness.wait_until(
        "again", lambda: harness.step("again", "rescore").get("state") == "Succeeded", "again has scores"
    )
    assert [harness.step(name, "rescore")["reused"] for name in ("whole", "again")] == [False, True]
    assert harness.step("again", "rescore")["message"] == "Reused"


def test_every_pod_and_child_has_its_provenance(harness: RunHarness) -> None:
    harness.wait_for_phase("killed", "Succeeded")
    status = harness.status("killed")
    for found in harness.objects("killed", JOB, PYTORCHJOB, POD):
        labels, annotations = found["metadata"]["labels"], found["metadata"]["annotations"]
        assert labels["vpmoe.dev/config"] == status["config"]
        assert annotations["vpmoe.dev/config"] == status["provenance"]["configHash"]
        assert annotations["vpmoe.dev/git-sha"] == status["provenance"]["gitSha"]
        if labels["vpmoe.dev/step"] == "vanilla":
            assert annotations["vpmoe.dev/dataset"] == status["provenance"]["dataset"]["id"]
