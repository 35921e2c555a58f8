"""Events of a run's transitions, orphans, the settings file, kopf's settings, and modules that the operator
must not load."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from distill_operator import orphans, watch
from distill_operator.events import event_name, events_between
from distill_operator.gpu_scheduler import Decision
from distill_operator.orphans import is_active, is_orphan
from distill_operator.pod_diagnosis import Failure
from distill_operator.settings import load_settings

from tests.fakes.simulated_cluster import (
    PERMANENT,
    UNREADABLE,
    SimulatedCluster,
    manifest,
    onpolicy_run,
    progress,
    rescoring_run,
    training_run,
    waiting_run,
)
from vpmoe.api import labels
from vpmoe.api.status import Status


def reasons(cluster: SimulatedCluster) -> list[str]:
    """Reasons of the Events of one reconcile."""
    before = cluster.status
    return [event.reason for event in events_between(before, cluster.reconcile().status)]


def test_each_transition_of_a_run_is_one_event() -> None:
    cluster = SimulatedCluster()
    assert reasons(cluster) == ["StepStarted"]
    assert reasons(cluster) == []
    cluster.set_child_state("Succeeded")
    cluster.set_progress(progress("preprocess", state="Succeeded", done=4))
    assert reasons(cluster) == ["StepSucceeded"]
    assert reasons(cluster) == ["StepStarted"]
    cluster.set_child_state("Running")
    cluster.set_progress(progress("vanilla", done=100))
    assert reasons(cluster) == []
    cluster.set_progress(UNREADABLE)
    assert reasons(cluster) == ["ProgressUnreadable"]
    cluster.set_progress(
        progress(
            "vanilla",
            done=200,
            conditions=[{"type": "RouterCollapse", "status": "True", "reason": "DeadExpert"}],
        )
    )
    assert reasons(cluster) == ["ProgressReadable", "RouterCollapse"]
    cluster.set_child_state("Failed", Failure("Error", "exit 1"))
    assert reasons(cluster) == ["StepRetrying"]
    cluster.advance(60)
    assert reasons(cluster) == ["StepStarted"]
    cluster.spec = {"suspend": True}
    cluster.reconcile()
    cluster.children.clear()
    assert reasons(cluster) == ["Suspended"]
    cluster.spec = {}
    assert reasons(cluster) == ["StepStarted", "Resumed"]
    cluster.set_child_state("Failed", Failure("Permanent", "exit 65"))
    assert reasons(cluster) == ["StepFailed", "RunFailed"]


def test_events_name_their_step() -> None:
    cluster = rescoring_run()
    cluster.set_child_state("Failed", PERMANENT, "vanilla")
    before = cluster.status
    assert [
        (event.reason, event.message.split()[1])
        for event in events_between(before, cluster.reconcile().status)
    ] == [("StepFailed", "vanilla")]
    cluster.set_child_state("Failed", PERMANENT, "rescore")
    cluster.advance(1)
    before = cluster.status
    events = events_between(before, cluster.reconcile().status)
    assert [event.reason for event in events] == ["StepFailed", "RunFailed"]
    assert events[1].message == "PermanentFailure: step vanilla", "the first cause"


def test_a_run_that_is_queued_or_cannot_start_has_an_event() -> None:
    assert reasons(waiting_run(Decision(False, "no"))) == ["Queued"]
    too_large = SimulatedCluster(decision=Decision(False, "no", unschedulable=True))
    assert reasons(too_large) == ["StepStarted", "PoolTooSmall"]
    too_large.set_child_state("Succeeded")
    assert reasons(too_large) == ["StepSucceeded", "Queued"]
    assert reasons(SimulatedCluster({"nonsense": 1})) == ["RunFailed"]
    assert reasons(SimulatedCluster(backend_missing=True)) == ["KubeflowMissing"]


def test_a_run_that_is_no_longer_stalled_has_an_event() -> None:
    cluster = SimulatedCluster(backend_missing=True)
    cluster.reconcile()
    cluster.backend_missing = False
    assert reasons(cluster) == ["StepStarted", "StallCleared"]


def test_a_stalled_run_that_fails_is_not_said_to_be_no_longer_stalled() -> None:
    cluster = training_run(runtime={"stalledAfter": "10m", "attempts": 1})
    cluster.advance(600)
    assert reasons(cluster) == ["NoProgress"]
    cluster.set_child_state("Failed", Failure("Error", "exit 1"))
    assert reasons(cluster) == ["StepFailed", "RunFailed"]
    stalled = cluster.status.condition("Stalled")
    assert stalled is not None and stalled.status == "False"


def test_each_step_that_stalls_a_run_is_an_event_and_further_attempts_of_it_are_none() -> None:
    cluster = rescoring_run(runtime={"stalledAfter": "10m", "attempts": 9})
    cluster.set_child_state("Waiting", step="rescore", message="pod x cannot be scheduled: 0/1 nodes")
    cluster.reconcile()
    cluster.advance(300)
    cluster.set_progress(progress("vanilla", done=100))
    cluster.reconcile()
    cluster.advance(300)
    assert reasons(cluster) == ["PodPending"], "rescore"
    cluster.set_child_state("Failed", Failure("Error", "exit 1"), step="rescore")
    assert reasons(cluster) == ["StepRetrying"], "it is Stalled for another reason, but not anew"
    cluster.advance(300)
    before = cluster.status
    events = events_between(before, cluster.reconcile().status)
    stalled = cluster.status.condition("Stalled")
    assert stalled is not None and stalled.message.startswith("vanilla has made no progress")
    assert ("Warning", "NoProgress", stalled.message) in [(e.type, e.reason, e.message) for e in events]
    assert "NoProgress" not in reasons(cluster)
    cluster.backend_missing = True
    assert "KubeflowMissing" in reasons(cluster)


def test_each_adjustment_of_a_setting_is_an_event() -> None:
    cluster = onpolicy_run()

    def set_starved(reason: str, message: str, status: str = "True") -> list[str]:
        condition = {"type": "TrainerStarved", "status": status, "reason": reason, "message": message}
        cluster.set_progress(progress("onpolicy", done=100, conditions=[condition]))
        before = cluster.status
        return [
            f"{event.type}: {event.message}" for event in events_between(before, cluster.reconcile().status)
        ]

    assert set_starved("MaxTokensLowered", "adjustment 1") == ["Warning: adjustment 1"]
    assert set_starved("MaxTokensLowered", "adjustment 1") == []
    assert set_starved("MaxTokensLowered", "adjustment 2") == ["Warning: adjustment 2"], (
        "another adjustment of the same setting"
    )
    assert set_starved("HighEffortLowered", "adjustment 3") == ["Warning: adjustment 3"]
    assert set_starved("HighEffortLowered", "adjustment 3", "False") == []


def test_each_skipped_step_is_an_event() -> None:
    cluster = rescoring_run()
    found = []
    for message in ("step 3 was skipped", "step 3 was skipped", "step 9 was skipped"):
        condition = {"type": "StepSkipped", "status": "True", "reason": "NonFinite", "message": message}
        cluster.set_progress(progress("vanilla", done=100, conditions=[condition]))
        found.append(reasons(cluster))
    assert found == [["StepSkipped"], [], ["StepSkipped"]]


def test_a_condition_of_a_job_is_a_new_event_only_if_its_reason_changes() -> None:
    cluster = rescoring_run()

    def set_collapsed(reason: str, message: str) -> list[str]:
        condition = {"type": "RouterCollapse", "status": "True", "reason": reason, "message": message}
        cluster.set_progress(progress("vanilla", done=100, conditions=[condition]))
        return reasons(cluster)

    assert set_collapsed("DeadExpert", "for 100 steps") == ["RouterCollapse"]
    assert set_collapsed("DeadExpert", "for 101 steps") == []
    assert set_collapsed("Imbalance", "for 102 steps") == ["RouterCollapse"]


def test_equal_events_have_the_same_name() -> None:
    first, second = (
        events_between(SimulatedCluster().status, SimulatedCluster().reconcile().status),
        events_between(SimulatedCluster().status, SimulatedCluster().reconcile().status),
    )
    assert event_name(manifest(), first[0]) == event_name(manifest(), second[0])
    assert event_name(manifest(), first[0]).startswith("first.")


@pytest.mark.parametrize(
    "name, finished, orphan",
    [
        pytest.param("first-preprocess-a1", False, False, id="named by status"),
        pytest.param("first-preprocess-a2", False, True, id="another one alive"),
        pytest.param("first-preprocess-a0", True, False, id="an earlier one, finished"),
        pytest.param("first-rescore-a1", False, False, id="first of two named by status"),
        pytest.param("first-vanilla-a1", False, False, id="second of two named by status"),
        pytest.param("first-rescored-a1", False, True, id="another one beside two"),
    ],
)
def test_a_child_alive_that_is_not_named_by_status_is_an_orphan(
    name: str, finished: bool, orphan: bool
) -> None:
    status = (
        rescoring_run().status.dump()
        if "preprocess" not in name
        else SimulatedCluster().reconcile().status.dump()
    )
    conditions = [{"type": "Failed", "status": "True"}] if finished else []
    child: dict[str, Any] = {
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {},
        "status": {"conditions": conditions},
    }
    assert is_orphan({**manifest(), "status": status}, child) is orphan


def test_children_that_statuses_name_cost_no_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep looks at every child of every run in each resync."""
    cluster = rescoring_run()
    parsed = list[Any]()
    monkeypatch.setattr(Status, "model_validate", lambda found: (parsed.append(found), cluster.status)[1])
    runs = [
        {
            **manifest(),
            "metadata": {**manifest()["metadata"], "uid": f"u{i}"},
            "status": cluster.status.dump(),
        }
        for i in range(3)
    ]
    owners = [[{"uid": f"u{i}", "controller": True}] for i in (0, 1, 2, 3)]
    children = [
        {"kind": "Job", "metadata": {"name": name, "ownerReferences": owner}, "spec": {}}
        for owner in owners
        for name in ("first-rescore-a1", "first-vanilla-a1")
    ]
    asyncio.run(orphans.delete_orphans(cast(Any, None), runs, children))
    assert parsed == []


