"""The plots of a report, as figures of plotly.js in JSON values. Pure: a run's data in, figures out.

A figure has no colours of text, grid or background: page.js takes those from the page's light or dark style.
Colours of data are readable on both. A plot whose data does not exist says what it waits for.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import batched
from statistics import fmean
from typing import Any

from vpmoe.api.effort import EFFORTS, Effort
from vpmoe.api.stages import Stage
from vpmoe.data.spans import SPANS
from vpmoe.report.facts import duration
from vpmoe.report.run_data import (
    DOCUMENTS,
    LOGP_BINS,
    LOWEST_LOGP,
    Line,
    RunData,
    StepRecord,
    TeacherLogp,
    line_time,
)
from vpmoe.rollout.task_record import Side, TaskEvaluation
from vpmoe.rollout.validity import VALID

Json = dict[str, Any]
Points = Sequence[tuple[float, float]]

POINTS = 500
"""Points of a line. A longer one is averaged over neighbours."""
COLUMNS = 160
"""Columns of the heat map. More steps are averaged."""
SPAN_COLOURS = {"reasoning": "#d9730d", "final": "#2f81f7"}
EFFORT_COLOURS = {"low": "#2da44e", "medium": "#c69026", "high": "#e5534b"}
SIDE_COLOURS: dict[Side, str] = {"student": "#2f81f7", "teacher": "#a371f7"}
ROLE_COLOURS = {
    "train": "#2f81f7",
    "sampler": "#d9730d",
    "teacher": "#a371f7",
    "rescore": "#2da44e",
    "evaluate": "#c69026",
    "preprocess": "#57a6a1",
    "init": "#57a6a1",
    "export": "#8b949e",
}
ROLE_NAMES = {
    "train": "trainer",
    "sampler": "sampler",
    "teacher": "teacher",
    "rescore": "teacher, on documents",
    "evaluate": "evaluation",
    "preprocess": "preprocessing",
    "init": "initial weights",
    "export": "export",
}
WORK, WAIT = "#2f81f7", ("#d9730d", "#a371f7", "#c69026", "#db61a2")
PURPLE = "#a371f7"
UNNAMED: Json = {"showlegend": False, "margin": {"l": 8, "r": 8, "t": 8, "b": 8}}
"""Layout of a figure whose traces need no legend."""
PERCENT: Json = {"range": [0, 108], "tickvals": [0, 25, 50, 75, 100]}
"""Axis of a share. Above 100 there is room for a label."""


@dataclass(frozen=True)
class Plot:
    """A figure with its heading."""

    name: str
    """Id of its element on the page."""
    title: str
    question: str
    """The question that it answers, one sentence."""
    reading: str = ""
    """How to read it: units, and what is good. One or two sentences."""
    traces: Sequence[Json] = ()
    """Empty if there is no data yet."""
    layout: Json = field(default_factory=dict)
    height: int = 300
    """In CSS pixels."""
    wide: bool = False
    """Whether it takes the page's whole width."""
    missing: str = ""
    """Why it has no data, if it has none: a sentence that says what it waits for."""


def all_plots(data: RunData) -> list[tuple[str, list[Plot]]]:
    """The plots by section, in the order of the page."""
    return [
        ("What happened when", [timeline(data)]),
        ("Does the student learn?", [held_out(data), training_loss(data), canary(data), gradient_norm(data)]),
        (
            "Does it come closer to its teacher?",
            [reverse_kl(data), teacher_forced_kl(data), teacher_logp(data)],
        ),
        ("Is the student good?", [right_answers(data), task_tokens(data), task_form(data)]),
        (
            "What does it write?",
            [validity_after_stages(data), validity_by_effort(data), lengths(data), efforts(data)],
        ),
        ("Is the machine used well?", [speed(data), utilisation(data), waits(data), router(data)]),
    ]


# Learning


