"""Starts processes with the rights of a pod: a user without name and home, who reads all files and writes
only to TMPDIR."""

import os
from pathlib import Path

COMMAND = [
    "setpriv",
    "--reuid=65532",
    "--regid=65532",
    "--clear-groups",
    "--inh-caps=+dac_read_search",
    "--ambient-caps=+dac_read_search",
]
"""Put it before the command to run."""


def environment(scratch: Path) -> dict[str, str]:
    """The environment of a process on the CPU that writes to `scratch`, with the keys of the S3 store."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("AWS_") or name in ("PATH", "LD_LIBRARY_PATH")
    }
    return inherited | {
        "HOME": "/nonexistent",
        "TMPDIR": str(scratch),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
