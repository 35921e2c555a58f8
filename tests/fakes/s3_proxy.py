"""A TCP proxy in front of the S3 store, on an address that pods and host share.

It can be disconnected: a store that is away.
"""

import contextlib
import socket
import threading
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit


class S3Proxy:
    """Forwards connections to the store at `target`.

    While disconnected, it has no connection and refuses new ones.
    """

    def __init__(self, target: str, address: str) -> None:
        parts = urlsplit(target)
        self._target = (parts.hostname or "", parts.port or 80)
        self._address, self._port = address, 0
        self._sockets: set[socket.socket] = set()
        self._listener: socket.socket | None = None

    @property
    def endpoint(self) -> str:
        return f"http://{self._address}:{self._port}"

    def connect(self) -> None:
        """Accept connections; after `disconnect` on the same port as before."""
        listener = socket.create_server((self._address, self._port), reuse_port=True)
        self._listener, self._port = listener, listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def disconnect(self) -> None:
        """Close all connections, and refuse new ones."""
        listener, self._listener = self._listener, None
        for one in ([listener] if listener else []) + list(self._sockets):
            _close(one)
        self._sockets.clear()

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disconnect()

    def _accept(self, listener: socket.socket) -> None:
        while self._listener is listener:
            try:
                near, _ = listener.accept()
                far = socket.create_connection(self._target)
            except OSError:
                return
            self._sockets |= {near, far}
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=_forward, args=(source, sink), daemon=True).start()


def _forward(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):  # disconnected
        while data := source.recv(65536):
            sink.sendall(data)
    _close(sink)


def _close(one: socket.socket) -> None:
    with contextlib.suppress(OSError):  # never connected, or closed by the other side
        one.shutdown(socket.SHUT_RDWR)
    one.close()
