"""The metrics of a process for Prometheus: takes samples while the process works, and renders all metrics in
the text format when they are asked for.

The metrics are defined in vpmoe/api/pod_metrics.py. Roles record what they write to their lines of metrics
(vpmoe/api/metrics.py), so nothing is computed for Prometheus alone. Counters start at 0 with the process.
"""

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Summary,
    disable_created_metrics,
    generate_latest,
)

from vpmoe.api import pod_metrics
from vpmoe.api.metrics import Metric, Sample
from vpmoe.api.progress import Progress

disable_created_metrics()  # type: ignore[no-untyped-call]  # they would say when the process started


class MetricsExporter:
    """The metrics of one process. Threads may share it.

    A metric exists from its first sample on. The role's own counters and summaries are there before, with 0,
    if they have no labels: Prometheus sees no increase from nothing to the first number.
    """

    def __init__(self, *, run: str = "", stage: str = "", role: str = "") -> None:
        """The labels of every time series. A step that belongs to no stage has an empty one, which is none
        for Prometheus."""
        self._labels = {"run": run, "stage": stage, "role": role}
        self._registry = CollectorRegistry()
        self._families: dict[str, Gauge | Counter | Summary] = {}
        self._lock = threading.RLock()
        own = [metric for metric in pod_metrics.METRICS if metric.name.startswith(f"vpmoe_{role}_")]
        for metric in (*own, pod_metrics.TOKENS) if own else ():
            if metric.kind != "gauge" and not metric.labels:
                self._child(metric, {})

    def record(self, samples: Iterable[Sample]) -> None:
        """Set gauges, add to counters and summaries. A gauge without a sample keeps its value."""
        with self._lock:
            for sample in samples:
                if sample.value is None:
                    continue
                child = self._child(sample.metric, sample.labels)
                if isinstance(child, Gauge):
                    child.set(sample.value)
                elif isinstance(child, Counter):
                    child.inc(sample.value)
                else:
                    child.observe(sample.value)

    @contextmanager
    def waiting(self, reason: str) -> Iterator[None]:
        """Count the block's time as waiting for `reason`: what another role makes, or an upload."""
        began = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - began
            self.record([Sample(pod_metrics.WAIT_SECONDS, seconds, {"reason": reason})])

    def render(self, progress: Progress | None) -> bytes:
        """All metrics in Prometheus' text format, with those of the step's latest progress."""
        with self._lock:
            if progress is not None:
                if conditions := self._families.get(pod_metrics.CONDITION.name):
                    conditions.clear()  # some may hold no more
                self.record(progress_samples(progress))
            return generate_latest(self._registry)

    def _child(self, metric: Metric, labels: Mapping[str, str]) -> Gauge | Counter | Summary:
        kind = {"gauge": Gauge, "counter": Counter, "summary": Summary}[metric.kind]
        if metric.name not in self._families:
            names = [*self._labels, *metric.labels]
            self._families[metric.name] = kind(metric.name, metric.help, names, registry=self._registry)
        return self._families[metric.name].labels(**self._labels, **labels)


def progress_samples(progress: Progress) -> Iterator[Sample]:
    """What every role shows of its step."""
    yield Sample(pod_metrics.PROGRESS_TIME, progress.updated.timestamp())
    yield Sample(pod_metrics.ATTEMPT, progress.attempt)
    for unit, amount in (("tokens", progress.tokens), ("parts", progress.parts)):
        if amount is not None:
            yield Sample(pod_metrics.DONE, amount.done, {"unit": unit})
            yield Sample(pod_metrics.PLANNED, amount.total, {"unit": unit})
    for found in progress.conditions:
        if found.status == "True":
            yield Sample(pod_metrics.CONDITION, 1, {"type": found.type, "reason": found.reason})
    yield Sample(pod_metrics.VALIDITY, progress.validity)
