"""The operator against a real control plane, with real pods that run stand-ins of the jobs: one run a promise, most of them at once."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from distill_operator.kube import JOB, POD, PYTORCHJOB

from devcluster.access import Cluster
from devcluster.configuration import HOST
from tests.fakes import run_harness as teams
from tests.fakes.run_harness import STAGES, Team, refused
from tests.fakes.s3_proxy import Relay

LONG = "steps=3000 pause=0.3 every=2 hurry=2"
"""Trains for a quarter of an hour, long enough to be stopped; the attempt after that ends at once."""
WHOLE = "steps=8 every=4 pause=0.5 parts=6 beside=vanilla kill=rescore@1:-103,rescored@1:5"
"""Rescoring that is killed once and scores beside a Vanilla stage of four seconds; the Rescored stage is killed once too."""
ENDLESS = "steps=6 every=2 pause=0.5 windows=3000 kill=onpolicy-sampler@1:-203"
"""A sampler that is killed once, and that would, like its teacher, go on long after the stage is trained."""
TOGETHER: dict[str, Any] = {
    "teacher": {"model": "s3://models/none", "gpus": 2},
    "student": {"shape": "tiny", "gpus": 2},
    "stages": [
        STAGES[0],
        {"name": "onpolicy", "kind": "OnPolicy", "tokens": 6000, "require": {"validity": 0.8}},
    ],
    "evaluation": {"completions": 8},
}
"""Four GPUs: two teachers, one that samples, one that trains."""
THREE: dict[str, Any] = {"teacher": {"model": "s3://models/none", "gpus": 2}, "stages": STAGES}
"""Three GPUs: two teachers that score, then one of the two beside the student in stage teacherforced."""


@pytest.fixture(scope="module")
def relay(cluster: Cluster) -> Iterator[Relay]:
    with Relay(cluster.s3.endpoint, HOST) as relay:
        yield relay


@pytest.fixture(scope="module")
def team(cluster: Cluster, namespace: str, relay: Relay) -> Iterator[Team]:
    """Nearly all runs of this module are applied at once, so that they share the time that pods take to start. Those that hold a GPU until
    a test takes it from them must be fewer than the pool's eight: or a run that a test waits for might never get one."""
    teams.operator(cluster, *teams.FAST)
    team = Team.create(cluster, namespace)
    team.kubectl("apply", "--filename", "-", input=json.dumps(stranger("taken-preprocess-a1")))
    team.apply("whole", WHOLE, **THREE)
    team.watch("whole")
    team.apply("onpolicy", ENDLESS, **TOGETHER)
    team.watch("onpolicy")
    team.apply("killed", "steps=6 every=2 kill=1:4")
    team.apply("unkillable", "fail=1:0,2:0", runtime={"attempts": 2})
    team.apply("refusing", "refuse=1:0")
    team.apply("pair", "steps=3", student={"shape": "tiny", "gpus": 2, "gpusPerPod": 1})
    team.apply("plain", "steps=3", runtime={"backend": "Job"}, ttlAfterFinished="1s")
    team.apply("taken", "steps=1")
    team.apply("keyless", "steps=1", storage=team.storage("to-come"))
    team.apply("suspended", LONG.replace("every=2", "every=2500"))
    team.apply("evicted", LONG, runtime={"attempts": 1})
    team.apply("removed", LONG, runtime={"attempts": 1})
    team.apply("away", LONG, storage=team.storage(teams.install.SECRET, relay.endpoint))
    team.apply("orphan", "steps=1", deletionPolicy="Delete", storage=team.secret("brief"))
    yield team
    teams.restore(cluster)


def stranger(name: str) -> dict[str, Any]:
    """A Job of somebody else's, which never starts a pod."""
    pod = {"restartPolicy": "Never", "containers": [{"name": "main", "image": teams.IMAGE}]}
    spec = {"suspend": True, "template": {"spec": pod}}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec}


def test_a_pod_that_is_killed_mid_training_resumes_from_its_checkpoint_as_attempt_2(team: Team) -> None:
    status = team.phase("killed", "Succeeded", "Failed")
    assert status["phase"] == "Succeeded", status["message"]
    assert team.starts("killed") == [(1, 0), (2, 4)]
    assert team.children("killed") == ["killed-preprocess-a1", "killed-vanilla-a1", "killed-vanilla-a2"]
    told = {"StepStarted", "StepRetrying", "StepSucceeded", "RunSucceeded"}
    team.until(
        "killed", lambda: told <= set(team.events("killed")), "all of it is told"
    )  # the status is written first
    events = team.events("killed")
    words = "step vanilla failed (attempt 1 of 3): pod killed-vanilla-a1-master-0, container pytorch, exit 137 (killed)"
    assert events["StepRetrying"].startswith(words)
    team.kubectl("wait", "--for=condition=Succeeded", "distillrun/killed", "--timeout=5s")


