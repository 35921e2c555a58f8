"""One look at one DistillRun: live reads, a plan, ONE status write, then only what the status just written intends.

A crash anywhere leaves a status whose intent the next look carries out, or none. What to intend is plan.py's business, how each action is
carried out hands.py's.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from distill_operator import events, gpu_scheduler
from distill_operator.actions import Create
from distill_operator.attempt import config_map_name
from distill_operator.claims import claim_of, needs_gpus
from distill_operator.executor import ActionExecutor
from distill_operator.kube import (
    CHILD_KINDS,
    DISTILLRUN,
    NODE,
    PYTORCHJOB,
    Conflict,
    Json,
    KindMissing,
    Kube,
    KubeError,
)
from distill_operator.observe import ChildObservation, Observed, ObservedRun, look, read_run
from distill_operator.plan import holds_gpus, plan
from distill_operator.plan_builder import Plan
from distill_operator.settings import Settings
from distill_operator.step_progress import Buckets, ProgressReading
from distill_operator.watch import Key
from vpmoe.api import DistillRun

log = logging.getLogger(__name__)

TRIES = 5
"""Looks in a row at a run that changes under our hands, before the queue's backoff."""
BACKEND_KNOWN_SECONDS = 60.0


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
        self._hands = ActionExecutor(self.kube, self.buckets, self.settings)

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
            self._hands.forget(key)
            self.freed()
            return None
        live = read_run(obj)
        if needs_gpus(live):
            async with self._admission:
                claims, nodes = await self._claims(), gpu_scheduler.nodes(await self.kube.list(NODE))
                mine = claim_of(live.run, live) if live.run else None
                verdict = gpu_scheduler.admit(mine, claims, nodes) if mine else None
                decided, written = await self._decide(obj, live, verdict)
        else:
            decided, written = await self._decide(obj, live, None)
        now = _now()
        for happening in events.events_between(live.status, decided.status):
            await events.post(self.kube, written, happening, now)
        refused: KubeError | None = None
        for action in decided.actions:
            try:
                written = await self._hands.carry_out(action, live, decided.status, written)
            except KubeError as error:
                if not isinstance(action, Create):
                    raise
                refused = error  # which keeps no other step's child from being made
        if refused is not None:
            raise refused
        if holds_gpus(live.status) and not holds_gpus(decided.status):
            self.freed()
        return None if decided.again is None else max(0.0, (decided.again - _now()).total_seconds())

    async def _decide(
        self, obj: Json, live: ObservedRun, verdict: gpu_scheduler.Decision | None
    ) -> tuple[Plan, Json]:
        """The plan, with its status written; and the object as it stands then."""
        seen, readings = await self._look(live)
        decided = plan(live, seen, readings, verdict, self.settings, _now())
        status = decided.status.dump()
        if status == obj.get("status"):
            return decided, obj
        return decided, await self.kube.replace(DISTILLRUN, {**obj, "status": status}, "status")

    async def _look(self, live: ObservedRun) -> tuple[Observed, dict[str, ProgressReading]]:
        """The children of the steps that are Running, and what those steps say."""
        run, sights, readings = live.run, dict[str, ChildObservation](), dict[str, ProgressReading]()
        if run is None or live.status.phase == "Succeeded":
            return Observed(), {}
        backend_missing = not live.deleting and await self._backend_missing(run)
        refused = self._hands.refused((live.namespace, live.name))
        for step in live.status.running:
            if step.child is None:
                continue
            try:
                sight = await look(
                    self.kube, live, CHILD_KINDS[step.child.kind], step.child.name, config_map_name(run)
                )
            except KindMissing:
                backend_missing = True
                continue
            sights[step.name] = replace(sight, refused=refused.get(step.name, ""))
            if not live.deleting:
                readings[step.name] = await self.buckets.read(run, step.name)
        return Observed(sights, backend_missing), readings

    async def _backend_missing(self, run: DistillRun) -> bool:
        """Whether a resource type that the run needs is not installed. That it is, is remembered for a while; that it is not, never."""
        if (
            run.spec.runtime.backend != PYTORCHJOB.name
            or time.monotonic() - self._backend_seen < BACKEND_KNOWN_SECONDS
        ):
            return False
        if not await self.kube.serves(PYTORCHJOB):
            return True
        self._backend_seen = time.monotonic()
        return False

    async def _claims(self) -> list[gpu_scheduler.GpuRequest]:
        """What every live run asks of the pool, read at this moment: statuses written before are in it.

        A run that waits for something other than GPUs is left out: it must not hold up those behind it.
        """
        claims = []
        for obj in await list_runs(self.kube, self.settings):
            live = read_run(obj)
            run = live.run
            if run is not None and (
                holds_gpus(live.status) or (needs_gpus(live) and not await self._backend_missing(run))
            ):
                claims.append(claim_of(run, live))
        return claims


async def list_runs(kube: Kube, settings: Settings) -> list[Json]:
    """All runs of the namespaces that are watched."""
    namespaces: list[str | None] = [*settings.watch_namespaces] or [None]
    return [obj for namespace in namespaces for obj in await kube.list(DISTILLRUN, namespace)]


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)
