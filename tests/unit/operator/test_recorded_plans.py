"""The operator continues runs of an older operator: plans and children recorded at commit 3fc3cc3.

recorded/moments.jsonl.gz has one reconcile per line: the DistillRun with the status that the older operator
wrote, the observed children and progress reports, and the plan. recorded/children.json.gz has every child of
the examples. Messages may be reworded, so only their presence is compared; everything else must be equal,
except what has been changed since: see `changed_since`.
"""

import copy
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
from distill_operator.pod_records import ProgressReading
from distill_operator.settings import Settings, load_settings

from tests.fakes.simulated_cluster import pod_templates
from vpmoe.api import DistillRun
from vpmoe.api.progress import Progress

RECORDED = Path(__file__).parent / "recorded"
CHANGED = (
    "retriable while the bucket is away",
    "succeeded and deleted: the bucket is cleared",
    "all has ended",
)
"""Moments of which other plans are made now: the job itself records that the store was away, which is an
interruption; a Job clears the bucket; and the last stage is exported when all others have ended."""
MOMENTS = [
    moment
    for line in gzip.decompress((RECORDED / "moments.jsonl.gz").read_bytes()).decode().splitlines()
    if (moment := json.loads(line))["what"] not in CHANGED
]
CHILDREN = json.loads(gzip.decompress((RECORDED / "children.json.gz").read_bytes()))
ACTIONS = {"Create": "CreateChild", "Delete": "DeleteChild", "Finalizer": "SetFinalizer"}
"""Present names of the recorded actions; the others are unchanged."""
QUEUED_TOO_EARLY = "new, the pool is taken"
"""A run that the older operator did not preprocess before its GPUs were free."""


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
    """The reading. Jobs of that version said in the message that they reused what was there."""
    report = recorded["progress"] and Progress.model_validate(
        {**recorded["progress"], "reused": recorded["progress"]["message"] == "Reused"}
    )
    return ProgressReading(report, recorded["asked"], recorded["problem"], recorded["reason"])


def present_conditions(moment: dict[str, Any]) -> list[dict[str, Any]]:
    """The conditions of the recorded plan, with what has changed since: the operator reads pods, and no
    bucket."""
    status, readings = moment["plan"]["status"], moment["readings"].values()
    found = [condition for condition in status["conditions"] if condition["type"] != "StorageReachable"]
    if status["phase"] in ("Suspended", "Succeeded", "Failed") or not any(one["asked"] for one in readings):
        return found
    problem = next((one for one in readings if one["problem"]), None)
    condition = {
        "type": "ProgressReadable",
        "status": "False" if problem else "True",
        "reason": problem["reason"] if problem else "Answered",
        "message": problem["problem"] if problem else "",
        "observedGeneration": status["observedGeneration"],
        "lastTransitionTime": moment["now"].replace("+00:00", "Z"),
    }
    return [*found[:6], condition, *found[6:]]


def action_document(action: Any) -> dict[str, Any]:
    fields = {name: value.dump() if hasattr(value, "dump") else value for name, value in vars(action).items()}
    return {"action": type(action).__name__, **fields}


def decision(moment: dict[str, Any]) -> Decision | None:
    """What the older operator decided about the run's GPUs.

    It decided before preprocessing. Since then, a run is admitted when preprocessing has ended.
    """
    if moment["what"] == "preprocess has ended":
        return Decision(True, "")
    verdict = moment["verdict"]
    return Decision(verdict["admitted"], verdict["arithmetic"], verdict["hopeless"]) if verdict else None


def children_of_today(recorded: dict[str, Any]) -> dict[str, Any]:
    """The recorded children, with what has changed since: pods with GPUs tolerate the taint of nodes with
    GPUs, a child with a queue is created suspended, no object has the commit, which pods report, and a
    TeacherForced stage runs the image with vLLM.
    """
    for step, child in recorded.items():
        templates = [] if step == "configMap" else [template for _, template in pod_templates(child)]
        for metadata in [child["metadata"], *(template["metadata"] for template in templates)]:
            del metadata["labels"]["vpmoe.dev/git-sha"], metadata["annotations"]["vpmoe.dev/git-sha"]
        if step == "configMap":
            continue
        spec = child["spec"]
        if "kueue.x-k8s.io/queue-name" in child["metadata"]["labels"]:
            spec.get("runPolicy", spec)["suspend"] = True
        for template in templates:
            if step == "forced":
                container = template["spec"]["containers"][0]
                trainer = container["image"]
                inference = container["image"] = trainer.replace("trainer", "inference")
                for entry in container["env"]:
                    if entry.get("value") == trainer:
                        entry["value"] = inference
            if "nvidia.com/gpu" in template["spec"]["containers"][0]["resources"].get("limits", {}):
                known = template["spec"].get("tolerations", [])
                template["spec"]["tolerations"] = [*known, {"key": "nvidia.com/gpu", "operator": "Exists"}]
    return recorded


def without_exports(status: dict[str, Any]) -> dict[str, Any]:
    """The status without what a run of an older operator gets now: the estimate of its end, and the export of
    its last stage, which waits for all others.
    """
    status.pop("eta", None)
    exports = [step for step in status["steps"] if step["name"].endswith("-export")]
    assert all(step["state"] == "Pending" and step["attempt"] == 0 for step in exports)
    return {**status, "steps": [step for step in status["steps"] if step not in exports]}


def without_messages(document: Any) -> Any:
    """The document with every message replaced by whether it is empty."""
    if isinstance(document, dict):
        return {
            name: bool(value) if name == "message" else without_messages(value)
            for name, value in document.items()
        }
    return [without_messages(value) for value in document] if isinstance(document, list) else document


