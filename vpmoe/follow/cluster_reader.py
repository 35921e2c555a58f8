"""Reads objects and logs from an API server as kubectl would, with the user's kubeconfig. It writes nothing.

The official client's synchronous half reads the kubeconfig and makes the requests. Its typed objects are not
used: objects are plain JSON, as in the operator. Outside a cluster and inside a pod credentials are found as
kubectl finds them. Each error says what to do about it.
"""

import ipaddress
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, urlencode, urlsplit

import yaml
from kubernetes.client.configuration import Configuration
from kubernetes.client.exceptions import ApiException
from kubernetes.client.rest import RESTClientObject
from kubernetes.config import (
    ConfigException,
    incluster_config,
    load_incluster_config,
)
from kubernetes.config.kube_config import KubeConfigLoader, KubeConfigMerger
from urllib3.exceptions import HTTPError, SSLError
from urllib3.response import BaseHTTPResponse

from vpmoe.api.run import GROUP, PLURAL, VERSION
from vpmoe.follow.cluster_error import ClusterError

Json = dict[str, Any]

CONNECT_SECONDS, READ_SECONDS = 10, 30
"""Longest wait for a connection, and for the next byte of an answer."""
PAGE = 500
"""Objects of a page of a list."""
LONGEST_LINE = 1 << 20
"""Bytes of a log line that are kept together."""
NO_SUCH_PATH = "404 page not found"
"""The API server's answer for a resource type that it does not know."""
SERVICE_ACCOUNT = Path(incluster_config.SERVICE_TOKEN_FILENAME).parent
DEFAULT_KUBECONFIG = "~/.kube/config"
BROKEN_KUBECONFIG = (
    ConfigException,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    yaml.YAMLError,
)
"""What the client raises for a kubeconfig that is not as it expects."""


@dataclass(frozen=True)
class Resource:
    """A resource type of the API."""

    group: str
    version: str
    plural: str

    def path(self, namespace: str, name: str = "", subresource: str = "") -> str:
        root = ["apis", self.group, self.version] if self.group else ["api", self.version]
        parts = [*root, "namespaces", namespace, self.plural, name, subresource]
        return "/" + "/".join(quote(part, safe="") for part in parts if part)


DISTILLRUNS = Resource(GROUP, VERSION, PLURAL)
PODS = Resource("", "v1", "pods")


