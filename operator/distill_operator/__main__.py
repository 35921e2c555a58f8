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

from distill_operator import health, metrics
from distill_operator.kube import Kube, KubeError
from distill_operator.leader_election import Lease, LeaseLost
from distill_operator.orphans import active_keys, delete_orphans
from distill_operator.reconcile import Reconciler, list_runs
from distill_operator.settings import Settings, load_settings
from distill_operator.step_progress import Buckets, SecretMissing
from distill_operator.watch import Key, Watcher
from distill_operator.workqueue import WorkQueue
from vpmoe.storage import StorageError

log = logging.getLogger("distill_operator")

WORKERS = 4
EXIT_FAILED = 70
"""Exit code after a task that must not end has ended. The kubelet restarts the container."""


class Operator:
    """The parts of one operator process."""

    def __init__(self, kube: Kube, settings: Settings, namespace: str, identity: str) -> None:
        self._kube, self._settings = kube, settings
        self._queue: WorkQueue[Key] = WorkQueue()
        self._lease = Lease(kube, namespace, settings.lease.name, identity, settings.lease.seconds)
        self._resync_now = asyncio.Event()
        self._reconciler = Reconciler(kube, Buckets(kube), settings, gpus_released=self._resync_now.set)
        self._leading = False

    async def run(self) -> int:
        """Stand by, lead, end. Returns the exit code. A lost lease ends the process at once."""
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        runner = await health.serve(self._settings.port, self._find_problem, self._refresh_gauges)
        log.info("serving probes and metrics on port %d", self._settings.port)
        stopping = asyncio.create_task(stop.wait(), name="stop")
        acquiring = asyncio.create_task(self._lease.acquire(), name="lease")
        await asyncio.wait({stopping, acquiring}, return_when=asyncio.FIRST_COMPLETED)
        code = 0
        if acquiring.done():
            code = await self._lead(stopping)
        acquiring.cancel()
        await runner.cleanup()
        return code

    async def _lead(self, stopping: asyncio.Task[bool]) -> int:
        self._leading = True
        metrics.LEADING.set(1)
        watch_ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        watcher = Watcher(
            self._queue.put_from_thread,
            self._settings.watch_namespaces,
            lambda: loop.call_soon_threadsafe(watch_ended.set),
        )
        tasks = {
            asyncio.create_task(self._lease.hold(), name="lease"),
            asyncio.create_task(self._resync(), name="resync"),
            asyncio.create_task(watch_ended.wait(), name="watch"),
            *(asyncio.create_task(self._work(), name=f"worker-{number}") for number in range(WORKERS)),
        }
        watcher.start()
        ended, _ = await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        failed = [task for task in ended if task is not stopping]
        for task in failed:
            error = task.exception()
            log.critical(
                "task %s ended unexpectedly: %s",
                task.get_name(),
                error,
                exc_info=error if not isinstance(error, LeaseLost) else None,
            )
        if failed:  # at once, without finishing anything: another process may lead already
            logging.shutdown()
            os._exit(EXIT_FAILED)
        log.info("received a stop signal")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        watcher.stop()
        try:
            await self._lease.release()
        except KubeError as error:
            log.warning("the lease was not released, so a standby waits until it expires: %s", error)
        return 0

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
            metrics.RECONCILE_SECONDS.observe(time.monotonic() - started)
            error = task.exception()
            if error is None:
                self._queue.done(key)
                requeue_after = task.result()
                if requeue_after is not None:
                    self._queue.put(key, requeue_after)
                metrics.RECONCILES.labels("done").inc()
                continue
            expected = isinstance(error, KubeError | StorageError | SecretMissing)
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

    async def _resync(self) -> None:
        """Queue every active run and delete orphans, periodically, and at once when GPUs are released."""
        while True:
            self._resync_now.clear()
            try:
                runs = await list_runs(self._kube, self._settings)
                for key in active_keys(runs):
                    self._queue.put(key)
                await delete_orphans(self._kube, self._settings, runs)
            except KubeError as error:
                log.warning("the resync failed: %s", error)
            try:
                async with asyncio.timeout(self._settings.resync_seconds):
                    await self._resync_now.wait()
            except TimeoutError:
                continue

    def _find_problem(self) -> str:
        return health.health_problem(
            self._leading,
            self._queue.oldest_age(),
            health.seconds_since(self._kube.last_answer),
            self._settings.stuck_seconds,
        )

    def _refresh_gauges(self) -> None:
        metrics.QUEUE_DEPTH.set(len(self._queue))
        metrics.QUEUE_AGE.set(self._queue.oldest_age())


def configure_logging(level: str) -> None:
    """Log to stderr, one line a record, times in UTC. kopf and the HTTP libraries log warnings and errors
    only.
    """
    formatter = logging.Formatter(
        "%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S"
    )
    formatter.converter = time.gmtime
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    # kopf warns that it receives no signals in a thread. This process handles them.
    logging.getLogger("kopf._core.reactor.running").setLevel(logging.ERROR)
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
    return asyncio.run(operate(settings, arguments.namespace, arguments.identity))


async def operate(settings: Settings, namespace: str, identity: str) -> int:
    """Connect, run, close."""
    kube = await asyncio.to_thread(Kube.connect)
    try:
        return await Operator(kube, settings, namespace, identity).run()
    finally:
        await kube.close()


if __name__ == "__main__":
    sys.exit(main())
