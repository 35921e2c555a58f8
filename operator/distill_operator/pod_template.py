"""The pod template of every role: image, command, environment, resources, security.

Pure functions from an attempt to JSON.

Every pod satisfies the restricted pod security standard. The number of pods of a child is in children.py.
"""

from typing import Any

from distill_operator.attempt import Attempt, child_annotations, child_labels, config_map_name
from distill_operator.kube import Json
from vpmoe.api import DistillRun
from vpmoe.api.runtime import GPU, Role

INFERENCE: tuple[Role, ...] = ("rescore", "teacher", "sampler", "evaluate")
"""Roles that load a model in vLLM. Their pods run the inference image."""
USER = 65532
RUN_FILE = "/etc/vpmoe/run.yaml"
CA_FOLDER = "/etc/vpmoe-ca"
GRACE_SECONDS = 300
"""Time for the last checkpoint after SIGTERM."""
METRICS_PORT = 9090
"""Port of a training pod's Prometheus metrics."""


def build_pod(attempt: Attempt, gpus: int, container: str = "") -> Json:
    """The template of a pod with `gpus` GPUs. Its one container is named after its role, or `container`."""
    role = attempt.run.role(attempt.step)
    runtime = attempt.run.spec.runtime
    tolerations = [
        toleration.model_dump(mode="json", by_alias=True, exclude_none=True)
        for toleration in runtime.tolerations
    ]
    optional = {
        "serviceAccountName": runtime.service_account_name,
        "priorityClassName": runtime.priority_class_name,
        "imagePullSecrets": [{"name": secret.name} for secret in runtime.image_pull_secrets],
        "nodeSelector": dict(runtime.node_selector),
        "tolerations": tolerations,
    }
    return {
        "metadata": {"labels": child_labels(attempt), "annotations": child_annotations(attempt)},
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": GRACE_SECONDS,
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
            "containers": [_container(attempt, role, container or role, gpus)],
            "volumes": _volumes(attempt.run),
        },
    }


def _container(attempt: Attempt, role: Role, name: str, gpus: int) -> Json:
    run, images = attempt.run, attempt.settings.images
    image = images.inference if role in INFERENCE else images.trainer
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
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "config", "mountPath": "/etc/vpmoe", "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "shm", "mountPath": "/dev/shm"},
            *(
                [{"name": "ca", "mountPath": CA_FOLDER, "readOnly": True}]
                if run.spec.storage.ca_secret
                else []
            ),
        ],
    }


def _credentials(run: DistillRun) -> list[Json]:
    """Environment with the storage credentials.

    Without a Secret the pod's service account provides the identity.
    """
    storage = run.spec.storage
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY") if storage.credentials_secret else ()
    env: list[Json] = [
        {"name": key, "valueFrom": {"secretKeyRef": {"name": storage.credentials_secret, "key": key}}}
        for key in keys
    ]
    return env + ([{"name": "AWS_CA_BUNDLE", "value": f"{CA_FOLDER}/ca.crt"}] if storage.ca_secret else [])


def _resources(attempt: Attempt, role: Role, gpus: int) -> Json:
    """Requests and limits of the run for this role, or else the chart's. GPUs are always the layout's."""
    configured: Any = attempt.run.spec.runtime.resources.get(role) or attempt.settings.resources.get(role)
    requests, limits = (dict(configured.requests), dict(configured.limits)) if configured else ({}, {})
    if gpus:
        limits[GPU] = gpus
    return {key: value for key, value in (("requests", requests), ("limits", limits)) if value}


def _volumes(run: DistillRun) -> list[Json]:
    ca = run.spec.storage.ca_secret
    return [
        {"name": "config", "configMap": {"name": config_map_name(run)}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
        *(
            [{"name": "ca", "secret": {"secretName": ca, "items": [{"key": "ca.crt", "path": "ca.crt"}]}}]
            if ca
            else []
        ),
    ]
