"""What spec.runtime adds to the pods of a run: variables, labels, devices, the teacher's cache."""

from typing import Any

import pytest
from distill_operator.attempt import Attempt, Origin
from distill_operator.children import build_child
from distill_operator.clear_job import build_clear_job
from distill_operator.pod_template import CA_FOLDER, TEACHER_CACHE, WEIGHTS_VOLUME

from tests.fakes.simulated_cluster import EVALUATED, ONPOLICY, SETTINGS, observed_run, pod_templates
from vpmoe.api import DistillRun
from vpmoe.process.environment import DECLARED
from vpmoe.rollout.version_volume import VARIABLE

ORIGIN = Origin("b" * 64, "d" * 64)
STAGES = [
    {"name": "vanilla", "kind": "Vanilla", "tokens": 1000},
    {"name": "rescored", "kind": "Rescored", "tokens": 1000},
    {"name": "forced", "kind": "TeacherForced", "tokens": 1000},
    {**ONPOLICY, "sampler": {"gpus": 2}},
]
SPEC = {
    "stages": STAGES,
    "student": {"shape": "tiny", "gpus": 4},
    "teacher": {"model": "s3://models/teacher", "gpus": 2},
    "training": {"sequenceLength": 512, "globalBatchTokens": 8192},
    "evaluation": EVALUATED,
}
STEPS = (
    "preprocess",
    "rescore",
    "vanilla",
    "vanilla-evaluate",
    "rescored",
    "forced",
    "onpolicy-sampler",
    "onpolicy-teacher",
    "onpolicy",
    "onpolicy-evaluate",
)
TRAINS = {"vanilla", "rescored", "forced", "onpolicy"}
HUB = {"secretRef": {"name": "hub"}}


def run(**spec: Any) -> DistillRun:
    found = observed_run(**{**SPEC, **spec})
    assert found.run is not None, found.invalid
    return found.run


def pods(step: str, runtime: dict[str, Any], **spec: Any) -> list[dict[str, Any]]:
    child = build_child(Attempt(run(runtime=runtime, **spec), step, 1, ORIGIN, SETTINGS))
    return [template for _, template in pod_templates(child)]


def clear_pod(runtime: dict[str, Any], **spec: Any) -> dict[str, Any]:
    template: dict[str, Any] = build_clear_job(run(runtime=runtime, **spec), SETTINGS)["spec"]["template"]
    return template


def container(pod: dict[str, Any]) -> dict[str, Any]:
    (found,) = pod["spec"]["containers"]
    return dict(found)


@pytest.mark.parametrize("backend", ["PyTorchJob", "Job"])
@pytest.mark.parametrize("step", STEPS)
def test_a_run_without_these_fields_has_the_pods_of_the_versions_before(step: str, backend: str) -> None:
    """An attempt of a run that began before has the same template after an upgrade."""
    for pod in pods(step, {"backend": backend}):
        main = container(pod)
        assert {"envFrom", "runtimeClassName", "schedulerName"} & {*main, *pod["spec"]} == set()
        names = {entry["name"] for entry in main["env"]}
        assert not names & {DECLARED, "VPMOE_TEACHER_CACHE", "VPMOE_WEIGHTS_VOLUME"}
        assert [volume["name"] for volume in pod["spec"]["volumes"]] == ["config", "tmp", "shm"]
        assert {"name": "shm", "emptyDir": {"medium": "Memory"}} in pod["spec"]["volumes"]
        assert {key.partition("/")[0] for key in pod["metadata"]["labels"]} == {
            "app.kubernetes.io",
            "vpmoe.dev",
        }
        assert {key.partition("/")[0] for key in pod["metadata"]["annotations"]} == {"vpmoe.dev"}


