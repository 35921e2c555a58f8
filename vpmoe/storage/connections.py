"""Why a connection to the store failed: the cause behind botocore's exceptions. Pure; no network."""

import re
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import BadStatusLine, RemoteDisconnected

from botocore.exceptions import (
    ConnectTimeoutError,
    EndpointConnectionError,
    HTTPClientError,
    ProxyConnectionError,
    ReadTimeoutError,
)
from urllib3.exceptions import LocationValueError, NameResolutionError, ProxySchemeUnknown
from urllib3.util.ssl_match_hostname import CertificateError

from vpmoe.storage.answers import printable

TUNNEL = re.compile(r"Tunnel connection failed: (\d{3})")
"""Python's words for a proxy that refuses to connect to a host."""
NOT_TLS = (
    "WRONG_VERSION_NUMBER",
    "UNKNOWN_PROTOCOL",
    "HTTP_REQUEST",
    "PACKET_LENGTH_TOO_LONG",
    "RECORD_LAYER_FAILURE",
)
"""OpenSSL's reasons if the server's first bytes are not TLS."""
TLS_ALERT = "\x15\x03"
"""First bytes of a TLS alert: a server's answer to a request that is not encrypted."""
EXPIRED, NOT_YET_VALID, OTHER_HOST, OTHER_ADDRESS = 10, 9, 62, 64
"""OpenSSL's codes of what is wrong with a certificate; other codes mean that its issuer is not trusted."""
AUTHORITY = "storage.caSecret (or AWS_CA_BUNDLE) holds the certificate of its authority"


@dataclass(frozen=True)
class ConnectionFault:
    """Why there was no answer. `remedy` is a sentence; empty if only time, or whoever runs the store or the
    network, can help."""

    what: str
    remedy: str = ""
    lasting: bool = False
    """Whether it remains until somebody changes something."""


SPEAKS_TLS = ConnectionFault(
    "the port speaks TLS", "The endpoint is https: write storage.endpoint as https://….", lasting=True
)


def connection_fault(error: BaseException) -> ConnectionFault | None:
    """What failed; None for an exception that is about no connection, or of which nothing more is known."""
    for cause in causes(error):
        if isinstance(cause, ssl.SSLError) and isinstance(error, ProxyConnectionError):
            return _proxy_tls_fault(error, cause)
        if isinstance(cause, ssl.SSLError):
            return _tls_fault(cause)
        if isinstance(cause, CertificateError):
            return _other_host(printable(str(cause)))
        if isinstance(cause, BadStatusLine) and not isinstance(cause, RemoteDisconnected):
            return not_http(str(getattr(cause, "line", "")))
        if isinstance(cause, LocationValueError | ProxySchemeUnknown):
            return ConnectionFault(
                "an address is malformed: of a proxy, or the one that a redirect names",
                "Write HTTP_PROXY and HTTPS_PROXY (in a pod: runtime.env) as http://host:port, or unset "
                "them; if they are not set, correct storage.endpoint.",
                lasting=True,
            )
    if isinstance(error, ProxyConnectionError):
        return _proxy_fault(error)
    if any(isinstance(cause, NameResolutionError | socket.gaierror) for cause in causes(error)):
        return ConnectionFault("the host's name cannot be resolved")
    if any(isinstance(cause, ConnectionRefusedError) for cause in causes(error)):
        return ConnectionFault("the connection was refused: nothing listens on this port")
    if isinstance(error, ConnectTimeoutError):
        return ConnectionFault("no connection in time; a firewall or a NetworkPolicy may drop it")
    if isinstance(error, ReadTimeoutError):
        return ConnectionFault("no answer in time")
    if closed_early(error):
        return ConnectionFault("the connection was closed without an answer")
    if type(error) is HTTPClientError and isinstance(error.kwargs.get("error"), TypeError | ValueError):
        return ConnectionFault(  # as urllib3 does after a redirect of status 303
            "the answer is none of S3",
            "Another service or the login page of a proxy answers at storage.endpoint. Correct the endpoint, "
            "or name its host in NO_PROXY (in a pod: runtime.env).",
            lasting=True,
        )
    system = next((cause for cause in causes(error) if isinstance(cause, OSError) and cause.strerror), None)
    if isinstance(error, EndpointConnectionError) and system is not None:
        return ConnectionFault(f"no connection: {printable(str(system.strerror))}")
    return None


def closed_early(error: BaseException) -> bool:
    """Whether the server closed the connection without an answer, as one of another protocol does."""
    return any(isinstance(cause, RemoteDisconnected | ConnectionResetError) for cause in causes(error))


def causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and all that it wraps, the outermost first."""
    pending, seen = [error], set()
    while pending:
        one = pending.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        wrapped = [*one.args, getattr(one, "kwargs", {}).get("error"), getattr(one, "reason", None)]
        pending += [
            other for other in (*wrapped, one.__cause__, one.__context__) if isinstance(other, BaseException)
        ]


def _tls_fault(error: ssl.SSLError) -> ConnectionFault:
    reason = getattr(error, "reason", None) or ""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _certificate_fault(error)
    if any(known in reason for known in NOT_TLS):
        return ConnectionFault(
            "the server does not speak TLS on this port",
            "The endpoint is http there: write storage.endpoint as http://…, or name the port that speaks "
            "TLS.",
            lasting=True,
        )
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError | ssl.SSLWantReadError) or not reason:
        return ConnectionFault("the connection was closed during the TLS handshake")
    return ConnectionFault(
        f"no TLS connection: {printable(reason)}",
        f"Check that the server offers TLS 1.2 or newer without a client certificate, and that {AUTHORITY}.",
        lasting=True,
    )


def _certificate_fault(error: ssl.SSLCertVerificationError) -> ConnectionFault:
    code, why = error.verify_code, printable(error.verify_message or "")
    if code == EXPIRED:
        return ConnectionFault(
            "the server's certificate has expired",
            "Have it renewed; if it has not expired, set this machine's clock.",
            lasting=True,
        )
    if code == NOT_YET_VALID:
        return ConnectionFault(
            "the server's certificate is not valid yet", "Set this machine's clock.", lasting=True
        )
    if code in (OTHER_HOST, OTHER_ADDRESS):
        return _other_host(why)
    return ConnectionFault(
        f"the server's certificate is not trusted ({why})",
        f"Check that {AUTHORITY}, the issuer of the server's certificate.",
        lasting=True,
    )


def _other_host(why: str) -> ConnectionFault:
    return ConnectionFault(
        f"the server's certificate is for another host ({why})",
        "Write in storage.endpoint a host name that the certificate has; if the host name begins with the "
        "bucket's, set storage.addressingStyle to path.",
        lasting=True,
    )


def not_http(first_line: str) -> ConnectionFault:
    """The fault of a server whose first line is not one of HTTP."""
    if first_line.startswith(TLS_ALERT):
        return SPEAKS_TLS
    begins = f" (it begins with {printable(first_line.strip())[:40]!r})" if first_line.strip() else ""
    return ConnectionFault(
        f"another service than HTTP answers there{begins}",
        "Correct the host and port of storage.endpoint.",
        lasting=True,
    )


def _proxy_tls_fault(error: ProxyConnectionError, cause: ssl.SSLError) -> ConnectionFault:
    what, proxy = _tls_fault(cause).what, _address_of_proxy(error)
    return ConnectionFault(
        f"no TLS connection to the proxy {proxy}: {what}",
        "Write HTTP_PROXY and HTTPS_PROXY (in a pod: runtime.env) as http://host:port if the proxy speaks "
        "http; if it speaks TLS, AWS_CA_BUNDLE (in a pod: storage.caSecret) must hold the certificate of its "
        "authority. Or name the endpoint's host in NO_PROXY.",
        lasting=True,
    )


def _address_of_proxy(error: Exception) -> str:
    """Without user and password."""
    return printable(str(getattr(error, "kwargs", {}).get("proxy_url", "")).rpartition("@")[2])


def _proxy_fault(error: HTTPClientError | ProxyConnectionError) -> ConnectionFault:
    tunnel = next((found for cause in causes(error) if (found := TUNNEL.search(str(cause)))), None)
    status = int(tunnel[1]) if tunnel else 0
    proxy = _address_of_proxy(error)
    bypass = "or name the endpoint's host in NO_PROXY (in a pod: runtime.env)"
    if status == 407:
        return ConnectionFault(
            f"the proxy {proxy} wants a user and password (407)",
            f"Write them into HTTPS_PROXY (in a pod: of a Secret, by runtime.envFrom), {bypass}.",
            lasting=True,
        )
    if 400 <= status < 500 and status not in (408, 429):
        return ConnectionFault(
            f"the proxy {proxy} does not connect to this host ({status})",
            f"Have it allowed there, {bypass}.",
            lasting=True,
        )
    return ConnectionFault(
        f"the proxy {proxy} does not answer or cannot reach the host" + (f" ({status})" if status else ""),
        f"Check HTTPS_PROXY and HTTP_PROXY (in a pod: runtime.env), {bypass}.",
    )
