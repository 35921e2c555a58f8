"""What the processes of one stage are told, and the few words that they say among themselves outside of training's own collectives."""

import threading
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from torch import distributed as dist

from vpmoe.api import DistillRun
from vpmoe.api.stages import Stage
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
    """Set on SIGTERM: this process wants to stop. All stop after the same step."""
    scratch: Path
    """A folder on the pod's disk that all its processes share and that goes when they do."""
    scores: Manifest | None = None
    """The teacher's scores that a Rescored stage trains on."""


class ObjectGroup:
    """A channel of small objects between all ranks, apart from training's collectives so that a thread may use it beside them."""

    def __init__(self, patience: timedelta) -> None:
        """Every rank makes its channels in the same order. `patience` is how long one may keep the others waiting."""
        self._group = dist.new_group(backend="gloo", timeout=patience)

    def gather[T](self, word: T) -> list[T]:
        """Every rank's word, by rank. Waits for all of them."""
        heard: list[T] = [word] * dist.get_world_size()
        dist.all_gather_object(heard, word, group=self._group)
        return heard
