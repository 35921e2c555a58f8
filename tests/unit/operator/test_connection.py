"""The connection to the API server: changing credentials, broken answers, proxies, and no second attempt."""

import asyncio
import base64
import contextlib
import datetime
import gzip
import json
import shutil
import socket
import ssl
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from aiohttp import ClientTimeout, web
from distill_operator import connection, kube
from distill_operator.connection import Connection
from distill_operator.kube import DISTILLRUN, JOB, LEASE, POD, Kube, KubeError
from kubernetes.aio.client import Configuration
from kubernetes.aio.config import incluster_config

from devcluster import certificates

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
OBJECT = {"metadata": {"namespace": "a", "name": "b"}}
PATH = JOB.path("a", "b")
CALLS: dict[str, Callable[[Kube], Awaitable[object]]] = {
    "GET": lambda kube: kube.get(JOB, "a", "b"),
    "POST": lambda kube: kube.create(JOB, OBJECT),
    "PUT": lambda kube: kube.replace(DISTILLRUN, OBJECT, "status"),
    "PATCH": lambda kube: kube.patch(DISTILLRUN, "a", "b", {}),
    "DELETE": lambda kube: kube.delete(JOB, "a", "b", "uid"),
}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ca.crt, and server.crt and server.key for 127.0.0.1."""
    folder = tmp_path_factory.mktemp("certificates")
    certificates.authority(folder, "ca-of-the-test")
    certificates.certificate(folder, "server", "/CN=server", "subjectAltName=IP:127.0.0.1")
    certificates.certificate(folder, "user", "/CN=user", "extendedKeyUsage=clientAuth")
    return folder


class Server:
    """An API server that answers with `handler`, and knows what it got and which connections are open."""

    def __init__(self, handler: Handler | None = None, context: ssl.SSLContext | None = None) -> None:
        self.handler = handler or (lambda request: answer({}))
        self.requests: list[web.Request] = []
        self.port = 0
        self._context = context

    async def __aenter__(self) -> "Server":
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._respond)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=self._context).start()
        self.port = self._runner.addresses[0][1]
        self.url = f"{'https' if self._context else 'http'}://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._runner.cleanup()

    async def _respond(self, request: web.Request) -> web.StreamResponse:
        await request.read()
        self.requests.append(request)
        return await self.handler(request)

    def tokens(self) -> list[str]:
        return [request.headers.get("Authorization", "") for request in self.requests]

    async def all_closed(self) -> None:
        """Wait until no connection is open."""
        async with asyncio.timeout(30):
            while self._runner.server is not None and self._runner.server.connections:
                await asyncio.sleep(0.01)


async def answer(body: Any, code: int = 200) -> web.Response:
    return web.json_response(body, status=code)


async def never(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(3600)
    raise AssertionError


@asynccontextmanager
async def connected(server: Server) -> AsyncIterator[Kube]:
    kube = Kube(Connection(Configuration(host=server.url)))
    try:
        yield kube
    finally:
        await kube.close()


def server_context(folder: Path, asks: bool = False) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    if asks:
        context.load_verify_locations(folder / "ca.crt")
        context.verify_mode = ssl.CERT_REQUIRED
    return context


# Requests.


def test_requests_are_what_the_api_server_expects() -> None:
    selector = "vpmoe.dev/run in (a,b),vpmoe.dev/step!=clear"

    async def work() -> None:
        async def respond(request: web.Request) -> web.Response:
            got.append((request.method, request.content_type, json.loads(await request.read() or "null")))
            return await answer({"items": [], "metadata": {}})

        async with Server(respond) as server, connected(server) as kube:
            await kube.list(POD, "a", labels=selector, fields="spec.nodeName=n&1")
            await kube.get(JOB, "a", "ü/.. b?")
            await kube.patch(JOB, "a", "b", {})
            await kube.patch(JOB, "a", "b", {"metadata": {"labels": None, "ü": '"\\\u2028'}})
            await kube.apply(JOB, OBJECT)
            await kube.delete(JOB, "a", "b", "uid-1")
        first, second, *_, applied, _ = server.requests
        assert dict(first.query) == {
            "limit": "250",
            "labelSelector": selector,
            "fieldSelector": "spec.nodeName=n&1",
        }
        assert second.raw_path == "/apis/batch/v1/namespaces/a/jobs/%C3%BC%2F..%20b%3F"
        assert dict(applied.query) == {"fieldManager": "distill-operator", "force": "true"}
        for request in server.requests:
            assert request.headers["Accept"] == "application/json"
            assert request.headers["User-Agent"] == "distill-operator"
            assert "Authorization" not in request.headers

    got: list[tuple[str, str, Any]] = []
    asyncio.run(work())
    assert got[2:] == [
        ("PATCH", "application/merge-patch+json", {}),
        ("PATCH", "application/merge-patch+json", {"metadata": {"labels": None, "ü": '"\\\u2028'}}),
        ("PATCH", "application/apply-patch+yaml", OBJECT),
        ("DELETE", "application/json", got[5][2]),
    ]
    assert got[5][2]["preconditions"] == {"uid": "uid-1"}


def test_as_many_requests_as_there_are_connections_are_in_flight_at_once() -> None:
    async def work() -> None:
        everybody = asyncio.Barrier(connection.CONNECTIONS)

        async def respond(request: web.Request) -> web.Response:
            await everybody.wait()
            return await answer({})

        async with Server(respond) as server, connected(server) as kube, asyncio.timeout(60):
            await asyncio.gather(*(kube.get(JOB, "a", "b") for _ in range(connection.CONNECTIONS)))

    asyncio.run(work())


# No second attempt.


@pytest.mark.parametrize("method", CALLS)
@pytest.mark.parametrize("used", [False, True], ids=["a new connection", "a connection that was used before"])
def test_a_connection_that_the_server_closes_is_an_error_and_nothing_is_sent_again(
    method: str, used: bool
) -> None:
    async def work() -> None:
        async def close(request: web.Request) -> web.StreamResponse:
            request.transport.close()  # type: ignore[union-attr]
            return await never(request)

        async with Server() as server, connected(server) as kube:
            if used:
                await kube.get(JOB, "a", "b")
            server.handler = close
            with pytest.raises(KubeError, match=f"^{method} /apis/.*Disconnected") as caught:
                await CALLS[method](kube)
            assert caught.value.code == 0
            assert [request.method for request in server.requests] == ["GET"] * used + [method]

    asyncio.run(work())


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("method", CALLS)
def test_redirects_are_not_followed(method: str, code: int) -> None:
    """Neither the object nor the token goes to another server."""

    async def work() -> None:
        async with Server() as elsewhere, Server() as server, connected(server) as kube:

            async def redirect(request: web.Request) -> web.Response:
                return web.Response(status=code, headers={"Location": elsewhere.url})

            server.handler = redirect
            with pytest.raises(KubeError, match=f"redirects to {elsewhere.url}") as caught:
                await CALLS[method](kube)
            assert caught.value.code == code
            assert (len(server.requests), elsewhere.requests) == (1, [])

    asyncio.run(work())


@pytest.mark.parametrize("code", [401, 429, 500, 503])
def test_an_error_is_not_tried_again(code: int) -> None:
    async def work() -> None:
        async def refuse(request: web.Request) -> web.Response:
            return web.json_response(
                {"kind": "Status", "message": "later"}, status=code, headers={"Retry-After": "0"}
            )

        async with Server(refuse) as server, connected(server) as kube:
            for number, call in enumerate(CALLS.values(), 1):
                with pytest.raises(KubeError, match="later") as caught:
                    await call(kube)
                assert caught.value.code == code
                assert len(server.requests) == number

    asyncio.run(work())


# Broken answers.


CUTS = {
    "with a length": b"Content-Length: 4000\r\n\r\n" + b'{"items": [',
    "in chunks": b'Transfer-Encoding: chunked\r\n\r\nb\r\n{"items": [\r\n',
    "in half a chunk": b'Transfer-Encoding: chunked\r\n\r\nff\r\n{"items": [',
    "compressed": b"Content-Encoding: gzip\r\nContent-Length: 4000\r\n\r\n" + gzip.compress(b"{" * 4000)[:20],
    "compressed and garbage": b"Content-Encoding: gzip\r\nContent-Length: 9\r\n\r\nno gzip!!",
    "in its headers": b"Content-Len",
    "of no HTTP at all": b"SSH-2.0-OpenSSH\r\n",
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("code", [200, 409, 500])
def test_an_answer_that_is_cut_is_an_error(cut: str, code: int) -> None:
    async def work() -> None:
        async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            if cut != "of no HTTP at all":
                writer.write(b"HTTP/1.1 %d OK\r\nContent-Type: application/json\r\n" % code)
            writer.write(CUTS[cut])
            await writer.drain()
            writer.close()
            requests.append(cut)

        requests: list[str] = []
        server = await asyncio.start_server(respond, "127.0.0.1", 0)
        kube = Kube(Connection(Configuration(host=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")))
        with pytest.raises(KubeError, match=r"^GET /apis/batch/v1/namespaces/a/jobs") as caught:
            await kube.list(JOB, "a")
        assert caught.value.code == 0
        assert len(requests) == 1
        await kube.close()
        server.close()

    asyncio.run(work())


@pytest.mark.parametrize("code", [200, 500])
@pytest.mark.parametrize("compressed", [False, True])
def test_an_answer_that_does_not_end_is_not_read_to_its_end(
    code: int, compressed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "ANSWER_BYTES", 100_000)

    async def work() -> None:
        async def endless(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse(status=code)
            if compressed:
                response.enable_compression()
            await response.prepare(request)
            while True:
                await response.write(b"x" * 10_000)

        async with Server(endless) as server, connected(server) as kube:
            for call in CALLS.values():
                with pytest.raises(KubeError, match="more than 100000 bytes"):
                    await call(kube)
            await server.all_closed()

    asyncio.run(work())


def test_a_list_of_large_objects_is_read_in_smaller_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tenant's large objects must not hide those of all others. Here the second page does not fit."""
    monkeypatch.setattr(connection, "ANSWER_BYTES", 100_000)
    monkeypatch.setattr(kube, "PAGE", 20)
    objects = [{"metadata": {"name": f"{n}", "note": "x" * (100 if n < 20 else 30_000)}} for n in range(40)]

    async def work() -> None:
        async def page(request: web.Request) -> web.Response:
            start, limit = int(request.query.get("continue", 0)), int(request.query["limit"])
            limits.append(limit)
            end = start + limit
            more = {"continue": str(end)} if end < len(objects) else {}
            return await answer({"items": objects[start:end], "metadata": more})

        async with Server(page) as server, connected(server) as kube:
            found = await kube.list(JOB, "a")
            assert [item["metadata"]["name"] for item in found] == [f"{n}" for n in range(40)]
            assert limits == [20, 20] + [2] * 10
            objects[3] = {"metadata": {"name": "3", "note": "x" * 200_000}}
            with pytest.raises(KubeError, match="more than 100000 bytes"):
                await kube.list(JOB, "a")

    limits: list[int] = []
    asyncio.run(work())


