"""Admission of runs to GPUs: remembers which runs hold GPUs and which wait for them, reads what the nodes
have left, and decides about the whole queue at once. The decisions themselves are in gpu_scheduler.py.

Records come from the resync's list of runs and from each reconcile. Only this process writes statuses, so
between two lists it knows every run that was admitted or has released its GPUs. Nodes and pods are read for
each look at the queue. A look follows every list, every release of GPUs, and every run that begins to wait;
while runs wait, one follows another after `pollSeconds`.

A reconcile claims the GPUs of an admitted run before it writes the status that holds them. The claim checks
what was claimed since the look, and nothing runs in between, so the same GPUs are never given to two runs.
"""

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, replace
from typing import Literal

from distill_operator.gpu_scheduler import (
    Decision,
    GpuRequest,
    Node,
    PodGpus,
    Pool,
    RunKey,
    decide,
    fits,
    gpu_request,
    holds_gpus,
    never_fits,
    parse_node,
    parse_pod,
    used_by_others,
    waits_for_gpus,
    will_need_gpus,
)
from distill_operator.kube import NODE, POD, PYTORCHJOB, Json, Kube, KubeError
from distill_operator.metrics import ADMISSION_SECONDS
from distill_operator.namespaces import WatchedNamespaces
from distill_operator.observe import ObservedRun, parse_run, stored_status
from distill_operator.settings import Settings
from vpmoe.api.status import ChildRef

log = logging.getLogger(__name__)

OFFER_SECONDS = 60.0
"""How long an admitted run that does not start keeps its GPUs from younger runs. Its reconcile fails then."""
SHORTEST_PAUSE = 0.1
"""Seconds between two looks at the queue. A look that took longer is followed by a pause of that length."""
PARSED_AT_ONCE = 20
"""Runs that are parsed before other tasks may continue."""
BOUND_AND_NOT_ENDED = "spec.nodeName!=,status.phase!=Succeeded,status.phase!=Failed"

State = Literal["Holds", "Waits", "Prepares", "Other"]
"""Holds: its GPUs are its own. Waits: it needs them now. Prepares: it will need them later. Other: none of
these."""


@dataclass(frozen=True)
class Record:
    """What admission knows about a run that has not finished."""

    version: str
    """resourceVersion of the object that the record was made from."""
    generation: int
    state: State
    request: GpuRequest | None
    """None if the state is Other."""
    children: tuple[ChildRef, ...]
    """The objects of its steps: their pods use the GPUs that a run holds."""
    backend: str
    queued: tuple[str, int] | None
    """Message of a Queued run, and the generation that it is about; None in another phase."""
    sequence: int
    """Grows with each record."""