def as_stored(recorded: dict[str, Any]) -> dict[str, Any]:
    """The recorded DistillRun with the reasoning effort that the API server of then added to it. Today's
    default may be another one; the other defaults are still the same. It has no reports, which a run of an
    older operator gets now beside its other steps."""
    stored = copy.deepcopy(recorded)
    stored["spec"]["dataset"].setdefault("conversation", {}).setdefault("effort", "high")
    stored["spec"].setdefault("runtime", {})["report"] = False
    return stored


STALLED = {
    "Stalled": {"status": "True", "reason": "PodPending", "message": "onpolicy has made no progress"},
    "Progressing": {"status": "False"},
}


def changed_since(moment: dict[str, Any]) -> dict[str, Any]:
    """The recorded status with what the operator has decided differently since then.

    A retry does not start runtime.stalledAfter again. A step that has reached it is Stalled also while its
    pods are removed. What ran is known from pods, and not when a run starts. A step that succeeds names the
    uid of its child, also if it was never seen running.
    """
    status: dict[str, Any] = json.loads(json.dumps(moment["plan"]["status"]))
    status["conditions"] = present_conditions(moment)
    if "started" not in moment["object"]["status"]:
        for name in ("gitSha", "image"):
            status.get("provenance", {}).pop(name, None)
    before = {step["name"]: step for step in moment["object"]["status"].get("steps", [])}
    for step in status["steps"]:
        earlier = before.get(step["name"], {}).get("state")
        if earlier == "Retrying" and step["state"] == "Running":
            step["progressed"] = before[step["name"]]["progressed"]
        observed = moment["seen"].get(step["name"], {}).get("child")
        if earlier == "Running" and step["state"] == "Succeeded" and observed:
            step["child"]["uid"] = observed["uid"]
    if moment["what"] == "a pod of the trainer was removed":
        for condition in status["conditions"]:
            condition |= STALLED.get(condition["type"], {})
    return status


@pytest.mark.parametrize(
    "moment",
    [pytest.param(moment, id=moment["what"]) for moment in MOMENTS if moment["what"] != QUEUED_TOO_EARLY],
)
def test_plans_equal_those_of_an_older_operator(moment: dict[str, Any], settings: Settings) -> None:
    decided = plan(
        parse_run(as_stored(moment["object"])),
        ObservedChildren(
            {step: observation(found) for step, found in moment["seen"].items()}, moment["backendMissing"]
        ),
        {step: reading(found) for step, found in moment["readings"].items()},
        decision(moment),
        settings,
        datetime.fromisoformat(moment["now"]),
    )
    expected = moment["plan"]
    assert [action_document(action) for action in decided.actions] == [
        {**action, "action": ACTIONS.get(action["action"], action["action"])}
        for action in expected["actions"]
    ]
    if expected["again"] is None:  # since then, also for the time at which a step would be stalled
        assert decided.requeue_at is None or decided.requeue_at.isoformat() > moment["now"]
    else:
        assert decided.requeue_at is not None
        assert decided.requeue_at.isoformat() <= expected["again"]
    status = changed_since(moment)
    if status.get("step") != moment["object"]["status"].get("step") and decided.status.loss is None:
        # Since then, a training step clears the loss of the previous stage when it starts.
        status.pop("loss", None)
    assert without_messages(without_exports(decided.status.dump())) == without_messages(status)


@pytest.mark.parametrize("example", CHILDREN)
def test_children_equal_those_of_an_older_operator(example: str, settings: Settings) -> None:
    recorded = CHILDREN[example]
    run = DistillRun.parse(yaml.safe_load(recorded["configMap"]["data"]["run.yaml"]))
    config_hash = recorded["configMap"]["metadata"]["annotations"]["vpmoe.dev/config"]
    origin = Origin(config_hash, "d" * 64)
    # Since then, the last stage is exported, and there are reports.
    steps = [step for step in run.steps() if run.role(step) not in ("export", "report")]
    built = {step: build_child(Attempt(run, step, 2, origin, settings)) for step in steps}
    for step, child in built.items():
        for (_, template), (_, before) in zip(
            pod_templates(child), pod_templates(recorded[step]), strict=True
        ):
            # Since spec.runtime is no part of it, pods get the recorded hash.
            env = template["spec"]["containers"][0]["env"]
            env.remove({"name": "VPMOE_CONFIG_HASH", "value": config_hash})
            # Since then, the Secret may have a token.
            env[:] = [variable for variable in env if variable["name"] != "AWS_SESSION_TOKEN"]
            # Since then, the pods of every role serve progress, not only training pods metrics.
            (container,) = before["spec"]["containers"]
            container["ports"] = [{"name": "metrics", "containerPort": 9090}]
            # Since then, trainers have time for two checkpoints of 72 GB at 0.25 GB/s.
            if run.role(step) == "train" and run.spec.student.shape == "vpmoe-6b":
                assert before["spec"]["terminationGracePeriodSeconds"] == 300
                before["spec"]["terminationGracePeriodSeconds"] = 60 + 2 * 290
            container["env"] = [
                entry
                for entry in container["env"]
                if entry["name"] not in ("VPMOE_METRICS_PORT", "VPMOE_GIT_SHA")
            ] + [{"name": "VPMOE_SERVE_PORT", "value": "9090"}]
    recorded = children_of_today(copy.deepcopy(recorded))
    config_map = build_config_map(run, origin)
    document = yaml.safe_load(config_map["data"]["run.yaml"])
    expected = yaml.safe_load(recorded["configMap"]["data"].pop("run.yaml"))
    assert expected["spec"].pop("runtime"), "pods had it in their file then"
    assert document == expected
    del config_map["data"]["run.yaml"]
    assert {"configMap": config_map, **built} == recorded
