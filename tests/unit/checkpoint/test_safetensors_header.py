"""Headers of safetensors files: the tensors that the safetensors library reads, and every damage is named."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tests.fakes.sparse_checkpoint import header_of, write_file, write_folder
from vpmoe.checkpoint.safetensors_header import (
    INDEX,
    SINGLE,
    InvalidCheckpoint,
    read_folder,
    read_header,
    read_json_object,
)

TENSORS = {
    "a": ("F32", [2, 3]),
    "b": ("BF16", [5]),
    "c": ("U8", [4, 2]),
    "scalar": ("F32", []),
    "none": ("F16", [0, 7]),
    "d": ("F8_E4M3", [3]),
}


def test_a_header_is_what_the_safetensors_library_reads(tmp_path: Path) -> None:
    types = {
        name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "uint8", "int64", "bool")
    }
    save_file(
        {name: torch.zeros(3, 2, dtype=dtype) for name, dtype in types.items()}, tmp_path / "a.safetensors"
    )
    found = read_header(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as opened:
        wanted = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    assert {name: (one.dtype, list(one.shape)) for name, one in found.items()} == {
        name: (one.get_dtype(), one.get_shape()) for name, one in wanted.items()
    }


def test_written_headers_are_valid_for_the_safetensors_library(tmp_path: Path) -> None:
    write_file(tmp_path / "a", header_of(TENSORS))
    with safe_open(tmp_path / "a", "pt") as opened:
        assert sorted(opened.keys()) == sorted(TENSORS)
    assert sorted(read_header(tmp_path / "a")) == sorted(TENSORS)


def changed(**entries: Any) -> bytes:
    """The header with these entries of tensors replaced."""
    return json.dumps(header_of(TENSORS) | entries).encode()


def entry(dtype: object, shape: object, offsets: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


WHOLE = header_of(TENSORS)["d"]["data_offsets"][1]
"""Bytes of the data."""
DAMAGED_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "is not a safetensors file, or is cut: it has 0 bytes"),
    "metadata-is-a-list": (
        lambda path: write_file(path, header_of(TENSORS) | {"__metadata__": ["pt"]}),  # type: ignore[dict-item]
        "__metadata__ is not an object of texts",
    ),
    "metadata-of-numbers": (
        lambda path: write_file(path, header_of(TENSORS) | {"__metadata__": {"step": 1}}),
        "__metadata__ is not an object of texts",
    ),
    "seven-bytes": (lambda path: path.write_bytes(b"\x02" + bytes(6)), "it has 7 bytes"),
    "length-alone": (lambda path: path.write_bytes(b"\x02" + bytes(7)), "promise a header of 2"),
    "cut-in-the-header": (lambda path: path.write_bytes(path.read_bytes()[:40]), "it has 40 bytes"),
    "cut-in-the-data": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is cut: d ends at byte"),
    "without-data": (lambda path: write_file(path, header_of(TENSORS), 0), "is cut: a ends at byte 24"),
    "bytes-at-the-end": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "and the file has"),
    "git-lfs-pointer": (
        lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "is a pointer of Git LFS",
    ),
    "web-page": (
        lambda path: path.write_bytes(b"<!DOCTYPE html><html>Sign in</html>"),
        "is not a safetensors",
    ),
    "pickle": (lambda path: torch.save({"a": torch.zeros(9)}, path), "is not a safetensors file"),
    "not-json": (lambda path: write_file(path, b"not json", 0), "its header is not JSON"),
    "not-unicode": (lambda path: write_file(path, b'{"\xff": 1}', 0), "its header is not JSON"),
    "nested": (lambda path: write_file(path, b"[" * 100_000, 0), "its header is not JSON"),
    "list": (lambda path: write_file(path, b"[]", 0), "its header is not a JSON object"),
    "name-twice": (lambda path: write_file(path, b'{"a": {}, "a": {}}', 0), "its header has a twice"),
    "entry-is-text": (lambda path: write_file(path, changed(b="x"), WHOLE), "entry of b has no dtype"),
    "no-offsets": (
        lambda path: write_file(path, changed(b={"dtype": "F32", "shape": [1]}), WHOLE),
        "of b has no",
    ),
    "one-offset": (
        lambda path: write_file(path, changed(b=entry("F32", [1], [0])), WHOLE),
        "of b has no dtype",
    ),
    "negative": (
        lambda path: write_file(path, changed(b=entry("F32", [-1], [0, 4])), WHOLE),
        "of b has no dtype",
    ),
    "float-shape": (
        lambda path: write_file(path, changed(b=entry("F32", [1.0], [0, 4])), WHOLE),
        "of b has no",
    ),
    "unknown-dtype": (
        lambda path: write_file(path, changed(b=entry("F128", [5], [24, 34])), WHOLE),
        "dtype F128",
    ),
    "another-shape": (
        lambda path: write_file(path, changed(b=entry("BF16", [6], [24, 34])), WHOLE),
        r"b is BF16 \[6\], and its data_offsets 24 to 34 hold 10 bytes",
    ),
    "backwards": (
        lambda path: write_file(path, changed(b=entry("U8", [0], [34, 24])), WHOLE),
        "hold -10 bytes",
    ),
    "overlap": (
        lambda path: write_file(path, changed(b=entry("BF16", [5], [22, 32])), WHOLE),
        "b begins at byte 22",
    ),
    "hole": (
        lambda path: write_file(path, {k: v for k, v in header_of(TENSORS).items() if k != "b"}),
        "c begins at byte 34 of the data, and the tensors before it end at 24",
    ),
    "offsets-beyond-the-file": (
        lambda path: write_file(path, header_of({"a": ("F32", [1 << 61])}), 64),
        "is cut: a ends at byte",
    ),
}


@pytest.mark.parametrize("name", DAMAGED_FILES)
def test_a_damaged_file_is_rejected_as_by_the_library(tmp_path: Path, name: str) -> None:
    path = tmp_path / "part.safetensors"
    write_file(path, header_of(TENSORS))
    damage, message = DAMAGED_FILES[name]
    damage(path)
    with pytest.raises(InvalidCheckpoint, match=rf"part.safetensors.*{message}"):
        read_header(path)
    if name != "name-twice":  # the library takes the last
        with pytest.raises(SafetensorError), safe_open(path, "pt"):
            pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of three shards."""
    return write_folder(tmp_path, {}, TENSORS, 3)


