"""A DistillRun and its cluster as plain values, for tests of plan().

Nothing here talks to a server.

SimulatedCluster applies a plan's actions to its children and lets time pass. tests/cluster tests against a
real API server.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

from distill_operator.actions import (
    ClearBucket,
    CreateChild,
    DeleteChild,
    DeleteRun,
    KeepBucket,
    ReportCleared,
    SetFinalizer,
)
from distill_operator.attempt import Attempt, Origin, child_kind, child_name
from distill_operator.children import build_child
from distill_operator.gpu_scheduler import Decision, waits_for_gpus, will_need_gpus
from distill_operator.observe import (
    ChildObservation,
    ObservedChild,
    ObservedChildren,
    ObservedRun,
    State,
    parse_run,
    read_status,
)
from distill_operator.plan import plan
from distill_operator.plan_builder import Plan
from distill_operator.pod_diagnosis import Failure
from distill_operator.pod_records import ProgressReading
from distill_operator.settings import Settings
from distill_operator.step_timers import StepTimers

from vpmoe.api.progress import Amount, CheckpointStatus, DatasetStatus, Progress
from vpmoe.api.status import Status, StepStatus

START = datetime(2026, 1, 1, tzinfo=UTC)
UID = "0a1b2c3d-0000-4000-8000-000000000001"
ADMITTED = Decision(True, "fits")

SETTINGS = Settings.model_validate(
    {
        "images": {"trainer": "vpmoe/trainer:1", "inference": "vpmoe/inference:1"},
        "lease": {"name": "distill-operator"},
        "resources": {"train": {"requests": {"cpu": "4"}}, "rescore": {"requests": {"memory": "2Gi"}}},
        "backoff": {"baseSeconds": 10, "limitSeconds": 60},
    }
)


def manifest(**spec: Any) -> dict[str, Any]:
    """A DistillRun as the API server returns it. Keywords replace fields of its spec. It has no reports
    unless spec.runtime.report says so."""
    runtime = {"report": False, **spec.pop("runtime", {})}
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
            "export": {"stages": []},
            "storage": {"endpoint": "http://s3:9000", "bucket": "vpmoe", "prefix": "here"},
            "runtime": copy.deepcopy(runtime),
            **copy.deepcopy(spec),
        },
    }


def observed_run(
    status: Status | None = None, deleting: bool = False, finalizers: tuple[str, ...] = (), **spec: Any
) -> ObservedRun:
    """That DistillRun as the operator observes it, with this status."""
    observed = _parsed_once(json.dumps(manifest(**spec)))
    if status is not None:
        observed = replace(observed, status=read_status({"status": status.dump()}, observed.run))
    return replace(observed, deleting=deleting, finalizers=finalizers)


@lru_cache(maxsize=256)
def _parsed_once(text: str) -> ObservedRun:
    """The run of a JSON manifest without a status. Tests observe one run hundreds of times, and to parse it
    takes longer than to plan."""
    return parse_run(json.loads(text))


def progress(
    step: str, attempt: int = 1, state: str = "Running", iteration: int = 0, done: int = 0, **more: Any
) -> ProgressReading:
    """A step's progress report. `iteration`: of its last checkpoint, 0 for none.

    `done`: tokens of a step that trains, parts or windows of any other.
    """
    address = "s3://vpmoe/somewhere/manifest.json"
    trains = step not in ("init", "preprocess", "rescore") and "-" not in step
    amount = {"tokens": Amount(done=done, total=1000)} if trains else {"parts": Amount(done=done, total=4)}
    checkpoint = (
        CheckpointStatus(iteration=iteration, tokens=done, manifest=address, sha256="c" * 64)
        if iteration
        else None
    )
    dataset = DatasetStatus(id="d" * 64, manifest=address, sha256="e" * 64)
    report = {
        "step": step,
        "attempt": attempt,
        "state": state,
        "updated": START,
        "checkpoint": checkpoint,
        "dataset": dataset,
    }
    return ProgressReading(Progress.model_validate({**report, **amount, **more}), attempted=True)


def pod_templates(child: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """Number of pods and template, for each pod template of a Job or PyTorchJob."""
    spec = child["spec"]
    if child["kind"] == "Job":
        return [(spec["parallelism"], spec["template"])]
    return [(replica["replicas"], replica["template"]) for replica in spec["pytorchReplicaSpecs"].values()]


def child_gpus(child: dict[str, Any]) -> int:
    """GPUs of all pods of a Job or PyTorchJob."""
    limits = [
        (count, template["spec"]["containers"][0]["resources"].get("limits", {}))
        for count, template in pod_templates(child)
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
EVICTED = Failure("Interrupted", "pod x was disrupted (EvictionByEvictionAPI: drained)")
PERMANENT = Failure("Permanent", "pod x, exit 65")
RETRIABLE = Failure("Retriable", "pod x, exit 75")
UNREADABLE = ProgressReading(attempted=True, problem="pod x did not answer", reason="Unreachable")


@dataclass
class SimulatedCluster:
    """One run, its children, its progress reports, and the time."""

    spec: dict[str, Any] = field(default_factory=dict)
    status: Status = field(default_factory=Status)
    children: dict[str, ObservedChild] = field(default_factory=dict)
    """By name."""
    readings: dict[str, ProgressReading] = field(default_factory=dict)
    """By step."""
    default_reading: ProgressReading = field(default_factory=ProgressReading)
    """Reading of a step that is not in `readings`."""
    decision: Decision = ADMITTED
    now: datetime = START
    deleting: bool = False
    has_finalizer: bool = False
    clear_job: ChildObservation = field(default_factory=ChildObservation)
    """The Job that deletes the run's folder."""
    reports: list[str | int | None] = field(default_factory=list)
    """What was reported of the run's folder: the number of objects deleted, or why it was kept."""
    run_deleted: bool = False
    backend_missing: bool = False
    unanswered: Callable[[], bool] = lambda: False
    """Asked for each request to create a child: whether it has no answer. `deliver` may carry it out."""
    late: list[tuple[str, CreateChild]] = field(default_factory=list)
    """Requests without an answer that may still be carried out, with the names of the children."""
    may_appear: set[str] = field(default_factory=set)
    """Names of other children that may appear."""
    created: list[str] = field(default_factory=list)
    """Names of all children that were ever created, in order."""
    requested_gpus: dict[str, int] = field(default_factory=dict)
    """By name of the child."""
    uptime: float = 0.0
    """The operator's monotonic clock, in seconds."""
    timers: StepTimers = field(init=False)

    def __post_init__(self) -> None:
        self.restart_operator()

    def restart_operator(self) -> None:
        """Forget what only the operator's process knows."""
        self.timers = StepTimers(lambda: self.uptime)

    def plan(self) -> Plan:
        """Plan from the present state. Changes nothing."""
        finalizers = ("vpmoe.dev/delete-from-bucket",) if self.has_finalizer else ()
        observed = observed_run(self.status, self.deleting, finalizers, **self.spec)
        named = {step.name: step.child.name for step in self.status.running if step.child is not None}
        children = ObservedChildren(
            {
                step: ChildObservation(
                    self.children.get(name), may_appear=name in self._may_appear() - self.children.keys()
                )
                for step, name in named.items()
            },
            self.backend_missing,
            self.clear_job,
        )
        readings = {step: self._reading(step, self.children.get(name)) for step, name in named.items()}
        timers = self.timers.observe(observed, children, readings, SETTINGS, self.now)
        decision = self._decision(observed)
        return plan(observed, children, readings, decision, SETTINGS, self.now, timers)

    def _may_appear(self) -> set[str]:
        return self.may_appear | {name for name, _ in self.late}

    def _decision(self, observed: ObservedRun) -> Decision | None:
        """What admission passes to plan(): a run that does not wait yet only hears that it never fits."""
        hears = waits_for_gpus(observed, SETTINGS) or (
            self.decision.unschedulable and will_need_gpus(observed, SETTINGS)
        )
        return self.decision if hears else None

    def _reading(self, step: str, child: ObservedChild | None) -> ProgressReading:
        """The step's reading. Of a child that has ended only the last progress is known."""
        reading = self.readings.get(step, self.default_reading)
        return reading if child is not None and child.alive else ProgressReading(reading.progress)

    def reconcile(self, crash_after: int | None = None) -> Plan:
        """Plan, write the status, execute the actions; with `crash_after`, only the first ones."""
        decided = self.plan()
        self.status = Status.model_validate(decided.status.dump())
        for action in decided.actions[:crash_after]:
            if isinstance(action, CreateChild) and self.unanswered():
                child = self.step(action.step).child
                assert child is not None
                self.late.append((child.name, action))
            else:
                self._execute(action)
        return decided

    def deliver(self, carried_out: bool) -> None:
        """Carry out the oldest request without an answer, or see that it cannot be carried out any more."""
        _, action = self.late.pop(0)
        if carried_out:
            self._execute(action)

    def reconcile_repeatedly(self, times: int = 5) -> Plan:
        """Reconcile several times, as watch events make the operator do. Returns the last plan."""
        for _ in range(times):
            decided = self.reconcile()
        return decided

    def set_child_state(
        self, state: State, failure: Failure | None = None, step: str = "", **more: Any
    ) -> None:
        """Change the child of the step; by default of the last Running step."""
        name = self.child(step).name
        self.children[name] = replace(self.children[name], state=state, failure=failure, **more)

    def set_clear_job(self, state: State, **more: Any) -> None:
        """Change the Job that deletes the run's folder."""
        assert self.clear_job.child is not None
        self.clear_job = ChildObservation(replace(self.clear_job.child, state=state, **more))

    def child(self, step: str = "") -> ObservedChild:
        """The child of the step; by default of the last Running step."""
        found = self.status.step_status(step) if step else self.status.running[-1]
        assert found is not None
        assert found.child is not None
        return self.children[found.child.name]

    def remove_children(self, *steps: str) -> None:
        """Remove the children of these steps with their pods; without arguments, all children."""
        for name in [self.child(step).name for step in steps] or list(self.children):
            del self.children[name]

    def set_progress(self, reading: ProgressReading) -> None:
        """Set the reading of the step that its report names; a reading without a report becomes that of all
        steps.
        """
        if reading.progress is None:
            self.readings, self.default_reading = {}, reading
        else:
            self.readings[reading.progress.step] = reading

    def step(self, name: str) -> StepStatus:
        """Status of a step."""
        found = self.status.step_status(name)
        assert found is not None
        return found

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += timedelta(seconds=seconds)
        self.uptime += seconds

    def step_clock(self, seconds: float) -> None:
        """Set the wall clock forward, or back, while no time passes."""
        self.now += timedelta(seconds=seconds)

    def alive_children(self) -> list[str]:
        return [child.name for child in self.children.values() if child.alive]

    def gpus_in_use(self) -> int:
        """GPUs that the children alive request."""
        return sum(self.requested_gpus[name] for name in self.alive_children())

    def _execute(self, action: Any) -> None:
        run = observed_run(**self.spec).run
        assert run is not None
        match action:
            case CreateChild(step, attempt):
                name, stage = child_name(run, step, attempt), run.stage_of(step)
                assert (
                    stage is None
                    or step == stage.name
                    or run.role(step) in ("evaluate", "export", "report")
                    or self.step(stage.name).state != "Succeeded"
                ), name
                assert all(self.step(needed).state == "Succeeded" for needed in run.needs(step)), (
                    f"{name} is created before the steps that it needs have succeeded"
                )
                if name not in self.children:
                    self.created.append(name)
                    self.requested_gpus[name] = child_gpus(
                        build_child(Attempt(run, step, attempt, Origin("b" * 64, None), SETTINGS))
                    )
                    self.children[name] = ObservedChild(
                        child_kind(run, step).name, name, f"uid-{len(self.created)}", "Waiting"
                    )
                assert self.gpus_in_use() <= run.spec.teacher.gpus + run.spec.student.gpus, (
                    self.alive_children()
                )
            case DeleteChild(ref):
                if self.clear_job.child is not None and ref.name == self.clear_job.child.name:
                    self.clear_job = ChildObservation()
                    return
                if ref.uid is None and ref.name in self._may_appear():
                    return
                child = self.children.get(ref.name)
                if child is not None and child.alive and ref.uid in (None, child.uid):
                    self.children[ref.name] = replace(child, state="Ending", deleting=True)
                elif child is not None:
                    del self.children[ref.name]
            case SetFinalizer(present):
                self.has_finalizer = present
            case ClearBucket():
                assert not self.alive_children(), "the bucket is cleared while a child is alive"
                job = ObservedChild("Job", "first-clear-0a1b2c3d", "uid-clear", "Waiting")
                self.clear_job = ChildObservation(job)
            case ReportCleared(objects):
                self.reports.append(objects)
            case KeepBucket(why):
                self.reports.append(why)
            case DeleteRun():
                self.run_deleted = True


