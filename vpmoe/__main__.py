"""`python -m vpmoe SUBCOMMAND …`: the same as the command `vpmoe`."""

import sys

from vpmoe.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