@pytest.mark.parametrize(
    "obj, expected",
    [
        pytest.param({**manifest(), "status": {"phase": "Running"}}, True, id="running"),
        pytest.param(manifest(), True, id="new"),
        pytest.param(
            {**manifest(), "status": {"phase": "Succeeded", "observedGeneration": 1}}, False, id="finished"
        ),
        pytest.param(
            {**manifest(), "status": {"phase": "Failed", "observedGeneration": 0}},
            True,
            id="finished, and edited since",
        ),
        pytest.param(
            {**manifest(ttlAfterFinished="1h"), "status": {"phase": "Failed", "observedGeneration": 1}},
            True,
            id="finished, and expires",
        ),
    ],
)
def test_a_finished_run_is_active_only_if_it_expires_or_was_edited(
    obj: dict[str, Any], expected: bool
) -> None:
    assert is_active(obj) is expected


@pytest.mark.parametrize(
    "text, message",
    [
        pytest.param("nonsense: 1", "nonsense: Extra inputs are not permitted", id="unknown field"),
        pytest.param("resyncSeconds: 0", "resyncSeconds: Input should be greater than 0", id="zero"),
        pytest.param("images: {trainer: a}", "images.inference: Field required", id="image missing"),
    ],
)
def test_invalid_settings_name_file_and_field(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "operator.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"operator\.yaml") as error:
        load_settings(file)
    assert message in str(error.value)


def test_kopf_only_watches_objects() -> None:
    """kopf removes its own finalizer from every object, so it must not have the operator's name."""
    settings = watch.kopf_settings()
    assert settings.persistence.finalizer != labels.FINALIZER
    assert (settings.posting.enabled, settings.scanning.disabled) == (False, True)
    assert settings.watching.server_timeout and settings.networking.request_timeout, (
        "every request has a timeout"
    )
    registry = watch.handlers(lambda key: None, [watch.Watch(kind, None) for kind in watch.KINDS], [])
    for kind in (registry._changing, registry._spawning, registry._indexing):
        assert not kind.get_all_handlers(), "these handlers would annotate objects or add a finalizer"


def test_the_operator_loads_neither_a_tensor_library_nor_a_storage_client() -> None:
    code = (
        "import json, sys, distill_operator.__main__, distill_operator.crd\nprint(json.dumps([*sys.modules]))"
    )
    command, environment = [sys.executable, "-c", code], {"PYTHONPATH": ".:operator"}
    loaded = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    )
    tensors = {"torch", "numpy", "pyarrow", "datasets", "tiktoken", "megatron"}
    storage = {"boto3", "botocore", "s3transfer"}
    assert not (tensors | storage) & {name.split(".")[0] for name in loaded}
    assert not {"vpmoe.storage", "vpmoe.failure", "vpmoe.process"} & {*loaded}
