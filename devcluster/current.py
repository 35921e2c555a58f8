"""CLUSTER=current: the cluster of kubectl's current context. Its name is printed before the first request.

The user provides kubectl, helm, training operator and S3 store. Errors name what is missing; nothing is
installed.
"""

import os
import shutil
from pathlib import Path

from devcluster import ClusterError, host, say
from devcluster.access import S3, Cluster, call

KUBECONFIG = host.CHECKOUT / ".devcluster" / "current.kubeconfig"
"""A copy of the context at `up`: a later change of the current context does not affect a running test."""
PYTORCHJOBS = "pytorchjobs.kubeflow.org"


def up() -> Cluster:
    """The user's cluster. Raises ClusterError if it does not answer or does not know PyTorchJobs."""
    kubectl, helm, store = program("kubectl"), program("helm"), s3()
    # KUBECONFIG may be a list of files; it is passed on unchanged.
    users = Path(os.environ.get("KUBECONFIG") or Path.home() / ".kube" / "config")
    context = call([str(kubectl), "config", "current-context"], users).strip()
    pinned = call([str(kubectl), "config", "view", "--minify", "--flatten", "--raw"], users)
    server = call(
        [str(kubectl), "config", "view", "--minify", "--output=jsonpath={.clusters[0].cluster.server}"], users
    )
    say(f"CLUSTER=current: context {context} at {server}")
    KUBECONFIG.parent.mkdir(exist_ok=True)
    KUBECONFIG.touch(mode=0o600)
    KUBECONFIG.write_text(pinned)
    cluster = Cluster(KUBECONFIG, kubectl, helm, store)
    cluster.kubectl("get", "--raw=/readyz", "--request-timeout=10s")
    known = cluster.kubectl("get", "customresourcedefinitions", "--output=name")
    if PYTORCHJOBS not in known:
        raise ClusterError(
            f"context {context} has no {PYTORCHJOBS}: install the Kubeflow training operator (v1.9) first."
        )
    return cluster


def status() -> list[str]:
    cluster = up()
    return [cluster.kubectl("get", "nodes").rstrip()]


def program(name: str) -> Path:
    found = shutil.which(name)
    if not found:
        raise ClusterError(f"CLUSTER=current uses your {name}, and it is not on PATH.")
    return Path(found)


def s3() -> S3:
    names = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    if missing := [name for name in names if not os.environ.get(name)]:
        raise ClusterError(
            f"CLUSTER=current needs an S3 store that the host and pods can reach: set {', '.join(missing)}."
        )
    return S3(*(os.environ[name] for name in names))
