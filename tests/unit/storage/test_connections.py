"""No answer: what answers in the store's place at the endpoint, or does not, is named with a remedy. What
only a person can change ends at once; everything else is retried."""

import contextlib
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from devcluster import certificates
from tests.fakes.fault_proxy import faulty
from tests.fakes.store import S3
from vpmoe.api.storage import StorageSpec
from vpmoe.process.launcher import free_port
from vpmoe.storage import Bucket, Patience, StorageError
from vpmoe.storage.connections import connection_fault

SHORT_PATIENCE = Patience(attempts=3, connect=1, read=1, first_pause=0.01, longest_pause=0.02)

type Server = Callable[[socket.socket], None]


@contextmanager
def listening(serve: Server) -> Iterator[int]:
    """A TCP server that calls `serve` for each connection; yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def handle(connection: socket.socket) -> None:
            with contextlib.suppress(OSError), connection:
                serve(connection)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=handle, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def greets(line: bytes) -> Server:
    """A server that speaks first and then hangs up, as one of SSH does."""

    def serve(connection: socket.socket) -> None:
        connection.sendall(line)
        connection.recv(100)

    return serve


def answers(data: bytes) -> Server:
    """A server that answers any request so."""

    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            pass

    return serve


def silent(connection: socket.socket) -> None:
    """A server that never answers."""
    time.sleep(5)


def error_of(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> StorageError:
    """The error of a probe. The endpoint is the run's, as in a pod."""
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    bucket = Bucket.open(StorageSpec(bucket="vpmoe", endpoint=endpoint), patience=SHORT_PATIENCE)
    with pytest.raises(StorageError) as caught:
        bucket.probe()
    text = str(caught.value)
    assert (
        text.startswith("s3://vpmoe/.probe/") and f"PutObject with If-None-Match at {bucket.endpoint}" in text
    )
    assert "hunter2" not in text and len(text) < 800 and text.isprintable()
    return caught.value


