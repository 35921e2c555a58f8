"""The plots: their values, and that plotly accepts each of them."""

import dataclasses
import json
from statistics import fmean
from typing import Any

import plotly.graph_objects as graph
import pytest

from tests.fakes import recorded_run, task_records
from tests.fakes.recorded_run import keep_only, lines
from tests.fakes.store import S3
from vpmoe.process.run_folder import open_run
from vpmoe.report import plots
from vpmoe.report.plots import POINTS, Plot, all_plots, thin
from vpmoe.report.run_data import RunData, read_run_data

STAGES = ("vanilla", "rescored", "forced", "onpolicy")
CPU_ONLY = {"utilisation"}
"""Plots without data in a run on the CPU."""


def drawn(data: RunData) -> dict[str, Plot]:
    """The plots by name."""
    return {plot.name: plot for _, found in all_plots(data) for plot in found}


def points(plot: Plot, name: str) -> list[tuple[Any, Any]]:
    """The points of a trace."""
    (trace,) = [trace for trace in plot.traces if trace["name"] == name]
    return list(zip(trace["x"], trace["y"], strict=True))


def before(stage: str) -> int:
    """Tokens of the run before a stage."""
    return sum(max(line["tokens"] for line in lines(name)) for name in STAGES[: STAGES.index(stage)])


def test_plotly_accepts_every_figure_of_a_whole_run(recorded_data: RunData) -> None:
    found = drawn(recorded_data)
    assert {name for name, plot in found.items() if not plot.traces} == CPU_ONLY
    for plot in found.values():
        graph.Figure(
            {"data": plot.traces, "layout": plot.layout}
        )  # raises ValueError for what is no property
        json.dumps([plot.traces, plot.layout], allow_nan=False)
        assert plot.question.endswith("?") and plot.reading.endswith("."), plot.name


@pytest.mark.parametrize("span", ["reasoning", "final"])
def test_losses_are_those_of_the_metrics_over_the_tokens_of_the_run(
    recorded_data: RunData, span: str
) -> None:
    found = drawn(recorded_data)
    evaluated = [
        (before(stage) + line["tokens"], pytest.approx(line["heldOut"][span], rel=1e-5))
        for stage in STAGES
        for line in lines(stage, "evaluation")
    ]
    assert points(found["held-out"], span) == evaluated  # six significant digits: rel 1e-5
    trained = [
        (before(stage) + line["tokens"], pytest.approx(line["lossBySpan"][span], rel=1e-5))
        for stage in STAGES
        for line in lines(stage, "step")
        if line["kind"] != "OnPolicy"
    ]
    assert points(found["loss"], span) == trained
    divergence = [
        (before("onpolicy") + line["tokens"], pytest.approx(line["reverseKl"][span], rel=1e-5))
        for line in lines("onpolicy", "step")
        if line["kind"] == "OnPolicy" and line["reverseKl"][span] is not None
    ]
    assert points(found["reverse-kl"], span) == divergence


def test_stages_are_marked_where_they_begin(recorded_data: RunData) -> None:
    layout = drawn(recorded_data)["held-out"].layout
    assert {mark["text"]: mark["x"] for mark in layout["annotations"]} == {
        stage: before(stage) for stage in STAGES
    }
    of_one_kind = drawn(recorded_data)["teacher-kl"].layout
    assert [mark["text"] for mark in of_one_kind["annotations"]] == ["forced"]
    assert (
        of_one_kind["xaxis"]["range"][0]
        < before("forced")
        < before("onpolicy")
        < of_one_kind["xaxis"]["range"][1]
    )


def test_the_heat_map_has_the_load_of_every_layer(recorded_data: RunData) -> None:
    (trace,) = drawn(recorded_data)["router"].traces
    routed = [line["router"] for stage in STAGES for line in lines(stage, "step")]
    for row, layer in zip(trace["z"], trace["y"], strict=True):
        assert row == pytest.approx([one["maxOverMean"][f"layers.{layer}"] for one in routed])
    assert trace["y"] == ["1", "2"] and len(trace["x"]) == len(routed)


