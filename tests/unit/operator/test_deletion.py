"""Deletion of a run with its folder: a Job does it, the deletion of the run ends in any case, and an Event
says what became of the folder."""

import asyncio
import re
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from distill_operator.actions import ClearBucket, DeleteChild, KeepBucket, ReportCleared, SetFinalizer
from distill_operator.clear_job import CLEAR_SECONDS, build_clear_job, clear_job_name
from distill_operator.executor import ActionExecutor
from distill_operator.kube import EVENT, JOB, NAMESPACE_ENDS, Conflict, Kind, KubeError
from distill_operator.observe import ChildObservation, NameConflict, ObservedRun, observe_clear_job
from distill_operator.pod_diagnosis import Failure

from tests.fakes.simulated_cluster import (
    SETTINGS,
    UID,
    SimulatedCluster,
    manifest,
    observed_run,
    progress,
    training_run,
)
from vpmoe.api import DistillRun
from vpmoe.api.termination import TerminationRecord
from vpmoe.api.text import read_yaml

FOLDER = "s3://vpmoe/here/runs/team/first-0a1b2c3d"
END = timedelta(seconds=CLEAR_SECONDS + 60)


def deleted_run(**spec: Any) -> SimulatedCluster:
    """A run that is being deleted and whose children are gone."""
    cluster = training_run(deletionPolicy="Delete", **spec)
    cluster.deleting = True
    cluster.children.clear()
    return cluster


def cleared(objects: int) -> TerminationRecord:
    return TerminationRecord.model_validate(
        {
            "class": "Succeeded",
            "progress": {
                "step": "clear",
                "attempt": 1,
                "state": "Succeeded",
                "updated": "2026-01-01T00:00:00Z",
                "parts": {"done": objects, "total": objects},
            },
        }
    )


def test_a_run_is_deleted_when_a_job_has_deleted_its_folder() -> None:
    cluster = deleted_run()
    decided = cluster.reconcile()
    assert (decided.actions, decided.requeue_at) == ((ClearBucket(),), cluster.now + END)
    assert decided.status.clearing == cluster.now
    cluster.set_clear_job("Waiting", message="pod x is starting")
    cluster.advance(5)
    decided = cluster.reconcile()
    assert decided.actions == ()
    assert decided.status.message == "Deleting the run's folder from the bucket: pod x is starting"
    cluster.set_clear_job("Running")
    assert cluster.reconcile().actions == ()
    cluster.set_clear_job("Succeeded", record=cleared(7))
    assert cluster.reconcile().actions == (ReportCleared(7), SetFinalizer(False))


def test_a_job_whose_pods_are_gone_has_deleted_the_folder() -> None:
    cluster = deleted_run()
    cluster.reconcile()
    cluster.set_clear_job("Succeeded")
    assert cluster.reconcile().actions == (ReportCleared(None), SetFinalizer(False))


def test_a_run_that_never_started_has_no_folder() -> None:
    cluster = SimulatedCluster({"deletionPolicy": "Delete"}, deleting=True, has_finalizer=True)
    assert cluster.reconcile().actions == (SetFinalizer(False),)


def test_a_finished_run_is_deleted_with_its_folder() -> None:
    cluster = training_run(deletionPolicy="Delete")
    cluster.set_child_state("Succeeded")
    cluster.set_progress(progress("vanilla", state="Succeeded", iteration=6, done=1000))
    cluster.reconcile()
    cluster.deleting = True
    assert cluster.reconcile().actions == (ClearBucket(),)
    assert cluster.status.phase == "Succeeded"


def kept(cluster: SimulatedCluster) -> str:
    """Why the folder is kept, if this reconcile ends the deletion with it."""
    *others, keep, finalizer = cluster.reconcile().actions
    assert isinstance(keep, KeepBucket) and finalizer == SetFinalizer(False)
    assert all(isinstance(other, DeleteChild) for other in others)
    return keep.why


def test_the_folder_is_kept_if_the_job_fails() -> None:
    cluster = deleted_run()
    cluster.reconcile()
    why = "pod x, container clear, exit 65. Last line: storage.region 'eu west 3' is not the name of a region"
    cluster.set_clear_job("Failed", failure=Failure("Permanent", why))
    assert kept(cluster) == f"Job first-clear-0a1b2c3d has failed: {why}"


