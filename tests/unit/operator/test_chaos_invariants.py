"""The invariants of the chaos tests hold in a history that is right, and each catches what breaks it."""

import dataclasses
import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.fakes.chaos.history import Change
from tests.fakes.chaos.invariants import INVARIANTS, History, Write, violations
from tests.fakes.chaos.runs import scripts
from vpmoe.api import DistillRun, labels

RUN = "uid-run"
SPEC = {"teacher": {"gpus": 0}, "student": {"gpus": 2}, "runtime": {"attempts": 3}}


@dataclass
class Recorded:
    """A history, written down change by change."""

    changes: list[Change] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    by_hand: set[str] = field(default_factory=set)
    numbers: Any = field(default_factory=lambda: itertools.count(1))

    def add(self, kind: str, obj: dict[str, Any], type_: Any = "MODIFIED") -> int:
        version = next(self.numbers)
        self.changes.append(Change(version, type_, kind, obj))
        return version

    def run(self, phase: str, generation: int = 1, uid: str = RUN, gpus: int = 2, **steps: Any) -> None:
        """The run's status: of each step its state, attempt and further fields."""
        found = [
            {"name": name, "state": state, "attempt": attempt, **more}
            for name, (state, attempt, more) in steps.items()
        ]
        status = {"phase": phase, "observedGeneration": generation, "started": "now", "steps": found}
        spec = {**SPEC, "student": {"gpus": gpus}}
        meta = {"name": uid.removeprefix("uid-"), "uid": uid, "generation": generation}
        self.add("DistillRun", {"metadata": meta, "spec": spec, "status": status})

    def job(
        self, attempt: int = 1, ended: str = "", type_: Any = "MODIFIED", uid: str = "", gpus: int = 2
    ) -> None:
        name = f"run-train-a{attempt}"
        meta = {
            "name": name,
            "uid": uid or f"uid-{name}",
            "labels": {labels.STEP: "train", labels.ATTEMPT: str(attempt)},
            "ownerReferences": [{"uid": RUN, "controller": True}],
        }
        conditions = [{"type": ended, "status": "True"}] if ended else []
        template = {"spec": {"containers": [{"resources": {"limits": {"nvidia.com/gpu": gpus}}}]}}
        spec = {"parallelism": 1, "template": template}
        self.add("Job", {"metadata": meta, "spec": spec, "status": {"conditions": conditions}}, type_)

    def pod(self, attempt: int = 1, phase: str = "Running", code: int | None = None, gpus: int = 2) -> None:
        owner = f"run-train-a{attempt}"
        meta = {
            "name": f"{owner}-x",
            "uid": f"uid-{owner}-x",
            "ownerReferences": [{"uid": f"uid-{owner}", "name": owner, "controller": True}],
        }
        state = {} if code is None else {"terminated": {"exitCode": code}}
        status = {"phase": phase, "containerStatuses": [{"name": "main", "state": state}]}
        spec = {"containers": [{"resources": {"limits": {"nvidia.com/gpu": gpus}}}]}
        self.add("Pod", {"metadata": meta, "spec": spec, "status": status})

    def event(self, reason: str, count: int = 1, name: str = "") -> None:
        about = {"kind": "DistillRun", "uid": RUN}
        meta = {"name": name or f"event-{reason}", "uid": f"uid-{name or reason}"}
        self.add("Event", {"metadata": meta, "involvedObject": about, "reason": reason, "count": count})

    def lease(self, holder: str) -> None:
        self.add("Lease", {"metadata": {"name": "lease", "uid": "l"}, "spec": {"holderIdentity": holder}})

    def write(self, identity: str) -> None:
        """A write that is the next change."""
        self.writes.append(Write(identity, "PUT", "/runs/run/status", next(self.numbers)))

    def broken(self) -> set[str]:
        """Names of the invariants that do not hold."""
        found = violations(History(self.changes, 4, self.writes, self.by_hand))
        return {one.partition(":")[0] for one in found}


def running(attempt: int = 1, failures: int = 0, interruptions: int = 0, **more: Any) -> tuple[str, int, Any]:
    return "Running", attempt, {"failures": failures, "interruptions": interruptions, **more}


def retrying(
    attempt: int = 1, failures: int = 0, interruptions: int = 0, state: str = "Retrying", **more: Any
) -> tuple[str, int, Any]:
    return state, attempt, {"failures": failures, "interruptions": interruptions, **more}


def failed_once() -> Recorded:
    """A run whose first attempt has failed and whose second runs."""
    found = Recorded()
    found.lease("one")
    found.run("Pending", train=("Pending", 0, {}))
    found.run("Running", train=running())
    found.event("StepStarted", name="first")
    found.job(type_="ADDED")
    found.pod()
    found.pod(phase="Failed", code=1)
    found.job(ended="Failed")
    found.run("Running", train=retrying(failures=1))
    found.event("StepRetrying")
    found.run("Running", train=running(2, failures=1))
    found.event("StepStarted", name="second")
    found.job(2, type_="ADDED")
    found.pod(2)
    found.write("one")
    return found