def held_out(data: RunData) -> Plot:
    """Held-out loss by span, and where each stage begins."""
    return Plot(
        "held-out",
        "Loss on documents that it never trains on",
        "Does what the student learns carry over to new documents?",
        "Mean −log p in nats a token; lower is better. Dashed lines: a stage begins.",
        _span_lines(_stage_points(data, "evaluation", lambda line: line.get("heldOut")), "lines+markers"),
        _over_tokens(data, "nats a token"),
        missing="Waits for the first evaluation of a stage."
        if data.run.spec.evaluation.documents
        else "This run measures no held-out loss: evaluation.documents is 0.",
    )


def training_loss(data: RunData) -> Plot:
    """Loss of each step by span, without the steps on the student's own samples."""
    return Plot(
        "loss",
        "Loss on the documents that it trains on",
        "Does the student predict the training documents better from step to step?",
        "Mean −log p in nats a token; lower is better. Steps on its own samples are not in here.",
        _span_lines(
            _stage_points(
                data, "step", lambda line: line["lossBySpan"] if line["kind"] != "OnPolicy" else None
            )
        ),
        _over_tokens(data, "nats a token"),
        missing="Waits for the first optimizer step.",
    )


def canary(data: RunData) -> Plot:
    """Bits per byte of text that is in no training data."""
    starts, found = stage_starts(data), []
    for stage, step in _training(data):
        for line in step.events("evaluation"):
            if line.get("canary"):
                found.append((starts[stage.name] + line["tokens"], line["canary"]["bitsPerByte"]))
        evaluation = data.evaluations.get(stage.name)
        if evaluation is not None and evaluation.canary is not None:
            found.append((starts[stage.name] + stage_tokens(step), evaluation.canary.bits_per_byte))
    return Plot(
        "canary",
        "Text that is in no training data",
        "Does the student get worse at ordinary text while it trains?",
        "Bits a byte over prompts and plain text in several languages; lower is better.",
        _lines([("bits a byte", sorted(found), PURPLE)], "lines+markers"),
        _over_tokens(data, "bits a byte") | UNNAMED,
        missing="Waits for the evaluation after the first stage.",
    )


def gradient_norm(data: RunData) -> Plot:
    """Gradient norm before clipping."""
    starts = stage_starts(data)
    points = [
        (starts[stage.name] + line["tokens"], line["gradientNorm"])
        for stage, step in _training(data)
        for line in step.events("step")
        if line["gradientNorm"] is not None
    ]
    traces = _lines([("gradient norm", points, PURPLE)])
    return Plot(
        "gradient",
        "Size of the gradient",
        "Is the training stable?",
        "Norm before clipping, on a logarithmic scale. A long climb or sudden peaks are a sign of a learning "
        "rate that is too high.",
        traces,
        _over_tokens(data, "norm", yaxis=_log_axis("norm", traces)) | UNNAMED,
        missing="Waits for the first optimizer step.",
    )


# Agreement with the teacher


def reverse_kl(data: RunData) -> Plot:
    """KL(student‖teacher) of the windows, by span."""
    return Plot(
        "reverse-kl",
        "Distance to the teacher, on what the student writes itself",
        "Does the teacher agree more and more with what the student writes?",
        "KL(student‖teacher) in nats a token, estimated from the sampled tokens of each window; 0 is full "
        "agreement, and an estimate may be below.",
        _span_lines(_stage_points(data, "step", lambda line: line.get("reverseKl")), "lines+markers"),
        _over_tokens(data, "nats a token", "OnPolicy"),
        missing=_missing_stage(data, "OnPolicy", "Waits for the first window of stage {} to be trained on."),
    )


def teacher_forced_kl(data: RunData) -> Plot:
    """KL(teacher‖student) of TeacherForced steps, by span."""
    return Plot(
        "teacher-kl",
        "Distance to the teacher, on documents",
        "Does the student's whole distribution come closer to the teacher's?",
        "KL(teacher‖student) in nats a token at the temperature of the stage; 0 is full agreement.",
        _span_lines(_stage_points(data, "step", lambda line: line.get("kl"))),
        _over_tokens(data, "nats a token", "TeacherForced"),
        missing=_missing_stage(data, "TeacherForced", "Waits for the first step of stage {}."),
    )


