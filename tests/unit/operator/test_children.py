"""Children and pod templates: contents, lengths of names, and the restricted pod security standard."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from distill_operator import pod_template
from distill_operator.attempt import Attempt, Origin, child_name
from distill_operator.children import build_child, build_config_map
from distill_operator.settings import Settings

from tests.fakes.simulated_cluster import (
    EVALUATED,
    ONPOLICY,
    SETTINGS,
    UID,
    manifest,
    observed_run,
    pod_templates,
)
from vpmoe.api import DistillRun, Invalid
from vpmoe.api.environment import RESERVED_ENV
from vpmoe.api.runtime import Resources
from vpmoe.provenance import COMMIT_FILE

ORIGIN = Origin("b" * 64, "d" * 64)
RESCORED = [{"name": "rescored", "kind": "Rescored", "tokens": 1000}]
FORCED = [{"name": "forced", "kind": "TeacherForced", "tokens": 1000}]
EVALUATED_ONPOLICY = {
    "stages": [{**ONPOLICY, "sampler": {"gpus": 3}}],
    "student": {"shape": "tiny", "gpus": 7},
    "teacher": {"model": "s3://models/teacher", "gpus": 2},
    "training": {"sequenceLength": 512, "globalBatchTokens": 8192},
    "evaluation": EVALUATED,
    "export": {"stages": ["onpolicy"]},
}
SEVEN, BATCH = {"shape": "vpmoe-6b", "gpus": 7}, {"sequenceLength": 512, "globalBatchTokens": 8192}
REPORTED_ONPOLICY = {**EVALUATED_ONPOLICY, "runtime": {"report": True}}
UPCYCLED = {"student": {"shape": "tiny", "gpus": 2, "init": {"upcycle": {"model": "s3://models/dense"}}}}
SCHEDULING = {
    "nodeSelector": {"pool": "a"},
    "tolerations": [{"key": "gpu", "operator": "Exists", "tolerationSeconds": 5}],
}


def run(**spec: Any) -> DistillRun:
    parsed = observed_run(**spec).run
    assert parsed is not None, observed_run(**spec).invalid
    return parsed


def child(
    step: str = "vanilla", number: int = 2, settings: Settings = SETTINGS, **spec: Any
) -> dict[str, Any]:
    return build_child(Attempt(run(**spec), step, number, ORIGIN, settings))


def templates(obj: dict[str, Any]) -> list[dict[str, Any]]:
    return [template for _, template in pod_templates(obj)]


CHILDREN = [
    pytest.param("init", UPCYCLED, id="init"),
    pytest.param("preprocess", {}, id="preprocess"),
    pytest.param("vanilla", {}, id="PyTorchJob"),
    pytest.param(
        "vanilla", {"student": {"shape": "tiny", "gpus": 4, "gpusPerPod": 1}}, id="PyTorchJob of several pods"
    ),
    pytest.param("vanilla", {"runtime": {"backend": "Job"}}, id="Job"),
    pytest.param("rescore", {"stages": RESCORED}, id="rescore"),
    pytest.param(
        "forced",
        {"stages": FORCED, "student": {"shape": "tiny", "gpus": 4, "gpusPerPod": 1}},
        id="TeacherForced",
    ),
    *(
        pytest.param(f"onpolicy{suffix}", EVALUATED_ONPOLICY, id=f"OnPolicy{suffix}")
        for suffix in ("-sampler", "-teacher", "", "-evaluate", "-export")
    ),
    pytest.param("onpolicy-report", REPORTED_ONPOLICY, id="report"),
]
ROLES = {
    "init": "init",
    "preprocess": "preprocess",
    "rescore": "rescore",
    "onpolicy-sampler": "sampler",
    "onpolicy-teacher": "teacher",
    "onpolicy-evaluate": "evaluate",
    "onpolicy-export": "export",
    "onpolicy-report": "report",
}
"""Role of each step that does not train."""


@pytest.mark.parametrize("step, spec", CHILDREN)
def test_every_pod_satisfies_the_restricted_standard(step: str, spec: dict[str, Any]) -> None:
    for template in templates(child(step, **spec)):
        pod, container = template["spec"], template["spec"]["containers"][0]
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == security["runAsGroup"] == 65532
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert pod["automountServiceAccountToken"] is False
        writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        assert writable == {"/tmp", "/dev/shm"}
        assert {"name": "shm", "emptyDir": {"medium": "Memory"}} in pod["volumes"]
        assert pod["terminationGracePeriodSeconds"] >= 300
        assert pod["shareProcessNamespace"] is True, "process 1 ignores SIGTERM before it has a handler"
        assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"


@pytest.mark.parametrize("step, spec", CHILDREN)
def test_child_and_pods_have_their_provenance(step: str, spec: dict[str, Any]) -> None:
    obj = child(step, **spec)
    for metadata in [obj["metadata"], *(template["metadata"] for template in templates(obj))]:
        labels, annotations = metadata["labels"], metadata["annotations"]
        assert (labels["vpmoe.dev/run"], labels["vpmoe.dev/step"], labels["vpmoe.dev/attempt"]) == (
            "first",
            step,
            "2",
        )
        assert (labels["vpmoe.dev/config"], labels["vpmoe.dev/dataset"]) == ("b" * 16, "d" * 16)
        assert (annotations["vpmoe.dev/config"], annotations["vpmoe.dev/dataset"]) == ("b" * 64, "d" * 64)


@pytest.mark.parametrize("step, spec", CHILDREN)
def test_nothing_hides_the_commit_in_the_image(step: str, spec: dict[str, Any]) -> None:
    """The pods find it beside their code, and no volume may be mounted over it."""
    for template in templates(child(step, **spec)):
        (container,) = template["spec"]["containers"]
        code = Path(container["workingDir"])
        assert code / COMMIT_FILE == Path(pod_template.COMMIT_FILE)
        mounted = [Path(mount["mountPath"]) for mount in container["volumeMounts"]]
        assert not any((code / COMMIT_FILE).is_relative_to(path) for path in mounted)


@pytest.mark.parametrize("step, spec", CHILDREN)
def test_children_are_owned_by_their_run(step: str, spec: dict[str, Any]) -> None:
    parsed = run(**spec)
    for obj in (child(step, **spec), build_config_map(parsed, ORIGIN)):
        assert obj["metadata"]["namespace"] == "team"
        (owner,) = obj["metadata"]["ownerReferences"]
        assert (owner["uid"], owner["kind"], owner["controller"], owner["blockOwnerDeletion"]) == (
            UID,
            "DistillRun",
            True,
            True,
        )


@pytest.mark.parametrize("step, spec", CHILDREN)
def test_the_command_has_run_step_and_attempt(step: str, spec: dict[str, Any]) -> None:
    module = f"jobs.{ROLES.get(step, 'train')}"
    for template in templates(child(step, **spec)):
        container = template["spec"]["containers"][0]
        command = ["python", "-m", module, "--run", "/etc/vpmoe/run.yaml", "--step", step, "--attempt", "2"]
        assert (container["command"], container["workingDir"]) == (command, "/opt/vpmoe")


def test_the_config_map_has_the_resolved_run_and_a_name_unique_to_the_run() -> None:
    parsed = run(suspend=True, deletionPolicy="Delete")
    config_map = build_config_map(parsed, ORIGIN)
    read = DistillRun.parse(yaml.safe_load(config_map["data"]["run.yaml"]))
    assert (read.config_hash, read.uid8, read.metadata) == (parsed.config_hash, "0a1b2c3d", parsed.metadata)
    assert config_map["immutable"] is True
    assert config_map["metadata"]["name"] == "first-config-0a1b2c3d", (
        "kubelets cache an immutable ConfigMap by name"
    )


def test_preprocessing_is_an_indexed_job_with_one_pod_per_worker() -> None:
    spec = child("preprocess", dataset={"source": "s3://corpora/*.parquet", "maxLength": 512, "workers": 5})[
        "spec"
    ]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 5, 5)
    assert (
        spec["backoffLimit"],
        spec["podReplacementPolicy"],
        spec["template"]["spec"]["restartPolicy"],
    ) == (0, "Failed", "Never")
    assert "nvidia.com/gpu" not in str(spec)


@pytest.mark.parametrize(
    "student, replicas, processes",
    [
        pytest.param({"gpus": 7}, {"Master": 1}, 7, id="one pod"),
        pytest.param({"gpus": 2, "gpusPerPod": 1}, {"Master": 1, "Worker": 1}, 1, id="two pods of one"),
        pytest.param({"gpus": 8, "gpusPerPod": 2}, {"Master": 1, "Worker": 3}, 2, id="four pods of two"),
    ],
)
def test_a_pytorchjob_has_one_master_and_the_rest_as_workers(
    student: dict[str, Any], replicas: dict[str, int], processes: int
) -> None:
    training_run = {"sequenceLength": 512, "globalBatchTokens": 8192}
    spec = child(student={"shape": "tiny", **student}, training=training_run)["spec"]
    assert {role: replica["replicas"] for role, replica in spec["pytorchReplicaSpecs"].items()} == replicas
    assert spec["nprocPerNode"] == str(processes)
    assert spec["runPolicy"] == {"cleanPodPolicy": "Running"}
    assert "elasticPolicy" not in spec
    for replica in spec["pytorchReplicaSpecs"].values():
        (container,) = replica["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"
        assert container["resources"]["limits"] == {"nvidia.com/gpu": processes}
        assert replica["restartPolicy"] == "Never"


@pytest.mark.parametrize(
    "stage, step, gpus", [(None, "vanilla", 4), (FORCED, "forced", 5)], ids=["student", "student and teacher"]
)
def test_a_job_has_all_processes_in_one_pod(stage: list[Any] | None, step: str, gpus: int) -> None:
    spec = child(
        step,
        runtime={"backend": "Job"},
        student={"shape": "tiny", "gpus": 4},
        **({"stages": stage} if stage else {}),
    )["spec"]
    assert (spec["parallelism"], spec["backoffLimit"]) == (1, 0)
    assert spec["template"]["spec"]["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": gpus}


@pytest.mark.parametrize(
    "student, master, worker",
    [
        pytest.param({"gpus": 6}, 8, None, id="one pod"),
        pytest.param({"gpus": 4, "gpusPerPod": 2}, 4, 2, id="two pods"),
    ],
)
def test_the_pods_of_a_teacher_forced_stage_have_vllm_and_the_master_the_teachers_gpus(
    student: dict[str, Any], master: int, worker: int | None
) -> None:
    training_run = {"sequenceLength": 512, "globalBatchTokens": 8192}
    teacher = {"model": "s3://models/teacher", "gpus": 2}
    spec = child(
        "forced", stages=FORCED, student={"shape": "tiny", **student}, training=training_run, teacher=teacher
    )["spec"]
    gpus = {
        role: replica["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
        for role, replica in spec["pytorchReplicaSpecs"].items()
    }
    assert gpus == {"Master": master, **({"Worker": worker} if worker else {})}
    assert {
        replica["template"]["spec"]["containers"][0]["image"]
        for replica in spec["pytorchReplicaSpecs"].values()
    } == {"vpmoe/inference:1"}
    assert spec["nprocPerNode"] == str(student.get("gpusPerPod", student["gpus"])), (
        "torchrun starts the ranks, the launcher the teachers"
    )


def test_rescoring_is_an_indexed_job_with_a_teacher_in_each_pod() -> None:
    spec = child("rescore", stages=RESCORED, teacher={"model": "s3://models/teacher", "gpus": 3})["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"], spec["backoffLimit"]) == (
        "Indexed",
        3,
        3,
        0,
    )
    (container,) = spec["template"]["spec"]["containers"]
    assert (container["name"], container["image"]) == ("rescore", "vpmoe/inference:1")
    assert {"name": "VPMOE_IMAGE", "value": "vpmoe/inference:1"} in container["env"], (
        "provenance names the image of the pod"
    )
    assert container["resources"] == {"requests": {"memory": "2Gi"}, "limits": {"nvidia.com/gpu": 1}}


@pytest.mark.parametrize("gpus, pods", [(None, 2), (1, 1), (4, 4)])
def test_rescoring_has_a_pod_for_each_of_its_gpus(gpus: int | None, pods: int) -> None:
    teacher = {"model": "s3://models/teacher", "gpus": 2}
    job = child("rescore", stages=RESCORED, teacher=teacher, rescore={"gpus": gpus})
    spec = job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", pods, pods)
    (container,) = spec["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1


@pytest.mark.parametrize(
    "step, pods, gpus, image",
    [
        pytest.param(
            "onpolicy-sampler",
            {"completions": 1, "parallelism": 1},
            3,
            "vpmoe/inference:1",
            id="one pod of sampler.gpus",
        ),
        pytest.param(
            "onpolicy-teacher",
            {"completionMode": "Indexed", "completions": 2, "parallelism": 2},
            1,
            "vpmoe/inference:1",
            id="a pod for each of teacher.gpus",
        ),
        pytest.param(
            "onpolicy",
            {"completions": 1, "parallelism": 1},
            4,
            "vpmoe/trainer:1",
            id="the GPUs without the sampler's",
        ),
        pytest.param(
            "onpolicy-evaluate", {"completions": 1, "parallelism": 1}, 1, "vpmoe/inference:1", id="one GPU"
        ),
    ],
)
def test_the_jobs_of_an_on_policy_stage_share_the_runs_gpus(
    step: str, pods: dict[str, Any], gpus: int, image: str
) -> None:
    job = child(step, **EVALUATED_ONPOLICY, runtime={"backend": "Job"})
    spec, role = job["spec"], ROLES.get(step, "train")
    assert (job["kind"], {key: spec[key] for key in pods}, spec["backoffLimit"]) == ("Job", pods, 0)
    assert ("completionMode" in spec) == ("completionMode" in pods)
    (container,) = spec["template"]["spec"]["containers"]
    assert (container["name"], container["image"], container["resources"]["limits"]) == (
        role,
        image,
        {"nvidia.com/gpu": gpus},
    )
    assert {"name": "VPMOE_IMAGE", "value": image} in container["env"]


@pytest.mark.parametrize(
    "step, spec, role, image",
    [
        pytest.param("init", UPCYCLED, "init", "vpmoe/trainer:1", id="init"),
        pytest.param("onpolicy-export", EVALUATED_ONPOLICY, "export", "vpmoe/inference:1", id="export"),
        pytest.param("onpolicy-report", REPORTED_ONPOLICY, "report", "vpmoe/inference:1", id="report"),
    ],
)
def test_a_step_that_writes_a_model_has_one_pod_without_a_gpu_and_may_run_on_nodes_without(
    step: str, spec: dict[str, Any], role: str, image: str
) -> None:
    job = child(step, **spec)
    assert (job["kind"], job["spec"]["completions"], job["spec"]["parallelism"]) == ("Job", 1, 1)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (container["name"], container["image"]) == (role, image)
    assert container["command"][2:] == [
        f"jobs.{role}",
        "--run",
        "/etc/vpmoe/run.yaml",
        "--step",
        step,
        "--attempt",
        "2",
    ]
    assert "limits" not in container["resources"]
    assert "tolerations" not in pod, "of the taint of nodes with GPUs"


def test_only_a_step_that_trains_is_a_pytorchjob() -> None:
    kinds = {step: child(step, **EVALUATED_ONPOLICY)["kind"] for step in run(**EVALUATED_ONPOLICY).steps()}
    assert {step for step, kind in kinds.items() if kind == "PyTorchJob"} == {"onpolicy"}


@pytest.mark.parametrize(
    "run_resources, resources",
    [
        pytest.param({}, {"requests": {"cpu": "4"}, "limits": {"nvidia.com/gpu": 2}}, id="the chart's"),
        pytest.param(
            {"train": {"requests": {"memory": "1Gi"}, "limits": {"memory": "2Gi"}}},
            {"requests": {"memory": "1Gi"}, "limits": {"memory": "2Gi", "nvidia.com/gpu": 2}},
            id="the run's",
        ),
    ],
)
def test_resources_of_the_run_override_those_of_the_chart(
    run_resources: dict[str, Any], resources: dict[str, Any]
) -> None:
    assert (
        templates(child(runtime={"resources": run_resources}))[0]["spec"]["containers"][0]["resources"]
        == resources
    )


@pytest.mark.parametrize(
    "step, spec, size, seconds",
    [
        # Two checkpoints of 72.4 GB, the one that is being written and the last, at 0.25 GB/s: 580 s; and a
        # minute.
        pytest.param("vanilla", {"student": SEVEN, "training": BATCH}, 72_358_739_124, 640, id="one-pod"),
        pytest.param(
            "vanilla",
            {"student": {**SEVEN, "gpusPerPod": 1}, "training": BATCH},
            72_358_739_124 / 7,
            300,
            id="seven-pods",
        ),
        pytest.param("vanilla", {"student": {"shape": "tiny", "gpus": 2}}, 312_135_168, 300, id="tiny"),
        # Also the copy of a policy version, in bf16.
        pytest.param("onpolicy", EVALUATED_ONPOLICY, 312_135_168 + 52_022_528, 300, id="onpolicy"),
    ],
)
def test_a_trainer_has_the_time_and_the_memory_to_save_its_state(
    step: str, spec: dict[str, Any], size: float, seconds: int
) -> None:
    """The chart's memory is without the copies; memory that the run sets is the whole."""
    settings = SETTINGS.model_copy(
        update={"resources": {"train": Resources(requests={"memory": "32Gi"}, limits={"memory": "64Gi"})}}
    )
    found = templates(child(step, settings=settings, **spec))
    assert {pod["spec"]["terminationGracePeriodSeconds"] for pod in found} == {seconds}
    for pod in found:
        resources = pod["spec"]["containers"][0]["resources"]
        for name, least in (("requests", 32 << 30), ("limits", 64 << 30)):
            mebi = int(resources[name]["memory"].removesuffix("Mi"))
            assert 0 <= mebi * 2**20 - (least + size) < 2**20 + 1
    own = {"runtime": {"resources": {"train": {"requests": {"memory": "200Gi"}}}}}
    resources = templates(child(step, settings=settings, **spec, **own))[0]["spec"]["containers"][0][
        "resources"
    ]
    assert resources["requests"]["memory"] == "200Gi"
    other = templates(child("preprocess", settings=settings, **spec))[0]["spec"]
    assert other["terminationGracePeriodSeconds"] == 300


