"""The init step on a real S3 store: what it writes, what the first stage makes of it, what it refuses, and
that a killed attempt changes nothing."""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.fakes import datasets, fake_hub, students
from tests.fakes.dense_models import save_dense_model
from tests.fakes.policy_versions import trainer_logp
from tests.fakes.students import SMALL, copy_slices, new_seed
from tests.fakes.trainers import start_of
from vpmoe.api import DistillRun
from vpmoe.checkpoint.format import open_weights
from vpmoe.data.vocabulary import VOCABULARY_SHA256
from vpmoe.failure import Permanent, Terminated
from vpmoe.inference import hf_model
from vpmoe.model import hf_export
from vpmoe.model.shapes import SHAPES
from vpmoe.pretrained.model_files import ModelRef
from vpmoe.process.board import ProgressBoard
from vpmoe.process.step_worker import step_succeeded
from vpmoe.provenance import CHECKOUT
from vpmoe.storage import Bucket, manifest, paths
from vpmoe.storage.manifest import Manifest
from vpmoe.storage.records import load_record
from vpmoe.storage.verify import verify
from vpmoe.upcycle import build, step

SEED = 7
FILE_BYTES = 100_000
"""So that the weights of SMALL are several files."""
TOLERANCE = 1e-4
"""Nats. Trainer and transformers compute in float32 with different orders of summation."""


@pytest.fixture(autouse=True)
def small_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, `tiny` is SMALL."""
    monkeypatch.setitem(SHAPES, "tiny", replace(SMALL, name="tiny"))
    monkeypatch.setattr(step, "FILE_BYTES", FILE_BYTES)


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of the width of SMALL, as transformers saves it, with a tokenizer."""
    folder = tmp_path_factory.mktemp("dense")
    save_dense_model(folder)
    return folder


@pytest.fixture
def run(run_spec: dict[str, Any], bucket: Bucket, dense: Path) -> DistillRun:
    """A run whose student begins with that model, in its bucket."""
    for path in dense.iterdir():
        bucket.put_file(f"models/dense/{path.name}", path, {})
    return run_of(run_spec, bucket.url("models/dense/"))


def run_of(run_spec: dict[str, Any], model: str, name: str = "tiny-run") -> DistillRun:
    run_spec["metadata"]["name"] = name
    run_spec["spec"]["student"]["init"] = {"upcycle": {"model": model, "seed": SEED}}
    return DistillRun.parse(run_spec)


def make(
    run: DistillRun, bucket: Bucket, stopping: threading.Event | None = None
) -> tuple[Manifest, ProgressBoard]:
    assert run.upcycle is not None
    board, own = ProgressBoard(), replace(datasets.PROVENANCE, step="init")
    stop = stopping or threading.Event()
    return step.make_initial_weights(run, run.upcycle, bucket, own, stop, board), board


def digests(made: Manifest) -> dict[str, str]:
    return {name: subject.sha256 for name, subject in made.subjects.items()}


