"""Kube's errors, and the fence that keeps a process without the lease from writing."""

import asyncio
import math
from collections.abc import Awaitable, Callable

import pytest
from aiohttp import web
from distill_operator.connection import Connection
from distill_operator.kube import DISTILLRUN, JOB, LEASE, KindMissing, Kube, KubeError, WriteFenced
from kubernetes.aio.client import Configuration

OBJECT = {"metadata": {"namespace": "a", "name": "b"}}
WRITES: dict[str, Callable[[Kube], Awaitable[object]]] = {
    "create": lambda kube: kube.create(JOB, OBJECT),
    "replace": lambda kube: kube.replace(DISTILLRUN, OBJECT, "status"),
    "patch": lambda kube: kube.patch(DISTILLRUN, "a", "b", {}),
    "apply": lambda kube: kube.apply(JOB, OBJECT),
    "delete": lambda kube: kube.delete(JOB, "a", "b", "uid"),
}


class Server:
    """Gives every request the same response, and records which it got."""

    def __init__(self, response: Callable[[], web.Response], seconds: float = 0) -> None:
        self.requests: list[str] = []
        self._response, self._seconds = response, seconds

    def run(self, work: Callable[[Kube], Awaitable[None]]) -> None:
        asyncio.run(self._run(work))

    async def _run(self, work: Callable[[Kube], Awaitable[None]]) -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._respond)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1, handler_cancellation=True)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            kube = Kube(Connection(Configuration(host=f"http://127.0.0.1:{runner.addresses[0][1]}")))
            await work(kube)
            await kube.close()
        finally:
            await runner.cleanup()

    async def _respond(self, request: web.Request) -> web.Response:
        self.requests.append(request.method)
        await asyncio.sleep(self._seconds)
        return self._response()


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("left", [0.0, -1.0, -math.inf])
def test_a_process_that_may_not_write_sends_no_write_except_of_leases(write: str, left: float) -> None:
    async def work(kube: Kube) -> None:
        kube.write_seconds = lambda: left
        with pytest.raises(WriteFenced, match="may no longer lead"):
            await WRITES[write](kube)
        await kube.get(JOB, "a", "b")
        await kube.replace(LEASE, OBJECT)
        await kube.create(LEASE, OBJECT)
        assert server.requests == ["GET", "PUT", "POST"]
        kube.write_seconds = lambda: 5.0
        await WRITES[write](kube)
        assert len(server.requests) == 4

    server = Server(lambda: web.json_response({}))
    server.run(work)


@pytest.mark.parametrize("write", WRITES)
def test_a_write_is_given_up_when_the_process_may_no_longer_write(write: str) -> None:
    async def work(kube: Kube) -> None:
        kube.write_seconds = lambda: 0.1
        with pytest.raises(KubeError, match="Timeout"):
            await WRITES[write](kube)
        await kube.get(JOB, "a", "b")  # reads go on

    Server(lambda: web.json_response({}), seconds=0.5).run(work)


@pytest.mark.parametrize("status", [200, 201, 403, 404, 409, 422, 429, 500, 503])
def test_every_response_that_is_no_json_object_is_a_kube_error(status: int) -> None:
    """A 404 that does not say what does not exist is no answer: it would be taken for an object or a kind."""

    async def work(kube: Kube) -> None:
        while bodies:
            for call in (kube.get(JOB, "a", "b"), kube.list(JOB, "a"), kube.create(JOB, OBJECT)):
                with pytest.raises(KubeError, match="jobs") as caught:
                    await call
                assert caught.value.code == (0 if status == 404 else status)
                assert not isinstance(caught.value, KindMissing)
            bodies.pop()

    bodies = ["", '{"kind": "Sta', "[]", '"text"', "<html>", "\x80"]
    Server(
        lambda: web.Response(
            status=status, body=bodies[-1].encode("latin-1"), content_type="application/json"
        )
    ).run(work)
