"""Client for the Kubernetes API: plain JSON objects, live reads, typed errors.

No cache and no retries. Requests go through the official client (connection.py).
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import quote

from distill_operator.connection import JSON, Answer, AnswerTooLarge, Connection, ConnectionProblem
from distill_operator.metrics import API_CALLS

Json = dict[str, Any]
Page = list[Json]

PAGE = 250
"""Objects of a page of a list; fewer if they are so large that their page is not read."""
FIELD_MANAGER = "distill-operator"
NO_SUCH_PATH = b"404 page not found"
"""The API server's answer for a path that it does not serve. Every other error of it is a Status."""
NAMESPACE_ENDS = "NamespaceTerminating"
"""KubeError.reason if an object is not created because its namespace is being deleted."""


@dataclass(frozen=True)
class Kind:
    """A resource type: its path in the API, and the `kind` of its objects."""

    group: str
    version: str
    plural: str
    name: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, namespace: str | None = None, name: str = "", subresource: str = "") -> str:
        parts = ["apis", self.group, self.version] if self.group else ["api", self.version]
        if self.namespaced and namespace is not None:
            parts += ["namespaces", namespace]
        return "/" + "/".join(
            quote(part, safe="") for part in [*parts, self.plural, name, subresource] if part
        )


DISTILLRUN = Kind("vpmoe.dev", "v1alpha1", "distillruns", "DistillRun")
JOB = Kind("batch", "v1", "jobs", "Job")
PYTORCHJOB = Kind("kubeflow.org", "v1", "pytorchjobs", "PyTorchJob")
CONFIGMAP = Kind("", "v1", "configmaps", "ConfigMap")
POD = Kind("", "v1", "pods", "Pod")
NODE = Kind("", "v1", "nodes", "Node", namespaced=False)
EVENT = Kind("", "v1", "events", "Event")
LEASE = Kind("coordination.k8s.io", "v1", "leases", "Lease")
CRD = Kind(
    "apiextensions.k8s.io", "v1", "customresourcedefinitions", "CustomResourceDefinition", namespaced=False
)
CHILD_KINDS = {kind.name: kind for kind in (JOB, PYTORCHJOB)}


