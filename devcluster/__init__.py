"""A real single-node Kubernetes in namespaces of its own, with Kubeflow's training operator, an S3 store and eight advertised GPUs.

`python -m devcluster up|down|status`, or `devcluster.cluster` from Python. Nothing here imitates Kubernetes and nothing of
the product knows of it: what runs on it goes through helm, kubectl and S3 like on any other cluster. docs/devcluster.md is its runbook.
"""

import sys


class ClusterError(RuntimeError):
    """The cluster cannot be had, or a command against it failed. The message says what to do."""


def say(line: str) -> None:
    """Tell the user what is happening, on stderr: stdout carries only what a shell may evaluate."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
