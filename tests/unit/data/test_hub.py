"""The environment of the Hugging Face hub's client: what is malformed is named, and not tried again."""

import json
import os
import subprocess
import sys

import pytest

from vpmoe.provenance import CHECKOUT

ASK = """
import json, os, sys
from vpmoe.failure import classify_error
from vpmoe.process.environment import check_environment

assert "huggingface_hub" not in sys.modules
for variable, value in json.loads(sys.argv[1]):
    if os.fork():
        assert os.wait()[1] == 0
        continue
    os.environ[variable] = value
    try:
        check_environment()
        from vpmoe.pretrained import hub

        hub.commit_and_files("teacher.model", "hf://owner/name")
    except Exception as error:
        found = classify_error(error)
        print(json.dumps(f"{found.kind} {found.message}"), flush=True)
    os._exit(0)
"""
MALFORMED = [
    ("HF_ENDPOINT", "mirror"),
    ("HF_ENDPOINT", "ftp://mirror"),
    ("HF_ENDPOINT", "http://[::1"),
    ("HF_ENDPOINT", "http://mirror:99999"),
    ("HF_TOKEN", "é"),
    ("HF_HOME", "/dev/null"),
    ("HF_HUB_OFFLINE", "1"),
    ("HF_HUB_ETAG_TIMEOUT", "soon"),
    ("HTTPS_PROXY", "socks5://127.0.0.1:1"),
    ("HTTPS_PROXY", "http://[::1"),
    ("ALL_PROXY", "bad://"),
    ("SSL_CERT_FILE", "/none"),
]


@pytest.fixture(scope="module")
def messages() -> dict[tuple[str, str], str]:
    """Class and message of the error with each malformed variable. Each is set in its own process, forked
    before the client is imported: it reads most of its environment then."""
    found = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(MALFORMED)],
        cwd=CHECKOUT,
        env={"HF_ENDPOINT": "http://127.0.0.1:1", **os.environ},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(zip(MALFORMED, map(json.loads, found.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("variable, value", MALFORMED)
def test_a_malformed_environment_of_the_hub_is_permanent(
    messages: dict[tuple[str, str], str], variable: str, value: str
) -> None:
    message = messages[variable, value]
    assert message.startswith("Permanent ") and variable in message
