"""Connection to the API server: credentials, TLS, time-outs, one HTTP request at a time.

The official client's asyncio half, kubernetes.aio, finds the credentials and the server and makes the
requests. Neither its typed objects nor its ApiClient are used: templates, tests and kubectl show the same
objects as plain JSON, and ApiClient copies each body. What comes from the client and does not fit is changed
in `Connection.__init__`: it would follow redirects, repeat a request when a connection breaks, read ~/.netrc,
and look for a proxy in two threads at each request.
"""

import asyncio
import json
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlencode, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import yaml
from kubernetes.aio.client import Configuration
from kubernetes.aio.client.rest import RESTClientObject
from kubernetes.aio.config import (
    ConfigException,
    incluster_config,
    load_incluster_config,
    load_kube_config,
)

log = logging.getLogger(__name__)

TIMEOUT = aiohttp.ClientTimeout(total=60, connect=10, sock_connect=10, sock_read=10)
"""Seconds: for a request with its answer; to get a connection; without a byte from the server."""
CREDENTIALS_SECONDS = 60.0
"""For an exec plugin of a kubeconfig to print credentials."""
CONNECTIONS = 100
"""Most requests in flight. The operator has a few dozen tasks, each with one request at a time."""
ANSWER_BYTES = 32 * 2**20
"""Most bytes of an answer, decompressed. An object has at most 3 MB; a page of a list may have more."""
JSON = "application/json"
USER_AGENT = "distill-operator"

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

BROKEN_CONNECTION = (aiohttp.ClientError, OSError, ValueError)
"""What aiohttp raises if there is no complete answer. TimeoutError is an OSError; a URL or a header that is
not valid is a ValueError.
"""

Load = Callable[[Configuration], Awaitable[None]]
"""Reads the server and the credentials into a configuration."""


class ConnectionProblem(Exception):
    """There is no API server to connect to, or there was no answer from it."""


class AnswerTooLarge(ConnectionProblem):
    """The answer has more than ANSWER_BYTES."""


