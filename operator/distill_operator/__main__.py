"""`python -m distill_operator --config FILE --namespace NS --identity NAME`: the operator's process.

It loads the settings, serves the probes, acquires the lease, starts the watches and workers, and ends them.
Reconciling one run is in reconcile.py.
"""

import argparse
import asyncio
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from distill_operator import health, metrics
from distill_operator.kube import Kube, KubeError
from distill_operator.leader_election import Lease, LeaseLost
from distill_operator.namespaces import WatchedNamespaces
from distill_operator.pod_progress import PodProgress
from distill_operator.reconcile import Reconciler
from distill_operator.resync import Resync
from distill_operator.settings import Settings, load_settings
from distill_operator.watch import Change, Key, Watches, WatchStuck
from distill_operator.workqueue import WorkQueue

log = logging.getLogger("distill_operator")

WORKERS = 4
BRIEF_SECONDS = 2.0
"""How long the reconcile for a child that is about to change again waits, so that one reconcile sees both
changes. What a user waits for, that pods run or that a child has finished, does not wait."""
EXIT_FAILED = 70
"""Exit code after a task that must not end has ended. The kubelet restarts the container."""


class Operator:
    """The parts of one operator process."""

    def __init__(self, kube: Kube, settings: Settings, namespace: str, identity: str) -> None:
        self._kube, self._settings = kube, settings
        self._queue: WorkQueue[Key] = WorkQueue()
        self._lease = Lease(kube, namespace, settings.lease.name, identity, settings.lease.seconds)
        kube.write_seconds = self._lease.seconds_left
        self._watches: Watches | None = None
        namespaces = WatchedNamespaces(kube, settings.watch_namespaces)
        progress = PodProgress(self._queue.put, settings.progress_seconds)
        self._reconciler = Reconciler(kube, progress, settings, namespaces)
        admission, last = self._reconciler.admission, self._reconciler.last
        self._resync = Resync(kube, settings, namespaces, admission, last, self._queue.put)

    async def run(self) -> int:
        """Stand by, lead, end. Returns the exit code. A lost lease ends the process at once."""
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        runner = await health.serve(
            self._settings.port,
            self._find_health_problem,
            lambda: self._watches.readiness_problem() if self._watches else "",
            self._refresh_gauges,
        )
        log.info("serving probes and metrics on port %d", self._settings.port)
        stopping = asyncio.create_task(stop.wait(), name="stop")
        acquiring = asyncio.create_task(self._lease.acquire(), name="lease")
        ended, _ = await asyncio.wait({stopping, acquiring}, return_when=asyncio.FIRST_COMPLETED)
        if acquiring in ended and acquiring.exception() is not None:
            self._fail([acquiring])
        code = 0
        if acquiring in ended:
            code = await self._lead(stopping)
        acquiring.cancel()
        await runner.cleanup()
        return code

    async def _lead(self, stopping: asyncio.Task[bool]) -> int:
        """Run what only the holder of the lease runs, until the stop signal."""
        metrics.LEADING.set(1)
        home = asyncio.get_running_loop()
        self._watches = Watches(
            self._kube,
            lambda change: home.call_soon_threadsafe(self._queue_changed, change),
            self._settings.watch_namespaces,
        )
        tasks = {
            asyncio.create_task(self._lease.hold(), name="lease"),
            asyncio.create_task(self._resync.run(), name="resync"),
            asyncio.create_task(self._reconciler.admission.run(self._queue.put), name="admission"),
            *(asyncio.create_task(watch, name=name) for name, watch in self._watches.tasks()),
            *(asyncio.create_task(self._work(), name=f"worker-{number}") for number in range(WORKERS)),
        }
        ended, _ = await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        failed = [task for task in ended if task is not stopping]
        if failed:
            self._fail(failed)
        log.info("received a stop signal")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            await self._lease.release()
        except KubeError as error:
            log.warning("the lease was not released, so a standby waits until it expires: %s", error)
        return 0

    def _queue_changed(self, change: Change) -> None:
        """Queue the run of an event, unless its last reconcile saw that object as it is now: most events are
        about the operator's own writes.
        """
        if not self._reconciler.last.covers(change):
            self._queue.put(change.key, BRIEF_SECONDS if change.brief else 0.0)

    def _fail(self, tasks: list[asyncio.Task[Any]]) -> NoReturn:
        """End the process at once, without finishing anything: another process may lead already."""
        for task in tasks:
            error = task.exception()
            expected = isinstance(error, LeaseLost | WatchStuck)
            log.critical(
                "task %s ended unexpectedly: %s", task.get_name(), error, exc_info=None if expected else error
            )
        exit_now(EXIT_FAILED)

    async def _work(self) -> None:
        """Reconcile one key after the other. An error of one run never stops the work on others."""
        while True:
            key = await self._queue.get()
            started = time.monotonic()
            task = asyncio.create_task(self._reconciler.reconcile(key), name=f"{key[0]}/{key[1]}")
            try:
                await asyncio.wait({task})
            finally:
                task.cancel()
                await asyncio.wait({task}, timeout=1)
            metrics.RECONCILE_SECONDS.observe(time.monotonic() - started)
            error = task.exception()
            if error is None:
                self._queue.done(key)
                requeue_after = task.result()
                if requeue_after is not None:
                    self._queue.put(key, requeue_after)
                metrics.RECONCILES.labels("done").inc()
                continue
            expected = isinstance(error, KubeError)
            delay = self._queue.failed(key)
            metrics.RECONCILES.labels("failed" if expected else "bug").inc()
            log.log(
                logging.WARNING if expected else logging.ERROR,
                "%s/%s: %s; retrying in %.1f s",
                *key,
                error,
                delay,
                exc_info=None if expected else error,
            )

    def _find_health_problem(self) -> str:
        return health.health_problem(
            self._watches is not None,
            self._queue.oldest_age(),
            health.seconds_since(self._kube.last_answer),
            self._settings.stuck_seconds,
            self._watches.health_problem() if self._watches else "",
        )

    def _refresh_gauges(self) -> None:
        metrics.QUEUE_DEPTH.set(len(self._queue))
        metrics.QUEUE_AGE.set(self._queue.oldest_age())
        if self._watches:
            self._watches.refresh_gauges()


