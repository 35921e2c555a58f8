"""Checkpoints of a small student, for tests that save, compare and damage them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from tests.fakes import datasets, students
from tests.fakes.reporters import NullReporter
from tests.fakes.students import copy_slices
from vpmoe.api.microbatch import on_cpu
from vpmoe.checkpoint.train_state import TrainState, initial_state
from vpmoe.model import state
from vpmoe.model.learner import Learner
from vpmoe.model.shapes import Shape
from vpmoe.storage.manifest import Input
from vpmoe.trainer.checkpoint.writer import CheckpointWriter
from vpmoe.trainer.context import StageContext


def state_at(iteration: int, **changes: Any) -> TrainState:
    """A state of the stage vanilla of run_spec, whose sequences have 512 tokens, on the CPU."""
    counts = {"iteration": iteration, "steps": iteration, "tokens": 100 * iteration}
    return initial_state("vanilla").model_copy(update={"microbatch": on_cpu(512)} | counts | changes)


def filled(device: torch.device, number: float, shape: Shape = students.SMALL) -> Learner:
    """A student whose tensors are `number` + index / 1000, so that students of different numbers differ in
    every element."""
    learner = students.learner(device, shape)
    for piece in state.slices(learner):
        piece.tensor.copy_(torch.arange(piece.start, piece.stop) / 1000 + number)
    return learner


def save_checkpoints(
    context: StageContext, learner: Learner, *positions: TrainState, rejected: Iterable[int] = ()
) -> NullReporter:
    """Write checkpoints, as an attempt that has rejected these iterations."""
    uploader = NullReporter()
    checkpoints = CheckpointWriter(
        context,
        learner,
        [datasets.TOKENIZER, Input("dataset", "s3://x", {"sha256": datasets.HEX}, {})],
        rejected,
        uploader,
    )
    for position in positions:
        checkpoints.save(position)
    checkpoints.wait()
    checkpoints.close()
    return uploader


def equal_states(one: Learner, other: Learner) -> bool:
    pairs = zip(sorted(copy_slices(one).items()), sorted(copy_slices(other).items()), strict=True)
    return all(
        a[0] == b[0] and all(torch.equal(x[1], y[1]) for x, y in zip(a[1], b[1], strict=True))
        for a, b in pairs
    )


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")