def test_a_run_of_all_kinds_succeeds_and_scores_beside_vanilla(team: Team) -> None:
    status = team.phase("whole", "Succeeded", "Failed")
    assert status["phase"] == "Succeeded", status["message"]
    together, gpus = team.witnesses["whole"].told()
    assert frozenset({"rescore", "vanilla"}) in together
    assert all(len(steps) <= 1 or steps == {"rescore", "vanilla"} for steps in together), together
    assert gpus == 3, "two teachers and a student: never more than teacher.gpus + student.gpus"
    steps = [
        "preprocess-a1",
        "rescore-a1",
        "rescore-a2",
        "rescored-a1",
        "rescored-a2",
        "teacherforced-a1",
        "vanilla-a1",
    ]
    assert team.children("whole") == [f"whole-{step}" for step in steps]
    assert team.starts("whole", "rescored") == [(1, 0), (2, 4)]
    assert [attempt for attempt, _ in team.starts("whole", "rescore")].count(2) == 2
    (forced,) = [
        job
        for job in team.objects("whole", PYTORCHJOB)
        if job["metadata"]["name"] == "whole-teacherforced-a1"
    ]
    (container,) = forced["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2, "a student and its teacher"


def test_the_three_of_an_on_policy_stage_start_together_are_tried_again_alone_and_end_together(
    team: Team,
) -> None:
    status = team.phase("onpolicy", "Succeeded", "Failed")
    assert status["phase"] == "Succeeded", status["message"]
    together, gpus = team.witnesses["onpolicy"].told()
    trio = {"onpolicy-sampler", "onpolicy-teacher", "onpolicy"}
    assert frozenset(trio) in together
    assert all(len(steps) <= 1 or steps <= trio for steps in together), together
    assert gpus == 4, "two teachers, a sampler and a trainer: never more than teacher.gpus + student.gpus"
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
        assert team.step("onpolicy", step)["message"] == "training has succeeded"
        assert 0 < team.step("onpolicy", step)["partsDone"] < 3000
    left = {name for name in team.children("onpolicy") if "-onpolicy-" in name}
    assert left == {
        "onpolicy-onpolicy-sampler-a1",
        "onpolicy-onpolicy-a1",
        "onpolicy-onpolicy-evaluate-a1",
    }, "the others were stopped"
    assert (status["validity"], team.step("onpolicy", "onpolicy-evaluate")["message"]) == (
        0.83,
        "validity 83 %",
    )
    words = "step onpolicy-sampler failed (attempt 1 of 3): pod onpolicy-onpolicy-sampler-a1"
    assert team.events("onpolicy")["StepRetrying"].startswith(words)


def test_failures_in_a_row_fail_the_run_and_raising_attempts_revives_it(team: Team) -> None:
    status = team.phase("unkillable", "Failed", "Succeeded")
    assert status["phase"] == "Failed"
    assert "attempt 2 of 2" in status["message"]
    assert "stand-in fails at step 0" in status["message"]
    assert team.condition("unkillable", "Failed")["reason"] == "AttemptsExhausted"
    team.kubectl("wait", "--for=condition=Failed", "distillrun/unkillable", "--timeout=5s")
    team.patch("unkillable", runtime={"attempts": 3})
    assert team.phase("unkillable", "Succeeded")["phase"] == "Succeeded"
    assert team.step("unkillable")["attempt"] == 3


def test_a_permanent_failure_is_not_tried_again(team: Team) -> None:
    status = team.phase("refusing", "Failed", "Succeeded")
    assert status["phase"] == "Failed"
    assert "stand-in refuses at step 0" in status["message"]
    assert team.condition("refusing", "Failed")["reason"] == "PermanentFailure"
    assert team.children("refusing") == ["refusing-preprocess-a1", "refusing-vanilla-a1"]


def test_one_gpu_a_pod_makes_a_master_and_a_worker(team: Team) -> None:
    team.phase("pair", "Succeeded")
    (job,) = team.objects("pair", PYTORCHJOB)
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert {role: spec["replicas"] for role, spec in replicas.items()} == {"Master": 1, "Worker": 1}
    # The Worker waits for its init container, and the stand-in's Master does not wait for it: only the attempts are certain.
    assert [attempt for attempt, _ in team.starts("pair")] == [1, 1], "two processes"


def test_the_job_backend_needs_no_kubeflow_and_a_finished_run_expires(team: Team) -> None:
    team.until(
        "plain",
        lambda: not team.get("plain") and not team.children("plain"),
        "plain and its children are gone",
    )
    assert "RunSucceeded" in team.events("plain")


def test_a_strangers_object_is_never_adopted(team: Team) -> None:
    team.until(
        "taken", lambda: team.condition("taken", "Stalled").get("reason") == "NameTaken", "taken is stalled"
    )
    assert "Job taken-preprocess-a1 was not made by the operator" in team.status("taken")["message"]
    team.kubectl("delete", "job", "taken-preprocess-a1")
    team.phase("taken", "Succeeded")


def test_a_pod_that_cannot_start_says_why_and_starts_once_it_can(team: Team) -> None:
    team.until(
        "keyless",
        lambda: 'secret "to-come" not found' in team.status("keyless").get("message", ""),
        "keyless says what it lacks",
    )
    assert team.condition("keyless", "StorageReachable")["reason"] == "SecretMissing"
    team.secret("to-come")
    team.phase("keyless", "Succeeded")


def test_a_child_that_a_quota_refuses_is_told_keeps_no_other_waiting_and_is_made_once_it_may_be(
    team: Team,
) -> None:
    hard = {"hard": {"count/jobs.batch": "0"}}
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}, "spec": hard}
    team.apply(
        "refused", "steps=1 pause=4", teacher={"model": "s3://models/none", "gpus": 1}, stages=STAGES[:2]
    )
    team.until("refused", lambda: team.children("refused") == ["refused-preprocess-a1"], "it preprocesses")
    team.kubectl("apply", "--filename", "-", input=json.dumps(quota))
    team.until(
        "refused",
        lambda: team.condition("refused", "Stalled").get("reason") == "ChildRefused",
        "refused says so",
    )
    assert "exceeded quota: none" in team.condition("refused", "Stalled")["message"]
    team.until(
        "refused", lambda: team.step("refused").get("state") == "Succeeded", "training is made and goes on"
    )
    assert team.children("refused") == ["refused-preprocess-a1", "refused-vanilla-a1"]
    assert team.step("refused", "rescored")["message"] == "waits for rescore"
    team.kubectl("delete", "resourcequota", "none")
    team.phase("refused", "Succeeded")


