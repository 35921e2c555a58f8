"""Time and memory to plan the batches of one epoch. Floor: one stable numpy sort of the same lengths.

    python -m benchmarks.batch_plan [--documents 20000000] [--parts 500] [--sequence-length 8192]

Runs on one CPU core. The documents are synthetic, with log-normal lengths.
"""

import argparse
import resource
import sys
import time

import numpy as np

from vpmoe.data import packing


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=20_000_000)
    parser.add_argument("--parts", type=int, default=500)
    parser.add_argument("--sequence-length", type=int, default=8192)
    arguments = parser.parse_args()
    random = np.random.default_rng(0)
    lengths_D = np.clip(
        np.exp(random.normal(6.8, 0.7, arguments.documents)), 40, arguments.sequence_length
    ).astype(np.int32)
    lengths = np.array_split(lengths_D, arguments.parts)

    started = time.perf_counter()
    np.sort(lengths_D, kind="stable")
    floor = time.perf_counter() - started
    started = time.perf_counter()
    visited = packing.epoch_order([len(part) for part in lengths], 1234, 0)
    ordered = time.perf_counter() - started
    started = time.perf_counter()
    epoch = packing.build_epoch(lengths, 1234, 0, arguments.sequence_length)
    whole = time.perf_counter() - started
    empty = 1 - epoch.tokens_N.sum() / (len(epoch.tokens_N) * arguments.sequence_length)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    sys.stdout.write(
        f"{len(visited):,} documents, {arguments.parts} parts: plan {whole:.1f} s (order {ordered:.1f} s), "
        f"numpy's stable sort of the lengths {floor:.1f} s; {len(epoch.tokens_N):,} sequences, "
        f"{empty:.1%} of the positions are padding; peak memory {peak:.1f} GiB\n"
    )


if __name__ == "__main__":
    main()