class Admission:
    """The queue of one operator process. Its methods belong to one event loop.

    `backend_missing` returns whether the cluster lacks the resource type PyTorchJob, and may raise KubeError.
    """

    def __init__(
        self,
        kube: Kube,
        settings: Settings,
        namespaces: WatchedNamespaces,
        backend_missing: Callable[[], Awaitable[bool]],
    ) -> None:
        self._kube, self._settings, self._namespaces = kube, settings, namespaces
        self._backend_missing = backend_missing
        self._records: dict[RunKey, Record] = {}
        self._sequence = 0
        self._listed = False
        self._wanted = asyncio.Event()
        self._expected = False  # a run prepares that no look has seen yet
        self._pool = Pool([])
        self._decisions: dict[RunKey, tuple[int, Decision]] = {}  # with the generation that it is about
        self._problem = ""  # why the last look failed
        self._offered: dict[RunKey, float] = {}  # since when an admitted run has not started
        self._passed_over: set[RunKey] = set()  # those of which that is logged
        self._reconciled: set[RunKey] = set()  # by this process: the version before may have left work to do

    def begin_list(self) -> int:
        """Call before the runs are listed, and pass the result to `update`."""
        self._sequence += 1
        return self._sequence

    def knows(self, key: RunKey, version: str) -> bool:
        """Whether the run's record was made from the object of this resourceVersion."""
        record = self._records.get(key)
        return record is not None and record.version == version

    async def update(self, runs: Collection[Json], begun: int, complete: bool = True) -> None:
        """Replace the records by a list of all runs. Records made since the list was begun are kept.

        If the list is not `complete`, because a namespace did not answer, so are those of runs that are not
        in it; nothing is decided before the first complete list.

        A run that has not changed since its record was made is not parsed again, a finished one never.
        """
        found: dict[RunKey, Record] = {} if complete else dict(self._records)
        parsed = 0
        for obj in runs:
            meta = obj["metadata"]
            key = meta["namespace"], meta["name"]
            known = self._records.get(key)
            if known is not None and known.version == meta["resourceVersion"]:
                found[key] = known
            elif known is not None and known.sequence > begun:
                continue
            elif _has_ended(obj):
                found.pop(key, None)
            else:
                found[key] = self._parse(obj)
                parsed += 1
                if parsed % PARSED_AT_ONCE == 0:
                    await asyncio.sleep(0)
        self._records = found | {
            key: record for key, record in self._records.items() if record.sequence > begun
        }
        self._reconciled &= self._records.keys()
        self._listed = self._listed or complete
        if any(record.state in ("Waits", "Prepares") for record in self._records.values()):
            self._wanted.set()

    def observe(self, observed: ObservedRun, version: str) -> None:
        """Note a run as a reconcile has read or written it. `version` is its resourceVersion."""
        key = observed.namespace, observed.name
        before, record = self._records.get(key), self._record(observed, version)
        self._records[key] = record
        known = before is not None and (before.state, before.generation) == (record.state, record.generation)
        if record.state == "Prepares" and not known:
            self._expected = True
        released = before is not None and before.state == "Holds" and record.state != "Holds"
        if released or (record.state == "Waits" and self._decision(key) is None):
            self._wanted.set()

    def forget(self, key: RunKey) -> None:
        """Note that the run does not exist any more."""
        before = self._records.pop(key, None)
        if before is not None and before.state == "Holds":
            self._wanted.set()

    def is_waiting(self, key: RunKey) -> bool:
        """Whether the run waits for GPUs. Looks at the queue then say when it needs a reconcile."""
        record = self._records.get(key)
        return record is not None and record.state == "Waits"

    def decision(self, key: RunKey) -> Decision | None:
        """The decision about a run that waits, and claim its GPUs if it is admitted: they count as held until
        the run is observed again.

        None if there is no decision yet, or not any more; a look that requeues the run follows. For a run
        that does not wait yet: only a decision that it can never start.
        """
        record = self._records.get(key)
        if record is None or record.request is None or record.state not in ("Waits", "Prepares"):
            return None
        decision = self._decision(key)
        if decision is None or not decision.admitted:
            return decision
        if not fits(record.request, self._holders(), self._pool):
            del self._decisions[key]
            self._wanted.set()
            return None
        self._sequence += 1
        self._records[key] = replace(record, state="Holds", sequence=self._sequence)
        return decision

    def reconciled(self, key: RunKey) -> None:
        """Note that a reconcile of the run has not failed: it may keep free GPUs from younger runs."""
        self._offered.pop(key, None)
        self._reconciled.add(key)

    async def run(self, put: Callable[[RunKey], None]) -> None:
        """Look at the queue whenever that may change a decision, and `put` the keys of the runs that need a
        reconcile because of it. Never returns.
        """
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.poll_seconds):
                    await self._wanted.wait()
            if not (self._wanted.is_set() or self._expected or self._in_state("Waits")):
                continue
            started = time.monotonic()
            for key in await self.look(started):
                put(key)
            took = time.monotonic() - started
            ADMISSION_SECONDS.observe(took)
            await asyncio.sleep(max(took, SHORTEST_PAUSE))

    async def look(self, now: float) -> list[RunKey]:
        """Decide about every run that waits. Returns the keys of the runs that are admitted, of those whose
        status does not have the decision, and of those that prepare and got another one at the last look.
        `now` is in monotonic seconds.
        """
        self._wanted.clear()
        self._expected, before = False, self._decisions
        if not self._listed or not self._in_state("Waits", "Prepares"):
            return []
        try:
            nodes = await self._read_nodes()
            pods = await self._read_pods() if self._in_state("Waits") else None
            missing = self._waits_for_backend() and await self._backend_missing()
            self._decide(nodes, pods, missing, now)
            self._problem = ""
        except KubeError as error:
            log.warning("the free GPUs could not be counted: %s", error)
            self._problem = str(error)
        except Exception as error:
            log.exception("the free GPUs could not be counted")
            self._problem = f"{type(error).__name__} {error}"
        return [
            *(key for key in self._in_state("Waits") if not self._is_up_to_date(key)),
            *(key for key in self._in_state("Prepares") if self._decisions.get(key) != before.get(key)),
        ]

    def _decide(self, nodes: list[Node], pods: list[PodGpus] | None, missing: bool, now: float) -> None:
        """Decide with the records of this moment.

        `pods` is None if no run waited when they were to be read. `missing`: the cluster has no PyTorchJob,
        so runs that need it cannot start and must not keep others waiting; plan() reports that.
        """
        children = defaultdict[str, list[ChildRef]](list)
        for (namespace, _), record in self._records.items():
            if record.state == "Holds":
                children[namespace] += record.children
        self._pool = Pool(nodes, used_by_others(pods or [], children))
        waiting = {
            key: record.request
            for key, record in self._records.items()
            if record.state == "Waits" and record.request is not None and pods is not None
        }
        queue = [
            request
            for key, request in waiting.items()
            if not (missing and self._records[key].backend == PYTORCHJOB.name)
        ]
        passed_over = {key for key, since in self._offered.items() if now - since >= OFFER_SECONDS}
        decisions = decide(queue, self._holders(), self._pool, passed_over)
        for key in waiting.keys() - decisions.keys():
            decisions[key] = Decision(False, "Waits for PyTorchJobs to be served")
        for key, record in self._records.items():
            prepares = record.request if record.state == "Prepares" else None
            if prepares is not None and (never := never_fits(prepares, self._pool)):
                decisions[key] = Decision(False, never, unschedulable=True)
        self._decisions = {
            key: (self._records[key].generation, decision) for key, decision in decisions.items()
        }
        offered = {key for key, decision in decisions.items() if decision.admitted} | passed_over
        self._offered = {key: self._offered.get(key, now) for key in offered if key in decisions}
        for key in (passed_over & self._offered.keys()) - self._passed_over:
            log.warning("%s/%s has not started since its GPUs were free: others may take them", *key)
        self._passed_over = passed_over & self._offered.keys()

    def _decision(self, key: RunKey) -> Decision | None:
        """The last look's decision, if it is about the run's present specification.

        A run that waits and has none gets the reason, if the last look failed.
        """
        record, found = self._records[key], self._decisions.get(key)
        if found is not None and found[0] == record.generation:
            return found[1]
        if self._problem and record.state == "Waits":
            return Decision(False, f"The free GPUs could not be counted: {self._problem}")
        return None

    def _is_up_to_date(self, key: RunKey) -> bool:
        """Whether the status of a run that waits has its decision."""
        record, decision = self._records[key], self._decision(key)
        if decision is None or decision.admitted or record.queued is None or key not in self._reconciled:
            return False
        message, generation = record.queued
        return message.startswith(decision.arithmetic) and generation == record.generation

    def _in_state(self, *states: State) -> list[RunKey]:
        return [key for key, record in self._records.items() if record.state in states]

    def _waits_for_backend(self) -> bool:
        return any(self._records[key].backend == PYTORCHJOB.name for key in self._in_state("Waits"))

    def _holders(self) -> list[GpuRequest]:
        return [
            record.request
            for record in self._records.values()
            if record.state == "Holds" and record.request is not None
        ]

    def _parse(self, obj: Json) -> Record:
        """The record of a listed run. One that this version cannot read is Other: its pods count as pods."""
        meta = obj["metadata"]
        try:
            return self._record(parse_run(obj), meta["resourceVersion"])
        except Exception as error:  # noqa: BLE001 (one run must not keep others from their GPUs)
            log.warning("%s/%s cannot be read: %s", meta["namespace"], meta["name"], error)
            self._sequence += 1
            version, generation = meta["resourceVersion"], meta["generation"]
            return Record(version, generation, "Other", None, (), "", None, self._sequence)

    def _record(self, observed: ObservedRun, version: str) -> Record:
        self._sequence += 1
        state: State = "Other"
        if holds_gpus(observed, self._settings):
            state = "Holds"
        elif waits_for_gpus(observed, self._settings):
            state = "Waits"
        elif will_need_gpus(observed, self._settings):
            state = "Prepares"
        run, status = observed.run, observed.status
        return Record(
            version=version,
            generation=observed.generation,
            state=state,
            request=gpu_request(run, observed, self._settings) if run and state != "Other" else None,
            children=tuple(step.child for step in status.steps if step.child is not None),
            backend=run.spec.runtime.backend if run is not None else "",
            queued=(status.message, status.observed_generation) if status.phase == "Queued" else None,
            sequence=self._sequence,
        )

    async def _read_nodes(self) -> list[Node]:
        resource = self._settings.gpu_resource
        return [parse_node(obj, resource) async for page in self._kube.pages(NODE) for obj in page]

    async def _read_pods(self) -> list[PodGpus]:
        """The pods that use GPUs, of the watched namespaces that do not refuse to be read."""
        listing = await self._namespaces.list(
            POD, fields=BOUND_AND_NOT_ENDED, keep=lambda obj: parse_pod(obj, self._settings.gpu_resource)
        )
        return [pod for pod in listing.complete() if pod is not None]


def _has_ended(obj: Json) -> bool:
    """Whether the run has finished and was not edited since."""
    status = stored_status(obj)
    edited = status.get("observedGeneration") != obj["metadata"]["generation"]
    return status.get("phase") == "Succeeded" or (status.get("phase") == "Failed" and not edited)
