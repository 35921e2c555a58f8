"""A small API server that lists and watches DistillRuns, Jobs and PyTorchJobs, and misbehaves on request.

Only for ends of watches: tests/cluster has a real API server. A real one does not break a stream on request.
"""

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from aiohttp import web
from distill_operator.kube import CRD, DISTILLRUN, JOB, PYTORCHJOB, Kind

from vpmoe.api import labels

Fault = Literal[
    "list 401", "list 403", "list 404", "list 429", "list 500", "list cut", "list not JSON", "list silent",
    "watch 401", "watch 403", "watch 404", "watch 410", "watch 429", "watch 500", "watch never answered",
    "watch silent", "watch closed at once", "watch cut", "watch not JSON",
    "watch ERROR 410", "watch ERROR 500", "watch ERROR 403",
]  # fmt: skip
FAULTS: tuple[Fault, ...] = get_args(Fault)


@dataclass
class WatchServer:
    """Objects are added with `add`.

    `fault` returns what is wrong with requests for the plural and namespace; it is asked once a request. To
    break a list, it also makes the watches before it expire.
    """

    fault: Callable[[str, str], Fault | None] = lambda plural, namespace: None
    kinds: list[Kind] = field(default_factory=lambda: [DISTILLRUN, JOB, PYTORCHJOB])
    objects: list[dict[str, Any]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    """Paths, with "watch " before that of a watch."""
    url: str = ""

    async def __aenter__(self) -> "WatchServer":
        self._changed, self._over = asyncio.Event(), asyncio.Event()
        app = web.Application()
        app.router.add_get("/{path:.*}", self._respond)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *error: object) -> None:
        self._over.set()
        await self._runner.cleanup()

    def add(self, kind: Kind, namespace: str, run: str, **fields: Any) -> None:
        """Add a run of that name, or a child of it, with these fields beside metadata."""
        number = len(self.objects) + 1
        meta = {
            "namespace": namespace,
            "name": run if kind == DISTILLRUN else f"{run}-{number}",
            "uid": str(number),
            "resourceVersion": str(number),
            "labels": {} if kind == DISTILLRUN else {labels.RUN: run},
        }
        self.objects.append({"apiVersion": kind.api_version, "kind": kind.name, "metadata": meta, **fields})
        self._changed.set()
        self._changed = asyncio.Event()

    async def _respond(self, request: web.Request) -> web.StreamResponse:
        discovered = self._discover(request.path)
        if discovered is not None:
            return web.json_response(discovered)
        kind = next((kind for kind in self.kinds if request.path.endswith(f"/{kind.plural}")), None)
        if kind is None:
            return status(404)
        namespace = request.path.partition("/namespaces/")[2].partition("/")[0]
        watching = "watch" in request.query
        self.requests.append(("watch " if watching else "") + request.path)
        fault = self.fault(kind.plural, namespace) or ""
        if fault.startswith("list") and watching:
            fault = "watch ERROR 410"
        elif fault.startswith("watch") and not watching:
            fault = ""
        if fault[-3:].isdigit() and "ERROR" not in fault:
            return status(int(fault[-3:]))
        respond = self._watch if watching else self._list
        return await respond(request, kind, namespace, fault)

    def _discover(self, path: str) -> dict[str, Any] | None:
        """The response to a request for the API's groups and resources."""
        kinds = [*self.kinds, CRD]
        if path in ("/api", "/api/v1"):
            namespaces = {"name": "namespaces", "kind": "Namespace", "singularName": "", "namespaced": False}
            return {"versions": ["v1"], "resources": [namespaces | {"verbs": ["list", "watch"]}]}
        if path == "/apis":
            return {
                "groups": [
                    {
                        "name": kind.group,
                        "versions": [{"version": kind.version}],
                        "preferredVersion": {"version": kind.version},
                    }
                    for kind in kinds
                ]
            }
        resources = [
            {
                "name": kind.plural,
                "kind": kind.name,
                "singularName": "",
                "namespaced": kind.namespaced,
                "verbs": ["list", "watch"],
            }
            for kind in kinds
            if path == f"/apis/{kind.api_version}"
        ]
        return {"resources": resources} if resources else None

    def _matching(self, kind: Kind, namespace: str, since: int) -> Iterator[dict[str, Any]]:
        for obj in self.objects[since:]:
            if obj["kind"] == kind.name and namespace in ("", obj["metadata"]["namespace"]):
                yield obj

    async def _list(self, request: web.Request, kind: Kind, namespace: str, fault: str) -> web.StreamResponse:
        items = list(self._matching(kind, namespace, 0))
        meta = {"resourceVersion": str(len(self.objects))}
        body = json.dumps({"kind": f"{kind.name}List", "metadata": meta, "items": items}).encode()
        if fault == "list not JSON":
            return web.Response(body=body[:-5], content_type="application/json")
        if fault not in ("list silent", "list cut"):
            return web.Response(body=body, content_type="application/json")
        response = web.StreamResponse(
            headers={"Content-Type": "application/json", "Content-Length": str(len(body))}
        )
        await response.prepare(request)
        await response.write(body[:-5])
        await self._break_off(request, fault == "list silent")
        return response

    async def _watch(
        self, request: web.Request, kind: Kind, namespace: str, fault: str
    ) -> web.StreamResponse:
        if fault == "watch never answered":
            await self._over.wait()
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        if "ERROR" in fault:
            code = int(fault[-3:])
            error = {"type": "ERROR", "object": {"kind": "Status", "code": code, "message": "broken"}}
            await response.write(json.dumps(error).encode() + b"\n")
        elif fault == "watch not JSON":
            await response.write(b'{"type": "ADDED", "object": \n')
        elif fault in ("watch silent", "watch cut"):
            await response.write(b'{"type": "ADDED", ')
            await self._break_off(request, fault == "watch silent")
        elif not fault:
            end = asyncio.get_running_loop().time() + float(request.query["timeoutSeconds"])
            await self._stream(response, kind, namespace, int(request.query["resourceVersion"]), end)
        return response

    async def _stream(
        self, response: web.StreamResponse, kind: Kind, namespace: str, since: int, end: float
    ) -> None:
        """Send events until the watch's time is over."""
        while True:
            changed = self._changed
            for obj in self._matching(kind, namespace, since):
                await response.write(json.dumps({"type": "ADDED", "object": obj}).encode() + b"\n")
            since = len(self.objects)
            try:
                async with asyncio.timeout_at(end):
                    await changed.wait()
            except TimeoutError:
                return

    async def _break_off(self, request: web.Request, silently: bool) -> None:
        """Send nothing more; with `silently` without closing the connection."""
        if silently:
            await self._over.wait()
        if request.transport is not None:
            request.transport.abort()


def status(code: int) -> web.Response:
    """An error as the API server returns it."""
    return web.json_response(
        {"kind": "Status", "code": code, "message": "broken", "details": {}}, status=code
    )
