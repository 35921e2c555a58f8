"""The command `vpmoe`: reads the command line and runs one subcommand. `kubectl distill` is the same command.

kubectl runs a program called kubectl-distill on PATH as its subcommand `distill`; the package installs one,
and a symbolic link of that name to `vpmoe` is another.

A subcommand NAME is the module vpmoe/cli/NAME.py, which has

    HELP: str                                                  one line, shown by `vpmoe --help`
    add_arguments(parser: argparse.ArgumentParser) -> None     adds its arguments
    run(arguments: argparse.Namespace) -> int                  does the work and returns the exit code

and a line in SUBCOMMANDS. At its top the module imports nothing but the standard library and vpmoe.api, so
that `vpmoe --help` works where only pydantic and PyYAML are installed; everything else is imported in `run`.

Exit codes are those of jobs (docs/reference/exit-codes.md) and 64, for a command line that is wrong.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, Protocol, cast

from vpmoe.api.crd import RELEASE
from vpmoe.api.invalid import Invalid
from vpmoe.api.termination import EXIT_CODES, WRONG_USAGE

SUBCOMMANDS = {
    "chat": "model",
    "count": "",
    "evaluate": "evaluate",
    "export": "model",
    "init": "model",
    "logs": "kubectl",
    "metrics": "trackers",
    "plan": "",
    "report": "report",
    "status": "kubectl",
    "validate": "",
    "verify": "data",
}
"""Name of each subcommand → the extra of this package that it needs; "" if pydantic and PyYAML are enough."""

EXTRA_OF_CLUSTERS, CLIENT = "kubectl", "kubernetes"
"""The extra with which a subcommand reads a cluster, and its package: `report` needs it only for a run's
name."""
PLUGIN = "kubectl-distill"
"""Name of the program for kubectl."""

WRONG_INPUT = EXIT_CODES["Permanent"]
"""Exit code for a file, an object or an environment that is wrong."""


class Subcommand(Protocol):
    """The module of a subcommand."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...
    def run(self, arguments: argparse.Namespace) -> int: ...


class CommandLine(argparse.ArgumentParser):
    """A command line whose errors end with exit code 64 instead of argparse's 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_USAGE, f"{self.format_usage()}{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`, by default this process' own, and return the exit code.

    Raises SystemExit with 0 for --help and --version, and with 64 if the command line is wrong.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = command_line(given[:1]).parse_args(given)
    try:
        return subcommand(arguments.subcommand).run(arguments)
    except Invalid as error:
        sys.stderr.write(f"{error}\n")
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        extra = EXTRA_OF_CLUSTERS if package == CLIENT else SUBCOMMANDS[arguments.subcommand]
        if not extra or package == "vpmoe":
            raise
        sys.stderr.write(
            f"vpmoe {arguments.subcommand}: the Python package {error.name} is not installed. Install vpmoe "
            f"with the extra {extra}: pip install 'vpmoe[{extra}]'\n"
        )
    return WRONG_INPUT


def command_line(first: Sequence[str]) -> CommandLine:
    """The parser. If `first`, the first argument, names a subcommand, then only that one is imported."""
    prog = "kubectl distill" if Path(sys.argv[0]).name == PLUGIN else "vpmoe"
    parser = CommandLine(prog=prog, description="Distils GPT-OSS into a student on Kubernetes.")
    parser.add_argument("--version", action="version", version=f"vpmoe {RELEASE}")
    commands = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
    for name in [name for name in SUBCOMMANDS if name in first] or SUBCOMMANDS:
        module = subcommand(name)
        module.add_arguments(commands.add_parser(name, help=module.HELP, description=module.__doc__))
    return parser


def subcommand(name: str) -> Subcommand:
    """The module of a subcommand of SUBCOMMANDS."""
    return cast(Subcommand, importlib.import_module(f"vpmoe.cli.{name}"))
