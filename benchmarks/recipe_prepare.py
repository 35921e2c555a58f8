"""Prepares a run of benchmarks.recipe on one GPU, or on the CPU: measures the rate of a large product, and
writes a teacher of random weights, unless its folder exists.

    python -m benchmarks.recipe_prepare FOLDER tiny|gpt-oss-20b|gpt-oss-120b [--layers N]

Prints JSON: `rate`, floating-point operations a second of benchmarks.step's product; `seconds` to write.
"""

import argparse
import json
import time
from pathlib import Path

from benchmarks.scorer import shape_config
from benchmarks.step import product_rate
from tests.fakes import mxfp4_teacher, tiny_teacher
from vpmoe.model import device as devices

TEACHERS = ("tiny", "gpt-oss-20b", "gpt-oss-120b")


def write_teacher(folder: Path, name: str, layers: int | None, cuda: bool) -> None:
    """Write the model directory of a teacher in MXFP4; on the CPU, which has no kernels for that, in
    float32."""
    if name != "tiny":
        mxfp4_teacher.write(folder, shape_config(name, layers), device="cuda" if cuda else "cpu")
    elif cuda:
        mxfp4_teacher.write(folder, device="cuda")
    else:
        tiny_teacher.write(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("name", choices=TEACHERS)
    parser.add_argument("--layers", type=int)
    given = parser.parse_args()
    device = devices.choose(megatron=False)
    rate, began = product_rate(device), time.monotonic()
    if not given.folder.exists():
        write_teacher(given.folder, given.name, given.layers, device.type == "cuda")
    print(json.dumps({"rate": rate, "seconds": time.monotonic() - began}))


if __name__ == "__main__":
    main()
