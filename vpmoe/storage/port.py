"""Which protocol a port speaks: asked once if it closes a connection without an answer to HTTP."""

import socket
import ssl
from urllib.parse import urlsplit

from vpmoe.storage.connections import SPEAKS_TLS, ConnectionFault, not_http

LISTENED = 0.5
"""Seconds to wait for a greeting. Servers of SSH, SMTP and MySQL speak first; one of HTTP never does."""


TIMEOUT = 3.0
"""Seconds for a connection, and for a TLS handshake."""


def greeting_fault(endpoint: str) -> ConnectionFault | None:
    """Why HTTP is not understood at an http:// endpoint: its server greets first, or speaks TLS.

    None if it does neither.
    """
    parts = urlsplit(endpoint)
    if parts.scheme != "http" or not parts.hostname:
        return None
    try:
        with socket.create_connection((parts.hostname, parts.port or 80), TIMEOUT) as connection:
            connection.settimeout(LISTENED)
            greeting = _received(connection)
            if greeting is not None:
                return not_http(greeting.partition("\n")[0]) if greeting else None
            connection.settimeout(TIMEOUT)
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is sent afterwards
            with context.wrap_socket(connection, server_hostname=parts.hostname):
                return SPEAKS_TLS
    except OSError:
        return None


def _received(connection: socket.socket) -> str | None:
    """What the server sends by itself, empty if it closes the connection; None if it waits."""
    try:
        return connection.recv(256).decode("latin-1")
    except TimeoutError:
        return None
