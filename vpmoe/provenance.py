"""Where an object comes from: the code, image, configuration, run, step, attempt and Harmony library that
wrote it.

Collected once per process. Every manifest holds all of it, every object's metadata a short form. A process
does not know its inputs when it starts, so they are recorded in the manifest only (vpmoe.storage.manifest).
"""

import functools
import logging
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

log = logging.getLogger(__name__)

CHECKOUT = Path(__file__).resolve().parents[1]
"""The folder that this code is in: a git checkout, or /opt/vpmoe of an image."""
COMMIT_FILE = "commit"
"""File in that folder with the commit that an image was built from, in hexadecimal digits. In a pod it is
/opt/vpmoe/commit: /etc/vpmoe, for example, is hidden there by the volume with the run."""
SHA = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
SYMBOLIC_REFS = 5
"""Symbolic refs that git follows at most."""
HARMONY = "oss-harmony"
"""The distribution that provides the module openai_harmony: vLLM requires it. openai-harmony has files of the
same names, so only one of the two may be installed."""


@dataclass(frozen=True)
class Provenance:
    """The identity of one process. `git_sha` and `image` may be None in a process started by hand."""

    git_sha: str | None
    image: str | None
    config: str
    """Configuration hash of the run."""
    namespace: str
    name: str
    uid8: str
    step: str
    attempt: int
    started: str
    """RFC 3339 in UTC."""
    harmony: str | None = None
    """Package URL, with the version, of the Harmony library, which decides whether a completion is valid.
    None if it is not installed, as in the trainer's image."""

    @property
    def run(self) -> str:
        """namespace/name-uid8"""
        return f"{self.namespace}/{self.name}-{self.uid8}"

    def metadata(self) -> dict[str, str]:
        """The short form for an object's metadata; unknown values are left out."""
        values = {
            "git-sha": self.git_sha,
            "image": self.image,
            "config": self.config,
            "run": self.run,
            "step": self.step,
            "attempt": str(self.attempt),
            "harmony": self.harmony,
        }
        return {name: value for name, value in values.items() if value is not None}


def harmony_package() -> str | None:
    """Package URL of the installed Harmony library, with its version; None if it is not installed."""
    try:
        return f"pkg:pypi/{HARMONY}@{version(HARMONY)}"
    except PackageNotFoundError:
        return None


@functools.cache
def git_sha(checkout: Path = CHECKOUT) -> str | None:
    """The commit of the code in `checkout`: HEAD if it is a git checkout, else what its COMMIT_FILE says,
    else None with a warning.

    HEAD comes first: a COMMIT_FILE in a checkout is left over from building an image. No environment variable
    counts: it would say what somebody believes to run. The answer is that of the first call, because the
    process goes on with the code that it has loaded. Uncommitted changes are ignored. Reads git's files
    itself: images have no git.
    """
    commit = read_head(checkout / ".git") or read_commit_file(checkout / COMMIT_FILE)
    if commit is None:
        log.warning(
            "The git commit is unknown: %s is not a git checkout, and %s does not hold a commit of 40 or 64 "
            "hexadecimal digits. Manifests will record null. Write the commit to this file when the image is "
            "built.",
            checkout,
            checkout / COMMIT_FILE,
        )
    return commit


def read_commit_file(path: Path) -> str | None:
    """The commit in a COMMIT_FILE; None if there is no such file or it holds something else."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return text if SHA.fullmatch(text) else None


def read_head(git: Path) -> str | None:
    """The commit of HEAD of a `.git` folder or of a worktree's `.git` file; None if there is none."""
    if git.is_file():
        git = git.parent / git.read_text().removeprefix("gitdir:").strip()
    if not (git / "HEAD").is_file():
        return None
    common = git / "commondir"  # a worktree has its own HEAD and shares all other refs
    shared = git / common.read_text().strip() if common.is_file() else git
    value = (git / "HEAD").read_text().strip()
    for _ in range(SYMBOLIC_REFS):
        if SHA.fullmatch(value):
            return value
        name = value.removeprefix("ref:").strip()
        value = next(
            (text for folder in (git, shared) if (text := read_loose_ref(folder / name))),
            read_packed_ref(shared / "packed-refs", name),
        )
    return None


def read_loose_ref(path: Path) -> str:
    """Content of a ref's own file; empty if there is none."""
    return path.read_text().strip() if path.is_file() else ""


def read_packed_ref(packed_refs: Path, name: str) -> str:
    """The sha of `name` in a packed-refs file; empty if it is not there."""
    lines = packed_refs.read_text().splitlines() if packed_refs.is_file() else []
    return next((line.split()[0] for line in lines if line.endswith(f" {name}")), "")
