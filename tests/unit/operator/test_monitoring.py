"""The chart's alerts and dashboards with a real Prometheus: expressions parse, alerts fire when they should,
and every query of a dashboard finds time series in a real scrape.

What is scraped here are the servers of a pod and of the operator, with one number for each metric. The same
queries on complete runs are in tests/e2e/test_stages.py.
"""

import asyncio
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from distill_operator import health, metrics
from distill_operator.kube import DISTILLRUN
from distill_operator.namespaces import WatchedNamespaces
from distill_operator.pod_progress import PodProgress
from distill_operator.reconcile import Reconciler

from jobs import pod_server
from tests.fakes import prometheus
from tests.fakes.chart import Chart, find
from tests.fakes.fake_api import FakeApi
from tests.fakes.prometheus import ALERTS, DASHBOARDS, NAME, panel_queries
from tests.fakes.simulated_cluster import SETTINGS, manifest
from tests.fakes.waiting import wait_until
from vpmoe.api import pod_metrics
from vpmoe.api.metrics import Sample
from vpmoe.api.progress import Amount, Progress, ProgressCondition
from vpmoe.api.status import Condition, Status
from vpmoe.clock import now
from vpmoe.process.board import ProgressBoard
from vpmoe.process.exporter import MetricsExporter
from vpmoe.process.launcher import free_port

ROOT = Path(__file__).parents[3]
RULES = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
VARIABLES = {"namespace": "team", "run": "first"}
OF_PROCESS = {"process_resident_memory_bytes", "process_cpu_seconds_total"}
"""Metrics of prometheus_client."""
POD = 'namespace="team",pod="p",run="first",stage="onpolicy"'
LABELS = {
    "span": "final",
    "effort": "low",
    "reason": "rollouts",
    "kind": "Vanilla",
    "state": "scored",
    "validity": "valid",
    "unit": "tokens",
    "bound": "max",
    "type": "RouterCollapse",
}
"""A value for each label of a pod's metrics."""


def known_series() -> set[str]:
    """The names of all time series of pods and of the operator."""
    found = {name for metric in pod_metrics.METRICS for name in metric.series()} | OF_PROCESS
    for family in metrics.REGISTRY.collect():
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
        found |= {family.name + suffix for suffix in suffixes.get(family.type, ("",))}
    return found


def test_every_expression_parses_and_names_metrics_that_exist(
    tmp_path: Path, promtool: Callable[..., str]
) -> None:
    promtool("check", "rules", ALERTS)
    queries = [query for board in DASHBOARDS.values() for query in panel_queries(board, **VARIABLES)]
    rules = [{"record": f"q{n}", "expr": query.expression} for n, query in enumerate(queries)]
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboards", "rules": rules}]}))
    promtool("check", "rules", file)
    used = {name for query in queries for name in query.names}
    used |= {name for rule in RULES for name in NAME.findall(rule["expr"])}
    assert not used - known_series()


