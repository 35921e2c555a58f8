"""A target of devcluster.binaries that Go compiles in a second."""

import os
from pathlib import Path

from devcluster import binaries


def small(source: str) -> binaries.Target:
    """A target that Go compiles in a second."""

    def build(into: Path, log: Path) -> None:
        (into / "main.go").write_text(source)
        binaries.run_logged(
            ["go", "build", *binaries.FLAGS, "-s -w", "-o", str(into / "small"), str(into / "main.go")],
            log,
            dict(os.environ),
        )

    return binaries.Target("small", ("small",), source.encode, build, minutes=0)


HELLO = 'package main\n\nfunc main() { print("hello") }\n'