@pytest.mark.parametrize("secret", ["vpmoe-s3", None])
def test_credentials_come_from_the_runs_secret_or_the_service_account(secret: str | None) -> None:
    storage = {"bucket": "vpmoe", "credentialsSecret": secret}
    env = templates(child(storage=storage))[0]["spec"]["containers"][0]["env"]
    from_secrets = {
        entry["name"]: entry["valueFrom"]["secretKeyRef"] for entry in env if "valueFrom" in entry
    }
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN") if secret else ()
    assert {name: (of["name"], of["key"]) for name, of in from_secrets.items()} == {
        name: ("vpmoe-s3", name) for name in names
    }
    assert [name for name, of in from_secrets.items() if of.get("optional")] == list(names[2:]), (
        "a pod starts without a token, and not without the keys"
    )
    assert "VPMOE_GIT_SHA" not in {entry["name"] for entry in env}, (
        "only the image knows what it was built from"
    )


def test_the_certificates_of_the_store_are_mounted_and_set_in_the_environment() -> None:
    pod = templates(child(storage={"bucket": "vpmoe", "caSecret": "authority"}))[0]["spec"]
    assert {"name": "AWS_CA_BUNDLE", "value": "/etc/vpmoe-ca/ca.crt"} in pod["containers"][0]["env"]
    assert any(volume.get("secret", {}).get("secretName") == "authority" for volume in pod["volumes"])