def succeeded() -> Recorded:
    found = failed_once()
    found.pod(2, phase="Succeeded", code=0)
    found.job(2, ended="Complete")
    found.run("Succeeded", train=retrying(2, state="Succeeded"))
    return found


def test_a_right_history_breaks_nothing() -> None:
    assert succeeded().broken() == set()
    deleted = failed_once()
    deleted.job(2, type_="DELETED")
    deleted.pod(2, phase="Failed", code=143)
    deleted.run("Running", train=retrying(2, failures=1, interruptions=1))
    deleted.run("Suspended", train=retrying(2, failures=1, interruptions=1, state="Suspended"))
    deleted.run("Queued", train=retrying(2, failures=1, interruptions=1, state="Queued"))
    assert deleted.broken() == set()


def test_two_live_children_of_a_step_are_found() -> None:
    found = failed_once()
    found.run("Running", train=retrying(2, failures=2))
    found.run("Running", train=running(3, failures=2))
    found.job(3, type_="ADDED", gpus=0)
    assert "one_live_child_of_a_step" in found.broken()


def test_pods_of_two_children_of_a_step_are_found_although_one_child_is_gone() -> None:
    found = failed_once()
    found.job(2, type_="DELETED")
    found.run("Running", train=retrying(2, failures=1, interruptions=1))
    found.run("Running", train=running(3, failures=1, interruptions=1))
    found.job(3, type_="ADDED")
    assert found.broken() == set()
    found.pod(3)
    assert found.broken() == {"one_live_child_of_a_step"}


@pytest.mark.parametrize(
    ("by_hand", "named", "broken"), [(False, False, True), (True, False, False), (True, True, True)]
)
def test_a_second_child_of_an_attempt_is_found(by_hand: bool, named: bool, broken: bool) -> None:
    """Unless a user deleted the first one before the operator had seen it."""
    found = Recorded()
    found.run("Running", train=running())
    found.job(type_="ADDED", uid="first")
    if named:
        found.run("Running", train=running(child={"uid": "first"}))
    if by_hand:
        found.by_hand.add("first")
    found.job(type_="DELETED", uid="first")
    found.job(type_="ADDED", uid="second")
    assert found.broken() == ({"one_child_of_an_attempt"} if broken else set())


@pytest.mark.parametrize(
    ("phase", "state"),
    [("Running", ("Running", 1, {})), ("Suspended", ("Suspended", 2, {})), ("Failed", ("Failed", 2, {}))],
)
def test_a_child_that_no_status_intends_is_found(phase: str, state: Any) -> None:
    found = Recorded()
    found.run(phase, train=state)
    found.job(2, type_="ADDED")
    assert found.broken() == {"children_are_intended"}


@pytest.mark.parametrize("end", ["Succeeded", "Failed"])
def test_an_end_that_is_lost_is_found(end: str) -> None:
    found = Recorded()
    found.run(end)
    found.run("Running")
    assert {"ends_are_final", "nothing_goes_back"} <= found.broken()
    edited = Recorded()
    edited.run("Failed", train=retrying(3, state="Failed"))
    edited.run("Running", generation=2, train=running(4))
    assert edited.broken() == set()


def test_a_step_that_has_succeeded_and_is_run_again_is_found() -> None:
    found = Recorded()
    found.run("Running", train=("Succeeded", 1, {}))
    found.run("Running", train=running(2))
    assert {"ends_are_final", "nothing_goes_back"} <= found.broken()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("Running", {}), ("Pending", {})),
        (("Queued", {}), ("Pending", {})),
        (("Suspended", {}), ("Pending", {})),
        (("Pending", {}), ("Succeeded", {})),
        (("Running", {"train": running()}), ("Queued", {"train": running()})),
        (("Running", {"train": running()}), ("Running", {})),
        (("Running", {"train": running()}), ("Running", {"train": ("Pending", 1, {})})),
        (("Running", {"train": running(2)}), ("Running", {"train": running(1)})),
        (("Running", {"train": running(1)}), ("Running", {"train": running(2)})),
        (("Running", {"train": retrying(1)}), ("Running", {"train": running(3)})),
        (("Running", {"train": retrying(1)}), ("Running", {"train": retrying(2)})),
        (("Running", {"train": running(partsDone=3)}), ("Running", {"train": running(partsDone=2)})),
    ],
)
def test_what_goes_back_is_found(before: tuple[str, Any], after: tuple[str, Any]) -> None:
    found = Recorded()
    found.run(before[0], **before[1])
    found.run(after[0], **after[1])
    assert "nothing_goes_back" in found.broken()


