"""What every process of a stage is given, and the group over which ranks exchange small objects."""

import threading
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from torch import distributed as dist

from vpmoe.api import DistillRun
from vpmoe.api.stages import Stage
from vpmoe.process.board import ProgressBoard
from vpmoe.provenance import Provenance
from vpmoe.storage import Bucket
from vpmoe.storage.manifest import Manifest


@dataclass(frozen=True)
class StageContext:
    """One attempt at one stage."""

    run: DistillRun
    stage: Stage
    bucket: Bucket
    dataset: Manifest
    provenance: Provenance
    stopping: threading.Event
    """Set on SIGTERM: this process should stop. All ranks stop after the same step."""
    scratch: Path
    """A folder on the pod's disk that all its processes share and that is deleted when they end."""
    scores: Manifest | None = None
    """The teacher's scores that a Rescored stage trains on."""
    board: ProgressBoard = field(default_factory=ProgressBoard)
    """Where rank 0 publishes progress and metrics."""
    weights_volume: Path | None = None
    """Where runtime.weightsVolume is mounted; None in pods without it."""


class ObjectGroup:
    """Exchanges small objects between all ranks. It is separate from training's collectives, so a thread may
    use it beside them."""

    def __init__(self, patience: timedelta) -> None:
        """Every rank makes its groups in the same order. `patience` is how long one rank may keep the others
        waiting."""
        self._group = dist.new_group(backend="gloo", timeout=patience)

    def gather[T](self, value: T) -> list[T]:
        """Every rank's value, by rank. Waits for all ranks."""
        gathered: list[T] = [value] * dist.get_world_size()
        dist.all_gather_object(gathered, value, group=self._group)
        return gathered
