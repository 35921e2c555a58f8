"""One attempt of a step: what its child and its pods are called, whose they are, and what they say about where they come from.

What stands in them is children.py's business, and template.py's.
"""

from dataclasses import dataclass
from typing import Any

from distill_operator.kube import CHILD_KINDS, DISTILLRUN, JOB, Json, Kind
from distill_operator.settings import Settings
from vpmoe.api import DistillRun, labels

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
    """What a step's child is: training what runtime.backend says, everything else a Job."""
    return CHILD_KINDS[run.spec.runtime.backend] if run.role(step) == "train" else JOB


def config_map_name(run: DistillRun) -> str:
    """With the run's uid: a kubelet never looks again at an immutable ConfigMap, and would give pods that of an earlier run of the name."""
    return f"{run.metadata.name}-config-{run.uid8}"


def identity(run: DistillRun, name: str) -> Json:
    """Name, namespace, and the owner with whom the object is garbage-collected."""
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


def short_facts(attempt: Attempt) -> dict[str, str]:
    """Labels of the child and of its pods."""
    return {**MANAGED, **labels.labels(attempt.run.metadata.name, **_facts(attempt))}


def whole_facts(attempt: Attempt) -> dict[str, str]:
    """Their annotations: the same facts in full."""
    return labels.annotations(attempt.run.metadata.name, **_facts(attempt))


def _facts(attempt: Attempt) -> Any:
    origin = attempt.origin
    return {
        "step": attempt.step,
        "attempt": attempt.number,
        "git_sha": origin.git_sha,
        "config": origin.config,
        "dataset": origin.dataset,
    }
