"""One attempt of a step: name, kind, owner reference, labels and annotations of its child and pods.

Their specs are in children.py and pod_template.py.
"""

from dataclasses import dataclass
from typing import Any

from distill_operator.kube import CHILD_KINDS, DISTILLRUN, JOB, Json, Kind
from distill_operator.settings import Settings
from vpmoe.api import DistillRun, labels

COMMON_LABELS = {"app.kubernetes.io/managed-by": "distill-operator", "app.kubernetes.io/part-of": "vpmoe"}


@dataclass(frozen=True)
class Origin:
    """Provenance that the labels and annotations of every child carry: the hash of the run's configuration,
    and the dataset's id, which is known after preprocessing.

    The commit is none of it: the operator learns it from the pods, after they have started.
    """

    config: str
    dataset: str | None


@dataclass(frozen=True)
class Attempt:
    """One attempt of one step, with everything that its child is built from."""

    run: DistillRun
    step: str
    number: int
    origin: Origin
    settings: Settings

    @property
    def name(self) -> str:
        return child_name(self.run, self.step, self.number)


def child_name(run: DistillRun, step: str, attempt: int) -> str:
    """Name of this attempt's child: an attempt has at most one."""
    return f"{run.metadata.name}-{step}-a{attempt}"


def child_kind(run: DistillRun, step: str) -> Kind:
    """Kind of a step's child: runtime.backend for a step that trains, Job for every other."""
    return CHILD_KINDS[run.spec.runtime.backend] if run.role(step) == "train" else JOB


def config_map_name(run: DistillRun) -> str:
    """Name of the run's ConfigMap.

    It has the run's uid, because kubelets never read an immutable ConfigMap again: pods would get that of an
    earlier run of this name.
    """
    return f"{run.metadata.name}-config-{run.uid8}"


def owned_metadata(run: DistillRun, name: str) -> Json:
    """Name, namespace and owner reference: the object is garbage-collected with the run."""
    owner = {
        "apiVersion": DISTILLRUN.api_version,
        "kind": DISTILLRUN.name,
        "name": run.metadata.name,
        "uid": run.metadata.uid,
    }
    return {
        "name": name,
        "namespace": run.metadata.namespace,
        "ownerReferences": [{**owner, "controller": True, "blockOwnerDeletion": True}],
    }


def child_labels(attempt: Attempt) -> dict[str, str]:
    """Labels of the child and of its pods. Hashes are shortened."""
    return {**COMMON_LABELS, **labels.labels(attempt.run.metadata.name, **_label_values(attempt))}


def child_annotations(attempt: Attempt) -> dict[str, str]:
    """Annotations of the child and of its pods: the same as the labels, with whole hashes."""
    return labels.annotations(attempt.run.metadata.name, **_label_values(attempt))


def _label_values(attempt: Attempt) -> Any:
    origin = attempt.origin
    return {
        "step": attempt.step,
        "attempt": attempt.number,
        "config": origin.config,
        "dataset": origin.dataset,
    }
