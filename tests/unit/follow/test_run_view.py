"""What is shown of a run, from statuses of the operator's plan() and of an older operator."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.fakes.followed_run import CREATING, KILLED, pods, run_object, training
from tests.fakes.simulated_cluster import (
    ALL_KINDS,
    ERROR,
    EVALUATED,
    ONPOLICY,
    START,
    SimulatedCluster,
    manifest,
    progress,
)
from vpmoe.follow.drawing import draw
from vpmoe.follow.plain_text import changes, whole
from vpmoe.follow.remedies import REMEDIES
from vpmoe.follow.run_view import RunView, view_run

ROOT = Path(__file__).parents[3]
with gzip.open(ROOT / "tests/unit/operator/recorded/moments.jsonl.gz", "rt") as lines:
    MOMENTS = [json.loads(line) for line in lines]
"""Objects, and the statuses that an older operator decided for them."""
WIDTHS = (80, 40)


def text(view: RunView, width: int, now: Any = START, height: int | None = None) -> list[str]:
    """The lines of a drawing, without trailing spaces; with a height of one that has to fit."""
    console = Console(width=width, height=height or 100, force_terminal=True, color_system=None)
    with console.capture() as captured:
        console.print(draw(view, now, console, fit=height is not None))
    return [line.rstrip() for line in captured.get().splitlines()]


@pytest.mark.parametrize("moment", [pytest.param(moment, id=moment["what"]) for moment in MOMENTS])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_recorded_status_is_drawn_within_the_width(moment: dict[str, Any], width: int) -> None:
    status = moment["plan"]["status"]
    view = view_run({**moment["object"], "status": status}, [])
    drawn = text(view, width)
    assert max(map(len, drawn)) <= width
    assert drawn[0].startswith(f"team/first  {status['phase']}")
    shown = [
        line
        for line in drawn
        if any(f"{line[2:]} ".startswith(f"{step['name']} ") for step in status["steps"])
    ]
    assert len(shown) >= sum(step["state"] != "Pending" for step in status["steps"])
    for name in ("speed", "loss", "held-out", "validity"):
        assert not any(line.endswith(f" {name}") for line in drawn), "each figure is beside its name"
    joined = " ".join(" ".join(drawn).split())
    assert " ".join(status["message"].split()) in joined or width == 40  # a word longer than a line is broken


def test_a_stage_has_its_budget_its_speed_and_its_pods() -> None:
    cluster = training()
    view = view_run(run_object(cluster), pods(cluster, "vanilla"))
    preprocess, vanilla = view.steps
    assert (vanilla.unit, vanilla.done, vanilla.total, vanilla.share) == ("tokens", 400, 1000, 0.4)
    assert [(pod.state, pod.name, pod.node) for pod in vanilla.pods] == [
        ("Running", "first-vanilla-a1-master-0", "node-1")
    ]
    assert (preprocess.share, preprocess.pods) == (1.0, ())
    assert text(view, 80, cluster.now) == [
        "team/first  Running 43%",
        "vanilla: Step 2 of 5",
        "speed 10 tokens/s  loss 3.25  time 1m30s  ETA 2026-01-01 00:02 UTC, in 30s",
        "",
        "✓ preprocess ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━ 100%                         1m00s",
        "● vanilla    ━━━━━━━━━━━━╸                     40% 400 of 1k tokens          30s",
        "  Running  first-vanilla-a1-master-0 on node-1",
    ]
    assert text(view, 40, cluster.now)[-4:] == [
        "",
        "✓ preprocess ━━━━━━━━━━━━━━━━━━━━━━ 100%",
        "● vanilla    ━━━━━━━━╸               40%",
        "  Running  first-vanilla-a1-master-0 on…",
    ]


def test_a_stage_that_has_not_started_has_its_budget_of_the_spec() -> None:
    cluster = SimulatedCluster({"stages": [{"name": "vanilla", "kind": "Vanilla", "tokens": "1.5B"}]})
    cluster.reconcile()
    assert view_run(run_object(cluster), []).steps[-1].total == 1_500_000_000


def test_windows_have_no_bar_because_a_stage_ends_by_its_tokens() -> None:
    recorded = next(moment for moment in MOMENTS if moment["what"] == "onpolicy running, starved")
    view = view_run({**recorded["object"], "status": recorded["plan"]["status"]}, [])
    sampler = next(step for step in view.steps if step.name == "onpolicy-sampler")
    assert (sampler.unit, sampler.done, sampler.total, sampler.share) == ("windows", 6, None, 0.0)
    for width in WIDTHS:
        assert any(re.match("● onpolicy-sampler  +6 windows", line) for line in text(view, width))
    warning = view.warnings[0]
    assert (warning.reason, warning.message) == (
        "TrainerStarved: MaxTokensLowered",
        "The trainer waited 62% of its time",
    )
    assert warning.remedy == REMEDIES["TrainerStarved"]


@pytest.mark.parametrize(
    "state, shown",
    [
        pytest.param({}, "Unschedulable", id="unschedulable"),
        pytest.param(CREATING, "ContainerCreating", id="creating"),
        pytest.param({"waiting": {"reason": "ImagePullBackOff"}}, "ImagePullBackOff", id="image"),
        pytest.param(KILLED, "OOMKilled, exit 137", id="killed"),
    ],
)
def test_a_pod_shows_what_its_own_container_waits_for(state: dict[str, Any], shown: str) -> None:
    cluster = training()
    view = view_run(run_object(cluster), pods(cluster, "vanilla", state))
    assert [pod.state for pod in view.steps[-1].pods] == [shown]


def test_a_pod_that_starts_by_itself_needs_no_help() -> None:
    cluster = SimulatedCluster()
    cluster.reconcile_repeatedly()
    run = run_object(cluster)
    assert {each["reason"] for each in run["status"]["conditions"]} >= {"PodPending"}
    assert view_run(run, pods(cluster, "preprocess", CREATING)).remedy == ""
    stuck = view_run(run, pods(cluster, "preprocess", {}))
    assert (
        stuck.remedy == "`kubectl describe pods --selector=vpmoe.dev/run=first` says what its pods wait for"
    )


def test_commands_of_a_terminal_in_a_message_do_nothing() -> None:
    run = run_object(training())
    run["status"]["message"] = "Last line: \x1b[2Jgone\r\n[bold]kept[/bold]"
    view = view_run(run, [])
    assert view.message == "Last line:  [2Jgone  [bold]kept[/bold]"
    assert text(view, 80)[1] == view.message


def test_many_pods_are_counted_by_state() -> None:
    cluster = SimulatedCluster(
        {"dataset": {"source": "s3://corpora/*.parquet", "maxLength": 512, "workers": 20}}
    )
    cluster.reconcile()
    found = [*pods(cluster, "preprocess")[:15], *pods(cluster, "preprocess", CREATING)[15:]]
    drawn = text(view_run(run_object(cluster), found), 40)
    assert "  Running  15 of 20 pods" in drawn and "  ContainerCreating  5 of 20 pods" in drawn


def test_pods_of_other_attempts_and_steps_are_not_shown() -> None:
    cluster = training()
    others = [*pods(cluster, "vanilla", attempt=2), *pods(cluster, "preprocess")]
    assert view_run(run_object(cluster), others).steps[-1].pods == ()


def test_a_retry_says_what_failed_and_where_its_log_is() -> None:
    cluster = training()
    cluster.set_child_state("Failed", ERROR)
    cluster.reconcile()
    view = view_run(run_object(cluster), [])
    assert view.message.startswith("step vanilla failed (attempt 1 of 3): pod x, container pytorch, exit 137")
    assert view.remedy == "`vpmoe logs first vanilla` shows its log"


def test_a_failed_run_names_the_failed_step_and_the_remedy() -> None:
    cluster = training(runtime={"attempts": 1})
    cluster.set_child_state("Failed", ERROR)
    cluster.reconcile()
    view = view_run(run_object(cluster), [])
    assert (view.phase, view.ended) == ("Failed", True)
    assert view.remedy.startswith("`vpmoe logs first vanilla` shows its log. Correct the cause, then raise")
    assert text(view, 80)[-1].startswith("✗ vanilla")


def test_a_stalled_run_has_the_remedy_of_its_stall() -> None:
    cluster = training()
    cluster.advance(16 * 60)
    cluster.reconcile()
    view = view_run(run_object(cluster), [])
    assert [warning.reason for warning in view.warnings] == ["Stalled: NoProgress"]
    assert view.remedy == "`vpmoe logs first vanilla` shows its log"


def test_a_queued_and_a_suspended_run_say_what_makes_them_go_on() -> None:
    from distill_operator.gpu_scheduler import Decision

    cluster = SimulatedCluster(decision=Decision(False, "Needs 3 GPUs; the pool has 2"))
    cluster.reconcile()
    cluster.set_child_state("Running")
    cluster.set_child_state("Succeeded")
    cluster.reconcile_repeatedly()
    queued = view_run(run_object(cluster), [])
    assert queued.phase == "Queued" and "Needs 3 GPUs" in queued.message and "who holds GPUs" in queued.remedy
    cluster = training(suspend=False)
    cluster.spec["suspend"] = True
    cluster.reconcile()
    cluster.remove_children("vanilla")
    cluster.reconcile_repeatedly()
    suspended = view_run(run_object(cluster), [])
    assert suspended.phase == "Suspended"
    assert (
        """kubectl patch distillrun first --type=merge --patch='{"spec":{"suspend":false}}'"""
        in suspended.remedy
    )


def test_a_run_that_no_operator_has_seen_says_so() -> None:
    view = view_run(manifest(), [])
    assert (view.phase, view.message) == ("Pending", "The operator has not seen this run yet")
    assert "kubectl get deployments" in view.remedy and text(view, 80)[0] == "team/first  Pending"
    changed = run_object(training())
    changed["metadata"]["generation"] = 2
    assert view_run(changed, []).message.startswith(
        "The operator has not seen the last change of its spec yet."
    )
    changed["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert view_run(changed, []).message == "It is being deleted. vanilla: Step 2 of 5"


def test_a_run_of_a_newer_operator_is_shown() -> None:
    run = run_object(training())
    run["status"] |= {"phase": "Paused", "novelty": {"a": 1}}
    run["status"]["steps"][1] |= {"state": "Thawing", "unknown": 1}
    view = view_run(run, [])
    assert (view.phase, view.steps[1].state) == ("Paused", "Thawing")
    assert text(view, 80)[-1].startswith("· vanilla")


def test_a_low_terminal_shows_the_steps_at_work() -> None:
    cluster = SimulatedCluster(
        {"stages": [*ALL_KINDS, ONPOLICY], "evaluation": EVALUATED, "runtime": {"report": True}}
    )
    cluster.reconcile()
    run = run_object(cluster)
    recorded = next(moment for moment in MOMENTS if moment["what"] == "onpolicy running, starved")
    low = text(view_run({**run, "status": recorded["plan"]["status"]}, []), 80, height=17)
    assert len(low) < 17
    assert "✓ 8 steps have succeeded" in low and any(line.startswith("● onpolicy ") for line in low)
    assert any(line.startswith("· onpolicy-evaluate") for line in low), "there is room for it"
    lower = text(view_run({**run, "status": recorded["plan"]["status"]}, []), 80, height=13)
    assert "✓ 8 steps have succeeded, · 1 steps wait" in lower
    whole_view = text(view_run({**run, "status": recorded["plan"]["status"]}, []), 80)
    assert sum(line[:2] in ("✓ ", "● ", "· ") for line in whole_view) == 12


def test_plain_text_has_a_fact_a_line() -> None:
    cluster = training()
    lines = whole(view_run(run_object(cluster), pods(cluster, "vanilla")), cluster.now)
    assert lines[:4] == [
        "run: team/first",
        "phase: Running",
        "progress: 43%",
        "message: vanilla: Step 2 of 5",
    ]
    assert lines[-4:] == [
        "step preprocess: Succeeded, 100%, attempt 1, 1m00s",
        "step vanilla: Running, 40%, 400 of 1k tokens, attempt 1, 30s",
        "  Step 2 of 5",
        "  pod first-vanilla-a1-master-0: Running on node-1",
    ]


def test_changes_are_told_once() -> None:
    cluster = training()
    before = view_run(run_object(cluster), [])
    assert changes(before, before, cluster.now) == []
    assert changes(before, None, cluster.now) == [
        "00:01:30Z Running 43%: vanilla: Step 2 of 5",
        "00:01:30Z step preprocess: Succeeded, 100%, attempt 1, 1m00s",
        "00:01:30Z step vanilla: Running, 40%, 400 of 1k tokens, attempt 1, 30s",
    ]
    cluster.set_progress(progress("vanilla", iteration=2, done=410, message="Step 2 of 5"))
    cluster.reconcile()
    assert changes(view_run(run_object(cluster), []), before, cluster.now) == []
    cluster.set_progress(progress("vanilla", iteration=3, done=600, message="Step 3 of 5"))
    cluster.reconcile()
    assert changes(view_run(run_object(cluster), []), before, cluster.now) == [
        "00:01:30Z Running 62%: vanilla: Step 3 of 5",
        "00:01:30Z step vanilla: Running, 60%, 600 of 1k tokens, attempt 1, 30s",
    ]


def test_every_reason_that_asks_for_help_has_a_remedy() -> None:
    reference = (ROOT / "docs/reference/operator.md").read_text()
    stalled = re.findall(
        r"^\| (\w+) \|", reference.split("| Stalled reason |")[1].split("\n## ")[0], re.MULTILINE
    )
    failed = re.search(r"^\| Failed \|.*\| (.*) \|$", reference, re.MULTILINE)
    assert failed is not None
    reasons = {*stalled, *failed[1].split(", ")}
    assert len(reasons) > 10 and reasons <= REMEDIES.keys()
