"""Client for the Kubernetes API: plain JSON objects, live reads, typed errors.

No cache and no retries.

lightkube provides configuration, certificates and rotating tokens. Its typed resources are not used: they
cannot delete with a uid as precondition, and templates, tests and kubectl show the same objects as plain
JSON.
"""

import time
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import quote

import httpx2
from lightkube.config.client_adapter import AsyncClient, ConnectionParams
from lightkube.config.kubeconfig import KubeConfig

from distill_operator.metrics import API_CALLS

Json = dict[str, Any]

TIMEOUT = httpx2.Timeout(10.0)
PAGE = 500
JSON = "application/json"
FIELD_MANAGER = "distill-operator"


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
SECRET = Kind("", "v1", "secrets", "Secret")
POD = Kind("", "v1", "pods", "Pod")
NODE = Kind("", "v1", "nodes", "Node", namespaced=False)
EVENT = Kind("", "v1", "events", "Event")
LEASE = Kind("coordination.k8s.io", "v1", "leases", "Lease")
CRD = Kind(
    "apiextensions.k8s.io", "v1", "customresourcedefinitions", "CustomResourceDefinition", namespaced=False
)
CHILD_KINDS = {kind.name: kind for kind in (JOB, PYTORCHJOB)}


class KubeError(Exception):
    """The API server returned an error, or did not answer (code 0)."""

    def __init__(self, message: str, code: int = 0, reason: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason


class Conflict(KubeError):
    """409: the object was changed since it was read, or one of that name exists already."""


class KindMissing(KubeError):
    """404 for the resource type itself: its CRD is not installed."""


class Kube:
    """A connection to one API server.

    Every method raises KubeError. `last_answer` (monotonic seconds) is for the probes.
    """

    def __init__(self, http: httpx2.AsyncClient) -> None:
        self._http = http
        self.last_answer = time.monotonic()

    @classmethod
    def connect(cls) -> Self:
        """Connect with the pod's service account, or outside a pod with KUBECONFIG.

        Raises lightkube.ConfigError without both.
        """
        config = KubeConfig.from_env().get()
        if config is None:
            raise KubeError(
                "the kubeconfig has no current context: set one in the file that KUBECONFIG names"
            )
        return cls(AsyncClient(config, ConnectionParams(timeout=TIMEOUT)))

    async def close(self) -> None:
        await self._http.aclose()

    async def get(self, kind: Kind, namespace: str | None, name: str) -> Json | None:
        """The live object; None if it does not exist."""
        try:
            return await self._call("GET", kind.path(namespace, name))
        except KubeError as error:
            if error.code == 404 and not isinstance(error, KindMissing):
                return None
            raise

    async def list(
        self, kind: Kind, namespace: str | None = None, labels: str = "", fields: str = ""
    ) -> list[Json]:
        """All objects of the namespace, or of every namespace if it is None. apiVersion and kind are filled
        in.
        """
        items: list[Json] = []
        query = {"limit": str(PAGE), "labelSelector": labels, "fieldSelector": fields, "continue": ""}
        while True:
            page = await self._call(
                "GET", kind.path(namespace), params={key: value for key, value in query.items() if value}
            )
            items += [{"apiVersion": kind.api_version, "kind": kind.name, **item} for item in page["items"]]
            query["continue"] = page["metadata"].get("continue", "")
            if not query["continue"]:
                return items

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
        self, kind: Kind, namespace: str | None, name: str, uid: str, propagation: str = "Foreground"
    ) -> None:
        """Delete the object of this uid, if it still exists.

        Foreground: it stays until its pods have terminated.
        """
        options = {
            "kind": "DeleteOptions",
            "apiVersion": "v1",
            "propagationPolicy": propagation,
            "preconditions": {"uid": uid},
        }
        try:
            await self._call("DELETE", kind.path(namespace, name), body=options)
        except Conflict:  # the uid differs: the object that was meant is gone
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
        try:
            answer = await self._http.request(
                method,
                path,
                params=params,
                json=body,
                headers={"Content-Type": content_type} if body is not None else None,
            )
        except httpx2.HTTPError as error:
            API_CALLS.labels(method, "0").inc()
            raise KubeError(f"{method} {path}: {type(error).__name__} {error}".rstrip()) from error
        API_CALLS.labels(method, str(answer.status_code)).inc()
        if answer.status_code < 500:
            self.last_answer = time.monotonic()
        if answer.is_success:
            result: Json = answer.json()
            return result
        raise _error(method, path, answer)


def _error(method: str, path: str, answer: httpx2.Response) -> KubeError:
    is_status = answer.headers.get("Content-Type", "").startswith(JSON)
    status: Json = answer.json() if is_status else {"message": answer.text.strip()}
    message = f"{method} {path}: {answer.status_code} {status.get('message', '')}".rstrip()
    reason = status.get("reason", "")
    if answer.status_code == 409:
        return Conflict(message, 409, reason)
    if answer.status_code == 404 and not (status.get("details") or {}).get("name"):
        return KindMissing(message, 404, reason)
    return KubeError(message, answer.status_code, reason)
