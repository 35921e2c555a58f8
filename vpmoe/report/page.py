"""The report of a run as one HTML page, which needs no other file and no network. Pure.

plotly.js draws the plots. It stands in the page as the Python package plotly ships it (4.8 MB, MIT licence),
so that pip and the lock decide its version.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from plotly.offline import get_plotlyjs

from vpmoe.report.facts import (
    UNKNOWN,
    Cost,
    Figure,
    Origin,
    conditions,
    costs,
    data_size,
    headline,
    key_figures,
    origins,
    story,
)
from vpmoe.report.plots import Plot, all_plots
from vpmoe.report.run_data import Completion, RunData, Token
from vpmoe.rollout.validity import NO_FINAL, TRUNCATED, UNCLOSED_REASONING, VALID, WRONG_ORDER

Link = Callable[[str], str]
"""The address of an object, given its key in the bucket."""

WORDS = {
    "teacher, student": "The student is the small model that is trained; the teacher is the large one that "
    "it learns from.",
    "reasoning, final": "The two parts of an answer in the Harmony format: what the model thinks, and what "
    "it says in the end.",
    "effort": "How much reasoning the question asks for: low, medium or high.",
    "log p, nats": "The natural logarithm of a probability. 0 means certain; −0.7 is a half, −2.3 a tenth, "
    "−4.6 a hundredth.",
    "loss": "The mean −log p of the right tokens, in nats: how surprised the model is. Lower is better.",
    "KL": "How far one model's distribution of the next token is from another's, in nats. 0 means that they "
    "agree.",
    "stage": "A part of the training with one objective. Its kind is Vanilla, Rescored, TeacherForced or "
    "OnPolicy.",
    "window, policy version": "In an OnPolicy stage: the completions that one optimizer step learns from, "
    "and the state of the student that wrote them.",
}

VALIDITY = {
    VALID: "valid",
    NO_FINAL: "not valid: no final answer",
    UNCLOSED_REASONING: "not valid: it stops within its reasoning",
    WRONG_ORDER: "not valid: parts are missing or misplaced",
    TRUNCATED: "not valid: cut off at the longest length",
}
"""What a completion is, in words."""

LIKELIHOODS = (0.5, 0.1, 0.01, 0.001)
"""Bounds of the colours of tokens: the teacher's probability of the token, from likely to unlikely."""
_LOGS = tuple(map(math.log, LIKELIHOODS))


