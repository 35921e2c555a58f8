"""The evaluated student: a checkpoint of a stage, exported to local disk and loaded into an engine when
something is to be asked."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vpmoe.checkpoint.format import READ_TOGETHER, Weights
from vpmoe.data.tokenizer import Ids
from vpmoe.evaluation.job import EvaluationWorker
from vpmoe.failure import Retriable
from vpmoe.inference.engine_pool import SamplingRequest
from vpmoe.inference.verify import InferenceEngines
from vpmoe.model import hf_export
from vpmoe.model.shapes import SHAPES


class EvaluatedStudent:
    """`engines`: one engine for sequences of training.sequenceLength + 1 tokens, as scoring generates one
    more."""

    def __init__(
        self, job: EvaluationWorker, engines: InferenceEngines, folder: Path, checkpoint: Weights
    ) -> None:
        """Loads nothing yet. `folder` is for the exported student; it must not exist."""
        self.checkpoint = checkpoint
        self._job = job
        self._engines = engines
        self._folder = folder
        self._loaded = False

    def load(self) -> None:
        """Export the student and load it into the engine, once.

        Raises as `export_student` and the engine do.
        """
        if self._loaded:
            return
        with self._job.timed("export", f"Exporting checkpoint {self.checkpoint.train_state.iteration}"):
            export_student(self._job, self.checkpoint, self._folder)
        with self._job.timed("load", "Loading the student"):
            self._engines.load(self._folder, self._job.check_stop)
        self._loaded = True

    def score(self, sequences: Sequence[Ids]) -> list[NDArray[np.float32]]:
        """For each sequence, [T − 1]: the log-probability of each id but the first, given those before."""
        (found,) = self._engines.score(sequences, self._job.check_stop)
        return found

    def sample(self, requests: Sequence[SamplingRequest]) -> list[Ids]:
        """The ids of each request's completion, [C]."""
        return [completion.ids_C for completion in self._engines.sample(requests, self._job.check_stop)]


def export_student(job: EvaluationWorker, checkpoint: Weights, folder: Path) -> None:
    """Export the student into `folder`, in float32 on the CPU and bfloat16 on GPUs, and verify the export.

    Raises Permanent if the checkpoint is of another shape, StorageError if it is damaged, Retriable if the
    disk is full.
    """
    training, shape = job.run.spec.training, SHAPES[job.run.spec.student.shape]
    dtype = torch.float32 if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else torch.bfloat16

    def read(name: str, start: int, stop: int) -> torch.Tensor:
        job.check_stop()
        return checkpoint.read(name, start, stop)

    needed = sum(checkpoint.sizes.values()) * dtype.itemsize
    try:
        if (free := shutil.disk_usage(folder.parent).free) < needed:
            raise OSError(f"{free} bytes are free")
        positions = training.sequence_length + 1  # scoring generates a token
        hf_export.export_student(folder, shape, positions, checkpoint.sizes, read, dtype, READ_TOGETHER)
    except OSError as error:
        raise Retriable(
            f"{tempfile.gettempdir()}: {error}. The exported student needs {needed} bytes there; point "
            "TMPDIR to a larger disk, or raise the ephemeral storage in runtime.resources.evaluate."
        ) from error
    hf_export.check_export(folder, shape)
