"""Admission of runs to the pool of GPUs: oldest first, and only if all of a run's teacher and student GPUs
are free at once. Pure.

A run's pool is the set of nodes on which its pods may be scheduled: Ready, not cordoned, matched by its
nodeSelector, every taint tolerated. GPUs that other pods use are subtracted. Two runs share a pool if their
sets of nodes overlap; each then counts in full, so the GPUs that are left are left wherever the others' pods
are. Whether a pod fits on a single node is the Kubernetes scheduler's decision, unless no node can hold it.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from decimal import Decimal

from distill_operator.kube import Json
from distill_operator.observe import ObservedRun
from distill_operator.pod_template import gpu_tolerations
from distill_operator.settings import Settings
from vpmoe.api import DistillRun
from vpmoe.api.layout import largest_pod
from vpmoe.api.run import PREPROCESS, needs_gpus
from vpmoe.api.runtime import Toleration
from vpmoe.api.status import ChildRef

RunKey = tuple[str, str]
"""Namespace and name of a DistillRun."""

MAX_NAMES = 3
"""Runs, or reasons, that a message names."""
MAX_TAINT = 120
"""Characters of a taint in a message."""
_SUFFIXES = {"": Decimal(1), "m": Decimal("1e-3"), "u": Decimal("1e-6"), "n": Decimal("1e-9")} | {
    letter.upper() + binary if binary else letter: Decimal((1024 if binary else 1000) ** power)
    for power, letter in enumerate("kMGTPE", start=1)
    for binary in ("", "i")
}


@dataclass(frozen=True)
class Taint:
    """A taint that keeps pods without a toleration off its node."""

    key: str
    value: str
    effect: str

    def __str__(self) -> str:
        text = f"{self.key}{'=' if self.value else ''}{self.value}:{self.effect}"
        return text if len(text) <= MAX_TAINT else text[: MAX_TAINT - 1] + "…"


@dataclass(frozen=True)
class Node:
    """A node with GPUs."""

    name: str
    labels: Mapping[str, str]
    gpus: int
    """GPUs that pods can request in all."""
    taints: tuple[Taint, ...] = ()
    available: bool = True
    """Ready, and not cordoned."""


@dataclass(frozen=True)
class Placement:
    """Where a run's pods may be scheduled."""

    node_selector: frozenset[tuple[str, str]]
    tolerations: frozenset[Toleration]


@dataclass(frozen=True)
class GpuRequest:
    """GPUs that a run needs from its first step with GPUs to the end of its last one."""

    namespace: str
    name: str
    created: datetime
    teacher: int
    student: int
    largest_pod: int
    placement: Placement

    @property
    def gpus(self) -> int:
        return self.teacher + self.student

    @property
    def key(self) -> RunKey:
        return self.namespace, self.name


@dataclass(frozen=True)
class Decision:
    """Whether a run may start the steps that need GPUs, and the arithmetic behind it.

    `unschedulable`: the present nodes can never hold the run.
    """

    admitted: bool
    arithmetic: str
    unschedulable: bool = False


@dataclass(frozen=True)
class PodGpus:
    """GPUs of a pod that is bound to a node and has not ended."""

    node: str
    gpus: int
    namespace: str
    owner: ChildRef | None
    """Its controller; None if it has none."""


@dataclass(frozen=True)
class Share:
    """The part of a pool that one placement allows."""

    nodes: int
    """Bit i: whether node i of the pool belongs to it."""
    count: int
    capacity: int
    used: int
    """GPUs of other pods."""
    largest: int
    """GPUs of the largest node."""
    largest_free: int
    """GPUs of one node that other pods do not use, at most."""
    excluded: str
    """Nodes with GPUs that do not belong to it, and why; empty if there are none."""

    @property
    def free(self) -> int:
        """GPUs that other pods leave to runs."""
        return self.capacity - self.used


