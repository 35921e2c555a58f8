"""Watches DistillRuns and their Jobs and PyTorchJobs with kopf, and passes on each change with the key of the
run that it concerns.

Handlers decide nothing and return at once. An event may be lost or repeated: the resync covers the one, the
work queue the other.

Most errors of one watch end the whole of kopf, and kopf starts nothing again. So each watched namespace has a
kopf of its own, which is started again when it ends, or when one of its watches shows no sign of life. The
API server ends each connection of a watch after SERVER_TIMEOUT, so a watch that works connects at least that
often. Each kopf has a thread and an event loop, because when it ends it cancels every task of its loop.
"""

import asyncio
import contextlib
import dataclasses
import logging
import random
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import aiohttp
import kopf

from distill_operator.kube import DISTILLRUN, JOB, PYTORCHJOB, Json, Kind, Kube, KubeError
from distill_operator.metrics import WATCH_AGE, WATCH_RESTARTS
from distill_operator.observe import child_state
from vpmoe.api import labels

log = logging.getLogger(__name__)

Key = tuple[str, str]
"""Namespace and name of a DistillRun."""


@dataclasses.dataclass(frozen=True)
class Change:
    """An event of a watch."""

    key: Key
    """The run that it concerns."""
    kind: str
    name: str
    """Kind and name of the object that has changed: the run itself, or one of its children."""
    version: str
    """resourceVersion of the object; empty if it was deleted."""
    brief: bool = False
    """Whether the object is a child that most often changes again within a second: its pods start, or have
    ended and the child is not finished yet."""


RUN_LABEL = labels.RUN
KINDS = (DISTILLRUN, JOB, PYTORCHJOB)
"""What is watched, if the cluster serves it."""

TOKEN_LIFETIME = timedelta(minutes=5)
"""How long kopf uses a token before it reads the file again. Kubelets replace tokens long before they
expire."""

SERVER_TIMEOUT = 30
"""Seconds after which the API server ends a watch, which then connects again."""
SILENCE = 45.0
"""Seconds after which a watch without a sign of life is started again."""
UNANSWERED = 90.0
"""Seconds after which the probes fail because starting a watch again has not helped."""
PACE = 1.0
"""Least seconds between two connections of a watch. kopf itself does not pause if the server ends each at
once."""
CHECK = 5.0
"""Seconds between two looks at the signs of life."""
SERVED_SECONDS = 30.0
"""How long it is taken for granted that the cluster serves a kind, or that it does not."""
BACKOFF, BACKOFF_LIMIT = 1.0, 30.0
"""Seconds before watches that ended are started again. Doubled each time, up to the limit; the first again
when they have lasted longer than the limit."""
CANCELLATIONS = 10
"""How often the tasks of a kopf that is to end are cancelled. It does not wait for those that are left."""
STOP_TIMEOUT = 10.0
"""Seconds that kopf's thread has to end. Then the process ends."""


class WatchStuck(Exception):
    """A kopf does not end when it is told to. Only the end of the process helps."""


@dataclasses.dataclass
class Watch:
    """The watch of one kind in one namespace, and its signs of life (monotonic seconds).

    kopf's thread writes them, the main thread reads them.
    """

    kind: Kind
    namespace: str | None
    """None: all namespaces."""
    served: bool = True
    """Whether the cluster serves the kind."""
    alive: float = dataclasses.field(default_factory=time.monotonic)
    """Its last event or connection."""
    answered: float = dataclasses.field(default_factory=time.monotonic)
    """The API server's last answer, errors included."""
    problem: str = ""
    """The last answer if it was an error."""
    connecting: float = float("-inf")
    """When it last began to connect."""

    def __str__(self) -> str:
        return f"{self.kind.plural} in " + (
            f"namespace {self.namespace}" if self.namespace else "all namespaces"
        )

    def record_life(self) -> None:
        """There was an event, or the watch was connected."""
        self.alive = self.answered = time.monotonic()
        self.problem = ""

    def set_served(self, served: bool) -> None:
        """Record whether the cluster serves the kind. While it does not, a watch is not silent."""
        if served and not self.served:
            self.alive = self.answered = time.monotonic()
        self.served = served

    def silence(self, seconds: float) -> str:
        """Describe a silence of that many seconds."""
        if not self.served:
            return "the cluster does not serve this resource"
        return f"silent for {seconds:.0f} s" + (f", {self.problem}" if self.problem else "")


