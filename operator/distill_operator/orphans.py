"""The resync: requeues every active run, and deletes orphans, which are running children that no status
names.

Watch events make the operator fast, the resync makes it reliable. Only an operator that continued after it
lost its lease can leave an orphan.
"""

import logging
from collections import Counter
from typing import get_args

from distill_operator.kube import DISTILLRUN, JOB, PYTORCHJOB, Json, Kind, KindMissing, Kube
from distill_operator.metrics import RUNS
from distill_operator.observe import child_state, is_controlled_by
from distill_operator.settings import Settings
from distill_operator.watch import Key
from vpmoe.api import labels
from vpmoe.api.status import RunPhase, Status

log = logging.getLogger(__name__)

PHASES = get_args(RunPhase)


def active_keys(runs: list[Json]) -> list[Key]:
    """Keys of the runs that need a reconcile. Sets the metric of runs by phase."""
    phases = Counter(run.get("status", {}).get("phase", "Pending") for run in runs)
    for phase in PHASES:
        RUNS.labels(phase).set(phases[phase])
    return [(run["metadata"]["namespace"], run["metadata"]["name"]) for run in runs if is_active(run)]


async def delete_orphans(kube: Kube, settings: Settings, runs: list[Json]) -> None:
    """Delete every running child that the status of its run, one of `runs`, does not name.

    Raises KubeError.
    """
    by_uid = {run["metadata"]["uid"]: run for run in runs}
    for kind in (JOB, PYTORCHJOB):
        for child in await _children(kube, settings, kind):
            run = next((run for uid, run in by_uid.items() if is_controlled_by(child, uid)), None)
            if run is not None and is_orphan(run, child):
                await _delete_orphan(kube, kind, run, child)


def is_active(run: Json) -> bool:
    """Whether the run needs reconciles.

    A finished run does if it expires, is being deleted, or was edited since the last one.
    """
    meta, status = run["metadata"], run.get("status", {})
    if status.get("phase") not in ("Succeeded", "Failed"):
        return True
    edited = status.get("observedGeneration") != meta["generation"]
    return edited or "deletionTimestamp" in meta or run["spec"].get("ttlAfterFinished") is not None


def is_orphan(run: Json, child: Json) -> bool:
    """Whether a child of this run is running or waiting although the run's status does not name it."""
    steps = Status.model_validate(run.get("status") or {}).running
    named = [step.child.name for step in steps if step.child is not None]
    return child_state(child)[0] in ("Waiting", "Running") and child["metadata"]["name"] not in named


async def _children(kube: Kube, settings: Settings, kind: Kind) -> list[Json]:
    namespaces: list[str | None] = [*settings.watch_namespaces] or [None]
    try:
        return [
            child for namespace in namespaces for child in await kube.list(kind, namespace, labels=labels.RUN)
        ]
    except KindMissing:
        return []


async def _delete_orphan(kube: Kube, kind: Kind, run: Json, child: Json) -> None:
    """Delete an orphan, unless a status written since then names it: the status is always written before the
    child is created.
    """
    meta, name = run["metadata"], child["metadata"]["name"]
    latest = await kube.get(DISTILLRUN, meta["namespace"], meta["name"])
    if latest is not None and latest["metadata"]["uid"] == meta["uid"] and is_orphan(latest, child):
        log.warning(
            "%s/%s: no status names %s %s, deleting it", meta["namespace"], meta["name"], kind.name, name
        )
        await kube.delete(kind, meta["namespace"], name, child["metadata"]["uid"])