def exit_now(code: int) -> NoReturn:
    """End the process whatever its threads do: Python itself would wait for those of thread pools."""
    logging.shutdown()
    os._exit(code)


def configure_logging(level: str) -> None:
    """Log to stderr, one line a record, times in UTC.

    Libraries log warnings and errors only, and kopf nothing: watch.py logs its errors in one line each.
    """
    formatter = logging.Formatter(
        "%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S"
    )
    formatter.converter = time.gmtime
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    kopf = logging.getLogger("kopf")
    kopf.setLevel(logging.DEBUG if level == "debug" else logging.ERROR)
    kopf.propagate = level == "debug"
    log.setLevel(level.upper())


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m distill_operator", description="The DistillRun operator."
    )
    parser.add_argument(
        "--config", type=Path, required=True, metavar="FILE", help="settings file that the chart writes"
    )
    parser.add_argument("--namespace", required=True, metavar="NS", help="namespace of the Lease")
    parser.add_argument(
        "--identity", required=True, metavar="NAME", help="holder identity in the Lease: the pod's name"
    )
    arguments = parser.parse_args()
    try:
        settings = load_settings(arguments.config)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)  # noqa: T201 (logging is configured by this file)
        return 2
    configure_logging(settings.log_level)
    asyncio.run(operate(settings, arguments.namespace, arguments.identity))
    return 0


async def operate(settings: Settings, namespace: str, identity: str) -> NoReturn:
    """Run the operator, and end the process."""
    code = EXIT_FAILED
    try:
        kube = await asyncio.to_thread(Kube.connect)
        code = await Operator(kube, settings, namespace, identity).run()
    except Exception:
        log.critical("the operator has failed", exc_info=True)
    exit_now(code)


if __name__ == "__main__":
    sys.exit(main())
