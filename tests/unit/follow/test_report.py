"""`vpmoe report NAME`: the page of a run that is named as in the cluster."""

import re
from pathlib import Path

import pytest

from tests.fakes import recorded_run
from tests.fakes.followed_run import run_object, training
from tests.fakes.run_server import RunServer
from tests.fakes.simulated_cluster import manifest
from tests.fakes.store import S3
from vpmoe.cli.main import main


@pytest.fixture
def stored(server: RunServer, s3: S3) -> str:
    """The folder of a run that the server and the store have."""
    folder = recorded_run.store(s3)
    server.run = run_object(training())
    server.run["status"]["provenance"]["folder"] = folder
    server.run["spec"]["storage"] = {
        "endpoint": s3.endpoint,
        "bucket": folder.split("/")[2],
        "prefix": "tiny",
    }
    return folder


def test_folder_and_endpoint_come_from_the_run(
    stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
    monkeypatch.chdir(tmp_path)
    assert main(["report", "first", "--open", "--namespace=team"]) == 0
    page = tmp_path / "inflight.html"
    assert capsys.readouterr().out == f"{page}\n" and opened == [page.as_uri()]
    assert f'href="{stored}/run.json"' in page.read_text()


def test_the_environments_endpoint_goes_first_because_the_runs_may_be_inside_the_cluster(
    stored: str, server: RunServer, tmp_path: Path
) -> None:
    server.run["spec"]["storage"]["endpoint"] = "http://store.inside.svc:9000"
    assert main(["report", "first", "--output", str(tmp_path / "page.html")]) == 0


def test_without_a_browser_the_page_is_written_all_the_same(
    stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("webbrowser.open", lambda url: False)
    page = tmp_path / "page.html"
    assert main(["report", "first", "--open", "--output", str(page)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{page}\n" and page.exists() and "there is no browser here" in err


def test_a_run_without_a_folder_says_why(server: RunServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.run = manifest()
    assert main(["report", "first"]) == 1
    err = capsys.readouterr().err
    assert re.match(
        "vpmoe report: run first has no folder yet, because no step of it has started. `vpmoe st", err
    )