def test_a_run_that_waits_for_gpus_after_preprocessing_is_right() -> None:
    found = Recorded()
    found.run("Running", preprocess=running())
    found.run("Queued", preprocess=("Succeeded", 1, {}), train=("Queued", 0, {}))
    assert found.broken() == set()


def test_gpus_that_are_given_twice_are_found() -> None:
    found = Recorded()  # the nodes have 4
    found.run("Running", train=running())
    found.run("Running", uid="uid-other", train=running())
    assert found.broken() == set()
    found.run("Running", uid="uid-third", gpus=1, train=running())
    assert found.broken() == {"gpus_fit"}

    of_pods = Recorded()
    of_pods.pod(1)
    of_pods.pod(2, gpus=3)
    assert of_pods.broken() == {"gpus_fit"}
    of_pods.changes.pop()
    of_pods.pod(1, phase="Failed")
    of_pods.pod(2, gpus=3)
    assert of_pods.broken() == set()

    of_children = Recorded()
    of_children.run("Running", train=running())
    of_children.job(type_="ADDED", gpus=5)
    assert of_children.broken() == {"gpus_fit"}


@pytest.mark.parametrize(
    ("code", "deleted", "after", "right"),
    [
        (1, False, retrying(failures=1), True),
        (1, False, retrying(failures=2), False),
        (1, False, retrying(failures=0), False),
        (1, False, retrying(interruptions=1), False),
        (1, False, retrying(failures=1, interruptions=1), False),
        (1, False, running(failures=1), False),
        (65, False, retrying(failures=3, state="Failed"), True),
        (65, False, retrying(failures=1), False),
        (143, False, retrying(interruptions=1), True),
        (143, False, retrying(failures=1), False),
        (1, True, retrying(interruptions=1), True),
        (0, True, retrying(interruptions=1), True),
    ],
)
def test_attempts_that_are_not_counted_once_are_found(
    code: int, deleted: bool, after: Any, right: bool
) -> None:
    found = Recorded()
    found.run("Running", train=running())
    found.job(type_="ADDED")
    found.pod(phase="Failed", code=code)
    if deleted:
        found.job(type_="DELETED")
    found.run("Running", train=after)
    assert ("attempts_are_counted_once" not in found.broken()) == right


def test_a_new_checkpoint_resets_the_counts_and_nothing_else_does() -> None:
    found = failed_once()
    found.run("Running", train=running(2, checkpoint={"iteration": 5}))
    assert found.broken() == set()
    found.run("Running", train=running(2, failures=1, checkpoint={"iteration": 5}))
    assert found.broken() == {"attempts_are_counted_once"}
    lost = failed_once()
    lost.run("Running", train=running(2))
    assert lost.broken() == {"attempts_are_counted_once"}


def test_events_of_what_has_not_happened_are_found() -> None:
    found = succeeded()
    found.event("RunSucceeded")
    assert found.broken() == set()
    found.event("RunSucceeded", count=2)
    assert found.broken() == {"events_are_posted_once"}
    another = failed_once()
    another.event("StepStarted", name="third")
    assert another.broken() == {"events_are_posted_once"}


def test_a_write_of_a_replica_that_does_not_lead_is_found() -> None:
    found = failed_once()
    found.lease("two")
    found.write("two")
    assert found.broken() == set()
    found.writes.append(dataclasses.replace(found.writes[-1], identity="one"))
    assert found.broken() == set(), "the second write of a version changed nothing"
    found.write("one")
    assert found.broken() == {"only_the_holder_writes"}


@pytest.mark.parametrize(
    ("phase", "by_hand", "right"),
    [("Running", False, False), ("Running", True, True), ("Succeeded", False, True), ("Failed", False, True)],
)
@pytest.mark.parametrize("has_finalizers", [True, False])
def test_a_run_that_is_lost_is_found(phase: str, by_hand: bool, right: bool, has_finalizers: bool) -> None:
    found = Recorded()
    found.run("Running")
    found.run(phase)
    last = found.changes[-1].obj
    if has_finalizers:
        deleting = {**last, "metadata": {**last["metadata"], "deletionTimestamp": "now"}}
        found.add("DistillRun", deleting)
    found.add("DistillRun", last, "DELETED")
    if by_hand:
        found.by_hand.add(RUN)
    assert found.broken() == (set() if right else {"runs_are_not_lost"})


@pytest.mark.parametrize("seed", range(5))
def test_the_runs_of_the_scripts_are_valid(seed: int) -> None:
    for script in scripts(seed, 60):
        run = script.manifest("chaos")
        assert DistillRun.parse(run).steps(), script.name


def test_each_invariant_has_a_test_that_breaks_it() -> None:
    source = open(__file__).read()  # noqa: PTH123, SIM115
    assert all(f'"{check.__name__}"' in source for check in INVARIANTS)
