"""A server on loopback with the part of the Hugging Face hub's API that is needed to read one dataset or
model."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(name: str, files: dict[str, bytes], kind: str = "datasets") -> Iterator[tuple[str, list[str]]]:
    """Serve `files` as the dataset `name`, or as the model if `kind` is "models". The only revisions are main
    and COMMIT.

    Yields the endpoint and the list of requested paths.
    """
    root = f"/datasets/{name}" if kind == "datasets" else f"/{name}"
    requested: list[str] = []
    blobs = [
        {"path": path, "size": len(data), "oid": f"{number:040x}"}
        for number, (path, data) in enumerate(files.items(), 1)
    ]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requested.append(self.path)
            path = self.path.partition("?")[0]
            if path in (
                f"/api/{kind}/{name}",
                *(f"/api/{kind}/{name}/revision/{at}" for at in ("main", COMMIT)),
            ):
                siblings = [
                    {"rfilename": blob["path"], "size": blob["size"], "blobId": blob["oid"]} for blob in blobs
                ]
                self.respond(200, {"id": name, "sha": COMMIT, "siblings": siblings})
            elif path == f"/api/{kind}/{name}/tree/{COMMIT}":
                self.respond(200, [{"type": "file", **blob} for blob in blobs])
            elif path.startswith(f"{root}/resolve/{COMMIT}/"):
                data = files[unquote(path.partition(f"/{COMMIT}/")[2])]
                start, stop = re.findall(r"\d+", self.headers.get("Range", "")) or (0, len(data) - 1)
                self.respond(206 if "Range" in self.headers else 200, data[int(start) : int(stop) + 1])
            else:
                self.respond(
                    404,
                    {"error": "Not found"},
                    "RevisionNotFound" if "/revision/" in path else "RepoNotFound",
                )

        do_HEAD = do_GET

        def respond(self, code: int, body: Any, error: str = "") -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            if error:
                self.send_header("X-Error-Code", error)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, *record: object) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requested
    finally:
        server.shutdown()
        server.server_close()