class Pool:
    """The nodes with GPUs, and the GPUs of each that pods of others use. Computes each placement's share
    once.

    Tenants choose placements: the work for one must not be that of comparing each node with each toleration.
    So nodes with equal taints are compared once, and nodes with equal numbers of GPUs are counted together.
    """

    def __init__(self, nodes: Iterable[Node], used: Mapping[str, int] | None = None) -> None:
        found = [node for node in nodes if node.gpus > 0]
        self._all = (1 << len(found)) - 1
        self._labelled = defaultdict[tuple[str, str], int](int)  # bit i of each: node i
        self._alike = defaultdict[tuple[bool, tuple[Taint, ...]], int](int)
        self._sizes = defaultdict[tuple[int, int], int](int)
        for i, node in enumerate(found):
            self._alike[node.available, node.taints] |= 1 << i
            self._sizes[node.gpus, min(node.gpus, (used or {}).get(node.name, 0))] |= 1 << i
            for label in node.labels.items():
                self._labelled[label] |= 1 << i
        self._shares: dict[Placement, Share] = {}
        self._sums: dict[int, Share] = {}  # without what is excluded

    def share(self, placement: Placement) -> Share:
        """The share of a placement."""
        if placement not in self._shares:
            self._shares[placement] = self._compute(placement)
        return self._shares[placement]

    def _compute(self, placement: Placement) -> Share:
        selected = self._all
        for label in placement.node_selector:
            selected &= self._labelled.get(label, 0)
        tolerations = defaultdict[str, list[Toleration]](list)
        for toleration in placement.tolerations:
            tolerations[toleration.key or ""].append(toleration)
        reasons = Counter({"excluded by runtime.nodeSelector": (self._all & ~selected).bit_count()})
        inside = 0
        for (available, taints), alike in self._alike.items():
            if not alike & selected:
                continue
            if reason := _exclusion(available, taints, tolerations):
                reasons[reason] += (alike & selected).bit_count()
            else:
                inside |= alike & selected
        excluded = ", ".join(
            f"{_count(number, 'node')} {reason}"
            for reason, number in reasons.most_common(MAX_NAMES)
            if number
        )
        if inside not in self._sums:
            self._sums[inside] = self._add_up(inside)
        return replace(self._sums[inside], excluded=excluded)

    def _add_up(self, nodes: int) -> Share:
        sizes = [
            (gpus, used, number)
            for (gpus, used), alike in self._sizes.items()
            if (number := (alike & nodes).bit_count())
        ]
        return Share(
            nodes=nodes,
            count=nodes.bit_count(),
            capacity=sum(gpus * number for gpus, _, number in sizes),
            used=sum(used * number for _, used, number in sizes),
            largest=max((gpus for gpus, _, _ in sizes), default=0),
            largest_free=max((gpus - used for gpus, used, _ in sizes), default=0),
            excluded="",
        )


@dataclass
class _Group:
    """The runs whose shares are the same set of nodes. The numbers grow while decide() goes through the
    queue.
    """

    nodes: int
    held: int = 0
    """GPUs of the runs that hold some of the nodes."""
    older: int = 0
    """Runs that wait for some of the nodes, and go first."""
    neighbours: list["_Group"] = field(default_factory=list)
    """The groups that share a node with this one, itself included."""


def needs_admission(run: DistillRun, settings: Settings) -> bool:
    """Whether this operator's queue admits the run. With queueName Kueue admits each child; with scheduling
    Immediate nobody does.
    """
    runtime = run.spec.runtime
    return not runtime.queue_name and (runtime.scheduling or settings.scheduling) == "Queued"


def holds_gpus(observed: ObservedRun, settings: Settings) -> bool:
    """Whether the run holds GPUs that this operator's queue has admitted it to. The pods of other runs count
    as pods.
    """
    run = observed.run
    return run is not None and observed.status.holds_gpus and needs_admission(run, settings)


