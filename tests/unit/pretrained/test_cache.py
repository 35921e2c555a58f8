"""The cache of models: files appear whole, are verified, and are downloaded once for all processes."""

import errno
import fcntl
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vpmoe.failure import Permanent, Terminated
from vpmoe.pretrained import cache
from vpmoe.provenance import CHECKOUT
from vpmoe.storage import BLOCK, StorageError
from vpmoe.storage.blocks import hash_bytes
from vpmoe.teacher import folder as teachers

FILES = {"config.json": b"{}", "model.safetensors": os.urandom(2 * BLOCK + 5), "empty.txt": b""}
SIZES = {name: len(data) for name, data in FILES.items()}


class Source:
    """Downloads from FILES, and knows what it was asked for."""

    def __init__(self, before: Callable[[str], None] = lambda name: None) -> None:
        self.asked: list[list[str]] = []
        self.before = before

    def __call__(self, names: list[str], directory: Path) -> Iterator[tuple[str, cache.Blocks]]:
        self.asked.append(sorted(names))
        for name in names:
            self.before(name)
            data = FILES[name]
            blocks = [
                (data[start : start + BLOCK], sha256)
                for start, sha256 in zip(
                    range(0, len(data), BLOCK), hash_bytes(name, data).blocks, strict=True
                )
            ]
            yield name, cache.write_blocks(directory / name, len(data), f"source/{name}", blocks, "")


def complete(folder: Path, source: Source, check_stop: Callable[[], None] = lambda: None) -> Path:
    return cache.complete(teachers.teacher_in(folder), folder, "model-0123", SIZES, source, check_stop)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_files_are_downloaded_once(tmp_path: Path) -> None:
    first, second = Source(), Source()
    directory = complete(tmp_path, first)
    assert contents(directory) == FILES and first.asked == [sorted(FILES)]
    assert complete(tmp_path, second) == directory and second.asked == []


def cut(path: Path) -> None:
    os.truncate(path, BLOCK + 1)


def alter(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(2 * BLOCK + 1)
        byte = file.read(1)
        file.seek(2 * BLOCK + 1)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize(
    "damage, said",
    [
        pytest.param(cut, rf"has {BLOCK + 1} bytes, not {2 * BLOCK + 5}", id="cut"),
        pytest.param(alter, rf"was altered: the sha256 of bytes {2 * BLOCK} to", id="one-bit"),
        pytest.param(lambda path: path.unlink(), "", id="removed"),
        pytest.param(lambda path: path.write_bytes(b""), "has 0 bytes", id="empty"),
    ],
)
def test_a_damaged_file_is_found_and_downloaded_again_and_no_other(
    tmp_path: Path, damage: Callable[[Path], None], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    directory, again = complete(tmp_path, Source()), Source()
    damage(directory / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        complete(tmp_path, again)
    assert contents(directory) == FILES and again.asked == [["model.safetensors"]]
    assert caplog.text == "" if not said else said.partition("(")[0] in caplog.text


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"config.json": 1}', '{"config.json": {"size": 9, "blocks": []}}', "[" * 100_000]
)
def test_files_without_a_readable_record_are_downloaded_again(tmp_path: Path, text: str) -> None:
    directory, again = complete(tmp_path, Source()), Source()
    (tmp_path / "model-0123.json").write_text(text)
    complete(tmp_path, again)
    assert contents(directory) == FILES and again.asked == [sorted(FILES)]


def test_a_download_that_was_stopped_goes_on_with_the_files_that_are_missing(tmp_path: Path) -> None:
    def stop(name: str) -> None:
        if name == "model.safetensors":
            raise Terminated("asked to stop")

    with pytest.raises(Terminated):
        complete(tmp_path, Source(stop))
    again = Source()
    directory = complete(tmp_path, again)
    assert contents(directory) == FILES and again.asked == [["empty.txt", "model.safetensors"]]


PROCESS = """
import hashlib, logging, sys, time
from pathlib import Path
from vpmoe.pretrained import cache
logging.basicConfig(level=logging.INFO)
folder, mode = Path(sys.argv[1]), sys.argv[2]
data = b"x" * 1000

def download(names, directory):
    print("downloads", flush=True)
    for name in names:
        if mode == "killed":
            (directory / f".{name}.part").write_bytes(b"half")
            with cache.written_whole(directory / name, 1000, "source") as file:
                file.write(data[:500])
                file.flush()
                print("half", flush=True)
                sys.stdin.read()
        blocks = [(data, hashlib.sha256(data).hexdigest())]
        yield name, cache.write_blocks(directory / name, 1000, "source", blocks, "")
        time.sleep(0.2)

purpose = cache.Purpose("teacher.model", "the teacher", "", "")
sizes = {f"{n}.safetensors": 1000 for n in range(5)}
directory = cache.complete(purpose, folder, "m", sizes, download, lambda: None)
assert sorted(p.name for p in directory.glob("*.safetensors")) == [f"{n}.safetensors" for n in range(5)]
assert all(p.read_bytes() == data for p in directory.glob("*.safetensors"))
print("done", flush=True)
"""


def start(folder: Path, mode: str = "") -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, str(folder), mode],
        cwd=CHECKOUT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_of_processes_that_start_together_one_downloads(tmp_path: Path) -> None:
    processes = [start(tmp_path) for _ in range(4)]
    printed = [process.communicate()[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert sum("downloads" in lines for lines in printed) == 1
    assert all("done" in lines for lines in printed)


def test_what_a_killed_download_has_left_is_removed_and_its_lock_is_free(tmp_path: Path) -> None:
    killed = start(tmp_path, "killed")
    assert killed.stdout is not None
    while killed.stdout.readline().strip() != "half":
        pass
    killed.kill()
    killed.communicate()
    assert list((tmp_path / "m").glob(".0.safetensors.*")), "it had begun a file"
    assert start(tmp_path).wait() == 0
    assert not list((tmp_path / "m").glob(".0.safetensors.*"))


def test_a_process_that_waits_for_another_can_be_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "PAUSE", 0.01)
    looks = 0

    def stop() -> None:
        nonlocal looks
        looks += 1
        if looks > 3:
            raise Terminated("asked to stop")

    with (tmp_path / "model-0123.lock").open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(Terminated):
            complete(tmp_path, Source(), stop)
    complete(tmp_path, Source())


def test_a_process_that_waited_downloads_nothing_that_the_other_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "PAUSE", 0.01)
    begun, finish, waiting = threading.Event(), threading.Event(), Source()

    def block(name: str) -> None:
        begun.set()
        finish.wait()

    first = threading.Thread(target=complete, args=(tmp_path, Source(block)))
    first.start()
    begun.wait()
    second = threading.Thread(target=complete, args=(tmp_path, waiting))
    second.start()
    finish.set()
    first.join()
    second.join()
    assert waiting.asked == [] and contents(tmp_path / "model-0123") == FILES


