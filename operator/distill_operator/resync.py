"""The resync: lists all runs and their children from time to time, queues the runs that have changed since
their last reconcile, and deletes orphans.

Watch events make the operator fast, the resync makes it reliable. It must stay cheap, because it goes on
while nothing changes. Requests a second of an idle operator to the API server:

    4 / leaseSeconds           renewals of the lease                         0.33
    kinds x namespaces / 30    new connections of the watches                0.10
    pages / resyncSeconds      the resync's lists, at most LIST_REQUESTS     0.25
    UNCHANGED_REQUESTS         reconciles of runs that have not changed      0.20

The figures are those of the default settings, with all namespaces watched, 1,000 live runs and 5,000 children
in 24 pages of 250 objects: a resync every 96 s.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Collection
from typing import NoReturn

from distill_operator.admission import Admission
from distill_operator.kube import DISTILLRUN, Json, Kube, KubeError
from distill_operator.last_reconciles import ChildName, LastReconciles
from distill_operator.namespaces import Listing, WatchedNamespaces
from distill_operator.observe import controller_uid
from distill_operator.orphans import active_keys, delete_orphans, list_children, without_unused
from distill_operator.settings import Settings
from distill_operator.watch import Key

log = logging.getLogger(__name__)

LIST_REQUESTS = 15
"""Requests that the lists of one resync may make. With more pages there are fewer resyncs, in proportion."""
LONGEST_PAUSE = 600.0
"""Seconds between two resyncs at most, however many pages there are."""
UNCHANGED_REQUESTS = 0.2
"""Requests a second that reconciles may make of runs that have not changed. With more runs each has fewer."""


class Resync:
    """The resync of one operator process. `put` queues the key of a run, due after a delay in seconds."""

    def __init__(
        self,
        kube: Kube,
        settings: Settings,
        namespaces: WatchedNamespaces,
        admission: Admission,
        last: LastReconciles,
        put: Callable[[Key, float], None],
    ) -> None:
        self._kube, self._settings, self._namespaces = kube, settings, namespaces
        self._admission, self._last, self._put = admission, last, put

    async def run(self) -> NoReturn:
        """Resync again and again. Never returns."""
        while True:
            try:
                pause = await self.resync()
            except KubeError as error:
                log.warning("the resync failed: %s", error)
                pause = self._retry_pause()
            except Exception:  # about one object: watches and workers go on, and so does the next resync
                log.exception("the resync failed")
                pause = self._retry_pause()
            await asyncio.sleep(pause)

    async def resync(self) -> float:
        """Resync once. Returns the seconds until the next one. Raises KubeError.

        Runs that wait for GPUs are queued by admission, when a decision about them has changed.
        """
        listed, begun = self._last.clock(), self._admission.begin_list()
        runs = await self._namespaces.list(DISTILLRUN, keep=self._kept)
        await self._admission.update(runs.objects, begun, complete=not runs.errors)
        active = active_keys(runs.objects)
        try:
            children = await list_children(self._namespaces)
        except KubeError as error:
            log.warning("the resync could not list children: %s", error)
            children = Listing([], [error])
        requests = runs.requests + children.requests
        pause = self._settings.resync_seconds
        pause = max(pause, min(pause * requests / LIST_REQUESTS, LONGEST_PAUSE))
        self._queue_changed(runs.objects, active, children.objects, listed, complete=not children.errors)
        if not runs.errors:
            for key in self._last.gone({_key(run) for run in runs.objects}, listed):
                self._put(key, 0.0)
        self._queue_oldest(set(active), pause)
        await delete_orphans(self._kube, runs.objects, children.objects)
        return self._retry_pause() if runs.errors or children.errors else pause

    def _kept(self, run: Json) -> Json:
        known = self._admission.knows(_key(run), run["metadata"]["resourceVersion"])
        return without_unused(run, known)

    def _queue_changed(
        self, runs: list[Json], active: Collection[Key], children: list[Json], listed: float, complete: bool
    ) -> None:
        """Queue the active runs that differ from what their last reconcile saw."""
        versions = defaultdict[str | None, dict[ChildName, str]](dict)  # by uid of the run
        for child in children:
            meta = child["metadata"]
            versions[controller_uid(child)][child["kind"], meta["name"]] = meta["resourceVersion"]
        queued = set(active)
        for run in runs:
            key, meta = _key(run), run["metadata"]
            if key in queued and not self._admission.is_waiting(key):
                own = versions.get(meta["uid"], {})
                if self._last.differs(key, meta["resourceVersion"], own, listed, complete):
                    self._put(key, 0.0)

    def _queue_oldest(self, active: Collection[Key], pause: float) -> None:
        """Queue live runs that were not reconciled for long, because nothing about them has changed: as many
        as may be reconciled in the time `pause`, one after the other.
        """
        delay = 0.0
        for key, last in self._last.oldest(self._settings.reconcile_seconds):
            if delay >= pause:
                return
            if key in active and not self._admission.is_waiting(key):
                self._put(key, delay)
                delay += last.requests / UNCHANGED_REQUESTS

    def _retry_pause(self) -> float:
        """Seconds until another resync, if one has failed or did not get an answer about some namespace."""
        return min(self._settings.poll_seconds, self._settings.resync_seconds)


def _key(run: Json) -> Key:
    return run["metadata"]["namespace"], run["metadata"]["name"]
