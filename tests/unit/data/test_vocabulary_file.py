"""The vocabulary reaches both tokenizers offline, from the package alone."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from vpmoe.data import vocabulary, vocabulary_file
from vpmoe.failure import Permanent

BOTH = """
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


def test_both_tokenizers_work_with_no_network_no_home_and_only_tmpdir(tmp_path: Path) -> None:
    environment = {
        "TMPDIR": str(tmp_path),
        "HOME": "/nonexistent",
        "PATH": "/usr/bin:/bin",
        "https_proxy": "http://127.0.0.1:1",
    }
    done = subprocess.run(
        [sys.executable, "-c", BOTH], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parent == tmp_path


def test_the_file_lies_under_both_names_with_the_right_sha(
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


def test_another_vocabulary_in_the_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary_file, "VOCABULARY_SHA256", "0" * 64)
    with pytest.raises(Permanent, match="expected 0000"):
        vocabulary_file.packaged()