def test_preprocess_alone_is_told_the_memory_of_a_gpu() -> None:
    """runtime is not in a pod's run file; the other steps do not compare it."""
    variable = {"name": "VPMOE_GPU_MEMORY", "value": "80Gi"}
    for step in ("preprocess", "vanilla"):
        (template, *_) = templates(child(step=step, runtime={"gpuMemory": "80Gi"}))
        assert (variable in template["spec"]["containers"][0]["env"]) == (step == "preprocess")
    (template, *_) = templates(child(step="preprocess"))
    assert "VPMOE_GPU_MEMORY" not in str(template)


def test_every_pod_has_the_fields_of_spec_runtime() -> None:
    runtime = {
        **SCHEDULING,
        "serviceAccountName": "writer",
        "priorityClassName": "high",
        "imagePullSecrets": [{"name": "registry"}],
        "env": [{"name": "NCCL_DEBUG", "value": "INFO"}, {"name": "EMPTY"}],
    }
    for template in templates(child(runtime=runtime, student={"shape": "tiny", "gpus": 2, "gpusPerPod": 1})):
        pod = template["spec"]
        assert pod["containers"][0]["env"][-2:] == [
            {"name": "NCCL_DEBUG", "value": "INFO"},
            {"name": "EMPTY", "value": ""},
        ]
        assert (pod["serviceAccountName"], pod["priorityClassName"], pod["imagePullSecrets"]) == (
            "writer",
            "high",
            [{"name": "registry"}],
        )
        assert (pod["nodeSelector"], pod["tolerations"]) == (
            SCHEDULING["nodeSelector"],
            [*SCHEDULING["tolerations"], {"key": "nvidia.com/gpu", "operator": "Exists"}],
        )


