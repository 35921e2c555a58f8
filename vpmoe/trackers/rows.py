"""Lines of metrics as rows of named numbers, with the names that trackers show. Pure.

A name is a group and the path of the number in its line, in snake case: `lossBySpan.final` is loss/final.
docs/guides/trackers.md lists them. The keys of lines are a file format, so the names stay what they are.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from vpmoe.report.run_data import Line, line_time
from vpmoe.rollout.evaluation_record import valid_share

NO_VALUES = {"event", "time", "attempt", "step", "iteration", "tokens", "epoch", "window"}
"""Keys of a line that say where it belongs. `tokens` and `window` are x axes."""
GROUPS = {"lossBySpan": "loss", "effort": "rollouts"}
"""Groups that have not the name of their key."""
TOTALS = {"loss": "loss/total"}
"""Names of numbers that belong to a group."""
UNNAMED = re.compile(r"[^A-Za-z0-9_. /-]")
"""Characters that MLflow does not accept in a name."""


@dataclass(frozen=True)
class Row:
    """The values of a line of metrics."""

    x: int
    """Tokens that all stages have trained on, or the window."""
    time: datetime
    values: Mapping[str, float]
    """By name, at least one."""


def row(line: Line, x: int, group: str) -> Row | None:
    """The row of a line; None if it has no number. `group`: of the line's own numbers."""
    if line["event"] == "start":
        return None
    if line["event"] == "skipped":  # its other numbers are of a batch that changed nothing
        return Row(x, line_time(line), {f"{group}/skipped": float(line["number"])})
    values = {UNNAMED.sub("_", name): value for name, value in _values(line, group)}
    return Row(x, line_time(line), values) if values else None


def _values(line: Line, group: str) -> Iterator[tuple[str, float]]:
    for key, value in line.items():
        if key in NO_VALUES:
            continue
        if key == "router":
            yield from _router(value)
        elif key == "validity" and isinstance(value, Mapping):
            yield from _validity(value)
        elif key == "efforts":
            for effort, found in value.items():
                yield from _numbers(f"validity/{effort}", valid_share(found["validity"]))
                yield from _numbers(f"lengths/{effort}/mean", found["meanTokens"])
                yield from _numbers(f"lengths/{effort}/max", found["mostTokens"])
        elif isinstance(value, Mapping):
            yield from _numbers(GROUPS.get(key, _snake(key)), value)
        else:
            yield from _numbers(TOTALS.get(key, f"{group}/{_snake(key)}"), value)


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """The finite numbers of a value, which may be a mapping of mappings."""
    if isinstance(value, Mapping):
        for key, found in value.items():
            yield from _numbers(f"{name}/{_snake(key)}", found)
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        yield name, float(value)


def _router(found: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The worst layer's load, because a series for each layer would be hundreds; the report has all."""
    yield from _numbers("router/max_over_mean", max(found["maxOverMean"].values(), default=None))
    yield from _numbers("router/dead", sum(found["dead"].values()))
    yield from _numbers("router/aux_loss", found["auxLoss"])


def _validity(found: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Shares of valid completions. The trainer has shares by effort, the sampler counts by effort, the
    evaluation counts of all."""
    for effort, kinds in found.items():
        if isinstance(kinds, Mapping) and sum(kinds.values()):
            yield f"validity/{effort}", valid_share(kinds)
    if found and not any(isinstance(kinds, Mapping) for kinds in found.values()) and sum(found.values()):
        yield "validity/all", valid_share(found)


def _snake(key: str) -> str:
    """camelCase as snake_case."""
    return re.sub(r"(?<=[a-z0-9])([A-Z])", r"_\1", key).lower()
