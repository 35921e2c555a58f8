"""The S3 client: boto3's, configured for any S3-compatible server. Retries are ours (retries.py)."""

import ipaddress
import os
import re
import ssl
from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import boto3
import botocore.session
from botocore import handlers
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ConfigParseError,
    InvalidRegionError,
    PartialCredentialsError,
    ProfileNotFound,
)
from botocore.httpsession import ProxyConfiguration
from botocore.utils import get_environ_proxies, parse_timestamp

from vpmoe.storage.answers import check_answer, printable
from vpmoe.storage.errors import StorageError, is_transient, quoted, shown
from vpmoe.storage.retries import Patience

if TYPE_CHECKING:
    from botocore.model import OperationModel
    from mypy_boto3_s3 import S3Client

    from vpmoe.api.storage import StorageSpec

KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
SERVER = re.compile(r"(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+(?:%25[A-Za-z0-9._~-]+)?\])(?::([0-9]{1,5}))?")
"""Host and port of a URL."""

CONNECTIONS = 64
"""Connections kept open: several uploads or downloads of sixteen blocks each."""


def connect(spec: "StorageSpec", patience: Patience) -> "S3Client":
    """A client of the store that `spec` names; see Bucket.open for where credentials and endpoint come from.

    Sends nothing. Raises StorageError for what no store can ever accept: a region, an endpoint, a key or
    certificates that are malformed.
    """
    endpoint = os.environ.get("AWS_ENDPOINT_URL") or spec.endpoint
    check_environment(endpoint or "https://")
    check_spec(spec)
    if endpoint and not is_address(endpoint):
        raise _no_address(endpoint)
    check_proxy(endpoint or "https://s3.amazonaws.com")
    config = Config(
        signature_version="s3v4",
        connect_timeout=patience.connect,
        read_timeout=patience.read,
        retries={"total_max_attempts": 1, "mode": "standard"},  # retries.py tries again, see there
        request_checksum_calculation="when_required",  # some stores refuse the trailers of the default
        response_checksum_validation="when_required",
        max_pool_connections=CONNECTIONS,
        s3={
            "addressing_style": spec.addressing_style,
            "payload_signing_enabled": True,
        },  # the store proves each body as it comes in
    )
    try:
        session = botocore.session.get_session()
        session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_parse_time)
        client = boto3.session.Session(botocore_session=session).client(
            "s3", region_name=spec.region, config=config, endpoint_url=endpoint
        )
    except InvalidRegionError as error:
        raise _no_region(spec.region) from error
    except PartialCredentialsError as error:
        raise StorageError(f"{error}. Set both of {' and '.join(KEYS)}, or neither.", "Denied") from error
    except ProfileNotFound as error:
        name = printable(str(error.kwargs.get("profile")))
        raise StorageError(
            f"AWS_PROFILE is {name!r}, but there is no such profile in {_files()}. Correct the name, or "
            "unset AWS_PROFILE. In a pod storage.credentialsSecret names the Secret with the keys.",
            "Denied",
        ) from error
    except ConfigParseError as error:
        raise StorageError(
            f"{error.kwargs.get('path')}: not a configuration file of AWS tools. Correct it, or name "
            "another one in AWS_CONFIG_FILE or AWS_SHARED_CREDENTIALS_FILE. In a pod "
            "storage.credentialsSecret names the Secret with the keys.",
            "Refused",
        ) from error
    except (BotoCoreError, ValueError, TypeError, AttributeError, OSError) as error:
        if endpoint and str(error).startswith("Invalid endpoint"):
            raise _no_address(endpoint) from error
        # AttributeError and TypeError: botocore does not validate nested sections of its file.
        raise StorageError(
            f"The S3 client cannot be configured ({type(error).__name__}: {quoted(error)}). Check the AWS_* "
            f"variables and {_files()}.",
            "Unreachable" if is_transient(error) else "Refused",
        ) from error
    # botocore's own check comes first otherwise, and turns every page of status 200 into a status 500.
    client.meta.events.unregister(
        "before-parse.s3.*",
        handlers._handle_200_error,  # type: ignore[attr-defined]
    )
    client.meta.events.register_first("before-parse.s3.*", _check_answer)
    client.meta.events.register_last("before-call.s3", _without_expect)
    return client


def _parse_time(text: str) -> datetime | None:
    """A time in an answer; None if it is none. We need no object's times, so a malformed one does no harm."""
    try:
        return parse_timestamp(text)
    except (ValueError, RuntimeError):  # the second from a number that is no time
        return None


def _check_answer(operation_model: "OperationModel", response_dict: dict[str, Any], **context: Any) -> None:
    """Handler of every answer, before botocore parses it."""
    check_answer(operation_model.name, response_dict)


def _without_expect(params: dict[str, Any], **context: Any) -> None:
    """Handler of every request: remove botocore's `Expect: 100-continue`.

    A server or a proxy that does not answer it delays each PUT by a second, until botocore sends the body all
    the same. Bodies are at most a block, so there is little to gain from asking first.
    """
    params["headers"].pop("Expect", None)


