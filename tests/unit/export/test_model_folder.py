"""A model folder is whole or absent, and transformers computes the student from it without this package."""

import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.resources import files
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from tests.fakes.conversations import SYSTEM
from tests.fakes.model_folders import SIZES, random_weights, write_small
from tests.fakes.policy_versions import TINY, is_a_tie, trainer_logp
from tests.fakes.students import COMPLETE, SMALL, new_seed
from vpmoe.checkpoint.safetensors_header import INDEX, read_folder
from vpmoe.data.harmony import Renderer
from vpmoe.data.tokenizer import tokenizer
from vpmoe.data.vocabulary import CALL, RETURN
from vpmoe.export import model_folder
from vpmoe.export.model_folder import write_model_folder
from vpmoe.failure import Permanent
from vpmoe.inference import hf_model
from vpmoe.model import hf_export
from vpmoe.model.configuration_vpmoe import VpmoeConfig
from vpmoe.model.learner import Learner
from vpmoe.model.modeling_vpmoe import VpmoeForCausalLM
from vpmoe.storage.errors import StorageError

TOLERANCE = 1e-4
"""Nats, as in tests/unit/inference/test_student.py."""

STANDALONE = """
    import importlib.util, json, socket, sys
    assert all(importlib.util.find_spec(name) is None for name in ("vpmoe", "jobs", "tests"))

    def refuse_network(event, arguments):
        if event in ("socket.connect", "socket.getaddrinfo"):
            raise RuntimeError(f"{event}: {arguments}")

    sys.addaudithook(refuse_network)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = sys.argv[1]
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__name__ == "VpmoeForCausalLM" and model.dtype == torch.float32
    found = []
    with torch.no_grad():
        for ids in json.load(sys.stdin):
            ids = torch.tensor(ids)
            logp = model(ids[None]).logits[0, :-1].double().log_softmax(1)
            found.append(logp.gather(1, ids[1:, None])[:, 0].tolist())
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "How deep is the pond?"}],
            add_generation_prompt=True, return_tensors="pt", return_dict=True,
        )
        cached, plain = (
            model.generate(**prompt, max_new_tokens=12, do_sample=False, use_cache=use_cache)
            for use_cache in (True, False)
        )
        sampled = model.generate(**prompt, max_new_tokens=12)
    assert torch.equal(cached, plain)
    settings = model.generation_config
    print(json.dumps({
        "logp": found,
        "prompt": prompt["input_ids"][0].tolist(),
        "greedy": cached[0].tolist(),
        "sampled": sampled[0].tolist(),
        "eos": settings.eos_token_id,
        "top_k": settings.top_k,
        "modules": sorted({name.partition(".")[0] for name in sys.modules}),
    }))
"""


def test_transformers_computes_the_student_without_this_package(
    student: Learner, folder: Path, tmp_path: Path
) -> None:
    """Log-probabilities equal the trainer's, in a process that has neither this package nor a network."""
    chance = np.random.default_rng(new_seed())
    render = Renderer(tokenizer(), SYSTEM).render
    sequences = [
        render("How deep?", None, "≈ 3 m " * chance.integers(1, 60), "3 m " * chance.integers(1, 60)).ids
        for _ in range(4)
    ]
    done = subprocess.run(
        [sys.executable, "-I", "-c", textwrap.dedent(STANDALONE), str(folder)],
        input=json.dumps([ids_T.tolist() for ids_T in sequences]),
        cwd=tmp_path,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("TIKTOKEN")},
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HOME": str(tmp_path / "hub"),
            "HF_MODULES_CACHE": str(tmp_path / "modules"),
        },
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert not {"vpmoe", "megatron", "tiktoken", "openai_harmony", "gigatoken"} & set(found["modules"])
    equal = 0
    for ids_T, got, expected in zip(sequences, found["logp"], trainer_logp(student, sequences), strict=True):
        assert expected.std() > 0.5
        if np.abs(np.array(got) - expected).max() <= TOLERANCE:
            equal += 1
        else:  # once in some ten thousand positions two experts are equal to the last bits
            assert is_a_tie(student, ids_T, TOLERANCE)
    assert equal >= 3
    assert found["eos"] == [RETURN, CALL] and found["top_k"] == 0
    length = len(found["prompt"])
    assert found["greedy"][:length] == found["sampled"][:length] == found["prompt"]
    (expected,) = trainer_logp(student, [np.array(found["greedy"], np.int32)])
    assert len(found["greedy"]) > length and (expected[length - 1 :] > np.log(1e-5)).all()


def test_the_code_is_the_packages_own_and_needs_only_transformers_and_torch(folder: Path) -> None:
    for name in model_folder.CODE:
        assert (folder / name).read_bytes() == (files("vpmoe.model") / name).read_bytes()
        assert set(get_imports(folder / name)) <= {"torch", "transformers", "typing", "collections"}
    needed = {Path(name).name for name in get_relative_import_files(folder / "modeling_vpmoe.py")}
    assert {*needed, "modeling_vpmoe.py"} == set(model_folder.CODE)
    assert VpmoeConfig.model_type == hf_export.MODEL_TYPE
    assert VpmoeForCausalLM.__name__ == hf_export.ARCHITECTURE


