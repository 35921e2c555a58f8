"""One look at one DistillRun: live reads, a plan, ONE status write, then only what the status just written intends.

A crash anywhere leaves a status whose intent the next look carries out, or none. What to intend is plan.py's business.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from distill_operator import events, gpus
from distill_operator.actions import Action, ClearBucket, Create, Delete, DeleteRun, Finalizer, KeepBucket
from distill_operator.attempt import Attempt, Origin, child_kind, config_map_name
from distill_operator.children import build_child, build_config_map
from distill_operator.claims import claim_of, needs_gpus
from distill_operator.draft import Plan
from distill_operator.events import Happening
from distill_operator.kube import (
    CHILD_KINDS,
    CONFIGMAP,
    DISTILLRUN,
    NODE,
    PYTORCHJOB,
    Conflict,
    Json,
    Kind,
    KindMissing,
    Kube,
    KubeError,
)
from distill_operator.observe import Live, Observed, Sight, look, owned, read_run
from distill_operator.plan import holds_gpus, plan
from distill_operator.progress import Buckets, Reading, SecretMissing
from distill_operator.settings import Settings
from distill_operator.watch import Key
from vpmoe.api import DistillRun, labels
from vpmoe.api.status import Status
from vpmoe.storage import StorageError

log = logging.getLogger(__name__)

TRIES = 5
"""Looks in a row at a run that changes under our hands, before the queue's backoff."""
BACKEND_KNOWN_SECONDS = 60.0
REFUSALS = (400, 403, 413, 422)
"""Answers that another try alone does not change."""


class NameTaken(KubeError):
    """An object was in the way of a child: the next look says whose."""


