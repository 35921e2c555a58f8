"""A recorded run in TensorBoard, MLflow and W&B, each read back by its own means, or from its own files."""

import json
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fakes import recorded_run
from tests.fakes.store import S3
from tests.fakes.waiting import wait_until
from vpmoe.cli.main import main
from vpmoe.clock import now
from vpmoe.process.run_folder import open_run
from vpmoe.trackers.reader import MetricsReader
from vpmoe.trackers.rows import Row
from vpmoe.trackers.sync import Tracker, sync

STAGES = ("vanilla", "rescored", "forced", "onpolicy")
STEPS = {
    "vanilla", "vanilla-evaluate", "rescored", "rescored-evaluate", "forced", "forced-evaluate",
    "onpolicy-sampler", "onpolicy-teacher", "onpolicy", "onpolicy-evaluate",
}  # fmt: skip
Series = dict[str, list[tuple[int, float]]]
"""Points (x, value) by name."""


def expected(step: str) -> Series:
    """What a tracker must hold of a step, straight from the recorded documents."""
    before = STAGES[: STAGES.index(step.partition("-")[0])]
    start = sum(max(line["tokens"] for line in recorded_run.lines(stage)) for stage in before)
    found: Series = {}
    for line in recorded_run.lines(step):
        if step.endswith(("-sampler", "-teacher")):
            key, x = f"{step.partition('-')[2]}/tokens_per_second", line["window"]
            found.setdefault(key, []).append((x, line["tokensPerSecond"]))
        elif step.endswith("-evaluate"):
            x = start + max(one["tokens"] for one in recorded_run.lines(step.partition("-")[0]))
            found.setdefault("canary/bits_per_byte", []).append((x, line["canary"]["bitsPerByte"]))
        elif line["event"] != "start":
            key = "loss" if line["event"] == "step" else "held_out"
            for span, value in line["lossBySpan" if key == "loss" else "heldOut"].items():
                if value is not None:
                    found.setdefault(f"{key}/{span}", []).append((start + line["tokens"], value))
    return found


def check(read: Callable[[str], Series], exact: Callable[[float], float] = float) -> None:
    """Compare all steps. `exact`: a value as the tracker stores it."""
    for step in STEPS:
        found = read(step)
        for name, points in expected(step).items():
            assert found[name] == sorted((x, exact(value)) for x, value in points), (step, name)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, without any setting of a tracker but these."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    return tmp_path


def run_sync(url: str, *options: str) -> None:
    assert main(["metrics", "sync", url, *options]) == 0


