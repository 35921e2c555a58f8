"""Reconcile one DistillRun: observe, plan, write the status ONCE, then execute the actions that this status
intends.

If the operator dies in between, the status intends what the next reconcile executes. The decisions are in
plan.py, the execution of each action is in executor.py.
"""

import asyncio
import logging
import time
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial

from distill_operator import metrics
from distill_operator.actions import CreateChild
from distill_operator.admission import Admission
from distill_operator.attempt import config_map_name
from distill_operator.conditions import RECONCILE_ERROR, STATUS_UNREADABLE
from distill_operator.events import events_between, post_event
from distill_operator.executor import ActionExecutor
from distill_operator.failure_report import report_failure
from distill_operator.gpu_scheduler import Decision
from distill_operator.kube import (
    CHILD_KINDS,
    DISTILLRUN,
    PYTORCHJOB,
    Conflict,
    Json,
    KindMissing,
    Kube,
    KubeError,
)
from distill_operator.last_reconciles import ChildName, LastReconciles
from distill_operator.namespaces import WatchedNamespaces, is_refusal
from distill_operator.observe import (
    ChildObservation,
    ObservedChild,
    ObservedChildren,
    ObservedRun,
    observe_child,
    observe_clear_job,
    observe_pods_left,
    parse_run,
)
from distill_operator.plan import plan, plan_unreadable
from distill_operator.plan_builder import Plan
from distill_operator.pod_progress import PodProgress
from distill_operator.pod_records import AttemptId, ProgressReading
from distill_operator.pod_template import container_name
from distill_operator.settings import Settings
from distill_operator.step_timers import StepTimers
from distill_operator.watch import Key
from vpmoe.api import DistillRun
from vpmoe.clock import now_to_second

log = logging.getLogger(__name__)

CONFLICT_RETRIES = 5
"""Reconciles in a row of a run that others change at the same time, before the queue's backoff."""
BACKEND_CACHE_SECONDS = 60.0
POLLS = 10.0
"""Reconciles a second, of all runs together, that only look at what no event tells."""
MAX_FAILURE = 500
"""Characters of a failure that its report has."""
REPORT_SECONDS = 60.0
"""A failing reconcile with another message each time is reported so often at most: each report is an event
that reconciles the run again."""


