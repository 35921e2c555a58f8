"""The export step on a real S3 store: what it writes, what the next attempt does again, what it refuses.

The student is small; test_local.py has one of the shape `tiny`, with the job and a damaged block of weights.
"""

import json
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.fakes.finished_stages import FinishedStage, finish_again
from tests.fakes.store import S3
from tests.fakes.students import LOCKED
from vpmoe.checkpoint.format import open_weights
from vpmoe.checkpoint.safetensors_header import INDEX
from vpmoe.export.step import export_stage
from vpmoe.failure import Permanent, Terminated
from vpmoe.model import hf_export
from vpmoe.model.learner import Learner
from vpmoe.model.shapes import SHAPES
from vpmoe.process.board import ProgressBoard
from vpmoe.process.step_worker import step_succeeded
from vpmoe.storage import Bucket, Stored, manifest, paths
from vpmoe.storage.manifest import Manifest
from vpmoe.storage.verify import verify

STEP = "vanilla-export"


@pytest.fixture
def finished(small_stage: FinishedStage, monkeypatch: pytest.MonkeyPatch) -> FinishedStage:
    """The stage, not exported yet. In this process, `tiny` is the shape of its student."""
    monkeypatch.setitem(SHAPES, "tiny", replace(LOCKED, name="tiny"))
    small_stage.bucket.delete_prefix(f"{paths.run(small_stage.run)}/models")
    small_stage.bucket.delete_prefix(f"{paths.run(small_stage.run)}/steps")
    return small_stage


def export(
    finished: FinishedStage,
    attempt: int = 1,
    stopping: threading.Event | None = None,
    bucket: Bucket | None = None,
) -> tuple[Manifest, ProgressBoard]:
    board, run = ProgressBoard(), finished.run
    made = export_stage(
        run,
        run.spec.stages[0],
        bucket or finished.bucket,
        finished.provenance(attempt),
        stopping or threading.Event(),
        board,
    )
    return made, board


def model_key(finished: FinishedStage) -> str:
    return paths.model(finished.run, "vanilla")


def test_the_model_is_in_the_bucket_with_its_statement(finished: FinishedStage) -> None:
    made, board = export(finished)
    folder, bucket = model_key(finished), finished.bucket
    assert {
        "README.md",
        "config.json",
        "modeling_vpmoe.py",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        INDEX,
    } < set(made.subjects)
    assert (made.key, made.kind) == (paths.manifest(folder), "model")
    assert made.facts == {
        "stage": "vanilla",
        "kind": "Vanilla",
        "iteration": 3,
        "tokens": 300,
        "shape": "tiny",
        "dtype": "bfloat16",
        "positions": 512,
    }
    checkpoint = manifest.load(bucket, paths.manifest(paths.checkpoint(finished.run, "vanilla", 3)))
    assert made.inputs["checkpoint"].digest == {"sha256": checkpoint.sha256}
    assert {"tokenizer", "dataset"} < set(made.inputs)
    template = bucket.get(f"{folder}/chat_template.jinja").decode()
    assert '{%- set effort = reasoning_effort or "low" %}' in template, "which most documents say"
    lines: list[str] = []
    assert verify(bucket, folder, lines.append).failed == 0
    assert not [line for line in lines if line.startswith("note")], (
        "no object that the manifest does not name"
    )
    progress = board.progress
    assert progress is not None and progress.parts is not None
    assert (progress.state, progress.model, progress.parts.done) == (
        "Succeeded",
        bucket.url(folder),
        len(made.subjects),
    )
    assert step_succeeded(finished.run, bucket, STEP)


def test_every_object_says_what_wrote_it(finished: FinishedStage, s3: S3) -> None:
    import boto3

    made, _ = export(finished, attempt=2)
    client = boto3.client("s3", endpoint_url=s3.endpoint, region_name="us-east-1")
    for key in (made.key, *(subject.key for subject in made.subjects.values())):
        found = client.head_object(Bucket=finished.bucket.name, Key=key)["Metadata"]
        assert (found["step"], found["attempt"], found["config"]) == (STEP, "2", finished.run.config_hash)


def test_the_weights_are_those_of_the_checkpoint_rounded_to_bfloat16(
    finished: FinishedStage, tmp_path: Path
) -> None:
    made, _ = export(finished)
    for name, subject in made.subjects.items():
        finished.bucket.download(subject, tmp_path / name)
    weights = open_weights(finished.bucket, paths.checkpoint(finished.run, "vanilla", 3))
    index = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    files = {file: load_file(tmp_path / file) for file in set(index.values())}
    for name, part in hf_export.exported_tensors(LOCKED).items():
        whole = part.cut_from(weights.read(part.source, 0, weights.sizes[part.source]))
        assert torch.equal(files[index[name]][name], whole.to(hf_export.stored_dtype(name, torch.bfloat16)))


