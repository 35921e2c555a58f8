"""CLUSTER=current: the cluster of kubectl's current context. Its name is printed before the first request.

The user provides kubectl, helm, training operator, S3 store, and images in a registry that the cluster can
pull from. Errors name what is missing; only the operator is installed.
"""

import os
from pathlib import Path

from devcluster import ClusterError, host, say
from devcluster.access import S3, Cluster, call, program

KUBECONFIG = host.CHECKOUT / ".devcluster" / "current.kubeconfig"
"""A copy of the context at `up`: a later change of the current context does not affect a running test."""
PYTORCHJOBS = "pytorchjobs.kubeflow.org"


def up() -> Cluster:
    """The user's cluster. Raises ClusterError if it does not answer or does not know PyTorchJobs."""
    kubectl, helm_path, store, images = program("kubectl"), helm(), s3(), chart_arguments()
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
    cluster = Cluster(KUBECONFIG, kubectl, helm_path, store, images)
    cluster.kubectl("get", "--raw=/readyz", "--request-timeout=10s")
    known = cluster.kubectl("get", "customresourcedefinitions", "--output=name")
    if PYTORCHJOBS not in known:
        raise ClusterError(
            f"context {context} has no {PYTORCHJOBS}: install the Kubeflow training operator (v1.9) first."
        )
    return cluster


def down() -> None:
    raise ClusterError(
        "CLUSTER=current is your own cluster, down does not touch it. "
        "Unset CLUSTER to end the development cluster."
    )


def status() -> list[str]:
    cluster = up()
    return [cluster.kubectl("get", "nodes").rstrip()]


def helm() -> Path:
    return program("helm")


def s3() -> S3:
    names = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    if missing := [name for name in names if not os.environ.get(name)]:
        raise ClusterError(
            f"CLUSTER=current needs an S3 store that the host and pods can reach: set {', '.join(missing)}."
        )
    endpoint, access_key, secret_key = (os.environ[name] for name in names)
    return S3(endpoint, access_key, secret_key, pod_endpoint=endpoint)


def chart_arguments() -> tuple[str, ...]:
    """The images that REGISTRY and TAG name, as for `make images`."""
    names = ("REGISTRY", "TAG")
    if missing := [name for name in names if not os.environ.get(name)]:
        raise ClusterError(
            f"CLUSTER=current needs images that the cluster can pull: set {' and '.join(missing)} to those "
            "that you built with `make images` and pushed."
        )
    registry, tag = (os.environ[name] for name in names)
    return ("--set", f"images.registry={registry}", "--set", f"images.tag={tag}")
