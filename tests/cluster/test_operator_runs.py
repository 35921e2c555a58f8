"""The operator on a real control plane, with real pods that run stand-in jobs."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from distill_operator.clear_job import CLEAR_SECONDS
from distill_operator.kube import EVENT, JOB, POD, PYTORCHJOB

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
ENDLESS_WINDOWS = "steps=16 every=2 pause=0.5 windows=3000 kill=onpolicy-sampler@1:-203"
"""The sampler is killed once. Sampler and teacher would continue long after the end of training, which takes
so long that the operator reads the progress of the sampler's second attempt on a busy machine too."""
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
ENDLESS = "import time; time.sleep(36000)"
"""A sidecar's program that does not end."""
STOPPED = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(143)); time.sleep(36000)"
"""A sidecar's program that ends with 143 when the kubelet stops it."""
OTHERS_EVENTS = 600
"""Warning Events about other objects in the namespace: more than a page of a list."""
THREE_GPUS: dict[str, Any] = {"teacher": {"model": "s3://models/none", "gpus": 2}, "stages": STAGES}
"""Three GPUs: two teachers and the student; in stage teacherforced one teacher and the student."""

LARGER: dict[str, Any] = {
    "env": [{"name": "NCCL_DEBUG", "value": "INFO"}],
    "resources": {"train": {"requests": {"memory": "64Mi"}}},
}
"""A spec.runtime as somebody sets it after a container was out of memory."""


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
    policies = [
        sidecar_policy(namespace, "mesh", native=True, program=STOPPED),
        sidecar_policy(namespace, "agent", native=False, program=ENDLESS),
    ]
    for policy in policies:
        harness.kubectl("apply", "--filename", "-", input=json.dumps(policy))
    harness.apply("whole", RESCORING_SCRIPT, **THREE_GPUS)
    harness.observe_pods("whole")
    harness.apply("onpolicy", ENDLESS_WINDOWS, **FOUR_GPUS)
    harness.observe_pods("onpolicy")
    harness.apply("killed", "steps=6 every=2 kill=1:4")
    dense = {"shape": "tiny", "gpus": 1, "init": {"upcycle": {"model": "s3://models/none"}}}
    harness.apply("dense", "steps=1 kill=init@1:-501", student=dense)
    harness.apply("unkillable", "fail=1:0,2:0", runtime={"attempts": 2})
    harness.apply("refusing", "refuse=1:0")
    harness.apply("pair", "steps=3", student={"shape": "tiny", "gpus": 2, "gpusPerPod": 1})
    harness.apply("plain", "steps=3", runtime={"backend": "Job"}, ttlAfterFinished="1s")
    harness.apply("taken", "steps=1")
    harness.apply("keyless", "steps=1", storage=harness.storage("to-come"))
    harness.apply("tight", "steps=6 every=2 kill=1:5", runtime={"attempts": 1})
    harness.apply("suspended", LONG.replace("every=2", "every=2500"))
    harness.apply("evicted", LONG, runtime={"attempts": 1})
    harness.apply("removed", LONG, runtime={"attempts": 1})
    harness.apply("away", LONG, storage=harness.storage(install.SECRET, s3_proxy.endpoint))
    limited = {"train": {"limits": {"ephemeral-storage": "4Ki"}}}
    harness.apply(
        "limited", "hang=vanilla@1:0,vanilla@2:0 hung=900", runtime={"attempts": 2, "resources": limited}
    )
    harness.apply("hung", "hang=vanilla@1:1 hung=70", runtime={"stalledAfter": "30s", "onStall": "Restart"})
    harness.apply("mesh", "refuse=1:0")
    harness.apply("agent-pytorchjob", "steps=3", deletionPolicy="Retain")
    harness.apply("agent-job", "steps=3", runtime={"backend": "Job"})
    harness.apply("agent-refuses", "refuse=1:0")
    harness.apply("orphan", "steps=1", deletionPolicy="Delete", storage=harness.create_secret("brief"))
    elsewhere = {**harness.storage(install.SECRET), "region": "eu west 3"}
    harness.apply("elsewhere", "steps=1", deletionPolicy="Delete", storage=elsewhere)
    yield harness
    for policy in policies:
        harness.kubectl("delete", "--filename", "-", input=json.dumps(policy))
    run_harness.restore_operator(cluster)