OPERATOR = 'namespace="vpmoe-system",pod="o"'
CONDITION = 'vpmoe_operator_run_condition{run_namespace="team",run="first",reason="R",type="%s"}'
WAIT = f'vpmoe_wait_seconds_total{{{POD},role="%s",reason="%s"}}'
OUTCOME = f'vpmoe_operator_reconciles_total{{{OPERATOR},outcome="%s"}}'
LEADS = {f"vpmoe_operator_leading{{{OPERATOR}}}": "1+0x120"}
"""Of every case: an operator leads."""
CASES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "VpmoeOperatorDown": (
        {f"vpmoe_operator_leading{{{OPERATOR}}}": "0+0x120"},
        {f'vpmoe_operator_leading{{{OPERATOR},instance="standby"}}': "0+0x120"},
    ),
    "VpmoeOperatorStuck": (
        {f"vpmoe_operator_queue_oldest_seconds{{{OPERATOR}}}": "0+300x120"},
        {f"vpmoe_operator_queue_oldest_seconds{{{OPERATOR}}}": "100+0x120"},
    ),
    "VpmoeReconcileErrors": (
        {OUTCOME % "done": "0+40x120", OUTCOME % "failed": "0+10x120"},
        {OUTCOME % "done": "0+495x120", OUTCOME % "failed": "0+5x120"},
    ),
    "VpmoeReconcileBug": (
        {OUTCOME % "done": "0+495x120", OUTCOME % "bug": "0+0x119 1"},
        {OUTCOME % "done": "0+495x120", OUTCOME % "bug": "1+0x120"},
    ),
    "VpmoeWatchSilent": (
        {f'vpmoe_operator_watch_age_seconds{{{OPERATOR},run_namespace="",resource="jobs"}}': "0+300x120"},
        {f'vpmoe_operator_watch_age_seconds{{{OPERATOR},run_namespace="",resource="jobs"}}': "30+0x120"},
    ),
    "VpmoeRunStalled": ({CONDITION % "Stalled": "1+0x120"}, {CONDITION % "Stalled": "1+0x118 stale"}),
    "VpmoeRunFailed": ({CONDITION % "Failed": "1+0x120"}, {CONDITION % "Other": "1+0x120"}),
    "VpmoeStepSilent": (
        {f'vpmoe_step_progress_timestamp_seconds{{{POD},role="train"}}': "0+0x120"},
        {f'vpmoe_step_progress_timestamp_seconds{{{POD},role="train"}}': "0+300x120"},
    ),
    "VpmoeTrainerStarved": (
        {WAIT % ("train", "rollouts"): "0+125x120", WAIT % ("train", "scores"): "0+125x120"},
        {
            WAIT % ("train", "rollouts"): "0+50x120",
            WAIT % ("train", "scores"): "0+50x120",
            WAIT % ("teacher", "rollouts"): "0+295x120",
        },
    ),
    "VpmoeSamplerStarved": (
        {WAIT % ("sampler", "weights"): "0+250x120"},
        {WAIT % ("sampler", "weights"): "0+100x120", WAIT % ("evaluate", "checkpoint"): "0+295x120"},
    ),
    "VpmoeRouterCollapsed": (
        {f'vpmoe_step_condition{{{POD},role="train",type="RouterCollapse",reason="DeadExpert"}}': "1+0x120"},
        {f'vpmoe_step_condition{{{POD},role="train",type="TrainerStarved",reason="R"}}': "1+0x120"},
    ),
    "VpmoeValidityCollapsed": (
        {f'vpmoe_train_window_valid_ratio{{{POD},role="train",effort="low"}}': "0.3+0x120"},
        {
            f'vpmoe_train_window_valid_ratio{{{POD},role="train",effort="low"}}': "0.3+0x120",
            f'vpmoe_train_window_valid_ratio{{{POD},role="train",effort="high"}}': "0.9+0x120",
        },
    ),
    "VpmoeReverseKlRising": (
        {f'vpmoe_train_reverse_kl_nats{{{POD},role="train",span="final"}}': "0.5+0x80 1+0x39"},
        {f'vpmoe_train_reverse_kl_nats{{{POD},role="train",span="final"}}': "1-0.005x120"},
    ),
    "VpmoeCheckpointRefused": (
        {f'vpmoe_step_condition{{{POD},role="train",type="CheckpointRefused",reason="Altered"}}': "1+0x120"},
        {f'vpmoe_step_condition{{{POD},role="train",type="RouterCollapse2",reason="R"}}': "1+0x120"},
    ),
}
"""Time series of ten hours, a value every five minutes, with which an alert fires, and does not."""


def test_each_alert_fires_when_it_should_and_not_otherwise(
    tmp_path: Path, promtool: Callable[..., str]
) -> None:
    assert CASES.keys() == {rule["alert"] for rule in RULES}
    tests = []
    for alert, (fires, quiet) in CASES.items():
        for name, values, expected in ((f"{alert} fires", fires, [alert]), (f"{alert} is quiet", quiet, [])):
            tests.append(
                {
                    "name": name,
                    "interval": "5m",
                    "input_series": [
                        {"series": one, "values": what} for one, what in {**LEADS, **values}.items()
                    ],
                    "promql_expr_test": [
                        {
                            "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                            "eval_time": "10h",
                            "exp_samples": [
                                {"labels": f'{{alertname="{one}"}}', "value": 1} for one in expected
                            ],
                        }
                    ],
                }
            )
    nothing = {
        "name": "no operator at all",
        "interval": "5m",
        "input_series": [{"series": "up", "values": "1+0x120"}],
        "alert_rule_test": [
            {
                "eval_time": "10h",
                "alertname": "VpmoeOperatorDown",
                "exp_alerts": [
                    {
                        "exp_labels": {"severity": "critical"},
                        "exp_annotations": next(
                            rule["annotations"] for rule in RULES if rule["alert"] == "VpmoeOperatorDown"
                        ),
                    }
                ],
            }
        ],
    }
    file = tmp_path / "alerts.test.yaml"
    document = {"rule_files": [str(ALERTS)], "evaluation_interval": "5m", "tests": [*tests, nothing]}
    file.write_text(yaml.safe_dump(document, sort_keys=False))
    promtool("test", "rules", file)


