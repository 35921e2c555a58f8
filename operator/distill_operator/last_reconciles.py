"""What the last reconcile of each run saw and wrote, so that only a run that has changed is reconciled again.

It only says whether to look: a reconcile that is queued reads live objects and decides from these alone. A
run about which nothing is known, because its last reconcile failed or was another process's, is reconciled.

Objects are compared by resourceVersion. Each write of any object gets another one, so an object that was
deleted and created again differs too.
"""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from distill_operator.kube import DISTILLRUN
from distill_operator.watch import Change, Key

ChildName = tuple[str, str]
"""Kind and name of a Job or PyTorchJob."""


@dataclass
class LastReconcile:
    """The last reconcile of a run, or the one in progress."""

    began: float
    """Monotonic seconds before it read anything."""
    run: str
    """resourceVersion of the DistillRun, as it was read or written last."""
    named: frozenset[ChildName] | None = None
    """The children that the run's status names, which are those that a reconcile reads; None until they were
    read."""
    children: dict[ChildName, str | None] = field(default_factory=dict)
    """resourceVersions of those that were read. None: it did not exist."""
    completed: float | None = None
    """Monotonic seconds at its end; None while it is in progress."""

    @property
    def requests(self) -> int:
        """About how many requests the next reconcile makes if nothing has changed."""
        return 1 + len(self.children)


class LastReconciles:
    """The last reconcile of each run that has not failed. `clock` returns monotonic seconds.

    Its methods belong to one event loop.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._by_run: dict[Key, LastReconcile] = {}

    def begin(self, key: Key, began: float, version: str) -> LastReconcile:
        """Note that a reconcile that began at this time has read the run. The caller completes the record."""
        found = self._by_run[key] = LastReconcile(began, version)
        return found

    def forget(self, key: Key) -> None:
        """Drop what is known about the run. Each event and resync queues it until its next reconcile."""
        self._by_run.pop(key, None)

    def covers(self, change: Change) -> bool:
        """Whether the run needs no reconcile for this event.

        So it is with an object that the last reconcile wrote or read in this version, or with a child that it
        had no reason to read. One that is in progress counts: if it fails it is repeated with live objects.
        """
        last = self._by_run.get(change.key)
        if last is None or not change.version:
            return False
        if change.kind == DISTILLRUN.name:
            return change.version == last.run
        child = change.kind, change.name
        if last.named is None:
            return False
        return child not in last.named or last.children.get(child) == change.version

    def differs(
        self, key: Key, version: str, children: Mapping[ChildName, str], listed: float, complete: bool
    ) -> bool:
        """Whether a list has another version of the run, or of one of its children, than its last reconcile
        saw.

        `listed`: monotonic seconds when the list was begun. A reconcile that began later may have seen newer
        objects; if not, the next list shows it. `complete`: a child that is not in the list does not exist.
        """
        last = self._by_run.get(key)
        if last is None:
            return True
        if last.completed is None or last.began >= listed:
            return False
        return version != last.run or any(
            children.get(child) != seen
            for child, seen in last.children.items()
            if complete or child in children
        )

    def gone(self, keys: Collection[Key], listed: float) -> list[Key]:
        """The runs that are not among `keys`, those of a list that was begun at the time `listed`."""
        return [key for key, last in self._by_run.items() if key not in keys and last.began < listed]

    def oldest(self, age: float) -> list[tuple[Key, LastReconcile]]:
        """The reconciles that ended at least `age` seconds ago, oldest first."""
        limit = self.clock() - age
        found = [
            (last.completed, key, last)
            for key, last in self._by_run.items()
            if last.completed is not None and last.completed <= limit
        ]
        return [(key, last) for _, key, last in sorted(found, key=lambda one: one[0])]

    def __len__(self) -> int:
        return len(self._by_run)