@pytest.mark.parametrize("step, spec", CHILDREN)
def test_the_environment_that_the_operator_sets_is_reserved(step: str, spec: dict[str, Any]) -> None:
    """So a run cannot set it to something else."""
    storage = {"endpoint": "http://s3:9000", "bucket": "vpmoe", "credentialsSecret": "s", "caSecret": "ca"}
    for template in templates(child(step, **spec, storage=storage)):
        for entry in template["spec"]["containers"][0]["env"]:
            assert re.fullmatch(RESERVED_ENV, entry["name"]), entry


def test_pods_get_the_recorded_hash_and_a_config_map_without_runtime() -> None:
    """spec.runtime may change between two attempts, the ConfigMap of the run may not."""
    runtime = {
        "env": [{"name": "NCCL_DEBUG", "value": "INFO"}],
        "resources": {"train": {"limits": {"cpu": 1}}},
    }
    assert build_config_map(run(runtime=runtime), ORIGIN) == build_config_map(run(), ORIGIN)
    env = templates(child(runtime=runtime))[0]["spec"]["containers"][0]["env"]
    assert {"name": "VPMOE_CONFIG_HASH", "value": "b" * 64} in env, "that of the status, not one of its own"


@pytest.mark.parametrize("step, spec", CHILDREN)
def test_pods_with_gpus_tolerate_the_taint_of_nodes_with_gpus(step: str, spec: dict[str, Any]) -> None:
    toleration = {"key": "example.com/gpu", "operator": "Exists"}
    settings = SETTINGS.model_copy(update={"gpu_resource": "example.com/gpu"})
    for own in ([], [toleration]):
        changed = {**spec, "runtime": {**spec.get("runtime", {}), "tolerations": own}}
        for template in templates(child(step, settings=settings, **changed)):
            limits = template["spec"]["containers"][0]["resources"].get("limits", {})
            expected = [toleration] if own or "example.com/gpu" in limits else []
            assert template["spec"].get("tolerations", []) == expected


