"""A live view of a run's steps: one line a step, updated in place on a terminal; plain rows elsewhere.

`step_lines` is pure: it reads the status that `kubectl get --output=json` prints. `LiveView` draws.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

STYLES = {
    "Succeeded": ("✓", "green"),
    "Failed": ("✗", "bold red"),
    "Running": ("●", "cyan"),
    "Retrying": ("↻", "yellow"),
    "Suspended": ("‖", "yellow"),
}
"""Mark and colour of a step's state; any other state waits."""

ROW_EVERY = 0.25
"""Without a terminal, a row is printed when a step changes its state or passes a multiple of this share."""


@dataclass(frozen=True)
class StepLine:
    """What is shown of one step."""

    name: str
    state: str
    done: float
    """Share of the step's work, 0 to 1."""
    figures: str
    """Tokens a second and loss, of the step that trains."""
    seconds: float | None
    """Since its first attempt began; None before."""
    message: str


def step_lines(status: Mapping[str, Any], now: datetime) -> list[StepLine]:
    """One line for each step of a run's status."""
    return [_line(step, status, now) for step in status.get("steps", [])]


def _line(step: Mapping[str, Any], status: Mapping[str, Any], now: datetime) -> StepLine:
    done, total = (
        step.get("tokensDone", step.get("partsDone")),
        step.get("tokensTotal", step.get("partsTotal")),
    )
    share = min(1.0, (done or 0) / total) if total else 0.0
    leads = step["name"] == status.get("step") and step["state"] == "Running" and "tokensTotal" in step
    speed, loss = status.get("tokensPerSecond"), status.get("loss")
    figures = [f"{speed:,.0f} tokens/s" if speed else "", f"loss {loss:.3f}" if loss is not None else ""]
    end = datetime.fromisoformat(step["finished"]) if "finished" in step else now
    return StepLine(
        name=step["name"],
        state=step["state"],
        done=1.0 if step["state"] == "Succeeded" else share,
        figures="  ".join(part for part in figures if part) if leads else "",
        seconds=(end - datetime.fromisoformat(step["started"])).total_seconds()
        if "started" in step
        else None,
        message=step.get("message", ""),
    )


class LiveView:
    """Draws step lines. Use it as a context manager and call `show` with each new status."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = (
            Live(console=console, refresh_per_second=4, transient=False) if console.is_terminal else None
        )
        self._printed: dict[str, tuple[str, int]] = {}

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def show(self, lines: Sequence[StepLine]) -> None:
        """Show the lines as they are now."""
        if self._live:
            self._live.update(_table(lines))
            return
        for line in lines:
            seen = (line.state, int(line.done / ROW_EVERY))
            if line.seconds is not None and self._printed.get(line.name) != seen:
                self._printed[line.name] = seen
                self._console.print(_row(line), highlight=False, soft_wrap=True, markup=False)


def _table(lines: Sequence[StepLine]) -> Table:
    table = Table.grid(padding=(0, 2))
    for _ in range(4):
        table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    for line in lines:
        mark, style = STYLES.get(line.state, ("·", "dim"))
        bar = ProgressBar(
            total=1.0, completed=line.done, width=24, complete_style=style, finished_style="green"
        )
        clock = "" if line.seconds is None else f"{line.seconds:4.0f} s"
        words = line.figures or line.message if line.state != "Pending" else ""
        table.add_row(Text(f"{mark} {line.name}", style=style), bar, f"{line.done:4.0%}", clock, words)
    return table


def _row(line: StepLine) -> str:
    clock = "" if line.seconds is None else f"{line.seconds:.0f} s"
    words = line.figures or line.message
    return f"{line.name:<20}{line.state:<11}{line.done:>5.0%}{clock:>7}  {words}".rstrip()