def test_suspend_stops_at_a_checkpoint_and_resume_goes_on_from_it(team: Team) -> None:
    team.until("suspended", lambda: (team.step("suspended").get("tokensDone") or 0) > 0, "suspended trains")
    team.patch("suspended", suspend=True)
    team.phase("suspended", "Suspended")
    assert team.condition("suspended", "Suspended")["status"] == "True"
    pods = [pod["metadata"]["name"] for pod in team.objects("suspended", POD)]
    assert not any("vanilla" in name for name in pods), "its pods are gone, and with them its GPUs"
    team.patch("suspended", suspend=False)
    team.phase("suspended", "Succeeded")
    assert team.step("suspended")["failures"] == 0
    (_, first), (attempt, second) = team.starts("suspended")
    assert (first, attempt) == (0, 2)
    assert 0 < second < 2500, "it saved on SIGTERM, long before its first regular checkpoint"


def test_an_evicted_pod_is_an_interruption_and_counts_nothing(team: Team) -> None:
    team.trains("evicted")
    pod = {"name": "evicted-vanilla-a1-master-0", "namespace": team.namespace}
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": pod}
    path = f"/api/v1/namespaces/{team.namespace}/pods/evicted-vanilla-a1-master-0/eviction"
    team.cluster.kubectl("create", "--raw", path, "--filename", "-", input=json.dumps(eviction))
    status = team.phase("evicted", "Succeeded", "Failed")
    assert status["phase"] == "Succeeded", status["message"]
    (_, first), (attempt, second) = team.starts("evicted")
    assert (first, attempt) == (0, 2)
    assert second > 0
    assert team.step("evicted")["failures"] == 0


def test_a_pod_that_is_removed_by_force_is_not_replaced_in_silence(team: Team) -> None:
    team.trains("removed")
    team.kubectl("delete", "pod", "removed-vanilla-a1-master-0", "--force", "--grace-period=0")
    status = team.phase("removed", "Succeeded", "Failed")
    assert status["phase"] == "Succeeded", status["message"]
    assert (team.step("removed")["attempt"], team.step("removed")["failures"]) == (2, 0)


