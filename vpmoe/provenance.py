"""Where an object comes from: the code, image, configuration, run, step and attempt that wrote it.

Collected once per process. Every manifest holds all of it, every object's metadata a short form. A process
does not know its inputs when it starts, so they are recorded in the manifest only (vpmoe.storage.manifest).
"""

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

CHECKOUT = Path(__file__).resolve().parents[1]
SHA = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
SYMBOLIC_REFS = 5
"""Symbolic refs that git follows at most."""


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
        }
        return {name: value for name, value in values.items() if value is not None}


def git_sha(environment: Mapping[str, str] = os.environ, checkout: Path = CHECKOUT) -> str | None:
    """The commit of the running code: VPMOE_GIT_SHA (set in images), else HEAD of the checkout, else None
    with a warning.

    Uncommitted changes are ignored. Reads git's files itself: images have no git.
    """
    from_environment = environment.get("VPMOE_GIT_SHA")
    if from_environment:
        return from_environment
    commit = read_head(checkout / ".git")
    if commit is None:
        log.warning(
            "The git commit is unknown: VPMOE_GIT_SHA is not set and %s is not a git checkout. "
            "Manifests will record null.",
            checkout,
        )
    return commit


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