def teacher_logp(data: RunData) -> Plot:
    """Distributions of the teacher's log p, by span."""
    width = -LOWEST_LOGP / LOGP_BINS
    centres = [LOWEST_LOGP + (place + 0.5) * width for place in range(LOGP_BINS)]
    traces = []
    for found, dash in zip(_chosen(data.teacher_logp), ("solid", "dot", "dash"), strict=False):
        for span, colour in SPAN_COLOURS.items():
            counts = found.counts[span]
            if total := int(counts.sum()):
                traces.append(
                    {
                        "type": "scatter",
                        "mode": "lines",
                        "name": f"{span}, {found.tokens}",
                        "x": centres,
                        "y": [_short(100 * int(count) / total) for count in counts],
                        "line": {"color": colour, "dash": dash, "shape": "hvh", "width": 2},
                        "hovertemplate": "%{y:.2g}% of the tokens at log p ≈ %{x:.1f}",
                    }
                )
    return Plot(
        "teacher-logp",
        "How likely the teacher finds each token",
        "Which tokens does the teacher agree with, and which does it reject?",
        "Share of the tokens at each log p of the teacher, in nats. On the right, at 0, it is sure of the "
        f"{LOWEST_LOGP:.0f} and less are counted together on the left. Windows "
        "are what the student wrote itself.",
        traces,
        {
            "xaxis": {"title": {"text": "teacher's log p of the token, nats"}},
            "yaxis": {"title": {"text": "% of the tokens"}, "rangemode": "tozero"},
        },
        height=360,
        wide=True,
        missing="Waits for the teacher's first scores."
        if any(stage.needs_teacher for stage in data.run.spec.stages)
        else "No stage of this run asks the teacher.",
    )


def _chosen(found: Sequence[TeacherLogp]) -> Sequence[TeacherLogp]:
    """The documents, the first and the last window: more lines could not be told apart."""
    documents = [one for one in found if one.tokens == DOCUMENTS][:1]
    windows = [one for one in found if one.tokens != DOCUMENTS]
    return [*documents, *windows[:1], *windows[1:][-1:]]


# Answers to tasks


def right_answers(data: RunData) -> Plot:
    """Share of right answers by task and effort, student beside teacher."""
    found, traces = _latest_tasks(data), []
    cells = [(task, effort) for task in found.tasks for effort in _asked(found)] if found else []
    for side, colour in SIDE_COLOURS.items():
        results = [found.of(side, effort, task) for task, effort in cells] if found else []
        if any(results):
            traces.append(
                {
                    "type": "bar",
                    "name": side,
                    "x": [f"{task}<br>{effort}" for task, effort in cells],
                    "y": [_short(100 * one.accuracy) if one else None for one in results],
                    "error_y": {
                        "type": "data",
                        "symmetric": False,
                        "array": [
                            _short(100 * (one.interval[1] - one.accuracy)) if one else None for one in results
                        ],
                        "arrayminus": [
                            _short(100 * (one.accuracy - one.interval[0])) if one else None for one in results
                        ],
                        "thickness": 1,
                        "color": "#8b949e",
                    },
                    "customdata": [
                        [one.right, one.questions, one.cut_off] if one else [0, 0, 0] for one in results
                    ],
                    "marker": {"color": colour},
                    "hovertemplate": "%{y:.1f}% right: %{customdata[0]} of %{customdata[1]}; "
                    "%{customdata[2]} cut off",
                }
            )
    return Plot(
        "right-answers",
        "Right answers to questions",
        "Does the student answer as well as its teacher?",
        "Share of right answers to benchmark tasks by reasoning effort, "
        f"{_of_stage(data)}with 95% confidence intervals. An answer that is cut off is wrong.",
        traces,
        {
            "barmode": "group",
            "xaxis": {"type": "category"},
            "yaxis": {"title": {"text": "% right"}, **PERCENT},
        },
        wide=True,
        missing=_NO_TASKS,
    )


