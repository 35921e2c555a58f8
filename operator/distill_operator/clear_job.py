"""The Job that deletes a run's folder from the bucket: with the run's own image, Secret and service account,
so that the operator never opens a bucket.

Pure functions from a run to JSON. plan.py decides when to create it and when to give up.
"""

from distill_operator.attempt import COMMON_LABELS
from distill_operator.kube import JOB, Json
from distill_operator.pod_template import build_clear_pod
from distill_operator.settings import Settings
from vpmoe.api import DistillRun, labels

STEP = "clear"
"""Value of the step label of the Job and its pod, and name of its container."""
CLEAR_SECONDS = 600
"""Time that the Job has, its pod's start included. Then the deletion of the run ends without it."""
FINISHED_SECONDS = 600
"""How long the Job stays after its end, for its log."""
PERMANENT_EXIT = 65
"""Exit code after which another pod would fail too (vpmoe.api.termination)."""
RETRIES = 6


def clear_job_name(run: DistillRun) -> str:
    """Name of the Job. It has the run's uid: the Job of an earlier run of this name may still be there."""
    return f"{run.metadata.name}-clear-{run.uid8}"


def build_clear_job(run: DistillRun, settings: Settings) -> Json:
    """The Job.

    The run does not own it: in a foreground deletion it would be collected before the run. It refers to
    nothing that the run owns either: the run's document is an annotation of its pod.
    """
    own = {labels.RUN: run.metadata.name, labels.STEP: STEP}
    pod = build_clear_pod(run, settings.images.trainer, STEP)
    pod["metadata"]["labels"] |= {**COMMON_LABELS, **own}
    return {
        "apiVersion": JOB.api_version,
        "kind": JOB.name,
        "metadata": {
            "name": clear_job_name(run),
            "namespace": run.metadata.namespace,
            "labels": {**COMMON_LABELS, **own},
            "annotations": {labels.RUN_UID: run.metadata.uid},
        },
        "spec": {
            "activeDeadlineSeconds": CLEAR_SECONDS,
            "ttlSecondsAfterFinished": FINISHED_SECONDS,
            "backoffLimit": RETRIES,
            "podFailurePolicy": {
                "rules": [
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    {
                        "action": "FailJob",
                        "onExitCodes": {
                            "containerName": STEP,
                            "operator": "In",
                            "values": [PERMANENT_EXIT],
                        },
                    },
                ]
            },
            "template": pod,
        },
    }


def is_clear_job_of(job: Json, uid: str) -> bool:
    """Whether a Job of that name was created for the run of this uid."""
    return bool(job["metadata"].get("annotations", {}).get(labels.RUN_UID) == uid)
