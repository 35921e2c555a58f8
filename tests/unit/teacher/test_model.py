"""The teacher's model: its files are pinned when a run starts, and its vocabulary is that of the datasets."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

from tests.fakes import fake_hub
from tests.fakes.sparse_checkpoint import header_of, write_file, write_folder
from vpmoe.api import DistillRun
from vpmoe.data import vocabulary_file
from vpmoe.failure import Permanent, Terminated
from vpmoe.pretrained.model_files import ModelRef, folder_name
from vpmoe.storage import BLOCK, Bucket, StorageError, paths
from vpmoe.teacher import model

ROOT = Path(__file__).parents[3]
FILES = {
    "config.json": b'{"vocab_size": 201088}',
    "model.safetensors": os.urandom(2 * BLOCK + 7),
    "empty.txt": b"",
    "original/model.safetensors": b"the same again",
}


@pytest.fixture
def run(run_spec: dict[str, Any], bucket: Bucket) -> DistillRun:
    """A run whose teacher is FILES."""
    for name, data in FILES.items():
        bucket.put_bytes(f"models/teacher/{name}", data, {})
    return DistillRun.parse(run_spec)


def test_a_model_is_the_files_of_its_directory(run: DistillRun, bucket: Bucket) -> None:
    found = model.resolve_teacher(run, bucket)
    assert [(file.name, file.size) for file in found.files] == [
        (name, len(FILES[name])) for name in sorted(FILES) if "/" not in name
    ]
    assert bucket.get_json(paths.teacher(run))["files"][0]["name"] == "config.json"


def test_files_added_later_do_not_change_the_run_s_teacher(run: DistillRun, bucket: Bucket) -> None:
    before = model.resolve_teacher(run, bucket)
    bucket.put_bytes("models/teacher/generation_config.json", b"{}", {})
    assert model.resolve_teacher(run, bucket) == before
    assert model.find_teacher(run.spec.teacher.model, bucket).sha256 != before.sha256


def test_equal_files_in_another_folder_are_the_same_teacher(run: DistillRun, bucket: Bucket) -> None:
    for name, data in FILES.items():
        bucket.put_bytes(f"copy/{name}", data, {})
    copy = model.find_teacher(f"s3://{bucket.name}/copy/", bucket)
    assert copy.sha256 == model.resolve_teacher(run, bucket).sha256 and copy.model != run.spec.teacher.model


def test_a_folder_without_a_model_is_rejected(run: DistillRun, bucket: Bucket) -> None:
    with pytest.raises(Permanent, match=r"teacher.model: s3://.*/models/teach has no config.json"):
        model.find_teacher(
            f"s3://{bucket.name}/models/teach", bucket
        )  # a prefix of the folder's name is not the folder


@pytest.mark.parametrize(
    "names",
    [
        pytest.param([], id="config-alone"),
        pytest.param(["pytorch_model.bin"], id="pickle"),
        pytest.param(["model.gguf"], id="gguf"),
        pytest.param(["original/model.safetensors"], id="in-a-folder-alone"),
        pytest.param(["model.safetensors.index.json"], id="index-alone"),
        pytest.param(["tokenizer.json", "metal/model.bin"], id="tokenizer-alone"),
    ],
)
def test_a_folder_without_weights_is_rejected_before_it_is_downloaded(
    bucket: Bucket, names: list[str]
) -> None:
    for name in ["config.json", *names]:
        bucket.put_bytes(f"models/empty/{name}", b"{}", {})
    with pytest.raises(Permanent, match=r"^teacher.model: s3://.*/models/empty has no \*.safetensors file"):
        model.find_teacher(f"s3://{bucket.name}/models/empty", bucket)


def test_fetching_downloads_the_files_and_resumes_after_a_stop(
    run: DistillRun, bucket: Bucket, tmp_path: Path
) -> None:
    resolved = model.resolve_teacher(run, bucket)
    checks = 0

    def stop_at_the_third_check() -> None:
        nonlocal checks
        checks += 1
        if checks > 2:
            raise Terminated("asked to stop")

    with pytest.raises(Terminated):
        model.fetch_teacher(resolved, bucket, tmp_path, stop_at_the_third_check)
    assert not list(tmp_path.glob("*/.model*")) and not list(tmp_path.glob("*/model*"))
    before = (tmp_path / folder_name(resolved, bucket) / "config.json").stat()
    directory = model.fetch_teacher(resolved, bucket, tmp_path)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == {
        name: FILES[name] for name in FILES if "/" not in name
    }
    assert (directory / "config.json").stat().st_mtime_ns == before.st_mtime_ns


def test_a_changed_file_is_rejected(run: DistillRun, bucket: Bucket, tmp_path: Path) -> None:
    resolved = model.resolve_teacher(run, bucket)
    bucket.put_bytes("models/teacher/config.json", b'{"vocab_size": 201089}', {})
    with pytest.raises(
        StorageError, match=r"models/teacher/config.json: .* the run was resolved to 22 bytes"
    ):
        model.fetch_teacher(resolved, bucket, tmp_path)


def test_a_cut_file_is_downloaded_again(run: DistillRun, bucket: Bucket, tmp_path: Path) -> None:
    resolved = model.resolve_teacher(run, bucket)
    directory = model.fetch_teacher(resolved, bucket, tmp_path)
    os.truncate(directory / "model.safetensors", BLOCK)
    assert model.fetch_teacher(resolved, bucket, tmp_path) == directory
    assert (directory / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_teachers_of_two_sources_never_share_a_folder(run: DistillRun, bucket: Bucket) -> None:
    """Stores need not derive ETags from content."""
    found = model.resolve_teacher(run, bucket)
    other_store = bucket.other(bucket.name)
    other_store.endpoint = "https://other.example.com"
    names = {
        folder_name(found, bucket),
        folder_name(found, other_store),
        folder_name(replace(found, model="s3://models/teacher"), bucket),
        folder_name(replace(found, files=found.files[:1]), bucket),
    }
    assert len(names) == 4 and all(name.startswith("teacher-") for name in names)
    hub = ModelRef("hf://openai/gpt-oss-20b@main", "0" * 40, found.files)
    same = replace(hub, model=f"hf://openai/gpt-oss-20b@{'0' * 40}", files=())
    assert folder_name(hub, bucket) == folder_name(same, bucket)
    assert folder_name(hub, bucket).startswith("gpt-oss-20b-")


def run_with_hub(endpoint: str, code: str, folder: Path) -> str:
    """Run `code` in a process whose hub is `endpoint`; returns its output.

    The hub's client reads the endpoint when it is imported.
    """
    process = subprocess.run(
        [sys.executable, "-c", f"from pathlib import Path\nfrom vpmoe.teacher import model\n{code}"],
        cwd=ROOT,
        env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "FOLDER": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def test_a_hub_model_is_pinned_to_the_commit_of_its_revision(tmp_path: Path) -> None:
    with fake_hub.serve("openai/gpt-oss-20b", FILES, kind="models") as (endpoint, requests):
        code = f"""