class NoDifferences(kopf.DiffBaseStorage):
    """In place of kopf's comparison of each object with an earlier state, for which it copies the object
    twice. None of our handlers is about differences.
    """

    def build(self, **_: Any) -> kopf.BodyEssence:
        return cast(kopf.BodyEssence, {})

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        """Store nothing."""


def kopf_settings() -> kopf.OperatorSettings:
    """Reduce kopf to watching: no annotations, finalizers, Events or scans, a timeout for each request."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 10
    settings.networking.error_backoffs = (1, 2)  # then it ends, and is started again
    settings.watching.connect_timeout = 10
    settings.watching.server_timeout = SERVER_TIMEOUT
    settings.watching.client_timeout = SERVER_TIMEOUT + 10  # a stream that lasts longer is broken
    settings.watching.inactivity_timeout = SERVER_TIMEOUT + 10
    settings.watching.chunk_size = 100  # whole objects, each with a task
    settings.queueing.idle_timeout = 0.5  # a task for each object that has changed
    settings.persistence.diffbase_storage = NoDifferences()
    settings.process.ultimate_exiting_timeout = None  # it would kill the process 10 min after an error
    # Never set. kopf removes its own finalizer from every object, so it must not have the operator's name.
    settings.persistence.finalizer = "vpmoe.dev/kopf"
    for kind in (JOB, PYTORCHJOB):
        settings.watching.label_selectors[kind.group, kind.version, kind.plural] = labels.RUN
    return settings


def handlers(
    changed: Callable[[Change], object], watches: list[Watch], sessions: list[aiohttp.ClientSession]
) -> kopf.OperatorRegistry:
    """A registry with the handlers of these watches, which call `changed` and record signs of life.

    The sessions that it opens are added to `sessions`.
    """
    registry = kopf.OperatorRegistry()
    by_plural = {watch.kind.plural: watch for watch in watches}
    refused = set[str | None]()  # credentials

    async def observe(
        request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        watch = by_plural.get(request.url.path.rpartition("/")[2])
        if watch is None:  # a request for the resources that the cluster serves
            return await handler(request)
        connects = "watch" in request.url.query
        if connects:
            await asyncio.sleep(watch.connecting + PACE - time.monotonic())
            watch.connecting = time.monotonic()
        response = await handler(request)
        watch.answered = time.monotonic()
        if not response.ok:
            watch.problem = f"the API server answers {response.status}"
            if response.status == 401:
                refused.add(request.headers.get("Authorization"))
        elif connects:
            watch.record_life()
        return response

    @kopf.on.login(registry=registry)
    async def login(**context: Any) -> kopf.AiohttpSession | None:
        """A session with `observe`. Called at the start, when a token expires, and after a 401."""
        inside = kopf.login_with_service_account(**context)
        found = inside or kopf.login_with_kubeconfig(**context)
        if found is None:
            return None
        headers = found.as_http_headers()
        if headers.get("Authorization") in refused:
            return None  # another attempt only when kopf is started again, which has a pause
        sessions[:] = [session for session in sessions if not session.closed]
        sessions.append(
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, ssl=found.as_ssl_context()),
                headers=headers,
                proxy=found.proxy_url,
                middlewares=(observe,),
            )
        )
        return kopf.AiohttpSession(
            server=found.server,
            default_namespace=found.default_namespace,
            expiration=datetime.now(UTC) + TOKEN_LIFETIME if inside else None,
            aiohttp_session=sessions[-1],
        )

    def watch_kind(watch: Watch) -> None:
        is_run = watch.kind == DISTILLRUN

        async def handle(
            *,
            namespace: str | None,
            name: str,
            labels: Mapping[str, str],
            meta: Mapping[str, Any],
            type: str | None,
            event: Mapping[str, Any],
            **_: Any,
        ) -> None:
            watch.record_life()
            run = name if is_run else labels[RUN_LABEL]
            if run:  # anybody may make a Job whose label is empty
                deleted = type == "DELETED"
                version = "" if deleted else meta.get("resourceVersion", "")
                brief = not is_run and not deleted and _is_waiting(event["object"])
                changed(Change((namespace or "", run), watch.kind.name, name, version, brief))

        kind, selected = watch.kind, None if is_run else {RUN_LABEL: kopf.PRESENT}
        kopf.on.event(kind.group, kind.version, kind.plural, labels=selected, registry=registry)(handle)

    for watch in by_plural.values():
        watch_kind(watch)
    return registry


def _is_waiting(child: Json) -> bool:
    """Whether the child's pods do not all run, and it is neither finished nor being deleted."""
    try:
        return child_state(child)[0] == "Waiting"
    except (LookupError, TypeError, AttributeError, ValueError):
        return False  # anybody may make a Job of another form with our label: its reconcile reports it