class ClusterReader:
    """A user's view of one namespace. Every method raises ClusterError."""

    def __init__(self, configuration: Configuration, namespace: str, where: str) -> None:
        """`where` says in errors which cluster it is, such as `context prod`."""
        self.namespace = namespace
        self._where = where
        configuration.retries = False  # what fails is reported, and no redirect is followed
        self._configuration = configuration
        self._http = RESTClientObject(configuration)

    @classmethod
    def open(
        cls, kubeconfig: str | None = None, context: str | None = None, namespace: str | None = None
    ) -> Self:
        """The cluster of a context: by default the current one of KUBECONFIG, or of ~/.kube/config, or in a
        pod without either the pod's own. The namespace is by default the context's."""
        files = kubeconfig or os.environ.get("KUBECONFIG") or str(Path(DEFAULT_KUBECONFIG).expanduser())
        found = any(Path(file).expanduser().is_file() for file in files.split(os.pathsep) if file)
        configuration = Configuration(host="")  # not the client's default, http://localhost
        if found:
            where, default = _load_kubeconfig(configuration, files, context)
        elif (SERVICE_ACCOUNT / "token").is_file() and not (kubeconfig or context):
            where, default = _load_service_account(configuration)
        else:
            raise ClusterError(
                f"there is no kubeconfig at {files}. Set KUBECONFIG, or give --kubeconfig FILE: the file "
                "with which kubectl reaches the cluster."
            )
        try:
            return cls(configuration, namespace or default, where)
        except (OSError, ValueError) as error:
            raise ClusterError(
                f"{where}: its certificates or its proxy cannot be used: {error}. Correct the kubeconfig."
            ) from None

    def run(self, name: str) -> Json:
        """The DistillRun."""
        return self._json("get", DISTILLRUNS, name)

    def pod(self, name: str) -> Json:
        """The pod."""
        return self._json("get", PODS, name)

    def pods(self, labels: str) -> list[Json]:
        """The pods with these labels, oldest first."""
        query = {"labelSelector": labels, "limit": str(PAGE)}
        found: list[Json] = []
        while True:
            page = self._json("list", PODS, query=query)
            found += page.get("items") or []
            query["continue"] = (page.get("metadata") or {}).get("continue") or ""
            if not query["continue"]:
                return sorted(
                    found,
                    key=lambda pod: (pod["metadata"].get("creationTimestamp") or "", pod["metadata"]["name"]),
                )

    def log(
        self, pod: str, container: str, *, follow: bool = False, tail: int | None = None
    ) -> Iterator[str]:
        """The lines of a container's log. With `follow` they go on until the container ends."""
        query = {"container": container, "follow": str(follow).lower()}
        if tail is not None:
            query["tailLines"] = str(tail)
        answer = self._request("get", PODS, pod, "log", query, silent=follow)
        rest = b""
        with _network(self._what("get", PODS, pod, "log"), self._where):
            try:
                for part in answer.stream(1 << 16):
                    *lines, rest = (rest + part).split(b"\n")
                    yield from (line.decode(errors="replace") for line in lines)
                    if len(rest) > LONGEST_LINE:
                        yield rest.decode(errors="replace")
                        rest = b""
            finally:
                answer.close()
        if rest:
            yield rest.decode(errors="replace")

    def _json(
        self, verb: str, resource: Resource, name: str = "", query: dict[str, str] | None = None
    ) -> Json:
        answer = self._request(verb, resource, name, "", query or {})
        with _network(self._what(verb, resource, name), self._where):
            body = answer.data
        try:
            found = json.loads(body)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise ClusterError(
                f"{self._where}: what answers at {self._configuration.host} is no API server. Check the "
                "server's address in the kubeconfig, and the proxy in your environment."
            )
        return found

    def _request(
        self,
        verb: str,
        resource: Resource,
        name: str,
        subresource: str,
        query: dict[str, str],
        silent: bool = False,
    ) -> BaseHTTPResponse:
        """The answer of a request that was accepted. `silent`: there may be no byte for a long time."""
        path = resource.path(self.namespace, name, subresource)
        wanted = {key: value for key, value in query.items() if value}
        url = self._configuration.host + path + (f"?{urlencode(wanted)}" if wanted else "")
        headers = {"Accept": "application/json, */*", "User-Agent": "vpmoe"}
        timeout = (CONNECT_SECONDS, None if silent else READ_SECONDS)
        what = self._what(verb, resource, name, subresource)
        with _network(what, self._where):
            token = self._configuration.get_api_key_with_prefix("BearerToken")
            if token:
                headers["Authorization"] = token.strip()
            answer: BaseHTTPResponse = self._http.request(
                "GET", url, headers=headers, _request_timeout=timeout
            ).response
            if answer.status == 200:
                return answer
            body = answer.data
        raise self._error(answer.status, body, what, resource, name)

    def _what(self, verb: str, resource: Resource, name: str = "", subresource: str = "") -> str:
        """A request in the words of RBAC, such as `get pods/log in namespace team`."""
        kind = "/".join(part for part in (resource.plural, subresource) if part)
        group = f".{resource.group}" if resource.group else ""
        return f"{verb} {kind}{group} in namespace {self.namespace}"

    def _error(self, code: int, body: bytes, what: str, resource: Resource, name: str) -> ClusterError:
        text = body.decode(errors="replace").strip()
        try:
            status = json.loads(text)
        except (ValueError, RecursionError):
            status = None
        message = str(status.get("message") or "") if isinstance(status, dict) else text
        user = re.search(r'User "([^"]*)"', message)
        if code == 401 or (code == 403 and user is not None and user[1] == "system:anonymous"):
            return ClusterError(
                f"{self._where}: the API server does not accept your credentials ({code}): they are missing "
                "or have expired. Log in again, so that `kubectl auth whoami` works."
            )
        if code == 403:
            who = f"user {user[1]}" if user else "you"
            return ClusterError(
                f"{self._where}: {who} may not {what}. Ask for a RoleBinding there to ClusterRole view, "
                "which may read runs, pods and logs where the chart's aggregateRoles is true.",
                forbidden=True,
            )
        if code == 404 and isinstance(status, dict) and (status.get("details") or {}).get("name"):
            kind, remedy = "pod", "It was deleted: `vpmoe status` shows the pods of a run."
            if resource is DISTILLRUNS:
                kind = "DistillRun"
                remedy = (
                    "`kubectl get distillruns --all-namespaces` lists them; --namespace chooses another one."
                )
            return ClusterError(
                f"{self._where}: there is no {kind} {name} in namespace {self.namespace}. {remedy}"
            )
        if code == 404 and resource is DISTILLRUNS and (text == NO_SUCH_PATH or isinstance(status, dict)):
            return ClusterError(
                f"{self._where}: the cluster has no DistillRuns ({resource.group}/{resource.version}). "
                "Install the operator with its chart, or choose another cluster with --context."
            )
        return ClusterError(
            f"{self._where}: the API server answered {what} with {code}: {_one_line(message)}. Try again; "
            "if it stays so, it is for the cluster's administrator.",
            passing=code >= 500 or code == 429,
        )


