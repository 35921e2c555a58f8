"""The latest numbers of a stage as Prometheus gauges vpmoe_train_…, which the pod serves at /metrics."""

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from vpmoe.api.metrics import MetricsLine


class Prometheus:
    """Gauges that all have the same labels, beside their own. A gauge exists from its first number on."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self._labels = labels
        self._registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}

    def show(self, lines: Iterable[MetricsLine]) -> None:
        """Show the numbers of these lines. A number that none of them has keeps its latest value."""
        for line in lines:
            for name, help, value, labels in line.samples():
                if value is None:
                    continue
                if name not in self._gauges:
                    names = [*self._labels, *labels]
                    self._gauges[name] = Gauge(f"vpmoe_train_{name}", help, names, registry=self._registry)
                self._gauges[name].labels(**self._labels, **labels).set(value)

    def render(self) -> bytes:
        """All gauges in Prometheus' text format."""
        return generate_latest(self._registry)