def test_a_job_without_its_secret_ends_at_its_deadline_and_the_reason_is_what_its_pod_waited_for() -> None:
    cluster = deleted_run()
    cluster.reconcile()
    waits = "pod x, container clear: CreateContainerConfigError: secret brief not found"
    cluster.set_clear_job("Waiting", message=waits)
    cluster.reconcile()
    cluster.set_clear_job("Waiting", message="pod x is terminating")  # before its conditions say why
    cluster.reconcile()
    cluster.set_clear_job("Ending", message="pod x is terminating")
    cluster.reconcile()
    cluster.set_clear_job("Ending", message="DeadlineExceeded: Job was active longer")  # its pods are gone
    cluster.reconcile()
    gone = "its pods were deleted before the cause was read (DeadlineExceeded: Job was active longer)"
    cluster.set_clear_job("Failed", failure=Failure("Interrupted", gone), message="")
    why = kept(cluster)
    assert "DeadlineExceeded" in why and "secret brief not found" in why


def test_a_job_that_never_ends_is_deleted_after_its_time() -> None:
    """A queue holds it, or the Job controller is away."""
    cluster = deleted_run()
    cluster.reconcile()
    cluster.set_clear_job("Waiting", suspended=True, message="Job x is suspended by its queue")
    cluster.reconcile()
    cluster.advance((END - timedelta(seconds=1)).total_seconds())
    assert cluster.reconcile().actions == ()
    cluster.advance(1)
    decided = cluster.plan()
    assert [type(action) for action in decided.actions] == [DeleteChild, KeepBucket, SetFinalizer]
    assert "suspended by its queue" in kept(cluster)


@pytest.mark.parametrize("jump", [86400, -86400])
@pytest.mark.parametrize("restarted", [False, True], ids=["same process", "restarted"])
def test_a_wall_clock_that_jumps_neither_ends_nor_prolongs_the_deletion(jump: float, restarted: bool) -> None:
    cluster = deleted_run()
    cluster.reconcile()
    cluster.set_clear_job("Waiting", message="pod p is starting")
    cluster.reconcile()
    cluster.advance(30)
    if restarted and jump > 0:  # a new process has only the wall clock
        cluster.restart_operator()
        cluster.reconcile()
    cluster.step_clock(jump)
    if restarted and jump < 0:
        cluster.restart_operator()
    decided = cluster.reconcile()
    assert not cluster.reports, "it has its time"
    assert decided.requeue_at is not None
    left = decided.requeue_at - cluster.now
    assert left <= END
    cluster.advance(left.total_seconds())
    cluster.reconcile()
    assert len(cluster.reports) == 1, "and no more"


def test_a_job_that_somebody_deletes_again_and_again_does_not_prolong_the_deletion() -> None:
    cluster = deleted_run()
    started = cluster.now
    while cluster.now < started + END:
        assert cluster.reconcile().actions == (ClearBucket(),)
        cluster.clear_job = ChildObservation()
        cluster.advance(30)
    assert f"within {CLEAR_SECONDS} s" in kept(cluster)


def test_a_run_that_is_to_keep_its_folder_after_all_stops_the_job() -> None:
    cluster = deleted_run()
    cluster.reconcile()
    cluster.set_clear_job("Running")
    cluster.spec["deletionPolicy"] = "Retain"
    assert [type(action) for action in cluster.plan().actions] == [DeleteChild, SetFinalizer]
    cluster.set_clear_job("Succeeded")
    assert cluster.plan().actions == (SetFinalizer(False),)


def test_a_run_that_is_to_keep_its_folder_waits_for_a_job_that_may_still_appear() -> None:
    """Nobody owns the Job: it would delete the folder when the run is gone."""
    cluster = deleted_run()
    cluster.reconcile()
    cluster.spec["deletionPolicy"] = "Retain"
    cluster.clear_job = ChildObservation(may_appear=True)
    decided = cluster.plan()
    assert (decided.actions, decided.poll) == ((), True)
    assert "deletionPolicy is Retain now" in decided.status.message
    cluster.clear_job = ChildObservation()
    assert cluster.plan().actions == (SetFinalizer(False),)


def test_a_job_that_is_rejected_is_tried_again_until_its_time_is_over() -> None:
    cluster = deleted_run()
    cluster.clear_job = ChildObservation(create_error="403 exceeded quota: none")
    started = cluster.now
    while cluster.now < started + END:
        decided = cluster.plan()
        assert decided.actions == (ClearBucket(),)
        cluster.status = decided.status
        cluster.advance(30)
    assert "exceeded quota" in kept(cluster)


