"""Selects the cluster of the demonstration and the end-to-end tests by the environment variable CLUSTER.

`dev` (the default) is the cluster that this package compiles, `kind` a node in Docker, `current` that of
kubectl's current context. KUBECONFIG is ignored for the first two.
"""

import os
from pathlib import Path
from typing import Protocol

from devcluster import ClusterError, current, dev, kind
from devcluster.access import S3, Cluster

__all__ = ["S3", "Cluster", "choice", "down", "helm", "status", "up"]


class Provider(Protocol):
    """A module that provides a cluster. Its functions raise ClusterError with the remedy."""

    def up(self) -> Cluster:
        """The cluster, started if needed."""

    def down(self) -> None:
        """End the cluster and remove its state and its S3 data."""

    def status(self) -> list[str]:
        """Status lines."""

    def helm(self) -> Path:
        """The cluster's helm, found or compiled without the cluster."""


PROVIDERS: dict[str, Provider] = {"dev": dev, "kind": kind, "current": current}


def up() -> Cluster:
    """The selected cluster, started if needed. Raises ClusterError with the remedy."""
    return selected().up()


def down() -> None:
    """End the selected cluster and remove its state and its S3 data. Refuses a user's cluster."""
    selected().down()


def status() -> list[str]:
    """Status lines of the selected cluster. Raises ClusterError if there is none."""
    return selected().status()


def helm() -> Path:
    """The helm of the selected cluster, compiled if needed."""
    return selected().helm()


def choice() -> str:
    """The value of CLUSTER. Raises ClusterError for an unknown one."""
    chosen = os.environ.get("CLUSTER") or "dev"
    if chosen not in PROVIDERS:
        raise ClusterError(
            f"CLUSTER={chosen}: choose dev (compiled and run by this repository, the default), "
            "kind (a node in Docker) or current (kubectl's context)."
        )
    return chosen


def selected() -> Provider:
    return PROVIDERS[choice()]
