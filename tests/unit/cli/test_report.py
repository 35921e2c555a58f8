"""`vpmoe report`: the page of a run's folder, and what it says to a wrong address or file."""

from pathlib import Path

import pytest

from tests.fakes import recorded_run
from tests.fakes.store import S3
from vpmoe.cli.main import main


def test_it_writes_the_page_and_nothing_to_the_bucket(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url, folder = recorded_run.store(s3), s3.folder
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.chdir(tmp_path)
    assert main(["report", url]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'inflight.html'}\n"
    text = (tmp_path / "inflight.html").read_text()
    assert text.startswith("<!DOCTYPE html>") and f'href="{url}/run.json"' in text
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main(["report", url, "--output", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").exists()


def test_a_wrong_address_and_a_file_that_cannot_be_written_are_named(
    s3: S3, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "s3://none/datasets/1"]) == 65
    assert (
        "vpmoe report: s3://none/datasets/1 is not the folder of a run. Give s3://" in capsys.readouterr().err
    )
    url = recorded_run.store(s3)
    assert main(["report", f"{url[:-1]}e"]) == 65
    assert "run.json does not exist, so no job of this run has started." in capsys.readouterr().err
    assert main(["report", url, "--output", str(tmp_path)]) == 65
    assert capsys.readouterr().err == (
        f"vpmoe report: --output {tmp_path}: Is a directory. Name a file that can be written.\n"
    )
