"""`python -m distill_operator --config FILE --namespace NS --identity NAME`: the process, from its first log line to its last.

What it does for a run is reconcile.py's. Here: settings, probes, the lease, the tasks that share the work, and how it all ends.
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
from distill_operator.orphans import live_keys, stop_strays
from distill_operator.reconcile import Reconciler, list_runs
from distill_operator.settings import Settings, load_settings
from distill_operator.step_progress import Buckets, SecretMissing
from distill_operator.watch import Key, Watcher
from distill_operator.workqueue import KeyQueue
from vpmoe.storage import StorageError

log = logging.getLogger("distill_operator")

WORKERS = 4
LOST = 70
"""Exit code when something that must not end has ended: the kubelet starts the container anew."""


class Operator:
    """All that one process consists of."""

    def __init__(self, kube: Kube, settings: Settings, namespace: str, identity: str) -> None:
        self._kube, self._settings = kube, settings
        self._queue: KeyQueue[Key] = KeyQueue()
        self._lease = Lease(kube, namespace, settings.lease.name, identity, settings.lease.seconds)
        self._round = asyncio.Event()
        self._reconciler = Reconciler(kube, Buckets(kube), settings, freed=self._round.set)
        self._leading = False

    async def run(self) -> int:
        """Stand by, lead, end. Returns the exit code; a lost lease ends the process on the spot."""
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        runner = await health.serve(self._settings.port, self._diagnose, self._refresh)
        log.info("probes and metrics on port %d", self._settings.port)
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
        gone = asyncio.Event()
        loop = asyncio.get_running_loop()
        watcher = Watcher(
            self._queue.put_from_thread,
            self._settings.watch_namespaces,
            lambda: loop.call_soon_threadsafe(gone.set),
        )
        tasks = {
            asyncio.create_task(self._lease.hold(), name="lease"),
            asyncio.create_task(self._rounds(), name="rounds"),
            asyncio.create_task(gone.wait(), name="watch"),
            *(asyncio.create_task(self._work(), name=f"worker-{number}") for number in range(WORKERS)),
        }
        watcher.start()
        ended, _ = await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        failed = [task for task in ended if task is not stopping]
        for task in failed:
            error = task.exception()
            log.critical(
                "%s has ended: %s",
                task.get_name(),
                error,
                exc_info=error if not isinstance(error, LeaseLost) else None,
            )
        if failed:  # at once, with whatever is in flight: somebody else may be the operator already
            logging.shutdown()
            os._exit(LOST)
        log.info("asked to stop")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        watcher.stop()
        try:
            await self._lease.release()
        except KubeError as error:
            log.warning("the lease was not released, a standby waits for its end: %s", error)
        return 0

    async def _work(self) -> None:
        """One flight after the other. What goes wrong with one run never ends the work on others."""
        while True:
            key = await self._queue.take()
            started = time.monotonic()
            flight = asyncio.create_task(self._reconciler.reconcile(key), name=f"{key[0]}/{key[1]}")
            try:
                await asyncio.wait({flight})
            finally:
                flight.cancel()
            metrics.RECONCILE_SECONDS.observe(time.monotonic() - started)
            error = flight.exception()
            if error is None:
                self._queue.done(key)
                again = flight.result()
                if again is not None:
                    self._queue.put(key, again)
                metrics.RECONCILES.labels("done").inc()
                continue
            expected = isinstance(error, KubeError | StorageError | SecretMissing)
            delay = self._queue.failed(key)
            metrics.RECONCILES.labels("failed" if expected else "bug").inc()
            log.log(
                logging.WARNING if expected else logging.ERROR,
                "%s/%s: %s; again in %.1f s",
                *key,
                error,
                delay,
                exc_info=None if expected else error,
            )

    async def _rounds(self) -> None:
        """Every live run, over and over; at once when GPUs have been freed."""
        while True:
            self._round.clear()
            try:
                runs = await list_runs(self._kube, self._settings)
                for key in live_keys(runs):
                    self._queue.put(key)
                await stop_strays(self._kube, self._settings, runs)
            except KubeError as error:
                log.warning("round: %s", error)
            try:
                async with asyncio.timeout(self._settings.resync_seconds):
                    await self._round.wait()
            except TimeoutError:
                continue

    def _diagnose(self) -> str:
        return health.stuck(
            self._leading,
            self._queue.oldest_age(),
            health.since(self._kube.last_answer),
            self._settings.stuck_seconds,
        )

    def _refresh(self) -> None:
        metrics.QUEUE_DEPTH.set(len(self._queue))
        metrics.QUEUE_AGE.set(self._queue.oldest_age())


def configure_logging(level: str) -> None:
    """One line a record to stderr, times in UTC. Kopf and the HTTP libraries speak up from warnings on."""
    formatter = logging.Formatter(
        "%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S"
    )
    formatter.converter = time.gmtime
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("kopf._core.reactor.running").setLevel(
        logging.ERROR
    )  # it warns that a thread gets no signals: we handle them
    log.setLevel(level.upper())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m distill_operator", description="Runs DistillRuns.")
    parser.add_argument(
        "--config", type=Path, required=True, metavar="FILE", help="settings, as the chart writes them"
    )
    parser.add_argument("--namespace", required=True, metavar="NS", help="where the Lease is")
    parser.add_argument(
        "--identity", required=True, metavar="NAME", help="who holds the Lease: the pod's name"
    )
    given = parser.parse_args()
    try:
        settings = load_settings(given.config)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)  # noqa: T201 (logging is configured from this very file)
        return 2
    configure_logging(settings.log_level)
    return asyncio.run(operate(settings, given.namespace, given.identity))


async def operate(settings: Settings, namespace: str, identity: str) -> int:
    """Connect, run, close."""
    kube = await asyncio.to_thread(Kube.connect)
    try:
        return await Operator(kube, settings, namespace, identity).run()
    finally:
        await kube.close()


if __name__ == "__main__":
    sys.exit(main())
