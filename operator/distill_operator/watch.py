"""Kopf's part: watch DistillRuns and their Jobs and PyTorchJobs, and hand the key of whatever stirred to the queue.

Handlers decide nothing and return at once. An event may be lost or doubled: the resync makes up for the one, the queue for the other.
Kopf runs in a thread and event loop of its own, because on its way out it cancels every task that shares its loop.
"""

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import kopf

from distill_operator.kube import DISTILLRUN, JOB, PYTORCHJOB
from vpmoe.api import labels

Key = tuple[str, str]
"""Namespace and name of a DistillRun."""

RUN_LABEL = labels.RUN

CREDENTIALS_FOR = timedelta(minutes=5)
"""How long Kopf keeps a token before it reads the file again: kubelets replace tokens long before they expire."""


def settings() -> kopf.OperatorSettings:
    """Kopf reduced to watching: no annotations, no finalizers, no Events, no scans; nothing that can hang without an end."""
    chosen = kopf.OperatorSettings()
    chosen.posting.enabled = False
    chosen.scanning.disabled = True
    chosen.networking.request_timeout = 30
    chosen.networking.connect_timeout = 10
    chosen.watching.connect_timeout = 10
    chosen.watching.server_timeout = 240
    chosen.watching.client_timeout = 300
    chosen.persistence.finalizer = (
        "vpmoe.dev/kopf"  # never set. Kopf takes its own off wherever it finds it: this must not be ours
    )
    for kind in (JOB, PYTORCHJOB):
        chosen.watching.label_selectors[kind.group, kind.version, kind.plural] = labels.RUN
    return chosen


def handlers(put: Callable[[Key], None]) -> kopf.OperatorRegistry:
    """The handlers, in a registry of their own."""
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    async def login(**context: Any) -> kopf.ConnectionInfo | None:
        inside = kopf.login_with_service_account(**context)
        if inside is None:
            return kopf.login_with_kubeconfig(**context)
        return dataclasses.replace(inside, expiration=datetime.now(UTC) + CREDENTIALS_FOR)

    @kopf.on.event(DISTILLRUN.group, DISTILLRUN.version, DISTILLRUN.plural, registry=registry)
    async def run_stirred(*, namespace: str | None, name: str, **_: Any) -> None:
        put((namespace or "", name))

    async def child_stirred(*, namespace: str | None, labels: Mapping[str, str], **_: Any) -> None:
        put((namespace or "", labels[RUN_LABEL]))

    for kind in (JOB, PYTORCHJOB):
        kopf.on.event(
            kind.group, kind.version, kind.plural, labels={RUN_LABEL: kopf.PRESENT}, registry=registry
        )(child_stirred)
    return registry


class Watcher:
    """Kopf in its own thread. It ends when asked; `ended` is called when it does, for whatever reason."""

    def __init__(
        self, put: Callable[[Key], None], namespaces: list[str], ended: Callable[[], object]
    ) -> None:
        self._stop = threading.Event()
        self._put, self._namespaces, self._ended = put, namespaces, ended
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ask it to end, and wait a little."""
        self._stop.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        try:
            asyncio.run(
                kopf.operator(
                    registry=handlers(self._put),
                    settings=settings(),
                    standalone=True,
                    clusterwide=not self._namespaces,
                    namespaces=self._namespaces,
                    stop_flag=self._stop,
                )
            )
        finally:
            self._ended()
