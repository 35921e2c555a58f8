"""Events of a run's transitions, what a stray child is, the settings file, and what the operator's process never loads."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from distill_operator import watch
from distill_operator.events import event_name, events_between
from distill_operator.gpu_scheduler import Decision
from distill_operator.orphans import is_live, is_stray
from distill_operator.pod_diagnosis import Failure
from distill_operator.settings import load_settings

from tests.fakes.simulated_cluster import AWAY, PERMANENT, World, beside, manifest, progress, together
from vpmoe.api import labels


def reasons(world: World) -> list[str]:
    """What one look tells."""
    before = world.status
    return [happening.reason for happening in events_between(before, world.look().status)]


def test_every_transition_of_a_run_is_told_once() -> None:
    world = World()
    assert reasons(world) == ["StepStarted"]
    assert reasons(world) == []
    world.becomes("Succeeded")
    world.tells(progress("preprocess", state="Succeeded", done=4))
    assert reasons(world) == ["StepSucceeded", "StepStarted"]
    world.becomes("Running")
    world.tells(progress("vanilla", done=100))
    assert reasons(world) == []
    world.tells(AWAY)
    assert reasons(world) == ["StorageUnreachable"]
    world.tells(
        progress(
            "vanilla",
            done=200,
            conditions=[{"type": "RouterCollapse", "status": "True", "reason": "DeadExpert"}],
        )
    )
    assert reasons(world) == ["StorageReachable", "RouterCollapse"]
    world.becomes("Failed", Failure("Error", "exit 1"))
    assert reasons(world) == ["StepRetrying"]
    world.wait(60)
    assert reasons(world) == ["StepStarted"]
    world.spec = {"suspend": True}
    world.look()
    world.children.clear()
    assert reasons(world) == ["Suspended"]
    world.spec = {}
    assert reasons(world) == ["StepStarted", "Resumed"]
    world.becomes("Failed", Failure("Permanent", "exit 65"))
    assert reasons(world) == ["StepFailed", "RunFailed"]


def test_events_name_the_step_that_they_are_about() -> None:
    world = beside()
    world.becomes("Failed", PERMANENT, "vanilla")
    before = world.status
    assert [(h.reason, h.message.split()[1]) for h in events_between(before, world.look().status)] == [
        ("StepFailed", "vanilla")
    ]
    world.becomes("Failed", PERMANENT, "rescore")
    world.wait(1)
    before = world.status
    told = events_between(before, world.look().status)
    assert [happening.reason for happening in told] == ["StepFailed", "RunFailed"]
    assert told[1].message == "PermanentFailure: step vanilla", "the first cause"


def test_a_run_that_waits_or_cannot_start_is_told() -> None:
    assert reasons(World(verdict=Decision(False, "no", hopeless=True))) == ["Queued", "PoolTooSmall"]
    assert reasons(World({"nonsense": 1})) == ["RunFailed"]
    assert reasons(World(backend_missing=True)) == ["KubeflowMissing"]


def test_a_run_that_gets_on_again_is_told() -> None:
    world = World(backend_missing=True)
    world.look()
    world.backend_missing = False
    assert reasons(world) == ["StepStarted", "GetsOn"]


def test_each_turn_of_a_knob_is_told() -> None:
    world = together()

    def starved(reason: str, message: str, status: str = "True") -> list[str]:
        condition = {"type": "TrainerStarved", "status": status, "reason": reason, "message": message}
        world.tells(progress("onpolicy", done=100, conditions=[condition]))
        before = world.status
        return [
            f"{happening.kind}: {happening.message}"
            for happening in events_between(before, world.look().status)
        ]

    assert starved("MaxTokensLowered", "turn 1") == ["Warning: turn 1"]
    assert starved("MaxTokensLowered", "turn 1") == []
    assert starved("MaxTokensLowered", "turn 2") == ["Warning: turn 2"], "the same knob again"
    assert starved("HighEffortLowered", "turn 3") == ["Warning: turn 3"]
    assert starved("HighEffortLowered", "turn 3", "False") == []


def test_what_a_job_found_is_told_again_with_another_reason_but_not_with_other_figures() -> None:
    world = beside()

    def collapsed(reason: str, message: str) -> list[str]:
        condition = {"type": "RouterCollapse", "status": "True", "reason": reason, "message": message}
        world.tells(progress("vanilla", done=100, conditions=[condition]))
        return reasons(world)

    assert collapsed("DeadExpert", "for 100 steps") == ["RouterCollapse"]
    assert collapsed("DeadExpert", "for 101 steps") == []
    assert collapsed("Imbalance", "for 102 steps") == ["RouterCollapse"]


def test_equal_events_have_one_name() -> None:
    one, two = (
        events_between(World().status, World().look().status),
        events_between(World().status, World().look().status),
    )
    assert event_name(manifest(), one[0]) == event_name(manifest(), two[0])
    assert event_name(manifest(), one[0]).startswith("first.")


@pytest.mark.parametrize(
    "name, finished, stray",
    [
        pytest.param("first-preprocess-a1", False, False, id="the one that status names"),
        pytest.param("first-preprocess-a2", False, True, id="another that lives"),
        pytest.param("first-preprocess-a0", True, False, id="an earlier one that has ended"),
        pytest.param("first-rescore-a1", False, False, id="the first of two that status names"),
        pytest.param("first-vanilla-a1", False, False, id="the second of two"),
        pytest.param("first-rescored-a1", False, True, id="beside two"),
    ],
)
def test_a_living_child_that_no_status_names_is_a_stray(name: str, finished: bool, stray: bool) -> None:
    status = beside().status.dump() if "preprocess" not in name else World().look().status.dump()
    conditions = [{"type": "Failed", "status": "True"}] if finished else []
    child: dict[str, Any] = {
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {},
        "status": {"conditions": conditions},
    }
    assert is_stray({**manifest(), "status": status}, child) is stray


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
def test_finished_runs_are_left_alone_unless_they_expire(obj: dict[str, Any], expected: bool) -> None:
    assert is_live(obj) is expected


@pytest.mark.parametrize(
    "text, words",
    [
        pytest.param("gitSha: main", "gitSha: String should match pattern", id="no sha"),
        pytest.param("nonsense: 1", "nonsense: Extra inputs are not permitted", id="unknown field"),
        pytest.param("resyncSeconds: 0", "resyncSeconds: Input should be greater than 0", id="zero"),
        pytest.param("images: {trainer: a}", "images.inference: Field required", id="image missing"),
    ],
)
def test_settings_that_are_wrong_name_file_and_field(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "operator.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"operator\.yaml") as error:
        load_settings(file)
    assert words in str(error.value)


def test_kopf_only_watches() -> None:
    """It takes its own finalizer off wherever it finds it, so that one must not be ours."""
    chosen = watch.settings()
    assert chosen.persistence.finalizer != labels.FINALIZER
    assert (chosen.posting.enabled, chosen.scanning.disabled) == (False, True)
    assert chosen.watching.server_timeout and chosen.networking.request_timeout, (
        "nothing hangs without an end"
    )
    registry = watch.handlers(lambda key: None)
    for kind in (registry._changing, registry._spawning, registry._indexing):
        assert not kind.get_all_handlers(), "any of these would annotate objects or hold them by a finalizer"


def test_the_operator_loads_no_tensor_library() -> None:
    code = "import json, sys, distill_operator.__main__, distill_operator.crd; print(json.dumps(sorted(sys.modules)))"
    command, environment = [sys.executable, "-c", code], {"PYTHONPATH": ".:operator"}
    loaded = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    )
    assert not {"torch", "numpy", "pyarrow", "datasets", "tiktoken", "megatron"} & {
        name.split(".")[0] for name in loaded
    }
