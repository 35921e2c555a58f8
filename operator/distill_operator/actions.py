"""Actions of a plan, as data. executor.py executes them in order, after the status that intends them is
written.
"""

from dataclasses import dataclass

from vpmoe.api.status import ChildRef


@dataclass(frozen=True)
class CreateChild:
    """Create the child of this attempt, and the ConfigMap that it mounts."""

    step: str
    attempt: int


@dataclass(frozen=True)
class DeleteChild:
    """Delete a child; its pods get SIGTERM and their grace period.

    Without a uid: the object of that name, if the run owns it.
    """

    child: ChildRef


@dataclass(frozen=True)
class SetFinalizer:
    """Add the operator's finalizer to the run, or remove it."""

    present: bool


@dataclass(frozen=True)
class ClearBucket:
    """Create the Job that deletes the run's folder from the bucket."""


@dataclass(frozen=True)
class ReportCleared:
    """Post an Event that the run's folder was deleted, and how many objects it had, if that is known."""

    objects: int | None


@dataclass(frozen=True)
class KeepBucket:
    """Post an Event that the run's folder is kept although deletionPolicy is Delete, and why."""

    why: str


@dataclass(frozen=True)
class DeleteRun:
    """Delete the DistillRun itself: it finished ttlAfterFinished ago."""


Action = CreateChild | DeleteChild | SetFinalizer | ClearBucket | ReportCleared | KeepBucket | DeleteRun
