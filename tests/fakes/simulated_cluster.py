"""A DistillRun and a cluster as values, for tests of the operator's decisions: nothing here talks to anything.

`World` applies a plan's actions to the children it holds, and lets time pass; what the real API server does is tests/cluster's business.
"""

import copy
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from distill_operator import observe
from distill_operator.actions import ClearBucket, Create, Delete, DeleteRun, Finalizer, KeepBucket
from distill_operator.attempt import Attempt, Origin, child_kind, child_name
from distill_operator.children import build_child
from distill_operator.gpu_scheduler import Decision
from distill_operator.observe import Child, ChildObservation, Observed, ObservedRun
from distill_operator.plan import holds_gpus, plan
from distill_operator.plan_builder import Plan
from distill_operator.pod_diagnosis import Failure
from distill_operator.settings import Settings
from distill_operator.step_progress import ProgressReading

from vpmoe.api.progress import Amount, CheckpointStatus, DatasetStatus, Progress
from vpmoe.api.status import Status, StepStatus

START = datetime(2026, 1, 1, tzinfo=UTC)
UID = "0a1b2c3d-0000-4000-8000-000000000001"
SHA = "a" * 40
ADMITTED = Decision(True, "fits")

SETTINGS = Settings.model_validate(
    {
        "gitSha": SHA,
        "images": {"trainer": "vpmoe/trainer:1", "inference": "vpmoe/inference:1"},
        "lease": {"name": "distill-operator"},
        "resources": {"train": {"requests": {"cpu": "4"}}, "rescore": {"requests": {"memory": "2Gi"}}},
        "backoff": {"baseSeconds": 10, "limitSeconds": 60},
    }
)


def manifest(**spec: Any) -> dict[str, Any]:
    """A DistillRun as the API server returns it; keywords replace parts of its spec."""
    return {
        "apiVersion": "vpmoe.dev/v1alpha1",
        "kind": "DistillRun",
        "metadata": {
            "name": "first",
            "namespace": "team",
            "uid": UID,
            "generation": 1,
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "resourceVersion": "1",
            "managedFields": [],
        },
        "spec": {
            "dataset": {"source": "s3://corpora/*.parquet", "maxLength": 512, "workers": 2},
            "teacher": {"model": "s3://models/teacher"},
            "student": {"shape": "tiny", "gpus": 2},
            "training": {"sequenceLength": 512, "globalBatchTokens": 2048},
            "stages": [{"name": "vanilla", "kind": "Vanilla", "tokens": 1000}],
            "evaluation": {"completions": 0},
            "storage": {"endpoint": "http://s3:9000", "bucket": "vpmoe", "prefix": "here"},
            **copy.deepcopy(spec),
        },
    }


def live(
    status: Status | None = None, deleting: bool = False, finalizers: tuple[str, ...] = (), **spec: Any
) -> ObservedRun:
    """That run as it was read, with this status."""
    obj = manifest(**spec)
    if status is not None:
        obj["status"] = status.dump()
    return replace(observe.read_run(obj), deleting=deleting, finalizers=finalizers)


def progress(
    step: str, attempt: int = 1, state: str = "Running", iteration: int = 0, done: int = 0, **more: Any
) -> ProgressReading:
    """What a step says: `iteration` of its last checkpoint, `done` tokens (what does not train: parts, or windows)."""
    address = "s3://vpmoe/somewhere/manifest.json"
    trains = step not in ("preprocess", "rescore") and "-" not in step
    amount = {"tokens": Amount(done=done, total=1000)} if trains else {"parts": Amount(done=done, total=4)}
    checkpoint = (
        CheckpointStatus(iteration=iteration, tokens=done, manifest=address, sha256="c" * 64)
        if iteration
        else None
    )
    dataset = DatasetStatus(id="d" * 64, manifest=address, sha256="e" * 64)
    told = {
        "step": step,
        "attempt": attempt,
        "state": state,
        "updated": START,
        "checkpoint": checkpoint,
        "dataset": dataset,
    }
    return ProgressReading(Progress.model_validate({**told, **amount, **more}), asked=True)


