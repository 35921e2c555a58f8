"""The pod template of every role: image, command, environment, resources, security.

Pure functions from an attempt to JSON.

Every pod satisfies the restricted pod security standard, unless the run adds capabilities. The number of pods
of a child is in children.py.
"""

import re
from typing import Any

from distill_operator.attempt import (
    Attempt,
    child_annotations,
    child_kind,
    child_labels,
    config_map_name,
)
from distill_operator.kube import PYTORCHJOB, Json, Kind
from distill_operator.settings import Settings
from vpmoe.api import DistillRun, labels
from vpmoe.api.environment import RESERVED_ENV, EnvVar
from vpmoe.api.quantities import parse_quantity
from vpmoe.api.runtime import Role, Toleration, is_extended
from vpmoe.api.saving import LEAST_GRACE_SECONDS, grace_seconds, host_copies
from vpmoe.api.text import write_yaml

INFERENCE: tuple[Role, ...] = ("rescore", "teacher", "sampler", "evaluate", "export", "report")
"""Roles that load a model in vLLM, or write one. Their pods run the inference image."""
USER = 65532
WORKING_FOLDER = "/opt/vpmoe"
"""Folder of the code in our images."""
COMMIT_FILE = f"{WORKING_FOLDER}/commit"
"""File of our images with the commit that they were built from (vpmoe.provenance)."""
RUN_FILE = "/etc/vpmoe/run.yaml"
CA_FOLDER = "/etc/vpmoe-ca"
CONTAINER_SECURITY: Json = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
TEACHER_CACHE = "/var/cache/vpmoe/teacher"
"""Where the volume of runtime.teacherCache is mounted."""
WEIGHTS_VOLUME = "/var/cache/vpmoe/weights"
"""Where the volume of runtime.weightsVolume is mounted."""
INDEXED: tuple[Role, ...] = ("preprocess", "rescore", "teacher")
"""Roles whose pods belong to an Indexed Job, which sets JOB_COMPLETION_INDEX."""
OF_PYTORCHJOB = ("PET_*", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
"""Reserved variables that the training operator adds to the containers of a PyTorchJob."""
CLEAR_RESOURCES: Json = {
    "requests": {"cpu": "100m", "memory": "256Mi"},
    "limits": {"cpu": "1", "memory": "1Gi"},
}
"""Of the pod that deletes a run's folder."""
SECRET_KEYS: dict[str, Json] = {
    "AWS_ACCESS_KEY_ID": {},
    "AWS_SECRET_ACCESS_KEY": {},
    "AWS_SESSION_TOKEN": {"optional": True},  # only temporary credentials have one
}
"""Keys of the Secret with the storage credentials that become environment variables of the same name."""
MEBI = 1 << 20
POD_PORT = 9090
"""Port at which every pod serves /progress for the operator and /metrics for Prometheus."""


def container_name(kind: Kind, role: Role) -> str:
    """Name of the job's own container in the pods of a child. The training operator requires pytorch."""
    return "pytorch" if kind is PYTORCHJOB else role


def build_pod(attempt: Attempt, gpus: int, *, teacher: bool = False, first: bool = True) -> Json:
    """The template of a pod with `gpus` GPUs and one container. `teacher`: a process of it loads the
    teacher. `first`: it is not one of the further pods of a PyTorchJob."""
    run, role = attempt.run, attempt.run.role(attempt.step)
    runtime = run.spec.runtime
    main = _container(attempt, role, gpus)
    if first:  # of a training step only the process of rank 0 serves
        main["ports"] = [{"name": "metrics", "containerPort": POD_PORT}]
    volumes = _volumes(run)
    if teacher and runtime.teacher_cache is not None:
        volumes.append(
            {"name": "teacher", "persistentVolumeClaim": {"claimName": runtime.teacher_cache.claim_name}}
        )
        main["volumeMounts"].append({"name": "teacher", "mountPath": TEACHER_CACHE})
        main["env"].insert(0, {"name": "VPMOE_TEACHER_CACHE", "value": TEACHER_CACHE})
    if first and runtime.weights_volume is not None and _exchanges_versions(attempt):
        claim = runtime.weights_volume.claim_name
        volumes.append({"name": "weights", "persistentVolumeClaim": {"claimName": claim}})
        read_only = {"readOnly": True} if role == "sampler" else {}
        main["volumeMounts"].append({"name": "weights", "mountPath": WEIGHTS_VOLUME, **read_only})
        main["env"].insert(0, {"name": "VPMOE_WEIGHTS_VOLUME", "value": WEIGHTS_VOLUME})
    trains = OF_PYTORCHJOB if child_kind(run, attempt.step) is PYTORCHJOB else ()
    _declare_environment(main, *(("JOB_COMPLETION_INDEX",) if role in INDEXED else trains))
    tolerations = gpu_tolerations(run, attempt.settings) if gpus else runtime.tolerations
    of_steps = {
        "schedulerName": runtime.scheduler_name,
        "runtimeClassName": runtime.runtime_class_name if gpus else "",
    }
    return {
        "metadata": {
            "labels": {**runtime.pod_labels, **child_labels(attempt)},
            "annotations": {**runtime.pod_annotations, **child_annotations(attempt)},
        },
        "spec": {
            **_pod_spec(run, main, volumes, tolerations),
            "terminationGracePeriodSeconds": _grace_seconds(attempt, role),
            **{key: value for key, value in of_steps.items() if value},
        },
    }


def _grace_seconds(attempt: Attempt, role: Role) -> int:
    """Time after SIGTERM: for a trainer's last checkpoint."""
    spec, stage = attempt.run.spec, attempt.run.stage_of(attempt.step)
    if role != "train" or stage is None:
        return LEAST_GRACE_SECONDS
    return grace_seconds(spec.student, spec.training, stage)


def _exchanges_versions(attempt: Attempt) -> bool:
    """Whether the step writes or loads policy versions: the trainer of an OnPolicy stage, and the sampler."""
    stage = attempt.run.stage_of(attempt.step)
    return stage is not None and stage.samples and attempt.run.role(attempt.step) in ("train", "sampler")


def build_clear_pod(run: DistillRun, image: str, container: str) -> Json:
    """The template of the pod that deletes the run's folder. Its run file is an annotation of its own."""
    document = f"metadata.annotations['{labels.RUN_DOCUMENT}']"
    run_file = {"path": RUN_FILE.rpartition("/")[2], "fieldRef": {"fieldPath": document}}
    volumes = [
        {"name": "config", "downwardAPI": {"items": [run_file]}},
        {"name": "tmp", "emptyDir": {}},
        *_ca_volume(run),
    ]
    main = {
        "name": container,
        "image": image,
        "command": ["python", "-m", "jobs.clear", "--run", RUN_FILE],
        "workingDir": WORKING_FOLDER,
        "env": [
            *_credentials(run),
            {"name": "TMPDIR", "value": "/tmp"},
            {"name": "HOME", "value": "/tmp"},
            *map(_variable, run.spec.runtime.env),
        ],
        **_env_from(run),
        "resources": CLEAR_RESOURCES,
        "securityContext": CONTAINER_SECURITY,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "config", "mountPath": "/etc/vpmoe", "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},
            *_ca_mount(run),
        ],
    }
    _declare_environment(main)
    runtime = run.spec.runtime
    return {
        "metadata": {
            "labels": dict(runtime.pod_labels),
            "annotations": {
                **runtime.pod_annotations,
                labels.RUN_DOCUMENT: write_yaml(run.document()),
            },
        },
        "spec": _pod_spec(run, main, volumes, runtime.tolerations),
    }


