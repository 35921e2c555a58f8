"""What must hold at any time of a history, whatever happens to the operator and its requests.

Pure functions from a history to the violations that it has, as sentences. They know the API, and nothing of
how the operator decides.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tests.fakes.chaos.history import Change, Json
from vpmoe.api import labels
from vpmoe.api.run import needs_gpus

RunStep = tuple[str, str]
"""Uid of a run, and one of its steps."""
Attempt = tuple[str, str, str]
"""The same, and the number of an attempt."""

PHASES: Mapping[str, Collection[str]] = {
    "": ("Pending", "Queued", "Running", "Suspended", "Failed"),
    "Pending": ("Queued", "Running", "Suspended", "Failed"),
    "Queued": ("Running", "Suspended", "Failed"),
    "Running": ("Queued", "Suspended", "Succeeded", "Failed"),
    "Suspended": ("Queued", "Running", "Failed"),
    "Succeeded": (),
    "Failed": (),
}
"""Phases that may follow each. From Running to Queued goes only a run that holds no GPUs. A Failed run that
is edited starts again."""
STATES: Mapping[str, Collection[str]] = {
    "": ("Pending", "Running"),
    "Pending": ("Queued", "Running", "Suspended", "Succeeded"),
    "Queued": ("Running", "Suspended", "Succeeded"),
    "Running": ("Retrying", "Suspended", "Succeeded", "Failed"),
    "Retrying": ("Queued", "Running", "Suspended", "Succeeded"),
    "Suspended": ("Queued", "Running", "Succeeded"),
    "Succeeded": (),
    "Failed": ("Succeeded",),
}
"""States of a step that may follow each. A step beside a trainer succeeds with it, from any state. A Failed
step of a run that is edited starts again."""
RESTARTS = ("Queued", "Running", "Suspended")
"""What an edited Failed run or step may become."""
PERMANENT, TERMINATED = 65, 143
"""Exit codes: no other attempt would help; stopped by SIGTERM."""


@dataclass(frozen=True)
class Write:
    """A write that the API server has applied, by the replica that sent it."""

    identity: str
    method: str
    path: str
    version: int
    """The object's resourceVersion after it."""


@dataclass(frozen=True)
class History:
    """What has happened in a namespace, in order."""

    changes: Sequence[Change]
    capacity: int
    """GPUs of all nodes."""
    writes: Sequence[Write] = ()
    """Those of the operator, in order."""
    deleted_by_hand: Collection[str] = ()
    """Uids of the objects that a user has deleted."""


@dataclass
class Run:
    """A run as it was last."""

    name: str
    generation: int = 0
    spec: Json = field(default_factory=dict)
    status: Json = field(default_factory=dict)
    deleting: bool = False

    @property
    def phase(self) -> str:
        return str(self.status.get("phase", ""))

    @property
    def steps(self) -> dict[str, Json]:
        return {step["name"]: step for step in self.status.get("steps", [])}

    @property
    def holds_gpus(self) -> bool:
        """Whether it was admitted to its GPUs: it runs, a step with GPUs has started, and one is left."""
        steps = [step for name, step in self.steps.items() if needs_gpus(name)]
        started = any(step.get("attempt", 0) for step in steps)
        return self.phase == "Running" and started and any(step["state"] != "Succeeded" for step in steps)

    @property
    def gpus(self) -> int:
        """What it requests in all."""
        return int(self.spec["teacher"].get("gpus", 1) + self.spec["student"]["gpus"])


def violations(history: History) -> list[str]:
    """Every violation of every invariant."""
    return [f"{check.__name__}: {found}" for check in INVARIANTS for found in check(history)]


