"""Installs the Kubeflow training operator, other manifests and advertised GPUs, and waits until they work.

The training operator's manifests come with its Go module; manifests/kubeflow.yaml patches them. install.py
installs the product's chart.
"""

import json
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from devcluster import ClusterError, certificates
from devcluster.access import Cluster
from devcluster.configuration import GPUS, NODE_NAME

MANIFESTS = Path(__file__).parent / "manifests"
DEPLOYMENTS = (("kube-system", "coredns"), ("kubeflow", "training-operator"))
"""Namespace and name of the Deployments that every cluster has."""
PROBE = """
apiVersion: kubeflow.org/v1
kind: PyTorchJob
metadata: {name: probe, namespace: default}
spec:
  pytorchReplicaSpecs:
    Master:
      replicas: 1
      template: {spec: {containers: [{name: pytorch, image: none}]}}
"""


def sources() -> dict[str, str]:
    """Everything that determines the add-ons, by name, except the programs."""
    return {path.name: path.read_text() for path in sorted(MANIFESTS.glob("*.yaml"))} | {"gpus": str(GPUS)}


def render(
    cluster: Cluster, kubeflow: Path, folder: Path, others: Iterable[Path], compiled_images: bool
) -> str:
    """All manifests as one YAML stream.

    `kubeflow` is the manifests folder of the operator's module, `folder` is created for the intermediate
    files, `others` are further manifests. With `compiled_images` the images are those of this package's
    compiled programs instead of the projects' own.
    """
    certificates.make_webhook(folder, "training-operator-ca", "training-operator", "kubeflow")
    # kustomize requires a relative path
    overlay = os.path.relpath((kubeflow / "overlays" / "standalone").resolve(), folder.resolve())
    kustomization = kustomize(overlay, [path.name for path in others], compiled_images)
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    for path in (*others, MANIFESTS / "initContainer.yaml"):
        shutil.copy(path, folder)
    return cluster.kubectl("kustomize", str(folder))


def kustomize(overlay: str, others: list[str], compiled_images: bool) -> dict[str, Any]:
    """The kustomization of the training operator's overlay and other manifests."""
    document: dict[str, Any] = yaml.safe_load((MANIFESTS / "kubeflow.yaml").read_text())
    document["resources"] = [overlay, *others]
    if compiled_images:
        images = yaml.safe_load((MANIFESTS / "compiled-images.yaml").read_text())
        document["images"] = images["images"]
        document["patches"] += images["patches"]
    return document


def install(
    cluster: Cluster,
    manifests: str,
    node: str = NODE_NAME,
    deployments: Iterable[tuple[str, str]] = DEPLOYMENTS,
) -> None:
    """Create everything, and wait until the cluster accepts PyTorchJobs and has its GPUs."""
    cluster.kubectl("create", "--filename=-", input=manifests)
    cluster.kubectl("wait", "--for=create", f"node/{node}", "--timeout=60s")
    advertise_gpus(cluster, node)
    cluster.kubectl("wait", "--for=condition=Ready", f"node/{node}", "--timeout=60s")
    cluster.kubectl(
        "wait",
        f"--for=jsonpath={{.status.allocatable.nvidia\\.com/gpu}}={GPUS}",
        f"node/{node}",
        "--timeout=60s",
    )
    for namespace, name in deployments:
        cluster.kubectl("--namespace", namespace, "rollout", "status", f"deployment/{name}", "--timeout=300s")
    wait_until_accepted(cluster, PROBE, time.monotonic() + 30)


def wait_until_accepted(cluster: Cluster, manifest: str, deadline: float) -> None:
    """Wait until the API server accepts an object: a webhook's pod is ready before its service is
    reachable."""
    while True:
        try:
            cluster.kubectl("create", "--dry-run=server", "--filename=-", input=manifest)
        except ClusterError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


def advertise_gpus(cluster: Cluster, node: str = NODE_NAME) -> None:
    """Patch extended resources into the node's status. Allocatable too: the kubelet would copy it seconds
    later."""
    paths = ("/status/capacity/nvidia.com~1gpu", "/status/allocatable/nvidia.com~1gpu")
    patch = [{"op": "add", "path": path, "value": str(GPUS)} for path in paths]
    cluster.kubectl(
        "patch", "node", node, "--subresource=status", "--type=json", f"--patch={json.dumps(patch)}"
    )
