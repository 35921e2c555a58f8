"""The volume between trainer and sampler: versions appear whole, a kill leaves nothing to read, and they are
removed when no sampler loads them. Kills and locks are those of real processes."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vpmoe.api import DistillRun
from vpmoe.api.text import write_yaml
from vpmoe.failure import Terminated
from vpmoe.provenance import Provenance
from vpmoe.rollout import policy_version
from vpmoe.rollout.policy_version import PolicyVersion, Probe
from vpmoe.rollout.version_volume import MANIFEST, VersionVolume
from vpmoe.storage import BLOCK, Bucket, StorageError, manifest, paths
from vpmoe.storage.blocks import hash_files
from vpmoe.storage.bucket import json_bytes
from vpmoe.storage.manifest import Input

ROOT = Path(__file__).parents[3]
STAGE = "onpolicy"
HEX = "0123456789abcdef" * 4
INPUTS = [Input(name, "s3://x", {"sha256": HEX}, {}) for name in ("tokenizer", "dataset")]
PROVENANCE = Provenance(None, None, HEX, "default", "tiny", "01234567", STAGE, 1, "2026-01-01T00:00:00Z")


def go_on() -> None:
    """A check_stop that never raises."""


def facts(version: int) -> PolicyVersion:
    return PolicyVersion(
        version=version,
        steps=version,
        tokens=version,
        iteration=version,
        first_sequence=0,
        first_prompt=0,
        probe=Probe(ids=((1, 2),), logp=((-1.0,),)),
    )


@pytest.fixture
def run(run_spec: dict[str, Any]) -> DistillRun:
    return DistillRun.parse(run_spec)


@pytest.fixture
def volume(tmp_path: Path, run: DistillRun) -> VersionVolume:
    return VersionVolume(tmp_path / "volume", run, STAGE)


def write(volume: VersionVolume, run: DistillRun, version: int) -> dict[str, Any]:
    """Write a version of two random files, one of more than a block; returns its manifest."""
    key = paths.weights(run, STAGE, version)
    with volume.new_version() as folder:
        (folder / "config.json").write_bytes(os.urandom(100))
        (folder / "model.safetensors").write_bytes(os.urandom(BLOCK + 5))
        files = {f"{key}/{file.name}": file for file in sorted(folder.iterdir())}
        made = manifest.statement(
            policy_version.KIND,
            [stored.subject(key) for stored in hash_files(files, 2)],
            facts(version).dump(),
            PROVENANCE,
            INPUTS,
        )
        volume.add(folder, version, made)
    return made


def versions(volume: VersionVolume) -> list[str]:
    """The folders of versions that are there, and everything that a writer left."""
    return sorted(path.name for path in volume.folder(0).parent.iterdir())


def in_process(volume: VersionVolume, tmp_path: Path, script: str) -> subprocess.Popen[str]:
    """A process that runs `script` with `volume` and `run`; it prints a line when it is ready."""
    (tmp_path / "run.yaml").write_text(write_yaml(volume._run.document()))
    head = f"""
        import os, signal, sys
        from pathlib import Path
        from vpmoe.api import load_run
        from vpmoe.rollout.version_volume import VersionVolume
        from tests.unit.rollout.test_version_volume import STAGE, go_on, write
        run = load_run(Path({str(tmp_path / "run.yaml")!r}))
        volume = VersionVolume(Path({str(volume._root)!r}), run, STAGE)
        def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(script)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_version_is_found_and_read_as_it_was_written(volume: VersionVolume, run: DistillRun) -> None:
    assert volume.find(3) is None and not volume.has(3)
    made = write(volume, run, 3)
    found = volume.find(3)
    assert found is not None and volume.has(3)
    published, of_version = found
    assert of_version == facts(3) and published.raw == manifest.parse("", json_bytes(made)).raw
    with volume.reading(published, go_on) as folder:
        assert folder == volume.folder(3)
        assert {path.name for path in folder.iterdir()} == {*published.subjects, MANIFEST}
        modes = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
        assert (modes, folder.stat().st_mode & 0o777) == ({0o664}, 0o775), "pods of one group share it"
    assert versions(volume) == ["v000003"]


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(BLOCK + 2)
        byte = file.read(1)
        file.seek(BLOCK + 2)
        file.write(bytes([byte[0] ^ 1]))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit": (
        lambda folder: flip(folder / "model.safetensors"),
        f"model.safetensors was altered: the sha256 of bytes {BLOCK} to {BLOCK + 5}",
    ),
    "cut off": (
        lambda folder: os.truncate(folder / "model.safetensors", 9),
        f"model.safetensors has 9 bytes, and its manifest says {BLOCK + 5}",
    ),
    "a file is gone": (lambda folder: (folder / "config.json").unlink(), "was removed"),
    "the version is gone": (lambda folder: folder.rename(folder.with_name("elsewhere")), "was removed"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_version_is_not_used_again(
    volume: VersionVolume, run: DistillRun, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(volume, run, 3)
    found = volume.find(3)
    assert found is not None
    change, message = DAMAGES[damage]
    change(volume.folder(3))
    with volume.reading(found[0], go_on) as folder:
        assert folder is None
    assert message in caplog.text and volume.find(3) is None
    write(volume, run, 3)  # by the next attempt of the trainer
    again = volume.find(3)
    assert again is not None and again[0].sha256 != found[0].sha256


def test_a_version_that_was_replaced_is_not_taken_for_the_one_found(
    volume: VersionVolume, run: DistillRun
) -> None:
    write(volume, run, 3)
    found = volume.find(3)
    write(volume, run, 3)
    assert found is not None
    with volume.reading(found[0], go_on) as folder:
        assert folder is None


def test_a_manifest_that_is_none_is_no_version(volume: VersionVolume, run: DistillRun) -> None:
    write(volume, run, 3)
    (volume.folder(3) / MANIFEST).write_text("{")
    assert volume.find(3) is None


def test_verification_can_be_stopped(volume: VersionVolume, run: DistillRun) -> None:
    write(volume, run, 3)
    found = volume.find(3)

    def stop() -> None:
        raise Terminated("stopped")

    assert found is not None
    with pytest.raises(Terminated), volume.reading(found[0], stop):
        pass


KILLS = {
    "while a file is written": "Path.write_bytes = lambda path, data: path.open('wb').write(b'x') and die()",
    "before the files are hashed": "import tests.unit.rollout.test_version_volume as m; m.hash_files = die",
    "before the folder is renamed": "Path.rename = die",
}


@pytest.mark.parametrize("kill", KILLS)
def test_a_killed_trainer_leaves_nothing_to_read(
    volume: VersionVolume, run: DistillRun, tmp_path: Path, kill: str
) -> None:
    """And the next one removes what it left."""
    write(volume, run, 2)
    process = in_process(volume, tmp_path, f"{KILLS[kill]}\nwrite(volume, run, 4)")
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert volume.find(4) is None and volume.find(2) is not None
    assert len(versions(volume)) == 3, "the folder of the killed process, and its lock"
    write(volume, run, 4)
    assert versions(volume) == ["v000002", "v000004"]


def test_a_trainer_that_is_killed_while_it_removes_leaves_nothing_to_read(
    volume: VersionVolume, run: DistillRun, tmp_path: Path
) -> None:
    write(volume, run, 2)
    process = in_process(volume, tmp_path, "import shutil; shutil.rmtree = die\nvolume.prune(3)")
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert volume.find(2) is None and versions(volume) == ["v000002"]
    volume.prune(3)
    assert versions(volume) == []


def test_what_a_sampler_loads_is_removed_when_it_has_ended(
    volume: VersionVolume, run: DistillRun, tmp_path: Path
) -> None:
    """Also if it is killed."""
    for version in (0, 2, 4):
        write(volume, run, version)
    script = """
        with volume.reading(volume.find(2)[0], go_on) as folder:
            print(folder is not None, flush=True)
            sys.stdin.read()
    """
    process = in_process(volume, tmp_path, script)
    assert process.stdout is not None and process.stdout.readline() == "True\n"
    volume.prune(4)
    assert versions(volume) == ["v000002", "v000004"]
    process.kill()
    process.communicate()
    volume.prune(4)
    assert versions(volume) == ["v000004"]


def test_two_threads_may_remove_a_version_at_the_same_time(
    volume: VersionVolume, run: DistillRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer's upload and its main thread do. The second removes all that the first was about to."""
    write(volume, run, 2)
    unlink = Path.unlink

    def slow(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        volume.prune(3)

    monkeypatch.setattr(Path, "unlink", slow)
    volume.prune(3)
    assert versions(volume) == []


def test_a_version_that_a_sampler_is_loading_is_not_replaced(
    volume: VersionVolume, run: DistillRun, bucket: Bucket
) -> None:
    """The trainer was killed before the bucket had it, and its next attempt is quick. The new one is not on
    the volume, and nothing is left of it there."""
    write(volume, run, 2)
    found = volume.find(2)
    assert found is not None
    other = VersionVolume(volume._root, run, STAGE)
    with volume.reading(found[0], go_on) as folder:
        assert folder is not None
        other.clean(bucket)
        with other.new_version() as new:
            assert other.add(new, 2, {}) == new and (new / MANIFEST).exists()
        assert versions(volume) == ["v000002"]
    volume.reject(found[0])
    assert volume.find(2) is None


def test_versions_that_the_bucket_does_not_record_are_removed(
    volume: VersionVolume, run: DistillRun, bucket: Bucket
) -> None:
    """A trainer was killed between the volume and the bucket: the next one may make another version 4. A
    second trainer has published version 6."""
    for version in (2, 4, 6):
        made = write(volume, run, version)
        if version == 2:
            manifest.write(bucket, paths.manifest(paths.weights(run, STAGE, version)), made)
    other = VersionVolume(volume._root.with_name("other"), run, STAGE)
    manifest.write(bucket, paths.manifest(paths.weights(run, STAGE, 6)), write(other, run, 6))
    volume.clean(bucket)
    assert versions(volume) == ["v000002"]


def test_a_full_volume_is_an_error_that_names_the_claim(volume: VersionVolume, run: DistillRun) -> None:
    """And nothing stays. /dev/full answers as a full disk does."""
    with (
        pytest.raises(
            StorageError, match=r"No space left on device.*claim of runtime\.weightsVolume"
        ) as error,
        volume.new_version() as folder,
    ):
        (folder / "whole").write_bytes(b"x")
        (folder / "model.safetensors").symlink_to("/dev/full")
        with (folder / "model.safetensors").open("wb", buffering=0) as file:
            file.write(b"x")
    assert error.value.reason == "Local" and error.value.retriable
    assert versions(volume) == []