def _files() -> str:
    """The files that AWS tools read."""
    return " or ".join(
        os.environ.get(name) or default
        for name, default in (
            ("AWS_CONFIG_FILE", "~/.aws/config"),
            ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"),
        )
    )


def check_spec(spec: "StorageSpec") -> None:
    """Raise StorageError if a field of the run can be no region, bucket or prefix of any store."""
    if not spec.region.isprintable():  # botocore accepts a line break at the end
        raise _no_region(spec.region)
    if ".." in spec.bucket or _is_ipv4(spec.bucket):
        raise StorageError(
            f"storage.bucket {spec.bucket!r} is not the name of a bucket: it has two dots in a row, or is an "
            "IP address. Correct it.",
            "Refused",
        )
    prefix = spec.prefix
    if not prefix.isprintable() or {".", ".."} & set(prefix.split("/")):
        raise StorageError(
            f"storage.prefix {prefix!r} has a control character, or . or .. between two slashes, which "
            "stores resolve in different ways. Choose another.",
            "Refused",
        )


def is_address(endpoint: str) -> bool:
    """Whether a URL can be that of a server: its host and its port are valid. The server may not exist."""
    try:
        server = urlsplit(endpoint).netloc.rpartition("@")[2]
    except ValueError:
        return False
    found = SERVER.fullmatch(server)
    if found is None or (found[1] is not None and not 0 < int(found[1]) < 2**16):
        return False
    host = server.removesuffix(f":{found[1]}") if found[1] is not None else server
    last = host.removesuffix(".").rpartition(".")[2]
    return host.startswith("[") or not last.isdigit() or _is_ipv4(host.removesuffix("."))


def check_proxy(endpoint: str) -> None:
    """Raise StorageError if the proxy that the environment names for this endpoint can be no server."""
    scheme = urlsplit(endpoint).scheme
    proxy = ProxyConfiguration(get_environ_proxies(endpoint)).proxy_url_for(endpoint)
    if proxy is None or is_address(proxy):
        return
    name = next((name for name in os.environ if name == f"{scheme}_proxy"), f"{scheme.upper()}_PROXY")
    written = printable(os.environ.get(name, proxy).rpartition("@")[2])
    raise StorageError(
        f"{name}: {written!r} is not the address of a proxy. Write it as http://host:port (https:// for a "
        f"proxy that speaks TLS; others, such as socks5://, are not supported), unset it, or name the host "
        f"of {shown(endpoint)} in NO_PROXY (in a pod: runtime.env).",
        "Refused",
    )


def _is_ipv4(text: str) -> bool:
    try:
        ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return True


def _no_region(region: str) -> StorageError:
    return StorageError(
        f"storage.region {region!r} is not the name of a region. Write it like eu-west-3; most services "
        "other than AWS ignore it.",
        "Refused",
    )


def _no_address(endpoint: str) -> StorageError:
    server = endpoint.rpartition("@")[2]  # without a user's part, which may hold a password
    return StorageError(
        f"storage.endpoint (or AWS_ENDPOINT_URL): {server!r} is not the address of a server. A host name has "
        "letters, digits, hyphens and dots; a port is a number from 1 to 65535.",
        "Refused",
    )


def check_environment(endpoint: str) -> None:
    """Raise StorageError if a key or the certificates in the environment are malformed. No key is quoted.

    An empty key would count as none, so that the identity of the node or of the service account is used.
    """
    for name in (*KEYS, "AWS_SESSION_TOKEN"):
        value = os.environ.get(name, "")
        if name in KEYS and name in os.environ and not value:
            raise StorageError(
                f"{name} is empty. Write the key (in a pod it is a key of the Secret that "
                "storage.credentialsSecret names), or unset it.",
                "Denied",
            )
        if not value.isascii() or any(not "!" <= character <= "~" for character in value):
            raise StorageError(
                f"{name} contains a line break, a space or another character that no key has. Write it again "
                "without (in a pod it is a key of the Secret that storage.credentialsSecret names: "
                "kubectl create secret … --from-literal adds none).",
                "Denied",
            )
    bundle = os.environ.get("AWS_CA_BUNDLE")
    missing = bundle and not os.path.exists(bundle)  # noqa: PTH110 (False where pathlib raises: a path too long)
    if missing and endpoint.startswith("https://"):
        raise StorageError(
            f"AWS_CA_BUNDLE is {bundle}, and there is no such file. Correct or unset it. In a pod it is the "
            "key ca.crt of the Secret that storage.caSecret names.",
            "Refused",
        )
    if bundle and os.path.isfile(bundle):  # noqa: PTH113 (False where pathlib raises: a path too long)
        try:
            ssl.create_default_context(cafile=bundle)
        except (ssl.SSLError, OSError) as error:
            raise StorageError(
                f"{bundle} (AWS_CA_BUNDLE) holds no certificates in PEM format: {error}. In a pod it is the "
                "key ca.crt of the Secret that storage.caSecret names.",
                "Refused",
            ) from error
