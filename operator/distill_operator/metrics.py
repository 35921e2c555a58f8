"""Prometheus metrics of the operator, in their own registry."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

REGISTRY = CollectorRegistry()

RECONCILES = Counter(
    "vpmoe_operator_reconciles", "Reconciles of a DistillRun, by outcome.", ["outcome"], registry=REGISTRY
)
RECONCILE_SECONDS = Histogram(
    "vpmoe_operator_reconcile_seconds", "Duration of a reconcile of one DistillRun.", registry=REGISTRY
)
API_CALLS = Counter(
    "vpmoe_operator_api_calls",
    "Requests to the API server, by method and status code (0: no answer).",
    ["method", "code"],
    registry=REGISTRY,
)
QUEUE_DEPTH = Gauge(
    "vpmoe_operator_queue_depth", "Runs that are queued or being reconciled.", registry=REGISTRY
)
QUEUE_AGE = Gauge(
    "vpmoe_operator_queue_oldest_seconds",
    "Seconds that the oldest due run has waited.",
    registry=REGISTRY,
)
STORAGE_FAILURES = Counter(
    "vpmoe_operator_storage_failures",
    "Failed reads of a bucket, by reason.",
    ["reason"],
    registry=REGISTRY,
)
RUNS = Gauge("vpmoe_operator_runs", "DistillRuns by phase, at the last resync.", ["phase"], registry=REGISTRY)
LEADING = Gauge("vpmoe_operator_leading", "1 while this process holds the lease.", registry=REGISTRY)
