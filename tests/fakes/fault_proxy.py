"""A store that misbehaves on request: an HTTP proxy before a real one, for faults that no real store shows
when asked to.

Each Fault is used up by the requests that it matches; everything else passes through untouched, so signatures
hold.
"""

import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

Kind = Literal["503", "lost", "reset", "truncated", "flipped", "stalled", "unconditional", "held"]


@dataclass
class Fault:
    """What happens to the next `times` requests whose "METHOD path?query" matches `request`.

    503: answered so, never forwarded. lost: forwarded, and the connection closed instead of an answer. reset:
    half of the body, then a TCP reset. truncated: half of the body, then an orderly close. flipped: one bit
    of the body. stalled: no answer for two seconds. unconditional: a failed condition (412) is answered as a
    success. held: forwarded when `Faulty.release` is set.
    """

    kind: Kind
    request: str
    times: int = 1_000_000


class Faulty(ThreadingHTTPServer):
    """The proxy; `requests` is what it was asked, as "METHOD path?query", and `headers` each request's header
    fields in lower case."""

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
        """No fault, nothing seen, nothing held."""
        self.faults, self.requests, self.headers = [], [], []
        self.release.clear()

    def take(self, request: str) -> Kind | None:
        """The fault that this request meets."""
        with self._lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.times and re.search(fault.request, request):
                    fault.times -= 1
                    return fault.kind
        return None

    def count(self, pattern: str) -> int:
        """How many requests matched."""
        return sum(1 for request in self.requests if re.search(pattern, request))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is gone, which tests bring about, is no news."""


class Handler(BaseHTTPRequestHandler):
    """Forward one request."""

    protocol_version = "HTTP/1.1"
    server: Faulty

    def do_GET(self) -> None:
        """Any method."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.headers.append({name.lower(): value for name, value in self.headers.items()})
        fault = self.server.take(f"{self.command} {self.path}")
        if fault == "503":
            self.answer(503, [("Content-Length", "0")], b"")
            return
        if fault == "stalled":
            time.sleep(2)
        if fault == "held":
            self.server.release.wait(20)
        response, content = self.forward(body)
        if fault == "lost":
            self.close_connection = True
            return
        if fault == "flipped":
            content = content[:-1] + bytes([content[-1] ^ 1])
        if fault == "unconditional" and response.status == 412:
            self.answer(200, [("Content-Length", "0"), ("ETag", '"x"')], b"")
            return
        half = fault in ("reset", "truncated")
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = half
        self.answer(response.status, response.getheaders(), content[: len(content) // 2] if half else content)

    do_PUT = do_POST = do_HEAD = do_DELETE = do_GET

    def forward(self, body: bytes) -> tuple[HTTPResponse, bytes]:
        """Ask the real store the same, under the same host name, which is signed."""
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

    def answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        """Hand an answer on with the headers that it came with."""
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the test asks `requests`."""


@contextmanager
def faulty(upstream: str, certificate: Path | None = None) -> Iterator[Faulty]:
    """A proxy before `upstream` for as long as the block lasts; it speaks TLS where it is given
    <certificate>.crt and .key."""
    with Faulty(upstream, certificate) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield proxy
        finally:
            proxy.release.set()
            proxy.shutdown()
            thread.join()
