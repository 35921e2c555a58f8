"""Verify every manifest below a prefix of the bucket: each object exists and has the stored hashes.

Read-only. Endpoint, region and credentials come from the environment, as for AWS's own tools.
"""

import argparse
import logging
import sys

from vpmoe.api.termination import EXIT_CODES, WRONG_USAGE

HELP = "verify every manifest below a prefix of the bucket"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="s3://BUCKET/PREFIX", help="a bucket, or a folder of it")


def run(arguments: argparse.Namespace) -> int:
    """Print a line for each manifest. Returns 0 if all hold, 64 for another address, 75 if the store is away,
    else 65."""
    from vpmoe.storage.errors import StorageError
    from vpmoe.storage.paths import split_url
    from vpmoe.storage.verify import open_bucket, verify

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        name, prefix = split_url(arguments.url)
    except ValueError as error:
        sys.stderr.write(f"vpmoe verify: {error}\n")
        return WRONG_USAGE
    try:
        verdict = verify(open_bucket(name), prefix, say)
    except StorageError as error:
        say(f"FAILED {error}")
        return EXIT_CODES["Retriable" if error.retriable else "Permanent"]
    return EXIT_CODES["Permanent"] if verdict.failed else 0


def say(line: str) -> None:
    """Print one line of the result at once, because verifying a large prefix takes long."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
