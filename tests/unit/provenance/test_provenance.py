"""Provenance: the commit is read from git's files and equals what git itself reports."""

import logging
import subprocess
from pathlib import Path

import pytest

from vpmoe import provenance
from vpmoe.provenance import git_sha


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=x", "-c", "user.email=x@example.com", "-c", "init.defaultBranch=main")
    return subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init", "-q")
    git(folder, "commit", "-q", "--allow-empty", "-m", "first")
    return folder


@pytest.mark.parametrize(
    "commands",
    [
        pytest.param([], id="branch"),
        pytest.param([["pack-refs", "--all"]], id="packed"),
        pytest.param(
            [
                ["tag", "-a", "t", "-m", "t"],
                ["pack-refs", "--all"],
                ["commit", "-q", "--allow-empty", "-m", "second"],
            ],
            id="packed-then-loose",
        ),
        pytest.param([["checkout", "-q", "--detach"]], id="detached"),
        pytest.param([["checkout", "-q", "-b", "a/deep/branch"]], id="branch-with-slashes"),
    ],
)
def test_the_head_of_a_checkout_is_found(checkout: Path, commands: list[list[str]]) -> None:
    for command in commands:
        git(checkout, *command)
    assert git_sha({}, checkout) == git(checkout, "rev-parse", "HEAD")


@pytest.mark.parametrize("packed", [False, True])
def test_the_head_of_a_worktree_is_found(checkout: Path, packed: bool) -> None:
    tree = checkout.parent / "tree"
    git(checkout, "worktree", "add", "-q", str(tree), "-b", "other")
    git(tree, "commit", "-q", "--allow-empty", "-m", "second")
    if packed:
        git(checkout, "pack-refs", "--all")
    assert git_sha({}, tree) == git(tree, "rev-parse", "HEAD") != git(checkout, "rev-parse", "HEAD")


def test_the_commit_of_the_image_takes_precedence(checkout: Path) -> None:
    assert git_sha({"VPMOE_GIT_SHA": "abc"}, checkout) == "abc"


def test_without_a_checkout_the_commit_is_null_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert git_sha({}, tmp_path) is None
    assert [record.getMessage() for record in caplog.records] == [
        f"The git commit is unknown: VPMOE_GIT_SHA is not set and {tmp_path} is not a git checkout. "
        "Manifests will record null."
    ]


def test_a_repository_without_a_commit_is_null(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    assert git_sha({}, tmp_path) is None


def test_the_default_checkout_is_this_one() -> None:
    assert (provenance.CHECKOUT / "vpmoe" / "provenance.py").is_file()
