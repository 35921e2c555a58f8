"""Selects the cluster of the demonstration and the tests by the environment variable CLUSTER.

`dev` (the default) is this package's cluster; `current` is that of kubectl's current context. KUBECONFIG is
ignored for `dev`.
"""

import os

from devcluster import ClusterError, current, dev
from devcluster.access import S3, Cluster

__all__ = ["S3", "Cluster", "down", "status", "up"]


def up() -> Cluster:
    """The selected cluster, started if needed. Raises ClusterError with the remedy."""
    return current.up() if choice() == "current" else dev.up()


def down() -> None:
    """End the development cluster and remove its state and its S3 data. Refuses a user's cluster."""
    if choice() == "current":
        raise ClusterError(
            "CLUSTER=current is your own cluster, down does not touch it. "
            "Unset CLUSTER to end the development cluster."
        )
    dev.down()


def status() -> list[str]:
    """Status lines of the selected cluster. Raises ClusterError if there is none."""
    return current.status() if choice() == "current" else dev.status()


def choice() -> str:
    """The value of CLUSTER. Raises ClusterError for an unknown one."""
    chosen = os.environ.get("CLUSTER") or "dev"
    if chosen == "kind":
        raise ClusterError(
            "CLUSTER=kind is not available yet: it needs images. Use CLUSTER=dev or CLUSTER=current."
        )
    if chosen not in ("dev", "current"):
        raise ClusterError(
            f"CLUSTER={chosen}: dev (this repository's own, the default) or current (kubectl's context)."
        )
    return chosen