def half(url: str, s3: S3, tracker: Tracker) -> None:
    """Write the first half of each step's rows, as a sync that was interrupted."""
    run, bucket = open_run(url)
    for new in MetricsReader(run, bucket).read():
        opened = tracker.open(new.step)
        opened.write(new.rows[: len(new.rows) // 2], ended=False)
        opened.close()


# TensorBoard


def scalars(folder: Path) -> Series:
    """All scalars of an event folder, read by TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {
        name: sorted((one.step, one.value) for one in found.Scalars(name)) for name in found.Tags()["scalars"]
    }


def test_tensorboard_shows_every_point_once_after_an_interruption_too(
    s3: S3, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from vpmoe.trackers.tensorboard import TensorBoard

    url = recorded_run.store(s3)
    name = url.rpartition("/")[2]
    half(url, s3, TensorBoard(folder / "logs"))
    cut = next((folder / "logs" / name / "onpolicy").glob("*tfevents*"))
    cut.write_bytes(cut.read_bytes()[:-9])  # killed in the middle of an event
    run_sync(url, "--to", "tensorboard", "--dir", "logs")
    assert "onpolicy: " in capsys.readouterr().out
    check(lambda step: scalars(folder / "logs" / name / step), lambda value: float(np.float32(value)))
    run_sync(url, "--to", "tensorboard", "--dir", "logs")
    assert capsys.readouterr().out == "Nothing was new.\n"
    check(lambda step: scalars(folder / "logs" / name / step), lambda value: float(np.float32(value)))
    assert {path.name for path in (folder / "logs" / name).iterdir()} == STEPS


def test_tensorboard_shows_where_a_step_comes_from(s3: S3, folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    url = recorded_run.store(s3)
    for _ in range(2):
        run_sync(url, "--to", "tensorboard")
    found = EventAccumulator(str(folder / "runs" / url.rpartition("/")[2] / "forced"))
    found.Reload()
    [event] = found.Tensors("config")
    text = event.tensor_proto.string_val[0].decode()
    assert f"| folder | {url} |" in text and "| kind | TeacherForced |" in text
    assert "| spec.stages.2.kind | TeacherForced |" in text


# MLflow


def test_mlflow_has_every_point_once_after_an_interruption_too(
    s3: S3, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow.tracking import MlflowClient

    from vpmoe.trackers.mlflow import MLflow

    url, uri = recorded_run.store(s3), f"sqlite:///{folder / 'mlflow.db'}"
    half(url, s3, MLflow(uri, "trial"))
    for _ in range(2):
        run_sync(url, "--to", "mlflow", "--uri", uri, "--project", "trial")
    assert capsys.readouterr().out.endswith("Nothing was new.\n")
    client = MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name("trial").experiment_id])
    runs = {run.data.tags["vpmoe.step"]: run for run in found}
    assert len(found) == len(STEPS) and runs.keys() == STEPS

    def read(step: str) -> Series:
        return {
            name: sorted(
                (one.step, one.value) for one in client.get_metric_history(runs[step].info.run_id, name)
            )
            for name in runs[step].data.metrics
        }

    check(read)
    params = runs["rescored"].data.params
    assert params["folder"] == url and params["kind"] == "Rescored"
    assert params["spec.student.shape"] == "tiny" and len(params["config_hash"]) == 64
    assert runs["rescored"].info.status == "FINISHED"

    client.delete_experiment(found[0].info.experiment_id)
    assert main(["metrics", "sync", url, "--to", "mlflow", "--uri", uri, "--project", "trial"]) == 65
    assert "has to be restored" in capsys.readouterr().err


# Weights & Biases


def logged(path: Path) -> list[Any]:
    """The records of a .wandb file, once W&B's own process has written the last, which is after `finish`."""
    found: list[Any] = []

    def complete() -> bool:
        found[:] = _records(path.read_bytes())
        return bool(found) and found[-1].WhichOneof("record_type") == "exit"

    wait_until(complete, f"{path.name} is complete", 60, every=0.05)
    return found


def _records(data: bytes) -> Iterator[Any]:
    """After 7 bytes of header, blocks of 32 KiB with LevelDB's log records, of crc32, length and type (1
    whole, 2 first, 3 middle, 4 last part)."""
    from wandb.proto import wandb_internal_pb2

    at, parts = 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if at + 7 + length > len(data):
            return  # it is being written
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def history(path: Path) -> list[dict[str, float]]:
    """The rows of a .wandb file, with `_step`."""
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in one.history.item}
        | {"_step": one.history.step.num}
        for one in logged(path)
        if one.WhichOneof("record_type") == "history"
    ]


def wandb_files(folder: Path, step: str) -> list[Path]:
    return list(folder.glob(f"wandb/offline-run-*/run-*-{step}.wandb"))


def test_wandb_has_every_point_once_in_the_latest_files(s3: S3, folder: Path) -> None:
    url = recorded_run.store(s3)
    for _ in range(2):
        run_sync(url, "--to", "wandb", "--project", "trial")

    def read(step: str) -> Series:
        [path] = wandb_files(folder, step)
        found: Series = {}
        for row in history(path):
            for name, value in row.items():
                found.setdefault(name, []).append((int(row["_step"]), value))
        return found

    check(read)
    [path] = wandb_files(folder, "forced")
    [run] = [one.run for one in logged(path) if one.WhichOneof("record_type") == "run"]
    config = {one.key: json.loads(one.value_json) for one in run.config.update}
    assert run.run_id == "0a1b2c3d-forced" and run.run_group == "inflight-0a1b2c3d" and run.project == "trial"
    assert config["folder"] == url and config["spec.student.shape"] == "tiny"


def test_wandb_gets_rows_in_order_and_two_of_one_x_together(s3: S3, folder: Path) -> None:
    """Rows that come late would be lost: W&B accepts none before its last."""
    from vpmoe.trackers.wandb import WAITING, WandB

    run, bucket = open_run(recorded_run.store(s3))
    [new] = [one for one in MetricsReader(run, bucket).read() if one.step.name == "vanilla"]
    time = now()
    rows = [Row(x, time, {"a": float(x)}) for x in range(6)]
    opened = WandB(folder, "trial").open(new.step)
    assert opened.write([rows[0], rows[2], rows[1]], ended=False) == 0
    assert opened.write([*rows[3:], Row(3, time, {"b": 1.0})], ended=False) == 6 - WAITING
    assert opened.write([], ended=True) == 5
    opened.close()
    [path] = wandb_files(folder, "vanilla")
    found = [{key: row[key] for key in ("_step", "a", "b") if key in row} for row in history(path)]
    assert found == [{"_step": x, "a": x, **({"b": 1.0} if x == 3 else {})} for x in range(6)]


