"""Prometheus metrics of the operator, in their own registry.

docs/reference/metrics.md has the same list. The label of a run's namespace is run_namespace: Prometheus adds
`namespace` when it scrapes, which is the operator's own.
"""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)

from vpmoe.api.status import Status

disable_created_metrics()  # type: ignore[no-untyped-call]  # they would say when the process started
REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)

RECONCILES = Counter(
    "vpmoe_operator_reconciles", "Reconciles of a DistillRun, by outcome.", ["outcome"], registry=REGISTRY
)
RECONCILE_SECONDS = Histogram(
    "vpmoe_operator_reconcile_seconds", "Duration of a reconcile of one DistillRun.", registry=REGISTRY
)
ADMISSION_SECONDS = Histogram(
    "vpmoe_operator_admission_seconds",
    "Time to read nodes and pods and to decide about every run that waits for GPUs.",
    registry=REGISTRY,
)
API_CALLS = Counter(
    "vpmoe_operator_api_calls",
    "Requests to the API server, by method and status code (0: no answer).",
    ["method", "code"],
    registry=REGISTRY,
)
QUEUE_DEPTH = Gauge("vpmoe_operator_queue_depth", "Runs that are due or being reconciled.", registry=REGISTRY)
QUEUE_AGE = Gauge(
    "vpmoe_operator_queue_oldest_seconds",
    "Seconds that the oldest due run has waited.",
    registry=REGISTRY,
)
PROGRESS_FAILURES = Counter(
    "vpmoe_operator_progress_failures",
    "Failed reads of a step's progress from a pod, by reason.",
    ["reason"],
    registry=REGISTRY,
)
NAMESPACE_ERRORS = Counter(
    "vpmoe_operator_namespace_errors",
    "Failed reads of a watched namespace, by status code (0: no answer).",
    ["run_namespace", "code"],
    registry=REGISTRY,
)
RUNS = Gauge("vpmoe_operator_runs", "DistillRuns by phase, at the last resync.", ["phase"], registry=REGISTRY)
LEADING = Gauge("vpmoe_operator_leading", "1 while this process holds the lease.", registry=REGISTRY)
WATCH_AGE = Gauge(
    "vpmoe_operator_watch_age_seconds",
    "Seconds since the last sign of life of a watch; an empty namespace is all namespaces.",
    ["resource", "run_namespace"],
    registry=REGISTRY,
)
WATCH_RESTARTS = Counter(
    "vpmoe_operator_watch_restarts",
    "Watches that were started again, by reason: Ended, Silent, or Served (a resource was installed).",
    ["run_namespace", "reason"],
    registry=REGISTRY,
)
RUN_CONDITION = Gauge(
    "vpmoe_operator_run_condition",
    "1 for each run that is Stalled or Failed, by the condition's reason, since this process reconciled it.",
    ["run_namespace", "run", "type", "reason"],
    registry=REGISTRY,
)
for outcome in ("done", "failed", "bug"):  # from no time series to 1 is no increase for Prometheus
    RECONCILES.labels(outcome)

SHOWN = ("Stalled", "Failed")
"""Types of the conditions that need somebody."""


def show_run(namespace: str, name: str, status: Status | None) -> None:
    """Show the conditions of a run; None: it was deleted, or cannot be read any more."""
    RUN_CONDITION.remove_by_labels({"run_namespace": namespace, "run": name})
    for condition in status.conditions if status else ():
        if condition.type in SHOWN and condition.status == "True":
            RUN_CONDITION.labels(namespace, name, condition.type, condition.reason).set(1)
