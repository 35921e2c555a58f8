"""The objects that a run's steps are made of: ConfigMap, Indexed Job, PyTorchJob, plain Job. Pure functions from a run to JSON.

Every pod here satisfies the restricted pod security standard. When to make what is plan.py's business, and what happened to it
observe.py's.
"""

from dataclasses import dataclass
from typing import Any

from distill_operator.kube import CHILD_KINDS, CONFIGMAP, DISTILLRUN, JOB, PYTORCHJOB, Json, Kind
from distill_operator.settings import Settings
from vpmoe.api import DistillRun, Stage, labels
from vpmoe.api.layout import layout
from vpmoe.api.run import PREPROCESS, RESCORE
from vpmoe.api.runtime import Role
from vpmoe.api.text import write_yaml

GPU = "nvidia.com/gpu"
USER = 65532
RUN_FILE = "/etc/vpmoe/run.yaml"
CA_FOLDER = "/etc/vpmoe-ca"
GRACE_SECONDS = 300
"""Time for the last checkpoint after SIGTERM."""
METRICS_PORT = 9090
"""Where a training pod serves Prometheus."""
KUEUE_QUEUE = "kueue.x-k8s.io/queue-name"
MANAGED = {"app.kubernetes.io/managed-by": "distill-operator", "app.kubernetes.io/part-of": "vpmoe"}


@dataclass(frozen=True)
class Origin:
    """What every child of a run says about where it comes from; the data set is known once preprocessing has named it."""

    git_sha: str
    config: str
    dataset: str | None


@dataclass(frozen=True)
class Attempt:
    """One attempt of one step, and all that its child is built from."""

    run: DistillRun
    step: str
    number: int
    origin: Origin
    settings: Settings

    @property
    def name(self) -> str:
        return child_name(self.run, self.step, self.number)


def child_name(run: DistillRun, step: str, attempt: int) -> str:
    """The one name that this attempt's child can have."""
    return f"{run.metadata.name}-{step}-a{attempt}"


def child_kind(run: DistillRun, step: str) -> Kind:
    """What a step's child is: preprocessing and rescoring always a Job, training what runtime.backend says."""
    return JOB if step in (PREPROCESS, RESCORE) else CHILD_KINDS[run.spec.runtime.backend]


def config_map_name(run: DistillRun) -> str:
    """With the run's uid: a kubelet never looks again at an immutable ConfigMap, and would give pods that of an earlier run of the name."""
    return f"{run.metadata.name}-config-{run.uid8}"


def build_config_map(run: DistillRun, origin: Origin) -> Json:
    """The resolved run as every pod mounts it. Immutable: what a run means does not change under its pods."""
    facts = {labels.RUN: run.metadata.name, labels.GIT_SHA: origin.git_sha, labels.CONFIG: origin.config}
    short = {**facts, labels.GIT_SHA: origin.git_sha[: labels.SHORT], labels.CONFIG: origin.config[: labels.SHORT]}
    return {
        "apiVersion": CONFIGMAP.api_version,
        "kind": CONFIGMAP.name,
        "metadata": {**_identity(run, config_map_name(run)), "labels": {**MANAGED, **short}, "annotations": facts},
        "immutable": True,
        "data": {"run.yaml": write_yaml(run.document())},
    }


def build_child(attempt: Attempt) -> Json:
    """The Job or PyTorchJob that carries out this attempt."""
    if attempt.step == PREPROCESS:
        return build_preprocess(attempt)
    if attempt.step == RESCORE:
        return build_rescore(attempt)
    stage = attempt.run.stage(attempt.step)
    return build_pytorchjob(attempt, stage) if attempt.run.spec.runtime.backend == PYTORCHJOB.name else build_train_job(attempt, stage)


def build_preprocess(attempt: Attempt) -> Json:
    """An Indexed Job of dataset.workers pods, each of which does its share of the input shards."""
    return _job(attempt, _indexed(attempt.run.spec.dataset.workers), _pod(attempt, role="preprocess", container="preprocess", gpus=0))


def build_rescore(attempt: Attempt) -> Json:
    """An Indexed Job of teacher.gpus pods of one GPU, each of which holds a teacher and scores its share of the parts."""
    return _job(attempt, _indexed(attempt.run.spec.teacher.gpus), _pod(attempt, role="rescore", container="rescore", gpus=1))


def build_train_job(attempt: Attempt, stage: Stage) -> Json:
    """A Job of one pod with all of the stage's processes, the teacher's of a TeacherForced stage included."""
    gpus = layout(attempt.run.spec, stage).first_pod_gpus
    return _job(attempt, {"completions": 1, "parallelism": 1}, _pod(attempt, role="train", container="train", gpus=gpus))


def build_pytorchjob(attempt: Attempt, stage: Stage) -> Json:
    """A PyTorchJob of one Master, where a TeacherForced stage's teacher stands too, and as many Workers as there are further pods."""
    shape = layout(attempt.run.spec, stage)
    replicas = {"Master": _replica(attempt, 1, shape.first_pod_gpus)}
    if shape.pods > 1:
        replicas["Worker"] = _replica(attempt, shape.pods - 1, shape.processes_per_pod)
    return {
        "apiVersion": PYTORCHJOB.api_version,
        "kind": PYTORCHJOB.name,
        "metadata": _child_metadata(attempt),
        "spec": {
            "nprocPerNode": str(shape.processes_per_pod),
            "runPolicy": {"cleanPodPolicy": "Running"},  # with None, pods that survive a failure would keep their GPUs
            "pytorchReplicaSpecs": replicas,
        },
    }


