"""Admission of runs to the pool of GPUs: oldest first, and only if all of a run's teacher and student GPUs
are free at once. Pure.

A run's pool is the set of nodes that its nodeSelector matches. Two runs share a pool if their sets of nodes
overlap; each then counts in full. Whether a pod fits on a single node is the Kubernetes scheduler's decision,
unless no node could ever hold it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from distill_operator.kube import Json
from distill_operator.observe import ObservedRun
from vpmoe.api import DistillRun
from vpmoe.api.layout import largest_pod
from vpmoe.api.runtime import GPU


@dataclass(frozen=True)
class Node:
    """A node that accepts pods."""

    name: str
    labels: Mapping[str, str]
    gpus: int


@dataclass(frozen=True)
class GpuRequest:
    """GPUs that a run needs for its whole life. `admitted`: it holds them; otherwise it waits for them."""

    name: str
    uid: str
    created: datetime
    teacher: int
    student: int
    largest_pod: int
    node_selector: Mapping[str, str]
    admitted: bool

    @property
    def gpus(self) -> int:
        return self.teacher + self.student


@dataclass(frozen=True)
class Decision:
    """Whether a run may start, and the arithmetic behind it.

    `unschedulable`: the present nodes can never hold the run.
    """

    admitted: bool
    arithmetic: str
    unschedulable: bool = False


def waits_for_gpus(observed: ObservedRun) -> bool:
    """Whether the run needs a Decision before it may start: it holds no GPUs, and neither its spec nor its
    status prevents a start.
    """
    run, status = observed.run, observed.status
    if run is None or observed.deleting or status.holds_gpus:
        return False
    if run.spec.suspend or run.spec.runtime.queue_name:  # with a queue, Kueue admits each child
        return False
    return status.phase != "Succeeded" and status.failed_step(run.spec.runtime.attempts) is None


def gpu_request(run: DistillRun, observed: ObservedRun) -> GpuRequest:
    """The run's request. DistillRun.needs() guarantees that its children never need more at the same time."""
    spec = run.spec
    return GpuRequest(
        name=f"{observed.namespace}/{observed.name}",
        uid=observed.uid,
        created=observed.created,
        teacher=spec.teacher.gpus,
        student=spec.student.gpus,
        largest_pod=max(largest_pod(spec.student, stage) for stage in spec.stages),
        node_selector=spec.runtime.node_selector,
        admitted=observed.status.holds_gpus,
    )


def schedulable_nodes(objects: Iterable[Json]) -> list[Node]:
    """The nodes among live Node objects that are Ready and not cordoned."""
    return [
        Node(
            node["metadata"]["name"],
            node["metadata"].get("labels", {}),
            int(node["status"].get("allocatable", {}).get(GPU, 0)),
        )
        for node in objects
        if not node.get("spec", {}).get("unschedulable")
        and any(
            c["type"] == "Ready" and c["status"] == "True"
            for c in node.get("status", {}).get("conditions", [])
        )
    ]


def admit(request: GpuRequest, others: Iterable[GpuRequest], pool: Iterable[Node]) -> Decision:
    """Decide whether `request` fits beside the `others` that are admitted.

    An older request that could ever fit goes first.
    """
    pool = list(pool)
    nodes = _matching(request, pool)
    capacity, largest = sum(node.gpus for node in nodes), max((node.gpus for node in nodes), default=0)
    needs = f"Needs {request.gpus} GPUs ({request.teacher} teacher + {request.student} student)"
    has = f"the pool has {capacity} on {_count(len(nodes), 'ready node')}" + (
        " matching runtime.nodeSelector" if request.node_selector else ""
    )
    if request.gpus > capacity:
        return Decision(
            False,
            f"{needs}; {has}: the run can never start there. Add nodes, or request fewer GPUs.",
            unschedulable=True,
        )
    if request.largest_pod > largest:
        return Decision(
            False,
            f"{needs} in pods of {request.largest_pod}; the largest node of the pool has {largest}: "
            "the run can never start there. Lower student.gpusPerPod or sampler.gpus, or add larger nodes.",
            unschedulable=True,
        )
    names = {node.name for node in nodes}
    rivals = [
        other
        for other in others
        if other.uid != request.uid and names & {node.name for node in _matching(other, pool)}
    ]
    holders = sorted((other for other in rivals if other.admitted), key=_age)
    held = sum(other.gpus for other in holders)
    arithmetic = f"{needs}; {has}, " + (
        f"of which {held} are held by {_names(holders)}" if holders else "all of them free"
    )
    if request.gpus > capacity - held:
        return Decision(False, f"{arithmetic}: {max(capacity - held, 0)} are left.")
    older = [
        other
        for other in rivals
        if not other.admitted and _age(other) < _age(request) and _can_ever_fit(other, pool)
    ]
    if older:
        return Decision(False, f"{arithmetic}; {_names(sorted(older, key=_age))} is older and goes first.")
    return Decision(True, f"{arithmetic}.")


def _matching(request: GpuRequest, pool: list[Node]) -> list[Node]:
    return [node for node in pool if request.node_selector.items() <= node.labels.items()]


def _can_ever_fit(request: GpuRequest, pool: list[Node]) -> bool:
    sizes = [node.gpus for node in _matching(request, pool)]
    return request.gpus <= sum(sizes) and request.largest_pod <= max(sizes, default=0)


def _age(request: GpuRequest) -> tuple[datetime, str]:
    return request.created, request.name


def _names(requests: list[GpuRequest]) -> str:
    return ", ".join(f"{request.name} ({request.gpus})" for request in requests)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
