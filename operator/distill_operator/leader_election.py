"""Leader election: one process at a time holds a coordination.k8s.io Lease, the others stand by.

The holder renews the lease at a quarter of its duration, and stops writing when two thirds have passed since
the last renewal. Another process may take the lease over when its whole duration has passed without a change.
Both measure with a clock of their own that counts suspended time too: times in the lease are for people, and
steps of a clock do not matter. A process that was frozen finds at its next write that it may no longer lead
(`seconds_left`, which Kube checks).

A process that finds its own identity in the lease takes it at once: identities are pod names, so this pod's
container was restarted.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime

from distill_operator.kube import LEASE, Conflict, Json, Kube, KubeError

log = logging.getLogger(__name__)


class LeaseLost(Exception):
    """Another process may lead now: this one must end at once, without finishing what is in progress."""


def clock() -> float:
    """Seconds that also pass while the machine is suspended, and that nobody can set."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Lease:
    """The lease `name` for the process `identity`. `seconds` is how long it outlives its holder."""

    def __init__(
        self,
        kube: Kube,
        namespace: str,
        name: str,
        identity: str,
        seconds: int,
        clock: Callable[[], float] = clock,
    ) -> None:
        self._kube, self._clock = kube, clock
        self._namespace, self._name, self._identity, self._seconds = namespace, name, identity, seconds
        self._held: Json | None = None  # as this process wrote it
        self._renewed = float("-inf")  # start of the last renewal that succeeded
        self._seen_version = ""  # another holder's lease as seen last
        self._seen_until = float("-inf")  # when that may be taken over

    def seconds_left(self) -> float:
        """Seconds for which this process may still write; 0 or less if it does not hold the lease."""
        return self._renewed + self._seconds * 2 / 3 - self._clock()

    async def acquire(self) -> None:
        """Wait until this process holds the lease. Errors of the API server are retried."""
        while not await self._try_to_acquire():
            until_free = self._seen_until - self._clock()
            look_again = self._seconds / 4
            await asyncio.sleep(min(until_free + 0.01, look_again) if until_free > 0 else look_again)
        log.info("%s holds lease %s/%s", self._identity, self._namespace, self._name)

    async def hold(self) -> None:
        """Renew forever.

        Raises LeaseLost if that has failed for two thirds of the duration, or another process holds the
        lease.
        """
        pause = self._seconds / 4
        while True:
            await asyncio.sleep(min(pause, max(self.seconds_left(), 0)))
            left = self.seconds_left()
            if left <= 0:
                raise LeaseLost(f"the lease could not be renewed for {self._seconds * 2 / 3:g} s")
            pause = self._seconds / 24
            try:
                async with asyncio.timeout(min(left, self._seconds / 4)):
                    held = await self._renew()
            except (KubeError, TimeoutError) as error:
                self._warn("renew", error)
                continue
            if not held:
                raise LeaseLost("another process has taken the lease")
            pause = self._seconds / 4

    async def release(self) -> None:
        """Let a standby take over at once instead of after the lease's duration. This process can write
        nothing afterwards. Raises KubeError.
        """
        self._renewed = float("-inf")
        held = self._held or await self._kube.get(LEASE, self._namespace, self._name)
        if held is not None and held["spec"].get("holderIdentity") == self._identity:
            await self._kube.replace(LEASE, {**held, "spec": {**held["spec"], "holderIdentity": ""}})

    async def _try_to_acquire(self) -> bool:
        """One attempt. Returns whether this process holds the lease now."""
        try:
            async with asyncio.timeout(self._seconds / 2):
                return await self._renew()
        except Conflict:  # another process was faster; the next attempt sees which
            return False
        except (KubeError, TimeoutError) as error:
            self._warn("acquire", error)
            return False

    async def _renew(self) -> bool:
        """Acquire or renew the lease if that is allowed. Returns whether this process holds it now.

        The holder writes over what it wrote last. It reads the lease first only if somebody changed that, or
        if it does not know whether its last write arrived. Raises KubeError.
        """
        started, held, self._held = self._clock(), self._held, None
        if held is not None:
            try:
                self._held = await self._write(held)
            except Conflict:
                log.info("lease %s/%s was changed; reading it", self._namespace, self._name)
        if self._held is None:
            lease = await self._kube.get(LEASE, self._namespace, self._name)
            if not self._may_acquire(lease):
                return False
            self._held = await self._write(lease)
        self._renewed = started
        return True

    async def _write(self, lease: Json | None) -> Json:
        """Write this process into the lease; create it if `lease` is None. Raises Conflict if it is not
        `lease` any more.
        """
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        mine: Json = {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": self._seconds,
            "renewTime": now,
        }
        if lease is None:
            return await self._kube.create(
                LEASE,
                {
                    "apiVersion": LEASE.api_version,
                    "kind": LEASE.name,
                    "metadata": {"namespace": self._namespace, "name": self._name},
                    "spec": {**mine, "acquireTime": now},
                },
            )
        spec = lease.get("spec") or {}
        if spec.get("holderIdentity") != self._identity:
            mine |= {"acquireTime": now, "leaseTransitions": (spec.get("leaseTransitions") or 0) + 1}
        return await self._kube.replace(LEASE, {**lease, "spec": {**spec, **mine}})

    def _may_acquire(self, lease: Json | None) -> bool:
        """Whether this process holds the lease, or nobody does, or its holder has not written it for its
        duration. A lease that was deleted is its last holder's for that time.
        """
        spec = (lease.get("spec") or {}) if lease is not None else {}
        if lease is not None:
            if (spec.get("holderIdentity") or "") in ("", self._identity):
                return True
            version = lease["metadata"]["resourceVersion"]
            if version != self._seen_version:
                duration = spec.get("leaseDurationSeconds") or self._seconds
                self._seen_version, self._seen_until = version, self._clock() + duration
        return self._clock() >= self._seen_until

    def _warn(self, what: str, error: Exception) -> None:
        why = str(error) or "no response in time"
        log.warning("cannot %s lease %s/%s, retrying: %s", what, self._namespace, self._name, why)
