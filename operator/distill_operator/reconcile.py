"""Reconcile one DistillRun: observe, plan, write the status ONCE, then execute the actions that this status
intends.

If the operator dies in between, the status intends what the next reconcile executes. The decisions are in
plan.py, the execution of each action is in executor.py.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from distill_operator.actions import CreateChild
from distill_operator.attempt import config_map_name
from distill_operator.events import events_between, post_event
from distill_operator.executor import ActionExecutor
from distill_operator.gpu_scheduler import (
    Decision,
    GpuRequest,
    admit,
    gpu_request,
    schedulable_nodes,
    waits_for_gpus,
)
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
from distill_operator.observe import (
    ChildObservation,
    ObservedChildren,
    ObservedRun,
    observe_child,
    parse_run,
)
from distill_operator.plan import plan
from distill_operator.plan_builder import Plan
from distill_operator.settings import Settings
from distill_operator.step_progress import Buckets, ProgressReading
from distill_operator.watch import Key
from vpmoe.api import DistillRun
from vpmoe.clock import now_to_second

log = logging.getLogger(__name__)

CONFLICT_RETRIES = 5
"""Reconciles in a row of a run that others change at the same time, before the queue's backoff."""
BACKEND_CACHE_SECONDS = 60.0


@dataclass
class Reconciler:
    """Reconciles runs. Safe to use from several tasks for different runs."""

    kube: Kube
    buckets: Buckets
    settings: Settings
    gpus_released: Callable[[], None]
    """Called when a run releases its GPUs: runs that wait for them may start."""

    def __post_init__(self) -> None:
        self._admission = asyncio.Lock()  # two runs must not both be admitted to the same GPUs
        self._backend_seen = float("-inf")
        self._executor = ActionExecutor(self.kube, self.buckets, self.settings)

    async def reconcile(self, key: Key) -> float | None:
        """Reconcile the run.

        Returns the seconds after which to requeue it, or None if only an event needs another reconcile.

        Raises KubeError, StorageError and SecretMissing; the work queue retries with a backoff.
        """
        for _ in range(CONFLICT_RETRIES):
            try:
                return await self._reconcile_once(key)
            except Conflict as error:
                log.info("%s/%s changed during the reconcile, retrying: %s", *key, error)
        raise KubeError(f"{key[0]}/{key[1]} changed during {CONFLICT_RETRIES} reconciles in a row")

    async def _reconcile_once(self, key: Key) -> float | None:
        obj = await self.kube.get(DISTILLRUN, *key)
        if obj is None:
            self._executor.forget(key)
            self.gpus_released()
            return None
        observed = parse_run(obj)
        if waits_for_gpus(observed) and observed.run is not None:
            async with self._admission:
                requests, nodes = await self._gpu_requests(), schedulable_nodes(await self.kube.list(NODE))
                decision = admit(gpu_request(observed.run, observed), requests, nodes)
                decided, written = await self._plan_and_write(obj, observed, decision)
        else:
            decided, written = await self._plan_and_write(obj, observed, None)
        now = now_to_second()
        for event in events_between(observed.status, decided.status):
            await post_event(self.kube, written, event, now)
        create_error: KubeError | None = None
        for action in decided.actions:
            try:
                written = await self._executor.execute(action, observed, decided.status, written)
            except KubeError as error:
                if not isinstance(action, CreateChild):
                    raise
                create_error = error  # raised later: the children of other steps are created all the same
        if create_error is not None:
            raise create_error
        if observed.status.holds_gpus and not decided.status.holds_gpus:
            self.gpus_released()
        return (
            None
            if decided.requeue_at is None
            else max(0.0, (decided.requeue_at - now_to_second()).total_seconds())
        )

    async def _plan_and_write(
        self, obj: Json, observed: ObservedRun, decision: Decision | None
    ) -> tuple[Plan, Json]:
        """Plan, and write the status if it differs.

        Returns the plan, and the DistillRun with the status as written.
        """
        children, readings = await self._observe_children(observed)
        decided = plan(observed, children, readings, decision, self.settings, now_to_second())
        status = decided.status.dump()
        if status == obj.get("status"):
            return decided, obj
        return decided, await self.kube.replace(DISTILLRUN, {**obj, "status": status}, "status")

    async def _observe_children(
        self, observed: ObservedRun
    ) -> tuple[ObservedChildren, dict[str, ProgressReading]]:
        """The children of the steps that are Running, and the progress of these steps."""
        run, observations, readings = (
            observed.run,
            dict[str, ChildObservation](),
            dict[str, ProgressReading](),
        )
        if run is None or observed.status.phase == "Succeeded":
            return ObservedChildren(), {}
        backend_missing = not observed.deleting and await self._backend_missing(run)
        create_errors = self._executor.create_errors((observed.namespace, observed.name))
        for step in observed.status.running:
            if step.child is None:
                continue
            kind, name = CHILD_KINDS[step.child.kind], step.child.name
            try:
                observation = await observe_child(self.kube, observed, kind, name, config_map_name(run))
            except KindMissing:
                backend_missing = True
                continue
            observations[step.name] = replace(observation, create_error=create_errors.get(step.name, ""))
            if not observed.deleting:
                readings[step.name] = await self.buckets.read_progress(run, step.name)
        return ObservedChildren(observations, backend_missing), readings

    async def _backend_missing(self, run: DistillRun) -> bool:
        """Whether the cluster lacks the resource type of runtime.backend.

        Only a positive answer of the cluster is cached.
        """
        if (
            run.spec.runtime.backend != PYTORCHJOB.name
            or time.monotonic() - self._backend_seen < BACKEND_CACHE_SECONDS
        ):
            return False
        if not await self.kube.serves(PYTORCHJOB):
            return True
        self._backend_seen = time.monotonic()
        return False

    async def _gpu_requests(self) -> list[GpuRequest]:
        """Requests of all runs that hold GPUs or wait for nothing else, read now, so that statuses written
        before are included.

        A run that waits for the backend is left out: it must not block younger ones.
        """
        requests = []
        for obj in await list_runs(self.kube, self.settings):
            observed = parse_run(obj)
            run = observed.run
            if run is not None and (
                observed.status.holds_gpus
                or (waits_for_gpus(observed) and not await self._backend_missing(run))
            ):
                requests.append(gpu_request(run, observed))
        return requests


async def list_runs(kube: Kube, settings: Settings) -> list[Json]:
    """All DistillRuns of the watched namespaces. Raises KubeError."""
    namespaces: list[str | None] = [*settings.watch_namespaces] or [None]
    return [obj for namespace in namespaces for obj in await kube.list(DISTILLRUN, namespace)]