@dataclass(frozen=True)
class Answer:
    """An HTTP response."""

    code: int
    content_type: str
    body: bytes

    def json(self) -> dict[str, Any] | None:
        """The JSON object; None if the body is something else, such as half of one."""
        try:
            found = json.loads(self.body)
        except (ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None


class Connection:
    """A pool of connections to one API server, as one user. It belongs to one event loop.

    `load` reads the credentials again after the server has refused them.
    """

    def __init__(self, configuration: Configuration, load: Load | None = None) -> None:
        self._configuration, self._load = configuration, load
        self._loading = asyncio.Lock()
        configuration.connection_pool_maxsize = CONNECTIONS
        configuration.proxy = configuration.proxy or proxy_of(configuration.host)
        configuration.client_session_kwargs = {"trust_env": False, "middlewares": (_once,)}
        self._http = RESTClientObject(configuration)

    @classmethod
    def open(cls) -> Self:
        """A connection as the pod's service account; outside a pod, with KUBECONFIG.

        Blocks. Not for a thread whose event loop runs. Raises ConnectionProblem.
        """
        inside = Path(incluster_config.SERVICE_TOKEN_FILENAME).exists()  # kopf's login decides by it too
        load = _load_service_account if inside else _load_kubeconfig
        configuration = Configuration(host="")  # not the client's default, http://localhost
        try:
            asyncio.run(load(configuration))
            return cls(configuration, load)
        except OSError as error:  # certificates
            raise ConnectionProblem(f"certificates for the API server: {error}") from error

    async def close(self) -> None:
        await self._http.close()

    async def request(
        self,
        method: str,
        path: str,
        params: dict[str, str] | None = None,
        body: dict[str, Any] | None = None,
        content_type: str = JSON,
    ) -> Answer:
        """Send one request, once. Redirects are not followed. Raises ConnectionProblem."""
        try:
            token = await self._token()
            answer = await self._exchange(method, path, params or {}, body, content_type, token)
        except BROKEN_CONNECTION as error:
            raise ConnectionProblem(f"{type(error).__name__} {error}".rstrip()) from error
        if answer.code == HTTPStatus.UNAUTHORIZED:
            await self._renew(token)
        return answer

    async def _exchange(
        self,
        method: str,
        path: str,
        params: dict[str, str],
        body: dict[str, Any] | None,
        content_type: str,
        token: str,
    ) -> Answer:
        headers = {"Accept": JSON, "User-Agent": USER_AGENT, "Content-Type": content_type}
        if token:
            headers["Authorization"] = token
        url = self._configuration.host + path + (f"?{urlencode(params)}" if params else "")
        try:
            response = (
                await self._http.request(method, url, headers=headers, body=body, _request_timeout=TIMEOUT)
            ).response
        except _Redirected as redirect:
            return Answer(redirect.code, "text/plain", f"redirects to {redirect.location}".encode())
        try:
            content = await _read(response)
        finally:
            response.close()  # does nothing after the last byte
        return Answer(response.status, response.headers.get("Content-Type", ""), content)

    async def _token(self) -> str:
        """The value of the header Authorization; empty without credentials. The client reads a service
        account's file once a minute.
        """
        try:
            return (await self._configuration.get_api_key_with_prefix("BearerToken") or "").strip()
        except (ConfigException, OSError, ValueError) as error:
            raise ConnectionProblem(f"the service account's token: {error}") from error

    async def _renew(self, refused: str) -> None:
        """Load credentials for the requests to come, unless another request has done so meanwhile.

        The client measures its minute with the wall clock, and reads a kubeconfig and runs its exec plugin
        only once. Only credentials: a kubeconfig may have another server by now.
        """
        if self._load is None:
            return
        async with self._loading:
            try:
                if await self._token() != refused:
                    return
                loaded = Configuration(host="")
                await self._load(loaded)
            except ConnectionProblem as error:
                log.warning("the API server refuses the credentials, and there are no others: %s", error)
                return
            if loaded.host == self._configuration.host:
                self._configuration.api_key = loaded.api_key
                self._configuration.refresh_api_key_hook = loaded.refresh_api_key_hook


class _Redirected(Exception):
    def __init__(self, code: int, location: str) -> None:
        super().__init__(code, location)
        self.code, self.location = code, location


async def _once(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """Keep aiohttp from sending a request again: after a broken connection, or to where a redirect leads."""
    try:
        response = await handler(request)
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise ConnectionProblem(f"{type(error).__name__} {error}".rstrip()) from error
    if response.status in (301, 302, 303, 307, 308):
        response.close()
        raise _Redirected(response.status, response.headers.get("Location", "nowhere"))
    return response


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """The body. Raises AnswerTooLarge."""
    content = bytearray()
    async for part in response.content.iter_any():
        content += part
        if len(content) > ANSWER_BYTES:
            raise AnswerTooLarge(f"the answer has more than {ANSWER_BYTES} bytes")
    return bytes(content)


def proxy_of(url: str) -> str | None:
    """The proxy for a server by HTTPS_PROXY (HTTP_PROXY for http://) and NO_PROXY; None without one."""
    server = urlsplit(url)
    if proxy_bypass(server.netloc):
        return None
    return getproxies().get(server.scheme)


async def _load_service_account(configuration: Configuration) -> None:
    try:
        load_incluster_config(client_configuration=configuration)
    except (ConfigException, OSError, ValueError) as error:
        raise ConnectionProblem(f"the pod's service account: {error}") from error


async def _load_kubeconfig(configuration: Configuration) -> None:
    """Read the current context of the files that KUBECONFIG names. Runs its exec plugin, if it has one."""
    files = os.environ.get("KUBECONFIG") or str(Path("~/.kube/config").expanduser())
    if not any(Path(file).expanduser().is_file() for file in files.split(os.pathsep) if file):
        raise ConnectionProblem(
            f"there is neither a service account nor a kubeconfig at {files}: set KUBECONFIG to one"
        )
    try:
        async with asyncio.timeout(CREDENTIALS_SECONDS):
            await load_kube_config(files, client_configuration=configuration, persist_config=False)
        if not configuration.host:
            raise ConfigException("the cluster has no server")
    except BROKEN_KUBECONFIG as error:
        what = str(error) or type(error).__name__
        raise ConnectionProblem(
            f"kubeconfig {files}: {what}. It needs a current context with a server and a user"
        ) from error