def test_nothing_can_be_created_in_a_namespace_that_is_being_deleted() -> None:
    cluster = deleted_run()
    cluster.clear_job = ChildObservation(create_error="403 …", namespace_ends=True)
    assert "namespace is being deleted" in kept(cluster)


def test_a_foreign_job_of_that_name_is_left_alone() -> None:
    cluster = deleted_run()
    cluster.clear_job = ChildObservation(
        name_conflict=NameConflict("Job x was not created by the operator", False)
    )
    assert kept(cluster) == "Job x was not created by the operator"


STORAGE = {
    "bucket": "vpmoe",
    "prefix": "here",
    "endpoint": "http://s3:9000",
    "credentialsSecret": "keys",
    "caSecret": "authority",
}
RUNTIME = {
    "serviceAccountName": "writer",
    "imagePullSecrets": [{"name": "registry"}],
    "nodeSelector": {"pool": "a"},
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
    "queueName": "team",
    "env": [{"name": "https_proxy", "value": "http://proxy:3128"}],
}


def run(**spec: Any) -> DistillRun:
    parsed = observed_run(deletionPolicy="Delete", **spec).run
    assert parsed is not None
    return parsed


def test_the_job_has_what_the_runs_pods_have_and_needs_nothing_that_the_run_owns() -> None:
    job = build_clear_job(run(storage=STORAGE, runtime=RUNTIME), SETTINGS)
    template = job["spec"]["template"]
    pod, (container,) = template["spec"], template["spec"]["containers"]
    assert "ownerReferences" not in job["metadata"], "a foreground deletion of the run would collect it"
    assert (pod["serviceAccountName"], pod["imagePullSecrets"], pod["nodeSelector"]) == (
        "writer",
        [{"name": "registry"}],
        {"pool": "a"},
    )
    assert container["image"] == SETTINGS.images.trainer
    assert container["command"] == ["python", "-m", "jobs.clear", "--run", "/etc/vpmoe/run.yaml"]
    secrets = {
        entry["valueFrom"]["secretKeyRef"]["name"] for entry in container["env"] if "valueFrom" in entry
    }
    assert secrets == {"keys"}
    assert {"name": "https_proxy", "value": "http://proxy:3128"} in container["env"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert not any("configMap" in volume for volume in volumes.values()), "it may be gone"
    assert volumes["ca"]["secret"]["secretName"] == "authority"
    assert volumes.keys() == {mount["name"] for mount in container["volumeMounts"]}
    (item,) = volumes["config"]["downwardAPI"]["items"]
    path = item["fieldRef"]["fieldPath"]
    assert item["path"] == "run.yaml" and path == "metadata.annotations['vpmoe.dev/run-document']"
    read = DistillRun.parse(read_yaml(template["metadata"]["annotations"]["vpmoe.dev/run-document"]))
    assert f"s3://{read.spec.storage.bucket}/{read.spec.storage.prefix}/{read.folder}" == FOLDER
    assert "nvidia.com/gpu" not in str(job) and "kueue" not in str(job)


def test_the_job_ends_by_itself() -> None:
    spec = build_clear_job(run(), SETTINGS)["spec"]
    assert spec["activeDeadlineSeconds"] == CLEAR_SECONDS and spec["ttlSecondsAfterFinished"] > 0
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    ignored, failed = spec["podFailurePolicy"]["rules"]
    assert (ignored["action"], failed["action"], failed["onExitCodes"]["values"]) == (
        "Ignore",
        "FailJob",
        [65],
    )


def test_the_pod_satisfies_the_restricted_standard() -> None:
    pod = build_clear_job(run(storage=STORAGE), SETTINGS)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["automountServiceAccountToken"] is False
    assert (
        {"cpu", "memory"}
        == container["resources"]["limits"].keys()
        == container["resources"]["requests"].keys()
    )


def test_the_longest_name_is_valid_and_differs_from_that_of_another_run_of_this_name() -> None:
    names = set()
    for uid in ("0a1b2c3d-0000", "ffffffff-0000"):
        obj = manifest()
        longest = DistillRun.parse({**obj, "metadata": {**obj["metadata"], "name": "r" * 30, "uid": uid}})
        names.add(clear_job_name(longest))
    assert len(names) == 2
    assert all(len(name) <= 57 and re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name) for name in names)


