"""Temporary files: nothing of a killed process stays, and nothing of a living one goes."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from vpmoe.provenance import CHECKOUT
from vpmoe.storage.local import written_whole
from vpmoe.storage.scratch import LOCK, PREFIX, lock_new_folder, remove_leftovers, remove_unlocked

OWNER = """
import subprocess, sys, tempfile, pathlib
from vpmoe.storage.scratch import shared_folder, use_own_folder
folder = use_own_folder()
tempfile.NamedTemporaryFile(delete=False).write(b"x" * 1000)
tempfile.mkdtemp()
shared_folder("kept").mkdir(exist_ok=True)
inner = subprocess.run([sys.executable, "-c", "from vpmoe.storage.scratch import use_own_folder as use;"
                        "print(use())"], capture_output=True, text=True, check=True).stdout.strip()
assert inner == str(folder), "a process that it starts uses the same folder"
print(folder, flush=True)
sys.stdin.read()
"""

POOL = """
import multiprocessing, multiprocessing.util, sys
from vpmoe.storage.scratch import use_own_folder
{before}
use_own_folder()
{after}
print(multiprocessing.util.get_temp_dir(), flush=True)
{end}
"""
"""A process of which multiprocessing has a temporary folder too."""

WRITER = """
import pathlib, sys
from vpmoe.storage.local import written_whole
with written_whole(pathlib.Path(sys.argv[1]), 4, "s3://a/b") as file:
    file.write(b"half")
    file.flush()
    print("half", flush=True)
    sys.stdin.read()
"""


def start(code: str, folder: Path, *arguments: str) -> tuple["subprocess.Popen[str]", str]:
    """A process with this TMPDIR, and the line that it prints when it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=CHECKOUT,
        env={**os.environ, "TMPDIR": str(folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def kill(process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.fixture
def living(tmp_path: Path) -> Iterator[Path]:
    """The folder of a process that lives as long as the test."""
    process, folder = start(OWNER, tmp_path)
    yield Path(folder)
    process.communicate("")


def test_the_next_start_removes_what_a_killed_process_left_and_nothing_else(
    tmp_path: Path, living: Path
) -> None:
    dead = []
    for _ in range(2):
        process, folder = start(OWNER, tmp_path)
        kill(process)
        dead.append(Path(folder))
        assert len(list(dead[-1].iterdir())) == 2, "SIGKILL leaves everything there"
    (tmp_path / "of-another-program").mkdir()
    (tmp_path / f"{PREFIX}without-a-lock-file").mkdir()
    process, folder = start(OWNER, tmp_path)
    assert not any(path.exists() for path in dead)
    assert len(list(living.iterdir())) == 2
    process.communicate("")
    assert process.returncode == 0 and not Path(folder).exists(), "one that ends removes its own"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [
            living.name,
            living.with_suffix(LOCK).name,
            "kept",
            "of-another-program",
            f"{PREFIX}without-a-lock-file",
        ]
    )


def test_many_starts_at_once_do_not_remove_each_others_folders(tmp_path: Path) -> None:
    made, problems = [], []

    def one() -> None:
        for _ in range(20):
            folder, lock = lock_new_folder(tmp_path)
            (folder / "file").write_bytes(b"x")
            remove_leftovers(tmp_path)
            if not (folder / "file").exists():
                problems.append(folder)
            made.append(lock)

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert len(list(tmp_path.glob(f"{PREFIX}*{LOCK}"))) == len(made) == 160
    for lock in made:
        lock.close()
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_half_written_file_of_a_killed_process_goes_with_the_next_attempt(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    process, _ = start(WRITER, tmp_path, str(path))
    alive, _ = start(WRITER, tmp_path, str(path))
    kill(process)
    assert len(list(tmp_path.glob(".model.safetensors.*"))) == 2
    with written_whole(path, 5, "s3://a/b") as file:
        file.write(b"whole")
    assert path.read_bytes() == b"whole"
    assert len(list(tmp_path.glob(".model.safetensors.*"))) == 1, "that of the living process"
    alive.communicate("")
    assert path.read_bytes() == b"half" and list(tmp_path.iterdir()) == [path]


def test_several_write_the_same_file_at_once(tmp_path: Path) -> None:
    """As encoder processes do with the vocabulary, and as pods of a node do. Locks are of open files, so
    threads meet as processes do."""
    path, errors = tmp_path / "vocabulary", []

    def write(content: bytes) -> None:
        try:
            for _ in range(40):
                with written_whole(path, len(content), "pkg:pypi/package") as file:
                    file.write(content)
                assert len(set(path.read_bytes())) == 1
        except Exception as error:  # noqa: BLE001 (raised below)
            errors.append(error)

    threads = [threading.Thread(target=write, args=(bytes([number]) * 1000,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_locked_stays(tmp_path: Path) -> None:
    """A folder, a broken link and a file that is not there are no files of ours."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    remove_unlocked([tmp_path / "folder", tmp_path / "link", tmp_path / "gone"])
    assert (tmp_path / "folder").is_dir() and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize(
    "before, after, end",
    [
        ("", "", ""),
        ("import multiprocessing.forkserver, concurrent.futures.process", "", ""),
        ("", "import concurrent.futures.process", "sys.exit(3)"),
        ("import tempfile; tempfile.gettempdir()", "", "raise ValueError('the last line')"),
        (
            "child = multiprocessing.get_context('fork').Process(target=print)",
            "child.start()",
            "child.join()",
        ),
        ("child = multiprocessing.get_context('forkserver').Process(target=print)", "child.start()", ""),
    ],
)
def test_the_end_of_a_process_removes_all_folders_without_an_error(
    tmp_path: Path, before: str, after: str, end: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", POOL.format(before=before, after=after, end=end)],
        cwd=CHECKOUT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert str(tmp_path / PREFIX) in done.stdout
    assert "rmtree" not in done.stderr and "FileNotFoundError" not in done.stderr, done.stderr
    assert done.stderr == "" or done.stderr.endswith("ValueError: the last line\n")
    assert not list(tmp_path.iterdir())
