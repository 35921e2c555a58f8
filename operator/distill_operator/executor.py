"""Executes the actions of a plan: creates and deletes children, sets the finalizer, starts the deletion of a
run's folder.

Each action may be repeated.

reconcile.py decides when, and in which order.
"""

import logging
import math
import time
from dataclasses import dataclass, field, replace

from distill_operator.actions import (
    Action,
    ClearBucket,
    CreateChild,
    DeleteChild,
    DeleteRun,
    KeepBucket,
    ReportCleared,
    SetFinalizer,
)
from distill_operator.attempt import Attempt, Origin, child_kind, config_map_name
from distill_operator.children import build_child, build_config_map
from distill_operator.clear_job import STEP as CLEAR_STEP
from distill_operator.clear_job import build_clear_job, clear_job_name
from distill_operator.events import EventSpec, post_event
from distill_operator.kube import (
    CHILD_KINDS,
    CONFIGMAP,
    DISTILLRUN,
    JOB,
    NAMESPACE_ENDS,
    Conflict,
    Json,
    Kind,
    Kube,
    KubeError,
    WriteFenced,
)
from distill_operator.observe import ChildObservation, ObservedRun, is_controlled_by
from distill_operator.settings import Settings
from distill_operator.watch import Key
from vpmoe.api import DistillRun, labels
from vpmoe.api.status import ChildRef, Status
from vpmoe.clock import now_to_second

log = logging.getLogger(__name__)

REJECTED = (400, 403, 413, 422)
"""Status codes that a retry alone does not change."""
WEBHOOK_FAILED = "failed calling webhook"
"""Part of the API server's message, with code 500, if an admission webhook does not answer."""
TOLERATED_FAILURES = 2
"""Other errors in a row with which the API server refuses a child, and which are not reported yet."""
REPORT_SECONDS = 60.0
"""Seconds for which a reported rejection keeps its text although later ones differ: each report is a write,
which reconciles the run again."""
UNANSWERED_SECONDS = 70.0
"""How long a request to create a child that had no answer may still be carried out. The API server gives up
after 60 s (--request-timeout)."""
STARTING_SECONDS = 5.0
"""Seconds after the creation of a child in which no Events are read about pods that do not run yet: most need
some time. Less than `pollSeconds`."""


class NameTaken(KubeError):
    """Another object has the child's name. The next observation reports whose it is."""


@dataclass
class Rejections:
    """Rejections of one child in a row."""

    message: str = ""
    """The one that is reported; empty if none is yet."""
    reported: float = float("-inf")
    """Monotonic time of the report."""
    failures: int = 0

    def add(self, error: KubeError) -> None:
        self.failures += 1
        rejected = error.code in REJECTED or WEBHOOK_FAILED in str(error)
        if rejected or (error.code and self.failures > TOLERATED_FAILURES):
            now = time.monotonic()
            if now - self.reported >= REPORT_SECONDS:
                self.message, self.reported = str(error), now


