"""The metrics of a run's pods: their names, and how samples become time series."""

import re
import threading
from datetime import UTC, datetime

import pytest
from prometheus_client.parser import text_string_to_metric_families

from vpmoe.api import pod_metrics
from vpmoe.api.metrics import Metric, Sample
from vpmoe.api.progress import Amount, Progress, ProgressCondition
from vpmoe.process.exporter import MetricsExporter

OF_SCRAPING = {"namespace", "pod", "container", "instance", "job", "endpoint"}
"""Labels that Prometheus adds. A metric's own label of the same name would become exported_<name>."""
OF_PROCESS = {"run", "stage", "role"}
PROGRESS = Progress(step="vanilla", attempt=2, state="Running", updated=datetime(2026, 1, 1, tzinfo=UTC))


def series(exporter: MetricsExporter, progress: Progress | None = None) -> dict[tuple[str, str], float]:
    """By name and the labels beside those of the process, as `a=b,c=d`, the value of each time series."""
    found = {}
    for family in text_string_to_metric_families(exporter.render(progress).decode()):
        for sample in family.samples:
            own = [f"{name}={value}" for name, value in sample.labels.items() if name not in OF_PROCESS]
            assert sample.labels.keys() >= OF_PROCESS
            found[sample.name, ",".join(sorted(own))] = sample.value
    return found


@pytest.mark.parametrize("metric", pod_metrics.METRICS, ids=lambda metric: metric.name)
def test_a_metric_follows_the_conventions(metric: Metric) -> None:
    assert re.fullmatch(r"vpmoe(_[a-z]+)+", metric.name) and metric.help.endswith(".")
    assert not metric.name.endswith(("_total", "_sum", "_count", "_created", "_milliseconds", "_percent"))
    assert not {*metric.labels} & (OF_SCRAPING | OF_PROCESS)
    if metric.kind == "summary":
        assert metric.name.endswith("_seconds")


def test_no_two_metrics_have_a_time_series_of_the_same_name() -> None:
    names = [name for metric in pod_metrics.METRICS for name in metric.series()]
    assert len(set(names)) == len(names) and pod_metrics.TOKENS.series() == ("vpmoe_tokens_total",)


def test_gauges_are_set_counters_added_to_and_summaries_observe() -> None:
    exporter = MetricsExporter(run="r", stage="s")
    for value in (3.0, 2.0, None):
        exporter.record(
            [
                Sample(pod_metrics.SPAN_LOSS, value, {"span": "final"}),
                Sample(pod_metrics.TOKENS, value),
                Sample(pod_metrics.STEP_SECONDS, value, {"kind": "Vanilla"}),
            ]
        )
    assert series(exporter) == {
        ("vpmoe_train_span_loss_nats", "span=final"): 2,
        ("vpmoe_tokens_total", ""): 5,
        ("vpmoe_train_step_seconds_count", "kind=Vanilla"): 2,
        ("vpmoe_train_step_seconds_sum", "kind=Vanilla"): 5,
    }
    assert b'vpmoe_tokens_total{role="",run="r",stage="s"} 5.0' in exporter.render(None)


@pytest.mark.parametrize(
    "role, expected",
    [
        ("teacher", {"tokens_total", "teacher_window_seconds_count", "teacher_window_seconds_sum"}),
        ("preprocess", set()),
    ],
)
def test_counters_and_summaries_of_the_role_begin_at_0(role: str, expected: set[str]) -> None:
    """From nothing to 1 is no increase for Prometheus."""
    assert series(MetricsExporter(role=role)) == {(f"vpmoe_{name}", ""): 0.0 for name in expected}


def test_waiting_counts_the_time_also_of_a_wait_that_ends_with_an_error() -> None:
    exporter = MetricsExporter()
    with pytest.raises(KeyError), exporter.waiting("weights"):
        threading.Event().wait(0.05)
        raise KeyError
    assert series(exporter)["vpmoe_wait_seconds_total", "reason=weights"] >= 0.05


def test_every_role_shows_its_progress_and_only_the_conditions_that_hold() -> None:
    def condition(type_: str, status: str = "True") -> ProgressCondition:
        return ProgressCondition.model_validate({"type": type_, "status": status, "reason": "R"})

    exporter = MetricsExporter()
    conditions = (condition("RouterCollapse"), condition("TrainerStarved", "False"))
    changes = {"parts": Amount(done=3, total=4), "validity": 0.5, "conditions": conditions}
    collapsed = ("vpmoe_step_condition", "reason=R,type=RouterCollapse")
    assert series(exporter, PROGRESS.model_copy(update=changes)) == {
        ("vpmoe_step_progress_timestamp_seconds", ""): PROGRESS.updated.timestamp(),
        ("vpmoe_step_attempt", ""): 2,
        ("vpmoe_step_done", "unit=parts"): 3,
        ("vpmoe_step_planned", "unit=parts"): 4,
        ("vpmoe_step_validity_ratio", ""): 0.5,
        collapsed: 1,
    }
    assert collapsed not in series(exporter, PROGRESS)