def task_tokens(data: RunData) -> Plot:
    """Mean tokens of reasoning and answer by effort, student beside teacher, over all tasks."""
    return Plot(
        "task-tokens",
        "Length of its answers",
        "Does the student think as long as its teacher, and longer when more effort is asked for?",
        "Mean tokens of reasoning and of the final answer, over all tasks.",
        _bars_by_effort(data, SPAN_COLOURS, 1, " tokens"),
        {"barmode": "stack", "xaxis": {"type": "category"}, "yaxis": {"title": {"text": "tokens"}}},
        missing=_NO_TASKS,
    )


def task_form(data: RunData) -> Plot:
    """Shares of valid and of cut-off answers by effort, student beside teacher, over all tasks."""
    return Plot(
        "task-form",
        "Form of its answers",
        "Are answers wrong because they never end?",
        "Share of the answers that are valid Harmony, and of those that ended at the limit of tokens, over "
        "all tasks.",
        _bars_by_effort(data, FORM_COLOURS, 100, "%"),
        {"barmode": "group", "xaxis": {"type": "category"}, "yaxis": {"title": {"text": "%"}, **PERCENT}},
        missing=_NO_TASKS,
    )


FORM_COLOURS = {"valid": "#2da44e", "cut off": "#e5534b"}


def _bars_by_effort(data: RunData, colours: Mapping[str, str], times: int, unit: str) -> list[Json]:
    """For each name of `colours`, `times` its mean a question, by side and effort, over all tasks."""
    sums = _task_sums(data)
    return [
        {
            "type": "bar",
            "name": name,
            "x": [_column(side, effort) for side, effort in sums],
            "y": [_short(times * found[name] / found["questions"]) for found in sums.values()],
            "marker": {"color": colour},
            "hovertemplate": f"%{{y:.0f}}{unit}",
        }
        for name, colour in colours.items()
        if sums
    ]


_NO_TASKS = "Waits for the command vpmoe evaluate --run, which asks student and teacher questions."


def _latest_tasks(data: RunData) -> TaskEvaluation | None:
    """The answers to tasks after the latest stage that has some."""
    return data.tasks[list(data.tasks)[-1]] if data.tasks else None


def _asked(found: TaskEvaluation) -> list[Effort]:
    """The efforts that were asked, from low to high."""
    return [effort for effort in EFFORTS if effort in found.max_tokens]


def _of_stage(data: RunData) -> str:
    return f"after stage {list(data.tasks)[-1]}, " if data.tasks else ""


def _task_sums(data: RunData) -> dict[tuple[Side, str], dict[str, int]]:
    """By side and effort: questions, tokens of reasoning and of final messages, valid and cut-off answers."""
    found = _latest_tasks(data)
    sums: dict[tuple[Side, str], dict[str, int]] = {}
    all_results = found.results if found else ()
    for effort in _asked(found) if found else ():
        for side in SIDE_COLOURS:
            results = [one for one in all_results if (one.side, one.effort) == (side, effort)]
            if results:
                sums[side, effort] = {
                    "questions": sum(one.questions for one in results),
                    "reasoning": sum(one.reasoning_tokens for one in results),
                    "final": sum(one.final_tokens for one in results),
                    "valid": sum(one.validity.get(VALID, 0) for one in results),
                    "cut off": sum(one.cut_off for one in results),
                }
    return sums


def _column(side: str, effort: str) -> str:
    return f"{effort}<br>{side}"


# What it writes


def validity_after_stages(data: RunData) -> Plot:
    """Share of valid completions by effort, of the evaluations after stages."""
    names = [name for name, found in data.evaluations.items() if found.completions]
    shares = {name: data.evaluations[name].valid_share_by_effort() for name in names}
    traces = [
        {
            "type": "bar",
            "name": effort,
            "x": names,
            "y": [_short(100 * shares[name][effort]) if effort in shares[name] else None for name in names],
            "customdata": [
                round(data.evaluations[name].efforts[effort].mean_tokens, 1)
                if effort in shares[name]
                else None
                for name in names
            ],
            "marker": {"color": colour},
            "texttemplate": "%{y:.0f}%",
            "textposition": "outside",
            "cliponaxis": False,
            "hovertemplate": "%{y:.0f}% valid, mean length %{customdata} tokens",
        }
        for effort, colour in EFFORT_COLOURS.items()
        if names
    ]
    return Plot(
        "validity-stages",
        "Valid answers after each stage",
        "Does the student answer in the right form: reasoning first, then one final answer?",
        "Share of its completions of held-out questions that are valid Harmony, by the reasoning effort that "
        "the question asks for.",
        traces,
        {
            "barmode": "group",
            "xaxis": {"type": "category"},
            "yaxis": {"title": {"text": "% valid"}, **PERCENT},
        },
        missing="Waits for the evaluation after the first stage."
        if data.run.spec.evaluation.completions
        else "This run samples no completions after its stages: evaluation.completions is 0.",
    )


