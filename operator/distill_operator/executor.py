"""Executes the actions of a plan: creates and deletes children, sets the finalizer, clears the bucket.

Each action may be repeated.

reconcile.py decides when, and in which order.
"""

import logging
from dataclasses import dataclass, field

from distill_operator.actions import (
    Action,
    ClearBucket,
    CreateChild,
    DeleteChild,
    DeleteRun,
    KeepBucket,
    SetFinalizer,
)
from distill_operator.attempt import Attempt, Origin, child_kind
from distill_operator.children import build_child, build_config_map
from distill_operator.events import EventSpec, post_event
from distill_operator.kube import CHILD_KINDS, CONFIGMAP, DISTILLRUN, Conflict, Json, Kind, Kube, KubeError
from distill_operator.observe import ObservedRun, is_controlled_by
from distill_operator.settings import Settings
from distill_operator.step_progress import Buckets, SecretMissing
from distill_operator.watch import Key
from vpmoe.api import DistillRun, labels
from vpmoe.api.status import Status
from vpmoe.clock import now_to_second
from vpmoe.storage import StorageError

log = logging.getLogger(__name__)

REJECTED = (400, 403, 413, 422)
"""Status codes that a retry alone does not change."""


class NameTaken(KubeError):
    """Another object has the child's name. The next observation reports whose it is."""


@dataclass
class ActionExecutor:
    """Executes actions, and remembers which children the API server rejected."""

    kube: Kube
    buckets: Buckets
    settings: Settings
    _create_errors: dict[Key, dict[str, str]] = field(default_factory=dict)

    def create_errors(self, key: Key) -> dict[str, str]:
        """The API server's last rejection of a run's children, by step."""
        return self._create_errors.get(key, {})

    def forget(self, key: Key) -> None:
        """Drop what is remembered about a run that no longer exists."""
        self._create_errors.pop(key, None)

    async def execute(self, action: Action, observed: ObservedRun, status: Status, obj: Json) -> Json:
        """Execute one action. Returns the DistillRun after it. Raises KubeError and StorageError."""
        log.info("%s/%s: %s", observed.namespace, observed.name, action)
        match action:
            case CreateChild(step, attempt):
                assert observed.run is not None
                origin = _origin(status)
                await self._create(observed.run, Attempt(observed.run, step, attempt, origin, self.settings))
            case DeleteChild(child):
                await self._delete(observed, child.kind, child.name, child.uid)
            case SetFinalizer(present):
                return await self._set_finalizer(obj, present)
            case ClearBucket():
                assert observed.run is not None
                await self._clear_bucket(observed.run, obj)
            case KeepBucket(why):
                await post_event(self.kube, obj, _bucket_kept(why), now_to_second())
            case DeleteRun():
                await self.kube.delete(
                    DISTILLRUN, observed.namespace, observed.name, observed.uid, "Background"
                )
        return obj

    async def _create(self, run: DistillRun, attempt: Attempt) -> None:
        """Create the ConfigMap, then the child.

        A rejection is kept for the next observation, which reports it in the status.
        """
        namespace, uid = run.metadata.namespace, run.metadata.uid or ""
        errors = self._create_errors.setdefault((namespace, run.metadata.name), {})
        try:
            await self._ensure(CONFIGMAP, build_config_map(run, attempt.origin), namespace, uid)
            await self._ensure(child_kind(run, attempt.step), build_child(attempt), namespace, uid)
        except KubeError as error:
            if error.code in REJECTED:
                errors[attempt.step] = str(error)
            raise
        errors.pop(attempt.step, None)

    async def _ensure(self, kind: Kind, obj: Json, namespace: str, uid: str) -> None:
        """Create the object, or find that the run owns it already.

        Raises NameTaken if it has another owner.
        """
        try:
            await self.kube.create(kind, obj)
        except Conflict as error:
            existing = await self.kube.get(kind, namespace, obj["metadata"]["name"])
            if existing is None or not is_controlled_by(existing, uid):
                raise NameTaken(str(error), error.code, error.reason) from error

    async def _delete(self, observed: ObservedRun, kind: str, name: str, uid: str | None) -> None:
        """Foreground deletion: the child stays, Ending, until its pods have saved a checkpoint and
        terminated.
        """
        if uid is None:
            existing = await self.kube.get(CHILD_KINDS[kind], observed.namespace, name)
            if existing is None or not is_controlled_by(existing, observed.uid):
                return
            uid = existing["metadata"]["uid"]
        await self.kube.delete(CHILD_KINDS[kind], observed.namespace, name, uid)

    async def _set_finalizer(self, obj: Json, present: bool) -> Json:
        meta = obj["metadata"]
        others = [name for name in meta.get("finalizers", []) if name != labels.FINALIZER]
        change = {
            "finalizers": [*others, labels.FINALIZER] if present else others,
            "resourceVersion": meta["resourceVersion"],
        }
        return await self.kube.patch(DISTILLRUN, meta["namespace"], meta["name"], {"metadata": change})

    async def _clear_bucket(self, run: DistillRun, obj: Json) -> None:
        """Delete the run's folder.

        If the credentials are gone, it is kept and an Event says so. Raises StorageError, to be retried.
        """
        try:
            count = await self.buckets.delete_run_folder(run)
        except SecretMissing as error:
            event = _bucket_kept(str(error))
        except StorageError as error:
            message = (
                f"{error} The deletion is retried. "
                "To delete the run without its folder, set deletionPolicy to Retain."
            )
            await post_event(
                self.kube, obj, EventSpec("Warning", "BucketNotCleared", message), now_to_second()
            )
            raise
        else:
            event = EventSpec(
                "Normal", "BucketCleared", f"deleted {count} objects of the run from the bucket"
            )
        await post_event(self.kube, obj, event, now_to_second())


def _bucket_kept(why: str) -> EventSpec:
    return EventSpec("Warning", "BucketKept", f"the run's folder was not deleted from the bucket: {why}")


def _origin(status: Status) -> Origin:
    """Provenance of a run's children, from the status as it was when the run started."""
    found = status.provenance
    if found is None or found.git_sha is None or found.config_hash is None:
        raise KubeError("status.provenance is missing. Only the operator may write the status.")
    return Origin(found.git_sha, found.config_hash, found.dataset.id if found.dataset else None)
