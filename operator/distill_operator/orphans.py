"""The slow round: every live run gets a look, and a child that no status names is stopped.

Events drive the operator; this is what makes it certain. Strays can only come from an operator that went on after it had lost its lease.
"""

import logging
from collections import Counter
from typing import get_args

from distill_operator.kube import DISTILLRUN, JOB, PYTORCHJOB, Json, Kind, KindMissing, Kube
from distill_operator.metrics import RUNS
from distill_operator.observe import child_state, owned
from distill_operator.settings import Settings
from distill_operator.watch import Key
from vpmoe.api import labels
from vpmoe.api.status import RunPhase, Status

log = logging.getLogger(__name__)

PHASES = get_args(RunPhase)


def live_keys(runs: list[Json]) -> list[Key]:
    """Keys of all runs that something may still be to do for; counts the runs on the way."""
    phases = Counter(run.get("status", {}).get("phase", "Pending") for run in runs)
    for phase in PHASES:
        RUNS.labels(phase).set(phases[phase])
    return [(run["metadata"]["namespace"], run["metadata"]["name"]) for run in runs if is_live(run)]


async def stop_strays(kube: Kube, settings: Settings, runs: list[Json]) -> None:
    """Delete every child at work that the status of its run, one of `runs`, does not name. Raises KubeError."""
    by_uid = {run["metadata"]["uid"]: run for run in runs}
    for kind in (JOB, PYTORCHJOB):
        for child in await _children(kube, settings, kind):
            run = next((run for uid, run in by_uid.items() if owned(child, uid)), None)
            if run is not None and is_stray(run, child):
                await _stop(kube, kind, run, child)


def is_live(run: Json) -> bool:
    """Whether anything may still be to do: a finished run expires, is deleted, or has been edited since it was looked at."""
    meta, status = run["metadata"], run.get("status", {})
    if status.get("phase") not in ("Succeeded", "Failed"):
        return True
    edited = status.get("observedGeneration") != meta["generation"]
    return edited or "deletionTimestamp" in meta or run["spec"].get("ttlAfterFinished") is not None


def is_stray(run: Json, child: Json) -> bool:
    """Whether a child of this run is at work although the run's status does not name it."""
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


async def _stop(kube: Kube, kind: Kind, run: Json, child: Json) -> None:
    """Delete a stray, unless a status that was written since names it: a status is always written before its child is made."""
    meta = run["metadata"]
    latest = await kube.get(DISTILLRUN, meta["namespace"], meta["name"])
    if latest is not None and latest["metadata"]["uid"] == meta["uid"] and is_stray(latest, child):
        log.warning(
            "%s %s/%s is named by no status: stopping it",
            kind.name,
            meta["namespace"],
            child["metadata"]["name"],
        )
        await kube.delete(kind, meta["namespace"], child["metadata"]["name"], child["metadata"]["uid"])
