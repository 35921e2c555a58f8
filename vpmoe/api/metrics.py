"""Lines of metrics: one JSON object a line, in steps/<step>/metrics/*.jsonl. Each role defines its own lines;
this is what they share.

The keys are a file format. A number that was not measured is null; a part that a kind of stage does not have
is absent.
"""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import ConfigDict, Field

from vpmoe.api.base import Record
from vpmoe.clock import now

BySpan = dict[str, float | None]
"""A number for each span of tokens (reasoning, final); None if there was no such token."""


class Metric(NamedTuple):
    """A metric for Prometheus. All of them are in pod_metrics.py."""

    name: str
    """In full, but for the _total of a counter, and the _sum and _count of a summary."""
    kind: Literal["gauge", "counter", "summary"]
    help: str
    labels: tuple[str, ...] = ()
    """Its own, beside those of the process."""

    def series(self) -> tuple[str, ...]:
        """The names of its time series."""
        match self.kind:
            case "counter":
                return (f"{self.name}_total",)
            case "summary":
                return (f"{self.name}_sum", f"{self.name}_count")
            case _:
                return (self.name,)


class Sample(NamedTuple):
    """One number for a metric."""

    metric: Metric
    value: float | None
    """A gauge's new value, what is added to a counter, or an observation for a summary. None is not shown."""
    labels: Mapping[str, str] = {}


def samples_by_span(metric: Metric, values: BySpan) -> list[Sample]:
    """A number of the metric for each span."""
    return [Sample(metric, value, {"span": span}) for span, value in values.items()]


class Measures(Record):
    """Part of a line that only some stages have. In JSON its fields stand among the line's own.

    NaN is allowed, because the trainer looks at the loss before it writes a line.
    """

    model_config = ConfigDict(allow_inf_nan=True)

    def samples(self) -> Iterable[Sample]:
        """What of it Prometheus shows."""
        return ()


def line_time() -> str:
    """Now, in UTC, to the millisecond."""
    return now().isoformat(timespec="milliseconds")


class MetricsLine(Record):
    """What every line has. Fields named in `parts` hold Measures, whose fields are written among the line's
    own."""

    parts: ClassVar[tuple[str, ...]] = ()

    event: str
    """What was measured, such as step or evaluation."""
    time: str = Field(default_factory=line_time)
    """When the line was made."""
    attempt: int
    """Attempt of the step that made it."""

    def samples(self) -> Iterable[Sample]:
        """The numbers of the line that Prometheus shows."""
        return ()

    def dump(self) -> dict[str, Any]:
        """As JSON: camelCase, null if nothing was measured."""
        line = self.model_dump(mode="json", by_alias=True, exclude=set(self.parts))
        for name in self.parts:
            part = getattr(self, name)
            if part is not None:
                line |= part.model_dump(mode="json", by_alias=True)
        return line
