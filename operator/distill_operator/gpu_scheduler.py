"""Which runs' GPUs fit the pool together: the oldest first, the whole run's teacher and student GPUs at once. Pure arithmetic.

A pool is the set of nodes that a run's nodeSelector matches; runs share a pool when their sets of nodes overlap, and then the whole of
each counts. That a pod finds room on one node is the scheduler's business, except where no node could ever hold it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from distill_operator.kube import Json

RESOURCE = "nvidia.com/gpu"


@dataclass(frozen=True)
class Node:
    """A node that pods can be scheduled to now."""

    name: str
    labels: Mapping[str, str]
    gpus: int


@dataclass(frozen=True)
class GpuRequest:
    """What a live run asks of the pool. `admitted`: it holds its GPUs; otherwise it waits for them."""

    name: str
    uid: str
    created: datetime
    teacher: int
    student: int
    per_pod: int
    selector: Mapping[str, str]
    admitted: bool

    @property
    def gpus(self) -> int:
        return self.teacher + self.student


@dataclass(frozen=True)
class Decision:
    """Whether a run may start, the sum behind it, and whether waiting could help with the nodes as they are."""

    admitted: bool
    arithmetic: str
    hopeless: bool = False


def nodes(objects: Iterable[Json]) -> list[Node]:
    """The Ready, schedulable nodes among live Node objects."""
    return [
        Node(
            node["metadata"]["name"],
            node["metadata"].get("labels", {}),
            int(node["status"].get("allocatable", {}).get(RESOURCE, 0)),
        )
        for node in objects
        if not node.get("spec", {}).get("unschedulable")
        and any(
            c["type"] == "Ready" and c["status"] == "True"
            for c in node.get("status", {}).get("conditions", [])
        )
    ]


def admit(claim: GpuRequest, others: Iterable[GpuRequest], pool: Iterable[Node]) -> Decision:
    """May `claim` start beside the `others` that are admitted? Younger ones wait for the oldest that could ever run."""
    pool = list(pool)
    mine = _matching(claim, pool)
    capacity, largest = sum(node.gpus for node in mine), max((node.gpus for node in mine), default=0)
    wants = f"needs {claim.gpus} GPUs ({claim.teacher} teacher + {claim.student} student)"
    has = f"the pool has {capacity} on {_count(len(mine), 'ready node')}" + (
        " matching runtime.nodeSelector" if claim.selector else ""
    )
    if claim.gpus > capacity:
        return Decision(
            False,
            f"{wants}; {has}: it can never start there. Add nodes, or ask for fewer GPUs.",
            hopeless=True,
        )
    if claim.per_pod > largest:
        words = f"{wants} in pods of {claim.per_pod}; the largest node of the pool has {largest}"
        return Decision(
            False,
            f"{words}: it can never start there. Lower student.gpusPerPod or sampler.gpus, or add larger nodes.",
            hopeless=True,
        )
    names = {node.name for node in mine}
    rivals = [
        other
        for other in others
        if other.uid != claim.uid and names & {node.name for node in _matching(other, pool)}
    ]
    holders = sorted((other for other in rivals if other.admitted), key=_age)
    held = sum(other.gpus for other in holders)
    sum_so_far = f"{wants}; {has}, " + (
        f"of which {held} are held by {_names(holders)}" if holders else "all of them free"
    )
    if claim.gpus > capacity - held:
        return Decision(False, f"{sum_so_far}: {max(capacity - held, 0)} are left.")
    older = [
        other
        for other in rivals
        if not other.admitted and _age(other) < _age(claim) and _could_run(other, pool)
    ]
    if older:
        return Decision(
            False, f"{sum_so_far}; {_names(sorted(older, key=_age))} waits longer and goes first."
        )
    return Decision(True, f"{sum_so_far}.")


def capacity(selector: Mapping[str, str], pool: Iterable[Node]) -> int:
    """GPUs of the nodes that match."""
    return sum(node.gpus for node in pool if selector.items() <= node.labels.items())


def _matching(claim: GpuRequest, pool: list[Node]) -> list[Node]:
    return [node for node in pool if claim.selector.items() <= node.labels.items()]


def _could_run(claim: GpuRequest, pool: list[Node]) -> bool:
    sizes = [node.gpus for node in _matching(claim, pool)]
    return claim.gpus <= sum(sizes) and claim.per_pod <= max(sizes, default=0)


def _age(claim: GpuRequest) -> tuple[datetime, str]:
    return claim.created, claim.name


def _names(claims: list[GpuRequest]) -> str:
    return ", ".join(f"{claim.name} ({claim.gpus})" for claim in claims)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
