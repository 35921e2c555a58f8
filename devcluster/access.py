"""Access to a running cluster: kubectl, helm and the S3 store."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from devcluster import ClusterError, needs
from devcluster.configuration import NODE


@dataclass(frozen=True)
class S3:
    """A store. The host and pods reach it at the same address."""

    endpoint: str
    access_key: str
    secret_key: str


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    kubeconfig: Path
    kubectl_path: Path
    helm_path: Path
    s3: S3

    def kubectl(self, *arguments: str, input: str | None = None) -> str:
        """Runs kubectl; returns its stdout. Raises ClusterError with its stderr."""
        return call([str(self.kubectl_path), *arguments], self.kubeconfig, input)

    def helm(self, *arguments: str, input: str | None = None) -> str:
        """Runs helm; returns its stdout. Raises ClusterError with its stderr."""
        return call([str(self.helm_path), *arguments], self.kubeconfig, input)


def call(command: list[str], kubeconfig: Path, input: str | None = None) -> str:
    direct = ",".join(filter(None, (os.environ.get("NO_PROXY"), NODE)))  # a proxy does not lead to the node
    environment = {**os.environ, "KUBECONFIG": str(kubeconfig), "NO_PROXY": direct}
    ended = subprocess.run(command, env=environment, input=input, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        shown = " ".join([Path(command[0]).name, *command[1:]])
        raise ClusterError(
            f"{shown}: status {ended.returncode}: {needs.last_lines(ended.stderr or ended.stdout, 8)}"
        )
    return ended.stdout