def test_waits_are_shares_of_each_roles_time(recorded_data: RunData) -> None:
    found = drawn(recorded_data)["waits"]
    shares = {
        (trace["name"], role): share
        for trace in found.traces
        for role, share in zip(trace["y"], trace["x"], strict=True)
    }
    steps = lines("onpolicy", "step")
    total = sum(line["seconds"] for line in steps)
    waited = sum(line.get("waitRollouts", 0) for line in steps)
    assert shares["waiting for rollouts", "onpolicy"] == pytest.approx(100 * waited / total, rel=1e-5)
    scored = lines("onpolicy-teacher")
    idle = sum(line["waitRollouts"] for line in scored)
    busy = sum(line["seconds"] for line in scored)
    assert shares["working", "onpolicy-teacher"] == pytest.approx(100 * busy / (busy + idle), rel=1e-5)
    # Window 1 was sampled together with window 0, in the same seconds.
    first = lines("onpolicy-sampler")[0]
    working = first["seconds"] + first["load"]["seconds"]
    assert shares["working", "onpolicy-sampler"] == pytest.approx(
        100 * working / (working + first["waitWeights"]), rel=1e-5
    )


def test_waits_for_uploads_have_a_share_of_their_own(recorded_data: RunData) -> None:
    """The trainer's are after its step, so not in the step's seconds; the recorded lines have none yet."""
    added: dict[str, float] = {"onpolicy": 2.0, "onpolicy-sampler": 3.0}
    steps = [
        dataclasses.replace(step, lines=tuple(line | {"waitUpload": added[step.name]} for line in step.lines))
        if step.name in added
        else step
        for step in recorded_data.steps
    ]
    later = dataclasses.replace(recorded_data, steps=steps)
    before, after = (
        {trace["name"]: dict(zip(trace["y"], trace["x"], strict=True)) for trace in plot.traces}
        for plot in (drawn(data)["waits"] for data in (recorded_data, later))
    )
    trained = lines("onpolicy", "step")
    seconds, waited = sum(line["seconds"] for line in trained), 2.0 * len(trained)
    share = waited / (seconds + waited)
    assert after["waiting for uploads"]["onpolicy"] == pytest.approx(100 * share, rel=1e-5)
    working = before["working"]["onpolicy"] * (1 - share)
    assert after["working"]["onpolicy"] == pytest.approx(working, rel=1e-5)
    loads = sum(line["load"] is not None for line in lines("onpolicy-sampler"))
    first = [line for line in lines("onpolicy-sampler") if line["load"]]
    taken = sum(line["seconds"] + line["load"]["seconds"] + line["waitWeights"] for line in first)
    expected = 100 * 3 * loads / (taken + 3 * loads)
    assert after["waiting for uploads"]["onpolicy-sampler"] == pytest.approx(expected, rel=1e-5)
    assert after["waiting for uploads"]["onpolicy-teacher"] == 0 and "waiting for uploads" not in before


def test_validity_and_lengths_are_by_effort(recorded_data: RunData) -> None:
    found = drawn(recorded_data)
    windows = [line for line in lines("onpolicy", "step") if line["kind"] == "OnPolicy"]
    for effort in ("low", "medium", "high"):
        valid = [
            100 * line["validity"][effort].get("valid", 0) for line in windows if effort in line["validity"]
        ]
        assert [share for _, share in points(found["validity"], effort)] == pytest.approx(valid, rel=1e-5)
        means = [line["lengths"][effort]["mean"] for line in windows if effort in line["lengths"]]
        assert [mean for _, mean in points(found["lengths"], effort)] == pytest.approx(means, rel=1e-5)
    assert points(found["validity-stages"], "medium")[0] == ("vanilla", 50)


def test_utilisation_is_shown_of_runs_with_gpus(recorded_data: RunData) -> None:
    with_gpus = [
        dataclasses.replace(step, lines=tuple({**line, "gpu": {"utilisation": 0.75}} for line in step.lines))
        for step in recorded_data.steps
    ]
    found = plots.utilisation(dataclasses.replace(recorded_data, steps=tuple(with_gpus)))
    assert {trace["name"] for trace in found.traces} == {"trainer", "sampler", "teacher", "evaluation"}
    assert {share for trace in found.traces for share in trace["y"]} == {75}
    assert plots.utilisation(recorded_data).missing == "No GPU was read: computed on the CPU."


