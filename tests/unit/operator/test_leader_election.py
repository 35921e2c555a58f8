"""Leader election: at any time at most one process may write, whatever the API server and the clocks do."""

import asyncio
import contextlib
import random
import secrets
from collections.abc import Callable
from typing import Any

import pytest
from distill_operator.kube import Conflict, Json, Kind, KubeError
from distill_operator.leader_election import Lease, LeaseLost

from tests.fakes.virtual_loop import run_virtual

SECONDS = 12


class LeaseServer:
    """One Lease, with resourceVersions. A stand-in: no real server loses requests when it is told to.

    A request is carried out between its start and its answer, even if its process has given up by then.
    """

    def __init__(self) -> None:
        self.lease: Json | None = None
        self.version = 0
        self.delay: Callable[[], tuple[float, float]] = lambda: (0.005, 0.005)
        """Seconds before a request is carried out, and from then until the answer."""
        self.error: Callable[[], Exception | None] = lambda: None
        """Returned instead of the answer to a request that was carried out."""
        self.refuses = False
        """Whether requests are refused instead of carried out."""
        self.requests: list[str] = []
        self._running = set[asyncio.Task[Any]]()

    def write(self, lease: Json) -> Json:
        self.version += 1
        meta = {**lease["metadata"], "resourceVersion": str(self.version)}
        self.lease = {**lease, "metadata": meta}
        return self.lease

    def client(self, clock_rate: float = 1.0) -> "LeaseClient":
        return LeaseClient(self, clock_rate)

    async def call(self, name: str, act: Callable[[], Any]) -> Any:
        self.requests.append(name)
        before, after = self.delay()
        task = asyncio.create_task(self._carry_out(before, act))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        result = await asyncio.shield(task)
        await asyncio.sleep(after)
        error = self.error()
        for outcome in (error, result):
            if isinstance(outcome, Exception):
                raise outcome
        return result

    async def _carry_out(self, before: float, act: Callable[[], Any]) -> Any:
        await asyncio.sleep(before)
        if self.refuses:
            return KubeError("503", 503)
        try:
            return act()
        except KubeError as error:
            return error


class LeaseClient:
    """What Lease uses of Kube, and a clock that runs at a rate of its own from an hour of its own."""

    def __init__(self, server: LeaseServer, rate: float) -> None:
        self.server, self.rate, self.offset = server, rate, random.uniform(0, 1e6)

    def clock(self) -> float:
        return self.offset + asyncio.get_running_loop().time() * self.rate

    async def get(self, kind: Kind, namespace: str, name: str) -> Json | None:
        return await self.server.call("get", lambda: self.server.lease)  # type: ignore[no-any-return]

    async def create(self, kind: Kind, obj: Json) -> Json:
        def act() -> Json:
            if self.server.lease is not None:
                raise Conflict("it exists", 409)
            return self.server.write(obj)

        return await self.server.call("create", act)  # type: ignore[no-any-return]

    async def replace(self, kind: Kind, obj: Json) -> Json:
        def act() -> Json:
            if self.server.lease is None:
                raise KubeError("it does not exist", 404)
            if self.server.lease["metadata"]["resourceVersion"] != obj["metadata"]["resourceVersion"]:
                raise Conflict("it was changed", 409)
            return self.server.write(obj)

        return await self.server.call("replace", act)  # type: ignore[no-any-return]


def lease_of(client: LeaseClient, identity: str) -> Lease:
    return Lease(client, "system", "lease", identity, SECONDS, client.clock)  # type: ignore[arg-type]


async def lead(lease: Lease) -> None:
    await lease.acquire()
    await lease.hold()


