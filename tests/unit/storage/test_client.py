"""What AWS tools read from the environment and from files: faults are named before a request, or with it."""

import re
from pathlib import Path

import pytest

from tests.fakes.store import S3
from vpmoe.api.storage import StorageSpec
from vpmoe.process.launcher import free_port
from vpmoe.storage import Bucket, Patience, StorageError

SHORT_PATIENCE = Patience(attempts=2, connect=1, read=1, first_pause=0.01)
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "hunter2"}
ROLE = {"AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/vpmoe", "AWS_ROLE_SESSION_NAME": "session"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of AWS tools, with none of this machine's settings."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    (tmp_path / "token").write_text("a token of a service account")
    return tmp_path


def error_of(endpoint: str) -> StorageError:
    with pytest.raises(StorageError) as caught:
        Bucket.open(StorageSpec(bucket="vpmoe", endpoint=endpoint), patience=SHORT_PATIENCE).probe()
    text = str(caught.value)
    assert "hunter2" not in text and text.isprintable() and len(text) < 800, text
    return caught.value


ENVIRONMENT: dict[str, tuple[dict[str, str], str, str]] = {
    "profile": (
        {"AWS_PROFILE": "gone"},
        "Denied",
        "AWS_PROFILE is 'gone', but there is no such profile in .*/config or ",
    ),
    "profile-beside-keys": (
        {**KEYS, "AWS_PROFILE": "gone"},
        "Denied",
        "AWS_PROFILE is 'gone'.*unset AWS_PROFILE",
    ),
    "default-profile": ({"AWS_DEFAULT_PROFILE": "gone"}, "Denied", "'gone', but there is no such profile"),
    "profile-with-newline": ({"AWS_PROFILE": "gone\n"}, "Denied", "'gone ', but there is no such profile"),
    "certificates": (
        {**KEYS, "AWS_CA_BUNDLE": "/nonexistent/ca.crt"},
        "Refused",
        "AWS_CA_BUNDLE is /nonexistent.*caSecret",
    ),
    "defaults-mode": ({**KEYS, "AWS_DEFAULTS_MODE": "x"}, "Refused", "InvalidDefaultsMode.*Check the AWS_"),
    "number": ({"AWS_METADATA_SERVICE_TIMEOUT": "x"}, "Refused", "invalid literal.*Check the AWS_"),
    "token-file": (
        {**ROLE, "AWS_WEB_IDENTITY_TOKEN_FILE": "/nonexistent/token"},
        "Denied",
        "/nonexistent/token.*service account",
    ),
    "token-folder": (
        {**ROLE, "AWS_WEB_IDENTITY_TOKEN_FILE": "/tmp"},
        "Denied",
        "no credentials could be had.*/tmp",
    ),
    "no-role": ({"AWS_WEB_IDENTITY_TOKEN_FILE": "/tmp"}, "Refused", "AWS_ROLE_ARN"),
    "container-host": (
        {"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://example.com/"},
        "Refused",
        "Unsupported host",
    ),
}


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_a_fault_of_the_environment_is_named(home: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    environment, reason, message = ENVIRONMENT[name]
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    found = error_of("https://127.0.0.1:9")
    assert re.search(message, str(found)) and found.reason == reason and not found.retriable, str(found)


FILES: dict[str, tuple[str, bytes, str, str]] = {
    "no-section": ("config", b"region = x\n", "Refused", "/config: not a configuration file"),
    "no-text": ("config", b"\xff\xfe\x00", "Refused", "/config: not a configuration file"),
    "cut-off": ("credentials", b"[default\naws_access_key_id = a", "Refused", "/credentials: not a config"),
    "section-twice": (
        "credentials",
        b"[default]\na=1\n[default]\nb=1",
        "Refused",
        "/credentials: not a config",
    ),
    "half": ("credentials", b"[default]\naws_access_key_id = a", "Denied", "Set both of AWS_ACCESS_KEY_ID"),
    "not-nested": ("config", b"[default]\ns3 = x", "Refused", "cannot be configured.*/config"),
    "no-source": (
        "config",
        b"[default]\nrole_arn = arn:x\nsource_profile = gone",
        "Refused",
        '"gone".*does not exist',
    ),
    "source-loop": (
        "config",
        b"[default]\nrole_arn = arn:x\nsource_profile = b\n"
        b"[profile b]\nrole_arn = arn:y\nsource_profile = default",
        "Refused",
        "Infinite loop",
    ),
    "sso": (
        "config",
        b"[default]\nsso_start_url = https://x.example\nsso_region = x-1\n"
        b"sso_account_id = 1\nsso_role_name = r",
        "Denied",
        "SSO Token.*AWS_PROFILE",
    ),
    "program-missing": (
        "config",
        b"[default]\ncredential_process = /nonexistent/p",
        "Refused",
        "/nonexistent/p",
    ),
    "program-fails": (
        "config",
        b"[default]\ncredential_process = /bin/sh -c 'echo hunter2 >&2; exit 1'",
        "Refused",
        "credential_process failed",
    ),
    "program-says-nothing": (
        "config",
        b"[default]\ncredential_process = /bin/echo hunter2",
        "Refused",
        "cannot be configured",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_fault_of_a_file_is_named(s3: S3, home: Path, name: str) -> None:
    file, content, reason, message = FILES[name]
    (home / file).write_bytes(content)
    found = error_of(s3.endpoint)
    assert re.search(message, str(found)) and found.reason == reason, str(found)


def test_a_service_that_gives_credentials_is_named_and_retried(
    s3: S3, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = f"http://127.0.0.1:{free_port()}"
    for name, value in {**ROLE, "AWS_WEB_IDENTITY_TOKEN_FILE": str(home / "token")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", away)
    found = error_of(s3.endpoint)
    assert found.retriable and re.search(
        rf"last with \w+ \({away.removeprefix('http://')}: .*refused", str(found)
    )
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", s3.endpoint)  # answers, and is no STS
    found = error_of(s3.endpoint)
    assert (
        "no credentials could be had (AssumeRoleWithWebIdentity: 4" in str(found) and found.reason == "Denied"
    )
    monkeypatch.delenv("AWS_WEB_IDENTITY_TOKEN_FILE")
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", away)
    assert error_of(s3.endpoint).retriable