import os
found = model.find_teacher("hf://openai/gpt-oss-20b@main", None)
assert found.sha256 == model.find_teacher("hf://openai/gpt-oss-20b@{fake_hub.COMMIT}", None).sha256
directory = model.fetch_teacher(found, None, Path(os.environ["FOLDER"]) / "models")
print(found.commit, sorted(path.name for path in directory.iterdir() if path.is_file()), directory)
try:
    model.find_teacher("hf://openai/gpt-oss-20b@v9", None)
except Exception as error:
    print(type(error).__name__, error)
"""
        fetched, rejected = run_with_hub(endpoint, code, tmp_path).splitlines()
    assert fetched.startswith(f"{fake_hub.COMMIT} ['config.json', 'empty.txt', 'model.safetensors'] ")
    assert (Path(fetched.split()[-1]) / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert rejected.startswith(
        "Permanent teacher.model: hf://openai/gpt-oss-20b@v9: the Hugging Face hub has no such model or "
        "revision"
    )
    assert not [path for path in requests if "original" in path]


@pytest.fixture(scope="module")
def tokenizer_json() -> dict[str, Any]:
    """A tokenizer.json of the o200k_harmony vocabulary, as the tokenizers library writes it."""
    character = {byte: c for c, byte in model.byte_of_character().items()}
    merges = vocabulary_file.encoding()._mergeable_ranks
    tokenizer = Tokenizer(
        BPE({"".join(character[byte] for byte in token): rank for token, rank in merges.items()}, [])
    )
    tokenizer.add_special_tokens(
        [AddedToken("<|startoftext|>", special=True), AddedToken("<|endoftext|>", special=True)]
    )
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    return content


def write_directory(folder: Path, config: dict[str, Any], **files: bytes) -> Path:
    """Write config.json and `files`, whose names have _ for the dot, into `folder`; returns it."""
    (folder / "config.json").write_text(json.dumps(config))
    for name, data in files.items():
        (folder / name.replace("_", ".")).write_bytes(data)
    return folder


def test_bytes_map_to_the_characters_that_transformers_uses() -> None:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert model.byte_of_character() == {c: byte for byte, c in bytes_to_unicode().items()}


def test_the_vocabulary_of_the_datasets_is_accepted(tmp_path: Path, tokenizer_json: dict[str, Any]) -> None:
    files = {
        "tokenizer_json": json.dumps(tokenizer_json).encode(),
        "o200k_tiktoken": vocabulary_file.packaged(),
    }
    model.check_vocabulary(write_directory(tmp_path, {"vocab_size": 201088}, **files))


def test_a_directory_without_tokenizer_files_is_accepted(tmp_path: Path) -> None:
    model.check_vocabulary(write_directory(tmp_path, {"vocab_size": 201088}))


def test_a_hub_model_is_verified_and_only_damaged_files_are_downloaded_again(tmp_path: Path) -> None:
    with fake_hub.serve("openai/gpt-oss-20b", FILES, kind="models") as (endpoint, requests):
        code = """