OTHERS: dict[str, tuple[str, Server, str]] = {
    "ssh": (
        "http",
        greets(b"SSH-2.0-OpenSSH_9.9\r\n"),
        r"another service than HTTP .*'SSH-2\.0.*host and port",
    ),
    "smtp": ("http", greets(b"220 mail.example ESMTP\r\n"), "another service than HTTP .*ESMTP"),
    "mysql": ("http", greets(b"\x4a\x00\x00\x00\x0a8.0.36\x00\x00"), "another service than HTTP"),
    "redis": (
        "http",
        answers(b"-ERR unknown command\r\n"),
        "another service than HTTP .*-ERR unknown command",
    ),
    "text": ("http", answers(b"hello\n"), "another service than HTTP .*'hello'"),
    "tls-alert": ("http", answers(b"\x15\x03\x01\x00\x02\x02\x46"), "speaks TLS.*The endpoint is https"),
    "tls-go": (
        "http",
        answers(b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n"),
        "speaks TLS.*The endpoint is https",
    ),
    "http-for-https": (
        "https",
        answers(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
        "does not speak TLS.*The endpoint is http there",
    ),
    "ssh-for-https": ("https", greets(b"SSH-2.0-OpenSSH_9.9\r\n"), "does not speak TLS"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_service_at_the_address_is_named_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, serve, message = OTHERS[name]
    with listening(serve) as port:
        found = error_of(f"{scheme}://me:hunter2@127.0.0.1:{port}", monkeypatch)
    assert re.search(message, str(found)), str(found)
    assert found.reason == "Refused" and not found.retriable and "times" not in str(found)


def closes(connection: socket.socket) -> None:
    """A server that hangs up on any request."""
    connection.recv(65536)


AWAY: dict[str, tuple[str, str]] = {
    "refused": (
        "http://127.0.0.1:{free}",
        r"127\.0\.0\.1:\d+: the connection was refused: nothing listens on this port",
    ),
    "refused-tls": ("https://127.0.0.1:{free}", "the connection was refused"),
    "refused-ipv6": ("http://[::1]:{free}", r"\[::1\]:\d+: the connection was refused"),
    "no-such-name": ("http://store.invalid:9000", r"store\.invalid:9000: the host's name cannot be resolved"),
    "closes": ("http://127.0.0.1:{closes}", "the connection was closed without an answer"),
    "closes-tls": ("https://127.0.0.1:{closes}", "closed during the TLS handshake"),
    "silent": ("http://127.0.0.1:{silent}", "no answer in time"),
}


@pytest.mark.parametrize("name", AWAY)
def test_a_store_that_is_away_is_retried_and_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint, message = AWAY[name]
    with listening(closes) as closing, listening(silent) as hanging:
        found = error_of(endpoint.format(free=free_port(), closes=closing, silent=hanging), monkeypatch)
    assert re.search(rf"failed 3 times in \d+ s, last with .*{message}", str(found)), str(found)
    assert "Check that storage.endpoint is right" in str(found) and found.reason == "Unreachable"


PROXIES: dict[str, tuple[bytes, str, bool]] = {
    "login": (b"407 Proxy Authentication Required", r"wants a user and password \(407\).*HTTPS_PROXY", False),
    "forbidden": (b"403 Forbidden", r"does not connect to this host \(403\).*NO_PROXY", False),
    "not-allowed": (b"405 Method Not Allowed", r"does not connect to this host \(405\)", False),
    "away": (b"502 Bad Gateway", r"cannot reach the host \(502\).*HTTPS_PROXY", True),
    "overloaded": (b"503 Service Unavailable", r"cannot reach the host \(503\)", True),
}


@pytest.mark.parametrize("name", PROXIES)
def test_a_proxy_that_does_not_let_pass_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    status, message, retried = PROXIES[name]
    with listening(answers(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n")) as port:
        monkeypatch.setenv("HTTPS_PROXY", f"http://me:hunter2@127.0.0.1:{port}")
        for variable in ("NO_PROXY", "no_proxy", "https_proxy"):
            monkeypatch.delenv(variable, raising=False)
        found = error_of("https://s3.example.com", monkeypatch)
    assert re.search(message, str(found)), str(found)
    assert found.retriable == retried == ("failed 3 times" in str(found))


@pytest.mark.parametrize(
    "proxy",
    [
        "foo:bar:baz",
        "http://host:port",
        "http://[::1",
        " ",
        "http://",
        "http://:3128",
        "http://a b:3128",
        "http://host:99999",
        "http://me:hunter2@host:0",
        "socks5://127.0.0.1:1080",
        "ftp://127.0.0.1:21",
        "HTTP://127.0.0.1:3128",
    ],
)
@pytest.mark.parametrize("scheme, variable", [("http", "HTTP_PROXY"), ("https", "https_proxy")])
def test_a_malformed_proxy_is_named_at_once(
    proxy: str, scheme: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_PROXY", "no_proxy", "http_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "key")
    monkeypatch.setenv(variable, proxy)
    spec = StorageSpec(bucket="none", endpoint=f"{scheme}://s3.example.com")
    with pytest.raises(StorageError) as caught:
        Bucket.open(spec)
    found = caught.value
    assert found.reason == "Refused" and "hunter2" not in str(found)
    assert str(found).startswith(f"{variable}: ") and "is not the address of a proxy" in str(found)
    monkeypatch.setenv("NO_PROXY", "s3.example.com")
    Bucket.open(spec)


def test_a_proxy_that_speaks_no_tls_is_named(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", s3.endpoint.replace("http://", "https://me:hunter2@"))
    found = error_of("http://s3.example.com", monkeypatch)
    assert re.search("no TLS connection to the proxy .*Write HTTP_PROXY", str(found)), str(found)
    assert found.reason == "Refused" and "hunter2" not in str(found)


@pytest.fixture(scope="module")
def certificates_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an authority (ca) and certificates for 127.0.0.1 (store) and for another host (other)."""
    folder = tmp_path_factory.mktemp("tls")
    certificates.authority(folder, "test")
    certificates.certificate(folder, "store", "/CN=store", "subjectAltName=IP:127.0.0.1")
    certificates.certificate(folder, "other", "/CN=other", "subjectAltName=DNS:other.example")
    return folder


@pytest.mark.parametrize(
    "certificate, trusted, message",
    [
        ("store", False, r"not trusted \(.*storage\.caSecret"),
        ("other", True, r"for another host \(.*storage\.endpoint"),
        ("ca", False, r"not trusted \(.*storage\.caSecret"),
    ],
)
def test_a_certificate_that_does_not_fit_fails_at_once(
    s3: S3,
    certificates_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    certificate: str,
    trusted: bool,
    message: str,
) -> None:
    if trusted:
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificates_folder / "ca.crt"))
    with faulty(s3.endpoint, certificate=certificates_folder / certificate) as store:
        found = error_of(store.endpoint, monkeypatch)
    assert re.search(message, str(found)), str(found)
    assert found.reason == "Refused" and "times" not in str(found)


@pytest.mark.parametrize("code, message", [(10, "has expired.*renewed"), (9, "not valid yet.*clock")])
def test_the_dates_of_a_certificate_are_named(code: int, message: str) -> None:
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_code, error.verify_message = code, "certificate"
    fault = connection_fault(error)
    assert fault and fault.lasting and re.search(message, f"{fault.what}. {fault.remedy}")


def test_a_tls_port_that_hangs_up_on_http_is_named_at_once(
    s3: S3, certificates_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with faulty(s3.endpoint, certificate=certificates_folder / "store") as store:
        found = error_of(store.endpoint.replace("https", "http"), monkeypatch)
    assert "speaks TLS. The endpoint is https" in str(found) and found.reason == "Refused"