def one_live_child_of_a_step(history: History) -> Iterator[str]:
    """Of one step of a run at most one child is alive at a time, and pods of at most one."""
    children: dict[str, Json] = {}
    pods: dict[str, Json] = {}
    known: dict[str, RunStep] = {}  # by uid of the child, also of one that is gone
    for change in history.changes:
        if change.kind == "Job" and (step := step_of(change.obj)):
            known[change.uid] = step
            before = set(_alive(children, known, step))
            _apply(children, change)
            alive = _alive(children, known, step)
            if len(alive) > 1 and set(alive) != before:
                yield f"at {change.version} {_names(children, alive)} of one step are alive"
        elif change.kind == "Pod" and (step := known.get(controller(change.obj))):
            before = set(_owners(pods, known, step))
            _apply(pods, change)
            owners = _owners(pods, known, step)
            if len(owners) > 1 and set(owners) != before:
                names = " and ".join(sorted(owners.values()))
                yield f"at {change.version} pods of {names} of one step are alive"


def one_child_of_an_attempt(history: History) -> Iterator[str]:
    """An attempt has one child. If a user deletes it before the operator has seen it, it is made again."""
    seen: dict[tuple[str, str, str], str] = {}
    named: set[str] = set()  # uids of children that statuses have named
    for change in history.changes:
        if change.kind == "DistillRun":
            steps = change.obj.get("status", {}).get("steps", [])
            named |= {step["child"]["uid"] for step in steps if step.get("child", {}).get("uid")}
        step = step_of(change.obj) if change.kind == "Job" else None
        if step is None or change.type == "DELETED":
            continue
        attempt = (*step, change.obj["metadata"]["labels"][labels.ATTEMPT])
        first = seen.setdefault(attempt, change.uid)
        if first != change.uid:
            seen[attempt] = change.uid
            if first in named or first not in history.deleted_by_hand:
                yield f"at {change.version} {change.name} is created a second time"


def children_are_intended(history: History) -> Iterator[str]:
    """A child is created only for the attempt that the run's status has, of a run that goes on."""
    for change, runs in _with_runs(history, "Job"):
        step = step_of(change.obj)
        if step is None or change.type != "ADDED":
            continue
        run = runs.get(step[0])
        status = run.steps.get(step[1], {}) if run is not None else {}
        attempt = change.obj["metadata"]["labels"][labels.ATTEMPT]
        if str(status.get("attempt", 0)) != attempt:
            yield (
                f"at {change.version} {change.name} is created, and the status is at attempt "
                f"{status.get('attempt', 0)}"
            )
        if run is not None and run.phase in ("Succeeded", "Failed", "Suspended"):
            yield f"at {change.version} {change.name} is created, and the run is {run.phase}"


def ends_are_final(history: History) -> Iterator[str]:
    """Succeeded never changes. Failed changes only after an edit."""
    for change, before, after in _run_changes(history):
        if before.phase == "Succeeded" and after.phase != "Succeeded":
            yield f"at {change.version} {after.name}: Succeeded became {after.phase}"
        if before.phase == "Failed" and after.phase != "Failed" and not _was_edited(before, after):
            yield f"at {change.version} {after.name}: Failed became {after.phase} without an edit"
        for name, old in before.steps.items():
            if old["state"] == "Succeeded" and after.steps.get(name, {}).get("state") != "Succeeded":
                yield f"at {change.version} {after.name}: step {name} has succeeded, and does so no longer"


def nothing_goes_back(history: History) -> Iterator[str]:
    """Phases and states follow each other as documented. Attempts, saved work and results are never lost."""
    for change, before, after in _run_changes(history):
        where = f"at {change.version} {after.name}"
        allowed = (
            RESTARTS if before.phase == "Failed" and _was_edited(before, after) else PHASES[before.phase]
        )
        if after.phase not in (before.phase, *allowed):
            yield f"{where}: phase {before.phase or 'none'} became {after.phase or 'none'}"
        if before.holds_gpus and after.phase == "Queued":
            yield f"{where}: it held GPUs, and is Queued again"
        if before.status.get("started") and after.status.get("started") != before.status["started"]:
            yield f"{where}: it has started again"
        for name, old in before.steps.items():
            yield from _step_goes_back(f"{where}: step {name}", old, after.steps.get(name), before, after)