def test_two_processes_never_may_write_at_once() -> None:
    """Processes with clocks at rates of their own come, are killed and stop; requests are late, fail, are
    carried out without an answer or after their process has given up; somebody edits the lease."""
    seed = secrets.randbelow(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    led = run_virtual(chaos(rng))
    assert led > 20, f"seed {seed}: leaders must change for this test to show anything, and only {led} led"


async def chaos(rng: random.Random, hours: float = 1) -> int:
    """Returns how many processes led."""
    server = LeaseServer()
    trouble = 0.0  # share of requests that fail or are late

    def delay() -> tuple[float, float]:
        if rng.random() < trouble:
            return rng.uniform(0, 20), rng.uniform(0, 20)
        return rng.uniform(0.001, 0.1), rng.uniform(0.001, 0.1)

    def error() -> Exception | None:
        return KubeError("503", 503) if rng.random() < trouble else None

    server.delay, server.error = delay, error
    processes: dict[str, tuple[Lease, asyncio.Task[None]]] = {}
    frozen = list[Lease]()  # killed or stopped for good: it must find by itself that it may not write
    led = set[str]()
    count = 0
    loop = asyncio.get_running_loop()
    for step in range(int(hours * 3600 * 10)):
        await asyncio.sleep(0.1)
        if step % 600 == 0:
            trouble = rng.choice((0, 0, 0.1, 0.5, 0.9))
        while len(processes) < 3:
            count += 1
            lease = lease_of(server.client(rng.uniform(0.95, 1.05)), f"process-{count}")
            processes[f"process-{count}"] = (lease, asyncio.create_task(lead(lease)))
        for name, (lease, task) in list(processes.items()):
            ended = task.done()
            if ended:
                assert isinstance(task.exception(), LeaseLost)
                assert lease.seconds_left() <= 0 or "another process" in str(task.exception())
            elif rng.random() < 0.003:
                task.cancel()
                if rng.random() < 0.3:
                    await asyncio.wait({task})
                    with_trouble, trouble = trouble, 0.0
                    with contextlib.suppress(KubeError):  # its last renewal may still arrive
                        await lease.release()
                    trouble = with_trouble
            else:
                continue
            frozen.append(lease)
            del processes[name]
        all_of_them = (*frozen, *(lease for lease, _ in processes.values()))
        may_write = [lease._identity for lease in all_of_them if lease.seconds_left() > 0]
        assert len(may_write) <= 1, (loop.time(), may_write)
        led.update(may_write)
        if rng.random() < 0.0005 and server.lease is not None:  # an edit of somebody
            server.write(server.lease)
        frozen = frozen[-20:]
    for _, task in processes.values():
        task.cancel()
    return len(led)


def test_a_killed_leader_is_replaced_within_the_lease_and_one_look() -> None:
    async def work() -> float:
        server = LeaseServer()
        leases = [lease_of(server.client(), name) for name in ("first", "second")]
        first = asyncio.create_task(lead(leases[0]))
        await asyncio.sleep(1)
        second = asyncio.create_task(leases[1].acquire())
        await asyncio.sleep(rng.uniform(10, 20))
        assert not second.done()
        first.cancel()
        killed = asyncio.get_running_loop().time()
        await second
        return asyncio.get_running_loop().time() - killed

    seed = secrets.randbelow(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    pauses = [run_virtual(work()) for _ in range(200)]
    assert max(pauses) < SECONDS + SECONDS / 4 + 0.1
    assert min(pauses) > SECONDS * 2 / 3


def test_a_leader_that_stops_is_replaced_at_the_next_look() -> None:
    async def work() -> float:
        server = LeaseServer()
        first, second = (lease_of(server.client(), name) for name in ("first", "second"))
        leading = asyncio.create_task(lead(first))
        await asyncio.sleep(7)
        waiting = asyncio.create_task(second.acquire())
        await asyncio.sleep(7)
        leading.cancel()
        await first.release()
        assert first.seconds_left() <= 0
        began = asyncio.get_running_loop().time()
        await waiting
        return asyncio.get_running_loop().time() - began

    assert run_virtual(work()) <= SECONDS / 4 + 0.1


@pytest.mark.parametrize("seconds", [1, 3, 4])
def test_short_faults_of_the_api_server_do_not_end_the_leader(seconds: float) -> None:
    async def work() -> None:
        server = LeaseServer()
        lease = lease_of(server.client(), "first")
        leading = asyncio.create_task(lead(lease))
        for fault in (lambda: (1000.0, 0.0), lambda: (0.0, 1000.0)):  # never carried out; never answered
            await asyncio.sleep(20)
            server.delay = fault
            await asyncio.sleep(seconds)
            server.delay = lambda: (0.005, 0.005)
            assert lease.seconds_left() > 0
        await asyncio.sleep(20)
        assert not leading.done()
        assert lease.seconds_left() > 0
        leading.cancel()

    run_virtual(work())


@pytest.mark.parametrize("refuses", [True, False], ids=["errors", "silence"])
def test_a_leader_that_cannot_renew_ends_before_another_may_lead(refuses: bool) -> None:
    async def work() -> None:
        server = LeaseServer()
        lease = lease_of(server.client(), "first")
        leading = asyncio.create_task(lead(lease))
        await asyncio.sleep(20)
        server.refuses = refuses
        if not refuses:
            server.delay = lambda: (1000.0, 0.0)
        await asyncio.sleep(SECONDS * 2 / 3 - 0.1)
        with pytest.raises(LeaseLost, match="could not be renewed for 8 s"):
            await leading
        assert lease.seconds_left() <= 0

    run_virtual(work())


def test_the_holder_renews_with_one_request() -> None:
    async def work() -> list[str]:
        server = LeaseServer()
        leading = asyncio.create_task(lead(lease_of(server.client(), "first")))
        await asyncio.sleep(SECONDS * 10)
        leading.cancel()
        return server.requests

    requests = run_virtual(work())
    assert requests[:2] == ["get", "create"]
    assert set(requests[2:]) == {"replace"}
    assert len(requests) - 2 in (39, 40)


def test_a_lease_that_was_deleted_is_made_again_by_its_holder() -> None:
    async def work() -> None:
        server = LeaseServer()
        first, second = (lease_of(server.client(), name) for name in ("first", "second"))
        leading = asyncio.create_task(lead(first))
        await asyncio.sleep(7)
        waiting = asyncio.create_task(lead(second))
        for _ in range(10):
            await asyncio.sleep(random.uniform(5, 10))
            server.lease = None
        await asyncio.sleep(10)
        assert first.seconds_left() > 0 >= second.seconds_left()
        for task in (leading, waiting):
            assert not task.done()
            task.cancel()

    run_virtual(work())


@pytest.mark.parametrize(
    "spec",
    [None, {}, {"holderIdentity": ""}, {"holderIdentity": None}, {"holderIdentity": "me"}],
    ids=["no spec", "empty spec", "released", "null", "our own: the container was restarted"],
)
def test_a_lease_without_another_holder_is_taken_at_once(spec: Json | None) -> None:
    async def work() -> float:
        server = LeaseServer()
        server.write({"metadata": {}, **({} if spec is None else {"spec": spec})})
        lease = lease_of(server.client(), "me")
        await lease.acquire()
        assert lease.seconds_left() > 0
        return asyncio.get_running_loop().time()

    assert run_virtual(work()) < 0.1


def test_nothing_may_be_written_before_the_lease_is_held() -> None:
    async def work() -> None:
        assert lease_of(LeaseServer().client(), "me").seconds_left() <= 0

    run_virtual(work())
