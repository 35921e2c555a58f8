"""`vpmoe export` and `vpmoe chat`: from a run's folder in the bucket to an answer on this machine."""

import io
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.fakes import pod_user
from tests.fakes.finished_stages import FinishedStage, finish_stage
from tests.fakes.store import S3
from tests.fakes.waiting import wait_until
from vpmoe.checkpoint.format import open_weights
from vpmoe.cli import chat as chat_command
from vpmoe.cli.main import main
from vpmoe.data import vocabulary_file
from vpmoe.data.vocabulary import CHANNEL, END, MESSAGE, RETURN, START
from vpmoe.export.step import export_stage
from vpmoe.inference.chat import Answer, ChatModel
from vpmoe.model.learner import Learner
from vpmoe.process.board import ProgressBoard
from vpmoe.storage import StorageError, manifest, paths

ROOT = Path(__file__).parents[3]
STEP = "vanilla-export"
QUESTION = "Why is the sky blue?"


@pytest.fixture(scope="module")
def finished(
    s3: S3, sample_parquet: list[Path], student: Learner, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FinishedStage]:
    """A stage that has finished and is not exported; in a bucket with a prefix."""
    found = finish_stage(s3, sample_parquet, student, tmp_path_factory.mktemp("stage"))
    yield found
    shutil.rmtree(found.folder)


