"""Both tokenizers load the vocabulary from the package, without a network."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from vpmoe.data import vocabulary, vocabulary_file
from vpmoe.failure import Permanent

LOAD_BOTH_TOKENIZERS = """
import socket
def refuse(*args, **kwargs): raise AssertionError("a tokenizer asked for the network")
socket.socket.connect = socket.create_connection = refuse
from vpmoe.data import vocabulary_file
ours = vocabulary_file.encoding()
from openai_harmony import HarmonyEncodingName, load_harmony_encoding
theirs = load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)
text = "Über 500 Regenwälder → ⟨H≈0.5⟩"
assert ours.encode_ordinary(text) == theirs.encode(text, allowed_special=set())
assert ours.n_vocab == 201088
print(vocabulary_file.install())
"""


def test_both_tokenizers_work_without_network_and_home_directory(tmp_path: Path) -> None:
    environment = {
        "TMPDIR": str(tmp_path),
        "HOME": "/nonexistent",
        "PATH": "/usr/bin:/bin",
        "https_proxy": "http://127.0.0.1:1",
    }
    completed = subprocess.run(
        [sys.executable, "-c", LOAD_BOTH_TOKENIZERS],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    assert Path(completed.stdout.strip()).parent == tmp_path


def test_the_file_has_both_names_and_the_right_sha256(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in vocabulary_file.FOLDER_VARIABLES:
        monkeypatch.setenv(name, "/elsewhere")
    assert vocabulary_file.install(tmp_path / "new") == tmp_path / "new"
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == ["fb374d419588a4632f3f557e76b4b70aebbca790", "o200k_base.tiktoken"]
    for name in names:
        assert (
            hashlib.sha256((tmp_path / "new" / name).read_bytes()).hexdigest() == vocabulary.VOCABULARY_SHA256
        )


def test_a_damaged_file_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in vocabulary_file.FOLDER_VARIABLES:
        monkeypatch.setenv(name, "/elsewhere")
    (tmp_path / vocabulary_file.FOR_HARMONY).write_bytes(b"IQ== 0\n")
    vocabulary_file.install(tmp_path)
    assert (tmp_path / vocabulary_file.FOR_HARMONY).read_bytes() == vocabulary_file.packaged()


def test_another_vocabulary_in_the_package_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary_file, "VOCABULARY_SHA256", "0" * 64)
    with pytest.raises(Permanent, match="expected 0000"):
        vocabulary_file.packaged()
