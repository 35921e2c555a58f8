"""Answer one question with an exported student: its reasoning and its final answer, shown apart.

It runs on a GPU if there is one, otherwise on the CPU.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from vpmoe.api.effort import Effort
from vpmoe.api.termination import EXIT_CODES, WRONG_USAGE

if TYPE_CHECKING:
    from vpmoe.inference.chat import Answer

HELP = "answer one question with an exported student"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="a model that `vpmoe export` has written")
    parser.add_argument("question", nargs="?", metavar="QUESTION", help="absent: read from standard input")
    parser.add_argument(
        "--effort", choices=get_args(Effort), default="medium", help="reasoning effort (default: medium)"
    )
    parser.add_argument(
        "--max-tokens",
        type=positive,
        default=1024,
        metavar="N",
        help="most tokens of reasoning and answer together (default: 1024)",
    )


def positive(text: str) -> int:
    """A whole number from 1 on. Raises ArgumentTypeError for another text."""
    if not text.isascii() or not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """Returns 0, 64 without a question, 75 if memory is short, else 65."""
    question = arguments.question if arguments.question is not None else sys.stdin.read()
    if not question.strip():
        sys.stderr.write('vpmoe chat: the question is empty. Write it: vpmoe chat DIR "What is a prime?"\n')
        return WRONG_USAGE
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from vpmoe.failure import classify_error
    from vpmoe.inference.chat import ChatModel

    try:
        answer = ChatModel(arguments.folder).answer(question, arguments.effort, arguments.max_tokens)
    except Exception as error:
        found = classify_error(error)
        if found.kind == "Internal":
            raise
        sys.stderr.write(f"vpmoe chat: {found.message}\n")
        return EXIT_CODES[found.kind]
    sys.stdout.write(shown(answer, arguments.effort))
    return 0


def shown(answer: "Answer", effort: str) -> str:
    """The answer as text for a terminal."""
    limit = "" if answer.ended else f" (cut off after {answer.tokens} tokens: raise --max-tokens)"
    return (
        f"Reasoning ({effort} effort):\n{indented(answer.reasoning or 'none')}\n\n"
        f"Final answer{limit}:\n{indented(answer.final or 'none')}\n"
    )


def indented(text: str) -> str:
    """The text, two spaces to the right."""
    return "\n".join(f"  {line}".rstrip() for line in text.splitlines())
