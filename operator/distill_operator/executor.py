"""What a plan asks for, done: children are made and deleted, finalizers set, buckets cleared. One action at a time, each safe to repeat.

When, and in which order, is reconcile.py's business.
"""

import logging
from dataclasses import dataclass, field
from datetime import UTC, datetime

from distill_operator import events
from distill_operator.actions import Action, ClearBucket, Create, Delete, DeleteRun, Finalizer, KeepBucket
from distill_operator.attempt import Attempt, Origin, child_kind
from distill_operator.children import build_child, build_config_map
from distill_operator.events import EventSpec
from distill_operator.kube import CHILD_KINDS, CONFIGMAP, DISTILLRUN, Conflict, Json, Kind, Kube, KubeError
from distill_operator.observe import ObservedRun, owned
from distill_operator.settings import Settings
from distill_operator.step_progress import Buckets, SecretMissing
from distill_operator.watch import Key
from vpmoe.api import DistillRun, labels
from vpmoe.api.status import Status
from vpmoe.storage import StorageError

log = logging.getLogger(__name__)

REFUSALS = (400, 403, 413, 422)
"""Answers that another try alone does not change."""


class NameTaken(KubeError):
    """An object was in the way of a child: the next look says whose."""


@dataclass
class ActionExecutor:
    """Carries out actions, and remembers which children the API server has refused."""

    kube: Kube
    buckets: Buckets
    settings: Settings
    _refused: dict[Key, dict[str, str]] = field(default_factory=dict)

    def refused(self, key: Key) -> dict[str, str]:
        """What the API server said last against a run's children, by step."""
        return self._refused.get(key, {})

    def forget(self, key: Key) -> None:
        """The run is gone."""
        self._refused.pop(key, None)

    async def carry_out(self, action: Action, live: ObservedRun, status: Status, obj: Json) -> Json:
        """Carry out one action; the DistillRun as it stands afterwards."""
        log.info("%s/%s: %s", live.namespace, live.name, action)
        match action:
            case Create(step, attempt):
                assert live.run is not None
                await self._make(live.run, Attempt(live.run, step, attempt, _origin(status), self.settings))
            case Delete(child):
                await self._delete(live, child.kind, child.name, child.uid)
            case Finalizer(present):
                return await self._set_finalizer(obj, present)
            case ClearBucket():
                assert live.run is not None
                await self._clear(live.run, obj)
            case KeepBucket(why):
                await events.post(self.kube, obj, _bucket_kept(why), _now())
            case DeleteRun():
                await self.kube.delete(DISTILLRUN, live.namespace, live.name, live.uid, "Background")
        return obj

    async def _make(self, run: DistillRun, attempt: Attempt) -> None:
        """The ConfigMap, then the child. What is there already is ours, or in the way. A refusal is kept for the next look to tell."""
        namespace, uid = run.metadata.namespace, run.metadata.uid or ""
        refused = self._refused.setdefault((namespace, run.metadata.name), {})
        try:
            await self._ensure(CONFIGMAP, build_config_map(run, attempt.origin), namespace, uid)
            await self._ensure(child_kind(run, attempt.step), build_child(attempt), namespace, uid)
        except KubeError as error:
            if error.code in REFUSALS:
                refused[attempt.step] = str(error)
            raise
        refused.pop(attempt.step, None)

    async def _ensure(self, kind: Kind, wanted: Json, namespace: str, uid: str) -> None:
        try:
            await self.kube.create(kind, wanted)
        except Conflict as error:
            there = await self.kube.get(kind, namespace, wanted["metadata"]["name"])
            if there is None or not owned(there, uid):
                raise NameTaken(str(error), error.code, error.reason) from error

    async def _delete(self, live: ObservedRun, kind: str, name: str, uid: str | None) -> None:
        """Foreground: the child stays, Ending, until its pods have written their checkpoint and are gone."""
        if uid is None:
            there = await self.kube.get(CHILD_KINDS[kind], live.namespace, name)
            if there is None or not owned(there, live.uid):
                return
            uid = there["metadata"]["uid"]
        await self.kube.delete(CHILD_KINDS[kind], live.namespace, name, uid)

    async def _set_finalizer(self, obj: Json, present: bool) -> Json:
        meta = obj["metadata"]
        others = [name for name in meta.get("finalizers", []) if name != labels.FINALIZER]
        change = {
            "finalizers": [*others, labels.FINALIZER] if present else others,
            "resourceVersion": meta["resourceVersion"],
        }
        return await self.kube.patch(DISTILLRUN, meta["namespace"], meta["name"], {"metadata": change})

    async def _clear(self, run: DistillRun, obj: Json) -> None:
        """Empty the run's folder, or say that it stays where nobody has the key any more. A bucket that is away is tried again."""
        try:
            count = await self.buckets.clear(run)
        except SecretMissing as error:
            happening = _bucket_kept(str(error))
        except StorageError as error:
            words = f"{error} Deletion waits for it; set deletionPolicy to Retain to let the run go without."
            await events.post(self.kube, obj, EventSpec("Warning", "BucketNotCleared", words), _now())
            raise
        else:
            happening = EventSpec(
                "Normal", "BucketCleared", f"{count} objects of the run were removed from the bucket"
            )
        await events.post(self.kube, obj, happening, _now())


def _bucket_kept(why: str) -> EventSpec:
    """What people are told when a run that should have been removed from the bucket was not."""
    return EventSpec("Warning", "BucketKept", f"the run's folder stays in the bucket: {why}")


def _origin(status: Status) -> Origin:
    """What a run's children say about where they come from: what its status froze when it started."""
    found = status.provenance
    if found is None or found.git_sha is None or found.config_hash is None:
        raise KubeError("status.provenance was lost: nobody but the operator may write the status")
    return Origin(found.git_sha, found.config_hash, found.dataset.id if found.dataset else None)


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)