class LastErrors(logging.Handler):
    """Keeps the last exception that each thread has logged. kopf tells nobody else why a watch has failed."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._by_thread: dict[str | None, BaseException] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1]:
            self._by_thread[record.threadName] = record.exc_info[1]

    def pop(self) -> BaseException | None:
        """The last exception of this thread, which is then forgotten."""
        return self._by_thread.pop(threading.current_thread().name, None)


kopf_errors = LastErrors()


class KopfThread:
    """A kopf in a thread of its own, for the watches of one namespace, or of all namespaces."""

    def __init__(
        self, namespace: str | None, changed: Callable[[Change], object], watches: list[Watch]
    ) -> None:
        self._namespace, self._changed, self._watches = namespace, changed, watches
        self._home = asyncio.get_running_loop()
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(lambda loop, context: log.debug("kopf: %s", context["message"]))
        self._stop = asyncio.Event()
        self.ended: asyncio.Future[str] = self._home.create_future()
        """Why it has ended."""

    def start(self) -> None:
        logging.getLogger("kopf").addHandler(kopf_errors)
        name = f"watch-{self._namespace or 'all'}"
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def stop(self) -> None:
        """Request the end. Does not wait."""
        with contextlib.suppress(RuntimeError):  # its loop is closed already
            self._loop.call_soon_threadsafe(self._stop.set)

    def _run(self) -> None:
        # Not asyncio.run(): that waits for all tasks, and for the threads that resolve names.
        why = "a failure while it ended"
        try:
            why = self._loop.run_until_complete(self._operate())
        finally:
            self._loop.close()
            with contextlib.suppress(RuntimeError):  # the process ends
                self._home.call_soon_threadsafe(self._report, why)

    def _report(self, why: str) -> None:
        if not self.ended.done():
            self.ended.set_result(why)

    async def _operate(self) -> str:
        """Run kopf until it ends or begins to end, or until `stop`. Returns why it has ended.

        The end is not left to kopf: it cancels its tasks once and then waits for them, without end for one
        that has ignored it.
        """
        sessions = list[aiohttp.ClientSession]()
        registry = handlers(self._changed, self._watches, sessions)

        @kopf.on.cleanup(registry=registry)
        async def ending(**_: Any) -> None:
            self._stop.set()

        stopping = asyncio.create_task(self._stop.wait())
        running = asyncio.create_task(
            kopf.operator(
                registry=registry,
                settings=kopf_settings(),
                standalone=True,
                clusterwide=self._namespace is None,
                namespaces=[] if self._namespace is None else [self._namespace],
            )
        )
        await asyncio.wait({stopping, running}, return_when=asyncio.FIRST_COMPLETED)
        for _ in range(CANCELLATIONS):
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=0.1)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                for session in sessions:
                    await session.close()
        error = running.exception() if running.done() and not running.cancelled() else None
        error = kopf_errors.pop() or error
        return f"{type(error).__name__}: {error.args[0] if error.args else error}" if error else "no error"


class Watches:
    """The watches of a leader, and the tasks that keep them alive. `changed` is called in their threads."""

    def __init__(self, kube: Kube, changed: Callable[[Change], object], namespaces: list[str]) -> None:
        self._kube, self._changed = kube, changed
        self._served: dict[Kind, tuple[bool, float]] = {}  # and when that was found out
        watched: list[str | None] = [*namespaces] or [None]
        self._watches = {namespace: [Watch(kind, namespace) for kind in KINDS] for namespace in watched}

    def tasks(self) -> Iterator[tuple[str, Coroutine[Any, Any, None]]]:
        """Names and coroutines of the tasks. They run until they are cancelled, or raise WatchStuck."""
        for namespace in self._watches:
            yield f"watch-{namespace or 'all'}", self._keep(namespace)

    def health_problem(self) -> str:
        """A watch that the API server does not answer although it was started again; empty if there is none.

        An answer that is an error is no problem of this process.
        """
        for watch in self._all():
            unanswered = time.monotonic() - watch.answered
            if watch.served and unanswered > UNANSWERED:
                return f"the watch of {watch} has not been answered for {unanswered:.0f} s"
        return ""

    def readiness_problem(self) -> str:
        """Why no watch of DistillRuns works; empty if one works. Errors of one namespace do not count."""
        watch = max((watch for watch in self._all() if watch.kind == DISTILLRUN), key=lambda one: one.alive)
        silent = time.monotonic() - watch.alive
        if silent <= UNANSWERED:
            return ""
        return f"no watch of {watch.kind.plural} works; that of {watch}: {watch.silence(silent)}"

    def refresh_gauges(self) -> None:
        """Set the metric of the ages."""
        WATCH_AGE.clear()
        for watch in self._all():
            if watch.served:
                age = time.monotonic() - watch.alive
                WATCH_AGE.labels(watch.kind.plural, watch.namespace or "").set(age)

    def _all(self) -> Iterator[Watch]:
        for watches in self._watches.values():
            yield from watches

    async def _keep(self, namespace: str | None) -> None:
        """Watch a namespace forever. Raises WatchStuck."""
        delay = BACKOFF
        while True:
            for watch in self._watches[namespace]:
                watch.set_served(await self._serves(watch.kind))
            served = [watch for watch in self._watches[namespace] if watch.served]
            thread = KopfThread(namespace, self._changed, served)
            started = time.monotonic()
            thread.start()
            try:
                reason, why = await self._until_broken(thread, self._watches[namespace], started)
            finally:
                thread.stop()
            if not (await asyncio.wait({thread.ended}, timeout=STOP_TIMEOUT))[0]:
                raise WatchStuck(f"{why}, and kopf has not ended within {STOP_TIMEOUT:g} s")
            if time.monotonic() - started > BACKOFF_LIMIT:
                delay = BACKOFF
            self._served.clear()
            WATCH_RESTARTS.labels(namespace or "", reason).inc()
            log.warning("%s; watching again in %.0f s", why, delay)
            await asyncio.sleep(delay * random.uniform(0.75, 1))
            delay = min(delay * 2, BACKOFF_LIMIT)

    async def _until_broken(
        self, thread: KopfThread, watches: list[Watch], started: float
    ) -> tuple[str, str]:
        """Wait until the watches must be started again. Returns why: as a reason, and as a text."""
        while not (await asyncio.wait({thread.ended}, timeout=CHECK))[0]:
            for watch in watches:
                silent = time.monotonic() - max(watch.alive, started)
                if watch.served and silent > SILENCE:
                    return "Silent", f"the watch of {watch} does not work: {watch.silence(silent)}"
                if not watch.served and await self._serves(watch.kind):
                    return "Served", f"the cluster serves {watch.kind.plural} now"
        where = f"namespace {watches[0].namespace}" if watches[0].namespace else "all namespaces"
        return "Ended", f"the watches of {where} have ended: {thread.ended.result()}"

    async def _serves(self, kind: Kind) -> bool:
        """Whether the cluster serves the kind. If that cannot be found out, what was found before holds; at
        first it is assumed.
        """
        served, when = self._served.get(kind, (True, float("-inf")))
        if time.monotonic() - when < SERVED_SECONDS:
            return served
        with contextlib.suppress(KubeError):
            served = await self._kube.serves(kind)
        self._served[kind] = served, time.monotonic()
        return served