def test_what_a_started_run_means_cannot_be_edited(team: Team) -> None:
    team.apply("retained", LONG, deletionPolicy="Retain")
    team.apply("deleted", LONG, deletionPolicy="Delete")
    team.until("retained", lambda: "started" in team.status("retained"), "it has started")
    message = refused(lambda: team.patch("retained", training={"seed": 2}))
    assert "cannot change after the first step has started" in message
    team.patch("retained", ttlAfterFinished="1h")


def test_a_store_that_is_away_for_a_while_costs_nothing_but_time(team: Team, relay: Relay) -> None:
    team.trains("away")
    loss = team.status("away")["loss"]
    relay.cut()
    team.until(
        "away",
        lambda: team.condition("away", "StorageReachable").get("status") == "False",
        "the operator notices",
    )
    status = team.status("away")
    assert (status["phase"], status["loss"] <= loss) == ("Running", True), "the last that is known stays"
    relay.open()
    team.until(
        "away",
        lambda: team.condition("away", "StorageReachable").get("status") == "True",
        "the operator notices",
    )
    done = team.step("away")["tokensDone"]
    team.until("away", lambda: team.step("away")["tokensDone"] > done, "it goes on")
    assert (team.step("away")["attempt"], team.step("away")["failures"]) == (1, 0)
    assert {"StorageUnreachable", "StorageReachable"} <= set(team.events("away"))
    team.kubectl("delete", "distillrun", "away")


@pytest.mark.parametrize("name, kept", [("retained", True), ("deleted", False)])
def test_a_run_deleted_while_it_trains_leaves_nothing_but_what_it_should(
    team: Team, name: str, kept: bool
) -> None:
    team.trains(name)
    folder = team.folder(name)
    team.kubectl("delete", "distillrun", name, "--timeout=120s")
    team.until(
        name,
        lambda: not team.children(name) and not team.objects(name, POD),
        "its children and pods are gone",
    )
    assert team.kept(folder) is kept


def test_a_run_that_is_deleted_with_its_secret_gone_leaves_its_bucket_and_says_so(team: Team) -> None:
    team.phase("orphan", "Succeeded")
    folder = team.folder("orphan")
    team.kubectl("delete", "secret", "brief")
    team.kubectl("delete", "distillrun", "orphan", "--timeout=120s")
    assert team.kept(folder)
    assert "Secret brief is not in namespace" in team.events("orphan")["BucketKept"]


def test_two_runs_of_8_gpus_go_one_after_the_other(team: Team) -> None:
    eight = {"teacher": {"model": "s3://models/none", "gpus": 1}, "student": {"shape": "tiny", "gpus": 7}}
    for name in ("eight-a", "eight-b"):
        team.apply(name, "steps=4 pause=0.5", **eight)
    team.until(
        "eight-b",
        lambda: {team.status(n).get("phase") for n in ("eight-a", "eight-b")} == {"Running", "Queued"},
        "one waits",
    )
    first, second = sorted(("eight-a", "eight-b"), key=lambda name: team.status(name)["phase"] != "Running")
    message = team.status(second)["message"]
    assert message.startswith(
        "needs 8 GPUs (1 teacher + 7 student); the pool has 8 on 1 ready node, of which"
    )
    assert f"{team.namespace}/{first} (8)" in message
    assert team.children(second) == []
    team.phase(first, "Succeeded")
    team.phase(second, "Succeeded")


def test_a_run_on_the_data_and_teacher_of_another_reuses_its_scores_and_says_so(team: Team) -> None:
    team.phase("whole", "Succeeded")
    team.apply("again", WHOLE, **{**THREE, "stages": STAGES[:2]})
    team.until("again", lambda: team.step("again", "rescore").get("state") == "Succeeded", "again has scores")
    assert [team.step(name, "rescore")["reused"] for name in ("whole", "again")] == [False, True]
    assert team.step("again", "rescore")["message"] == "Reused"


def test_every_pod_and_child_says_where_it_comes_from(team: Team) -> None:
    team.phase("killed", "Succeeded")
    status = team.status("killed")
    for found in team.objects("killed", JOB, PYTORCHJOB, POD):
        labels, annotations = found["metadata"]["labels"], found["metadata"]["annotations"]
        assert labels["vpmoe.dev/config"] == status["config"]
        assert annotations["vpmoe.dev/config"] == status["provenance"]["configHash"]
        assert annotations["vpmoe.dev/git-sha"] == status["provenance"]["gitSha"]
        if labels["vpmoe.dev/step"] == "vanilla":
            assert annotations["vpmoe.dev/dataset"] == status["provenance"]["dataset"]["id"]
