"""Records what happens to a namespace's objects: every change, in the order in which the API server made
them.

The recorder watches the API server directly, from one resourceVersion on. Changes of all kinds have numbers
from one sequence, etcd's revisions, so what is true at the same time needs no clock.
"""

import asyncio
import contextlib
import json
import time
import urllib.parse
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp
from distill_operator.kube import DISTILLRUN, EVENT, JOB, LEASE, POD, Kind

from tests.fakes.api_server import ApiServer

Json = dict[str, Any]
KINDS = (DISTILLRUN, JOB, POD, EVENT, LEASE)


@dataclass(frozen=True)
class Change:
    """One change of one object."""

    version: int
    """etcd's revision: its order among all changes."""
    type: Literal["ADDED", "MODIFIED", "DELETED"]
    kind: str
    obj: Json
    """As it was after the change, or last before it was deleted."""
    seen: float = 0.0
    """Monotonic seconds when the recorder saw it."""

    @property
    def name(self) -> str:
        return str(self.obj["metadata"]["name"])

    @property
    def uid(self) -> str:
        return str(self.obj["metadata"]["uid"])


class Recorder:
    """Records the changes in a namespace: `async with Recorder(api, namespace):`.

    At the end it waits until every change has arrived. Raises RuntimeError if one may be missing.
    """

    def __init__(self, api: ApiServer, namespace: str) -> None:
        self._api, self._namespace = api, namespace
        self._changes: list[Change] = []
        self._latest: dict[str, dict[str, Json]] = {kind.name: {} for kind in KINDS}
        self._tasks: list[asyncio.Task[None]] = []

    def changes(self) -> list[Change]:
        """All changes so far, in order."""
        return sorted(self._changes, key=lambda change: change.version)

    def objects(self, kind: Kind) -> Iterable[Json]:
        """The objects of a kind that exist, as recorded last."""
        return self._latest[kind.name].values()

    def object(self, kind: Kind, name: str) -> Json | None:
        """An object, as recorded last; None if there is none."""
        return self._latest[kind.name].get(name)

    async def __aenter__(self) -> "Recorder":
        for kind in KINDS:
            _, listed = await self._api.call("GET", kind.path(self._namespace) + "?limit=1")
            if listed["items"]:
                raise RuntimeError(f"namespace {self._namespace} has {kind.plural} already")
            version = listed["metadata"]["resourceVersion"]
            self._tasks.append(asyncio.create_task(self._record(kind, version), name=f"record {kind.plural}"))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def check(self) -> None:
        """Raise RuntimeError if a watch has ended."""
        for task in self._tasks:
            if task.done():
                raise RuntimeError(f"{task.get_name()} has ended: {task.exception()}")

    async def catch_up(self) -> None:
        """Wait until the objects that exist are those that are recorded. They must come to rest."""
        for kind in KINDS:
            while await self._is_behind(kind):
                self.check()
                await asyncio.sleep(0.2)

    async def _is_behind(self, kind: Kind) -> bool:
        _, listed = await self._api.call("GET", kind.path(self._namespace))
        return _versions(listed["items"]) != _versions(self.objects(kind))

    async def _record(self, kind: Kind, version: str) -> None:
        query = urllib.parse.urlencode(
            {"watch": "true", "resourceVersion": version, "timeoutSeconds": "3000"}
        )
        url = f"{self._api.url}{kind.path(self._namespace)}?{query}"
        timeout = aiohttp.ClientTimeout(total=None)
        async with self._api.session.get(url, timeout=timeout) as answer:
            async for line in answer.content:
                self._note(kind, json.loads(line))
        raise RuntimeError("the API server has ended the watch")

    def _note(self, kind: Kind, event: Json) -> None:
        obj = event["object"]
        if event["type"] == "ERROR":
            raise RuntimeError(str(obj))
        version = int(obj["metadata"]["resourceVersion"])
        obj["metadata"].pop("managedFields", None)
        self._changes.append(Change(version, event["type"], kind.name, obj, time.monotonic()))
        if event["type"] == "DELETED":
            with contextlib.suppress(KeyError):
                del self._latest[kind.name][obj["metadata"]["name"]]
        else:
            self._latest[kind.name][obj["metadata"]["name"]] = obj


def _versions(objects: Iterable[Json]) -> dict[str, str]:
    return {obj["metadata"]["name"]: obj["metadata"]["resourceVersion"] for obj in objects}