def _replica(attempt: Attempt, count: int, gpus: int) -> Json:
    pod = _pod(attempt, role="train", container="pytorch", gpus=gpus)
    pod["spec"].pop("restartPolicy")  # here it is the replica's; in both places the training operator warns
    return {"replicas": count, "restartPolicy": "Never", "template": pod}


def _indexed(pods: int) -> Json:
    return {"completionMode": "Indexed", "completions": pods, "parallelism": pods}


def _job(attempt: Attempt, shape: Json, pod: Json) -> Json:
    return {
        "apiVersion": JOB.api_version,
        "kind": JOB.name,
        "metadata": _child_metadata(attempt),
        "spec": {
            **shape,
            "backoffLimit": 0,  # attempts are the operator's: each is a Job of its own, whose pods stay for their logs
            "podReplacementPolicy": "Failed",  # never a second pod while the first is still writing its checkpoint
            "template": pod,
        },
    }


def _pod(attempt: Attempt, *, role: Role, container: str, gpus: int) -> Json:
    runtime = attempt.run.spec.runtime
    tolerations = [toleration.model_dump(mode="json", by_alias=True, exclude_none=True) for toleration in runtime.tolerations]
    optional = {
        "serviceAccountName": runtime.service_account_name,
        "priorityClassName": runtime.priority_class_name,
        "imagePullSecrets": [{"name": secret.name} for secret in runtime.image_pull_secrets],
        "nodeSelector": dict(runtime.node_selector),
        "tolerations": tolerations,
    }
    return {
        "metadata": {"labels": _labels(attempt), "annotations": _annotations(attempt)},
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": GRACE_SECONDS,
            "shareProcessNamespace": True,  # as process 1 a job that is still importing would be deaf to SIGTERM, and run on
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
            "containers": [_container(attempt, role=role, name=container, gpus=gpus)],
            "volumes": _volumes(attempt.run),
        },
    }


def _container(attempt: Attempt, *, role: Role, name: str, gpus: int) -> Json:
    run, images = attempt.run, attempt.settings.images
    image = images.inference if role == "rescore" else images.trainer
    command = ["python", "-m", f"jobs.{role}", "--run", RUN_FILE, "--step", attempt.step, "--attempt", str(attempt.number)]
    return {
        "name": name,
        "image": image,
        "command": command,
        "workingDir": "/opt/vpmoe",
        "env": [
            *_credentials(run),
            {"name": "VPMOE_GIT_SHA", "value": attempt.origin.git_sha},
            {"name": "VPMOE_IMAGE", "value": image},
            {"name": "TMPDIR", "value": "/tmp"},
            {"name": "HOME", "value": "/tmp"},
            *([{"name": "VPMOE_METRICS_PORT", "value": str(METRICS_PORT)}] if role == "train" else []),
        ],
        **({"ports": [{"name": "metrics", "containerPort": METRICS_PORT}]} if role == "train" else {}),
        "resources": _resources(attempt, role, gpus),
        "securityContext": {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}},
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "config", "mountPath": "/etc/vpmoe", "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "shm", "mountPath": "/dev/shm"},
            *([{"name": "ca", "mountPath": CA_FOLDER, "readOnly": True}] if run.spec.storage.ca_secret else []),
        ],
    }


def _credentials(run: DistillRun) -> list[Json]:
    """Environment with which storage signs its requests; without a Secret the service account's own identity does."""
    storage = run.spec.storage
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY") if storage.credentials_secret else ()
    env: list[Json] = [{"name": key, "valueFrom": {"secretKeyRef": {"name": storage.credentials_secret, "key": key}}} for key in keys]
    return env + ([{"name": "AWS_CA_BUNDLE", "value": f"{CA_FOLDER}/ca.crt"}] if storage.ca_secret else [])


def _resources(attempt: Attempt, role: Role, gpus: int) -> Json:
    """The run's own words for this role, else the chart's; GPUs are always the layout's."""
    given: Any = attempt.run.spec.runtime.resources.get(role) or attempt.settings.resources.get(role)
    requests, limits = (dict(given.requests), dict(given.limits)) if given else ({}, {})
    if gpus:
        limits[GPU] = gpus
    return {key: value for key, value in (("requests", requests), ("limits", limits)) if value}


def _volumes(run: DistillRun) -> list[Json]:
    ca = run.spec.storage.ca_secret
    return [
        {"name": "config", "configMap": {"name": config_map_name(run)}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
        *([{"name": "ca", "secret": {"secretName": ca, "items": [{"key": "ca.crt", "path": "ca.crt"}]}}] if ca else []),
    ]


def _child_metadata(attempt: Attempt) -> Json:
    queue = attempt.run.spec.runtime.queue_name
    return {
        **_identity(attempt.run, attempt.name),
        "labels": {**_labels(attempt), **({KUEUE_QUEUE: queue} if queue else {})},
        "annotations": _annotations(attempt),
    }


def _identity(run: DistillRun, name: str) -> Json:
    """Name, namespace, and the owner with whom the object is garbage-collected."""
    owner = {"apiVersion": DISTILLRUN.api_version, "kind": DISTILLRUN.name, "name": run.metadata.name, "uid": run.metadata.uid}
    return {
        "name": name,
        "namespace": run.metadata.namespace,
        "ownerReferences": [{**owner, "controller": True, "blockOwnerDeletion": True}],
    }


def _labels(attempt: Attempt) -> dict[str, str]:
    return {**MANAGED, **labels.labels(attempt.run.metadata.name, **_facts(attempt))}


def _annotations(attempt: Attempt) -> dict[str, str]:
    return labels.annotations(attempt.run.metadata.name, **_facts(attempt))


def _facts(attempt: Attempt) -> Any:
    origin = attempt.origin
    return {"step": attempt.step, "attempt": attempt.number, "git_sha": origin.git_sha, "config": origin.config, "dataset": origin.dataset}