def test_gpus_are_requested_as_the_resource_of_the_chart_and_only_by_the_layout() -> None:
    settings = SETTINGS.model_copy(update={"gpu_resource": "example.com/gpu"})
    written = {
        role: {"requests": {"cpu": "2", "example.com/gpu": "7"}, "limits": {"example.com/gpu": "7"}}
        for role in ("preprocess", "train")
    }
    found = [
        template["spec"]["containers"][0]["resources"]
        for step in ("preprocess", "vanilla")
        for template in templates(child(step, settings=settings, runtime={"resources": written}))
    ]
    assert found == [
        {"requests": {"cpu": "2"}},
        {"requests": {"cpu": "2"}, "limits": {"example.com/gpu": 2}},
    ]


@pytest.mark.parametrize("step, spec", CHILDREN)
def test_a_child_with_a_queue_is_labelled_and_created_suspended(step: str, spec: dict[str, Any]) -> None:
    for queue in ("team", ""):
        made = child(step, **{**spec, "runtime": {**spec.get("runtime", {}), "queueName": queue}})
        suspend = made["spec"].get("suspend", made["spec"].get("runPolicy", {}).get("suspend"))
        label = made["metadata"]["labels"].get("kueue.x-k8s.io/queue-name")
        assert (label, suspend) == (("team", True) if queue else (None, None))