@dataclass
class Reconciler:
    """Carries runs forward, one look at a time. Safe to use from several tasks for different runs."""

    kube: Kube
    buckets: Buckets
    settings: Settings
    freed: Callable[[], None]
    """Called when a run gives its GPUs back: those that wait may start."""

    def __post_init__(self) -> None:
        self._admission = asyncio.Lock()  # two runs must not both be admitted to the same GPUs
        self._backend_seen = float("-inf")
        self._refused: dict[Key, dict[str, str]] = {}

    async def reconcile(self, key: Key) -> float | None:
        """Look at the run and do what is to be done. Seconds after which to look again even if nothing stirs; None: no need.

        Raises KubeError, StorageError and SecretMissing: the queue tries again after a pause.
        """
        for _ in range(TRIES):
            try:
                return await self._once(key)
            except Conflict as error:
                log.info("%s/%s has changed meanwhile, looking again: %s", *key, error)
        raise KubeError(f"{key[0]}/{key[1]} changed {TRIES} times while it was looked at")

    async def _once(self, key: Key) -> float | None:
        obj = await self.kube.get(DISTILLRUN, *key)
        if obj is None:
            self._refused.pop(key, None)
            self.freed()
            return None
        live = read_run(obj)
        if needs_gpus(live):
            async with self._admission:
                claims, nodes = await self._claims(), gpus.nodes(await self.kube.list(NODE))
                mine = claim_of(live.run, live) if live.run else None
                verdict = gpus.admit(mine, claims, nodes) if mine else None
                decided, written = await self._decide(obj, live, verdict)
        else:
            decided, written = await self._decide(obj, live, None)
        now = _now()
        for happening in events.transitions(live.status, decided.status):
            await events.post(self.kube, written, happening, now)
        refused: KubeError | None = None
        for action in decided.actions:
            try:
                written = await self._apply(action, live, decided.status, written)
            except KubeError as error:
                if not isinstance(action, Create):
                    raise
                refused = error  # which keeps no other step's child from being made
        if refused is not None:
            raise refused
        if holds_gpus(live.status) and not holds_gpus(decided.status):
            self.freed()
        return None if decided.again is None else max(0.0, (decided.again - _now()).total_seconds())

    async def _decide(self, obj: Json, live: Live, verdict: gpus.Verdict | None) -> tuple[Plan, Json]:
        """The plan, with its status written; and the object as it stands then."""
        seen, readings = await self._look(live)
        decided = plan(live, seen, readings, verdict, self.settings, _now())
        status = decided.status.dump()
        if status == obj.get("status"):
            return decided, obj
        return decided, await self.kube.replace(DISTILLRUN, {**obj, "status": status}, "status")

    async def _look(self, live: Live) -> tuple[Observed, dict[str, Reading]]:
        """The children of the steps that are Running, and what those steps say."""
        run, sights, readings = live.run, dict[str, Sight](), dict[str, Reading]()
        if run is None or live.status.phase == "Succeeded":
            return Observed(), {}
        backend_missing = not live.deleting and await self._backend_missing(run)
        refused = self._refused.get((live.namespace, live.name), {})
        for step in live.status.running:
            if step.child is None:
                continue
            try:
                sight = await look(self.kube, live, CHILD_KINDS[step.child.kind], step.child.name, config_map_name(run))
            except KindMissing:
                backend_missing = True
                continue
            sights[step.name] = replace(sight, refused=refused.get(step.name, ""))
            if not live.deleting:
                readings[step.name] = await self.buckets.read(run, step.name)
        return Observed(sights, backend_missing), readings

    async def _backend_missing(self, run: DistillRun) -> bool:
        """Whether a resource type that the run needs is not installed. That it is, is remembered for a while; that it is not, never."""
        if run.spec.runtime.backend != PYTORCHJOB.name or time.monotonic() - self._backend_seen < BACKEND_KNOWN_SECONDS:
            return False
        if not await self.kube.serves(PYTORCHJOB):
            return True
        self._backend_seen = time.monotonic()
        return False

    async def _claims(self) -> list[gpus.Claim]:
        """What every live run asks of the pool, read at this moment: statuses written before are in it.

        A run that waits for something other than GPUs is left out: it must not hold up those behind it.
        """
        claims = []
        for obj in await list_runs(self.kube, self.settings):
            live = read_run(obj)
            run = live.run
            if run is not None and (holds_gpus(live.status) or (needs_gpus(live) and not await self._backend_missing(run))):
                claims.append(claim_of(run, live))
        return claims

    async def _apply(self, action: Action, live: Live, status: Status, obj: Json) -> Json:
        """Carry out one action; the DistillRun as it stands afterwards."""
        log.info("%s/%s: %s", live.namespace, live.name, action)
        match action:
            case Create(step, attempt):
                assert live.run is not None
                await self._make(live.run, Attempt(live.run, step, attempt, origin(status), self.settings))
            case Delete(child):
                await self._delete(live, child.kind, child.name, child.uid)
            case Finalizer(present):
                return await self._set_finalizer(obj, present)
            case ClearBucket():
                assert live.run is not None
                await self._clear(live.run, obj)
            case KeepBucket(why):
                await events.post(
                    self.kube, obj, Happening("Warning", "BucketKept", f"the run's folder stays in the bucket: {why}"), _now()
                )
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

    async def _delete(self, live: Live, kind: str, name: str, uid: str | None) -> None:
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
        change = {"finalizers": [*others, labels.FINALIZER] if present else others, "resourceVersion": meta["resourceVersion"]}
        return await self.kube.patch(DISTILLRUN, meta["namespace"], meta["name"], {"metadata": change})

    async def _clear(self, run: DistillRun, obj: Json) -> None:
        """Empty the run's folder, or say that it stays where nobody has the key any more. A bucket that is away is tried again."""
        try:
            count = await self.buckets.clear(run)
        except SecretMissing as error:
            happening = bucket_kept(str(error))
        except StorageError as error:
            words = f"{error} Deletion waits for it; set deletionPolicy to Retain to let the run go without."
            await events.post(self.kube, obj, Happening("Warning", "BucketNotCleared", words), _now())
            raise
        else:
            happening = Happening("Normal", "BucketCleared", f"{count} objects of the run were removed from the bucket")
        await events.post(self.kube, obj, happening, _now())


def bucket_kept(why: str) -> Happening:
    """What people are told when a run that should have been removed from the bucket was not."""
    return Happening("Warning", "BucketKept", f"the run's folder stays in the bucket: {why}")


def origin(status: Status) -> Origin:
    """What a run's children say about where they come from: what its status froze when it started."""
    found = status.provenance
    if found is None or found.git_sha is None or found.config_hash is None:
        raise KubeError("status.provenance was lost: nobody but the operator may write the status")
    return Origin(found.git_sha, found.config_hash, found.dataset.id if found.dataset else None)


async def list_runs(kube: Kube, settings: Settings) -> list[Json]:
    """All runs of the namespaces that are watched."""
    namespaces: list[str | None] = [*settings.watch_namespaces] or [None]
    return [obj for namespace in namespaces for obj in await kube.list(DISTILLRUN, namespace)]


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)
