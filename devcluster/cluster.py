"""The cluster that the demonstration and the tests run on, whichever it is.

CLUSTER chooses, whatever KUBECONFIG says: `dev` (the default) is this package's own, `current` is the one that the user's kubectl talks
to. Code that holds a Cluster knows no difference.
"""

import os

from devcluster import ClusterError, current, dev
from devcluster.access import S3, Cluster

__all__ = ["S3", "Cluster", "down", "status", "up"]


def up() -> Cluster:
    """The chosen cluster, started if it is ours and not running. Raises ClusterError with the remedy where it cannot be had."""
    return current.up() if choice() == "current" else dev.up()


def down() -> None:
    """End the development cluster and remove all of it, the store's data included. A cluster of the user's is never touched."""
    if choice() == "current":
        raise ClusterError(
            "CLUSTER=current is your own cluster, down does not touch it. Unset CLUSTER to end the development cluster."
        )
    dev.down()


def status() -> list[str]:
    """A few lines on the chosen cluster. Raises ClusterError where there is none."""
    return current.status() if choice() == "current" else dev.status()


def choice() -> str:
    """What CLUSTER says. Raises ClusterError for what it cannot say."""
    chosen = os.environ.get("CLUSTER") or "dev"
    if chosen == "kind":
        raise ClusterError(
            "CLUSTER=kind is not available yet: it needs the images of docker/. Use CLUSTER=dev or CLUSTER=current."
        )
    if chosen not in ("dev", "current"):
        raise ClusterError(
            f"CLUSTER={chosen}: dev (this repository's own, the default) or current (kubectl's current context)."
        )
    return chosen
