"""A proxy between one replica of the operator and the API server, whose faults follow from a seed.

The fate of a request depends on the seed, its method and path, and how often it was sent before. So it is the
same in each repetition, however the requests of different runs interleave.
"""

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import aiohttp
from aiohttp import web

from tests.fakes.api_proxy import HOP_BY_HOP, WRITES, error_status
from tests.fakes.api_server import ApiServer
from tests.fakes.chaos.invariants import Write
from tests.fakes.chaos.timeline import MOST_BODY, Request, Requests

Fate = Literal[
    "pass",
    "slow",
    "cut",
    "cut after",
    "late",
    "409",
    "410",
    "429",
    "500",
    "500 after",
    "half",
    "kill",
    "kill after",
    "kill late",
]
"""What happens to a request. Without "after": before it is forwarded. cut: the connection is lost. late: so
too, and the request arrives all the same, somewhat later. kill: the replica is killed, its connection cut.
half: half of the answer arrives, which may be a 404. 410 is for lists."""
WATCH_FATES = (*["pass"] * 14, "cut", "silent", "ERROR 410", "ERROR 500", "410", "500")
WRITE_FAULTS: tuple[Fate, ...] = (
    *("slow", "cut", "cut after", "late", "409", "429", "429", "500", "500 after"),
)
READ_FAULTS: tuple[Fate, ...] = ("slow", "cut", "429", "500", "half")
LIST_FAULTS: tuple[Fate, ...] = (*READ_FAULTS, "410")
SLOW_SECONDS, LATE_SECONDS = 0.4, 0.8
KILL_GAPS = (1, 1, 2, 3, 5, 8, 13)
"""Writes that a process may make until it is killed at the next one."""


@dataclass
class FaultPlan:
    """The faults of one replica. `rate` is the share of requests that fail."""

    seed: str
    rate: float
    kills: int
    """Kills that are left."""

    def __post_init__(self) -> None:
        self.killed_at: Counter[str] = Counter()
        self._sent: Counter[tuple[str, str]] = Counter()
        self._rng = random.Random(f"{self.seed} kills")
        self.restarted()

    def restarted(self) -> None:
        """A new process runs."""
        self._until_kill = self._rng.choice(KILL_GAPS)

    def fate(self, method: str, path: str) -> Fate:
        """The fate of the next request of this method and path."""
        rng = self._next(method, path)
        if method in WRITES:
            self._until_kill -= "/leases" not in path or rng.random() < 0.1
            kind = f"{method} {request_kind(path)}"
            # Frequent writes would take all kills.
            if self._until_kill < 0 and self.kills > 0 and rng.random() < 1 / (1 + self.killed_at[kind] / 2):
                self.kills -= 1
                self.killed_at[kind] += 1
                return rng.choice(("kill", "kill after", "kill late"))
        if rng.random() >= self.rate:
            return "pass"
        if method in WRITES:
            return rng.choice(WRITE_FAULTS)
        return rng.choice(LIST_FAULTS if _is_list(path) else READ_FAULTS)

    def watch_fate(self, path: str) -> tuple[str, float]:
        """The fate of the next watch of a path, and after how many seconds it breaks."""
        rng = self._next("WATCH", path)
        return (rng.choice(WATCH_FATES), rng.uniform(0.0, 5.0)) if self.rate else ("pass", 0.0)

    def _next(self, method: str, path: str) -> random.Random:
        self._sent[method, path] += 1
        return random.Random(f"{self.seed} {method} {path} {self._sent[method, path]}")