def test_a_plot_without_data_says_what_it_waits_for(s3: S3) -> None:
    only_configured = read_run_data(*open_run(recorded_run.store(s3, keep_only("run.json"))))
    for plot in drawn(only_configured).values():
        assert not plot.traces and plot.missing.startswith("Waits for the ") and plot.missing.endswith("."), (
            plot.name
        )
    stages = tuple(stage for stage in only_configured.run.spec.stages if stage.name == "vanilla")
    spec = only_configured.run.spec.model_copy(update={"stages": stages})
    run = only_configured.run.model_copy(update={"spec": spec})
    alone = dataclasses.replace(
        only_configured,
        run=run,
        steps=tuple(step for step in only_configured.steps if step.name in run.steps()),
    )
    assert drawn(alone)["reverse-kl"].missing == "This run has no OnPolicy stage."
    assert drawn(alone)["teacher-logp"].missing == "No stage of this run asks the teacher."


def test_a_run_in_its_first_stage_has_plots_of_that_stage(s3: S3) -> None:
    kept = keep_only("run.json", "steps/preprocess", "steps/vanilla/metrics/000000-a1-0-2.jsonl")
    found = drawn(read_run_data(*open_run(recorded_run.store(s3, kept))))
    assert {name for name, plot in found.items() if plot.traces} == {
        "timeline",
        "held-out",
        "loss",
        "gradient",
        "speed",
        "router",
    }
    assert found["held-out"].traces[0]["mode"] == "markers"  # one point would be no line


@pytest.mark.parametrize("count", [0, 1, POINTS, POINTS + 1, 7 * POINTS + 3])
def test_long_lines_are_averaged_over_neighbours(count: int) -> None:
    found = thin([(float(x), float(x * x)) for x in range(count)])
    assert len(found) <= POINTS and len(found) == min(count, len(found))
    size = -(-count // POINTS) or 1
    assert found[:1] == [(fmean(range(size)), fmean(x * x for x in range(size)))][: len(found)]


def test_right_answers_are_those_of_the_latest_record_with_its_intervals(recorded_data: RunData) -> None:
    found = drawn(recorded_data)
    plot = found["right-answers"]
    for side in ("student", "teacher"):
        assert points(plot, side) == [
            (f"{task}<br>{effort}", 100 * right / task_records.QUESTIONS)
            for task in task_records.TASKS
            for effort, right in task_records.RIGHT[side].items()
        ]
    assert "after stage onpolicy, with 95% confidence intervals" in plot.reading
    # Wilson's interval of 4 right of 20: 8.07 % to 41.60 % (R: prop.test(4, 20, correct = FALSE)).
    (bars,) = [trace["error_y"] for trace in plot.traces if trace["name"] == "student"]
    assert (20 - bars["arrayminus"][0], 20 + bars["array"][0]) == pytest.approx((8.066, 41.602), abs=1e-3)


def test_lengths_and_form_of_answers_are_means_over_the_tasks(recorded_data: RunData) -> None:
    found = drawn(recorded_data)
    assert points(found["task-tokens"], "reasoning") == [
        (f"{effort}<br>{side}", tokens * (2 if side == "teacher" else 1))
        for effort, tokens in task_records.TOKENS.items()
        for side in ("student", "teacher")
    ]
    assert {y for _, y in points(found["task-tokens"], "final")} == {10}
    assert points(found["task-form"], "cut off")[:2] == [("low<br>student", 30), ("low<br>teacher", 5)]
    assert points(found["task-form"], "valid")[:2] == [("low<br>student", 70), ("low<br>teacher", 95)]


def test_a_student_alone_is_drawn_too_and_a_run_without_answers_says_how_to_get_some(
    recorded_data: RunData,
) -> None:
    alone = dataclasses.replace(
        recorded_data, tasks={"vanilla": task_records.record("vanilla", sides=("student",))}
    )
    assert [trace["name"] for trace in drawn(alone)["right-answers"].traces] == ["student"]
    none = drawn(dataclasses.replace(recorded_data, tasks={}))
    for name in ("right-answers", "task-tokens", "task-form"):
        assert not none[name].traces and "vpmoe evaluate --run" in none[name].missing