def _step_goes_back(where: str, old: Json, new: Json | None, before: Run, after: Run) -> Iterator[str]:
    if new is None:
        yield f"{where} is gone"
        return
    allowed = (
        *STATES[old["state"]],
        *(RESTARTS if old["state"] == "Failed" and _may_restart(before, after) else ()),
    )
    if new["state"] not in (old["state"], *allowed):
        yield f"{where}: state {old['state']} became {new['state']}"
    if (new.get("partsDone") or 0) < (old.get("partsDone") or 0):
        yield f"{where}: {old['partsDone']} parts became {new.get('partsDone')}"
    attempts = old.get("attempt", 0), new.get("attempt", 0)
    if attempts[1] not in (attempts[0], attempts[0] + 1):
        yield f"{where}: attempt {attempts[0]} became {attempts[1]}"
    if attempts[1] > attempts[0] and (old["state"] == "Running" or new["state"] != "Running"):
        states = f"{old['state']} became {new['state']}"
        yield f"{where}: {states} when attempt {attempts[0]} became {attempts[1]}"


def gpus_fit(history: History) -> Iterator[str]:
    """Neither the pods that are alive, nor the children, nor the runs that were admitted have more GPUs than
    the nodes."""
    runs: dict[str, Run] = {}
    children: dict[str, Json] = {}
    pods: dict[str, Json] = {}
    worst = dict.fromkeys(("pods", "children", "admitted runs"), history.capacity)
    for change in history.changes:
        if change.kind == "DistillRun":
            _apply_run(runs, change)
        elif change.kind == "Job":
            _apply(children, change)
        elif change.kind == "Pod":
            _apply(pods, change)
        else:
            continue
        sums = {
            "pods": sum(pod_gpus(pod["spec"]) for pod in pods.values() if pod_is_alive(pod)),
            "children": sum(child_gpus(child) for child in children.values() if child_is_alive(child)),
            "admitted runs": sum(run.gpus for run in runs.values() if run.holds_gpus),
        }
        for what, gpus in sums.items():
            if gpus > worst[what]:
                worst[what] = gpus
                yield f"at {change.version} {what} have {gpus} of {history.capacity} GPUs ({change.name})"


def attempts_are_counted_once(history: History) -> Iterator[str]:
    """Each attempt that ends badly counts once, by its cause: as a failure if its process failed, as an
    interruption if it was stopped from outside. Only a new checkpoint, part or window, or a success, resets
    the counts."""
    exits, stopped = _endings(history)
    for change, before, after in _run_changes(history):
        for name, new in after.steps.items():
            old = before.steps.get(name, {"state": "Pending"})
            attempt = (change.uid, name, str(old.get("attempt", 0)))
            where = f"at {change.version} {after.name}: step {name}, attempt {attempt[2]}"
            counts = [(step.get("failures", 0), step.get("interruptions", 0)) for step in (old, new)]
            base = (0, 0) if _saved(new) > _saved(old) or new["state"] == "Succeeded" else counts[0]
            ended = old["state"] == "Running" and new["state"] in ("Retrying", "Failed")
            if not ended:
                if counts[1] not in (base, counts[0]):
                    yield f"{where}: counts {counts[0]} became {counts[1]} although no attempt has ended"
                continue
            codes = exits.get(attempt, set())
            failed = bool(codes - {0, TERMINATED})
            limit = after.spec.get("runtime", {}).get("attempts", 3)
            failures = max(base[0] + 1, limit) if PERMANENT in codes else base[0] + 1
            expected = [(failures, base[1])] if failed else []
            if attempt in stopped or not failed:
                expected.append((base[0], base[1] + 1))
            if counts[1] not in expected:
                became = f"counts {counts[0]} became {counts[1]}, not {expected}"
                yield f"{where}: ended with {sorted(codes)}, and {became}"


