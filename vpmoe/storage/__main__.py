"""`python -m vpmoe.storage verify s3://bucket/prefix`: verify every manifest below a prefix (verify.py)."""

import argparse
import logging
import sys

from vpmoe.storage.errors import StorageError
from vpmoe.storage.paths import split_url
from vpmoe.storage.verify import open_bucket, verify


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0 if every manifest holds, 1 if one does not or the store fails."""
    parser = argparse.ArgumentParser(prog="python -m vpmoe.storage")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("verify", help="prove every manifest below a prefix, block by block")
    command.add_argument("url", type=address, metavar="s3://BUCKET/PREFIX")
    name, prefix = parser.parse_args(arguments).url
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        verdict = verify(open_bucket(name), prefix, say)
    except StorageError as error:
        say(f"FAILED {error}")
        return 1
    return 1 if verdict.failed else 0


def address(text: str) -> tuple[str, str]:
    """Bucket and key. Raises ArgumentTypeError for another address."""
    try:
        return split_url(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def say(line: str) -> None:
    """Print one line of the result at once, because verifying a large prefix takes long."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
