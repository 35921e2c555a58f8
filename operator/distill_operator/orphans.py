"""What the resync does with its lists: finds the active runs, and deletes orphans, which are running children
that no status names.

Only a request to create a child that is carried out after UNANSWERED_SECONDS can leave an orphan.
"""

import logging
from collections import Counter
from typing import get_args

from distill_operator.kube import (
    CHILD_KINDS,
    DISTILLRUN,
    JOB,
    PYTORCHJOB,
    Json,
    Kind,
    KindMissing,
    Kube,
    KubeError,
)
from distill_operator.metrics import RUNS
from distill_operator.namespaces import Listing, WatchedNamespaces
from distill_operator.observe import child_state, controller_uid, read_status, stored_status
from distill_operator.watch import Key
from vpmoe.api import labels
from vpmoe.api.status import RunPhase

log = logging.getLogger(__name__)

PHASES = get_args(RunPhase)
UNKNOWN = "Unknown"
"""In the metric: a phase of a newer version."""


def active_keys(runs: list[Json]) -> list[Key]:
    """Keys of the runs that need a reconcile. Sets the metric of runs by phase."""
    phases = Counter(_phase(run) for run in runs)
    for phase in (*PHASES, UNKNOWN):
        RUNS.labels(phase).set(phases[phase])
    return [(run["metadata"]["namespace"], run["metadata"]["name"]) for run in runs if is_active(run)]


async def list_children(namespaces: WatchedNamespaces) -> Listing:
    """All children of all runs: a summary of each, because with 1,000 runs there are 5,000. Raises
    KubeError."""
    objects, errors, requests = list[Json](), list[KubeError](), 0
    for kind in (JOB, PYTORCHJOB):
        try:
            found = await namespaces.list(kind, labels=labels.RUN, keep=_summary)
        except KindMissing:
            requests += 1
            continue
        objects += found.objects
        errors += found.errors
        requests += found.requests
    return Listing(objects, errors, requests)


async def delete_orphans(kube: Kube, runs: list[Json], children: list[Json]) -> None:
    """Delete every running child that the status of its run, one of `runs`, does not name.

    One that cannot be deleted is logged, and tried again next time.
    """
    by_uid = {run["metadata"]["uid"]: run for run in runs}
    for child in children:
        run = by_uid.get(controller_uid(child))
        if run is not None and is_orphan(run, child):
            try:
                await _delete_orphan(kube, CHILD_KINDS[child["kind"]], run, child)
            except KubeError as error:
                meta = child["metadata"]
                log.warning("%s/%s: not deleted: %s", meta["namespace"], meta["name"], error)


def without_unused(run: Json, known: bool = False) -> Json:
    """A run without its annotations, which may have 256 KiB. Of one that has succeeded, or is `known` and
    does not have to be parsed, only what the resync uses: 1,000 whole runs take 25 MiB.
    """
    status = stored_status(run)
    if status.get("phase") != "Succeeded" and not known:
        meta = {name: value for name, value in run["metadata"].items() if name != "annotations"}
        return {**run, "metadata": meta}
    kept = {name: status[name] for name in ("phase", "observedGeneration", "steps") if name in status}
    if isinstance(kept.get("steps"), list):
        kept["steps"] = [step for step in _steps(status) if step.get("state") == "Running"]
    return {
        "metadata": _named(run["metadata"]),
        "spec": {"ttlAfterFinished": run["spec"].get("ttlAfterFinished")},
        "status": kept,
    }


def is_active(run: Json) -> bool:
    """Whether the run needs reconciles.

    A finished run does if it expires, is being deleted, or was edited since the last one.
    """
    meta, status = run["metadata"], stored_status(run)
    if status.get("phase") not in ("Succeeded", "Failed"):
        return True
    edited = status.get("observedGeneration") != meta["generation"]
    return edited or "deletionTimestamp" in meta or run["spec"].get("ttlAfterFinished") is not None


def is_orphan(run: Json, child: Json) -> bool:
    """Whether a child of this run is running or waiting although the run's status does not name it.

    A step ends with its own containers, before the child's controller says so: what it ran is no orphan.
    Nothing is an orphan of a run whose status this version cannot read.
    """
    if _is_named(run, child["metadata"]):
        return False  # without parsing the status: the usual case, for each child in each resync
    try:
        status = read_status(run, None)
    except ValueError:
        return False
    named = [step.child.name for step in status.running if step.child is not None]
    return child_state(child)[0] in ("Waiting", "Running") and child["metadata"]["name"] not in named


def _is_named(run: Json, child: Json) -> bool:
    """Whether the JSON of the run's status has a Running step with a child of that name, or any step with
    the child of that uid. `child` is the child's metadata.
    """
    for step in _steps(stored_status(run)):
        named = step.get("child")
        if not isinstance(named, dict):
            continue
        if step.get("state") == "Running" and named.get("name") == child["name"]:
            return True
        if named.get("uid") is not None and named["uid"] == child.get("uid"):
            return True
    return False


def _steps(status: Json) -> list[Json]:
    steps = status.get("steps")
    return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []


def _summary(child: Json) -> Json:
    """What the resync uses of a Job or PyTorchJob: who it is, whose, and whether it has ended. Whether its
    pods run does not matter.
    """
    meta, conditions = child["metadata"], child.get("status", {}).get("conditions", [])
    return {
        "kind": child["kind"],
        "metadata": _named(meta, "ownerReferences"),
        "spec": {"pytorchReplicaSpecs": {}},
        "status": {
            "conditions": [
                {"type": one["type"], "status": "True"} for one in conditions if one["status"] == "True"
            ]
        },
    }


def _named(meta: Json, *more: str) -> Json:
    """The fields of an object's metadata that the resync uses, and these."""
    names = ("namespace", "name", "uid", "resourceVersion", "generation", "deletionTimestamp", *more)
    return {name: meta[name] for name in names if name in meta}


def _phase(run: Json) -> str:
    phase = stored_status(run).get("phase", "Pending")
    return phase if phase in PHASES else UNKNOWN


async def _delete_orphan(kube: Kube, kind: Kind, run: Json, child: Json) -> None:
    """Delete an orphan, unless the whole status as it is now names it, because the status is always written
    before the child is created; or the child was changed since then: it may have finished.
    """
    meta, name = run["metadata"], child["metadata"]["name"]
    latest = await kube.get(DISTILLRUN, meta["namespace"], meta["name"])
    if latest is not None and latest["metadata"]["uid"] == meta["uid"] and is_orphan(latest, child):
        log.warning(
            "%s/%s: no status names %s %s, deleting it", meta["namespace"], meta["name"], kind.name, name
        )
        uid, version = child["metadata"]["uid"], child["metadata"]["resourceVersion"]
        await kube.delete(kind, meta["namespace"], name, uid, version=version)
