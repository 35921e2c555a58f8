"""Watches DistillRuns and their Jobs and PyTorchJobs with kopf, and queues the key of the run of every object
that changes.

Handlers decide nothing and return at once. An event may be lost or repeated: the resync covers the one, the
work queue the other. kopf runs in a thread with its own event loop, because when it ends it cancels every
task of its loop.
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

TOKEN_LIFETIME = timedelta(minutes=5)
"""How long kopf uses a token before it reads the file again. Kubelets replace tokens long before they
expire."""


def kopf_settings() -> kopf.OperatorSettings:
    """Reduce kopf to watching: no annotations, finalizers, Events or scans, a timeout for each request."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 10
    settings.watching.connect_timeout = 10
    settings.watching.server_timeout = 240
    settings.watching.client_timeout = 300
    # Never set. kopf removes its own finalizer from every object, so it must not have the operator's name.
    settings.persistence.finalizer = "vpmoe.dev/kopf"
    for kind in (JOB, PYTORCHJOB):
        settings.watching.label_selectors[kind.group, kind.version, kind.plural] = labels.RUN
    return settings


def handlers(put: Callable[[Key], None]) -> kopf.OperatorRegistry:
    """A registry with the event handlers, which call `put`."""
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    async def login(**context: Any) -> kopf.ConnectionInfo | None:
        inside = kopf.login_with_service_account(**context)
        if inside is None:
            return kopf.login_with_kubeconfig(**context)
        return dataclasses.replace(inside, expiration=datetime.now(UTC) + TOKEN_LIFETIME)

    @kopf.on.event(DISTILLRUN.group, DISTILLRUN.version, DISTILLRUN.plural, registry=registry)
    async def run_changed(*, namespace: str | None, name: str, **_: Any) -> None:
        put((namespace or "", name))

    async def child_changed(*, namespace: str | None, labels: Mapping[str, str], **_: Any) -> None:
        put((namespace or "", labels[RUN_LABEL]))

    for kind in (JOB, PYTORCHJOB):
        kopf.on.event(
            kind.group, kind.version, kind.plural, labels={RUN_LABEL: kopf.PRESENT}, registry=registry
        )(child_changed)
    return registry


class Watcher:
    """kopf in its own thread. `ended` is called when it ends, for any reason."""

    def __init__(
        self, put: Callable[[Key], None], namespaces: list[str], ended: Callable[[], object]
    ) -> None:
        self._stop = threading.Event()
        self._put, self._namespaces, self._ended = put, namespaces, ended
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Request the end, and wait up to 5 s for it."""
        self._stop.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        try:
            asyncio.run(
                kopf.operator(
                    registry=handlers(self._put),
                    settings=kopf_settings(),
                    standalone=True,
                    clusterwide=not self._namespaces,
                    namespaces=self._namespaces,
                    stop_flag=self._stop,
                )
            )
        finally:
            self._ended()