def sidecar_policy(namespace: str, prefix: str, *, native: bool, program: str) -> dict[str, Any]:
    """An admission policy that adds a sidecar to the pods of the namespace's runs whose name starts with
    `prefix`, and its binding.
    """
    kind, field = ("initContainers", ', restartPolicy: "Always"') if native else ("containers", "")
    value = (
        f'Object.spec.{kind}{{name: "{prefix}", image: "{run_harness.IMAGE}", '
        f'command: ["python", "-c", "{program}"]{field}}}'
    )
    create = f'JSONPatch{{op: "add", path: "/spec/{kind}", value: []}}'
    add = f'JSONPatch{{op: "add", path: "/spec/{kind}/-", value: {value}}}'
    run = "object.metadata.?labels[?'vpmoe.dev/run'].orValue('')"
    rule = {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}
    api, name = "admissionregistration.k8s.io/v1", f"{namespace}-{prefix}"
    policy = {
        "matchConstraints": {"resourceRules": [rule]},
        "matchConditions": [{"name": "run", "expression": f"{run}.startsWith('{prefix}')"}],
        "failurePolicy": "Fail",
        "reinvocationPolicy": "Never",
        "mutations": [
            {
                "patchType": "JSONPatch",
                "jsonPatch": {
                    "expression": f"(has(object.spec.{kind}) ? [] : [{create}]) + [{add}]",
                },
            }
        ],
    }
    here = {"matchLabels": {"kubernetes.io/metadata.name": namespace}}
    binding = {"policyName": name, "matchResources": {"namespaceSelector": here}}
    return {
        "apiVersion": "v1",
        "kind": "List",
        "items": [
            {"apiVersion": api, "kind": kind, "metadata": {"name": name}, "spec": spec}
            for kind, spec in (
                ("MutatingAdmissionPolicy", policy),
                ("MutatingAdmissionPolicyBinding", binding),
            )
        ],
    }


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


def test_the_first_stage_waits_for_its_initial_weights_also_if_their_pod_is_killed(
    harness: RunHarness,
) -> None:
    status = harness.wait_for_phase("dense", "Succeeded", "Failed")
    assert status["phase"] == "Succeeded", status["message"]
    steps = {step["name"]: (step["state"], step["attempt"]) for step in status["steps"]}
    assert steps == {
        "init": ("Succeeded", 2),
        "preprocess": ("Succeeded", 1),
        "vanilla": ("Succeeded", 1),
    }
    assert harness.child_names("dense") == [
        "dense-init-a1",
        "dense-init-a2",
        "dense-preprocess-a1",
        "dense-vanilla-a1",
    ]
    assert harness.step("dense", "init")["finished"] <= harness.step("dense", "vanilla")["started"]


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
    message = rejection(lambda: harness.patch("suspended", runtime=LARGER))
    assert "cannot change while the run is alive" in message and "Set spec.suspend to true" in message
    harness.patch("suspended", suspend=True)
    harness.wait_for_phase("suspended", "Suspended")
    assert harness.condition("suspended", "Suspended")["status"] == "True"
    pods = [pod["metadata"]["name"] for pod in harness.objects("suspended", POD)]
    assert not any("vanilla" in name for name in pods), "no training pod exists and no GPU is held"
    harness.patch("suspended", suspend=False, runtime=LARGER)
    harness.wait_for_phase("suspended", "Succeeded")
    assert harness.step("suspended")["failures"] == 0
    (_, first), (attempt, second) = harness.starts("suspended")
    assert (first, attempt) == (0, 2)
    assert 0 < second < 2500, "SIGTERM made it save a checkpoint, long before the first regular one"
    env = training_env(harness, "suspended", 2)
    provenance = harness.status("suspended")["provenance"]
    assert (env["NCCL_DEBUG"], env["VPMOE_CONFIG_HASH"]) == ("INFO", provenance["configHash"])


def training_env(harness: RunHarness, name: str, attempt: int) -> dict[str, str]:
    """Values of the environment of an attempt's training pods, without what differs between attempts."""
    child = harness.get_object(PYTORCHJOB, f"{name}-vanilla-a{attempt}")
    (container,) = child["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"]
    return {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}


def test_an_event_that_repeats_is_counted(harness: RunHarness) -> None:
    harness.apply("twice", runtime={"nodeSelector": {"pool": "none"}}, suspend=True)
    for suspended, phase in ((True, "Suspended"), (False, "Running"), (True, "Suspended")):
        harness.patch("twice", suspend=suspended)
        harness.wait_for_phase("twice", phase)
    about = {"fieldSelector": "involvedObject.name=twice,reason=Suspended"}
    harness.wait_until(
        "twice",
        lambda: [event["count"] for event in harness.get_object(EVENT, **about)["items"]] == [2],
        "one Event says that the run was suspended twice",
    )


