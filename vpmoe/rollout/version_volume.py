"""Policy versions on a volume that the trainer's first pod and the sampler's pod mount
(runtime.weightsVolume): the sampler loads a version without waiting for its upload and download.

The bucket stays the record. The trainer writes a version here first and uploads it from here; the sampler may
sample from it at once, but writes no window before the bucket records the same version.

    <volume>/runs/<namespace>/<name>-<uid8>/weights/<stage>/v000012/    files and manifest.json of the bucket
    …/weights/<stage>/vpmoe_1f2e, vpmoe_1f2e.lock                       a version that is being written

A version's folder appears whole, by one rename. Nothing is synced to the disk: what a node's crash cuts off
is found by its sha256. The trainer is the only writer. The sampler locks a version's manifest (flock, shared)
while it loads the version, and the trainer removes what it can lock alone.
"""

import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from vpmoe.api import DistillRun
from vpmoe.rollout import policy_version
from vpmoe.rollout.policy_version import PolicyVersion
from vpmoe.storage import Bucket, StorageError, manifest, paths
from vpmoe.storage.blocks import file_fault
from vpmoe.storage.bucket import json_bytes
from vpmoe.storage.manifest import Manifest
from vpmoe.storage.scratch import temporary_folder

log = logging.getLogger(__name__)

VARIABLE = "VPMOE_WEIGHTS_VOLUME"
"""Variable of pods with runtime.weightsVolume: where it is mounted."""
MANIFEST = "manifest.json"
THREADS = 12
"""Blocks of a version that are verified at the same time."""
FOLDER_MODE, FILE_MODE = 0o775, 0o664
"""Pods of one group share the volume: those that train with capabilities run as another user."""


def mounted_volume() -> Path | None:
    """Where the volume of this process's pod is mounted; None if it has none."""
    root = os.environ.get(VARIABLE)
    return Path(root) if root else None


