"""Installs the operator on the selected cluster, with helm, as a user does."""

from devcluster.access import Cluster
from devcluster.configuration import OPERATOR_NAMESPACE

NAMESPACE = OPERATOR_NAMESPACE
SECRET = "vpmoe-s3"


def arguments(cluster: Cluster) -> list[str]:
    """The arguments of helm that install the operator or upgrade it."""
    return [
        *("upgrade", "--install", "distill-operator", "charts/distill-operator"),
        *("--namespace", NAMESPACE, "--create-namespace"),
        *cluster.chart_arguments,
        *("--wait", "--timeout", "2m"),
    ]


def operator(cluster: Cluster) -> None:
    """Install or upgrade the operator and wait until it is ready."""
    cluster.helm(*arguments(cluster))


def credentials(cluster: Cluster, namespace: str) -> None:
    """Create the Secret that runs name in storage.credentialsSecret."""
    manifest = cluster.kubectl(
        "create",
        "secret",
        "generic",
        SECRET,
        "--namespace",
        namespace,
        "--dry-run=client",
        "--output=yaml",
        f"--from-literal=AWS_ACCESS_KEY_ID={cluster.s3.access_key}",
        f"--from-literal=AWS_SECRET_ACCESS_KEY={cluster.s3.secret_key}",
    )
    cluster.kubectl("apply", "--filename", "-", input=manifest)
