"""An API server of this process, and a terminal."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes import run_server
from tests.fakes import terminal as tmux


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[run_server.RunServer]:
    """The server that KUBECONFIG names. No proxy leads there."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    with run_server.serve(tmp_path) as it:
        monkeypatch.setenv("KUBECONFIG", str(it.kubeconfig))
        yield it


@pytest.fixture
def terminal(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tmux.Terminal]:
    """A terminal of 24 rows, and of 80 columns or as many as its parameter says."""
    with tmux.terminal(tmp_path / "tmux.socket", getattr(request, "param", 80)) as it:
        yield it
