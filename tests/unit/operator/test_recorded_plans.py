"""The operator continues runs of an older operator: plans and children recorded at commit 3fc3cc3.

recorded/moments.jsonl.gz has one reconcile per line: the DistillRun with the status that the older operator
wrote, the observed children and progress reports, and the plan. recorded/children.json.gz has every child of
the examples. Messages may be reworded, so only their presence is compared; everything else must be equal.
"""

import gzip
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from distill_operator.attempt import Attempt, Origin
from distill_operator.children import build_child, build_config_map
from distill_operator.gpu_scheduler import Decision
from distill_operator.observe import (
    ChildObservation,
    NameConflict,
    ObservedChild,
    ObservedChildren,
    parse_run,
)
from distill_operator.plan import plan
from distill_operator.pod_diagnosis import Failure
from distill_operator.settings import Settings, load_settings
from distill_operator.step_progress import ProgressReading

from vpmoe.api import DistillRun
from vpmoe.api.progress import Progress

RECORDED = Path(__file__).parent / "recorded"
MOMENTS = [
    json.loads(line)
    for line in gzip.decompress((RECORDED / "moments.jsonl.gz").read_bytes()).decode().splitlines()
]
CHILDREN = json.loads(gzip.decompress((RECORDED / "children.json.gz").read_bytes()))
ACTIONS = {"Create": "CreateChild", "Delete": "DeleteChild", "Finalizer": "SetFinalizer"}
"""Present names of the recorded actions; the others are unchanged."""


@pytest.fixture(scope="module")
def settings() -> Settings:
    return load_settings(RECORDED / "settings.json")


def observation(recorded: dict[str, Any]) -> ChildObservation:
    child, conflict = recorded["child"], recorded["stranger"]
    return ChildObservation(
        child=child
        and ObservedChild(
            kind=child["kind"],
            name=child["name"],
            uid=child["uid"],
            state=child["state"],
            deleting=child["deleting"],
            suspended=child["held"],
            missing_pod=child["lost"],
            message=child["why"],
            failure=child["failure"] and Failure(child["failure"]["kind"], child["failure"]["words"]),
        ),
        name_conflict=conflict and NameConflict(conflict["words"], conflict["ending"]),
        create_error=recorded["refused"],
    )


def reading(recorded: dict[str, Any]) -> ProgressReading:
    report = recorded["progress"] and Progress.model_validate(recorded["progress"])
    return ProgressReading(report, recorded["asked"], recorded["problem"], recorded["reason"])


def action_document(action: Any) -> dict[str, Any]:
    fields = {name: value.dump() if hasattr(value, "dump") else value for name, value in vars(action).items()}
    return {"action": type(action).__name__, **fields}


def without_messages(document: Any) -> Any:
    """The document with every message replaced by whether it is empty."""
    if isinstance(document, dict):
        return {
            name: bool(value) if name == "message" else without_messages(value)
            for name, value in document.items()
        }
    return [without_messages(value) for value in document] if isinstance(document, list) else document


@pytest.mark.parametrize("moment", [pytest.param(moment, id=moment["what"]) for moment in MOMENTS])
def test_plans_equal_those_of_an_older_operator(moment: dict[str, Any], settings: Settings) -> None:
    verdict = moment["verdict"]
    decided = plan(
        parse_run(moment["object"]),
        ObservedChildren(
            {step: observation(found) for step, found in moment["seen"].items()}, moment["backendMissing"]
        ),
        {step: reading(found) for step, found in moment["readings"].items()},
        Decision(verdict["admitted"], verdict["arithmetic"], verdict["hopeless"]) if verdict else None,
        settings,
        datetime.fromisoformat(moment["now"]),
    )
    expected = moment["plan"]
    assert [action_document(action) for action in decided.actions] == [
        {**action, "action": ACTIONS.get(action["action"], action["action"])}
        for action in expected["actions"]
    ]
    assert (decided.requeue_at and decided.requeue_at.isoformat()) == expected["again"]
    status = dict(expected["status"])
    if status.get("step") != moment["object"]["status"].get("step") and decided.status.loss is None:
        # Since then, a training step clears the loss of the previous stage when it starts.
        status.pop("loss", None)
    assert without_messages(decided.status.dump()) == without_messages(status)


@pytest.mark.parametrize("example", CHILDREN)
def test_children_equal_those_of_an_older_operator(example: str, settings: Settings) -> None:
    recorded = CHILDREN[example]
    run = DistillRun.parse(yaml.safe_load(recorded["configMap"]["data"]["run.yaml"]))
    origin = Origin("a" * 40, run.config_hash, "d" * 64)
    built = {step: build_child(Attempt(run, step, 2, origin, settings)) for step in run.steps()}
    assert {"configMap": build_config_map(run, origin), **built} == recorded
