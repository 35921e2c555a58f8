"""What samplers are tested with: a tiny student of which every part matters, and its publication as a policy version."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vpmoe.model import state
from vpmoe.model.batch import Batch
from vpmoe.model.learner import Learner
from vpmoe.model.shapes import SHAPES
from vpmoe.objectives.head import logp_of
from vpmoe.rollout import weights

TINY = SHAPES["tiny"]
Ids = NDArray[np.int32]


def learner(device: torch.device, seed: int) -> Learner:
    """A tiny student, every part of it large enough to matter: norms apart from 1, and biases that change what is chosen."""
    torch.manual_seed(seed)
    it = Learner.build(TINY, device, sequence_length=4096, seed=1234, weight_decay=0.1, gradient_clip=1.0)
    with torch.no_grad():
        for name, parameter in it.student.named_parameters():
            parameter.uniform_(0.5, 1.5) if parameter.dim() == 1 else parameter.normal_(std=0.3 if name == "embedding.weight" else 0.15)
        for name, buffer in it.student.named_buffers():
            if name.endswith("expert_bias"):
                buffer.normal_(std=0.2)
    return it


def export(folder: Path, it: Learner) -> Path:
    """The student's checkpoint, in float32."""
    weights.export(folder, TINY, 4096, state.sizes(it), state.current(it), torch.float32)
    return folder


def trainers(it: Learner, sequences: Sequence[Ids]) -> list[NDArray[np.float32]]:
    """[T − 1] each: what the trainer's student says of each id given those before it, all sequences packed into one row."""
    ids = torch.from_numpy(np.concatenate(sequences).astype(np.int64))[None]
    number = torch.repeat_interleave(torch.arange(len(sequences)), torch.tensor([len(ids_T) for ids_T in sequences]))[None]
    batch = Batch.of(ids, torch.full_like(ids, 1, dtype=torch.uint8), number.int())
    with torch.no_grad():
        logp = logp_of(it.student(batch), it.student.output, batch.target)
    return [part[:-1].numpy() for part in logp.split([len(ids_T) for ids_T in sequences])]
