"""Client of a real API server, for hollow nodes, the operator's chaos and its benchmark: requests, lists and
watches of plain JSON, as the user of a kubeconfig.
"""

import asyncio
import base64
import contextlib
import json
import random
import ssl
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import aiohttp
import yaml

Json = dict[str, Any]

WATCH_SECONDS = 300
REQUESTS = 64
"""Requests in flight."""
BUFFER_BYTES = 2**24
"""Of a watch: its lines are whole objects."""


class ApiServer:
    """Requests to the API server of a kubeconfig. Belongs to one event loop.

    `session` is for what `call` and `list_and_watch` do not do; answers are not compressed.
    """

    def __init__(self, kubeconfig: Path) -> None:
        config = yaml.safe_load(kubeconfig.read_text())
        contexts = {one["name"]: one["context"] for one in config["contexts"]}
        context = contexts[config["current-context"]]
        cluster = next(one["cluster"] for one in config["clusters"] if one["name"] == context["cluster"])
        user = next(one["user"] for one in config["users"] if one["name"] == context["user"])
        self.url = cluster["server"]
        headers = {"Authorization": f"Bearer {user['token']}"} if "token" in user else {}
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=_tls(cluster, user)),
            headers={**headers, "Accept-Encoding": "identity"},  # a copy on loopback costs less than gzip
            auto_decompress=False,
            read_bufsize=BUFFER_BYTES,
            max_line_size=2**16,
        )
        self._slots = asyncio.Semaphore(REQUESTS)
        self._watches: set[aiohttp.ClientResponse] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def cut_watches(self) -> None:
        """End the connections of all watches. Those that were cut list again."""
        for answer in self._watches:
            answer.close()

    async def close(self) -> None:
        await self.session.close()

    async def call(
        self,
        method: str,
        path: str,
        body: Json | None = None,
        content_type: str = "application/json",
        **query: str,
    ) -> tuple[int, Json]:
        """One request. Returns its status code and JSON. Raises aiohttp.ClientError or TimeoutError."""
        async with (
            self._slots,
            self.session.request(
                method,
                self.url + path,
                params=query,
                data=None if body is None else json.dumps(body),
                headers={"Content-Type": content_type} if body is not None else None,
                timeout=aiohttp.ClientTimeout(60),
            ) as answer,
        ):
            return answer.status, await answer.json()

    async def list_and_watch(
        self,
        path: str,
        replace_all: Callable[[list[Json]], None],
        change: Callable[[str, Json], None],
        **query: str,
    ) -> None:
        """List the objects, then watch them, and again when the watch ends for good. Never returns."""
        version = ""
        while True:
            try:
                if not version:
                    code, listed = await self.call("GET", path, **query)
                    if code != 200:
                        raise aiohttp.ClientError(f"{path}: {code} {listed.get('message', '')}")
                    replace_all(listed["items"])
                    version = listed["metadata"]["resourceVersion"]
                version = await self._watch(path, version, change, **query)
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
                await asyncio.sleep(random.uniform(0.2, 1.0))

    async def _watch(self, path: str, version: str, change: Callable[[str, Json], None], **query: str) -> str:
        """Watch until the connection ends. Returns the version to go on from; empty to list again."""
        options = {"watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": str(WATCH_SECONDS)}
        async with self.session.get(
            self.url + path,
            params={**query, **options, "resourceVersion": version},
            timeout=aiohttp.ClientTimeout(total=None, sock_read=WATCH_SECONDS),
        ) as answer:
            if answer.status != 200:
                return ""
            self._watches.add(answer)
            try:
                async for line in answer.content:
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        return ""
                    version = event["object"]["metadata"]["resourceVersion"]
                    if event["type"] != "BOOKMARK":
                        change(event["type"], event["object"])
            except (aiohttp.ClientError, TimeoutError):
                return ""
            finally:
                self._watches.discard(answer)
        return version


def _tls(cluster: Json, user: Json) -> ssl.SSLContext | bool:
    """TLS as a kubeconfig describes it, with files or with their content."""
    if not cluster["server"].startswith("https:"):
        return False
    with contextlib.ExitStack() as stack:

        def file(source: Json, name: str) -> str | None:
            if f"{name}-data" in source:
                temporary = stack.enter_context(tempfile.NamedTemporaryFile())
                temporary.write(base64.b64decode(source[f"{name}-data"]))
                temporary.flush()
                return temporary.name
            return source.get(name)

        context = ssl.create_default_context(cafile=file(cluster, "certificate-authority"))
        if certificate := file(user, "client-certificate"):
            context.load_cert_chain(certificate, file(user, "client-key"))
        return context
