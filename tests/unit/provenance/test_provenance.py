"""Provenance: the commit is that of git's files, as git itself reports it, or that of an image's file."""

import logging
import subprocess
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest

from vpmoe import provenance
from vpmoe.provenance import COMMIT_FILE, git_sha, harmony_package

SHA1, SHA256 = "ab" * 20, "cd" * 32


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
    assert git_sha(checkout) == git(checkout, "rev-parse", "HEAD")


@pytest.mark.parametrize("packed", [False, True])
def test_the_head_of_a_worktree_is_found(checkout: Path, packed: bool) -> None:
    tree = checkout.parent / "tree"
    git(checkout, "worktree", "add", "-q", str(tree), "-b", "other")
    git(tree, "commit", "-q", "--allow-empty", "-m", "second")
    if packed:
        git(checkout, "pack-refs", "--all")
    assert git_sha(tree) == git(tree, "rev-parse", "HEAD") != git(checkout, "rev-parse", "HEAD")


@pytest.mark.parametrize("commit", [SHA1, SHA256])
@pytest.mark.parametrize("text", ["{}", "{}\n", " {}\r\n"])
def test_the_commit_of_an_image_is_in_its_file(tmp_path: Path, commit: str, text: str) -> None:
    (tmp_path / COMMIT_FILE).write_text(text.format(commit))
    assert git_sha(tmp_path) == commit


def test_no_environment_variable_counts(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VPMOE_GIT_SHA", "c" * 40)
    (tmp_path / COMMIT_FILE).write_text(SHA1)
    assert (git_sha(tmp_path), git_sha(checkout)) == (SHA1, git(checkout, "rev-parse", "HEAD"))


def test_a_file_left_over_in_a_checkout_does_not_count(checkout: Path) -> None:
    (checkout / COMMIT_FILE).write_text(SHA1)
    assert git_sha(checkout) == git(checkout, "rev-parse", "HEAD")


def test_a_checkout_that_moves_on_does_not_change_what_a_process_says(checkout: Path) -> None:
    before = git_sha(checkout)
    git(checkout, "commit", "-q", "--allow-empty", "-m", "second")
    assert git_sha(checkout) == before != git(checkout, "rev-parse", "HEAD")


@pytest.mark.parametrize(
    "content",
    [None, b"", b"main", b"$GIT_SHA", b"ab" * 19, b"AB" * 20, b"\xff" * 40, SHA1.encode() * 2 + b"a"],
)
def test_without_a_commit_it_is_null_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / COMMIT_FILE).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert [git_sha(tmp_path), git_sha(tmp_path)] == [None, None]
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"The git commit is unknown: {tmp_path} is not a git checkout, and ")
    assert f"{tmp_path / COMMIT_FILE} does not hold a commit" in message


def test_a_repository_without_a_commit_is_null(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    assert git_sha(tmp_path) is None


def test_the_default_checkout_is_this_one() -> None:
    assert (provenance.CHECKOUT / "vpmoe" / "provenance.py").is_file()


def test_the_harmony_library_is_the_distribution_that_has_its_module() -> None:
    (name,) = set(packages_distributions()["openai_harmony"])
    assert harmony_package() == f"pkg:pypi/{name}@{version(name)}"


def test_without_a_harmony_library_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "HARMONY", "no-such-distribution")
    assert harmony_package() is None