def _pod_spec(
    run: DistillRun, container: Json, volumes: list[Json], tolerations: tuple[Toleration, ...]
) -> Json:
    """The spec of a pod of the run: what is not the container's."""
    runtime = run.spec.runtime
    optional = {
        "serviceAccountName": runtime.service_account_name,
        "priorityClassName": runtime.priority_class_name,
        "imagePullSecrets": [{"name": secret.name} for secret in runtime.image_pull_secrets],
        "nodeSelector": dict(runtime.node_selector),
        "tolerations": [
            toleration.model_dump(mode="json", by_alias=True, exclude_none=True) for toleration in tolerations
        ],
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": LEAST_GRACE_SECONDS,
        "shareProcessNamespace": True,  # process 1 ignores SIGTERM until its handler is set
        "automountServiceAccountToken": False,  # jobs never touch the Kubernetes API
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        **{key: value for key, value in optional.items() if value},
        "containers": [container],
        "volumes": volumes,
    }


def gpu_tolerations(run: DistillRun, settings: Settings) -> tuple[Toleration, ...]:
    """Tolerations of the run's pods with GPUs: its own, and that of taints with the name of the GPU resource.

    Such taints keep pods without GPUs away from nodes with them. Many clusters add this toleration to every
    pod that requests the resource.
    """
    implied = Toleration(key=settings.gpu_resource, operator="Exists")
    own = run.spec.runtime.tolerations
    return own if implied in own else (*own, implied)


