"""Prometheus metrics of the operator, in their own registry."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

REGISTRY = CollectorRegistry()

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
    ["namespace", "code"],
    registry=REGISTRY,
)
RUNS = Gauge("vpmoe_operator_runs", "DistillRuns by phase, at the last resync.", ["phase"], registry=REGISTRY)
LEADING = Gauge("vpmoe_operator_leading", "1 while this process holds the lease.", registry=REGISTRY)
WATCH_AGE = Gauge(
    "vpmoe_operator_watch_age_seconds",
    "Seconds since the last sign of life of a watch; an empty namespace is all namespaces.",
    ["resource", "namespace"],
    registry=REGISTRY,
)
WATCH_RESTARTS = Counter(
    "vpmoe_operator_watch_restarts",
    "Watches that were started again, by reason: Ended, Silent, or Served (a resource was installed).",
    ["namespace", "reason"],
    registry=REGISTRY,
)
