"""The shell commands of a Markdown file, with their lines: of its console blocks, and of its text."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

PROMPT = "$ "
SHELLS = ("bash", "sh", "shell", "zsh")
PROGRAMS = ("docker", "helm", "kubectl", "make", "pip", "python", ".venv/bin/python", "vpmoe")
"""Code in the text counts as a command if it is one of these with arguments."""
COMMENT = re.compile(r"\s+# .*$", re.MULTILINE)
SUBSTITUTION = re.compile(r"\$\(([^()]*)\)")
ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=.*", re.DOTALL)


@dataclass(frozen=True)
class Command:
    """One command of a file."""

    file: Path
    line: int
    """Number of its first line in the file, from 1; for a command in the text that of its paragraph."""
    text: str
    """As written, on one line, without prompt and comment."""
    output: str = ""
    """What a console block shows below it."""


def console_commands(file: Path) -> list[Command]:
    """The commands of the file's console blocks.

    Raises ValueError for shell code in another block: then its commands cannot be told from their output.
    """
    found: list[Command] = []
    for token in MarkdownIt("commonmark").parse(file.read_text(encoding="utf-8")):
        if token.type != "fence" or token.map is None:
            continue
        first = token.map[0] + 2
        if token.info.strip() in SHELLS:
            raise ValueError(f"{file}:{first}: write shell commands as ```console, each after {PROMPT!r}")
        if token.info.strip() == "console":
            found += _block(file, first, token.content.splitlines())
    return found


def _block(file: Path, first: int, lines: list[str]) -> Iterator[Command]:
    number = 0
    while number < len(lines):
        start = number
        if not lines[start].startswith(PROMPT):
            raise ValueError(
                f"{file}:{first + start}: a console block begins with a command after {PROMPT!r}"
            )
        text = lines[start].removeprefix(PROMPT)
        while _continues(text):
            number += 1
            text += "\n" + lines[number]
        number += 1
        shown = number
        while number < len(lines) and not lines[number].startswith(PROMPT):
            number += 1
        yield Command(
            file,
            first + start,
            COMMENT.sub("", re.sub(r"\s*\\?\n\s*", " ", text)),
            "".join(f"{line}\n" for line in lines[shown:number]),
        )


def _continues(text: str) -> bool:
    """Whether a command needs another line: after a backslash, or inside quotes."""
    try:
        shlex.split(COMMENT.sub("", text))
    except ValueError:
        return True
    return text.endswith("\\")


def text_commands(file: Path) -> list[Command]:
    """The commands in the file's text: code that begins with one of PROGRAMS and has arguments."""
    found = []
    for token in MarkdownIt("commonmark").enable("table").parse(file.read_text(encoding="utf-8")):
        for part in token.children or []:
            words = part.content.split()
            if part.type == "code_inline" and len(words) > 1 and words[0] in PROGRAMS and token.map:
                found.append(Command(file, token.map[0] + 1, part.content))
    return found


def calls(text: str) -> list[list[str]]:
    """The words of each program that a command line starts, also in $(…), without variables set before it."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    found: list[list[str]] = []
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set("();<>|&{}"):
            while words and ASSIGNMENT.fullmatch(words[0]):
                del words[0]
            if words:
                found.append(words)
            words = []
        else:
            words.append(word)
            for inner in SUBSTITUTION.findall(word):
                found += calls(inner)
    return found
