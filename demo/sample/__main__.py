"""python -m demo.sample FOLDER [--shards N]: write the sample as parquet shards and name them."""

import argparse
from pathlib import Path

from demo.sample import write

parser = argparse.ArgumentParser(
    prog="python -m demo.sample", description="Write the sample of SYNTH-like rows as parquet shards."
)
parser.add_argument("folder", type=Path)
parser.add_argument("--shards", type=int, default=3)
given = parser.parse_args()
for path in write(given.folder, given.shards):
    print(path)