def test_each_alert_has_a_section_in_the_guide() -> None:
    guide = (ROOT / "docs/guides/monitor.md").read_text()
    assert re.findall(r"^### (Vpmoe\w+)$", guide, re.MULTILINE) == [rule["alert"] for rule in RULES]
    for rule in RULES:
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert rule["annotations"].keys() == {"summary", "description"}


def test_the_reference_lists_every_metric_with_its_type_and_labels() -> None:
    reference = (ROOT / "docs/reference/metrics.md").read_text()
    rows = re.findall(r"^\| `(vpmoe_\w+)(?:\{([\w,]+)\})?` \| (\w+) \| (.*) \|$", reference, re.MULTILINE)
    listed = {name: (kind, set(labels.split(",")) - {""}) for name, labels, kind, _ in rows}
    expected = {
        metric.name + ("_total" if metric.kind == "counter" else ""): (metric.kind, set(metric.labels))
        for metric in pod_metrics.METRICS
    }
    for family in metrics.REGISTRY.collect():
        if family.name.startswith("vpmoe_"):
            name = family.name + ("_total" if family.type == "counter" else "")
            expected[name] = (family.type, set(collector_labels(family.name)))
    assert listed == expected
    texts = {name.removesuffix("_total"): text for name, _, _, text in rows}
    assert {one.name: one.help for one in pod_metrics.METRICS}.items() <= texts.items()


def collector_labels(name: str) -> tuple[str, ...]:
    """The labels of one of the operator's metrics."""
    found = [one for one in vars(metrics).values() if getattr(one, "_name", None) == name]
    return tuple(found[0]._labelnames)


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_is_one_that_grafana_accepts(name: str) -> None:
    """The fields of Grafana's JSON model: https://grafana.com/docs/grafana/latest/dashboards/json-model/."""
    board: dict[str, Any] = DASHBOARDS[name]
    assert board["uid"] == f"vpmoe-{name}" and board["title"] and board["schemaVersion"] >= 36
    assert "id" not in board, "Grafana gives it"
    variables = {one["name"] for one in board["templating"]["list"]}
    source = {"type": "prometheus", "uid": "${datasource}"}
    ids, taken = [panel["id"] for panel in board["panels"]], set[tuple[int, int]]()
    assert len(set(ids)) == len(ids)
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["type"] in ("timeseries", "stat", "bargauge", "table") and panel["title"]
        assert panel["datasource"] == source and panel["fieldConfig"]["defaults"]["unit"]
        assert panel["targets"] and len({one["refId"] for one in panel["targets"]}) == len(panel["targets"])
        for target in panel["targets"]:
            assert target["datasource"] == source
            used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            assert used <= variables and "namespace" in used, panel["title"]
    for one in board["templating"]["list"]:
        if one["type"] == "query":
            assert set(NAME.findall(one["definition"])) <= known_series()
            assert one["query"]["query"] == one["definition"] and one["datasource"] == source


def test_the_chart_ships_alerts_and_dashboards_as_they_are(helm: Path) -> None:
    objects = Chart(helm).render({"monitoring": {"alerts": True, "dashboards": True}})
    assert find(objects, "PrometheusRule")["spec"] == yaml.safe_load(ALERTS.read_text())
    for name, board in DASHBOARDS.items():
        config = find(objects, "ConfigMap", f"-dashboard-{name}")
        assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert [json.loads(text) for text in config["data"].values()] == [board]