def test_a_file_system_without_locks_is_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert contents(complete(tmp_path, Source())) == FILES
    assert "has no locks" in caplog.text


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("volume", [True, False])
def test_a_disk_that_is_too_small_is_said_before_anything_is_downloaded(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, volume: bool
) -> None:
    if volume:
        monkeypatch.setenv(teachers.VARIABLE, str(small_disk))
    source = Source()
    with pytest.raises(StorageError) as caught:
        complete(small_disk, source)
    assert f"need {sum(SIZES.values())} bytes, and " in str(caught.value) and source.asked == []
    assert ("Enlarge the claim of runtime.teacherCache" if volume else "point TMPDIR to more") in str(
        caught.value
    )
    assert caught.value.reason == "Local"


def test_a_read_only_volume_is_enough_for_a_whole_teacher_and_named_for_another(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(teachers.VARIABLE, str(small_disk))
    whole = {"config.json": SIZES["config.json"], "empty.txt": 0}
    teacher = teachers.teacher_in(small_disk)
    cache.complete(teacher, small_disk, "model-0123", whole, Source(), lambda: None)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    source = Source()
    directory = cache.complete(teacher, small_disk, "model-0123", whole, source, lambda: None)
    assert directory == small_disk / "model-0123"
    for name in ("model-0123", "another"):
        with pytest.raises(Permanent, match=r"Read-only file system.*claim of runtime\.teacherCache"):
            cache.complete(teacher, small_disk, name, SIZES, source, lambda: None)
    assert source.asked == []


def test_other_users_of_the_group_can_read_and_complete_the_cache(tmp_path: Path) -> None:
    directory = complete(tmp_path, Source())
    modes = {
        path.name: path.stat().st_mode & 0o777
        for path in (directory, *tmp_path.glob("model*"), *directory.iterdir())
    }
    assert modes.pop("model-0123") == 0o775
    assert set(modes.values()) == {0o664}, modes


@pytest.mark.parametrize("path", ["/dev/null", "/proc/1/x", "a" * 5000, "\x01/\x00"])
def test_a_folder_that_can_be_none_is_permanent(path: str) -> None:
    with pytest.raises((Permanent, ValueError)):
        complete(Path(path), Source())


def test_the_folder_is_the_volume_of_the_run_or_below_tmpdir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(teachers.VARIABLE, raising=False)
    assert teachers.teacher_folder().name == "vpmoe-teacher"
    monkeypatch.setenv(teachers.VARIABLE, str(tmp_path))
    assert teachers.teacher_folder() == tmp_path


def test_the_record_has_every_block(tmp_path: Path) -> None:
    complete(tmp_path, Source())
    record = json.loads((tmp_path / "model-0123.json").read_text())
    assert {name: tuple(found["blocks"]) for name, found in record.items()} == {
        name: hash_bytes(name, data).blocks for name, data in FILES.items()
    }
