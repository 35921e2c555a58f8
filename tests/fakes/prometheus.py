"""Prometheus and promtool of Debian's package: a server with a data folder of its own that scrapes given
addresses, and the queries of the chart's dashboards."""

import json
import os
import re
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from devcluster import needs
from tests.fakes import chart
from tests.fakes.waiting import wait_until
from vpmoe.process.launcher import free_port

WITH_GPUS = {"vpmoe_gpu_utilisation_ratio", "vpmoe_gpu_memory_free_bytes"}
"""Metrics that pods have only with GPUs."""
NAME = re.compile(r"\b(?:vpmoe|process)_[a-z_]+")
"""The name of a time series, in an expression."""
ALERTS = chart.FOLDER / "alerts.yaml"
DASHBOARDS = {path.stem: json.loads(path.read_text()) for path in chart.FOLDER.glob("dashboards/*.json")}


def install() -> None:
    """Install Debian's package if its programs are missing and this is root.

    Raises ClusterError, which names the package, if it cannot.
    """
    needs.packages({"prometheus": "prometheus", "promtool": "prometheus"})


def promtool(*arguments: str | Path) -> str:
    """What promtool prints; fails with that if it finds a fault."""
    ended = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@dataclass(frozen=True)
class Query:
    """One query of a dashboard."""

    panel: str
    expression: str

    @property
    def names(self) -> set[str]:
        """The names of its time series."""
        return set(NAME.findall(self.expression))


def panel_queries(dashboard: Mapping[str, Any], interval: float = 30, **variables: str) -> list[Query]:
    """The queries of all panels, with the dashboard's variables replaced. `interval`: seconds between two
    scrapes, of which Grafana makes $__rate_interval four times as many."""
    found = []
    values = {**variables, "__rate_interval": f"{int(4000 * interval)}ms"}
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"]
            for name, value in values.items():
                expression = expression.replace(f"${name}", value)
            found.append(Query(panel["title"], expression))
    return found


class Prometheus:
    """A running server."""

    def __init__(self, url: str, interval: float) -> None:
        """`interval`: seconds between two scrapes."""
        self._url = url
        self.interval = interval

    def get(self, path: str, **parameters: Any) -> Any:
        """The data of an answer of the HTTP API. Fails with the server's message."""
        where = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(where, timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def series(self, expression: str, start: float, end: float) -> list[dict[str, Any]]:
        """The time series of a query between two times, as a dashboard asks for them."""
        step = max(self.interval, (end - start) / 1000)
        return list(self.get("query_range", query=expression, start=start, end=end, step=step)["result"])

    def firing(self) -> set[str]:
        """The names of the alerts that are firing."""
        alerts = self.get("alerts")["alerts"]
        return {one["labels"]["alertname"] for one in alerts if one["state"] == "firing"}

    def targets(self) -> list[dict[str, Any]]:
        """What it scrapes, with the health of each."""
        return list(self.get("targets")["activeTargets"])

    def wait_for_scrape(self) -> None:
        """Return when it has scraped every target once more from now on. Fails if one is not up."""
        began = datetime.now(UTC)

        def scraped() -> bool:
            times = [datetime.fromisoformat(target["lastScrape"]) for target in self.targets()]
            return bool(times) and min(times) > began

        wait_until(scraped, "one more scrape", 60)
        assert all(target["health"] == "up" for target in self.targets()), self.targets()


@contextmanager
def server(
    folder: Path, scrape_configs: Sequence[Mapping[str, Any]], interval: float
) -> Iterator[Prometheus]:
    """A server that scrapes this every `interval` seconds, with its configuration, data and log in `folder`,
    and the chart's alerts. Tests that start one use the fixture `promtool`."""
    seconds = f"{int(interval * 1000)}ms"
    document = {
        "global": {
            "scrape_interval": seconds,
            "scrape_timeout": seconds,
            "evaluation_interval": "1s",
        },
        "rule_files": [str(ALERTS)],
        "scrape_configs": list(scrape_configs),
    }
    file = folder / "prometheus.yaml"
    file.write_text(yaml.safe_dump(document))
    promtool("check", "config", file)
    url = f"http://127.0.0.1:{(port := free_port())}"
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={file}",
                f"--storage.tsdb.path={folder / 'prometheus'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stderr=log,
            env={**os.environ, "NO_PROXY": "*"},  # what it scrapes is here, or in the cluster
        )
        try:
            wait_until(lambda: is_ready(url), "Prometheus is ready", 60)
            yield Prometheus(url, interval)
        finally:
            process.kill()
            process.wait()


def is_ready(url: str) -> bool:
    """Whether a server answers queries."""
    try:
        urllib.request.urlopen(f"{url}/-/ready", timeout=1).close()
    except OSError:
        return False
    return True


def static(name: str, targets: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """A scrape configuration of addresses, with the labels that a PodMonitor or ServiceMonitor would add."""
    return {
        "job_name": name,
        "static_configs": [{"targets": [where], "labels": dict(labels)} for where, labels in targets.items()],
    }


def panels_without_data(
    prometheus: Prometheus, dashboard: Mapping[str, Any], start: float, end: float, **variables: str
) -> list[Query]:
    """The queries of a dashboard that return no time series with a number between two times."""
    return [
        query
        for query in panel_queries(dashboard, prometheus.interval, **variables)
        if not any(
            value != "NaN"
            for series in prometheus.series(query.expression, start, end)
            for _, value in series["values"]
        )
    ]