def test_a_failed_run_takes_another_runtime_and_continues(harness: RunHarness) -> None:
    status = harness.wait_for_phase("tight", "Failed", "Succeeded")
    assert (status["phase"], harness.step("tight")["attempt"]) == ("Failed", 1), status["message"]
    harness.patch("tight", runtime={**LARGER, "attempts": 2})
    harness.wait_for_phase("tight", "Succeeded")
    before, after = training_env(harness, "tight", 1), training_env(harness, "tight", 2)
    assert after == before | {"NCCL_DEBUG": "INFO"}, "with the same hash of the configuration"
    assert harness.starts("tight") == [(1, 0), (2, 4)], "from the checkpoint"


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


def test_an_eviction_for_the_pods_own_limit_is_a_failure(harness: RunHarness) -> None:
    status = harness.wait_for_phase("limited", "Failed", "Succeeded")
    assert (status["phase"], harness.step("limited")["attempt"]) == ("Failed", 2)
    assert (harness.step("limited")["failures"], harness.step("limited")["interruptions"]) == (2, 0)
    assert "was evicted because it exceeded its own limit" in status["message"]
    assert "ephemeral" in status["message"]


def test_a_hung_step_is_restarted(harness: RunHarness) -> None:
    status = harness.wait_for_phase("hung", "Succeeded", "Failed")
    assert (status["phase"], harness.step("hung")["attempt"]) == ("Succeeded", 2)
    message = "step vanilla failed (attempt 1 of 3): no progress for 30s (runtime.stalledAfter) while its"
    assert harness.events("hung")["StepRetrying"].startswith(message)
    assert "NoProgress" in harness.events("hung")


def test_a_native_sidecar_does_not_hide_the_exit_code(harness: RunHarness) -> None:
    status = harness.wait_for_phase("mesh", "Failed", "Succeeded")
    assert (status["phase"], harness.step("mesh")["attempt"]) == ("Failed", 1)
    assert harness.condition("mesh", "Failed")["reason"] == "PermanentFailure"
    assert "container pytorch, exit 65" in status["message"]
    (pod,) = [one for one in harness.objects("mesh", POD) if "vanilla" in one["metadata"]["name"]]
    (sidecar,) = pod["status"]["initContainerStatuses"]
    assert sidecar["state"]["terminated"]["exitCode"] == 143, "it was there, and ended as it should"


@pytest.mark.parametrize("name", ["agent-pytorchjob", "agent-job"])
def test_a_sidecar_that_does_not_end_keeps_no_step_from_ending(harness: RunHarness, name: str) -> None:
    status = harness.wait_for_phase(name, "Succeeded", "Failed")
    assert status["phase"] == "Succeeded", status["message"]
    steps = {step["name"]: (step["state"], step["attempt"]) for step in status["steps"]}
    assert steps == {"preprocess": ("Succeeded", 1), "vanilla": ("Succeeded", 1)}
    assert harness.step(name)["message"] == "step 3 of 3"
    harness.wait_until(name, lambda: not harness.objects(name, POD), "its pods are removed")


def test_a_sidecar_that_does_not_end_does_not_hide_the_exit_code(harness: RunHarness) -> None:
    status = harness.wait_for_phase("agent-refuses", "Failed", "Succeeded")
    assert (status["phase"], harness.step("agent-refuses")["attempt"]) == ("Failed", 1)
    assert "container pytorch, exit 65" in status["message"]
    assert not harness.objects("agent-refuses", POD)


def test_the_events_of_other_objects_do_not_hide_why_a_pod_waits(harness: RunHarness) -> None:
    harness.apply("mountless", "steps=1", storage={**harness.storage(install.SECRET), "caSecret": "absent"})
    for number in range(OTHERS_EVENTS):
        harness.create_event(f"other-{number}", "Warning")
    harness.wait_until(
        "mountless",
        lambda: (
            'FailedMount: MountVolume.SetUp failed for volume "ca"'
            in harness.status("mountless").get("message", "")
        ),
        "mountless reports why its pod waits",
    )
    harness.kubectl("delete", "distillrun", "mountless")


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
    s3_proxy.disconnect()
    before = harness.status("away")
    harness.wait_until(
        "away",
        lambda: harness.condition("away", "ProgressReadable").get("status") == "True",
        "the pods serve progress whatever the store does",
    )
    assert (before["phase"], harness.status("away")["phase"]) == ("Running", "Running")
    done = harness.step("away")["tokensDone"]
    s3_proxy.connect()
    harness.wait_until("away", lambda: harness.step("away")["tokensDone"] > done, "training continues")
    assert (harness.step("away")["attempt"], harness.step("away")["failures"]) == (1, 0)
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
    assert bool(harness.clear_jobs(name)) is not kept
    event = harness.events(name).get("BucketCleared", "")
    assert (
        bool(re.search(rf"deleted [1-9]\d* objects of the run's folder s3://\S*{folder}", event)) is not kept
    )