def _container(attempt: Attempt, role: Role, gpus: int) -> Json:
    run, images = attempt.run, attempt.settings.images
    image = images.inference if role in INFERENCE or _runs_teacher(attempt) else images.trainer
    command = [
        "python",
        "-m",
        f"jobs.{role}",
        "--run",
        RUN_FILE,
        "--step",
        attempt.step,
        "--attempt",
        str(attempt.number),
    ]
    return {
        "name": container_name(child_kind(run, attempt.step), role),
        "image": image,
        "command": command,
        "workingDir": WORKING_FOLDER,
        "env": [
            *_credentials(run),
            {"name": "VPMOE_CONFIG_HASH", "value": attempt.origin.config},
            {"name": "VPMOE_IMAGE", "value": image},
            {"name": "TMPDIR", "value": "/tmp"},
            {"name": "HOME", "value": "/tmp"},
            {"name": "VPMOE_SERVE_PORT", "value": str(POD_PORT)},
            *_gpu_memory(run, role),
            *map(_variable, run.spec.runtime.env),
        ],
        **_env_from(run),
        "resources": _resources(attempt, role, gpus),
        "securityContext": _container_security(run, role),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "config", "mountPath": "/etc/vpmoe", "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "shm", "mountPath": "/dev/shm"},
            *_ca_mount(run),
        ],
    }


def _runs_teacher(attempt: Attempt) -> bool:
    """Whether ranks and teachers of a TeacherForced stage run in the pods: the inference image has vLLM for
    these and megatron-core for those."""
    stage = attempt.run.stage_of(attempt.step)
    return attempt.run.role(attempt.step) == "train" and stage is not None and stage.runs_teacher


def _variable(variable: EnvVar) -> Json:
    """A variable of runtime.env as a container has it."""
    if variable.value_from is None:
        return {"name": variable.name, "value": variable.value}
    source = variable.value_from.model_dump(by_alias=True, exclude_defaults=True)
    return {"name": variable.name, "valueFrom": source}


def _env_from(run: DistillRun) -> Json:
    """The container's envFrom. Kubernetes gives every entry of env precedence over it."""
    sources = [
        source.model_dump(by_alias=True, exclude_defaults=True) for source in run.spec.runtime.env_from
    ]
    return {"envFrom": sources} if sources else {}


def _declare_environment(container: Json, *injected: str) -> None:
    """Tell a container with envFrom which reserved variables are meant to be there.

    The operator reads no Secret, so the container itself rejects others (vpmoe.process.environment).
    """
    if "envFrom" in container:
        reserved = [entry["name"] for entry in container["env"] if re.fullmatch(RESERVED_ENV, entry["name"])]
        container["env"].append({"name": "VPMOE_DECLARED", "value": " ".join([*reserved, *injected])})