ENV = [
    {"name": "NCCL_DEBUG", "value": "INFO"},
    {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token", "optional": True}}},
    {"name": "HF_ENDPOINT", "valueFrom": {"configMapKeyRef": {"name": "hub", "key": "endpoint"}}},
]
ENV_FROM = [HUB, {"configMapRef": {"name": "nccl", "optional": True}, "prefix": "NCCL_"}]


@pytest.mark.parametrize("backend", ["PyTorchJob", "Job"])
@pytest.mark.parametrize("step", [*STEPS, "clear"])
def test_every_pod_has_the_variables_of_secrets_and_config_maps(step: str, backend: str) -> None:
    runtime = {"backend": backend, "env": ENV, "envFrom": ENV_FROM}
    for pod in [clear_pod(runtime)] if step == "clear" else pods(step, runtime):
        main = container(pod)
        assert [entry for entry in main["env"] if not entry["name"].startswith("VPMOE_")][-3:] == ENV
        assert main["envFrom"] == ENV_FROM


DECLARED_BY = {
    "preprocess": {"JOB_COMPLETION_INDEX"},
    "rescore": {"JOB_COMPLETION_INDEX"},
    "onpolicy-teacher": {"JOB_COMPLETION_INDEX"},
    **{step: {"PET_*", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"} for step in TRAINS},
}
"""What others add to the pods of a step, if training stages are PyTorchJobs."""


@pytest.mark.parametrize("backend", ["PyTorchJob", "Job"])
@pytest.mark.parametrize("step", [*STEPS, "clear"])
def test_a_pod_with_env_from_knows_which_reserved_variables_are_its_own(step: str, backend: str) -> None:
    storage = {"bucket": "vpmoe", "credentialsSecret": "s3", "caSecret": "ca"}
    runtime = {
        "backend": backend,
        "envFrom": [HUB],
        "teacherCache": {"claimName": "teachers"},
        "weightsVolume": {"claimName": "weights"},
    }
    for pod in (
        [clear_pod(runtime, storage=storage)] if step == "clear" else pods(step, runtime, storage=storage)
    ):
        entries = container(pod)["env"]
        values = {entry["name"]: entry.get("value") for entry in entries}
        own = {name for name in values if name != DECLARED}
        others = set() if backend == "Job" and step in TRAINS else DECLARED_BY.get(step, set())
        assert set(str(values[DECLARED]).split()) == own | others
        assert len(values) == len(entries), "no variable is there twice"


def test_labels_and_annotations_are_added_and_the_operators_win() -> None:
    runtime = {"podLabels": {"team": "a"}, "podAnnotations": {"note": "b"}, "queueName": "q"}
    for step in STEPS:
        for pod in pods(step, runtime):
            assert pod["metadata"]["labels"]["team"] == "a"
            assert pod["metadata"]["labels"]["vpmoe.dev/step"] == step
            assert pod["metadata"]["annotations"]["note"] == "b"
            assert pod["metadata"]["annotations"]["vpmoe.dev/config"] == "b" * 64
    pod = clear_pod(runtime)
    assert (pod["metadata"]["labels"]["team"], pod["metadata"]["labels"]["vpmoe.dev/step"]) == ("a", "clear")
    assert set(pod["metadata"]["annotations"]) == {"note", "vpmoe.dev/run-document"}


def test_pods_with_gpus_have_the_runtime_class_and_all_pods_the_scheduler() -> None:
    runtime = {"schedulerName": "volcano", "runtimeClassName": "nvidia"}
    for step in STEPS:
        for pod in pods(step, runtime):
            assert pod["spec"]["schedulerName"] == "volcano"
            assert pod["spec"].get("runtimeClassName") == (None if step == "preprocess" else "nvidia")
    assert {"schedulerName", "runtimeClassName"} & set(clear_pod(runtime)["spec"]) == set()


def test_a_device_has_its_request_as_its_limit() -> None:
    resources = {
        "train": {
            "requests": {"cpu": 4, "memory": "8Gi", "rdma/hca": 1, "hugepages-2Mi": "1Gi"},
            "limits": {"memory": "16Gi", "vpc.amazonaws.com/efa": "4"},
        }
    }
    (pod,) = pods("vanilla", {"resources": resources})
    assert container(pod)["resources"] == {
        "requests": {"cpu": "4", "memory": "8Gi", "rdma/hca": "1", "hugepages-2Mi": "1Gi"},
        "limits": {
            "memory": "16Gi",
            "rdma/hca": "1",
            "hugepages-2Mi": "1Gi",
            "vpc.amazonaws.com/efa": "4",
            "nvidia.com/gpu": 4,
        },
    }


def test_shared_memory_is_bounded_if_the_run_says_so() -> None:
    for step in STEPS:
        for pod in pods(step, {"sharedMemory": "16Gi"}):
            assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}} in pod["spec"][
                "volumes"
            ]


@pytest.mark.parametrize("backend", ["PyTorchJob", "Job"])
@pytest.mark.parametrize("step", [*STEPS, "clear"])
def test_capabilities_are_of_pods_that_train_and_of_root(step: str, backend: str) -> None:
    runtime = {"backend": backend, "capabilities": ["IPC_LOCK"]}
    for pod in [clear_pod(runtime)] if step == "clear" else pods(step, runtime):
        security = container(pod)["securityContext"]
        assert (security["allowPrivilegeEscalation"], security["readOnlyRootFilesystem"]) == (False, True)
        if step in TRAINS:
            assert security["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
            assert (security["runAsUser"], security["runAsNonRoot"]) == (0, False)
        else:
            assert security["capabilities"] == {"drop": ["ALL"]} and "runAsUser" not in security
        assert pod["spec"]["securityContext"]["runAsUser"] == 65532


LOADS_TEACHER = {"rescore", "onpolicy-teacher", "forced"}


@pytest.mark.parametrize("backend", ["PyTorchJob", "Job"])
@pytest.mark.parametrize("step", [*STEPS, "clear"])
def test_the_cache_is_mounted_where_the_teacher_is_loaded(step: str, backend: str) -> None:
    runtime = {"backend": backend, "teacherCache": {"claimName": "teachers"}}
    for pod in [clear_pod(runtime)] if step == "clear" else pods(step, runtime):
        main = container(pod)
        volume = {"name": "teacher", "persistentVolumeClaim": {"claimName": "teachers"}}
        mounted = {"name": "teacher", "mountPath": TEACHER_CACHE} in main["volumeMounts"]
        variable = {"name": "VPMOE_TEACHER_CACHE", "value": TEACHER_CACHE} in main["env"]
        assert {volume in pod["spec"]["volumes"], mounted, variable} == {step in LOADS_TEACHER}


def test_only_the_pod_with_the_teacher_mounts_the_cache() -> None:
    """A claim of one node would keep the others from starting."""
    student = {"shape": "tiny", "gpus": 4, "gpusPerPod": 1}
    master, worker = pods("forced", {"teacherCache": {"claimName": "teachers"}}, student=student)
    assert "teacher" in {volume["name"] for volume in master["spec"]["volumes"]}
    assert "teacher" not in {volume["name"] for volume in worker["spec"]["volumes"]}


@pytest.mark.parametrize("backend", ["PyTorchJob", "Job"])
@pytest.mark.parametrize("step", [*STEPS, "clear"])
def test_trainer_and_sampler_of_an_on_policy_stage_mount_the_volume(step: str, backend: str) -> None:
    """The sampler only reads it."""
    runtime = {"backend": backend, "weightsVolume": {"claimName": "weights"}}
    for pod in [clear_pod(runtime)] if step == "clear" else pods(step, runtime):
        main = container(pod)
        volumes = [one for one in pod["spec"]["volumes"] if one["name"] == "weights"]
        mounts = [one for one in main["volumeMounts"] if one["name"] == "weights"]
        variables = [one["value"] for one in main["env"] if one["name"] == VARIABLE]
        if step in ("onpolicy", "onpolicy-sampler"):
            read_only = {"readOnly": True} if step == "onpolicy-sampler" else {}
            assert volumes == [{"name": "weights", "persistentVolumeClaim": {"claimName": "weights"}}]
            assert mounts == [{"name": "weights", "mountPath": WEIGHTS_VOLUME, **read_only}]
            assert variables == [WEIGHTS_VOLUME]
        else:
            assert not volumes and not mounts and not variables


def test_only_the_trainers_first_pod_mounts_the_volume() -> None:
    """Rank 0 writes versions. A claim of one node would keep the others from starting."""
    student = {"shape": "tiny", "gpus": 4, "gpusPerPod": 1}
    master, worker = pods("onpolicy", {"weightsVolume": {"claimName": "weights"}}, student=student)
    assert "weights" in {volume["name"] for volume in master["spec"]["volumes"]}
    assert "weights" not in {volume["name"] for volume in worker["spec"]["volumes"]}


def test_the_certificates_of_the_store_are_where_the_guide_says() -> None:
    """A run names the file in SSL_CERT_FILE, for a proxy or a mirror with an authority of its own."""
    from pathlib import Path

    guide = (Path(__file__).parents[3] / "docs/guides/run.md").read_text()
    assert f"{CA_FOLDER}/ca.crt" in guide