def test_a_run_deleted_without_its_secret_keeps_its_folder_and_reports_it(harness: RunHarness) -> None:
    """Its Job ends at its deadline, which is shortened here."""
    harness.wait_for_phase("orphan", "Succeeded")
    folder = harness.run_folder("orphan")
    harness.kubectl("delete", "secret", "brief")
    harness.kubectl("delete", "distillrun", "orphan", "--wait=false")
    harness.wait_until(
        "orphan",
        lambda: 'secret "brief" not found' in harness.status("orphan").get("message", ""),
        "the message says what the Job waits for",
    )
    (job,) = harness.clear_jobs("orphan")
    assert job["spec"]["activeDeadlineSeconds"] == CLEAR_SECONDS
    soon = json.dumps({"spec": {"activeDeadlineSeconds": 1}})
    harness.kubectl("patch", "job", job["metadata"]["name"], "--type=merge", "--patch", soon)
    harness.kubectl("wait", "--for=delete", "distillrun/orphan", "--timeout=120s")
    assert harness.has_objects(folder)
    event = harness.events("orphan")["BucketKept"]
    assert "DeadlineExceeded" in event and 'secret "brief" not found' in event and folder in event


def test_a_malformed_region_fails_the_run_with_its_field_and_does_not_keep_it_from_being_deleted(
    harness: RunHarness,
) -> None:
    status = harness.wait_for_phase("elsewhere", "Failed", "Succeeded")
    assert status["phase"] == "Failed" and "storage.region 'eu west 3'" in status["message"]
    assert harness.condition("elsewhere", "Failed")["reason"] == "PermanentFailure"
    harness.kubectl("delete", "distillrun", "elsewhere", "--timeout=120s")
    assert "storage.region 'eu west 3'" in harness.events("elsewhere")["BucketKept"]


def test_a_namespace_is_deleted_with_its_runs_and_the_log_names_the_folder_that_stays(
    cluster: Cluster, harness: RunHarness
) -> None:
    name = f"{harness.namespace}-brief"
    cluster.kubectl("create", "namespace", name)
    install.credentials(cluster, name)
    other = RunHarness(cluster, name, harness.bucket, harness.s3, harness.api)
    other.apply("leaving", LONG, deletionPolicy="Delete")
    other.wait_for_checkpoint("leaving")
    folder = other.run_folder("leaving")
    cluster.kubectl("delete", "namespace", name, "--timeout=240s")
    assert harness.has_objects(folder)
    log = cluster.kubectl("logs", "deployment/distill-operator", f"--namespace={install.NAMESPACE}")
    assert re.search(rf"{name}/leaving: the run's folder s3://\S*{folder} was not deleted", log)


def test_two_runs_of_8_gpus_run_one_after_the_other(harness: RunHarness) -> None:
    eight = {"teacher": {"model": "s3://models/none", "gpus": 1}, "student": {"shape": "tiny", "gpus": 7}}
    for name in ("eight-a", "eight-b"):
        harness.apply(name, "steps=4 pause=0.5", **eight)
    harness.wait_until(
        "eight-b",
        lambda: {harness.step(n).get("state") for n in ("eight-a", "eight-b")} == {"Running", "Queued"},
        "one is queued",
    )
    first, second = sorted(("eight-a", "eight-b"), key=lambda name: harness.step(name)["state"] != "Running")
    assert harness.status(second)["phase"] == "Queued"
    harness.wait_until(
        second,
        lambda: (
            harness.status(second)["message"]
            == (
                "Needs 8 GPUs (1 teacher + 7 student); the pool has 8 on 1 ready node, "
                f"of which 8 are held by {first} (8): 0 are left."
            )
        ),
        "the message names the run that holds them",
    )
    assert harness.child_names(second) == [f"{second}-preprocess-a1"]
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
        if labels["vpmoe.dev/step"] == "vanilla":
            assert annotations["vpmoe.dev/dataset"] == status["provenance"]["dataset"]["id"]