def page(data: RunData, link: Link) -> str:
    """The page. `link` gives the address under which the reader can open an object of the bucket."""
    run, sections = data.run, all_plots(data)
    plots = [plot for _, found in sections for plot in found]
    figures = [
        {"id": plot.name, "traces": plot.traces, "layout": plot.layout | {"height": plot.height}}
        for plot in plots
        if plot.traces
    ]
    title = escape(f"{run.metadata.name}: report")
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            # A page without an icon makes browsers ask the server for one.
            '<link rel="icon" href="data:,">',
            f"<title>{title}</title>",
            f"<style>\n{_file('page.css')}</style>",
            "</head>",
            "<body>",
            *_head(data),
            *(line for heading, found in sections for line in _section(heading, found)),
            *_completions(data.completions),
            *_costs(data),
            *_origins(data, link),
            f"<script>{get_plotlyjs()}</script>",
            f'<script type="application/json" id="figures">{_json(figures)}</script>',
            f"<script>\n{_file('page.js')}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _file(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _json(value: Any) -> str:
    """JSON that cannot end the script element that it stands in."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _head(data: RunData) -> Iterable[str]:
    run = data.run
    yield f"<header><h1>{escape(run.metadata.name)}</h1>"
    yield f'<p class="state">{escape(headline(data))}</p>'
    yield (
        f"<p class=note>DistillRun in namespace {escape(run.metadata.namespace)}. This page was made at "
        f"{data.made:%Y-%m-%d %H:%M} UTC from <code>{escape(data.url)}</code>.</p></header>"
    )
    yield from (f'<p class="condition">{escape(text)}</p>' for text in conditions(data))
    yield f'<div class="figures">{"".join(map(_figure, key_figures(data)))}</div>'
    yield "<ul class=story>" + "".join(f"<li>{escape(text)}</li>" for text in story(data)) + "</ul>"
    yield "<details><summary>Words on this page</summary><dl>"
    yield from (f"<dt>{word}</dt><dd>{meaning}</dd>" for word, meaning in WORDS.items())
    yield "</dl></details>"


def _figure(one: Figure) -> str:
    return (
        f'<div class="figure"><span>{escape(one.name)}</span><b>{escape(one.value)}</b>'
        f"<span>{escape(one.note)}</span></div>"
    )


def _section(heading: str, plots: Sequence[Plot]) -> Iterable[str]:
    yield f"<section><h2>{escape(heading)}</h2><div class=plots>"
    for plot in plots:
        wide = " wide" if plot.wide else ""
        yield f'<article class="plot{wide}"><h3>{escape(plot.title)}</h3>'
        yield f"<p><b>{escape(plot.question)}</b> {escape(plot.reading)}</p>"
        if plot.traces:
            yield f'<div id="{plot.name}" style="height:{plot.height}px"></div></article>'
        else:
            yield f'<p class="waiting" id="{plot.name}">{escape(plot.missing)}</p></article>'
    yield "</div></section>"


def _completions(found: Sequence[Completion]) -> Iterable[str]:
    yield "<section id=completions><h2>In its own words</h2>"
    if not found:
        yield (
            "<p class=waiting>Waits for the teacher to score what the student writes in an OnPolicy stage."
            "</p></section>"
        )
        return
    yield "<p><b>What does the student write, and where does the teacher disagree?</b> The colour of a token "
    yield "is how likely the teacher finds it there; point at it for the numbers.</p>"
    yield f"<p class=legend>{''.join(_legend())}</p>"
    latest = max(one.window for one in found if one.stage == found[-1].stage)
    for one in found:
        yield (
            f"<details{' open' if one.window == latest else ''}><summary>{escape(one.stage)}, "
            f"window {one.window}, policy version {one.version}: {escape(one.effort)} effort, "
            f"{one.length:,} tokens, {VALIDITY[one.validity]}</summary>"
        )
        yield f"<h4>Question</h4><p class=question>{escape(one.question)}</p>"
        for span, heading in (("reasoning", "Reasoning"), ("final", "Final answer")):
            tokens = [token for token in one.tokens if token.span == span]
            text = "".join(map(_token, tokens)) if tokens else "<i>none</i>"
            yield f"<h4>{heading}</h4><p class=completion>{text}</p>"
        if one.length > len(one.tokens):
            yield f"<p class=note>{one.length - len(one.tokens):,} more tokens are not shown.</p>"
        yield "</details>"
    yield "</section>"


def _legend() -> Iterable[str]:
    names = [*(f"over {100 * bound:g}%" for bound in LIKELIHOODS), "less"]
    return (f'<span class="t{place}">{name}</span> ' for place, name in enumerate(names))


def _token(token: Token) -> str:
    place = sum(token.teacher < _LOGS[index] for index in range(len(_LOGS)))
    special = " special" if token.special else ""
    title = f"log p: teacher {token.teacher:.2f}, student {token.student:.2f}"
    return f'<span class="t{place}{special}" title="{title}">{escape(token.text)}</span>'


def _costs(data: RunData) -> Iterable[str]:
    rows, sources = costs(data)
    yield "<section id=costs><h2>Costs so far, beside the plan</h2>"
    yield "<p><b>Does the run take as long as planned?</b> GPU hours count all GPUs that a step held while "
    yield f"it ran. {UNKNOWN} is not known: a step that did not run, or a speed that was never measured.</p>"
    yield _table(
        ("step", "state", "GPUs", "tokens", "time", "GPU hours", "planned time", "planned GPU hours"),
        [_cost(row) for row in rows],
    )
    yield "<details><summary>What the plan assumes</summary><ul>"
    yield from (f"<li>{escape(source)}</li>" for source in sources)
    yield "</ul></details></section>"


def _cost(row: Cost) -> tuple[str, ...]:
    cells = (
        row.step,
        row.state,
        row.gpus,
        row.tokens,
        row.time,
        row.gpu_hours,
        row.planned_time,
        row.planned_gpu_hours,
    )
    return tuple(map(escape, cells))


def _origins(data: RunData, link: Link) -> Iterable[str]:
    yield "<section id=provenance><h2>Where everything is, and where it comes from</h2>"
    yield "<p><b>Which code made which object, from what?</b> Each manifest names its objects with their "
    yield "hashes, and the inputs that they were made from.</p>"
    yield (
        f"<p class=note>Configuration <code>{escape(data.run.config_hash)}</code>: "
        f'<a href="{escape(link(f"{data.run.folder}/run.json"))}">run.json</a></p>'
    )
    heads = ("object", "manifest", "size", "written by", "commit", "image", "at")
    yield _table(heads, [_origin(row, link) for row in origins(data)])
    yield "</section>"


def _origin(row: Origin, link: Link) -> tuple[str, ...]:
    commit = f"<code>{escape(row.commit[:12])}</code>" if row.commit else UNKNOWN
    return (
        escape(row.what),
        f'<a href="{escape(link(row.key))}"><code>{escape(row.sha256[:12])}</code></a>',
        data_size(row.size),
        f"{escape(row.step)}, attempt {row.attempt}",
        commit,
        f"<code>{escape(row.image)}</code>" if row.image else UNKNOWN,
        escape(row.written),
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, given cells in HTML. On a narrow screen it scrolls by itself."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<div class=table><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
