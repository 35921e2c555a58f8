"""Access to a running cluster: kubectl, helm and the S3 store."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from devcluster import ClusterError, needs
from devcluster.configuration import NODE


@dataclass(frozen=True)
class S3:
    """A store."""

    endpoint: str
    """Its address from the host."""
    access_key: str
    secret_key: str
    pod_endpoint: str
    """Its address from pods, which runs name in storage.endpoint."""


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    kubeconfig: Path
    kubectl_path: Path
    helm_path: Path
    s3: S3
    chart_arguments: tuple[str, ...]
    """Arguments of helm that name the images of the operator and of the jobs on this cluster."""

    def kubectl(self, *arguments: str, input: str | None = None) -> str:
        """Runs kubectl; returns its stdout. Raises ClusterError with its stderr."""
        return call([str(self.kubectl_path), *arguments], self.kubeconfig, input)

    def helm(self, *arguments: str, input: str | None = None) -> str:
        """Runs helm; returns its stdout. Raises ClusterError with its stderr."""
        return call([str(self.helm_path), *arguments], self.kubeconfig, input)


def environment(kubeconfig: Path) -> dict[str, str]:
    """Environment of a program that reads this kubeconfig."""
    direct = ",".join(filter(None, (os.environ.get("NO_PROXY"), NODE)))  # a proxy does not lead to the node
    return {**os.environ, "KUBECONFIG": str(kubeconfig), "NO_PROXY": direct}


def call(command: list[str], kubeconfig: Path, input: str | None = None) -> str:
    ended = subprocess.run(
        command, env=environment(kubeconfig), input=input, capture_output=True, text=True, check=False
    )
    if ended.returncode != 0:
        shown = " ".join([Path(command[0]).name, *command[1:]])
        raise ClusterError(
            f"{shown}: status {ended.returncode}: {needs.last_lines(ended.stderr or ended.stdout, 8)}"
        )
    return ended.stdout


def program(name: str) -> Path:
    """A program of the user's, for a cluster that does not bring its own. Raises ClusterError."""
    found = shutil.which(name)
    if not found:
        raise ClusterError(
            f"CLUSTER={os.environ.get('CLUSTER')} uses your {name}, and it is not on PATH: install it."
        )
    return Path(found)
