"""The environment of the Hugging Face hub's client: what is malformed is named, and not tried again."""

import os
import subprocess
import sys

import pytest

from vpmoe.provenance import CHECKOUT

ASK = """
from vpmoe.failure import classify_error
from vpmoe.process.environment import check_environment

try:
    check_environment()
    from vpmoe.pretrained import hub

    hub.commit_and_files("teacher.model", "hf://owner/name")
except Exception as error:
    found = classify_error(error)
    print(found.kind, found.message)
"""


@pytest.mark.parametrize(
    "variable, value",
    [
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
    ],
)
def test_a_malformed_environment_of_the_hub_is_permanent(variable: str, value: str) -> None:
    """In a process of its own: the client reads most of it when it is imported."""
    found = subprocess.run(
        [sys.executable, "-c", ASK],
        cwd=CHECKOUT,
        env={"HF_ENDPOINT": "http://127.0.0.1:1", **os.environ, variable: value},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.startswith("Permanent ") and variable in found.stdout, found.stdout
