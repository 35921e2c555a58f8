"""Installs the operator on the development cluster, with helm and the chart's development values."""

import hashlib
from pathlib import Path

from devcluster.cluster import Cluster
from vpmoe.provenance import git_sha

ROOT = Path(__file__).parent.parent
NAMESPACE = "vpmoe-system"
SECRET = "vpmoe-s3"


def sources_hash() -> str:
    """sha256 of the operator's sources. Pods mount the checkout, so an edit must restart the operator."""
    digest = hashlib.sha256()
    for folder in ("operator/distill_operator", "vpmoe/api", "vpmoe/storage"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def operator(cluster: Cluster) -> list[str]:
    """Install or upgrade the operator and wait until it is ready. Returns helm's arguments."""
    arguments = [
        "upgrade",
        "--install",
        "distill-operator",
        "charts/distill-operator",
        "--namespace",
        NAMESPACE,
        "--create-namespace",
        "--values",
        "charts/distill-operator/values-dev.yaml",
        "--set-string",
        f"gitSha={git_sha() or ''}",
        "--set-string",
        rf"podAnnotations.vpmoe\.dev/sources={sources_hash()[:16]}",
        "--wait",
        "--timeout",
        "2m",
    ]
    cluster.helm(*arguments)
    return arguments


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