def templates(child: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """How many pods of which template a Job or PyTorchJob has."""
    spec = child["spec"]
    if child["kind"] == "Job":
        return [(spec["parallelism"], spec["template"])]
    return [(replica["replicas"], replica["template"]) for replica in spec["pytorchReplicaSpecs"].values()]


def gpus(child: dict[str, Any]) -> int:
    """GPUs of all pods of a Job or PyTorchJob."""
    limits = [
        (count, template["spec"]["containers"][0]["resources"].get("limits", {}))
        for count, template in templates(child)
    ]
    return sum(count * limit.get("nvidia.com/gpu", 0) for count, limit in limits)


ALL_KINDS = [
    {"name": "vanilla", "kind": "Vanilla", "tokens": 1000},
    {"name": "rescored", "kind": "Rescored", "tokens": 1000},
    {"name": "forced", "kind": "TeacherForced", "tokens": 1000},
]
ONPOLICY = {"name": "onpolicy", "kind": "OnPolicy", "tokens": 1000, "require": {"validity": 0}}
EVALUATED = {"completions": 8}
ERROR = Failure("Error", "pod x, container pytorch, exit 137 (killed)")
EVICTED = Failure("Interrupted", "pod x was stopped from outside (EvictionByEvictionAPI: drained)")
PERMANENT = Failure("Permanent", "pod x, exit 65")
RETRIABLE = Failure("Retriable", "pod x, exit 75")
AWAY = ProgressReading(asked=True, problem="s3://vpmoe: GetObject failed", reason="Unreachable")


@dataclass
class World:
    """One run, its children, its bucket's last word, and the time."""

    spec: dict[str, Any] = field(default_factory=dict)
    status: Status = field(default_factory=Status)
    children: dict[str, Child] = field(default_factory=dict)
    readings: dict[str, ProgressReading] = field(default_factory=dict)
    otherwise: ProgressReading = field(default_factory=ProgressReading)
    """What is read of a step that has told nothing."""
    verdict: Decision = ADMITTED
    now: datetime = START
    deleting: bool = False
    finalizer: bool = False
    bucket_cleared: bool = False
    run_deleted: bool = False
    backend_missing: bool = False
    made: list[str] = field(default_factory=list)
    asked: dict[str, int] = field(default_factory=dict)
    """GPUs by child."""
    last: Plan | None = None

    def decide(self) -> Plan:
        """A plan from the world as it is. Nothing changes."""
        finalizers = ("vpmoe.dev/delete-from-bucket",) if self.finalizer else ()
        seen_run = live(self.status, self.deleting, finalizers, **self.spec)
        named = {step.name: step.child.name for step in self.status.running if step.child is not None}
        seen = Observed(
            {step: ChildObservation(self.children.get(name)) for step, name in named.items()},
            self.backend_missing,
        )
        readings = {step: self.readings.get(step, self.otherwise) for step in named}
        verdict = None if holds_gpus(self.status) else self.verdict
        return plan(seen_run, seen, readings, verdict, SETTINGS, self.now)

    def look(self, crash_after: int | None = None) -> Plan:
        """Decide, write the status, act; with `crash_after`, only so many of the actions."""
        self.last = decided = self.decide()
        self.status = Status.model_validate(decided.status.dump())
        for action in decided.actions[:crash_after]:
            self._act(action)
        return decided

    def settle(self, looks: int = 5) -> Plan:
        """Look a few times, as watches make the operator do."""
        for _ in range(looks):
            decided = self.look()
        return decided

    def becomes(
        self, state: observe.State, failure: Failure | None = None, step: str = "", **more: Any
    ) -> None:
        """The child of that step changes; of the running one that is furthest on, where none is named."""
        name = self.child(step).name
        self.children[name] = replace(self.children[name], state=state, failure=failure, **more)

    def child(self, step: str = "") -> Child:
        """The child of that step, or of the running one that is furthest on."""
        found = self.status.step_status(step) if step else self.status.running[-1]
        assert found is not None
        assert found.child is not None
        return self.children[found.child.name]

    def ends(self, *steps: str) -> None:
        """The children of these steps, or all, are gone, with their pods."""
        for name in [self.child(step).name for step in steps] or list(self.children):
            del self.children[name]

    def tells(self, reading: ProgressReading) -> None:
        """From now on the step that this is about says so; what is about no step is read of every one."""
        if reading.progress is None:
            self.readings, self.otherwise = {}, reading
        else:
            self.readings[reading.progress.step] = reading

    def step(self, name: str) -> StepStatus:
        """A step's status."""
        found = self.status.step_status(name)
        assert found is not None
        return found

    def wait(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def alive(self) -> list[str]:
        return [child.name for child in self.children.values() if child.alive]

    def gpus(self) -> int:
        """GPUs that the living children ask for."""
        return sum(self.asked[name] for name in self.alive())

    def _act(self, action: Any) -> None:
        run = live(**self.spec).run
        assert run is not None
        match action:
            case Create(step, attempt):
                name, stage = child_name(run, step, attempt), run.stage_of(step)
                assert (
                    stage is None
                    or step == stage.name
                    or run.role(step) == "evaluate"
                    or self.step(stage.name).state != "Succeeded"
                ), name
                assert all(self.step(needed).state == "Succeeded" for needed in run.needs(step)), (
                    f"{name} is made too early"
                )
                if name not in self.children:
                    self.made.append(name)
                    self.asked[name] = gpus(
                        build_child(Attempt(run, step, attempt, Origin(SHA, "b" * 64, None), SETTINGS))
                    )
                    self.children[name] = Child(
                        child_kind(run, step).name, name, f"uid-{len(self.made)}", "Waiting"
                    )
                assert self.gpus() <= run.spec.teacher.gpus + run.spec.student.gpus, self.alive()
            case Delete(named):
                child = self.children.get(named.name)
                if child is not None and child.alive and named.uid in (None, child.uid):
                    self.children[named.name] = replace(child, state="Ending", deleting=True)
                elif child is not None:
                    del self.children[named.name]
            case Finalizer(present):
                self.finalizer = present
            case ClearBucket():
                assert not self.alive(), "the bucket is cleared under a living child"
                self.bucket_cleared = True
            case KeepBucket():
                pass
            case DeleteRun():
                self.run_deleted = True


def training(**spec: Any) -> World:
    """A world in which preprocessing is done and training runs, with its first checkpoint still to come."""
    world = World(spec)
    world.look()
    world.becomes("Succeeded")
    world.tells(progress("preprocess", state="Succeeded", done=4))
    world.look()
    for step in world.status.running:
        world.becomes("Running", step=step.name)
        world.tells(progress(step.name))
    world.look()
    return world


def beside(**spec: Any) -> World:
    """A world in which rescoring runs beside Vanilla; a Rescored and a TeacherForced stage are still to come."""
    return training(**{"stages": ALL_KINDS, **spec})


def together(**spec: Any) -> World:
    """A world in which the three of an OnPolicy stage are at work; where it is evaluated, that is still to come."""
    return training(**{"stages": [ONPOLICY], **spec})


def told(decided: Plan, kind: str) -> tuple[str, str]:
    """Status and reason of a condition."""
    condition = decided.status.condition(kind)
    assert condition is not None
    return condition.status, condition.reason