def will_need_gpus(observed: ObservedRun, settings: Settings) -> bool:
    """Whether the run holds no GPUs yet, and neither its spec nor its status prevents that it needs them
    sooner or later.
    """
    run, status = observed.run, observed.status
    if run is None or observed.deleting or run.spec.suspend or not needs_admission(run, settings):
        return False
    ended = status.phase == "Succeeded" or status.failed_step(run.spec.runtime) is not None
    return not ended and not status.gpu_steps_finished and not status.holds_gpus


def waits_for_gpus(observed: ObservedRun, settings: Settings) -> bool:
    """Whether the run needs a Decision: a step with GPUs could start now, and the run holds none. A run that
    preprocesses, or whose first stage waits for its initial weights, does not wait yet.
    """
    run, done = observed.run, {step.name for step in observed.status.steps if step.state == "Succeeded"}
    if run is None or PREPROCESS not in done or not will_need_gpus(observed, settings):
        return False
    left = [step for step in run.steps() if needs_gpus(step) and step not in done]
    return any(done.issuperset(run.needs(step)) for step in left)


def gpu_request(run: DistillRun, observed: ObservedRun, settings: Settings) -> GpuRequest:
    """The run's request. DistillRun.needs() guarantees that its children never need more at the same time."""
    spec = run.spec
    return GpuRequest(
        namespace=observed.namespace,
        name=observed.name,
        created=observed.created,
        teacher=spec.teacher.gpus,
        student=spec.student.gpus,
        largest_pod=max(largest_pod(spec.teacher, spec.student, stage) for stage in spec.stages),
        placement=Placement(
            frozenset(spec.runtime.node_selector.items()),
            frozenset(gpu_tolerations(run, settings)),
        ),
    )


def parse_node(obj: Json, resource: str) -> Node:
    """A Node from the object that the API server returned."""
    spec, status = obj.get("spec", {}), obj.get("status", {})
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions", []))
    return Node(
        name=obj["metadata"]["name"],
        labels=obj["metadata"].get("labels", {}),
        gpus=whole_number(status.get("allocatable", {}).get(resource, 0)),
        taints=tuple(
            Taint(taint["key"], taint.get("value", ""), taint["effect"])
            for taint in spec.get("taints", [])
            if taint["effect"] in ("NoSchedule", "NoExecute")
        ),
        available=ready and not spec.get("unschedulable", False),
    )


def parse_pod(obj: Json, resource: str) -> PodGpus | None:
    """The GPUs of a pod from the object that the API server returned. None if it holds none: it requests
    none, is bound to no node, or has ended.
    """
    meta, spec = obj["metadata"], obj["spec"]
    gpus = _requested(spec, resource)
    if not gpus or not spec.get("nodeName") or obj.get("status", {}).get("phase") in ("Succeeded", "Failed"):
        return None
    owners = [
        ChildRef(kind=owner["kind"], name=owner["name"], uid=owner["uid"])
        for owner in meta.get("ownerReferences", [])
        if owner.get("controller")
    ]
    return PodGpus(spec["nodeName"], gpus, meta["namespace"], owners[0] if owners else None)


def used_by_others(
    pods: Iterable[PodGpus], children: Mapping[str, Collection[ChildRef]]
) -> Mapping[str, int]:
    """GPUs by node that pods use which belong to none of `children`, those of the runs that hold GPUs by
    namespace. Such a run's GPUs count in full already.
    """
    known = {
        (namespace, child.kind, child.name): child.uid
        for namespace, refs in children.items()
        for child in refs
    }
    used = Counter[str]()
    for pod in pods:
        owner = pod.owner
        key = (pod.namespace, owner.kind, owner.name) if owner is not None else None
        if owner is None or key not in known or known[key] not in (None, owner.uid):
            used[pod.node] += pod.gpus
    return used


def whole_number(quantity: str | int) -> int:
    """A Kubernetes quantity such as "8" or "2k", rounded down."""
    found = re.fullmatch(r"([0-9.]+(?:[eE][0-9]+)?)([a-zA-Z]*)", str(quantity))
    if found is None or found[2] not in _SUFFIXES:
        raise ValueError(f"{quantity!r} is not a quantity of GPUs")
    return int(Decimal(found[1]) * _SUFFIXES[found[2]])


