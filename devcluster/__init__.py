"""A single-node Kubernetes, with Kubeflow's training operator, an S3 store and eight GPUs: compiled, in Linux
namespaces (dev.py), or by kind, in Docker (kind.py).

Use `python -m devcluster up|down|status`, or `devcluster.cluster` from Python. The Kubernetes is real; the
GPUs are only advertised. The product does not know these clusters: it uses helm, kubectl and S3, as on any
other.
"""

import sys


class ClusterError(RuntimeError):
    """The cluster cannot be provided, or a command on it failed. The message names the remedy."""


def say(line: str) -> None:
    """Print a line to stderr. Only what a shell may evaluate goes to stdout."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