def validity_by_effort(data: RunData) -> Plot:
    """Share of valid rollouts by effort, of each window."""
    return _by_effort(
        data,
        "validity",
        "Valid answers while it trains on its own samples",
        "Does training on its own samples keep the form of its answers?",
        "Share of the completions of each window that are valid Harmony.",
        "% valid",
        lambda line: {
            effort: 100 * found.get(VALID, 0.0) for effort, found in (line.get("validity") or {}).items()
        },
    )


def lengths(data: RunData) -> Plot:
    """Mean lengths of rollouts by effort, of each window."""
    return _by_effort(
        data,
        "lengths",
        "Length of what it writes",
        "Does it write more when more effort is asked for, and do the lengths stay bounded?",
        "Mean tokens of the completions of each window.",
        "tokens",
        lambda line: {effort: found["mean"] for effort, found in (line.get("lengths") or {}).items()},
    )


def efforts(data: RunData) -> Plot:
    """Shares of the efforts in each window."""
    return _by_effort(
        data,
        "efforts",
        "Which effort it is asked for",
        "Does the mix of efforts follow the curriculum?",
        "Share of each reasoning effort among the completions of a window.",
        "% of completions",
        lambda line: {
            effort: 100 * count / sum(line["rollouts"].values()) for effort, count in line["rollouts"].items()
        },
    )


def _by_effort(
    data: RunData,
    name: str,
    title: str,
    question: str,
    reading: str,
    unit: str,
    values: Callable[[Line], Mapping[str, float]],
) -> Plot:
    starts, points = stage_starts(data), defaultdict(list)
    for stage, step in _training(data):
        for line in step.events("step"):
            if line["kind"] == "OnPolicy":
                for effort, value in values(line).items():
                    points[effort].append((starts[stage.name] + line["tokens"], value))
    return Plot(
        name,
        title,
        question,
        reading,
        _lines(
            [(effort, points[effort], colour) for effort, colour in EFFORT_COLOURS.items()], "lines+markers"
        ),
        _over_tokens(
            data, unit, "OnPolicy", yaxis=PERCENT if unit.startswith("%") else {"rangemode": "tozero"}
        ),
        height=280,
        missing=_missing_stage(data, "OnPolicy", "Waits for the first window of stage {} to be trained on."),
    )


# The machine


def timeline(data: RunData) -> Plot:
    """When each attempt at each step ran."""
    order = [step.name for step in data.steps]
    traces = []
    for role, colour in ROLE_COLOURS.items():
        found = [one for one in data.activities if data.step(one.step).role == role]
        if found:
            traces.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "name": ROLE_NAMES[role],
                    "y": [one.step for one in found],
                    "base": [one.start.isoformat() for one in found],
                    "x": [max(1, round((one.end - one.start).total_seconds() * 1000)) for one in found],
                    "customdata": [[one.attempt, duration(one.hours)] for one in found],
                    "marker": {"color": colour, "line": {"width": 1, "color": "rgba(127,127,127,0.6)"}},
                    "hovertemplate": "attempt %{customdata[0]}, %{customdata[1]}",
                }
            )
    return Plot(
        "timeline",
        "Steps",
        "When did each step run, and was it tried again?",
        "A bar is an attempt, from its first to its last record. Times are UTC.",
        traces,
        {
            "barmode": "overlay",
            "xaxis": {"type": "date"},
            "yaxis": {
                "type": "category",
                "categoryorder": "array",
                "categoryarray": order[::-1],
                "range": [-0.6, len(order) - 0.4],
            },
            **UNNAMED,
        },
        height=60 + 24 * len(order),
        wide=True,
        missing="Waits for the first step to write its metrics.",
    )