def shard(number: int) -> str:
    return f"model-{number:05d}-of-00002.safetensors"


def change_index(folder: Path, **files: str | None) -> None:
    """Change the index: the file of a tensor, or None to take it out."""
    index = json.loads((folder / INDEX).read_text())
    weight_map = {k: v for k, v in (index["weight_map"] | files).items() if v is not None}
    (folder / INDEX).write_text(json.dumps(index | {"weight_map": weight_map}))


def test_a_folder_of_one_file_or_of_shards_is_read(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    one = write_folder(tmp_path_factory.mktemp("one"), {}, TENSORS)
    found = read_folder(folder)
    assert found.keys() == read_folder(one).keys() == TENSORS.keys()
    assert {name: tensor.file for name, tensor in found.items()} == json.loads((folder / INDEX).read_text())[
        "weight_map"
    ]


def test_files_that_the_index_does_not_name_are_ignored(folder: Path) -> None:
    before = read_folder(folder)
    write_file(folder / "model-00001-of-00009.safetensors", header_of({"a": ("F32", [9])}))
    (folder / "original").mkdir()
    write_file(folder / "original" / SINGLE, header_of({"a": ("F32", [9])}))
    (folder / "metal").mkdir()
    (folder / "metal" / "model.bin").write_bytes(b"GPT-OSS")
    (folder / "pytorch_model.bin").write_bytes(b"old")
    assert read_folder(folder) == before


INCOMPLETE_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no-shard": (
        lambda folder: (folder / shard(1)).unlink(),
        rf"{shard(1)}, which {INDEX} names, is missing",
    ),
    "no-index": (lambda folder: (folder / INDEX).unlink(), rf"{shard(0)}, .* and no {INDEX}"),
    "config-alone": (
        lambda folder: [path.unlink() for path in folder.iterdir() if path.name != "config.json"],
        "has no .*safetensors file",
    ),
    "pytorch-files-alone": (
        lambda folder: [path.rename(path.with_suffix(".bin")) for path in folder.glob("model*")],
        "has no .*safetensors file. It has model-00000-of-00002.bin",
    ),
    "empty-folder": (
        lambda folder: [path.unlink() for path in folder.iterdir()],
        "has no .*safetensors file",
    ),
    "two-checkpoints": (
        lambda folder: write_file(folder / SINGLE, header_of(TENSORS)),
        f"two checkpoints: {SINGLE}, and the files that {INDEX} names",
    ),
    "index-not-json": (
        lambda folder: (folder / INDEX).write_text("version https://git"),
        f"{INDEX} is not JSON",
    ),
    "index-is-a-list": (lambda folder: (folder / INDEX).write_text("[]"), f"{INDEX} is not a JSON object"),
    "index-without-map": (lambda folder: (folder / INDEX).write_text("{}"), f"{INDEX} has no weight_map"),
    "index-maps-nothing": (
        lambda folder: (folder / INDEX).write_text('{"weight_map": {}}'),
        "has no weight_map",
    ),
    "index-names-a-number": (
        lambda folder: (folder / INDEX).write_text('{"weight_map": {"a": 1}}'),
        "the file of a is 1, not the name",
    ),
    "index-names-another-folder": (
        lambda folder: change_index(folder, a="../model.safetensors"),
        "the file of a is '../model.safetensors'",
    ),
    "in-the-index-alone": (
        lambda folder: change_index(folder, extra=shard(0)),
        f"extra is missing in {shard(0)}",
    ),
    "in-a-shard-alone": (
        lambda folder: change_index(folder, b=None),
        f"b is in {shard(1)} but not in {INDEX}",
    ),
    "in-another-shard": (
        lambda folder: change_index(folder, a=shard(1)),
        f"a is in {shard(0)}, and {INDEX} says that it is in {shard(1)}",
    ),
    "in-two-shards": (
        lambda folder: write_file(folder / shard(2), header_of({k: TENSORS[k] for k in ("a", "c", "d")})),
        f"a is in {shard(0)} and again in {shard(2)}",
    ),
    "cut-shard": (
        lambda folder: (folder / shard(1)).write_bytes((folder / shard(1)).read_bytes()[:-2]),
        f"{shard(1)} is cut",
    ),
    "shard-is-a-folder": (
        lambda folder: [(folder / shard(1)).unlink(), (folder / shard(1)).mkdir()],
        f"{shard(1)}, which {INDEX} names, is missing",
    ),
}


