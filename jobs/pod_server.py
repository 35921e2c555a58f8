"""The HTTP server of a pod, the same for all roles: /progress for the operator, /metrics for Prometheus.

It answers from memory, in threads of its own, so neither the work nor the bucket can stop an answer.
"""

import logging
import socket
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from vpmoe.failure import Permanent
from vpmoe.process.board import ProgressBoard
from vpmoe.provenance import git_sha

log = logging.getLogger(__name__)

PORT_VARIABLE = "VPMOE_SERVE_PORT"
"""Environment variable with the port. The operator sets it in every pod; without it a job serves nothing."""

CONNECTION_SECONDS = 10.0
"""How long a client may take to send its request, or to take the answer."""
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def serve(board: ProgressBoard, port: str) -> "PodServer":
    """Serve the board until the process ends. Raises Permanent if `port` is no free port."""
    try:
        server = PodServer(board, int(port))
    except (ValueError, OverflowError, OSError) as error:
        raise Permanent(
            f"{PORT_VARIABLE}={port}: {error}. Set it to a free port, or unset it to serve nothing."
        ) from error
    threading.Thread(target=server.serve_forever, name="pod-server", daemon=True).start()
    return server


class PodServer(ThreadingHTTPServer):
    """Listens on all addresses of the pod, IPv4 and IPv6."""

    request_queue_size = 64

    def __init__(self, board: ProgressBoard, port: int) -> None:
        self.board = board
        self.commit = git_sha() or ""
        if socket.has_dualstack_ipv6():
            self.address_family = socket.AF_INET6
        super().__init__(("", port), PodRequest)

    def server_bind(self) -> None:
        """Bind without the reverse lookup of HTTPServer, which may wait for a name server."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what is not the client's doing."""
        if not isinstance(sys.exception(), OSError):
            log.warning("A request of %s failed", client_address[0], exc_info=True)


class PodRequest(BaseHTTPRequestHandler):
    """One request. Each has a connection of its own."""

    timeout = CONNECTION_SECONDS
    server: PodServer

    def do_GET(self) -> None:
        """/progress: the latest Progress as JSON with the commit of the code, or 204 before the first.
        /metrics: Prometheus' text.
        """
        match self.path.partition("?")[0]:
            case "/progress":
                progress = self.server.board.progress
                if progress is None:
                    self._answer(HTTPStatus.NO_CONTENT)
                else:
                    served = progress.model_copy(update={"commit": self.server.commit})
                    self._answer(HTTPStatus.OK, "application/json", served.to_json())
            case "/metrics":
                board = self.server.board
                self._answer(HTTPStatus.OK, METRICS_TYPE, board.metrics.render(board.progress))
            case _:
                self._answer(HTTPStatus.NOT_FOUND)

    def _answer(self, status: HTTPStatus, content_type: str = "", body: bytes = b"") -> None:
        self.send_response(status)
        if content_type:
            self.send_header("Content-Type", content_type)
        if status != HTTPStatus.NO_CONTENT:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: the log is that of the work."""