def speed(data: RunData) -> Plot:
    """Tokens a second by role."""
    traces = _over_time(data, lambda line: line.get("tokensPerSecond"))
    return Plot(
        "speed",
        "Tokens a second",
        "Is the run as fast as it was, and which role is the slow one?",
        "Of all GPUs of a role together, without padding, on a logarithmic scale. Times are UTC.",
        traces,
        {"xaxis": {"type": "date"}, "yaxis": _log_axis("tokens a second", traces)},
        missing="Waits for the first step to write its metrics.",
    )


def utilisation(data: RunData) -> Plot:
    """GPU utilisation by role."""
    reasons = {
        line["gpu"]["reason"]
        for step in data.steps
        for line in step.lines
        if line.get("gpu") and line["gpu"].get("reason")
    }
    return Plot(
        "utilisation",
        "Use of the GPUs",
        "Does any role leave its GPUs idle?",
        "Share of the time in which a GPU computed, mean over the GPUs of a role.",
        _over_time(
            data,
            lambda line: (
                100 * used if (used := (line.get("gpu") or {}).get("utilisation")) is not None else None
            ),
        ),
        {
            "xaxis": {"type": "date"},
            "yaxis": {"title": {"text": "% of the time"}, **PERCENT},
        },
        missing=f"No GPU was read: {', '.join(sorted(reasons))}."
        if reasons
        else "Waits for the first step with a GPU to write its metrics.",
    )


def waits(data: RunData) -> Plot:
    """How each role of the OnPolicy stages spent its time."""
    parts = (
        "working",
        "waiting for rollouts",
        "waiting for scores",
        "waiting for weights",
        "waiting for uploads",
    )
    spent = {
        step.name: dict(zip(parts, seconds, strict=True))
        for step in data.steps
        if step.stage is not None
        and data.run.stage(step.stage).samples
        and step.lines
        and (seconds := _time_spent(step)) is not None
    }
    names = list(spent)[::-1]
    totals = {name: sum(spent[name].values()) or 1.0 for name in names}
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": part,
            "y": names,
            "x": [_short(100 * spent[name][part] / totals[name]) for name in names],
            "customdata": [duration(spent[name][part] / 3600) for name in names],
            "marker": {"color": colour},
            "hovertemplate": "%{x:.0f}%, %{customdata}",
        }
        for part, colour in zip(parts, (WORK, *WAIT), strict=True)
        if any(spent[name][part] for name in names)
    ]
    return Plot(
        "waits",
        "Who waited for whom",
        "Which of sampler, teacher and trainer holds the other two up?",
        "Shares of each one's time. The one that never waits is the bottleneck: give it more GPUs. If "
        "trainer and sampler wait for uploads, it is the bucket.",
        traces,
        {
            "barmode": "stack",
            "xaxis": {"title": {"text": "% of its time"}, "range": [0, 100]},
            "yaxis": {"type": "category"},
        },
        height=240,
        missing=_missing_stage(data, "OnPolicy", "Waits for the first window of stage {}."),
    )


def _time_spent(step: StepRecord) -> tuple[float, float, float, float, float] | None:
    """Seconds of work, and of waiting for rollouts, scores, weights and uploads; None for other roles."""
    if step.role == "train":
        lines = step.events("step")
        rollouts = sum(line.get("waitRollouts", 0.0) for line in lines)
        scores = sum(line.get("waitScores", 0.0) for line in lines)
        uploads = sum(line.get("waitUpload", 0.0) for line in lines)  # after a step, so not in its seconds
        return sum(line["seconds"] for line in lines) - rollouts - scores, rollouts, scores, 0.0, uploads
    if step.role == "sampler":
        # Each line of windows that were sampled together has the time of all of them; only the first loads.
        first = [line for line in step.lines if line["load"] is not None]
        work = sum(line["seconds"] + line["load"]["seconds"] for line in first)
        weights = sum(line["waitWeights"] for line in first)
        return work, 0.0, 0.0, weights, sum(line.get("waitUpload", 0.0) for line in first)
    if step.role == "teacher":
        return (
            sum(line["seconds"] for line in step.lines),
            sum(line["waitRollouts"] for line in step.lines),
            0.0,
            0.0,
            0.0,
        )
    return None


