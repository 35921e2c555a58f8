"""Where an object comes from: which code, image, configuration, run, step and attempt wrote it.

Gathered once a process, then written into every manifest and, in short, into every object's metadata. Inputs are not known to
a process at its start; they stand in the manifest (vpmoe.storage.manifest).
"""

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

log = logging.getLogger(__name__)

CHECKOUT = Path(__file__).resolve().parents[1]
SHA = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")


@dataclass(frozen=True)
class Provenance:
    """One process's identity. `config` is the run's configuration hash, `started` RFC 3339 in UTC; by hand `image` is None."""

    git_sha: str | None
    image: str | None
    config: str
    namespace: str
    name: str
    uid8: str
    step: str
    attempt: int
    started: str

    @property
    def run(self) -> str:
        """namespace/name-uid8"""
        return f"{self.namespace}/{self.name}-{self.uid8}"

    def metadata(self) -> dict[str, str]:
        """The same in short, for an object's metadata; what is not known is left out."""
        facts = {
            "git-sha": self.git_sha,
            "image": self.image,
            "config": self.config,
            "run": self.run,
            "step": self.step,
            "attempt": str(self.attempt),
        }
        return {name: value for name, value in facts.items() if value is not None}


def now() -> str:
    """The time, RFC 3339 in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def git_sha(environment: Mapping[str, str] = os.environ, checkout: Path = CHECKOUT) -> str | None:
    """The commit of the running code: VPMOE_GIT_SHA, which images set, or the checkout's HEAD; None, with a warning, without either.

    A working tree with changes of its own has its commit's sha all the same. Reads git's files: images have no git.
    """
    stated = environment.get("VPMOE_GIT_SHA")
    if stated:
        return stated
    found = head(checkout / ".git")
    if found is None:
        log.warning(
            "No git sha: VPMOE_GIT_SHA is not set and %s is no git checkout. Provenance will say null.",
            checkout,
        )
    return found


def head(git: Path) -> str | None:
    """The commit that HEAD of a `.git` folder, or a worktree's `.git` file, stands for."""
    if git.is_file():
        git = git.parent / git.read_text().removeprefix("gitdir:").strip()
    if not (git / "HEAD").is_file():
        return None
    common = git / "commondir"  # a worktree has its own HEAD, and shares its refs
    shared = git / common.read_text().strip() if common.is_file() else git
    value = (git / "HEAD").read_text().strip()
    for _ in range(5):  # git follows at most so many symbolic refs
        if SHA.fullmatch(value):
            return value
        name = value.removeprefix("ref:").strip()
        value = next(
            (text for folder in (git, shared) if (text := loose(folder / name))),
            packed(shared / "packed-refs", name),
        )
    return None


def loose(ref: Path) -> str:
    """Content of a ref that has a file of its own, else empty."""
    return ref.read_text().strip() if ref.is_file() else ""


def packed(refs: Path, name: str) -> str:
    """The sha of `name` in a packed-refs file, else empty."""
    lines = refs.read_text().splitlines() if refs.is_file() else []
    return next((line.split()[0] for line in lines if line.endswith(f" {name}")), "")
