"""What a plan asks for, as data. hands.py carries it out, in order, once the status that intends it is written."""

from dataclasses import dataclass

from vpmoe.api.status import ChildRef


@dataclass(frozen=True)
class Create:
    """Make the child of this attempt, and the ConfigMap that it mounts."""

    step: str
    attempt: int


@dataclass(frozen=True)
class Delete:
    """Delete a child; its pods get SIGTERM and their grace. Without a uid: whichever of ours has the name."""

    child: ChildRef


@dataclass(frozen=True)
class Finalizer:
    """Put our finalizer on the run, or take it off."""

    present: bool


@dataclass(frozen=True)
class ClearBucket:
    """Remove the run's folder from the bucket, and nothing else."""


@dataclass(frozen=True)
class KeepBucket:
    """Tell people that the run's folder stays although deletionPolicy is Delete, and why."""

    why: str


@dataclass(frozen=True)
class DeleteRun:
    """Delete the DistillRun itself: it finished ttlAfterFinished ago."""


Action = Create | Delete | Finalizer | ClearBucket | KeepBucket | DeleteRun