def test_the_weights_are_in_the_bucket_with_their_plan_in_the_log_and_their_manifest(
    run: DistillRun, bucket: Bucket, dense: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    made, board = make(run, bucket)
    expected, facts = build.upcycle(dense, SHAPES["tiny"], SEED)
    weights = open_weights(bucket, paths.init(run))
    assert weights.sizes == {name: tensor.numel() for name, tensor in expected.items()}
    for name, tensor in expected.items():
        assert torch.equal(weights.read(name, 0, tensor.numel()), tensor.flatten()), name
    assert len(made.subjects) > 2 and (made.key, made.kind) == (paths.manifest(paths.init(run)), "init")
    assert {name: value for name, value in made.facts.items() if name != "position"} == json.loads(
        json.dumps(facts)
    )
    source = made.inputs["model"]
    assert run.upcycle is not None and source.uri == run.upcycle.model
    pinned = load_record(bucket, paths.init_source(run), ModelRef)
    assert source.digest == {"sha256": pinned.sha256} and len(pinned.files) == source.facts["files"]
    assert made.inputs["tokenizer"].digest == {"sha256": VOCABULARY_SHA256}
    logged = [record.message for record in caplog.records]
    first = logged.index(build.plan_folder(build.open_folder(dense), SHAPES["tiny"]).table()[0])
    assert not [line for line in logged[:first] if "weights" in line], "the plan comes first"
    lines: list[str] = []
    assert verify(bucket, paths.init(run), lines.append).failed == 0
    assert not [line for line in lines if line.startswith("note")], "the manifest names every object"
    progress = board.progress
    assert progress is not None and progress.parts is not None
    assert (progress.state, progress.parts.done) == ("Succeeded", len(made.subjects))
    assert step_succeeded(run, bucket, "init")


def test_the_first_stage_has_the_loss_of_the_weights_at_token_0(
    run: DistillRun, run_spec: dict[str, Any], bucket: Bucket, device: torch.device, tmp_path: Path
) -> None:
    """transformers loads the same weights from the bucket."""
    make(run, bucket)
    dataset = datasets.write_dataset(bucket, [[]], [[]])
    learner = students.learner(device, SHAPES["tiny"])
    started = start_of(datasets.context(bucket, run_spec, tmp_path, dataset), learner)
    assert (started.state.tokens, started.state.iteration, learner.steps) == (0, 0, 0)
    assert [source.name for source in started.sources] == ["init"]
    moments = [tensor for name, ((_, tensor),) in copy_slices(learner).items() if name.startswith("exp_avg")]
    assert moments and not any(tensor.any() for tensor in moments), "the optimizer begins anew"
    weights, folder = open_weights(bucket, paths.init(run)), tmp_path / "export"
    hf_export.export_student(folder, SHAPES["tiny"], 512, weights.sizes, weights.read, torch.float32)
    model, random = hf_model.load_student(folder, SHAPES["tiny"]), np.random.default_rng(new_seed())
    sequences = [random.integers(0, 384, length, dtype=np.int32) for length in (3, 40, 200)]
    for ids_T, expected in zip(sequences, trainer_logp(learner, sequences), strict=True):
        ids = torch.from_numpy(ids_T.astype(np.int64))
        with torch.no_grad():
            logits_TV = model(ids[None]).logits[0]
        found = logits_TV[:-1].double().log_softmax(1).gather(1, ids[1:, None])[:, 0].numpy()
        assert np.abs(found - expected).max() <= TOLERANCE


def test_weights_that_are_there_are_reused_whatever_became_of_the_model(
    run: DistillRun, bucket: Bucket
) -> None:
    made, _ = make(run, bucket)
    bucket.delete_prefix("models/dense")
    again, board = make(run, bucket)
    assert again == made and board.progress is not None
    assert (board.progress.state, board.progress.reused) == ("Succeeded", True)


def test_an_attempt_that_was_asked_to_stop_and_the_next_one_write_the_same_bits(
    run: DistillRun, run_spec: dict[str, Any], bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping = threading.Event()
    put = Bucket.put_file

    def put_and_stop(*arguments: Any) -> Any:
        stopping.set()
        return put(*arguments)

    with monkeypatch.context() as changed:
        changed.setattr(Bucket, "put_file", put_and_stop)
        with pytest.raises(Terminated):
            make(run, bucket, stopping)
    assert not bucket.exists(paths.manifest(paths.init(run)))
    made, _ = make(run, bucket)
    other, _ = make(run_of(run_spec, bucket.url("models/dense"), "other"), bucket)
    assert digests(made) == digests(other) and made.key != other.key


KILLED = """
import os, signal, sys, threading
from dataclasses import replace
from tests.fakes.students import SMALL
from vpmoe.api import load_run
from vpmoe.model.shapes import SHAPES
from vpmoe.process.board import ProgressBoard
from vpmoe.storage import Bucket
from tests.fakes import datasets
from vpmoe.upcycle import step

SHAPES["tiny"] = replace(SMALL, name="tiny")
step.FILE_BYTES = int(sys.argv[2])
put, files = Bucket.put_file, []

def put_and_die(self, key, path, metadata):
    files.append(key)
    if len(files) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return put(self, key, path, metadata)

Bucket.put_file = put_and_die
run = load_run(sys.argv[1])
own = replace(datasets.PROVENANCE, step="init")
bucket = Bucket.open(run.spec.storage)
step.make_initial_weights(run, run.upcycle, bucket, own, threading.Event(), ProgressBoard())
"""


def test_a_killed_attempt_leaves_no_weights_and_the_next_one_writes_the_same_bits(
    run: DistillRun, run_spec: dict[str, Any], bucket: Bucket, tmp_path: Path
) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(run_spec))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(file), str(FILE_BYTES)]
    ended = subprocess.run(
        command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    left = [found.key for found in bucket.list(paths.init(run) + "/")]
    assert len(left) == 2, "two files and no manifest"
    made, _ = make(run, bucket)
    other, _ = make(run_of(run_spec, bucket.url("models/dense"), "other"), bucket)
    assert digests(made) == digests(other)


def rewrite_config(**changes: Any) -> Callable[[Bucket], None]:
    def rewrite(bucket: Bucket) -> None:
        config = bucket.get_json("models/dense/config.json")
        bucket.write_json("models/dense/config.json", config | changes)

    return rewrite


def write_wider(bucket: Bucket) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_dense_model(Path(folder), hidden_size=48)
        for path in Path(folder).iterdir():
            bucket.put_file(f"models/dense/{path.name}", path, {})


def cut_weights(bucket: Bucket) -> None:
    data = bucket.get("models/dense/model.safetensors")
    bucket.put_bytes("models/dense/model.safetensors", data[:-8], {})


@pytest.mark.parametrize(
    "damage, message",
    [
        pytest.param(
            write_wider,
            "config.json: hidden_size is 48, and tiny has 32. Use a source with 32",
            id="another width",
        ),
        pytest.param(rewrite_config(model_type="gpt2"), "model_type", id="another architecture"),
        pytest.param(cut_weights, "is cut", id="cut weights"),
        pytest.param(
            lambda bucket: bucket.delete("models/dense/config.json"), "has no config.json", id="no model"
        ),
        pytest.param(
            lambda bucket: bucket.delete("models/dense/tokenizer.json"), "tokenizer.json", id="no tokenizer"
        ),
    ],
)
def test_a_model_that_cannot_become_the_student_is_permanent_with_field_and_remedy(
    run: DistillRun, bucket: Bucket, damage: Callable[[Bucket], None], message: str
) -> None:
    damage(bucket)
    with pytest.raises(Permanent) as refused:
        make(run, bucket)
    text = str(refused.value)
    assert text.startswith(f"student.init.upcycle.model: {bucket.url('models/dense/')}"), text
    assert message in text and "vpmoe-init-" not in text, text
    assert not list(bucket.list(paths.init(run) + "/"))


def test_the_next_attempt_finds_a_model_that_was_repaired(
    run: DistillRun, bucket: Bucket, dense: Path
) -> None:
    bucket.delete("models/dense/tokenizer.json")
    with pytest.raises(Permanent, match=r"tokenizer\.json"):
        make(run, bucket)
    bucket.put_file("models/dense/tokenizer.json", dense / "tokenizer.json", {})
    made, _ = make(run, bucket)
    assert made.inputs["model"].facts["files"] == len(list(dense.iterdir()))


def test_a_model_of_the_hub_is_pinned_to_its_commit(
    run_spec: dict[str, Any], bucket: Bucket, dense: Path, tmp_path: Path
) -> None:
    """In a process of its own, because the hub's client reads its environment when it is imported."""
    files = {path.name: path.read_bytes() for path in dense.iterdir()}
    run = run_of(run_spec, "hf://owner/dense@main")
    file = tmp_path / "run.json"
    file.write_text(json.dumps(run_spec))
    with fake_hub.serve("owner/dense", files, "models") as (endpoint, _):
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
        script = KILLED.replace("len(files) == 3", "False")
        command = [sys.executable, "-c", textwrap.dedent(script), str(file), str(FILE_BYTES)]
        subprocess.run(command, cwd=CHECKOUT, env=environment, check=True)
    made = manifest.load(bucket, paths.manifest(paths.init(run)))
    source = made.inputs["model"]
    assert (source.uri, source.digest["gitCommit"]) == ("hf://owner/dense@main", fake_hub.COMMIT)
    expected, _ = build.upcycle(dense, SHAPES["tiny"], SEED)
    weights = open_weights(bucket, paths.init(run))
    for name, tensor in expected.items():
        assert torch.equal(weights.read(name, 0, tensor.numel()), tensor.flatten()), name


def test_files_are_as_full_as_they_can_be_and_a_larger_tensor_has_one_of_its_own() -> None:
    rows = FILE_BYTES // 8
    sizes = {"a": (rows,), "b": (rows,), "c": (1,), "d": (2 * rows, 2), "e": (), "f": (3,)}
    assert step.divide(sizes) == [["a", "b"], ["c"], ["d"], ["e", "f"]]