def router(data: RunData) -> Plot:
    """Load of the busiest expert over the mean, by layer and time."""
    starts = stage_starts(data)
    lines = [
        (starts[stage.name] + line["tokens"], line["router"])
        for stage, step in _training(data)
        for line in step.events("step")
        if line.get("router") and line["router"]["maxOverMean"]
    ]
    size = max(1, math.ceil(len(lines) / COLUMNS))
    columns = list(batched(lines, size))
    layers = sorted(
        {layer for _, found in lines for layer in found["maxOverMean"]},
        key=lambda layer: int(layer.rpartition(".")[2]),
    )
    names = [layer.rpartition(".")[2] for layer in layers]
    trace = {
        "type": "heatmap",
        "x": [_short(fmean(tokens for tokens, _ in column)) for column in columns],
        "y": names,
        "z": [
            [_short(_mean(found["maxOverMean"].get(layer) for _, found in column)) for column in columns]
            for layer in layers
        ],
        "customdata": [
            [max(found["dead"].get(layer, 0) for _, found in column) for column in columns]
            for layer in layers
        ],
        "zmin": 1,
        "colorscale": "Viridis",
        "colorbar": {"title": {"text": "× mean"}, "thickness": 12},
        "hovertemplate": "layer %{y}: busiest expert %{z:.1f} × the mean, %{customdata} experts without a "
        "token<extra></extra>",
    }
    layout = _over_tokens(data, "layer") | UNNAMED
    layout["yaxis"] |= {"type": "category"}
    for mark in layout["annotations"]:  # on the colours of the map
        mark |= {"bgcolor": "rgba(0,0,0,0.5)", "font": {"size": 11, "color": "#ffffff"}}
    return Plot(
        "router",
        "Load of the experts",
        "Do all experts get work, in every layer?",
        "Load of each layer's busiest expert, in mean loads: 1 is perfectly even. Bright rows are layers "
        "whose router has collapsed to a few experts.",
        [trace] if lines else [],
        layout,
        height=max(220, min(640, 120 + 14 * len(layers))),
        missing="Waits for the first optimizer step.",
    )


# Parts of plots


def stage_starts(data: RunData) -> dict[str, int]:
    """Tokens trained on before each stage that has begun, in order."""
    found, at = {}, 0
    for stage, step in _training(data):
        if step.lines:
            found[stage.name] = at
            at += stage_tokens(step)
    return found


def stage_tokens(step: StepRecord) -> int:
    """Tokens that a training step has trained on."""
    return max((int(line["tokens"]) for line in step.lines), default=0)


def _training(data: RunData) -> Iterator[tuple[Stage, StepRecord]]:
    """The stages with their training steps."""
    for stage in data.run.spec.stages:
        yield stage, data.step(stage.name)


def _stage_points(
    data: RunData, event: str, values: Callable[[Line], Mapping[str, float | None] | None]
) -> dict[str, list[tuple[float, float]]]:
    """Points by span: tokens of the run, and the value of a line."""
    starts = stage_starts(data)
    found: dict[str, list[tuple[float, float]]] = {span: [] for span in SPANS}
    for stage, step in _training(data):
        for line in step.events(event):
            for span, value in (values(line) or {}).items():
                if value is not None:
                    found[span].append((starts[stage.name] + line["tokens"], value))
    return found


def _span_lines(points: Mapping[str, Points], mode: str = "lines") -> list[Json]:
    return _lines([(span, points[span], SPAN_COLOURS[span]) for span in SPANS], mode)


def _lines(found: Iterable[tuple[str, Points, str]], mode: str = "lines") -> list[Json]:
    """Lines of (name, points, colour), without those that have no point."""
    return [_line(name, thin(points), colour, mode) for name, points, colour in found if points]


