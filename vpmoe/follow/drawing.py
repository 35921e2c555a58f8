"""Draws a run for a terminal of 40 columns or more: a headline, what is measured, a bar a step. Pure.

What is redrawn must fit the terminal. If the run has more lines, steps that have ended or have not begun are
counted instead of shown, so that the steps at work stay in sight.
"""

from dataclasses import replace
from datetime import datetime

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vpmoe.follow.run_view import ACTIVE, RunView, StepView, pod_lines
from vpmoe.follow.words import figures, time_of, work_done

STYLES = {
    "Succeeded": ("✓", "green"),
    "Failed": ("✗", "bold red"),
    "Running": ("●", "cyan"),
    "Retrying": ("↻", "yellow"),
    "Suspended": ("‖", "yellow"),
    "Queued": ("…", "yellow"),
}
"""Mark and colour of a phase or a state; any other waits."""
WAITS = ("·", "dim")
WIDE = 76
"""Columns from which a step's amount and time stand beside its bar."""
AMOUNT, TIME, PERCENT, MARK, GAP = 22, 6, 4, 1, 1
"""Widths of a step's columns, and between them."""
SHORTEST_BAR, LONGEST_BAR = 5, 40
INDENT = MARK + GAP
BETWEEN = "  "
"""Between two figures of a line."""


def draw(
    view: RunView, now: datetime, console: Console, notice: str = "", *, fit: bool = False
) -> RenderableType:
    """The run, as wide as the console; with `fit` also lower than that, if it can be.

    `notice` stands at the end: why what is shown may be old.
    """
    drawn = _whole(view, now, console.width, notice)
    if fit:
        shorter = (
            replace(view, steps=tuple(step for step in view.steps if step.state not in left_out))
            for left_out in (("Succeeded",), ("Succeeded", "Pending"))
        )
        for shorter_view in shorter:
            if len(console.render_lines(drawn)) < console.height:
                break
            drawn = _whole(shorter_view, now, console.width, notice, _left_out(view, shorter_view))
    return drawn


def _left_out(view: RunView, shorter: RunView) -> str:
    """How many steps of each state are not shown."""
    missing = [step.state for step in view.steps if step not in shorter.steps]
    counts = (("Succeeded", "✓ {} steps have succeeded"), ("Pending", "· {} steps wait"))
    return ", ".join(text.format(missing.count(state)) for state, text in counts if state in missing)


def _whole(view: RunView, now: datetime, width: int, notice: str, left_out: str = "") -> RenderableType:
    names = max((cell_len(step.name) for step in view.steps), default=0)
    lines = [*_headline(view, now, width), Text("")]
    if left_out:
        lines.append(Text(left_out, style="dim"))
    for step in view.steps:
        lines.append(_bar(step, now, names, width))
        if step.state in ACTIVE and step.message and step.message not in view.message:
            lines.append(Padding(Text(step.message), (0, 0, 0, INDENT)))
        lines += [
            Padding(
                Text(f"{state}  {name}", style="dim", no_wrap=True, overflow="ellipsis"), (0, 0, 0, INDENT)
            )
            for state, name in pod_lines(step.pods)
        ]
    if notice:
        lines.append(Text(notice, style="yellow"))
    return Group(*lines)


def _headline(view: RunView, now: datetime, width: int) -> list[RenderableType]:
    _, style = STYLES.get(view.phase, WAITS)
    first = Text(f"{view.namespace}/{view.name}  ", style="bold")
    lines: list[RenderableType] = [first.append(f"{view.phase} {view.progress}".rstrip(), style=style)]
    if view.message:
        lines.append(Text(view.message))
    if view.remedy:
        lines.append(Text(f"→ {view.remedy}", style="yellow"))
    for warning in view.warnings:
        lines.append(Text(f"! {warning.reason}: {warning.message}", style="yellow"))
        if warning.remedy:
            lines.append(Text(f"→ {warning.remedy}", style="yellow"))
    lines += _measured(view, now, width)
    if view.ended and view.model:
        lines.append(Text("model ", style="dim").append(view.model, style="not dim"))
    return lines


def _measured(view: RunView, now: datetime, width: int) -> list[Text]:
    """What is measured, in lines that keep each name beside its value."""
    lines: list[Text] = []
    for name, value in figures(view, now):
        part = Text(f"{name} ", style="dim").append(value, style="not dim")
        if lines and lines[-1].cell_len + len(BETWEEN) + part.cell_len <= width:
            lines[-1] = Text(BETWEEN).join([lines[-1], part])
        else:
            lines.append(part)
    return lines


def _bar(step: StepView, now: datetime, names: int, width: int) -> Table:
    """One line: mark, name, bar and share; in a wide terminal also amount and time."""
    mark, style = STYLES.get(step.state, WAITS)
    wide = width >= WIDE
    fixed = MARK + PERCENT + 3 * GAP + ((AMOUNT + TIME + 2 * GAP) if wide else 0)
    name = min(names, max(1, width - fixed - SHORTEST_BAR))
    table = Table.grid(padding=(0, GAP, 0, 0))
    table.add_column(width=MARK)
    table.add_column(width=name, no_wrap=True, overflow="ellipsis")
    table.add_column(width=min(LONGEST_BAR, max(1, width - fixed - name)))
    table.add_column(width=PERCENT, justify="right")
    work = Text(work_done(step), style="dim")
    known = step.total is not None or step.state == "Succeeded"
    cells: list[RenderableType] = [
        Text(mark, style=style),
        Text(step.name, style=style),
        work
        if step.unit == "windows"
        else ProgressBar(total=1.0, completed=step.share, complete_style=style, finished_style="green"),
        Text(f"{int(100 * step.share)}%" if known else ""),
    ]
    if wide:
        table.add_column(width=AMOUNT, no_wrap=True)
        table.add_column(width=TIME, no_wrap=True, justify="right")
        cells += [Text("") if step.unit == "windows" else work, Text(time_of(step, now))]
    table.add_row(*cells)
    return table
