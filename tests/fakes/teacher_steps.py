"""The two steps of the teacher, run in the calling process with a teacher that is already loaded."""

import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.fakes.tiny_teacher import LONGEST, Remote
from vpmoe.api import DistillRun
from vpmoe.api.stages import OnPolicy
from vpmoe.process.board import ProgressBoard
from vpmoe.provenance import Provenance
from vpmoe.storage import Bucket
from vpmoe.teacher import rescore, score_windows, scores
from vpmoe.teacher.uniform import UNIFORM


def provenance(run: DistillRun, step: str, attempt: int = 1) -> Provenance:
    return Provenance(
        None,
        None,
        run.config_hash,
        "default",
        run.metadata.name,
        run.uid8,
        step,
        attempt,
        "2026-01-01T00:00:00Z",
    )


class UniformTeacher:
    """A teacher without an output matrix, as vLLM loads it: every token has the same log-probability."""

    max_length = LONGEST

    def score(
        self, sequences: Iterable[NDArray[np.int32]], check_stop: Callable[[], None] = lambda: None
    ) -> Iterator[NDArray[np.float32]]:
        for ids_T in sequences:
            yield np.where(np.arange(len(ids_T)) == 0, np.nan, UNIFORM).astype(np.float32)


def rescore_here(
    spec: dict[str, Any],
    scorer: Remote | UniformTeacher | None,
    scratch: Path,
    worker: int | None = None,
    stopping: threading.Event | None = None,
) -> list[scores.ScoresRef]:
    """Run the rescore step with the shared teacher. If `scorer` is None, the step must not load a teacher."""
    run = DistillRun.parse(spec)

    def load(directory: Path, longest: int) -> Remote | UniformTeacher:
        assert (
            scorer and (directory / "model.safetensors").stat().st_size > 1e8 and longest <= scorer.max_length
        )
        return scorer

    return rescore.rescore(
        run,
        Bucket.open(run.spec.storage),
        provenance(run, "rescore"),
        stopping or threading.Event(),
        ProgressBoard(),
        worker,
        load,
        scratch,
    )


def score_windows_here(
    spec: dict[str, Any],
    scorer: Remote | UniformTeacher | None,
    scratch: Path,
    worker: int | None = None,
    stopping: threading.Event | None = None,
    attempt: int = 1,
) -> int:
    """Score the windows of stage onpolicy with the shared teacher. If `scorer` is None, none may be loaded.

    Returns the number of scored windows.
    """
    run = DistillRun.parse(spec)
    stage = run.stage("onpolicy")
    assert isinstance(stage, OnPolicy)

    def load(directory: Path, longest: int) -> Remote | UniformTeacher:
        assert (
            scorer
            and (directory / "model.safetensors").stat().st_size > 1e8
            and longest == 512 <= scorer.max_length
        )
        return scorer

    bucket = Bucket.open(run.spec.storage)
    return score_windows.score_windows(
        run,
        stage,
        bucket,
        provenance(run, "onpolicy-teacher", attempt),
        stopping or threading.Event(),
        ProgressBoard(),
        worker,
        load,
        scratch,
    )