@dataclass
class ActionExecutor:
    """Executes actions, and remembers which children the API server rejected."""

    kube: Kube
    settings: Settings
    _rejections: dict[Key, dict[str, Rejections]] = field(default_factory=dict)
    _ending_namespaces: set[Key] = field(default_factory=set)
    """Runs whose Job was rejected because their namespace is being deleted."""
    _created: dict[Key, dict[str, float]] = field(default_factory=dict)
    """When the latest child of each step was created, in monotonic seconds."""
    _unanswered: dict[Key, dict[ChildRef, float]] = field(default_factory=dict)
    """Monotonic time of the last request to create each child that had no answer; -inf if all had one. The
    children are without their uids."""

    def create_errors(self, key: Key) -> dict[str, str]:
        """The API server's rejection of a run's children, by step."""
        rejections = self._rejections.get(key, {})
        return {step: found.message for step, found in rejections.items() if found.message}

    def has_just_created(self, key: Key, step: str) -> bool:
        """Whether the step's latest child was created in the last STARTING_SECONDS."""
        created = self._created.get(key, {}).get(step, -math.inf)
        return time.monotonic() - created < STARTING_SECONDS

    def may_appear(self, key: Key, child: ChildRef) -> bool:
        """Whether a child that does not exist may do so yet, because a request to create it had no answer.

        A child that nobody has seen may have been requested by another process, which was killed or has lost
        the lease: until this process has created it, its request counts as one that was sent just now.
        """
        name = _without_uid(child)
        if child.uid is None:
            self._unanswered.setdefault(key, {}).setdefault(name, time.monotonic())
        return self._has_request(key, name)

    def _has_request(self, key: Key, name: ChildRef) -> bool:
        """Whether a request to create the child, without its uid, may still be carried out."""
        sent = self._unanswered.get(key, {}).get(name, -math.inf)
        return time.monotonic() - sent < UNANSWERED_SECONDS

    def forget(self, key: Key) -> None:
        """Drop what is remembered about a run that no longer exists."""
        self._unanswered.pop(key, None)
        self._created.pop(key, None)
        self._rejections.pop(key, None)
        self._ending_namespaces.discard(key)

    def add_clear_errors(self, key: Key, run: DistillRun, observation: ChildObservation) -> ChildObservation:
        """The observation of the Job that deletes the run's folder, with its last rejection, and with whether
        it may appear.
        """
        error = self.create_errors(key).get(CLEAR_STEP, "")
        absent = observation.child is None and observation.name_conflict is None
        return replace(
            observation,
            create_error=error,
            may_appear=absent and self.may_appear(key, _clear_job(run)),
            namespace_ends=key in self._ending_namespaces,
        )

    async def execute(self, action: Action, observed: ObservedRun, status: Status, obj: Json) -> Json:
        """Execute one action. Returns the DistillRun after it. Raises KubeError."""
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
                await self._start_clearing(observed.run)
            case ReportCleared(objects):
                count = "all" if objects is None else f"{objects}"
                message = f"deleted {count} objects of {_folder(status)} from the bucket"
                await self._report(obj, EventSpec("Normal", "BucketCleared", message))
            case KeepBucket(why):
                message = f"{_folder(status)} was not deleted from the bucket: {why}"
                await self._report(obj, EventSpec("Warning", "BucketKept", message))
            case DeleteRun():  # not if somebody has edited it since: ttlAfterFinished may be another one
                version = obj["metadata"]["resourceVersion"]
                await self.kube.delete(
                    DISTILLRUN, observed.namespace, observed.name, observed.uid, "Background", version
                )
        return obj

    async def _create(self, run: DistillRun, attempt: Attempt) -> None:
        """Create the ConfigMap, then the child.

        A rejection is kept for the next observation, which reports it in the status.
        """
        namespace, uid = run.metadata.namespace, run.metadata.uid or ""
        key, kind = (namespace, run.metadata.name), child_kind(run, attempt.step)
        child = ChildRef(kind=kind.name, name=attempt.name)
        self._unanswered.setdefault(key, {}).setdefault(child, -math.inf)
        try:
            await self._ensure_config_map(run, attempt.origin)
            await self._ensure(kind, build_child(attempt), namespace, uid)
        except NameTaken:
            raise
        except KubeError as error:
            self._note_error(key, attempt.step, child, error)
            raise
        self._rejections.get(key, {}).pop(attempt.step, None)
        self._created.setdefault(key, {})[attempt.step] = time.monotonic()

    def _note_error(self, key: Key, step: str, child: ChildRef, error: KubeError) -> None:
        """Note that a request to create the child has failed."""
        if _had_no_answer(error):
            self._unanswered[key][child] = time.monotonic()
        self._rejections.setdefault(key, {}).setdefault(step, Rejections()).add(error)

    async def _ensure_config_map(self, run: DistillRun, origin: Origin) -> None:
        """Create the run's ConfigMap unless it exists, as for every child but the first: looking costs
        much less than writing its YAML.
        """
        namespace, uid = run.metadata.namespace, run.metadata.uid or ""
        existing = await self.kube.get(CONFIGMAP, namespace, config_map_name(run))
        if existing is None or not is_controlled_by(existing, uid):
            await self._ensure(CONFIGMAP, build_config_map(run, origin), namespace, uid)

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
            if self._has_request((observed.namespace, observed.name), ChildRef(kind=kind, name=name)):
                return  # while it exists, the request cannot make it again
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

    async def _start_clearing(self, run: DistillRun) -> None:
        """Create the Job that deletes the run's folder. A rejection is kept for the next observation."""
        key = (run.metadata.namespace, run.metadata.name)
        self._unanswered.setdefault(key, {}).setdefault(_clear_job(run), -math.inf)
        try:
            await self.kube.create(JOB, build_clear_job(run, self.settings))
        except Conflict:  # the next observation says whose it is
            return
        except KubeError as error:
            self._note_error(key, CLEAR_STEP, _clear_job(run), error)
            if error.reason == NAMESPACE_ENDS:
                self._ending_namespaces.add(key)
            raise
        self._rejections.get(key, {}).pop(CLEAR_STEP, None)

    async def _report(self, obj: Json, event: EventSpec) -> None:
        """Log what became of the run's folder, and post it as an Event. A namespace that is being deleted
        accepts no Events.
        """
        meta = obj["metadata"]
        level = logging.WARNING if event.type == "Warning" else logging.INFO
        log.log(level, "%s/%s: %s", meta["namespace"], meta["name"], event.message)
        await post_event(self.kube, obj, event, now_to_second())


def _clear_job(run: DistillRun) -> ChildRef:
    return ChildRef(kind=JOB.name, name=clear_job_name(run))


def _without_uid(child: ChildRef) -> ChildRef:
    return ChildRef(kind=child.kind, name=child.name)


def _had_no_answer(error: KubeError) -> bool:
    """Whether the request may still be carried out: the connection broke, what answers in the API server's
    place gave up waiting (502 to 504), or the API server gave up waiting for etcd, which may store the object
    yet (500, as is the refusal of a webhook). After any other answer it does no more about the request.
    """
    if isinstance(error, WriteFenced):
        return False
    stores = error.reason == "ServerTimeout" or "etcdserver: " in str(error)
    return error.code == 0 or error.code > 500 or (error.code == 500 and stores)


def _folder(status: Status) -> str:
    """The run's folder, for people."""
    folder = status.provenance.folder if status.provenance is not None else None
    return f"the run's folder {folder}" if folder else "the run's folder"


def _origin(status: Status) -> Origin:
    """Provenance of a run's children, from the status as it was when the run started."""
    found = status.provenance
    if found is None or found.config_hash is None:
        raise KubeError("status.provenance is missing. Only the operator may write the status.")
    return Origin(found.config_hash, found.dataset.id if found.dataset else None)
