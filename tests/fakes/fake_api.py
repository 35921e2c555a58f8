"""An API server in memory, behind the operator's own client: objects, resource versions, merge patches, and
faults on request.

Only for faults that a real API server shows too rarely or never. It has no schemas, defaults, garbage
collection or watches; tests/cluster has a real one.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from distill_operator.connection import Answer, Connection, ConnectionProblem
from distill_operator.kube import PYTORCHJOB, Kind, Kube

Json = dict[str, Any]
DISCOVERY = {f"/apis/{PYTORCHJOB.api_version}": PYTORCHJOB.plural}


def answer(code: int, body: Json) -> Answer:
    return Answer(code, "application/json", json.dumps(body).encode())


def status(code: int, message: str = "", name: str = "") -> Answer:
    """An error as the API server returns it. A 404 with a name is about an object, else about its kind."""
    body = {"kind": "Status", "code": code, "message": message, "details": {"name": name} if name else {}}
    return answer(code, body)


@dataclass(frozen=True)
class Request:
    """A request as the operator's connection is asked to send it."""

    method: str
    path: str
    query: dict[str, str]
    body: Json
    content_type: str


class MemoryConnection(Connection):
    """A connection to a function in this process instead of a server."""

    def __init__(self, respond: Callable[[Request], Answer]) -> None:
        self._respond = respond

    async def request(
        self,
        method: str,
        path: str,
        params: dict[str, str] | None = None,
        body: Json | None = None,
        content_type: str = "application/json",
    ) -> Answer:
        sent = json.loads(json.dumps(body or {}))
        return self._respond(Request(method, path, params or {}, sent, content_type))

    async def close(self) -> None:
        pass


@dataclass
class FakeApi:
    """`fault` is asked before each request: an answer that it returns is the server's. So is `breaks`: the
    connection of such a request breaks, and `deliver` carries it out."""

    objects: dict[str, Json] = field(default_factory=dict)
    """By path."""
    fault: Callable[[str, str], Answer | None] = lambda method, path: None
    breaks: Callable[[str, str], bool] = lambda method, path: False
    held: list[Request] = field(default_factory=list)
    """Requests whose connections broke."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Methods and paths, in order."""
    version: int = 0

    def client(self) -> Kube:
        return Kube(MemoryConnection(self._respond))

    def add(self, kind: Kind, obj: Json) -> None:
        """Store an object as somebody else would."""
        meta = obj["metadata"]
        self._store(kind.path(meta.get("namespace"), meta["name"]), copy.deepcopy(obj))

    def get(self, kind: Kind, namespace: str | None, name: str) -> Json:
        """The stored object."""
        return self.objects[kind.path(namespace, name)]

    def writes(self, ending: str = "") -> list[tuple[str, str]]:
        """The requests that may have changed something, of paths with this ending."""
        return [one for one in self.requests if one[0] != "GET" and one[1].endswith(ending)]

    def _respond(self, request: Request) -> Answer:
        method, path = request.method, request.path
        self.requests.append((method, path))
        if (fault := self.fault(method, path)) is not None:
            return fault
        if self.breaks(method, path):
            self.held.append(request)
            raise ConnectionProblem("connection reset by peer")
        return self._carry_out(request)

    def deliver(self) -> None:
        """Carry out the first request whose connection broke. Nobody hears the answer."""
        self._carry_out(self.held.pop(0))

    def _carry_out(self, request: Request) -> Answer:
        method, path, body = request.method, request.path, request.body
        subresource = "status" if path.endswith("/status") else ""
        path = path.removesuffix("/status")
        name = path.rpartition("/")[2]
        if method == "POST":
            path = f"{path}/{body['metadata']['name']}"
            if path in self.objects:
                return status(409, "already exists", body["metadata"]["name"])
            meta = {"uid": f"uid-{self.version + 1}", "generation": 1, **body["metadata"]}
            return answer(201, self._store(path, {**body, "metadata": meta}))
        if method == "GET" and path in DISCOVERY:
            return answer(200, {"resources": [{"name": DISCOVERY[path]}]})
        if method == "GET" and path not in self.objects:
            found = self._children(path)
            if found or path.rpartition("/")[2].endswith("s"):  # a list
                return answer(200, {"items": found, "metadata": {}})
        applies = "apply-patch" in request.content_type
        if path not in self.objects and not applies:
            return status(404, "not found", name)
        known = self.objects.get(path, {"metadata": {}})
        if method == "GET":
            return answer(200, known)
        if method == "DELETE":
            for field_name, value in body["preconditions"].items():
                if value != known["metadata"][field_name]:
                    return status(409, field_name, name)
            del self.objects[path]
            return answer(200, {})
        wanted = body.get("metadata", {}).get("resourceVersion")
        if wanted is not None and wanted != known["metadata"].get("resourceVersion"):
            return status(409, "the object has been modified", name)
        changed = body if method == "PUT" or applies else _merge(known, body)
        if subresource:
            changed = {**known, "status": changed.get("status", {})}
        elif "status" in known:
            changed = {**changed, "status": known["status"]}
        return answer(200, self._store(path, changed))

    def _store(self, path: str, obj: Json) -> Json:
        self.version += 1
        self.objects[path] = {**obj, "metadata": {**obj["metadata"], "resourceVersion": str(self.version)}}
        return self.objects[path]

    def _children(self, path: str) -> list[Json]:
        """Objects of a collection, of one namespace or of all."""
        prefix, _, plural = path.rpartition("/")
        return [
            obj
            for known, obj in self.objects.items()
            if known.rpartition("/")[0].rpartition("/")[2] == plural and known.startswith(prefix + "/")
        ]


def _merge(target: Any, patch: Any) -> Any:
    """RFC 7396."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _merge(merged.get(key), value)
    return merged