class Api:
    """The API server, for the Job and Events: what it has, and how it answers a creation."""

    def __init__(self, error: KubeError | None = None) -> None:
        self.error = error
        self.created: list[tuple[Kind, dict[str, Any]]] = []
        self.objects: dict[str, dict[str, Any]] = {}

    async def create(self, kind: Kind, obj: dict[str, Any]) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        self.created.append((kind, obj))
        return obj

    async def get(self, kind: Kind, namespace: str, name: str) -> dict[str, Any] | None:
        return self.objects.get(name)

    async def list_first(self, kind: Kind, namespace: str, *query: Any) -> list[dict[str, Any]]:
        return []

    async def pages(self, kind: Kind, namespace: str, **query: str) -> AsyncIterator[list[dict[str, Any]]]:
        yield []


def observed(cluster: SimulatedCluster) -> ObservedRun:
    return observed_run(cluster.status, True, deletionPolicy="Delete")


@pytest.mark.parametrize(
    "error, create_error, namespace_ends",
    [
        pytest.param(KubeError("403 quota", 403, "Forbidden"), "403 quota", False, id="quota"),
        pytest.param(KubeError("403 …", 403, NAMESPACE_ENDS), "403 …", True, id="the namespace ends"),
        pytest.param(KubeError("500 …", 500), "", False, id="the API server fails"),
        pytest.param(
            KubeError('500 failed calling webhook "mjob.kb.io"', 500),
            '500 failed calling webhook "mjob.kb.io"',
            False,
            id="a webhook does not answer",
        ),
    ],
)
def test_a_rejection_of_the_job_is_known_to_the_next_reconcile(
    error: KubeError, create_error: str, namespace_ends: bool
) -> None:
    cluster, api = deleted_run(), Api(error)
    executor = ActionExecutor(api, SETTINGS)
    with pytest.raises(KubeError):
        asyncio.run(executor.execute(ClearBucket(), observed(cluster), cluster.status, manifest()))
    run = observed(cluster).run
    assert run is not None
    found = executor.add_clear_errors(("team", "first"), run, ChildObservation())
    assert (found.create_error, found.namespace_ends, found.may_appear) == (
        create_error,
        namespace_ends,
        False,
    )
    api.error = None
    asyncio.run(executor.execute(ClearBucket(), observed(cluster), cluster.status, manifest()))
    assert executor.add_clear_errors(("team", "first"), run, ChildObservation()).create_error == ""
    executor.forget(("team", "first"))
    found = executor.add_clear_errors(("team", "first"), run, ChildObservation())
    assert found == ChildObservation(may_appear=True), "another process may have requested it"


def test_creating_the_job_may_be_repeated() -> None:
    cluster = deleted_run()
    executor = ActionExecutor(Api(Conflict("exists", 409)), SETTINGS)
    asyncio.run(executor.execute(ClearBucket(), observed(cluster), cluster.status, manifest()))


@pytest.mark.parametrize(
    "action, reason, message",
    [
        pytest.param(
            ReportCleared(7), "BucketCleared", f"deleted 7 objects of the run's folder {FOLDER}", id="cleared"
        ),
        pytest.param(KeepBucket("no"), "BucketKept", f"the run's folder {FOLDER} was not deleted", id="kept"),
    ],
)
@pytest.mark.parametrize("accepted", [True, False], ids=["Events accepted", "the namespace ends"])
def test_an_event_and_the_log_name_the_folder(
    action: Any, reason: str, message: str, accepted: bool, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = deleted_run()
    api = Api(None if accepted else KubeError("403 …", 403, NAMESPACE_ENDS))
    caplog.set_level("INFO")
    asyncio.run(ActionExecutor(api, SETTINGS).execute(action, observed(cluster), cluster.status, manifest()))
    assert message in caplog.text
    assert [(kind, event["reason"], message in event["message"]) for kind, event in api.created] == (
        [(EVENT, reason, True)] if accepted else []
    )


@pytest.mark.parametrize("uid, ours", [(UID, True), ("another", False)])
def test_the_job_of_another_run_is_a_conflict(uid: str, ours: bool) -> None:
    job = build_clear_job(run(), SETTINGS)
    job["metadata"] |= {"uid": "uid-clear", "annotations": {"vpmoe.dev/run-uid": uid}}
    api = Api()
    api.objects[job["metadata"]["name"]] = job
    found = asyncio.run(observe_clear_job(api, observed_run(deletionPolicy="Delete"), run()))
    assert (found.child is not None, found.name_conflict is None) == (ours, ours)


def test_the_job_is_a_job() -> None:
    job = build_clear_job(run(), SETTINGS)
    assert (job["apiVersion"], job["kind"]) == (JOB.api_version, JOB.name)
    assert job["metadata"]["labels"]["vpmoe.dev/run"] == "first", "an event of the Job queues the run"