# Time-outs and cancellation.


async def half(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "4000"})
    await response.prepare(request)
    await response.write(b'{"items"')
    return await never(request)


async def drip(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b" ")
        await asyncio.sleep(0.02)


HANGS = {"before its first byte": never, "in the body": half, "slower and slower": drip}


@pytest.mark.parametrize("hang", HANGS)
def test_an_answer_that_hangs_times_out_and_its_connection_is_closed(
    hang: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = ClientTimeout(total=1, sock_read=0.3)
    monkeypatch.setattr(connection, "TIMEOUT", short)

    async def work() -> None:
        async with Server(HANGS[hang]) as server, connected(server) as kube:
            for method, call in CALLS.items():
                with pytest.raises(KubeError, match=f"^{method} .*(?i:time)") as caught:
                    await call(kube)
                assert caught.value.code == 0
            await server.all_closed()

    asyncio.run(work())


def test_an_address_that_does_not_answer_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "TIMEOUT", ClientTimeout(sock_connect=0.3))

    async def work() -> None:
        with socket.socket() as full:  # it accepts nothing, and its queue is full
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            with contextlib.ExitStack() as waiting:
                for _ in range(3):
                    one = waiting.enter_context(socket.socket())
                    one.setblocking(False)
                    one.connect_ex(full.getsockname())
                kube = Kube(Connection(Configuration(host=f"http://127.0.0.1:{full.getsockname()[1]}")))
                with pytest.raises(KubeError, match=r"(?i:time)"):
                    await kube.get(JOB, "a", "b")
                await kube.close()

    asyncio.run(work())


