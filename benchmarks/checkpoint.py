"""What a checkpoint costs training: the copy of the state to host memory. Floor: a plain copy of as many
bytes.

    python -m benchmarks.checkpoint [--shape tiny] [--layers N] [--sequence 2048] [--sequences 2] [--steps 5]

The state is one rank's, with its optimizer: on one GPU all of vpmoe-6b (72 GB, and as much host memory), on
the CPU `tiny` (set CUDA_VISIBLE_DEVICES to be empty). Prints
  pause     how much longer a step takes that begins with the copy than one without, medians of steps that
            alternate; on a GPU the copy runs beside forward and backward
  begin     of it, the host's part: until training goes on
  copy      alone, with nothing beside it; its floor is a plain copy of large tensors off the GPU into the
            same memory, or on the CPU from memory to memory
  read      cutting the copy into blocks and hashing them, which is what an upload does besides sending, in
            one process; its floor is a single sha256 of all bytes
and, calculated from the copy, the pause of vpmoe-6b on 7 ranks if nothing hid it. Nothing is uploaded.
"""

import argparse
import hashlib
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.step import random_rows, synchronize
from vpmoe.api.memory import STUDENTS
from vpmoe.model import device as devices
from vpmoe.model import distributed
from vpmoe.model.shapes import SHAPES
from vpmoe.objectives.vanilla import vanilla
from vpmoe.storage.blocks import Hasher, join_blocks

PIECE = 1 << 30
"""Bytes of each plain copy of the floor."""
RANKS = 7


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--layers", type=int, help="the shape's first layers alone (default: all)")
    parser.add_argument("--sequence", type=int, default=2048, help="positions of a packed sequence")
    parser.add_argument("--sequences", type=int, default=2, help="sequences per step, each a microbatch")
    parser.add_argument(
        "--steps", type=int, default=5, help="steps of each kind, after one that is not counted"
    )
    given = parser.parse_args()
    shape, device = SHAPES[given.shape], devices.choose()
    shape = replace(shape, layers=given.layers or shape.layers)
    distributed.start(device)
    from vpmoe.model.learner import Learner
    from vpmoe.trainer.checkpoint.state_copy import StateCopy

    learner = Learner.build(
        shape,
        device,
        sequence_length=given.sequence,
        seed=1,
        weight_decay=0.1,
        gradient_clip=1.0,
        recomputed_layers=shape.layers,  # room for the state of one rank that has all of it
    )
    batches = random_rows(shape, given.sequences, given.sequence, torch.Generator().manual_seed(1))
    counts = torch.stack([batch.counts for batch in batches]).sum(0)
    began = time.perf_counter()
    copy = StateCopy(learner)
    pinned = time.perf_counter() - began
    size = copy.nbytes / 1e9
    print(
        f"{shape.name}, {shape.layers} layers, on {device}: {size:.2f} GB, host memory made ready in "
        f"{pinned:.1f} s, once",
        flush=True,
    )

    def timed(call: Callable[[], object]) -> float:
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        return time.perf_counter() - start

    begins: list[float] = []

    def begin() -> None:
        start = time.perf_counter()
        copy.take(learner)
        begins.append(time.perf_counter() - start)

    def step(copied: bool) -> None:
        if copied:
            begin()
        objective = vanilla(counts, {"reasoning": 1.0, "final": 1.0})
        learner.forward_backward(batches, objective, positions=int(counts[0]))
        copy.hold_changes()
        learner.step(3e-4)

    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(given.steps + 1):
        for copied, seconds in times.items():
            seconds.append(timed(lambda copied=copied: step(copied)))  # type: ignore[misc]
    plain, with_copy = (statistics.median(seconds[1:]) for seconds in times.values())
    print(f"step   {plain:8.3f} s without, {with_copy:.3f} s with a copy: pause {with_copy - plain:.3f} s")
    print(f"begin  {statistics.median(begins[1:]):8.3f} s", flush=True)
    alone = statistics.median(timed(lambda: (copy.take(learner), copy.wait())) for _ in range(3))

    piece = torch.empty(min(PIECE, copy.nbytes), dtype=torch.uint8, device=device).fill_(1)
    memory = copy.memory

    def plain_copy() -> None:
        for start in range(0, copy.nbytes, len(piece)):
            part = memory[start : start + len(piece)]
            part.copy_(piece[: len(part)], non_blocking=device.type == "cuda")

    floor = statistics.median(timed(plain_copy) for _ in range(3))
    print(
        f"copy   {alone:8.3f} s, {size / alone:.1f} GB/s; floor {floor:.3f} s: {alone / floor:.2f} ×",
        flush=True,
    )

    def read() -> None:
        for file in copy.files.values():
            hasher = Hasher()
            for block in join_blocks(file.parts()):
                hasher.add(block)

    reading, hashing = timed(read), timed(lambda: hashlib.sha256(memoryview(memory.numpy())))
    ratio = reading / hashing
    print(f"read   {reading:8.3f} s, {size / reading:.2f} GB/s; floor {hashing:.3f} s: {ratio:.2f} ×")
    whole = STUDENTS["vpmoe-6b"].checkpoint / 1e9
    print(f"vpmoe-6b on {RANKS} ranks, calculated: {whole / RANKS * alone / size:.3f} s a copy")


if __name__ == "__main__":
    main()