@contextmanager
def _network(what: str, where: str) -> Iterator[None]:
    """Turns what the client raises without an answer into a ClusterError."""
    try:
        yield
    except SSLError as error:
        raise _untrusted(where, error) from None
    except ApiException as error:  # the client's words for an SSLError
        raise _untrusted(where, error.reason) from None
    except (HTTPError, OSError) as error:
        why = _one_line(str(error) or type(error).__name__)
        raise ClusterError(
            f"{where}: the API server cannot be reached to {what}: {why}. "
            "Check that the cluster runs and that `kubectl version` reaches it.",
            passing=True,
        ) from None
    except (ConfigException, ValueError) as error:  # of the hook that renews a token
        raise ClusterError(
            f"{where}: the credentials cannot be renewed: {_one_line(error)}. Log in again."
        ) from None


def _untrusted(where: str, error: object) -> ClusterError:
    return ClusterError(
        f"{where}: the API server's certificate is not accepted: {_one_line(error)}. Check the cluster's "
        "certificate-authority and server in the kubeconfig."
    )


def _load_kubeconfig(configuration: Configuration, files: str, context: str | None) -> tuple[str, str]:
    """What errors call the cluster, and the context's namespace."""
    try:
        merged = KubeConfigMerger(files).config
        names = [each["name"] for each in merged["contexts"].value]
        chosen = context or merged.safe_get("current-context")
    except BROKEN_KUBECONFIG as error:
        raise ClusterError(
            f"kubeconfig {files}: {_one_line(error)}. It needs clusters, users and contexts: "
            "`kubectl config view` shows what it has."
        ) from None
    if chosen not in names:
        missing = f"no context {chosen}" if chosen else "no current context"
        known = ", ".join(sorted(names)) or "there is none"
        raise ClusterError(f"kubeconfig {files} has {missing}. Choose one with --context: {known}.")
    where = f"context {chosen}"
    with _errors_of_plugins() as said:
        try:
            loader = KubeConfigLoader(merged, chosen, config_base_path=None)
            loader.load_and_set(configuration)
            if not configuration.host:
                raise ConfigException("the cluster has no server")
            namespace = (loader.current_context.get("context") or {}).get("namespace")
            if not hasattr(loader, "proxy") and _is_this_machine(configuration.host):
                configuration.proxy = None  # that of the environment, which kubectl does not use either
        except BROKEN_KUBECONFIG as error:
            raise ClusterError(
                f"kubeconfig {files}, {where}: {_one_line(error)}. It needs a server and a user: "
                "`kubectl config view --minify` shows what it has."
            ) from None
    if said and not (configuration.api_key or configuration.cert_file):
        raise ClusterError(
            f"{where}: the kubeconfig's program gave no credentials: {_one_line(said[-1])}. Log in again, "
            "so that `kubectl auth whoami` works."
        )
    return where, namespace or "default"


def _is_this_machine(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _load_service_account(configuration: Configuration) -> tuple[str, str]:
    try:
        load_incluster_config(client_configuration=configuration)
        return "the pod's service account", (SERVICE_ACCOUNT / "namespace").read_text().strip()
    except (ConfigException, OSError, ValueError) as error:
        raise ClusterError(
            f"the pod's service account: {_one_line(error)}. Set KUBECONFIG instead."
        ) from None


@contextmanager
def _errors_of_plugins() -> Iterator[list[str]]:
    """What the client logs meanwhile: it does not raise if the program of a kubeconfig fails."""
    said: list[str] = []
    handler = _Collector(said.append)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield said
    finally:
        root.removeHandler(handler)


class _Collector(logging.Handler):
    """Gives each message to a function."""

    def __init__(self, take: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._take = take

    def emit(self, record: logging.LogRecord) -> None:
        self._take(record.getMessage())


def _one_line(text: object) -> str:
    return " ".join(str(text).split())[:300].rstrip(".")