class VersionVolume:
    """The versions of one stage on the volume.

    Methods raise StorageError (Local) if the volume is full, or cannot be read or written.
    """

    def __init__(self, root: Path, run: DistillRun, stage: str) -> None:
        """`root`: where the volume is mounted."""
        self._root, self._run, self._stage = root, run, stage
        self._unusable: set[str] = set()
        """sha256 of the manifests of versions that could not be read, or that the bucket does not have."""

    def folder(self, version: int) -> Path:
        """The folder of a version."""
        return self._root / paths.weights(self._run, self._stage, version)

    # The trainer's side

    def clean(self, bucket: Bucket) -> None:
        """Remove the versions that the bucket does not record: the trainer that wrote them was killed, and
        the one that continues may make others. Called once, before the first `new_version`.

        Raises StorageError, too, if the volume has no locks.
        """
        with self._explained():
            self._make_folder()
            probe = self.folder(0).parent / ".lock"
            with probe.open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_SH)
            probe.unlink()
            for version in self._versions():
                recorded = policy_version.find_version(bucket, self._run, self._stage, version)
                found = self.find(version)
                if recorded is None or found is None or recorded[0].sha256 != found[0].sha256:
                    self._remove(version)

    @contextmanager
    def new_version(self) -> Iterator[Path]:
        """An empty folder on the volume, for `add`. It is removed at the end unless it was added, and by the
        next such call if the process is killed."""
        with self._explained():
            self._make_folder()
            with temporary_folder(self.folder(0).parent) as folder:
                yield folder

    def add(self, folder: Path, version: int, statement: Mapping[str, Any]) -> Path:
        """Make the files in `folder`, of `new_version`, the version with this manifest. Returns the folder
        that they are in now.

        That is `folder` if a sampler is loading the version that an earlier attempt of the trainer left: this
        one is then in the bucket only.
        """
        with self._explained():
            (folder / MANIFEST).write_bytes(json_bytes(statement))
            for path in folder.iterdir():
                path.chmod(FILE_MODE)
            folder.chmod(FOLDER_MODE)
            final = self.folder(version)
            if final.exists() and not self._remove(version):
                return folder
            folder.rename(final)
            return final

    def prune(self, below: int) -> None:
        """Remove all versions below `below`. One that a sampler is loading stays until the next call."""
        with self._explained():
            for version in self._versions():
                if version < below:
                    self._remove(version)

    # The sampler's side

    def has(self, version: int) -> bool:
        """Whether the volume has the version."""
        return (self.folder(version) / MANIFEST).exists()

    def find(self, version: int) -> tuple[Manifest, PolicyVersion] | None:
        """A version that is on the volume; None if it is not, or if it has turned out to be unusable.

        Its files are verified by `reading`.
        """
        key = paths.manifest(paths.weights(self._run, self._stage, version))
        try:
            with self._explained():
                found = manifest.parse(key, (self.folder(version) / MANIFEST).read_bytes())
            facts = PolicyVersion.model_validate(found.facts)
        except FileNotFoundError:
            return None
        except ValueError as error:
            log.warning("%s is not usable: its manifest is not one: %s", self.folder(version), error)
            return None
        return None if found.sha256 in self._unusable else (found, facts)

    def reject(self, published: Manifest) -> None:
        """Make `find` not return this version again: it is not the one that the bucket has."""
        self._unusable.add(published.sha256)

    @contextmanager
    def reading(self, published: Manifest, check_stop: Callable[[], None]) -> Iterator[Path | None]:
        """The folder of a version that `find` has returned, which stays until the end of the `with` block,
        with every block of its files verified.

        None if it was removed or altered meanwhile; then `find` does not return it again. `check_stop` is
        called while files are verified; it may raise.
        """
        folder = self._root / published.key.rpartition("/")[0]
        with ExitStack() as held:
            fault = ""
            try:
                with self._explained():
                    lock = held.enter_context(_lock(folder / MANIFEST, fcntl.LOCK_SH))
                    if hashlib.sha256(lock.read()).hexdigest() != published.sha256:
                        fault = "was replaced"
                    for name, subject in published.subjects.items():
                        if not fault and (found := file_fault(folder / name, subject, THREADS, check_stop)):
                            fault = f"is not usable: {name} {found}"
            except (FileNotFoundError, BlockingIOError):
                fault = "was removed"
            if fault:
                log.warning("%s %s. The version has to be taken from the bucket", folder, fault)
                self.reject(published)
            yield None if fault else folder

    def _remove(self, version: int) -> bool:
        """Remove a version: first its name, then its files. False if a sampler is loading it; then it
        stays."""
        folder = self.folder(version)
        try:
            with _lock(folder / MANIFEST, fcntl.LOCK_EX):
                (folder / MANIFEST).unlink()
        except BlockingIOError:
            log.info("%s is being loaded, and is removed later", folder)
            return False
        except FileNotFoundError:
            pass  # no version, or one whose removal was interrupted, or is going on in the other thread
        # The trainer's upload and its main thread remove the same versions at the same time.
        shutil.rmtree(folder, onexc=_unless_missing)
        return True

    def _versions(self) -> list[int]:
        return sorted(
            int(found.name[1:])
            for found in self.folder(0).parent.glob("v*")
            if found.is_dir() and found.name[1:].isdecimal()
        )

    def _make_folder(self) -> None:
        self._root.mkdir(parents=True, exist_ok=True)
        folder = self.folder(0).parent.relative_to(self._root)
        for path in [*reversed(folder.parents), folder]:
            with suppress(FileExistsError):
                (self._root / path).mkdir()
                (self._root / path).chmod(FOLDER_MODE)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns what the volume answers into StorageError."""
        try:
            yield
        except (FileNotFoundError, BlockingIOError):
            raise
        except OSError as error:
            raise StorageError(
                f"{error.filename or self.folder(0).parent}: {error.strerror}. The claim of "
                "runtime.weightsVolume must have locks and room for ⌈staleness / publishEvery⌉ + 1 versions "
                "of each OnPolicy stage that uses it, and user and group 65532 must be able to write it.",
                "Local",
            ) from error


def _unless_missing(_: Callable[..., Any], __: str, error: BaseException) -> None:
    """How shutil.rmtree handles an error: what is gone already needs no removal."""
    if not isinstance(error, FileNotFoundError):
        raise error


def _lock(path: Path, how: int) -> BinaryIO:
    """The file, locked as long as it is open. Raises BlockingIOError if another process has locked it
    otherwise, FileNotFoundError if it is not there any more."""
    file = path.open("r+b" if how == fcntl.LOCK_EX else "rb")
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
        if path.stat().st_ino != os.fstat(file.fileno()).st_ino:
            raise FileNotFoundError(path)
    except BaseException:
        file.close()
        raise
    return file