@pytest.fixture
def pod() -> Iterator[tuple[ProgressBoard, int]]:
    """The board of a pod, without numbers, and the port at which it is served."""
    board = ProgressBoard()
    board.metrics = MetricsExporter(run="first", stage="onpolicy", role="train")
    port = free_port()
    server = pod_server.serve(board, str(port))
    yield board, port
    server.shutdown()
    server.server_close()


@pytest.fixture
def operator() -> Iterator[int]:
    """The port of the operator's own server, which serves the metrics of this process."""
    port, loop = free_port(), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def call(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(30)

    runner = call(health.serve(port, lambda: "", lambda: "", lambda: None))
    yield port
    call(runner.cleanup())
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


def fill_pod(board: ProgressBoard) -> None:
    """One number for each metric. Counters grow with each call."""
    for metric in pod_metrics.METRICS:
        if metric is not pod_metrics.CONDITION:
            board.metrics.record([Sample(metric, 0.5, {name: LABELS[name] for name in metric.labels})])
    board.progress = Progress(
        step="onpolicy",
        attempt=1,
        state="Running",
        updated=now(),
        tokens=Amount(done=1, total=2),
        conditions=(ProgressCondition(type="RouterCollapse", status="True", reason="DeadExpert"),),
    )


def fill_operator() -> None:
    """A number for each metric that has none from the start, in the registry of this process."""
    metrics.LEADING.set(1)
    metrics.RUNS.labels("Running").set(1)
    metrics.RECONCILES.labels("done").inc()
    metrics.RECONCILE_SECONDS.observe(0.01)
    metrics.ADMISSION_SECONDS.observe(0.01)
    metrics.API_CALLS.labels("GET", "200").inc()
    metrics.WATCH_AGE.labels("jobs", "").set(1)
    failed = Condition(type="Failed", status="True", reason="StepFailed", last_transition_time=now())
    metrics.show_run("team", "first", Status(phase="Failed", conditions=(failed,)))


@pytest.mark.usefixtures("promtool")
def test_every_query_finds_time_series_in_a_scrape_of_pod_and_operator(
    tmp_path: Path, pod: tuple[ProgressBoard, int], operator: int
) -> None:
    """So no query asks for a label or a value that there is not."""
    board, port = pod
    targets = [
        prometheus.static("pods", {f"127.0.0.1:{port}": {"namespace": "team", "pod": "p"}}),
        prometheus.static("operator", {f"127.0.0.1:{operator}": {"namespace": "vpmoe-system", "pod": "o"}}),
    ]
    with prometheus.server(tmp_path, targets, interval=0.25) as it:
        began = time.time()
        for _ in range(3):
            fill_pod(board)
            fill_operator()
            it.wait_for_scrape()
        ended = time.time()
        run, of_operator = DASHBOARDS["run"], DASHBOARDS["operator"]
        empty = partial(prometheus.panels_without_data, it, start=began, end=ended)
        assert empty(run, **VARIABLES) == []
        assert empty(of_operator, namespace="vpmoe-system") == []
        assert len(empty(run, namespace="team", run="another")) > 30, "what it finds is of the run"
        wait_until(lambda: {"VpmoeRouterCollapsed", "VpmoeRunFailed"} <= it.firing(), "alerts fire")
    metrics.show_run("team", "first", None)


def test_a_run_that_has_failed_is_shown_until_it_is_deleted() -> None:
    api = FakeApi()
    kube = api.client()
    progress = PodProgress(lambda key, delay: None, 10)
    reconciler = Reconciler(kube, progress, SETTINGS, WatchedNamespaces(kube, ()))
    key = ("team", "first")

    def shown() -> set[tuple[str, str]]:
        (family,) = metrics.RUN_CONDITION.collect()
        return {(one.labels["type"], one.labels["reason"]) for one in family.samples}

    api.add(DISTILLRUN, manifest(stages=[]))
    asyncio.run(reconciler.reconcile(key))
    assert api.get(DISTILLRUN, *key)["status"]["phase"] == "Failed"
    assert shown() == {("Failed", "Invalid")}
    del api.objects[DISTILLRUN.path(*key)]
    asyncio.run(reconciler.reconcile(key))
    assert not shown()