class KubeError(Exception):
    """The API server returned an error, or did not answer (code 0). A 404 that is not its own, or is not
    complete, is no answer: it does not tell what does not exist.
    """

    def __init__(self, message: str, code: int = 0, reason: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason


class Conflict(KubeError):
    """409: the object was changed since it was read, or one of that name exists already."""


class KindMissing(KubeError):
    """404 of the API server for the resource type itself: its CRD is not installed."""


class TooLarge(KubeError):
    """The response is larger than what is read of one."""


class WriteFenced(KubeError):
    """The write was not sent: another process may lead by now."""


class Kube:
    """A connection to one API server.

    Every method raises KubeError. `last_answer` (monotonic seconds) is for the probes.

    `write_seconds` returns how long this process may still write; every write except those of Leases is
    checked against it just before it is sent, and given up at its end.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.last_answer = time.monotonic()
        self.write_seconds: Callable[[], float] = lambda: math.inf

    @classmethod
    def connect(cls) -> Self:
        """Connect with the pod's service account, or outside a pod with KUBECONFIG.

        Blocks: an event loop calls it in a thread.
        """
        try:
            return cls(Connection.open())
        except ConnectionProblem as error:
            raise KubeError(f"cannot connect to the API server: {error}") from error

    async def close(self) -> None:
        await self._connection.close()

    async def get(self, kind: Kind, namespace: str | None, name: str) -> Json | None:
        """The live object; None if it does not exist."""
        try:
            return await self._call("GET", kind.path(namespace, name))
        except KubeError as error:
            if error.code == 404 and not isinstance(error, KindMissing):
                return None
            raise

    async def list_first(self, kind: Kind, namespace: str, limit: int, fields: str) -> list[Json]:
        """The first objects of the namespace that match, at most `limit`, in one request."""
        query = {"limit": str(limit), "fieldSelector": fields}
        page = await self._call("GET", kind.path(namespace), params=query)
        return [{"apiVersion": kind.api_version, "kind": kind.name, **item} for item in page["items"]]

    async def list(
        self, kind: Kind, namespace: str | None = None, labels: str = "", fields: str = ""
    ) -> list[Json]:
        """All objects of the namespace, or of every namespace if it is None. apiVersion and kind are filled
        in.
        """
        return [item async for page in self.pages(kind, namespace, labels, fields) for item in page]

    async def pages(
        self, kind: Kind, namespace: str | None = None, labels: str = "", fields: str = ""
    ) -> AsyncIterator[Page]:
        """The objects of `list`, page by page, for lists that may be too large to keep whole. Without
        managedFields, which take half of an object's memory.
        """
        query = {"limit": str(PAGE), "labelSelector": labels, "fieldSelector": fields, "continue": ""}
        while True:
            try:
                page = await self._call(
                    "GET", kind.path(namespace), params={key: value for key, value in query.items() if value}
                )
            except TooLarge:
                if query["limit"] == "1":
                    raise
                query["limit"] = str(int(query["limit"]) // 8 or 1)
                continue
            for item in page["items"]:
                item["metadata"].pop("managedFields", None)
            yield [{"apiVersion": kind.api_version, "kind": kind.name, **item} for item in page["items"]]
            query["continue"] = page["metadata"].get("continue", "")
            if not query["continue"]:
                return

    async def create(self, kind: Kind, obj: Json) -> Json:
        """Create the object. Raises Conflict if the name is taken."""
        return await self._call("POST", kind.path(obj["metadata"].get("namespace")), body=obj)

    async def replace(self, kind: Kind, obj: Json, subresource: str = "") -> Json:
        """Replace the object. Raises Conflict if it was changed since `obj` was read."""
        meta = obj["metadata"]
        return await self._call("PUT", kind.path(meta.get("namespace"), meta["name"], subresource), body=obj)

    async def patch(self, kind: Kind, namespace: str | None, name: str, change: Json) -> Json:
        """Apply a JSON merge patch.

        Raises Conflict if `change` has a resourceVersion that is not the latest.
        """
        return await self._call(
            "PATCH", kind.path(namespace, name), body=change, content_type="application/merge-patch+json"
        )

    async def apply(self, kind: Kind, obj: Json) -> Json:
        """Server-side apply with force: takes the fields of `obj` over from any other field manager."""
        meta = obj["metadata"]
        return await self._call(
            "PATCH",
            kind.path(meta.get("namespace"), meta["name"]),
            params={"fieldManager": FIELD_MANAGER, "force": "true"},
            body=obj,
            content_type="application/apply-patch+yaml",
        )

    async def delete(
        self,
        kind: Kind,
        namespace: str | None,
        name: str,
        uid: str,
        propagation: str = "Foreground",
        version: str | None = None,
    ) -> None:
        """Delete the object of this uid, if it still exists and, with `version`, was not changed since then.

        Foreground: it stays until its pods have terminated.
        """
        options = {
            "kind": "DeleteOptions",
            "apiVersion": "v1",
            "propagationPolicy": propagation,
            "preconditions": {"uid": uid} if version is None else {"uid": uid, "resourceVersion": version},
        }
        try:
            await self._call("DELETE", kind.path(namespace, name), body=options)
        except Conflict:  # uid or version differ: the object that was meant is gone
            return
        except KubeError as error:
            if error.code != 404:
                raise

    async def serves(self, kind: Kind) -> bool:
        """Whether the API server serves this resource type now."""
        try:
            found = await self._call("GET", f"/apis/{kind.api_version}")
        except KubeError as error:
            if error.code == 404:
                return False
            raise
        return any(resource["name"] == kind.plural for resource in found.get("resources", []))

    async def _call(
        self,
        method: str,
        path: str,
        *,
        params: dict[str, str] | None = None,
        body: Json | None = None,
        content_type: str = "application/json",
    ) -> Json:
        seconds = math.inf
        if method != "GET" and not path.startswith(f"/apis/{LEASE.api_version}/"):
            seconds = self.write_seconds()
            if seconds <= 0:
                raise WriteFenced(f"{method} {path}: not sent, because this process may no longer lead")
        try:
            async with asyncio.timeout(None if seconds == math.inf else seconds):
                answer = await self._connection.request(method, path, params, body, content_type)
        except (ConnectionProblem, TimeoutError) as error:
            API_CALLS.labels(method, "0").inc()
            failure = TooLarge if isinstance(error, AnswerTooLarge) else KubeError
            raise failure(f"{method} {path}: {str(error) or type(error).__name__}") from error
        API_CALLS.labels(method, str(answer.code)).inc()
        if answer.code < 500:
            self.last_answer = time.monotonic()
        if not 200 <= answer.code < 300:
            raise _error(method, path, answer)
        result = answer.json()
        if result is None:
            raise KubeError(f"{method} {path}: the response is not a JSON object", answer.code)
        return result


def _error(method: str, path: str, answer: Answer) -> KubeError:
    status = answer.json() if answer.content_type.startswith(JSON) else None
    text = answer.body.decode(errors="replace").strip()
    if answer.code == 404 and not _says_not_found(answer, status):
        # A gateway's page, or half of a Status. The object may exist.
        return KubeError(f"{method} {path}: 404 that is no complete answer of the API server: {text!r:.80}")
    status = status or {"message": text}
    message = f"{method} {path}: {answer.code} {status.get('message', '')}".rstrip()
    causes = [cause.get("reason") for cause in (status.get("details") or {}).get("causes") or []]
    reason = NAMESPACE_ENDS if NAMESPACE_ENDS in causes else status.get("reason", "")
    if answer.code == 409:
        return Conflict(message, 409, reason)
    if answer.code == 404 and not (status.get("details") or {}).get("name"):
        return KindMissing(message, 404, reason)
    return KubeError(message, answer.code, reason)


def _says_not_found(answer: Answer, status: Json | None) -> bool:
    """Whether a 404 is the API server's own, and complete."""
    if status is None:
        return answer.body.strip() == NO_SUCH_PATH
    return status.get("kind") == "Status"