@pytest.fixture(scope="module")
def model(finished: FinishedStage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, made from the checkpoint."""
    folder = tmp_path_factory.mktemp("local") / "deep" / "model"
    assert main(["export", finished.url, "--to", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def chat(model: Path) -> ChatModel:
    return ChatModel(model)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_model_that_is_not_exported_is_made_with_a_statement_of_its_files(
    model: Path, finished: FinishedStage
) -> None:
    stated = manifest.parse(
        f"{paths.model(finished.run, 'vanilla')}/manifest.json", content(model)["manifest.json"]
    )
    assert set(stated.subjects) | {"manifest.json"} == set(content(model))
    assert (stated.provenance.step, stated.provenance.run) == ("vanilla-export", finished.run.identity)
    assert (model.stat().st_mode & 0o777, (model / "README.md").stat().st_mode & 0o777) == (0o755, 0o644)
    assert [path.name for path in model.parent.iterdir()] == ["model"]


def export_as_a_pod(finished: FinishedStage, scratch: Path) -> None:
    """Run the export job as a user without name and home, who writes to TMPDIR only."""
    scratch.mkdir()
    scratch.chmod(0o777)
    written = finished.run.document()
    written["metadata"] = {"name": finished.run.metadata.name, "namespace": "default"}
    (scratch / "run.yaml").write_text(yaml.safe_dump(written))
    command = [sys.executable, "-m", "jobs.export", "--run", str(scratch / "run.yaml"), "--step", STEP]
    found = subprocess.run(
        [*pod_user.COMMAND, *command],
        cwd=ROOT,
        env=pod_user.environment(scratch),
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert list(scratch.glob("vpmoe_*")) == []


def test_a_model_that_the_job_has_exported_is_downloaded_and_is_the_same(
    model: Path, finished: FinishedStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished.run
    try:
        export_as_a_pod(finished, tmp_path / "pod")
        progress = finished.bucket.get_json(paths.progress(run, STEP))
        url = finished.bucket.url(paths.model(run, "vanilla"))
        assert (progress["state"], progress["model"]) == ("Succeeded", url)
        assert main(["export", f"{finished.url}/", "--stage", "vanilla", "--to", str(tmp_path / "m")]) == 0
        made, downloaded = content(model), content(tmp_path / "m")
        assert downloaded.pop("manifest.json") == finished.bucket.get(
            f"{paths.model(run, 'vanilla')}/manifest.json"
        )
        del made["manifest.json"]
        assert downloaded == made
        assert f"Downloading {finished.url}/models/vanilla" in capsys.readouterr().out
    finally:
        finished.bucket.delete_prefix(f"{paths.run(run)}/models")


def test_a_damaged_block_of_weights_is_refused(finished: FinishedStage) -> None:
    """A bit of a weight, which is in another block than the names and sizes that are read first."""
    path = finished.folder / paths.checkpoint(finished.run, "vanilla", 3) / "rank-00000.safetensors"
    weights = open_weights(finished.bucket, paths.checkpoint(finished.run, "vanilla", 3))
    with path.open("r+b") as file:
        file.seek(weights.slices["main/output"][0].offset)
        (whole,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([whole ^ 1]))
        file.flush()
        try:
            with pytest.raises(StorageError, match=r"rank-00000.safetensors: sha256 of block [1-9]"):
                export_stage(
                    finished.run,
                    finished.run.spec.stages[0],
                    finished.bucket,
                    finished.provenance(),
                    threading.Event(),
                    ProgressBoard(),
                )
        finally:
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([whole]))
    assert not finished.bucket.exists(paths.manifest(paths.model(finished.run, "vanilla")))


@pytest.mark.parametrize(
    "url, arguments, message",
    [
        ("{run}", ["--stage", "onpolicy"], "onpolicy is not a stage of tiny-run, which has vanilla"),
        ("{bucket}", [], "is not the folder of a run. Give s3://BUCKET/PREFIX/runs/NAMESPACE/NAME-UID8"),
        ("{run}/models/vanilla", [], "is not the folder of a run"),
        ("/tmp/run", [], "is not an S3 URL"),
        (
            "{bucket}/runs/default/other-01234567",
            [],
            "run.json does not exist, so no job of this run has started",
        ),
        ("s3://no-such-bucket-here/runs/default/x-01234567", [], "no-such-bucket-here"),
    ],
)
def test_what_cannot_be_exported_is_named(
    finished: FinishedStage,
    url: str,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = url.format(run=finished.url, bucket=finished.bucket.url("").rstrip("/"))
    assert main(["export", given, *arguments, "--to", str(tmp_path / "model")]) == 65
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_touched(
    finished: FinishedStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("x")
    assert main(["export", finished.url, "--to", str(tmp_path)]) == 65
    assert f"{tmp_path} exists. Name a new folder" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "x"


def test_the_next_export_removes_what_a_killed_one_has_left(finished: FinishedStage, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vpmoe", "export", finished.url, "--to", str(tmp_path / "model")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_until(
        lambda: bool(list(tmp_path.glob("vpmoe_*/*"))) or process.poll() is not None,
        "it writes",
        120,
        every=0.01,
    )
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "model").exists(), "it had ended before it was killed"
    assert list(tmp_path.glob("vpmoe_*"))
    assert main(["export", finished.url, "--to", str(tmp_path / "model")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def encode(text: str) -> list[int]:
    return vocabulary_file.encoding().encode_ordinary(text)


ANALYSIS = [CHANNEL, *encode("analysis"), MESSAGE, *encode("Rayleigh: λ⁻⁴ ✓"), END]
FINAL = [
    START,
    *encode("assistant"),
    CHANNEL,
    *encode("final"),
    MESSAGE,
    *encode("Blue scatters most."),
    RETURN,
]


@pytest.mark.parametrize(
    "ids, answer",
    [
        pytest.param(ANALYSIS + FINAL, ("Rayleigh: λ⁻⁴ ✓", "Blue scatters most.", True), id="valid"),
        pytest.param(ANALYSIS + FINAL[:-2], ("Rayleigh: λ⁻⁴ ✓", "Blue scatters most", False), id="cut off"),
        pytest.param(ANALYSIS[:-2], ("Rayleigh: λ⁻⁴", "", False), id="within the reasoning"),
        pytest.param(FINAL[2:], ("", "Blue scatters most.", True), id="no reasoning"),
        pytest.param([*encode("no message"), RETURN], ("no message<|return|>", "", True), id="no message"),
        pytest.param([], ("", "", False), id="nothing"),
    ],
)
def test_reasoning_and_final_answer_are_taken_apart(
    chat: ChatModel, ids: list[int], answer: tuple[str, str, bool]
) -> None:
    found = chat._parse(np.array(ids, np.int32))
    assert (found.reasoning, found.final, found.ended, found.tokens) == (*answer, len(ids))


def test_an_answer_is_the_same_each_time_and_depends_on_the_effort(chat: ChatModel) -> None:
    """The most likely tokens of random weights: the first few may be the same for both efforts."""
    first, again, high = (chat.answer(QUESTION, effort, 48) for effort in ("low", "low", "high"))
    assert first == again != high
    assert 0 < first.tokens <= 48


def test_chat_prints_both_parts(
    model: Path, chat: ChatModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["chat", str(model), QUESTION, "--effort", "high", "--max-tokens", "6"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Reasoning (high effort):\n  ")
    assert "\n\nFinal answer" in out
    monkeypatch.setattr("sys.stdin", io.StringIO(QUESTION))
    monkeypatch.setattr("vpmoe.inference.chat.ChatModel", lambda folder: chat)
    assert main(["chat", str(model), "--effort", "high", "--max-tokens", "6"]) == 0
    assert capsys.readouterr().out == out


def test_the_text_says_what_is_missing() -> None:
    assert chat_command.shown(Answer("Think.\n\nMore.", "Yes.", True, 9), "low") == (
        "Reasoning (low effort):\n  Think.\n\n  More.\n\nFinal answer:\n  Yes.\n"
    )
    assert chat_command.shown(Answer("Think", "", False, 9), "low") == (
        "Reasoning (low effort):\n  Think\n\n"
        "Final answer (cut off after 9 tokens: raise --max-tokens):\n  none\n"
    )


def test_what_is_no_model_is_refused_with_the_remedy(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (shard,) = broken.glob("*.safetensors")
    os.truncate(shard, shard.stat().st_size - 100)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "gpt_oss"}')
    for folder, message in (
        (tmp_path / "nothing", "nothing is no folder, so it is no model"),
        (tmp_path, "has no config.json, so it is no model"),
        ("s3://vpmoe/runs/default/demo-0a1b2c3d", "is no folder, so it is no model"),
        (other, "other/config.json: model_type is gpt_oss, not vpmoe"),
        (broken, "broken is no complete model"),
    ):
        assert main(["chat", str(folder), QUESTION]) == 65
        error = capsys.readouterr().err
        assert message in error and "Export one: vpmoe export s3://BUCKET" in error


@pytest.mark.parametrize(
    "arguments",
    [["--max-tokens", "0"], ["--max-tokens", "many"], ["--effort", "highest"], ["a", "b"]],
)
def test_a_wrong_command_line_ends_with_64(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["chat", "/tmp", *arguments])
    assert caught.value.code == 64


def test_an_empty_question_is_a_wrong_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "/tmp", "  "]) == 64
    assert "the question is empty" in capsys.readouterr().err