def events_are_posted_once(history: History) -> Iterator[str]:
    """There is at most one Event for each thing that has happened."""
    happened: Counter[tuple[str, str]] = Counter()
    posted: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    names: dict[str, str] = {}
    for change, before, after in _run_changes(history):
        names[change.uid] = after.name
        happened.update((change.uid, reason) for reason in _reasons(before, after))
    for change in history.changes:
        if change.kind == "Event" and change.obj["involvedObject"]["kind"] == "DistillRun":
            key = change.obj["involvedObject"]["uid"], change.obj["reason"]
            posted[key][change.name] = change.obj["count"]
    for (uid, reason), counts in posted.items():
        if reason in COUNTED_REASONS and sum(counts.values()) > happened[uid, reason]:
            yield (
                f"{names.get(uid, uid)}: {sum(counts.values())} Events {reason} for "
                f"{happened[uid, reason]} that have happened"
            )


COUNTED_REASONS = (
    *("StepStarted", "StepRetrying", "StepFailed", "StepSucceeded"),
    *("RunFailed", "RunSucceeded", "Queued", "Suspended", "Resumed"),
)


def _reasons(before: Run, after: Run) -> Iterator[str]:
    """Reasons of the Events about a change of a run's status."""
    for name, new in after.steps.items():
        old = before.steps.get(name, {})
        if new["state"] in ("Retrying", "Failed", "Succeeded") and old.get("state") != new["state"]:
            yield f"Step{new['state']}"
        if new.get("attempt", 0) > old.get("attempt", 0):
            yield "StepStarted"
    if after.phase != before.phase:
        yield {"Failed": "RunFailed", "Succeeded": "RunSucceeded", "Running": "Resumed"}.get(
            after.phase, after.phase
        )


def only_the_holder_writes(history: History) -> Iterator[str]:
    """Each write was applied while the replica that sent it held the Lease."""
    holders = [
        (change.version, change.obj["spec"].get("holderIdentity") or "")
        for change in history.changes
        if change.kind == "Lease" and change.type != "DELETED"
    ]
    seen = set[int]()
    for write in history.writes:
        if write.version in seen:  # it changed nothing
            continue
        seen.add(write.version)
        holder = next((who for version, who in reversed(holders) if version <= write.version), "")
        if holder != write.identity:
            wrote = f"{write.identity} wrote {write.method} {write.path}"
            yield f"at {write.version} {wrote}, and {holder or 'nobody'} led"


def runs_are_not_lost(history: History) -> Iterator[str]:
    """A run is deleted by a user, or when it has finished."""
    for change, before, after in _run_changes(history):
        ends = after.deleting and not before.deleting and change.uid not in history.deleted_by_hand
        if ends and after.phase not in ("Succeeded", "Failed"):
            yield f"at {change.version} {after.name} is deleted, and it is {after.phase}"


INVARIANTS: tuple[Callable[[History], Iterator[str]], ...] = (
    one_live_child_of_a_step,
    one_child_of_an_attempt,
    children_are_intended,
    ends_are_final,
    nothing_goes_back,
    gpus_fit,
    attempts_are_counted_once,
    events_are_posted_once,
    only_the_holder_writes,
    runs_are_not_lost,
)


def step_of(child: Json) -> RunStep | None:
    """The step that a Job is an attempt of; None if it is none, such as the Job that clears a folder."""
    found = child["metadata"].get("labels", {})
    owner = controller(child)
    return (owner, found[labels.STEP]) if owner and labels.ATTEMPT in found else None


def controller(obj: Json) -> str:
    """Uid of the object's controller; empty if it has none."""
    owners = obj["metadata"].get("ownerReferences", [])
    return next((str(owner["uid"]) for owner in owners if owner.get("controller")), "")


def child_is_alive(child: Json) -> bool:
    """Whether a Job may still have pods that run."""
    conditions = child.get("status", {}).get("conditions", [])
    return not any(c["type"] in ("Complete", "Failed") and c["status"] == "True" for c in conditions)


def pod_is_alive(pod: Json) -> bool:
    return pod.get("status", {}).get("phase") not in ("Succeeded", "Failed")


def pod_gpus(spec: Json) -> int:
    """GPUs of a pod with this spec."""
    limits = [container.get("resources", {}).get("limits", {}) for container in spec["containers"]]
    return sum(int(limit.get("nvidia.com/gpu", 0)) for limit in limits)


