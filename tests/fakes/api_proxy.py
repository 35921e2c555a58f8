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
from typing import Self

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
    "gitSha": "f" * 40,
    "images": {"trainer": run_harness.IMAGE, "inference": run_harness.IMAGE},
    "resyncSeconds": 1,
    "backoff": {"baseSeconds": 0.5, "limitSeconds": 5},
}


@dataclass
class ApiProxy:
    """Forwards requests.

    `after_write` is called after a write has succeeded and before it is answered; `rewrite_path` changes
    paths.
    """

    cluster: Cluster
    after_write: Callable[[str, str], None] = lambda method, path: None
    rewrite_path: Callable[[str], str] = lambda path: path
    writes: list[tuple[str, str]] = field(default_factory=list)
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
        self._session = aiohttp.ClientSession(auto_decompress=False)
        app = web.Application(client_max_size=2**24)
        app.router.add_route("*", "/{path:.*}", self._pass)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await self._runner.setup()
        listener = socket.create_server(("127.0.0.1", 0))
        await web.SockSite(self._runner, listener).start()
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"

    async def _end(self) -> None:
        await self._runner.cleanup()
        await self._session.close()

    async def _pass(self, request: web.Request) -> web.StreamResponse:
        path = self.rewrite_path(request.path)
        headers = {
            name: value for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP
        } | self._headers
        url = f"{self._server}{path}" + (f"?{request.query_string}" if request.query_string else "")
        body = await request.read()
        async with self._session.request(
            request.method, url, data=body, headers=headers, ssl=self._tls
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
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
            return response


@dataclass
class OperatorProcess:
    """The operator as a process of this machine that talks to the API server through a proxy."""

    proxy: ApiProxy
    folder: Path
    namespace: str
    identity: str = "one"
    lease_seconds: int = 60
    port: int = field(default_factory=free_port)

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
        (self.folder / "kubeconfig").write_text(json.dumps(kubeconfig))
        lease = {"name": "distill-operator", "seconds": self.lease_seconds}
        settings = {**SETTINGS, "watchNamespaces": [self.namespace], "port": self.port, "lease": lease}
        (self.folder / "operator.yaml").write_text(yaml.safe_dump(settings))
        command = [
            "--config",
            str(self.folder / "operator.yaml"),
            "--namespace",
            install.NAMESPACE,
            "--identity",
            self.identity,
        ]
        environment = {
            **os.environ,
            "PYTHONPATH": ".:operator",
            "KUBECONFIG": str(self.folder / "kubeconfig"),
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

    def stop(self) -> int:
        """SIGTERM. Returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=30)

    def leads(self) -> bool:
        return f"{self.identity} holds lease" in self.log.read_text()


def created_kinds(writes: list[tuple[str, str]]) -> list[str]:
    """Kinds of the children that were created, in order."""
    return [
        path.rsplit("/", 1)[-1]
        for method, path in writes
        if method == "POST" and path.endswith(("/jobs", "/pytorchjobs"))
    ]