def _container_security(run: DistillRun, role: Role) -> Json:
    """The restricted standard, or root with the run's capabilities and no other.

    A process of another user loses what the container adds: Linux keeps capabilities across execve for root
    alone, or for what is ambient, which Kubernetes cannot set.
    """
    added = run.spec.runtime.capabilities if role == "train" else ()
    if not added:
        return CONTAINER_SECURITY
    return {
        **CONTAINER_SECURITY,
        "runAsUser": 0,
        "runAsNonRoot": False,
        "capabilities": {"drop": ["ALL"], "add": list(added)},
    }


def _gpu_memory(run: DistillRun, role: Role) -> list[Json]:
    """Environment of the step that compares the teacher with the GPUs; runtime is not in the run file."""
    memory = run.spec.runtime.gpu_memory
    return [{"name": "VPMOE_GPU_MEMORY", "value": memory}] if memory and role == "preprocess" else []


def _credentials(run: DistillRun) -> list[Json]:
    """Environment with the storage credentials.

    Without a Secret the pod's service account provides the identity.
    """
    storage = run.spec.storage
    name = storage.credentials_secret
    env: list[Json] = [
        {"name": key, "valueFrom": {"secretKeyRef": {"name": name, "key": key, **optional}}}
        for key, optional in SECRET_KEYS.items()
        if name
    ]
    return env + ([{"name": "AWS_CA_BUNDLE", "value": f"{CA_FOLDER}/ca.crt"}] if storage.ca_secret else [])


def _resources(attempt: Attempt, role: Role, gpus: int) -> Json:
    """Requests and limits of the run for this role, or else the chart's. GPUs are always the layout's.

    The chart's memory of a trainer is without the copies that are uploaded, whose size is the run's; a run's
    own is the whole. What cannot be overcommitted needs a limit, which is its request.
    """
    own: Any = attempt.run.spec.runtime.resources.get(role)
    configured: Any = own or attempt.settings.resources.get(role)
    requests, limits = (dict(configured.requests), dict(configured.limits)) if configured else ({}, {})
    stage = attempt.run.stage_of(attempt.step)
    if role == "train" and stage is not None and not own:
        copies = host_copies(attempt.run.spec.student, attempt.run.spec.training, stage)
        for amounts in (requests, limits):
            if "memory" in amounts:
                amounts["memory"] = f"{-(-int(parse_quantity(amounts['memory']) + copies) // MEBI)}Mi"
    resource = attempt.settings.gpu_resource
    requests.pop(resource, None)
    limits.pop(resource, None)
    limits = {name: value for name, value in requests.items() if is_extended(name)} | limits
    if gpus:
        limits[resource] = gpus
    return {key: value for key, value in (("requests", requests), ("limits", limits)) if value}


def _volumes(run: DistillRun) -> list[Json]:
    return [
        {"name": "config", "configMap": {"name": config_map_name(run)}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "shm", "emptyDir": _shared_memory(run)},
        *_ca_volume(run),
    ]


def _shared_memory(run: DistillRun) -> Json:
    """What NCCL and torch share between processes: memory, as much as the run allows."""
    limit = run.spec.runtime.shared_memory
    return {"medium": "Memory", **({} if limit is None else {"sizeLimit": limit})}


def _ca_volume(run: DistillRun) -> list[Json]:
    """The volume with the certificates of the store's authority, if the run names any."""
    name = run.spec.storage.ca_secret
    items = [{"key": "ca.crt", "path": "ca.crt"}]
    return [{"name": "ca", "secret": {"secretName": name, "items": items}}] if name else []


def _ca_mount(run: DistillRun) -> list[Json]:
    return [{"name": "ca", "mountPath": CA_FOLDER, "readOnly": True}] if run.spec.storage.ca_secret else []