def test_rows_of_a_step_that_has_failed_do_not_wait_for_its_end(s3: S3, folder: Path) -> None:
    from vpmoe.trackers.wandb import LONGEST, WandB

    run, bucket = open_run(recorded_run.store(s3))
    [new] = [one for one in MetricsReader(run, bucket).read() if one.step.name == "vanilla"]
    rows = [Row(x, now() - LONGEST, {"a": float(x)}) for x in range(3)] + [Row(3, now(), {"a": 3.0})]
    opened = WandB(folder, "trial").open(new.step)
    assert opened.write(rows, ended=False) == 3
    opened.close()
    [path] = wandb_files(folder, "vanilla")
    assert [row["a"] for row in history(path)] == [
        0.0,
        1.0,
        2.0,
        3.0,
    ]  # offline the last does not wait either


# A run that is running


class Recorder:
    """A tracker that keeps what it is given."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Row]] = {}
        self.ended: set[str] = set()
        self.closed = 0

    def open(self, step: Any) -> "Recorder._Run":
        self.rows[step.name] = []
        return self._Run(self, step.name)

    class _Run:
        def __init__(self, all_runs: "Recorder", name: str) -> None:
            self.all, self.name = all_runs, name

        def write(self, rows: Any, ended: bool) -> int:
            self.all.rows[self.name] += rows
            if ended:
                self.all.ended.add(self.name)
            return len(rows)

        def close(self) -> None:
            self.all.closed += 1


def succeeded(step: str) -> bytes:
    return json.dumps(
        {"step": step, "attempt": 1, "state": "Succeeded", "updated": "2026-11-28T02:00:00+00:00"}
    ).encode()


def test_following_reads_each_object_once_and_ends_with_the_run(s3: S3, tmp_path: Path) -> None:
    held = tmp_path / "held"

    def begin(folder: Path) -> None:
        """Only stage vanilla has begun, and it has written its first object."""
        shutil.move(folder / "steps", held)
        (folder / "steps/vanilla/metrics").mkdir(parents=True)
        first = sorted((held / "vanilla/metrics").iterdir())[0]
        shutil.copy(first, folder / "steps/vanilla/metrics")

    url = recorded_run.store(s3, begin)
    steps = s3.folder / url.removeprefix("s3://") / "steps"
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            shutil.copytree(held, steps, dirs_exist_ok=True)
            for step in STEPS:
                (steps / step / "progress.json").write_bytes(succeeded(step))

    recorder, said = Recorder(), list[str]()
    written = sync(MetricsReader(*open_run(url)), recorder, said.append, follow=True, pause=pause)
    assert len(pauses) == 2 and said[0] == "vanilla: 3 rows"
    assert recorder.rows.keys() == STEPS == recorder.ended and recorder.closed == len(STEPS)
    assert written == sum(map(len, recorder.rows.values()))

    def read(step: str) -> Series:
        found: Series = {}
        for row in recorder.rows[step]:
            for name, value in row.values.items():
                found.setdefault(name, []).append((row.x, value))
        return {name: sorted(points) for name, points in found.items()}

    check(read)


# Mistakes


@pytest.mark.parametrize(
    "options, code, message",
    [
        pytest.param(
            ["--to", "tensorboard", "--uri", "x"], 64, "tensorboard has no --uri; it takes --dir", id="option"
        ),
        pytest.param(
            ["--to", "mlflow", "--dir", "x"], 64, "mlflow has no --dir; it takes --uri", id="option2"
        ),
        pytest.param(["--to", "tensorboard"], 65, "s3://none/x is not the folder of a run.", id="address"),
    ],
)
def test_a_wrong_option_and_a_wrong_address_are_named(
    options: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["metrics", "sync", "s3://none/x", *options]) == code
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_and_a_store_that_is_none_are_named(
    s3: S3, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = recorded_run.store(s3)
    (folder / "file").write_text("")
    assert main(["metrics", "sync", url, "--to", "tensorboard", "--dir", "file"]) == 65
    assert "--dir file/inflight-0a1b2c3d/" in (error := capsys.readouterr().err)
    assert "Not a directory. Name a folder that can be written." in error
    assert main(["metrics", "sync", url, "--to", "mlflow", "--uri", "nonsense://x"]) == 65
    assert "MLflow at nonsense://x: " in capsys.readouterr().err
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert main(["metrics", "sync", url, "--to", "mlflow", "--uri", "http://127.0.0.1:9"]) == 75
    assert "when MLflow answers: it continues." in capsys.readouterr().err


@pytest.mark.parametrize(
    "package, tracker", [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow")]
)
def test_a_package_that_is_not_installed_is_named_with_its_extra(
    package: str, tracker: str, s3: S3, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    names = [name for name in sys.modules if name.partition(".")[0] == package]
    blocked: Mapping[str, None] = dict.fromkeys([package, f"vpmoe.trackers.{tracker}", *names])
    for name in blocked:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["metrics", "sync", recorded_run.store(s3), "--to", tracker]) == 65
    error = capsys.readouterr().err
    assert f"the Python package {package}" in error and "pip install 'vpmoe[trackers]'" in error