def _line(name: str, points: Points, colour: str, mode: str) -> Json:
    return {
        "type": "scatter",
        # A single point would not be seen as a line.
        "mode": mode if len(points) > 1 else "markers",
        "name": name,
        "x": [_short(x) for x, _ in points],
        "y": [_short(y) for _, y in points],
        "line": {"color": colour, "width": 2},
        "marker": {"color": colour, "size": 5},
    }


def _over_time(data: RunData, value: Callable[[Line], float | None]) -> list[Json]:
    """A line for each step over time, coloured by its role."""
    traces: list[Json] = []
    named: set[str] = set()
    for step in data.steps:
        points = [
            (line_time(line).timestamp(), found) for line in step.lines if (found := value(line)) is not None
        ]
        for trace in _lines([(ROLE_NAMES[step.role], points, ROLE_COLOURS[step.role])], "lines+markers"):
            trace |= {
                "x": [round(seconds * 1000) for seconds, _ in thin(points)],
                "legendgroup": step.role,
                "showlegend": step.role not in named,
                "hovertemplate": f"{step.name}: %{{y:.3s}}<extra></extra>",
            }
            named.add(step.role)
            traces.append(trace)
    return traces


def _over_tokens(data: RunData, unit: str, kind: str | None = None, *, yaxis: Mapping[str, Any] = {}) -> Json:
    """A layout over the tokens of the run, or only over its stages of one kind, with the stages marked."""
    ends = {
        stage.name: (start, start + stage_tokens(step))
        for stage, step in _training(data)
        if (start := stage_starts(data).get(stage.name)) is not None and kind in (None, stage.kind)
    }
    first = min((start for start, _ in ends.values()), default=0)
    last = max((end for _, end in ends.values()), default=1)
    margin = 0.02 * max(1, last - first)
    return {
        "xaxis": {
            "title": {"text": "tokens trained on, all stages"},
            "range": [first - margin, last + margin],
            "exponentformat": "B",  # k, M and B, as in the specification
            "hoverformat": ",.0f",
        },
        "yaxis": {"title": {"text": unit}, **yaxis},
        "shapes": [
            {
                "type": "line",
                "x0": start,
                "x1": start,
                "y0": 0,
                "y1": 1,
                "yref": "paper",
                "line": {"width": 1, "dash": "dash", "color": "#8b949e"},
            }
            for start, _ in ends.values()
        ],
        "annotations": [
            {
                "x": start,
                "y": 1,
                "yref": "paper",
                "text": name,
                "textangle": -90,
                "showarrow": False,
                "xanchor": "left",
                "yanchor": "top",
                "font": {"size": 11},
            }
            for name, (start, _) in ends.items()
        ],
    }


def _log_axis(title: str, traces: Iterable[Json]) -> Json:
    """A logarithmic axis with whole numbers at its ticks: 1, 2 and 5 of each decade, or every decade."""
    values = [value for trace in traces for value in trace["y"] if value]
    if not values:
        return {}
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    digits = (1, 2, 5) if high - low <= 3 else (1,)
    ticks = [float(f"{digit}e{power}") for power in range(low, high + 1) for digit in digits]
    return {
        "title": {"text": title},
        "type": "log",
        "tickvals": ticks,
        "ticktext": [f"{tick:,g}" for tick in ticks],
    }


def _missing_stage(data: RunData, kind: str, waits: str) -> str:
    """`waits` with the name of the first stage of a kind, or that there is none."""
    name = next((stage.name for stage in data.run.spec.stages if stage.kind == kind), None)
    return waits.format(name) if name is not None else f"This run has no {kind} stage."


def thin(points: Points) -> list[tuple[float, float]]:
    """At most POINTS points: the means of as many neighbours as it takes."""
    size = max(1, math.ceil(len(points) / POINTS))
    return [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in batched(points, size)]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _short(value: float | None) -> float | None:
    """Six significant digits, which is more than a screen shows; None for what JSON cannot hold."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None
