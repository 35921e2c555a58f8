"""What a process shows to others while it works: its latest progress, and its metrics.

The work publishes here, and never waits. jobs/pod_server.py serves it.
"""

from dataclasses import dataclass, field

from vpmoe.api.progress import Progress
from vpmoe.process.exporter import MetricsExporter


@dataclass
class ProgressBoard:
    """The board of one process. Threads may share it: a reader sees the old value or the new one."""

    progress: Progress | None = None
    """The latest progress of the step that this process knows; None before the first."""
    metrics: MetricsExporter = field(default_factory=MetricsExporter)
    """The metrics for Prometheus."""
