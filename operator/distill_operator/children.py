"""The objects that a run's steps are made of: ConfigMap, Indexed Job, PyTorchJob, plain Job. Pure functions from a run to JSON.

What a pod of them looks like is template.py's business, when to make what plan.py's, and what happened to it observe.py's.
"""

from distill_operator.attempt import (
    MANAGED,
    Attempt,
    Origin,
    config_map_name,
    identity,
    short_facts,
    whole_facts,
)
from distill_operator.kube import CONFIGMAP, JOB, PYTORCHJOB, Json
from distill_operator.pod_template import build_pod
from vpmoe.api import DistillRun, Stage, labels
from vpmoe.api.layout import layout
from vpmoe.api.text import write_yaml

KUEUE_QUEUE = "kueue.x-k8s.io/queue-name"
ALONE: Json = {"completions": 1, "parallelism": 1}


def build_config_map(run: DistillRun, origin: Origin) -> Json:
    """The resolved run as every pod mounts it. Immutable: what a run means does not change under its pods."""
    facts = {labels.RUN: run.metadata.name, labels.GIT_SHA: origin.git_sha, labels.CONFIG: origin.config}
    short = {
        **facts,
        labels.GIT_SHA: origin.git_sha[: labels.SHORT],
        labels.CONFIG: origin.config[: labels.SHORT],
    }
    return {
        "apiVersion": CONFIGMAP.api_version,
        "kind": CONFIGMAP.name,
        "metadata": {
            **identity(run, config_map_name(run)),
            "labels": {**MANAGED, **short},
            "annotations": facts,
        },
        "immutable": True,
        "data": {"run.yaml": write_yaml(run.document())},
    }


def build_child(attempt: Attempt) -> Json:
    """The Job or PyTorchJob that carries out this attempt."""
    spec, role, stage = attempt.run.spec, attempt.run.role(attempt.step), attempt.run.stage_of(attempt.step)
    if role == "preprocess":  # each pod does its share of the input shards
        return _job(attempt, _indexed(spec.dataset.workers), build_pod(attempt, 0))
    if role in (
        "rescore",
        "teacher",
    ):  # each holds a teacher and scores its share of the parts, or of the windows
        return _job(attempt, _indexed(spec.teacher.gpus), build_pod(attempt, 1))
    if stage is not None and role == "train":
        return (
            build_pytorchjob(attempt, stage)
            if spec.runtime.backend == PYTORCHJOB.name
            else build_train_job(attempt, stage)
        )
    gpus = stage.sampler_gpus if stage is not None and role == "sampler" else 1
    return _job(
        attempt, ALONE, build_pod(attempt, gpus)
    )  # the sampler's one process a GPU, or what evaluates


def build_train_job(attempt: Attempt, stage: Stage) -> Json:
    """A Job of one pod with all of the stage's processes, the teacher's of a TeacherForced stage included."""
    gpus = layout(attempt.run.spec.student, attempt.run.spec.training, stage).first_pod_gpus
    return _job(attempt, ALONE, build_pod(attempt, gpus))


def build_pytorchjob(attempt: Attempt, stage: Stage) -> Json:
    """A PyTorchJob of one Master, where a TeacherForced stage's teacher stands too, and as many Workers as there are further pods."""
    shape = layout(attempt.run.spec.student, attempt.run.spec.training, stage)
    replicas = {"Master": _replica(attempt, 1, shape.first_pod_gpus)}
    if shape.pods > 1:
        replicas["Worker"] = _replica(attempt, shape.pods - 1, shape.processes_per_pod)
    return {
        "apiVersion": PYTORCHJOB.api_version,
        "kind": PYTORCHJOB.name,
        "metadata": _metadata(attempt),
        "spec": {
            "nprocPerNode": str(shape.processes_per_pod),
            "runPolicy": {
                "cleanPodPolicy": "Running"
            },  # with None, pods that survive a failure would keep their GPUs
            "pytorchReplicaSpecs": replicas,
        },
    }


def _replica(attempt: Attempt, count: int, gpus: int) -> Json:
    pod = build_pod(attempt, gpus, container="pytorch")
    pod["spec"].pop("restartPolicy")  # here it is the replica's; in both places the training operator warns
    return {"replicas": count, "restartPolicy": "Never", "template": pod}


def _indexed(pods: int) -> Json:
    return {"completionMode": "Indexed", "completions": pods, "parallelism": pods}


def _job(attempt: Attempt, shape: Json, pod: Json) -> Json:
    return {
        "apiVersion": JOB.api_version,
        "kind": JOB.name,
        "metadata": _metadata(attempt),
        "spec": {
            **shape,
            "backoffLimit": 0,  # attempts are the operator's: each is a Job of its own, whose pods stay for their logs
            "podReplacementPolicy": "Failed",  # never a second pod while the first is still writing its checkpoint
            "template": pod,
        },
    }


def _metadata(attempt: Attempt) -> Json:
    queue = attempt.run.spec.runtime.queue_name
    return {
        **identity(attempt.run, attempt.name),
        "labels": {**short_facts(attempt), **({KUEUE_QUEUE: queue} if queue else {})},
        "annotations": whole_facts(attempt),
    }