@pytest.mark.parametrize("step, spec", CHILDREN)
def test_every_pod_that_serves_declares_its_port(step: str, spec: dict[str, Any]) -> None:
    """Prometheus would report another pod that declares it as down."""
    first, *further = templates(child(step, **spec))
    (container,) = first["spec"]["containers"]
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert container["ports"] == [{"name": "metrics", "containerPort": 9090}]
    assert env["VPMOE_SERVE_PORT"] == "9090"
    assert not any("ports" in one for template in further for one in template["spec"]["containers"])


def test_the_workers_of_a_training_step_declare_no_port() -> None:
    replicas = child("vanilla", student={"shape": "tiny", "gpus": 2, "gpusPerPod": 1})["spec"][
        "pytorchReplicaSpecs"
    ]
    containers = {name: one["template"]["spec"]["containers"][0] for name, one in replicas.items()}
    assert "ports" in containers["Master"] and "ports" not in containers["Worker"]


def test_the_longest_names_are_valid_in_kubernetes() -> None:
    stages = [{"name": "q" * 16, "kind": "Rescored", "tokens": 1000}, {**ONPOLICY, "name": "s" * 16}]
    export = {"stages": [stage["name"] for stage in stages]}
    spec = {**named_manifest("x")["spec"], "stages": stages, "evaluation": EVALUATED, "export": export}
    longest = DistillRun.parse({**named_manifest("r" * 30), "spec": spec})
    for step in longest.steps():
        obj = build_child(Attempt(longest, step, 9999, ORIGIN, SETTINGS))
        max_length = 54 if obj["kind"] == "PyTorchJob" else 61 if "completionMode" in obj["spec"] else 63
        assert len(obj["metadata"]["name"]) <= max_length, (
            "host names have 63 characters: <name>-master-0, <name>-0"
        )
        assert all(
            re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", v)
            for v in obj["metadata"]["labels"].values()
        )
    with pytest.raises(Invalid):
        DistillRun.parse(named_manifest("r" * 31))


def test_children_of_different_runs_have_different_names() -> None:
    """No stage can be named sampler, teacher, evaluate or export, so a child's name determines the run's."""
    names = Counter[str]()
    for name in ("a", "a-b", "a-b-c", "a-sampler", "a-b-sampler", "a-evaluate", "a-export", "a-b-export"):
        stages = [{**ONPOLICY, "name": stage} for stage in ("b", "c", "a1", "bsampler")]
        export = {"stages": [stage["name"] for stage in stages]}
        spec = {**named_manifest("x")["spec"], "stages": stages, "evaluation": EVALUATED, "export": export}
        parsed = DistillRun.parse({**named_manifest(name), "spec": spec})
        names.update(child_name(parsed, step, attempt) for step in parsed.steps() for attempt in (1, 11))
    assert {name for name, count in names.items() if count > 1} == set()


def named_manifest(name: str) -> dict[str, Any]:
    obj = manifest()
    return {**obj, "metadata": {**obj["metadata"], "name": name}}