def test_the_folder_is_a_student_for_this_package(folder: Path) -> None:
    hf_export.check_export(folder, TINY)
    assert {oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == {"0o644"}
    assert type(hf_model.load_student(folder, TINY)) is VpmoeForCausalLM
    assert {path.name for path in folder.iterdir()} == {
        *model_folder.CODE,
        "model-00001-of-00001.safetensors",
        INDEX,
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }


def test_weights_are_in_several_files_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_export, "FILE_BYTES", 10_000)
    write_small(tmp_path / "model")
    stored = read_folder(tmp_path / "model")
    assert set(stored) == set(hf_export.exported_tensors(SMALL))
    names = sorted({tensor.file for tensor in stored.values()})
    assert len(names) > 3 and names == [
        f"model-{number:05}-of-{len(names):05}.safetensors" for number in range(1, len(names) + 1)
    ]
    total = sum(tensor.stop - tensor.start for tensor in stored.values())
    index = json.loads((tmp_path / "model" / INDEX).read_text())
    assert index["metadata"]["total_size"] == total == hf_export.weight_bytes(SMALL, torch.bfloat16)
    for name in names:
        held = load_file(tmp_path / "model" / name)
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= 10_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_are_those_of_the_safetensors_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """For any number of threads. Of a student with tensors of both types, and with one file of several."""
    monkeypatch.setattr(hf_export, "FILE_BYTES", 60_000)
    parts = hf_export.exported_tensors(COMPLETE).values()
    sizes = {part.source: math.prod(part.view) for part in parts}
    for threads in (1, 3):
        hf_export.write_weights(tmp_path / str(threads), COMPLETE, sizes, random_weights, dtype, threads)
    files = hf_export.weight_files(tmp_path / "1")
    assert len(files) > 3 and max(len(load_file(file)) for file in files) > 1
    for file in files:
        save_file(load_file(file), tmp_path / "library", metadata={"format": "pt"})
        assert file.read_bytes() == (tmp_path / "library").read_bytes()
        assert file.read_bytes() == (tmp_path / "3" / file.name).read_bytes()


def write_until_killed(folder: Path, last: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Write the folder in a process that kills itself when it reads tensor number `last`, or before it
    renames the folder. Returns its exit code. A fork: to import torch again takes longer than all else."""
    reads = count(1)

    def kill(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def read(name: str, start: int, stop: int) -> torch.Tensor:
        if next(reads) == last:
            kill()
        return random_weights(name, start, stop)

    if not (child := os.fork()):
        try:
            monkeypatch.setattr(Path, "rename", kill)
            write_small(folder, read)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(
    "reads",
    [1, len(hf_export.exported_tensors(SMALL)), 0],
    ids=["first-tensor", "last-tensor", "before-the-end"],
)
def test_a_killed_process_leaves_nothing_that_looks_whole(
    tmp_path: Path, reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    assert write_until_killed(folder, reads, monkeypatch) == -signal.SIGKILL
    left = [path.name for path in tmp_path.iterdir()]
    assert left and all(name.startswith("vpmoe_") for name in left)
    if reads:
        assert not list(tmp_path.rglob("config.json"))
    write_small(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    hf_export.check_export(folder, SMALL)


@pytest.fixture
def limit_files() -> Iterator[Callable[[int], None]]:
    """A function that limits this process' files to a number of bytes: writing fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [10_000, 10 << 20], ids=["weights", "tokenizer"])
def test_a_full_disk_is_named_and_leaves_nothing(
    tmp_path: Path, limit_files: Callable[[int], None], size: int
) -> None:
    limit_files(size)
    message = rf"{re.escape(str(tmp_path))}/model cannot be written: .*The model needs [0-9]+ bytes there"
    with pytest.raises(StorageError, match=message) as caught:
        write_small(tmp_path / "model")
    assert caught.value.reason == "Local" and not list(tmp_path.iterdir())


def test_too_small_a_disk_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    def read(name: str, start: int, stop: int) -> torch.Tensor:
        raise AssertionError("not to be called")

    huge = replace(SMALL, hidden=1 << 40)
    with pytest.raises(StorageError, match=r"[0-9]+ bytes are free. The model needs [0-9]{15,} bytes"):
        write_model_folder(
            tmp_path / "model", huge, sizes={}, read=read, dtype=torch.bfloat16, positions=1, system=SYSTEM
        )
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(Permanent, match=r"model exists already\. Remove it, or name another folder"):
        write_small(tmp_path / "model")
    assert not list((tmp_path / "model").iterdir())


def test_what_the_reader_raises_is_raised_and_leaves_nothing(tmp_path: Path) -> None:
    def read(name: str, start: int, stop: int) -> torch.Tensor:
        raise StorageError("altered", "Altered")

    with pytest.raises(StorageError, match=r"^altered$"):
        write_small(tmp_path / "model", read)
    with pytest.raises(Permanent, match="main/output is missing"):
        write_model_folder(
            tmp_path / "model",
            SMALL,
            sizes={name: size for name, size in SIZES.items() if name != "main/output"},
            read=random_weights,
            dtype=torch.bfloat16,
            positions=256,
            system=SYSTEM,
        )
    assert not list(tmp_path.iterdir())


def test_two_processes_may_write_into_one_parent(tmp_path: Path) -> None:
    """One does not remove the other's temporary folder."""
    written = []

    def read(name: str, start: int, stop: int) -> torch.Tensor:
        if not written:
            written.append(name)
            write_small(tmp_path / "inner")
        return random_weights(name, start, stop)

    write_small(tmp_path / "outer", read)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inner", "outer"]
    shutil.rmtree(tmp_path / "inner")
