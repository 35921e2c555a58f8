"""The objects that carry out a run's steps:

ConfigMap, Indexed Job, PyTorchJob, plain Job. Pure functions from a run to JSON.

The pod template is in pod_template.py. plan.py decides when to create a child, observe.py reads its state.
"""

from distill_operator.attempt import (
    COMMON_LABELS,
    Attempt,
    Origin,
    child_annotations,
    child_labels,
    config_map_name,
    owned_metadata,
)
from distill_operator.kube import CONFIGMAP, JOB, PYTORCHJOB, Json
from distill_operator.pod_template import build_pod
from vpmoe.api import DistillRun, Stage, labels
from vpmoe.api.layout import first_pod_gpus, layout
from vpmoe.api.text import write_yaml

SINGLE_POD: Json = {"completions": 1, "parallelism": 1}


def build_config_map(run: DistillRun, origin: Origin) -> Json:
    """The ConfigMap with the resolved run, which every pod mounts.

    Immutable: a run's configuration does not change under its pods. spec.runtime, which may change, is not in
    it: pods get it from their template.
    """
    whole = {labels.RUN: run.metadata.name, labels.CONFIG: origin.config}
    short = {**whole, labels.CONFIG: origin.config[: labels.SHORT]}
    return {
        "apiVersion": CONFIGMAP.api_version,
        "kind": CONFIGMAP.name,
        "metadata": {
            **owned_metadata(run, config_map_name(run)),
            "labels": {**COMMON_LABELS, **short},
            "annotations": whole,
        },
        "immutable": True,
        "data": {"run.yaml": write_yaml(run.document())},
    }


def build_child(attempt: Attempt) -> Json:
    """The Job or PyTorchJob that carries out this attempt."""
    spec, role, stage = attempt.run.spec, attempt.run.role(attempt.step), attempt.run.stage_of(attempt.step)
    if role == "preprocess":  # each pod processes its share of the input shards
        return _job(attempt, _indexed(spec.dataset.workers), build_pod(attempt, 0))
    if role in ("rescore", "teacher"):  # each pod has a whole teacher, scores its share of parts or windows
        pods = spec.rescoring_gpus if role == "rescore" else spec.teacher.gpus
        return _job(attempt, _indexed(pods), build_pod(attempt, 1, teacher=True))
    if stage is not None and role == "train":
        return (
            build_pytorchjob(attempt, stage)
            if spec.runtime.backend == PYTORCHJOB.name
            else build_train_job(attempt, stage)
        )
    if role in ("init", "export", "report"):  # reads objects and writes files, on a CPU
        return _job(attempt, SINGLE_POD, build_pod(attempt, 0))
    if role == "sampler":
        gpus = stage.sampler_gpus if stage is not None else 0
    elif attempt.run.serves_trainer(attempt.step):  # an evaluation beside the trainer, on the teacher's GPU
        gpus = min(1, spec.teacher.gpus)
    else:  # an evaluation after the trainer, on one of its GPUs
        gpus = 1
    return _job(attempt, SINGLE_POD, build_pod(attempt, gpus))


def build_train_job(attempt: Attempt, stage: Stage) -> Json:
    """A Job of one pod with all processes of the stage, including the teachers of a TeacherForced stage."""
    spec = attempt.run.spec
    gpus = first_pod_gpus(spec.teacher, spec.student, stage)
    return _job(attempt, SINGLE_POD, build_pod(attempt, gpus, teacher=stage.runs_teacher))


def build_pytorchjob(attempt: Attempt, stage: Stage) -> Json:
    """A PyTorchJob of one Master and a Worker for each further pod.

    The teachers of a TeacherForced stage run in the Master.
    """
    spec = attempt.run.spec
    shape = layout(spec.student, spec.training, stage)
    gpus = first_pod_gpus(spec.teacher, spec.student, stage)
    replicas = {"Master": _replica(1, build_pod(attempt, gpus, teacher=stage.runs_teacher))}
    if shape.pods > 1:
        worker = build_pod(attempt, shape.processes_per_pod, first=False)
        replicas["Worker"] = _replica(shape.pods - 1, worker)
    return {
        "apiVersion": PYTORCHJOB.api_version,
        "kind": PYTORCHJOB.name,
        "metadata": _metadata(attempt),
        "spec": {
            "nprocPerNode": str(shape.processes_per_pod),
            "runPolicy": {
                "cleanPodPolicy": "Running",  # with None, pods that survive a failure keep their GPUs
                **_suspended(attempt),
            },
            "pytorchReplicaSpecs": replicas,
        },
    }


def _replica(count: int, pod: Json) -> Json:
    pod["spec"].pop("restartPolicy")  # set on the replica
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
            "backoffLimit": 0,  # each attempt is a Job; its pods are kept for their logs
            "podReplacementPolicy": "Failed",  # no second pod while the first still saves its checkpoint
            **_suspended(attempt),
            "template": pod,
        },
    }


def _suspended(attempt: Attempt) -> Json:
    """An object with a queue is created suspended, and Kueue resumes it when it admits it."""
    return {"suspend": True} if attempt.run.spec.runtime.queue_name else {}


def _metadata(attempt: Attempt) -> Json:
    queue = attempt.run.spec.runtime.queue_name
    return {
        **owned_metadata(attempt.run, attempt.name),
        "labels": {**child_labels(attempt), **({labels.KUEUE_QUEUE: queue} if queue else {})},
        "annotations": child_annotations(attempt),
    }