class StoppingBucket(Bucket):
    """Asks the process to stop when the first object with this end of its name is written."""

    name_end = ""
    stopping = threading.Event()

    def put_bytes(self, key: str, data: bytes, metadata: Mapping[str, str]) -> Stored:
        if key.endswith(self.name_end):
            self.stopping.set()
        return super().put_bytes(key, data, metadata)


def test_the_next_attempt_uploads_only_what_is_missing(finished: FinishedStage) -> None:
    stopping = threading.Event()
    bucket = StoppingBucket.open(finished.run.spec.storage)
    assert isinstance(bucket, StoppingBucket)
    bucket.name_end, bucket.stopping = "parts/generation_config.json.json", stopping
    with pytest.raises(Terminated):
        export(finished, stopping=stopping, bucket=bucket)
    folder = finished.folder / model_key(finished)
    uploaded = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {"README.md", "generation_config.json"} <= set(uploaded)
    assert not {"manifest.json", "tokenizer.json"} & set(uploaded)
    (folder / "left-by-another-version.bin").write_bytes(b"x")
    made, _ = export(finished, attempt=2)
    for name, time in uploaded.items():
        assert (folder / name).stat().st_mtime_ns == time, name
    assert {path.name for path in folder.iterdir()} == {*made.subjects, "manifest.json"}


@pytest.mark.parametrize("damage", ["record", "object"])
def test_a_file_is_uploaded_again_if_its_record_or_the_object_is_not_of_it(
    finished: FinishedStage, damage: str
) -> None:
    made, _ = export(finished)
    finished.bucket.delete(made.key)
    record = finished.folder / paths.export_part(finished.run, "vanilla", "config.json")
    written = finished.folder / model_key(finished) / "config.json"
    if damage == "record":
        record.write_text('{"name": "config.json"}')
        written.write_bytes(b"{}")
    else:
        written.write_bytes(b"{}")
    again, _ = export(finished, attempt=2)
    assert again.subjects == made.subjects
    assert verify(finished.bucket, model_key(finished), lambda line: None).failed == 0


def test_an_exported_stage_is_not_exported_again(finished: FinishedStage) -> None:
    made, _ = export(finished)
    again, board = export(finished, attempt=2)
    assert again.raw == made.raw
    progress = board.progress
    assert progress is not None
    assert (progress.message, progress.reused, progress.model, progress.parts) == (
        "Reused",
        True,
        finished.bucket.url(model_key(finished)),
        None,
    )


def test_two_exports_have_equal_files(finished: FinishedStage) -> None:
    first, _ = export(finished)
    finished.bucket.delete_prefix(model_key(finished))
    second, _ = export(finished, attempt=7)
    assert {name: subject.sha256 for name, subject in first.subjects.items()} == {
        name: subject.sha256 for name, subject in second.subjects.items()
    }


def test_a_model_of_an_older_checkpoint_is_refused(
    finished: FinishedStage, small_student: Learner, tmp_path: Path
) -> None:
    export(finished)
    finish_again(finished, small_student, tmp_path, 4)
    try:
        with pytest.raises(
            Permanent, match=r"trained again since\. Delete s3://.*/models/vanilla to have it"
        ):
            export(finished, attempt=2)
    finally:
        finished.bucket.delete_prefix(paths.checkpoint(finished.run, "vanilla", 4))


def test_a_checkpoint_of_other_parts_is_refused_with_their_names(
    finished: FinishedStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if no tensor tells the students apart."""
    monkeypatch.setitem(SHAPES, "tiny", replace(LOCKED, name="tiny", local_window=64, alibi=False))
    found = (
        r"parts than tiny: local_window \(128, here 64\), alibi \(True, here off\)\. Use the version of vpMoE"
    )
    with pytest.raises(Permanent, match=rf"vanilla cannot be exported: .*manifest\.json: .* {found}"):
        export(finished)


def test_a_stage_that_has_not_finished_is_refused(finished: FinishedStage) -> None:
    key = paths.manifest(paths.checkpoint(finished.run, "vanilla", 3))
    stored = finished.bucket.get(key)
    made = json.loads(stored)
    made["predicate"]["buildDefinition"]["internalParameters"]["position"]["finished"] = False
    try:
        finished.bucket.write_json(key, made)
        with pytest.raises(Permanent, match=r"stage vanilla has trained 300 tokens. Train it to its end"):
            export(finished)
        finished.bucket.delete(key)
        with pytest.raises(Permanent, match=r"stage vanilla has no checkpoint. Train it first"):
            export(finished)
    finally:
        finished.bucket.put_bytes(key, stored, {})