def waiting_run(decision: Decision = ADMITTED, **spec: Any) -> SimulatedCluster:
    """A run that has preprocessed its dataset and needs GPUs next. The next reconcile has `decision`."""
    cluster = SimulatedCluster(spec, decision=decision)
    cluster.reconcile()
    cluster.set_child_state("Succeeded")
    cluster.set_progress(progress("preprocess", state="Succeeded", done=4))
    cluster.reconcile()
    return cluster


def training_run(**spec: Any) -> SimulatedCluster:
    """A run whose preprocessing is done and whose first stage trains, before its first checkpoint."""
    cluster = waiting_run(**spec)
    cluster.reconcile()
    for step in cluster.status.running:
        cluster.set_child_state("Running", step=step.name)
        cluster.set_progress(progress(step.name))
    cluster.reconcile()
    return cluster


def rescoring_run(**spec: Any) -> SimulatedCluster:
    """A run in which rescoring runs beside Vanilla, before a Rescored and a TeacherForced stage."""
    return training_run(**{"stages": ALL_KINDS, **spec})


def onpolicy_run(**spec: Any) -> SimulatedCluster:
    """A run in which sampler, teacher and trainer of an OnPolicy stage run, before any evaluation."""
    return training_run(**{"stages": [ONPOLICY], **spec})


def condition(decided: Plan, type_: str) -> tuple[str, str]:
    """Status and reason of a condition of the plan's status."""
    found = decided.status.condition(type_)
    assert found is not None
    return found.status, found.reason