def decide(
    waiting: Iterable[GpuRequest],
    holders: Iterable[GpuRequest],
    pool: Pool,
    passed_over: Collection[RunKey] = frozenset(),
) -> dict[RunKey, Decision]:
    """Decide about the whole queue in one pass, oldest first. Returns each waiting run's decision by its key.

    A run is admitted if it fits beside the holders and beside the older runs that are admitted with it. One
    that waits although it could fit some day keeps all younger ones from the nodes that it shares with them.

    Runs that are `passed_over` get a decision like others, but keep nothing from younger ones.
    """
    queue = sorted(waiting, key=_age)
    holding = list(holders)
    groups = _groups([*queue, *holding], pool)
    for holder in holding:
        _hold(groups, pool, holder)
    decisions = dict[RunKey, Decision]()
    for request in queue:
        share = pool.share(request.placement)
        if never := _never_fits(request, share):
            decisions[request.key] = Decision(False, never, unschedulable=True)
            continue
        group = groups[share.nodes]
        decision = decisions[request.key] = _decide(request, share, group, holding, pool)
        if request.key in passed_over:
            continue
        if decision.admitted:
            holding.append(request)
            _hold(groups, pool, request)
        else:
            for neighbour in group.neighbours:
                neighbour.older += 1
    return decisions


def fits(request: GpuRequest, holders: Iterable[GpuRequest], pool: Pool) -> bool:
    """Whether the run fits into the pool beside these holders."""
    share = pool.share(request.placement)
    held = sum(other.gpus for other in holders if pool.share(other.placement).nodes & share.nodes)
    return request.gpus <= share.free - held and request.largest_pod <= share.largest_free


def never_fits(request: GpuRequest, pool: Pool) -> str:
    """Why the present nodes can never hold the run, whatever ends; empty if they can."""
    return _never_fits(request, pool.share(request.placement))


def _groups(requests: Iterable[GpuRequest], pool: Pool) -> dict[int, _Group]:
    groups = {nodes: _Group(nodes) for nodes in {pool.share(request.placement).nodes for request in requests}}
    for group in groups.values():
        group.neighbours = [other for other in groups.values() if other.nodes & group.nodes]
    return groups


def _hold(groups: Mapping[int, _Group], pool: Pool, request: GpuRequest) -> None:
    gpus = request.gpus
    for neighbour in groups[pool.share(request.placement).nodes].neighbours:
        neighbour.held += gpus


def _decide(
    request: GpuRequest, share: Share, group: _Group, holders: Sequence[GpuRequest], pool: Pool
) -> Decision:
    """The decision about the oldest run that is not decided yet, which fits some day.

    Only the first run of a group that waits has the holders in its message: all others' messages would
    change with every run that starts or ends.
    """
    if group.older:
        return Decision(False, f"{_needs(request)}; {_has(share)}. {_older(group.older)}.")
    left = max(share.free - group.held, 0)
    if request.gpus <= left and request.largest_pod <= share.largest_free:
        return Decision(True, f"{_needs(request)}; {_has(share)}, {left} of them free.")
    message = f"{_needs(request)}; {_has(share)}, {_users(request, share, holders, pool)}: "
    if request.gpus > left:
        message += f"{left} are left."
    else:
        message += f"{left} are left, but at most {share.largest_free} on one node, and a pod needs "
        message += f"{request.largest_pod}."
    return Decision(False, message + _not_counted(share))


