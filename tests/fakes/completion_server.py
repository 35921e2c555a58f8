"""A server that answers completions as vLLM does, with texts that a function makes.

For answers and faults that no model gives on request. A real one is in tests/unit/export/test_serving.py.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.fakes.completions import ids
from vpmoe.data import vocabulary_file

Completion = Callable[[str, dict[str, Any]], str]
"""Text of a completion, with special tokens by name, of the prompt's text and the request."""
LENGTH = 4096


@contextmanager
def serve(model: str, complete: Completion, models: Any = None) -> Iterator[str]:
    """The address. `models`: the answer to /v1/models, in the place of a right one."""
    listed = {"data": [{"id": model, "max_model_len": LENGTH}]} if models is None else models

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(200, listed)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = complete(vocabulary_file.encoding().decode(body["prompt"]), body)
            if text.startswith("error "):
                self._send(int(text.split()[1]), {"message": text})
                return
            found = ids(text).tolist()[: body["max_tokens"]]
            self._send(200, {"choices": [{"token_ids": found}]})

        def _send(self, status: int, value: Any) -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *values: Any) -> None:
            """Nothing."""

    class Server(ThreadingHTTPServer):
        request_queue_size = 256  # as many questions come at once

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
