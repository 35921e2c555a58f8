"""Who is the operator: one holder of a coordination.k8s.io Lease at a time, the others stand by.

A lease is taken over when its holder has not renewed it for its duration, by our own clock (the holder's may be wrong). A process that
finds its own identity in the lease takes it at once: identities are pod names, so that is this pod before its container restarted.
"""

import asyncio
import logging
import time
from datetime import UTC, datetime

from distill_operator.kube import LEASE, Conflict, Json, Kube, KubeError

log = logging.getLogger(__name__)


class LeaseLost(Exception):
    """Another process may be the operator now: stop at once, whatever is in flight."""


class Lease:
    """The lease `name` as the process `identity` sees it; `seconds` is how long it outlives its holder."""

    def __init__(self, kube: Kube, namespace: str, name: str, identity: str, seconds: int) -> None:
        self._kube = kube
        self._namespace, self._name, self._identity, self._seconds = namespace, name, identity, seconds
        self._seen: tuple[str, float] = ("", 0.0)  # the holder's last sign of life, and when we first saw it

    async def acquire(self) -> None:
        """Wait until we hold it. An API server that does not answer is waited for as well."""
        while True:
            try:
                async with asyncio.timeout(self._seconds):
                    if await self._try():
                        log.info("lease %s/%s is held by %s", self._namespace, self._name, self._identity)
                        return
            except (KubeError, TimeoutError) as error:
                log.warning("lease %s/%s: %s", self._namespace, self._name, error)
            await asyncio.sleep(self._seconds / 6)

    async def hold(self) -> None:
        """Renew for ever; raises LeaseLost when that has not worked for two thirds of the duration, or somebody else holds it."""
        renewed = time.monotonic()
        while True:
            await asyncio.sleep(self._seconds / 6)
            left = renewed + self._seconds * 2 / 3 - time.monotonic()
            started = time.monotonic()
            try:
                async with asyncio.timeout(left):
                    held = await self._try()
            except TimeoutError:
                raise LeaseLost(f"not renewed for {self._seconds * 2 / 3:g} s") from None
            except KubeError as error:
                log.warning("lease %s/%s was not renewed: %s", self._namespace, self._name, error)
                continue
            if not held:
                raise LeaseLost("another process has taken it")
            renewed = started

    async def release(self) -> None:
        """Let a standby take over at once instead of after the lease's duration."""
        lease = await self._kube.get(LEASE, self._namespace, self._name)
        if lease is not None and lease["spec"].get("holderIdentity") == self._identity:
            await self._kube.replace(LEASE, {**lease, "spec": {**lease["spec"], "holderIdentity": ""}})

    async def _try(self) -> bool:
        """Take or renew the lease if we may; whether we hold it now."""
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
            if not self._may_take(lease):
                return False
            taken = lease["spec"].get("holderIdentity") != self._identity
            change: Json = (
                {"acquireTime": now, "leaseTransitions": lease["spec"].get("leaseTransitions", 0) + 1}
                if taken
                else {}
            )
            await self._kube.replace(LEASE, {**lease, "spec": {**lease["spec"], **mine, **change}})
        except Conflict:  # somebody was faster; the next look says who
            return False
        return True

    def _may_take(self, lease: Json) -> bool:
        spec = lease.get("spec", {})
        if spec.get("holderIdentity", "") in ("", self._identity):
            return True
        sign = f"{spec['holderIdentity']} {spec.get('renewTime')}"
        if sign != self._seen[0]:
            self._seen = (sign, time.monotonic())
        return bool(time.monotonic() - self._seen[1] > spec.get("leaseDurationSeconds", self._seconds))