def child_gpus(child: Json) -> int:
    """GPUs of all pods of a Job."""
    return int(child["spec"].get("parallelism", 1)) * pod_gpus(child["spec"]["template"]["spec"])


def _apply(objects: dict[str, Json], change: Change) -> None:
    if change.type == "DELETED":
        objects.pop(change.uid, None)
    else:
        objects[change.uid] = change.obj


def _apply_run(runs: dict[str, Run], change: Change) -> None:
    if change.type == "DELETED":
        runs.pop(change.uid, None)
        return
    meta = change.obj["metadata"]
    runs[change.uid] = Run(
        change.name,
        meta["generation"],
        change.obj["spec"],
        change.obj.get("status", {}),
        "deletionTimestamp" in meta,
    )


def _run_changes(history: History) -> Iterator[tuple[Change, Run, Run]]:
    """Each change of a run, the run before it and after it."""
    runs: dict[str, Run] = {}
    for change in history.changes:
        if change.kind == "DistillRun":
            before = runs.get(change.uid, Run(change.name))
            _apply_run(runs, change)
            yield change, before, runs.get(change.uid) or replace(before, deleting=True)


def _with_runs(history: History, kind: str) -> Iterator[tuple[Change, dict[str, Run]]]:
    """Each change of a kind, with the runs of that moment by uid."""
    runs: dict[str, Run] = {}
    for change in history.changes:
        if change.kind == "DistillRun":
            _apply_run(runs, change)
        elif change.kind == kind:
            yield change, runs


def _was_edited(before: Run, after: Run) -> bool:
    """Whether the status is about a later generation than before."""
    return bool(after.status.get("observedGeneration", 0) > before.status.get("observedGeneration", 0))


def _may_restart(before: Run, after: Run) -> bool:
    """Whether a Failed step of a run may start again: the run was edited at some time since it failed."""
    return bool(after.generation > 1) or _was_edited(before, after)


def _alive(children: Mapping[str, Json], known: Mapping[str, RunStep], step: RunStep) -> list[str]:
    return [uid for uid, child in children.items() if known.get(uid) == step and child_is_alive(child)]


def _owners(pods: Mapping[str, Json], known: Mapping[str, RunStep], step: RunStep) -> dict[str, str]:
    """The children of a step that have pods alive: names by uid."""
    alive = [pod for pod in pods.values() if known.get(controller(pod)) == step and pod_is_alive(pod)]
    return {controller(pod): pod["metadata"]["ownerReferences"][0]["name"] for pod in alive}


def _names(objects: Mapping[str, Json], uids: Collection[str]) -> str:
    return " and ".join(sorted(objects[uid]["metadata"]["name"] for uid in uids))


def _saved(step: Json) -> int:
    """What another attempt would start from: optimizer steps, or parts or windows."""
    checkpoint: Any = step.get("checkpoint")
    return int(checkpoint["iteration"] if checkpoint else step.get("partsDone") or 0)


def _endings(history: History) -> tuple[dict[Attempt, set[int]], set[Attempt]]:
    """Exit codes of the pods of each attempt, and the attempts whose child or pods were deleted."""
    attempts: dict[str, Attempt] = {}
    exits: dict[Attempt, set[int]] = defaultdict(set)
    stopped = set()
    for change in history.changes:
        meta = change.obj["metadata"]
        if change.kind == "Job" and (step := step_of(change.obj)):
            attempts[change.uid] = (*step, meta["labels"][labels.ATTEMPT])
            if "deletionTimestamp" in meta or change.type == "DELETED":
                stopped.add(attempts[change.uid])
        elif change.kind == "Pod" and (attempt := attempts.get(controller(change.obj))):
            status = change.obj.get("status", {})
            for container in status.get("containerStatuses", []):
                if "terminated" in container.get("state", {}):
                    exits[attempt].add(container["state"]["terminated"]["exitCode"])
            if "deletionTimestamp" in meta or change.type == "DELETED":
                stopped.add(attempt)
    return exits, stopped
