"""Leader election: one process at a time holds a coordination.k8s.io Lease, the others stand by.

A lease may be taken over if its holder has not renewed it for its duration, measured with our own clock: the
holder's may be wrong. A process that finds its own identity in the lease takes it at once: identities are pod
names, so this pod's container was restarted.
"""

import asyncio
import logging
import time
from datetime import UTC, datetime

from distill_operator.kube import LEASE, Conflict, Json, Kube, KubeError

log = logging.getLogger(__name__)


class LeaseLost(Exception):
    """Another process may lead now: this one must end at once, without finishing what is in progress."""


class Lease:
    """The lease `name` for the process `identity`. `seconds` is how long it outlives its holder."""

    def __init__(self, kube: Kube, namespace: str, name: str, identity: str, seconds: int) -> None:
        self._kube = kube
        self._namespace, self._name, self._identity, self._seconds = namespace, name, identity, seconds
        self._seen: tuple[str, float] = ("", 0.0)  # the holder's last renewal, and when this process saw it

    async def acquire(self) -> None:
        """Wait until this process holds the lease. Errors of the API server are retried."""
        while True:
            try:
                async with asyncio.timeout(self._seconds):
                    if await self._try_acquire():
                        log.info("%s holds lease %s/%s", self._identity, self._namespace, self._name)
                        return
            except (KubeError, TimeoutError) as error:
                log.warning("cannot acquire lease %s/%s, retrying: %s", self._namespace, self._name, error)
            await asyncio.sleep(self._seconds / 6)

    async def hold(self) -> None:
        """Renew forever.

        Raises LeaseLost if that has failed for two thirds of the duration, or another process holds the
        lease.
        """
        renewed = time.monotonic()
        while True:
            await asyncio.sleep(self._seconds / 6)
            left = renewed + self._seconds * 2 / 3 - time.monotonic()
            started = time.monotonic()
            try:
                async with asyncio.timeout(left):
                    held = await self._try_acquire()
            except TimeoutError:
                raise LeaseLost(f"the lease could not be renewed for {self._seconds * 2 / 3:g} s") from None
            except KubeError as error:
                log.warning("cannot renew lease %s/%s, retrying: %s", self._namespace, self._name, error)
                continue
            if not held:
                raise LeaseLost("another process has taken the lease")
            renewed = started

    async def release(self) -> None:
        """Let a standby take over at once instead of after the lease's duration. Raises KubeError."""
        lease = await self._kube.get(LEASE, self._namespace, self._name)
        if lease is not None and lease["spec"].get("holderIdentity") == self._identity:
            await self._kube.replace(LEASE, {**lease, "spec": {**lease["spec"], "holderIdentity": ""}})

    async def _try_acquire(self) -> bool:
        """Acquire or renew the lease if that is allowed. Returns whether this process holds it now."""
        lease = await self._kube.get(LEASE, self._namespace, self._name)
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        mine = {"holderIdentity": self._identity, "leaseDurationSeconds": self._seconds, "renewTime": now}
        try:
            if lease is None:
                meta = {"namespace": self._namespace, "name": self._name}
                await self._kube.create(
                    LEASE,
                    {
                        "apiVersion": LEASE.api_version,
                        "kind": LEASE.name,
                        "metadata": meta,
                        "spec": {**mine, "acquireTime": now},
                    },
                )
                return True
            if not self._may_acquire(lease):
                return False
            taken_over = lease["spec"].get("holderIdentity") != self._identity
            change: Json = (
                {"acquireTime": now, "leaseTransitions": lease["spec"].get("leaseTransitions", 0) + 1}
                if taken_over
                else {}
            )
            await self._kube.replace(LEASE, {**lease, "spec": {**lease["spec"], **mine, **change}})
        except Conflict:  # another process was faster; the next attempt sees which
            return False
        return True

    def _may_acquire(self, lease: Json) -> bool:
        spec = lease.get("spec", {})
        if spec.get("holderIdentity", "") in ("", self._identity):
            return True
        renewal = f"{spec['holderIdentity']} {spec.get('renewTime')}"
        if renewal != self._seen[0]:
            self._seen = (renewal, time.monotonic())
        return bool(time.monotonic() - self._seen[1] > spec.get("leaseDurationSeconds", self._seconds))
