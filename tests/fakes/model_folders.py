"""Model folders: of a small student with random weights, and of a tiny one of the trainer."""

import math
import zlib
from pathlib import Path

import torch

from tests.fakes.conversations import SYSTEM
from tests.fakes.policy_versions import TINY
from tests.fakes.students import SMALL
from vpmoe.export.model_folder import write_model_folder
from vpmoe.model import hf_export, state
from vpmoe.model.learner import Learner

SIZES = {part.source: math.prod(part.view) for part in hf_export.exported_tensors(SMALL).values()}


def random_weights(name: str, start: int, stop: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(stop - start, generator=generator)


def write_small(folder: Path, read: hf_export.ReadTensor = random_weights) -> None:
    """Write the folder, in bfloat16."""
    write_model_folder(
        folder, SMALL, sizes=SIZES, read=read, dtype=torch.bfloat16, positions=256, system=SYSTEM
    )


def write_learner(folder: Path, learner: Learner, positions: int) -> Path:
    """Write a tiny student of the trainer into the folder, in float32. Returns the folder."""
    write_model_folder(
        folder,
        TINY,
        sizes=state.sizes(learner),
        read=state.copy_weights(learner),
        dtype=torch.float32,
        positions=positions,
        system=SYSTEM,
    )
    return folder