import os
found = model.find_teacher("hf://openai/gpt-oss-20b", None)
directory = model.fetch_teacher(found, None, Path(os.environ["FOLDER"]) / "models")
assert model.fetch_teacher(found, None, Path(os.environ["FOLDER"]) / "models") == directory
print("whole", flush=True)
weights = directory / "model.safetensors"
data = weights.read_bytes()
weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
(directory / ".cache/huggingface/download/config.json.x.incomplete").write_bytes(b"half")
model.fetch_teacher(found, None, Path(os.environ["FOLDER"]) / "models")
assert weights.read_bytes() == data
assert not list(directory.glob(".cache/huggingface/download/*.incomplete"))
"""
        assert run_with_hub(endpoint, code, tmp_path) == "whole"
    asked = [path.rpartition("/")[2] for path in requests if "/resolve/" in path]
    assert asked.count("model.safetensors") > asked.count("config.json") > 0


def swap_two_ids(content: dict[str, Any]) -> None:
    """Swap the ids of two tokens."""
    content["model"]["vocab"]["a"], content["model"]["vocab"]["b"] = (
        content["model"]["vocab"]["b"],
        content["model"]["vocab"]["a"],
    )


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(swap_two_ids, id="two-ids-swapped"),
        pytest.param(lambda content: content["model"]["vocab"].pop("hello"), id="one-token-missing"),
        pytest.param(lambda content: content["model"]["vocab"].update({"▁the": 5}), id="not-byte-level"),
        pytest.param(lambda content: content.update(model={"type": "WordPiece"}), id="another-kind"),
    ],
)
def test_another_tokenizer_json_is_rejected(
    tmp_path: Path, tokenizer_json: dict[str, Any], change: Callable[[dict[str, Any]], None]
) -> None:
    content = json.loads(json.dumps(tokenizer_json))
    change(content)
    write_directory(tmp_path, {"vocab_size": 201088}, tokenizer_json=json.dumps(content).encode())
    with pytest.raises(
        Permanent,
        match=r"tokenizer.json: its tokens are another vocabulary .* Give a model with GPT-OSS' tokenizer",
    ):
        model.check_vocabulary(tmp_path)


def test_another_tiktoken_file_is_rejected(tmp_path: Path) -> None:
    write_directory(tmp_path, {"vocab_size": 201088}, cl100k_tiktoken=vocabulary_file.packaged()[:-20])
    with pytest.raises(Permanent, match=r"cl100k.tiktoken: its tokens are another vocabulary"):
        model.check_vocabulary(tmp_path)


@pytest.mark.parametrize(
    "config", [{"vocab_size": 201089}, {"vocab_size": 32000}, {}], ids=["one-more", "small", "none"]
)
def test_another_vocabulary_size_is_rejected(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(
        Permanent, match=rf"config.json says vocab_size {config.get('vocab_size')}, .* such as GPT-OSS"
    ):
        model.check_vocabulary(write_directory(tmp_path, config))


@pytest.mark.parametrize(
    "config, saved, expected",
    [
        pytest.param({"dtype": "float32"}, "bfloat16", "float32", id="dtype"),
        pytest.param({"torch_dtype": "bfloat16"}, "float32", "bfloat16", id="torch_dtype"),
        pytest.param({}, "bfloat16", "bfloat16", id="of-the-weights"),
        pytest.param(
            {"quantization_config": {"quant_method": "mxfp4"}}, "float16", "float16", id="quantised"
        ),
    ],
)
def test_the_dtype_is_that_of_the_config_or_else_of_the_weights(
    tmp_path: Path, config: dict[str, Any], saved: str, expected: str
) -> None:
    names = {"bfloat16": "BF16", "float32": "F32", "float16": "F16"}
    tensors = {"blocks": ("U8", [3]), "lm_head.weight": (names[saved], [2, 2])}
    write_folder(tmp_path, config, tensors, 2)
    write_file(tmp_path / "model-00000-of-00009.safetensors", header_of({"lm_head.weight": ("F64", [1])}))
    assert model.checkpoint_dtype(tmp_path) == expected


def test_a_dtype_in_which_no_engine_computes_is_rejected() -> None:
    for dtype in ("float64", "int8", "auto", "float8_e4m3fn", ["float32"], 16):
        with pytest.raises(Permanent, match=r"config.json declares dtype .*, not one of float32, bfloat16"):
            model.declared_dtype({"dtype": dtype})


def test_a_checkpoint_without_dtype_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(Permanent, match=r"Add dtype to config.json"):
        model.checkpoint_dtype(write_folder(tmp_path, {}, {"blocks": ("U8", [3])}))


def test_modules_that_resolve_the_teacher_import_neither_torch_nor_vllm() -> None:
    code = (
        "import sys, vpmoe.teacher.model, vpmoe.teacher.scores, vpmoe.teacher.subset, vpmoe.teacher.rescore\n"
    )
    code += "assert not {'torch', 'vllm', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