@dataclass
class Reconciler:
    """Reconciles runs. Safe to use from several tasks for different runs."""

    kube: Kube
    progress: PodProgress
    settings: Settings
    namespaces: WatchedNamespaces

    def __post_init__(self) -> None:
        self.admission = Admission(self.kube, self.settings, self.namespaces, self._pytorchjobs_missing)
        self._backend_seen = float("-inf")
        self._executor = ActionExecutor(self.kube, self.settings)
        self._timers = StepTimers()
        self._failures: dict[Key, tuple[str, float]] = {}  # message and time of the last report
        self.last = LastReconciles()
        self._polled: set[Key] = set()  # runs that wait for something of which no event tells

    async def reconcile(self, key: Key) -> float | None:
        """Reconcile the run.

        Returns the seconds after which to requeue it, or None if only an event needs another reconcile.

        Raises KubeError; the work queue retries with a backoff. Any exception is also reported in the run's
        status, if another reconcile alone will not help.
        """
        try:
            requeue_after = await self._reconcile(key)
        except BaseException as error:
            if isinstance(error, GeneratorExit) or _is_cancelled():  # the process ends
                raise
            self.last.forget(key)
            self._polled.discard(key)
            await self._note_failure(key, error)
            if isinstance(error, Exception):
                raise
            # asyncio would end the process with a SystemExit, and take a stray CancelledError for its own.
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        # After a failure once more: the status that was just written still reports it.
        return requeue_after if self._failures.pop(key, None) is None else 0.0

    async def _reconcile(self, key: Key) -> float | None:
        for _ in range(CONFLICT_RETRIES):
            try:
                return await self._reconcile_once(key)
            except Conflict as error:
                log.info("%s/%s changed during the reconcile, retrying: %s", *key, error)
        raise KubeError(f"{key[0]}/{key[1]} changed during {CONFLICT_RETRIES} reconciles in a row")

    async def _reconcile_once(self, key: Key) -> float | None:
        began = self.last.clock()
        try:
            obj = await self.kube.get(DISTILLRUN, *key)
        except KubeError as error:
            if is_refusal(error) and self.namespaces.refuses(key[0]):
                self.last.forget(key)
                metrics.show_run(*key, None)
                return None  # the resync requeues it when the namespace can be read again
            raise
        self._polled.discard(key)
        if obj is None:
            self.last.forget(key)
            self._executor.forget(key)
            self.progress.keep(key, ())
            self._timers.forget(key)
            self._failures.pop(key, None)
            self.admission.forget(key)
            metrics.show_run(*key, None)
            return None
        observed, version = parse_run(obj), obj["metadata"]["resourceVersion"]
        last = self.last.begin(key, began, version)
        self.admission.observe(observed, version)
        if observed.unreadable:
            await self._leave_alone(observed, obj)
            last.named, last.completed = frozenset(), self.last.clock()
            return None
        if failed := self._failures.get(key):
            observed = replace(observed, failure=(RECONCILE_ERROR, failed[0]))
        decision = self.admission.decision(key)
        if decision is None and self.admission.is_waiting(key):
            self.last.forget(key)
            return None  # the next look at the queue decides, and requeues the run
        try:
            decided, written, children, now = await self._plan_and_write(obj, observed, decision)
        except Exception as error:
            if not (isinstance(error, KubeError) and may_be_written(error)):
                self.admission.observe(observed, version)  # ends its claim
            raise
        self.admission.observe(
            replace(observed, status=decided.status), written["metadata"]["resourceVersion"]
        )
        self.admission.reconciled(key)
        metrics.show_run(*key, decided.status)
        last.run = written["metadata"]["resourceVersion"]
        last.named, last.children = _children_after(decided, children)
        errors = list[KubeError]()
        for action in decided.actions:
            try:
                written = await self._executor.execute(action, observed, decided.status, written)
                last.run = written["metadata"]["resourceVersion"]
            except KubeError as error:
                errors.append(error)
                if not isinstance(action, CreateChild):  # children of other steps are created all the same
                    break
        for event in events_between(observed.status, decided.status):  # children do not wait for them
            await post_event(self.kube, written, event, now_to_second())
        if errors:
            raise errors[-1]
        last.completed = self.last.clock()
        if observed.deleting:  # its reconciles read other objects
            self.last.forget(key)
        return self._requeue_after(key, decided, now)

    def _requeue_after(self, key: Key, decided: Plan, now: datetime) -> float | None:
        """Seconds after which to requeue the run: for its next timer, or to look at what no event tells. The
        more runs need such looks, the longer each waits for the next. `now` is the time of the plan.
        """
        delays = []
        if decided.requeue_at is not None:
            delays.append(max(0.0, (decided.requeue_at - now).total_seconds()))
        if decided.poll:
            self._polled.add(key)
            delays.append(max(self.settings.poll_seconds, len(self._polled) / POLLS))
        return min(delays, default=None)

    async def _leave_alone(self, observed: ObservedRun, obj: Json) -> None:
        """Report that the run's status cannot be read. Nothing else happens to the run but its deletion."""
        for action in plan_unreadable(observed):
            obj = await self._executor.execute(action, observed, observed.status, obj)
        if not observed.deleting:
            message = (
                f"This version of the operator cannot read the run's status and leaves the run alone: "
                f"{observed.invalid}. Upgrade the operator to the version that wrote it."
            )
            await report_failure(self.kube, obj, STATUS_UNREADABLE, message, now_to_second())

    async def _note_failure(self, key: Key, error: BaseException) -> None:
        """Report in the run's status why its reconcile has failed, unless it was an error that ends by itself
        or that the next plan reports.
        """
        if is_transient(error) or (isinstance(error, KubeError) and self._executor.create_errors(key)):
            return
        text = str(error) if isinstance(error, KubeError) else f"{type(error).__name__}: {error}"
        text = text[:MAX_FAILURE]
        message, reported = self._failures.get(key, ("", float("-inf")))
        if text != message and time.monotonic() - reported >= REPORT_SECONDS:
            self._failures[key] = text, time.monotonic()
        try:
            obj = await self.kube.get(DISTILLRUN, *key)
            if obj is not None:
                now, message = now_to_second(), self._failures[key][0]
                await report_failure(self.kube, obj, RECONCILE_ERROR, message, now)
        except KubeError as refused:
            log.warning("%s/%s: the failure is not in its status: %s", *key, refused)
        except Exception:
            log.exception("%s/%s: the failure is not in its status", *key)

    async def _plan_and_write(
        self, obj: Json, observed: ObservedRun, decision: Decision | None
    ) -> tuple[Plan, Json, ObservedChildren, datetime]:
        """Plan, and write the status if it differs.

        Returns the plan, the DistillRun with the status as written, the children that the plan is about, and
        its time.
        """
        children, readings = await self._observe_children(observed)
        now = now_to_second()
        timers = self._timers.observe(observed, children, readings, self.settings, now)
        decided = plan(observed, children, readings, decision, self.settings, now, timers)
        status = decided.status.dump()
        if status == obj.get("status"):
            return decided, obj, children, now
        written = await self.kube.replace(DISTILLRUN, {**obj, "status": status}, "status")
        return decided, written, children, now

    async def _observe_children(
        self, observed: ObservedRun
    ) -> tuple[ObservedChildren, dict[str, ProgressReading]]:
        """The children of the steps that are Running, and the newest known progress of these steps."""
        run, observations, readings = (
            observed.run,
            dict[str, ChildObservation](),
            dict[str, ProgressReading](),
        )
        key = (observed.namespace, observed.name)
        self.progress.keep(key, [] if observed.deleting else [step.name for step in observed.status.running])
        if run is None or (observed.status.phase == "Succeeded" and not observed.deleting):
            return ObservedChildren(), {}
        backend_missing = not observed.deleting and await self._backend_missing(run)
        create_errors = self._executor.create_errors(key)
        for step in observed.status.running:
            if step.child is None:
                continue
            kind, name = CHILD_KINDS[step.child.kind], step.child.name
            try:
                container = container_name(kind, run.role(step.name))
                observation = await observe_child(
                    self.kube,
                    observed,
                    kind,
                    name,
                    config_map_name(run),
                    container,
                    partial(self.progress.wants_pods, key, step.name),
                    explain=not self._executor.has_just_created(key, step.name),
                )
            except KindMissing:
                if kind != PYTORCHJOB:  # Jobs and pods are always served: the step's state is not known
                    raise
                backend_missing = True
                if not observed.deleting:
                    continue
                # Its CRD was deleted. Pods may be alive, and write to the folder that is to be cleared.
                left = await observe_pods_left(
                    self.kube, observed.namespace, kind, name, config_map_name(run), container
                )
                observation = ChildObservation(child=left)
            absent = observation.child is None and observation.name_conflict is None
            observations[step.name] = replace(
                observation,
                create_error=create_errors.get(step.name, ""),
                may_appear=absent and self._executor.may_appear(key, step.child),
            )
            if not observed.deleting:
                attempt = AttemptId(run.identity, step.name, step.attempt)
                readings[step.name] = self._progress_of(key, attempt, observation.child)
        clear = ChildObservation()
        clears = run.spec.deletion_policy == "Delete" or observed.status.clearing is not None
        if observed.deleting and observed.has_finalizer and clears:
            clear = await observe_clear_job(self.kube, observed, run)
            clear = self._executor.add_clear_errors(key, run, clear)
        return ObservedChildren(observations, backend_missing, clear), readings

    def _progress_of(self, key: Key, attempt: AttemptId, child: ObservedChild | None) -> ProgressReading:
        """The newest reading of the attempt's progress, which is read in the background from now on."""
        if child is None or not child.alive:
            return self.progress.latest(key, attempt)
        if child.state == "Running" and child.host_network and not child.pods:
            problem = f"{attempt.step}: pod {child.host_network} is on the host network: nodes are not asked"
            return ProgressReading(attempted=True, problem=problem, reason="HostNetwork")
        return self.progress.follow(
            key, attempt, child.uid, child.pods, child.state == "Ending", child.hidden
        )

    async def _backend_missing(self, run: DistillRun) -> bool:
        """Whether the cluster lacks the resource type of runtime.backend.

        Only a positive answer of the cluster is cached.
        """
        return run.spec.runtime.backend == PYTORCHJOB.name and await self._pytorchjobs_missing()

    async def _pytorchjobs_missing(self) -> bool:
        if time.monotonic() - self._backend_seen < BACKEND_CACHE_SECONDS:
            return False
        if not await self.kube.serves(PYTORCHJOB):
            return True
        self._backend_seen = time.monotonic()
        return False


def _children_after(
    decided: Plan, observed: ObservedChildren
) -> tuple[frozenset[ChildName], dict[ChildName, str | None]]:
    """The children that the status names, and the versions of those that were read; None for those that did
    not exist, among them any that is created now.
    """
    running = [(step.name, step.child) for step in decided.status.running if step.child is not None]
    named = {(child.kind, child.name): step for step, child in running}
    created = {action.step for action in decided.actions if isinstance(action, CreateChild)}
    versions = dict[ChildName, str | None]()
    for name, step in named.items():
        found = observed.by_step[step].child if step in observed.by_step else None
        if found is not None and (found.kind, found.name) == name:
            versions[name] = found.version or None
        elif step in created or step in observed.by_step:
            versions[name] = None
    return frozenset(named), versions


def may_be_written(error: KubeError) -> bool:
    """Whether the API server may have applied the write that failed: it did not reject it."""
    return not 400 <= error.code < 500


def is_transient(error: BaseException) -> bool:
    """Whether the error ends by itself: no answer of the API server, its overload, a concurrent write."""
    return isinstance(error, KubeError) and (error.code in (0, 409, 429) or error.code >= 500)


def _is_cancelled() -> bool:
    """Whether the current task is to end."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