def _never_fits(request: GpuRequest, share: Share) -> str:
    if request.gpus > share.capacity:
        message, remedy = f"{_needs(request)}; {_has(share)}", "request fewer GPUs"
    elif request.largest_pod > share.largest:
        message = (
            f"{_needs(request)} in pods of {request.largest_pod}; the largest node of the pool has "
            f"{share.largest}"
        )
        remedy = "lower student.gpusPerPod, sampler.gpus or teacher.gpus"
    else:
        return ""
    return (
        f"{message}: the run can never start there.{_not_counted(share)} Add nodes, or {remedy}. "
        "If an autoscaler adds nodes for pending pods, set runtime.scheduling to Immediate."
    )


def _users(request: GpuRequest, share: Share, holders: Sequence[GpuRequest], pool: Pool) -> str:
    """Who has the GPUs of the share. Runs of other namespaces are not named."""
    overlapping = [other for other in holders if pool.share(other.placement).nodes & share.nodes]
    own = sorted((other for other in overlapping if other.namespace == request.namespace), key=_age)
    own_gpus = sum(other.gpus for other in own)
    strangers = len(overlapping) - len(own)
    parts = []
    if share.used:
        parts.append(f"{share.used} are used by other pods")
    if own:
        names = [f"{other.name} ({other.gpus})" for other in own[:MAX_NAMES]]
        more = [f"{len(own) - MAX_NAMES} more"] if len(own) > MAX_NAMES else []
        parts.append(f"{own_gpus} are held by {_listed([*names, *more])}")
    if strangers:
        elsewhere = sum(other.gpus for other in overlapping) - own_gpus
        parts.append(f"{elsewhere} are held by {_count(strangers, 'run')} of other namespaces")
    return f"of which {_listed(parts)}" if parts else "all of them free"


def _needs(request: GpuRequest) -> str:
    return f"Needs {request.gpus} GPUs ({request.teacher} teacher + {request.student} student)"


def _has(share: Share) -> str:
    allowed = " that the run's pods may use" if share.excluded else ""
    return f"the pool has {share.capacity} on {_count(share.count, 'ready node')}{allowed}"


def _not_counted(share: Share) -> str:
    return f" Not counted: {share.excluded}." if share.excluded else ""


def _older(number: int) -> str:
    """How many go first. A large number is rounded down to a power of ten, so that the message rarely
    changes.
    """
    if number < 10:
        return "1 older run goes first" if number == 1 else f"{number} older runs go first"
    return f"At least {10 ** (len(str(number)) - 1)} older runs go first"


def _exclusion(
    available: bool, taints: Iterable[Taint], tolerations: Mapping[str, Sequence[Toleration]]
) -> str:
    """Why pods with these tolerations, by key, cannot be scheduled on a node; empty if they can."""
    if not available:
        return "cordoned or not ready"
    for taint in taints:
        known = (*tolerations.get(taint.key, ()), *tolerations.get("", ()))
        if not any(_tolerates(toleration, taint) for toleration in known):
            return f"with taint {taint}, which runtime.tolerations lacks"
    return ""


def _tolerates(toleration: Toleration, taint: Taint) -> bool:
    """As the Kubernetes scheduler decides it."""
    if toleration.effect is not None and toleration.effect != taint.effect:
        return False
    if toleration.key and toleration.key != taint.key:
        return False
    if toleration.operator == "Exists":
        return True
    return bool(toleration.key) and (toleration.value or "") == taint.value


def _requested(spec: Json, resource: str) -> int:
    """GPUs that a pod requests: its containers' and sidecars' together, or more while it initializes."""
    together, peak = 0, 0
    for container in spec.get("initContainers", []):
        gpus = _of_container(container, resource)
        peak = max(peak, together + gpus)
        if container.get("restartPolicy") == "Always":  # a sidecar goes on beside all that follow
            together += gpus
    return max(
        peak, together + sum(_of_container(container, resource) for container in spec.get("containers", []))
    )


def _of_container(container: Json, resource: str) -> int:
    resources = container.get("resources", {})
    found = resources.get("requests", {}).get(resource, resources.get("limits", {}).get(resource, 0))
    return whole_number(found)


def _age(request: GpuRequest) -> tuple[datetime, RunKey]:
    return request.created, request.key


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
