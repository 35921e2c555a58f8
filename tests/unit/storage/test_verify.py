"""`python -m vpmoe.storage verify`: verifies every manifest below a prefix and names objects that differ."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.store import S3
from vpmoe.provenance import Provenance
from vpmoe.storage import BLOCK, Bucket, __main__, manifest
from vpmoe.storage.bucket import json_bytes

PROVENANCE = Provenance(
    None, None, "0" * 64, "default", "x", "01234567", "preprocess", 1, "2026-01-01T00:00:00Z"
)
TOKENIZER = manifest.Input("tokenizer", "o200k_harmony", {"sha256": "0" * 64}, {})


def write_dataset(bucket: Bucket, folder: str, tmp_path: Path) -> manifest.Manifest:
    """Write a dataset of an empty, a small and a large object."""
    subjects = []
    for name, size in (("empty", 0), ("train/small", 3), ("train/large", BLOCK + 7)):
        (tmp_path / "source").write_bytes(os.urandom(size))
        subjects.append(bucket.put_file(f"{folder}/{name}", tmp_path / "source", {}).subject(folder))
    return manifest.write(
        bucket,
        f"{folder}/manifest.json",
        manifest.statement("dataset", subjects, {}, PROVENANCE, [TOKENIZER]),
    )


def verify(capsys: pytest.CaptureFixture[str], url: str) -> tuple[int, list[str]]:
    code = __main__.main(["verify", url])
    return code, capsys.readouterr().out.splitlines()


def test_valid_manifests_are_verified_and_unnamed_objects_are_noted(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("deep/datasets/a", "deep/datasets/b"):
        write_dataset(bucket, folder, tmp_path)
    bucket.write_json("deep/datasets/a/parts/part-00000.json", {})
    bucket.write_json("deep/runs/x/progress.json", {})
    root = f"s3://{bucket.name}"
    a, b = (
        f"proved {root}/deep/datasets/{name}/manifest.json: dataset, 3 objects, {BLOCK + 10} bytes"
        for name in "ab"
    )
    unnamed = f"note   {root}/deep/datasets/a/parts/part-00000.json: 2 bytes that this manifest does not name"
    summary = f"2 manifests, 6 objects, {2 * BLOCK + 20} bytes; none failed"
    for url in (root, f"{root}/", f"{root}/deep", f"{root}/deep/"):
        assert verify(capsys, url) == (0, [a, unnamed, b, summary])
    assert verify(capsys, f"{root}/deep/datasets/b") == (
        0,
        [b, f"1 manifests, 3 objects, {BLOCK + 10} bytes; none failed"],
    )


def test_only_the_weights_of_a_policy_version_may_be_missing(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = [
        TOKENIZER,
        manifest.Input("dataset", "s3://x/datasets/x/manifest.json", {"sha256": "0" * 64}, {}),
    ]
    for kind in ("weights", "checkpoint"):
        subjects = []
        for name in ("model-00001.safetensors", "model-00002.safetensors", "config.json"):
            (tmp_path / "source").write_bytes(os.urandom(9))
            subjects.append(bucket.put_file(f"{kind}/{name}", tmp_path / "source", {}).subject(kind))
        manifest.write(
            bucket, f"{kind}/manifest.json", manifest.statement(kind, subjects, {}, PROVENANCE, inputs)
        )
        bucket.delete(f"{kind}/model-00001.safetensors")
        code, lines = verify(capsys, f"s3://{bucket.name}/{kind}")
        assert code == 1 and "there is no such object" in lines[1], (
            "only all weights of a version may be missing"
        )
        bucket.delete(f"{kind}/model-00002.safetensors")
        code, lines = verify(capsys, f"s3://{bucket.name}/{kind}")
        assert (code, "removed since no window" in lines[0]) == (
            (0, True) if kind == "weights" else (1, False)
        )


@pytest.mark.parametrize(
    "name, data, message",
    [
        pytest.param(
            "train/large",
            b"x" * (BLOCK + 7),
            "sha256 of block 0 is .*, its manifest says .*delete the folder",
            id="altered",
        ),
        pytest.param("train/small", b"x", "1 bytes, its manifest says 3", id="truncated"),
        pytest.param("empty", b"x", "1 bytes, its manifest says 0", id="grown"),
        pytest.param("train/small", None, "there is no such object", id="gone"),
    ],
)
def test_an_object_that_differs_is_named(
    s3: S3,
    bucket: Bucket,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    data: bytes | None,
    message: str,
) -> None:
    write_dataset(bucket, "a", tmp_path)
    write_dataset(bucket, "b", tmp_path)
    if data is None:
        bucket.delete(f"a/{name}")
    else:
        (s3.folder / bucket.name / "a" / name).write_bytes(data)
    code, lines = verify(capsys, bucket.url(""))
    assert code == 1 and len(lines) == 4
    assert (
        lines[0]
        == f"FAILED {bucket.url('a/manifest.json')}: dataset, 3 objects, {BLOCK + 10} bytes, 1 objects wrong"
    )
    assert lines[1].startswith(f"       {bucket.url(f'a/{name}')}: ")
    assert re.search(message, lines[1])
    assert lines[2].startswith("proved") and lines[3].endswith("1 failed")


def test_an_object_hash_that_contradicts_its_blocks_is_named(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = dict(write_dataset(bucket, "a", tmp_path).raw)
    raw["subject"][1]["digest"]["sha256"] = "0" * 64
    bucket.put_bytes("a/manifest.json", json_bytes(raw), {})
    code, lines = verify(capsys, bucket.url("a"))
    assert code == 1 and "its manifest says 000" in lines[1] and "The manifest was altered" in lines[1]


def test_a_malformed_manifest_fails_and_the_others_are_verified(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket.put_bytes("a/manifest.json", b"{}", {})
    write_dataset(bucket, "b", tmp_path)
    code, lines = verify(capsys, bucket.url(""))
    assert code == 1 and lines[0].startswith(
        f"FAILED {bucket.url('a/manifest.json')}: not a vpMoE manifest: _type: Field required"
    )
    assert (
        lines[1].startswith("proved") and lines[2] == f"2 manifests, 3 objects, {BLOCK + 10} bytes; 1 failed"
    )


def test_a_prefix_without_a_manifest_is_an_error(bucket: Bucket, capsys: pytest.CaptureFixture[str]) -> None:
    bucket.put_bytes("runs/x/progress.json", b"{}", {})
    for prefix in ("", "runs", "nowhere"):
        code, lines = verify(capsys, bucket.url(prefix))
        assert code == 1 and len(lines) == 1 and "there is no manifest. Give the address of" in lines[0]


def test_a_store_that_fails_ends_the_verification(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    code, lines = verify(capsys, bucket.url(""))
    assert code == 1 and len(lines) == 1 and "denied (403" in lines[0]


def test_an_invalid_command_line_is_rejected_with_the_remedy(bucket: Bucket, tmp_path: Path) -> None:
    write_dataset(bucket, "a", tmp_path)
    command = [sys.executable, "-m", "vpmoe.storage", "verify"]
    wrong = subprocess.run([*command, "vpmoe/datasets"], capture_output=True, text=True)
    assert (
        wrong.returncode == 2 and "'vpmoe/datasets' is not an S3 URL. Write s3://bucket/key." in wrong.stderr
    )
    right = subprocess.run([*command, bucket.url("a")], capture_output=True, text=True)
    assert (right.returncode, right.stderr) == (0, "") and right.stdout.endswith("none failed\n")