@dataclass
class ChaosProxy:
    """`async with ChaosProxy(…)` serves at `url`. `kill` kills the replica."""

    api: ApiServer
    identity: str
    plan: FaultPlan
    kill: Callable[[], None]
    writes: list[Write]
    """Of all replicas, in order: those that were applied are added."""
    kept: Requests = field(default_factory=Requests)
    """Of all replicas, for a timeline."""
    faults: Counter[str] = field(default_factory=Counter)
    """How often each fate befell each kind of request."""
    requests: Counter[str] = field(default_factory=Counter)
    """How many there were of each kind."""

    async def __aenter__(self) -> "ChaosProxy":
        app = web.Application(client_max_size=2**24)
        app.router.add_route("*", "/{path:.*}", self._pass)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        self._late: set[asyncio.Task[web.Response]] = set()
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*self._late, return_exceptions=True)
        await self._runner.cleanup()

    async def _pass(self, request: web.Request) -> web.StreamResponse:
        self.requests[f"{request.method} {request_kind(request.path)}"] += 1
        body = await request.read()
        if "watch" in request.query:
            return await self._watch(request)
        fate = self.plan.fate(request.method, request.path)
        if fate != "pass":
            self.faults[f"{fate}: {request.method} {request_kind(request.path)}"] += 1
        match fate:
            case "409" | "410" | "429" | "500":
                self._keep(request, body, fate, int(fate))
                headers = {"Retry-After": "1"} if fate == "429" else {}
                return web.json_response(error_status(int(fate)), status=int(fate), headers=headers)
            case "slow":
                await asyncio.sleep(SLOW_SECONDS)
            case "kill" | "cut":
                self._keep(request, body, fate)
                if fate == "kill":
                    self.kill()
                return self._cut(request)
            case "late" | "kill late":
                self._keep(request, body, fate)
                if fate == "kill late":
                    self.kill()
                late = asyncio.create_task(self._forward_late(request, body))
                self._late.add(late)
                late.add_done_callback(self._late.discard)
                return self._cut(request)
        try:
            answer = await asyncio.shield(self._forward(request, body))
        except asyncio.CancelledError:  # the replica has given up, or was killed at another request
            self._keep(request, body, fate)
            raise
        assert isinstance(answer.body, bytes)
        self._keep(request, body, fate, answer.status, answer.body)
        match fate:
            case "kill after":
                self.kill()
                return self._cut(request)
            case "cut after":
                return self._cut(request)
            case "500 after":
                return web.json_response(error_status(500), status=500)
            case "half":
                answer.body = answer.body[: len(answer.body) // 2]
        return answer

    def _keep(
        self, request: web.Request, sent: bytes, fate: Fate, status: int = 0, answer: bytes = b""
    ) -> None:
        """Keep a request for a timeline. Those about the Lease belong to no run."""
        if "/leases" in request.path:
            return
        method, path = request.method, request.raw_path
        if method == "POST":
            path += "/" + json.loads(sent).get("metadata", {}).get("name", "")
        body = answer if method == "GET" and len(answer) <= MOST_BODY else b""
        self.kept.add(Request(time.monotonic(), self.identity, method, path, fate, status, body))

    async def _forward_late(self, request: web.Request, body: bytes) -> web.Response:
        await asyncio.sleep(LATE_SECONDS)
        return await self._forward(request, body)

    async def _forward(self, request: web.Request, body: bytes) -> web.Response:
        headers = _forwarded(request)
        url = self.api.url + request.raw_path
        method = request.method
        async with self.api.session.request(method, url, data=body or None, headers=headers) as answer:
            content = await answer.read()
        if method in WRITES and answer.status < 300 and "/leases" not in request.path:
            meta = json.loads(content).get("metadata", {})
            # An object that is gone without its last finalizer is returned as it was before.
            if "resourceVersion" in meta and not (method == "PATCH" and "deletionTimestamp" in meta):
                version = int(meta["resourceVersion"])
                self.writes.append(Write(self.identity, method, request.path, version))
        return web.Response(status=answer.status, body=content, content_type=answer.content_type)

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        fate, seconds = self.plan.watch_fate(request.path)
        if fate != "pass":
            self.faults[f"{fate}: WATCH {request_kind(request.path)}"] += 1
        if fate in ("410", "500"):
            return web.json_response(error_status(int(fate)), status=int(fate))
        headers = _forwarded(request)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        async with self.api.session.get(
            self.api.url + request.raw_path, headers=headers, timeout=aiohttp.ClientTimeout(total=None)
        ) as answer:
            response.set_status(answer.status)
            with contextlib.suppress(ConnectionError):
                await response.prepare(request)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(None if fate == "pass" else seconds):
                        async for chunk in answer.content.iter_any():
                            await response.write(chunk)
                    return response
                if fate == "silent":
                    await asyncio.Event().wait()  # until the client gives up
                elif fate == "cut":
                    self._cut(request)
                else:
                    event = {"type": "ERROR", "object": error_status(int(fate[-3:]))}
                    await response.write(json.dumps(event).encode() + b"\n")
        return response

    def _cut(self, request: web.Request) -> web.Response:
        """End the connection without an answer."""
        if request.transport is not None:
            request.transport.abort()
        return web.Response()


def _forwarded(request: web.Request) -> dict[str, str]:
    """The headers of a request that are forwarded."""
    own = (*HOP_BY_HOP, "accept-encoding")
    return {name: value for name, value in request.headers.items() if name.lower() not in own}


def _is_list(path: str) -> bool:
    return path.rsplit("/", 1)[-1].endswith("s") and path.rsplit("/", 1)[-1] != "status"


def request_kind(path: str) -> str:
    """The resource of a path, and its subresource."""
    parts = path.partition("/namespaces/")[2].split("/")[1:] or path.split("/")[-1:]
    return parts[0] + ("/status" if parts[-1] == "status" else "")
