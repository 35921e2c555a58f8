"""An API server on loopback that serves one namespace's runs, pods and logs, and faults on request.

For faults that a real API server shows too rarely or never, and for a run that goes on at a test's pace;
tests/cluster has a real one.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

Json = dict[str, Any]
TOKEN = "a-token"


def error(code: int, message: str, name: str = "") -> tuple[int, bytes]:
    """An error as the API server returns it. A 404 with a name is about an object, else about its kind."""
    details = {"name": name} if name else {}
    return code, json.dumps({"kind": "Status", "code": code, "message": message, "details": details}).encode()


@dataclass
class RunServer:
    """`fault` is asked before each request with its path: a code and a body that it returns are sent."""

    kubeconfig: Path
    run: Json = field(default_factory=dict)
    pods: list[Json] = field(default_factory=list)
    logs: dict[str, Iterator[bytes] | list[bytes]] = field(default_factory=dict)
    """Pieces of a log by pod."""
    fault: Callable[[str], tuple[int, bytes] | None] = lambda path: None
    requests: list[str] = field(default_factory=list)
    """Paths with queries, in order."""
    tokens: list[str | None] = field(default_factory=list)
    """The header Authorization of each."""
    on_request: Callable[["RunServer"], None] = lambda server: None
    """Called before each answer about the run."""

    def write_kubeconfig(self, url: str, namespace: str = "team", user: Json | None = None) -> None:
        """A kubeconfig with the contexts `here` and, of another namespace, `other`."""
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "clusters": [{"name": "one", "cluster": {"server": url}}],
            "users": [{"name": "me", "user": {"token": TOKEN} if user is None else user}],
            "contexts": [
                {"name": "here", "context": {"cluster": "one", "user": "me", "namespace": namespace}},
                {"name": "other", "context": {"cluster": "one", "user": "me"}},
            ],
        }
        self.kubeconfig.write_text(yaml.safe_dump(config))

    def answer(self, path: str, query: dict[str, list[str]]) -> tuple[int, bytes] | Iterator[bytes]:
        """The answer to a GET: a code and a body, or the pieces of a log."""
        parts = path.strip("/").split("/")
        kind, name = parts[parts.index("namespaces") + 2], (parts[parts.index("namespaces") + 3 :] or [""])[0]
        if kind == "distillruns":
            self.on_request(self)
            if self.run.get("metadata", {}).get("name") != name:
                return error(404, f'distillruns.vpmoe.dev "{name}" not found', name)
            return 200, json.dumps(self.run).encode()
        if path.endswith("/log"):
            return iter(self.logs[name])
        if name:
            return 200, json.dumps(next(pod for pod in self.pods if pod["metadata"]["name"] == name)).encode()
        return 200, json.dumps({"kind": "PodList", "metadata": {}, "items": self.pods}).encode()


@contextmanager
def serve(folder: Path) -> Iterator[RunServer]:
    """A server, whose kubeconfig is in `folder`."""
    server = RunServer(folder / "kubeconfig")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            server.requests.append(self.path)
            server.tokens.append(self.headers.get("Authorization"))
            answer = server.fault(url.path) or server.answer(url.path, parse_qs(url.query))
            if not isinstance(answer, tuple):
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for piece in answer:
                    self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                    self.wfile.flush()
                self.wfile.write(b"0\r\n\r\n")
                return
            code, body = answer
            if not code:  # ends the connection without an answer
                self.close_connection = True
                return
            self.send_response(code)
            self.send_header("Content-Type", "application/json" if body.startswith(b"{") else "text/plain")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server.write_kubeconfig(f"http://127.0.0.1:{http.server_port}")
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