@pytest.mark.parametrize("name", INCOMPLETE_FOLDERS)
def test_an_incomplete_folder_is_rejected_by_name(folder: Path, name: str) -> None:
    damage, message = INCOMPLETE_FOLDERS[name]
    damage(folder)
    with pytest.raises(InvalidCheckpoint, match=message):
        read_folder(folder)


@pytest.mark.parametrize(
    "content, message",
    [
        pytest.param(b"", "is not JSON", id="empty"),
        pytest.param(b"<html>", "is not JSON", id="web-page"),
        pytest.param(b"\xff\xfe{}", "is not JSON", id="not-unicode"),
        pytest.param(b"[1]", "is not a JSON object", id="list"),
        pytest.param(b"null", "is not a JSON object", id="null"),
        pytest.param(b'{"a": 1, "a": 2}', "has a twice", id="twice"),
        pytest.param(b"{" + b'"a":' * 1, "is not JSON", id="cut"),
        pytest.param(b'{"a": ' + b"9" * 5000 + b"}", "is not JSON", id="number-of-5000-digits"),
    ],
)
def test_json_that_is_no_object_is_rejected(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InvalidCheckpoint, match=rf"config.json {message}"):
        read_json_object(tmp_path / "config.json")


def test_headers_are_read_without_a_tensor_library() -> None:
    code = (
        "import sys, vpmoe.checkpoint.safetensors_header; "
        "assert not {'torch', 'numpy', 'safetensors', 'transformers', 'vllm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=True)