@pytest.mark.parametrize("hang", HANGS)
@pytest.mark.parametrize("way", ["cancelled", "fenced"])
def test_requests_that_are_given_up_leave_no_connection_behind(
    hang: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more of them than there are connections, a leak would block the next request."""
    monkeypatch.setattr(connection, "CONNECTIONS", 2)

    async def work() -> None:
        async with Server(HANGS[hang]) as server, connected(server) as kube:
            if way == "fenced":
                kube.write_seconds = lambda: 0.2
            for number in range(1, 6):
                task = asyncio.create_task(CALLS["PUT"](kube))
                async with asyncio.timeout(30):
                    while len(server.requests) < number and not task.done():
                        await asyncio.sleep(0.01)
                if way == "cancelled":
                    task.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await task
                else:
                    with pytest.raises(KubeError, match="TimeoutError"):
                        await task
            server.handler = lambda request: answer({})
            await kube.replace(LEASE, OBJECT)
            await kube.close()
            await server.all_closed()

    asyncio.run(work())


# Service account.


@pytest.fixture
def account(tmp_path: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pod's folder with the service account's files."""
    folder = tmp_path / "serviceaccount"
    folder.mkdir()
    (folder / "token").write_text("first")
    shutil.copy(certificate / "ca.crt", folder)
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(folder / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(folder / "ca.crt"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    return folder


def rotate(folder: Path, token: str) -> None:
    """Replace the token as the kubelet does."""
    (folder / "new").write_text(token)
    (folder / "new").rename(folder / "token")


def move_clock(monkeypatch: pytest.MonkeyPatch, by: datetime.timedelta) -> None:
    """Move the clock with which the client decides when to read the token again."""
    moved = SimpleNamespace(now=lambda: datetime.datetime.now() + by)
    fake = SimpleNamespace(datetime=moved, timedelta=datetime.timedelta)
    monkeypatch.setattr(incluster_config, "datetime", fake)


def in_a_pod(
    certificate: Path, monkeypatch: pytest.MonkeyPatch, work: Callable[[Server, Kube], Awaitable[None]]
) -> None:
    async def all_of_it() -> None:
        async with Server(context=server_context(certificate)) as server:
            monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))
            kube = await asyncio.to_thread(Kube.connect)
            await work(server, kube)
            await kube.close()

    asyncio.run(all_of_it())


def accepts(*tokens: str) -> Handler:
    """Answers 401 to every other token."""

    async def respond(request: web.Request) -> web.Response:
        if request.headers.get("Authorization", "").casefold() in {f"bearer {token}" for token in tokens}:
            return await answer({})
        return await answer({"kind": "Status", "message": "Unauthorized", "code": 401}, 401)

    return respond


def test_a_token_that_is_replaced_in_its_file_is_used_within_a_minute(
    account: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(server: Server, kube: Kube) -> None:
        await kube.get(JOB, "a", "b")
        rotate(account, "second\n")  # a line break is no part of it
        move_clock(monkeypatch, datetime.timedelta(minutes=1, seconds=1))
        await kube.get(JOB, "a", "b")
        rotate(account, "third")
        move_clock(monkeypatch, datetime.timedelta(minutes=3))
        await kube.get(JOB, "a", "b")
        assert server.tokens() == ["bearer first", "bearer second", "bearer third"]

    in_a_pod(certificate, monkeypatch, work)


@pytest.mark.parametrize("clock", [0, -86_400])
@pytest.mark.parametrize("method", CALLS)
def test_a_token_that_is_refused_is_read_again_for_the_next_request(
    method: str, clock: int, account: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while the client would not look, because its minute is not over, or the clock went back."""

    async def work(server: Server, kube: Kube) -> None:
        for number in range(3):
            server.handler = accepts("first" if number == 0 else f"token{number}")
            await CALLS[method](kube)
            server.requests.clear()
            move_clock(monkeypatch, datetime.timedelta(seconds=clock))
            rotate(account, f"token{number + 1}")
            server.handler = accepts(f"token{number + 1}")
            with pytest.raises(KubeError, match="Unauthorized") as caught:
                await CALLS[method](kube)
            assert caught.value.code == 401
            assert len(server.requests) == 1, "the request itself is not sent again"
            await CALLS[method](kube)

    in_a_pod(certificate, monkeypatch, work)


@pytest.mark.parametrize(
    "content", [None, "", "two\nlines", "\udcff"], ids=["gone", "empty", "lines", "no UTF-8"]
)
def test_a_token_file_that_cannot_be_used_is_an_error_until_it_can(
    content: str | None, account: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(server: Server, kube: Kube) -> None:
        await kube.get(JOB, "a", "b")
        if content is None:
            (account / "token").unlink()
        else:
            (account / "token").write_bytes(content.encode(errors="surrogateescape"))
        move_clock(monkeypatch, datetime.timedelta(minutes=2))
        for call in CALLS.values():
            with pytest.raises(KubeError, match=r"jobs|distillruns"):
                await call(kube)
        assert len(server.requests) == 1
        rotate(account, "second")
        move_clock(monkeypatch, datetime.timedelta(minutes=4))
        await kube.get(JOB, "a", "b")
        assert server.tokens()[1:] == ["bearer second"]

    in_a_pod(certificate, monkeypatch, work)


def test_credentials_that_stay_refused_are_a_401_each_time(
    account: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(server: Server, kube: Kube) -> None:
        server.handler = accepts()
        results = await asyncio.gather(*(kube.get(JOB, "a", "b") for _ in range(20)), return_exceptions=True)
        assert [found.code for found in results if isinstance(found, KubeError)] == [401] * 20
        (account / "token").unlink()
        with pytest.raises(KubeError, match="Unauthorized"):
            await kube.get(JOB, "a", "b")

    in_a_pod(certificate, monkeypatch, work)


def test_a_server_with_another_authority_gets_no_token(
    account: Path, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    certificates.authority(tmp_path / "other", "another")
    shutil.copy(tmp_path / "other" / "ca.crt", account / "ca.crt")

    async def work(server: Server, kube: Kube) -> None:
        for call in CALLS.values():
            with pytest.raises(KubeError, match=r"(?i:certificate)"):
                await call(kube)
        assert server.requests == []

    in_a_pod(certificate, monkeypatch, work)


@pytest.mark.parametrize(
    "missing", ["ca.crt", "KUBERNETES_SERVICE_HOST", "content of ca.crt", "content of token"]
)
def test_an_incomplete_service_account_is_named(
    missing: str, account: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "1")
    if missing.startswith("KUBE"):
        monkeypatch.delenv(missing)
    elif missing.startswith("content"):
        (account / missing.removeprefix("content of ")).write_text("")
    else:
        (account / missing).unlink()
    with pytest.raises(KubeError, match="cannot connect to the API server: the pod's service account: "):
        Kube.connect()


def test_an_authority_that_is_no_certificate_is_named(account: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "1")
    (account / "ca.crt").write_text("no certificate")
    with pytest.raises(KubeError, match="cannot connect to the API server: certificates"):
        Kube.connect()


# Kubeconfig.


def kubeconfig(folder: Path, server: str, user: dict[str, Any] | None, **cluster: Any) -> Path:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "it",
        "clusters": [{"name": "it", "cluster": {"server": server, **cluster}}],
        "users": [{"name": "it", "user": user}] if user is not None else [],
        "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
    }
    file = folder / "kubeconfig"
    file.write_text(yaml.safe_dump(config))
    return file


PLUGIN = """#!/bin/sh
test "$WHERE" = here && test "$1" = get-token || exit 1
echo run >>{folder}/runs
cat {folder}/credentials
"""


def plugin(folder: Path, **status: str) -> dict[str, Any]:
    """An exec plugin that prints these credentials."""
    script = folder / "plugin"
    script.write_text(PLUGIN.format(folder=folder))
    script.chmod(0o755)
    version = "client.authentication.k8s.io/v1"
    credential = {"apiVersion": version, "kind": "ExecCredential", "status": status}
    (folder / "credentials").write_text(json.dumps(credential))
    environment = [{"name": "WHERE", "value": "here"}]
    return {
        "exec": {"apiVersion": version, "command": str(script), "args": ["get-token"], "env": environment}
    }


USERS: dict[str, tuple[Callable[[Path], dict[str, Any] | None], str]] = {
    "nobody": (lambda folder: None, ""),
    "token": (lambda folder: {"token": "one"}, "Bearer one"),
    "tokenFile": (lambda folder: {"tokenFile": "token"}, "Bearer from-file"),
    "password": (lambda folder: {"username": "me", "password": "pass"}, "Basic bWU6cGFzcw=="),
    "exec": (lambda folder: plugin(folder, token="plugged"), "Bearer plugged"),
}


@pytest.mark.parametrize("user", USERS)
def test_every_kind_of_user_of_a_kubeconfig(
    user: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("from-file\n")

    async def work() -> None:
        async with Server() as server:
            make, expected = USERS[user]
            monkeypatch.setenv("KUBECONFIG", str(kubeconfig(tmp_path, server.url, make(tmp_path))))
            kube = await asyncio.to_thread(Kube.connect)
            await kube.get(JOB, "a", "b")
            await kube.close()
            assert server.tokens() == [expected]

    asyncio.run(work())


@pytest.mark.parametrize("user", ["tokenFile", "exec"])
def test_credentials_of_a_kubeconfig_are_loaded_again_when_they_are_refused(
    user: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the first of the requests that are refused at once, and not for another server."""

    async def work() -> None:
        async with Server(accepts("first")) as server, Server() as elsewhere:
            (tmp_path / "token").write_text("first")
            found = {"tokenFile": "token"} if user == "tokenFile" else plugin(tmp_path, token="first")
            monkeypatch.setenv("KUBECONFIG", str(kubeconfig(tmp_path, server.url, found)))
            kube = await asyncio.to_thread(Kube.connect)
            await kube.get(JOB, "a", "b")
            server.handler = accepts("second")
            (tmp_path / "token").write_text("second")
            plugin(tmp_path, token="second")
            refused = await asyncio.gather(
                *(kube.get(JOB, "a", "b") for _ in range(5)), return_exceptions=True
            )
            assert {found.code for found in refused if isinstance(found, KubeError)} == {401}
            await kube.get(JOB, "a", "b")
            if user == "exec":
                assert (tmp_path / "runs").read_text().split() == ["run", "run"]
            kubeconfig(tmp_path, elsewhere.url, {"token": "of another cluster"})
            server.handler = accepts()
            for _ in range(2):
                with pytest.raises(KubeError, match="Unauthorized"):
                    await kube.get(JOB, "a", "b")
            assert elsewhere.requests == []
            assert "Bearer of another cluster" not in server.tokens()
            await kube.close()

    asyncio.run(work())


@pytest.mark.parametrize("embedded", [False, True])
def test_a_client_certificate_of_a_kubeconfig(
    embedded: bool, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def file(name: str) -> dict[str, str]:
        if not embedded:
            return {keys[name]: str(certificate / name)}
        return {f"{keys[name]}-data": base64.b64encode((certificate / name).read_bytes()).decode()}

    keys = {"ca.crt": "certificate-authority", "user.crt": "client-certificate", "user.key": "client-key"}

    async def work() -> None:
        async with Server(context=server_context(certificate, asks=True)) as server:
            user = {**file("user.crt"), **file("user.key")}
            monkeypatch.setenv("KUBECONFIG", str(kubeconfig(tmp_path, server.url, user, **file("ca.crt"))))
            kube = await asyncio.to_thread(Kube.connect)
            await kube.get(JOB, "a", "b")
            await kube.close()

    asyncio.run(work())


def context(server: str, user: str) -> str:
    return (
        f"current-context: it\nclusters: [{{name: c, cluster: {{{server}}}}}]\nusers: [{user}]\n"
        f"contexts: [{{name: it, context: {{cluster: c{', user: u' if user else ''}}}}}]\n"
    )


SERVER, TOKEN = "server: 'https://a'", "{name: u, user: {token: t}}"
BROKEN: dict[str, str] = {
    "no YAML": "a: [",
    "an empty file": "",
    "a list": "[]",
    "no current context": "clusters: []\ncontexts: []\nusers: []",
    "an unknown context": "current-context: it\nclusters: []\ncontexts: []\nusers: []",
    "no server": context("", TOKEN),
    "an empty server": context("server: ''", TOKEN),
    "no user for https": context(SERVER, ""),
    "a certificate that is missing": context(SERVER, "{name: u, user: {client-certificate: none.crt}}"),
    "an authority that is not base64": context(f"{SERVER}, certificate-authority-data: a", TOKEN),
}


@pytest.mark.parametrize("content", BROKEN)
def test_a_kubeconfig_that_cannot_be_used_is_named(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "kubeconfig"
    file.write_text(BROKEN[content])
    monkeypatch.setenv("KUBECONFIG", str(file))
    with pytest.raises(KubeError, match=f"cannot connect to the API server: .*{file}"):
        Kube.connect()


def test_without_any_configuration_the_error_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    with pytest.raises(KubeError, match=r"neither a service account nor a kubeconfig at .*: set KUBECONFIG"):
        Kube.connect()
    monkeypatch.setenv("KUBECONFIG", f"{tmp_path}/a:{tmp_path}/b")
    with pytest.raises(KubeError, match="set KUBECONFIG"):
        Kube.connect()


# Proxies, and other settings of the environment.


class Proxy:
    """Keeps the first line of every request, and refuses it."""

    async def __aenter__(self) -> "Proxy":
        self.lines: list[str] = []
        self._server = await asyncio.start_server(self._refuse, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()

    async def _refuse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.lines.append((await reader.readuntil(b"\r\n\r\n")).decode().splitlines()[0])
        writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()


@pytest.mark.parametrize(
    ("server", "environment", "line"),
    [
        ("https://api.example:6443", {"HTTPS_PROXY": "proxy"}, "CONNECT api.example:6443 HTTP/1.1"),
        ("https://api.example:6443", {"https_proxy": "proxy"}, "CONNECT api.example:6443 HTTP/1.1"),
        ("http://api.example", {"HTTP_PROXY": "proxy"}, f"GET http://api.example{PATH} HTTP/1.1"),
        ("https://b.example", {"HTTPS_PROXY": "proxy", "NO_PROXY": "b"}, "CONNECT b.example:443 HTTP/1.1"),
        ("https://127.0.0.1:1", {"HTTPS_PROXY": "proxy", "NO_PROXY": "other,127.0.0.1"}, ""),
        ("https://127.0.0.1:1", {"HTTPS_PROXY": "proxy", "NO_PROXY": "127.0.0.1:1"}, ""),
        ("https://127.0.0.1:1", {"HTTP_PROXY": "proxy"}, ""),
    ],
)  # fmt: skip
def test_the_proxy_of_the_environment_is_used(
    server: str, environment: dict[str, str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with Proxy() as proxy:
            for name, value in environment.items():
                monkeypatch.setenv(name, proxy.url if value == "proxy" else value)
            kube = Kube(Connection(Configuration(host=server)))
            with pytest.raises(KubeError):
                await kube.get(JOB, "a", "b")
            await kube.close()
            assert proxy.lines == ([line] if line else [])

    asyncio.run(work())


def test_a_kubeconfigs_own_proxy_comes_before_that_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with Proxy() as own, Proxy() as other:
            monkeypatch.setenv("HTTPS_PROXY", other.url)
            file = kubeconfig(tmp_path, "https://api.example", {"token": "t"}, **{"proxy-url": own.url})
            monkeypatch.setenv("KUBECONFIG", str(file))
            kube = await asyncio.to_thread(Kube.connect)
            with pytest.raises(KubeError):
                await kube.get(JOB, "a", "b")
            await kube.close()
            assert (own.lines, other.lines) == (["CONNECT api.example:443 HTTP/1.1"], [])

    asyncio.run(work())


def test_a_netrc_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("default login me password pass\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))

    async def work() -> None:
        async with Server() as server:
            found = Configuration(host=server.url, api_key={"BearerToken": "Bearer ours"})
            kube = Kube(Connection(found))
            await kube.get(JOB, "a", "b")
            await kube.close()
            assert server.tokens() == ["Bearer ours"]

    asyncio.run(work())


# The process.


def test_nothing_is_left_open_at_the_end(certificate: Path, tmp_path: Path) -> None:
    """Python's development mode tells of open connections, files and tasks."""
    code = """
        import asyncio, contextlib, warnings
        from pathlib import Path
        from distill_operator.kube import JOB, Kube, KubeError
        from tests.unit.operator.test_connection import Server, kubeconfig, never, server_context

        async def work(certificate, folder):
            asyncio.get_running_loop().slow_callback_duration = 60  # the machine may be busy
            async with Server(context=server_context(certificate)) as server:
                user, ca = {"token": "t"}, {"certificate-authority": str(certificate / "ca.crt")}
                kubeconfig(folder, server.url, user, **ca)
                kube = await asyncio.to_thread(Kube.connect)
                await asyncio.gather(*(kube.get(JOB, "a", "b") for _ in range(5)))
                server.handler = never
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.5):
                        await kube.get(JOB, "a", "b")
                unused = await asyncio.to_thread(Kube.connect)
                await unused.close()
                await kube.close()
                await kube.close()

        asyncio.run(work(Path({certificate!r}), Path({folder!r})))
        print("ended")
    """
    script = textwrap.dedent(code).replace("{certificate!r}", repr(str(certificate)))
    script = script.replace("{folder!r}", repr(str(tmp_path)))
    environment = {
        "PYTHONPATH": ".:operator",
        "KUBECONFIG": str(tmp_path / "kubeconfig"),
        "PATH": "/usr/bin:/bin",
    }
    command = [sys.executable, "-X", "dev", "-W", "error::ResourceWarning", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.stdout, done.stderr, done.returncode) == ("ended\n", "", 0)


def test_the_operator_starts_as_a_user_without_an_entry_in_passwd() -> None:
    """As in its pod. The client needs a home when it is imported; the chart gives it one."""
    code = "import pwd\n\ndef unknown(uid): raise KeyError(uid)\npwd.getpwuid = unknown\n"
    command = [sys.executable, "-c", code + "import distill_operator.__main__, distill_operator.crd"]
    (deployment,) = Path("charts").glob("*/templates/deployment.yaml")
    assert deployment.read_text().count("{name: HOME, value: /tmp}") == 2
    subprocess.run(command, check=True, env={"PYTHONPATH": ".:operator", "HOME": "/tmp"})


def test_the_operator_loads_no_generated_class_of_the_client() -> None:
    """They are thousands. Each that is loaded costs memory."""
    code = "import json, sys, distill_operator.__main__\nprint(json.dumps([*sys.modules]))"
    environment = {"PYTHONPATH": ".:operator"}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
    )
    loaded = json.loads(done.stdout)
    assert "kubernetes.aio.client.rest" in loaded
    generated = ("kubernetes.aio.client.models.", "kubernetes.aio.client.api.", "kubernetes.client.api.")
    assert [name for name in loaded if name.startswith(generated)] == []
