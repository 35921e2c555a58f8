"""An HTTP proxy in front of an S3 server that injects faults into selected requests.

A Fault applies to a given number of matching requests. Other requests are forwarded unchanged, so that their
signatures remain valid.
"""

import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

Kind = Literal[
    "503", "lost", "reset", "truncated", "flipped", "stalled", "unconditional", "held", "edited", "answered"
]

type Response = tuple[int, dict[str, str], bytes]
"""Status, headers with names in lower case, and body."""


@dataclass
class Fault:
    """A fault of the next `times` requests whose "METHOD path?query" matches `request`.

    503: the response is 503, and the request is not forwarded. lost: forwarded, but the connection is closed
    without a response. reset: half of the body, then a TCP reset. truncated: half of the body, then an
    orderly close. flipped: one bit of the body is flipped. stalled: no response for two seconds.
    unconditional: the response to a failed condition (412) becomes 200. held: forwarded only when
    `FaultProxy.release` is set. edited: `edit` gives the response for the one of the server.
    answered: not forwarded; the response is what `edit` makes of an empty one.
    """

    kind: Kind
    request: str
    times: int = 1_000_000
    edit: Callable[[Response], Response] | None = None


class FaultProxy(ThreadingHTTPServer):
    """The proxy. `requests` are the received requests as "METHOD path?query", and `headers` the header fields
    of each, with names in lower case."""

    daemon_threads = True

    def __init__(self, upstream: str, certificate: Path | None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream = urlsplit(upstream).netloc
        self.endpoint = f"{'https' if certificate else 'http'}://127.0.0.1:{self.server_address[1]}"
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate.with_suffix(".crt"), certificate.with_suffix(".key"))
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.release = threading.Event()
        self._lock = threading.Lock()

    def reset(self) -> None:
        """Remove all faults, recorded requests and the release of held requests."""
        self.faults, self.requests, self.headers = [], [], []
        self.release.clear()

    def record_request(self, request: str) -> Fault | None:
        """Record a request; return its fault, if any."""
        with self._lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.times and re.search(fault.request, request):
                    fault.times -= 1
                    return fault
        return None

    def count(self, pattern: str) -> int:
        """The number of received requests that match."""
        return sum(1 for request in self.requests if re.search(pattern, request))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Do not log clients that have disconnected: tests cause it."""


class Handler(BaseHTTPRequestHandler):
    """Forwards one request, with its fault."""

    protocol_version = "HTTP/1.1"
    server: FaultProxy

    def do_GET(self) -> None:
        """Handle a request of any method."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.headers.append({name.lower(): value for name, value in self.headers.items()})
        found = self.server.record_request(f"{self.command} {self.path}")
        fault = found.kind if found else None
        if fault == "503":
            self.respond(503, [("Content-Length", "0")], b"")
            return
        if fault == "stalled":
            time.sleep(2)
        if fault == "held":
            self.server.release.wait(20)
        if found and found.edit and fault == "answered":
            self.respond_edited(found.edit((0, {}, b"")))
            return
        response, content = self.forward(body)
        if fault == "lost":
            self.close_connection = True
            return
        if fault == "flipped":
            content = content[:-1] + bytes([content[-1] ^ 1])
        if fault == "unconditional" and response.status == 412:
            self.respond(200, [("Content-Length", "0"), ("ETag", '"x"')], b"")
            return
        if found and found.edit:
            given = {name.lower(): value for name, value in response.getheaders()}
            self.respond_edited(found.edit((response.status, given, content)))
            return
        half = fault in ("reset", "truncated")
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = half
        self.respond(
            response.status, response.getheaders(), content[: len(content) // 2] if half else content
        )

    do_PUT = do_POST = do_HEAD = do_DELETE = do_GET

    def forward(self, body: bytes) -> tuple[HTTPResponse, bytes]:
        """Forward the request with its Host header, which is signed."""
        connection = HTTPConnection(self.server.upstream, timeout=30)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() != "expect":
                connection.putheader(name, value)
        connection.endheaders(body)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return response, content

    def respond_edited(self, response: Response) -> None:
        """Send a response with the length of its body."""
        status, headers, content = response
        if self.command == "HEAD":
            content = b""
        else:
            headers["content-length"] = str(len(content))
        self.respond(status, list(headers.items()), content)

    def respond(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        """Send a response to the client."""
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: tests read `requests`."""


@contextmanager
def faulty(upstream: str, certificate: Path | None = None) -> Iterator[FaultProxy]:
    """Run a proxy of `upstream`, with TLS if `certificate` is given (without suffix: .crt and .key are
    added)."""
    with FaultProxy(upstream, certificate) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield proxy
        finally:
            proxy.release.set()
            proxy.shutdown()
            thread.join()
