"""An HTTP proxy in front of the API server, and the operator as a local process that uses it.

Tests see and interrupt its requests.

The proxy adds the token of the chart's service account, so the operator has exactly the permissions of an
installed one.
"""

import asyncio
import base64
import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import aiohttp
import yaml
from aiohttp import web

from devcluster import install
from devcluster.access import Cluster
from tests.fakes import run_harness
from vpmoe.process.launcher import free_port

WRITES = ("POST", "PUT", "PATCH", "DELETE")
HOP_BY_HOP = {
    "transfer-encoding",
    "connection",
    "content-length",
    "content-encoding",
    "host",
    "authorization",
}
SETTINGS = {
    "images": {"trainer": run_harness.IMAGE, "inference": run_harness.IMAGE},
    "resyncSeconds": 1,
    "pollSeconds": 1,
    "backoff": {"baseSeconds": 0.5, "limitSeconds": 5},
}


WatchFault = Literal["404", "410", "ERROR 410", "ERROR 500", "silent", "cut"]
"""How a watch breaks: an error instead of a stream, an ERROR in the stream, no more data, a lost connection.
Streams that have begun break too."""


@dataclass
class ApiProxy:
    """Forwards requests.

    `after_write` is called after a write has succeeded and before it is answered; `rewrite_path` changes
    paths; `watch_fault` returns what is wrong with watches of a path.
    """

    cluster: Cluster
    after_write: Callable[[str, str], None] = lambda method, path: None
    rewrite_path: Callable[[str], str] = lambda path: path
    watch_fault: "Callable[[str], WatchFault | None]" = lambda path: None
    writes: list[tuple[str, str]] = field(default_factory=list)
    """Writes that have succeeded."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """All requests, before they are forwarded."""
    url: str = ""

    def __enter__(self) -> Self:
        config = yaml.safe_load(self.cluster.kubeconfig.read_text())["clusters"][0]["cluster"]
        self._server = config["server"]
        authority = base64.b64decode(config["certificate-authority-data"]).decode()
        self._tls = ssl.create_default_context(cadata=authority)
        token = self.cluster.kubectl(
            "create", "token", "distill-operator", "--namespace", install.NAMESPACE, "--duration=1h"
        )
        self._headers = {"Authorization": f"Bearer {token.strip()}"}
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        threading.Thread(target=self._serve, args=(started,), daemon=True).start()
        started.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _serve(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._listen())
        started.set()
        self._loop.run_forever()

    async def _listen(self) -> None:
        self._over = asyncio.Event()
        self._session = aiohttp.ClientSession(auto_decompress=False)
        app = web.Application(client_max_size=2**24)
        app.router.add_route("*", "/{path:.*}", self._pass)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1, handler_cancellation=True)
        await self._runner.setup()
        listener = socket.create_server(("127.0.0.1", 0))
        await web.SockSite(self._runner, listener).start()
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"

    async def _end(self) -> None:
        self._over.set()
        await self._runner.cleanup()
        await self._session.close()

    async def _pass(self, request: web.Request) -> web.StreamResponse:
        path = self.rewrite_path(request.path)
        headers = {
            name: value for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP
        } | self._headers
        url = f"{self._server}{path}" + (f"?{request.query_string}" if request.query_string else "")
        body = await request.read()
        self.requests.append((request.method, path))
        watches = "watch" in request.query
        fault = self.watch_fault(path) if watches else None
        if fault in ("404", "410"):
            return web.json_response(error_status(int(fault)), status=int(fault))
        async with self._session.request(
            request.method, url, data=body or None, headers=headers, ssl=self._tls
        ) as answer:
            if request.method in WRITES:
                content = await answer.read()
                if answer.status < 300:
                    self.writes.append((request.method, path))
                    self.after_write(request.method, path)
                return web.Response(status=answer.status, body=content, content_type=answer.content_type)
            response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.content_type})
            with contextlib.suppress(ConnectionResetError):  # the client is dead
                await response.prepare(request)
                breaking = asyncio.create_task(self._wait_for_fault(path)) if watches else None
                try:
                    await self._forward(request, answer, response, breaking)
                finally:
                    if breaking is not None:
                        breaking.cancel()
            return response

    async def _forward(
        self,
        request: web.Request,
        answer: aiohttp.ClientResponse,
        response: web.StreamResponse,
        breaking: asyncio.Task[WatchFault] | None,
    ) -> None:
        """Forward the body, until `breaking` returns what is wrong with it."""
        while True:
            reading = asyncio.ensure_future(answer.content.readany())
            try:
                await asyncio.wait(
                    {reading, *([breaking] if breaking else [])}, return_when="FIRST_COMPLETED"
                )
                if breaking is None or not breaking.done():
                    chunk = reading.result()
                    if not chunk:
                        return
                    await response.write(chunk)
                    continue
            finally:
                reading.cancel()
                with contextlib.suppress(asyncio.CancelledError, aiohttp.ClientError):
                    await reading
            fault = breaking.result()
            if fault == "silent":
                await self._over.wait()
            elif fault.startswith("ERROR"):
                event = {"type": "ERROR", "object": error_status(int(fault[-3:]))}
                await response.write(json.dumps(event).encode() + b"\n")
            elif request.transport is not None:
                request.transport.abort()
            return

    async def _wait_for_fault(self, path: str) -> WatchFault:
        """Poll until a watch of the path is to break."""
        while (fault := self.watch_fault(path)) is None:
            await asyncio.sleep(0.1)
        return fault


@dataclass
class OperatorProcess:
    """The operator as a process of this machine that talks to the API server through a proxy."""

    proxy: ApiProxy
    folder: Path
    namespace: str
    identity: str = "one"
    lease_seconds: int = 60
    port: int = field(default_factory=free_port)
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings that differ from SETTINGS."""

    def start(self) -> None:
        """Start the process. Does not wait."""
        kubeconfig = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "proxy",
            "clusters": [{"name": "proxy", "cluster": {"server": self.proxy.url}}],
            "users": [{"name": "proxy", "user": {"token": "the proxy has the real one"}}],
            "contexts": [{"name": "proxy", "context": {"cluster": "proxy", "user": "proxy"}}],
        }
        (self.folder / f"{self.identity}-kubeconfig").write_text(json.dumps(kubeconfig))
        lease = {"name": "distill-operator", "seconds": self.lease_seconds}
        own = {"watchNamespaces": [self.namespace], "port": self.port, "lease": lease}
        settings = {**SETTINGS, **own, **self.settings}
        (self.folder / f"{self.identity}.yaml").write_text(yaml.safe_dump(settings))
        command = [
            "--config",
            str(self.folder / f"{self.identity}.yaml"),
            "--namespace",
            install.NAMESPACE,
            "--identity",
            self.identity,
        ]
        environment = {
            **os.environ,
            "PYTHONPATH": ".:operator",
            "KUBECONFIG": str(self.folder / f"{self.identity}-kubeconfig"),
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "distill_operator", *command],
                cwd=run_harness.ROOT,
                env=environment,
                stdout=log,
                stderr=log,
            )

    @property
    def log(self) -> Path:
        return self.folder / f"{self.identity}.log"

    def kill(self) -> None:
        """SIGKILL."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def freeze(self) -> None:
        """SIGSTOP."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> int:
        """SIGTERM. Returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=30)

    def leads(self) -> bool:
        return f"{self.identity} holds lease" in self.log.read_text()


def error_status(code: int) -> dict[str, Any]:
    """An error as the API server returns it."""
    return {
        "apiVersion": "v1",
        "kind": "Status",
        "status": "Failure",
        "code": code,
        "reason": {404: "NotFound", 410: "Expired"}.get(code, "InternalError"),
        "message": "broken by the proxy",
    }


def created_kinds(writes: list[tuple[str, str]]) -> list[str]:
    """Kinds of the children that were created, in order."""
    return [
        path.rsplit("/", 1)[-1]
        for method, path in writes
        if method == "POST" and path.endswith(("/jobs", "/pytorchjobs"))
    ]
