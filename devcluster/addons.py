"""Installs cluster DNS, the Kubeflow training operator and the advertised GPUs, and waits until they work.

The training operator's manifests come with its Go module; manifests/kubeflow.yaml patches them. install.py
installs the product's chart.
"""

import json
import os
import shutil
import time
from pathlib import Path

from devcluster import ClusterError, certificates
from devcluster.access import Cluster
from devcluster.configuration import GPUS, NODE_NAME

MANIFESTS = Path(__file__).parent / "manifests"
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
    return {path.name: path.read_text() for path in sorted(MANIFESTS.iterdir())} | {"gpus": str(GPUS)}


def render(cluster: Cluster, kubeflow: Path, folder: Path) -> str:
    """All manifests as one YAML stream. `kubeflow` is the manifests folder of the operator's module."""
    certificates.make_webhook(folder)
    # kustomize requires a relative path
    overlay = os.path.relpath((kubeflow / "overlays" / "standalone").resolve(), folder.resolve())
    patches = (MANIFESTS / "kubeflow.yaml").read_text()
    (folder / "kustomization.yaml").write_text(f"{patches}resources: [{json.dumps(overlay)}]\n")
    shutil.copy(MANIFESTS / "initContainer.yaml", folder)
    return f"{cluster.kubectl('kustomize', str(folder))}---\n{(MANIFESTS / 'coredns.yaml').read_text()}"


def install(cluster: Cluster, manifests: str) -> None:
    """Create everything, and wait until the cluster accepts PyTorchJobs and has its GPUs."""
    cluster.kubectl("create", "--filename=-", input=manifests)
    cluster.kubectl("wait", "--for=create", f"node/{NODE_NAME}", "--timeout=60s")
    advertise_gpus(cluster)
    cluster.kubectl("wait", "--for=condition=Ready", f"node/{NODE_NAME}", "--timeout=60s")
    cluster.kubectl(
        "wait",
        f"--for=jsonpath={{.status.allocatable.nvidia\\.com/gpu}}={GPUS}",
        f"node/{NODE_NAME}",
        "--timeout=60s",
    )
    for namespace, name in (("kube-system", "coredns"), ("kubeflow", "training-operator")):
        cluster.kubectl("--namespace", namespace, "rollout", "status", f"deployment/{name}", "--timeout=300s")
    probe_webhook(cluster, time.monotonic() + 30)


def probe_webhook(cluster: Cluster, deadline: float) -> None:
    """Wait until the webhook accepts a PyTorchJob: its pod is ready before its service is reachable."""
    while True:
        try:
            cluster.kubectl("create", "--dry-run=server", "--filename=-", input=PROBE)
        except ClusterError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


def advertise_gpus(cluster: Cluster) -> None:
    """Patch extended resources into the node's status. Allocatable too: the kubelet would copy it seconds
    later."""
    paths = ("/status/capacity/nvidia.com~1gpu", "/status/allocatable/nvidia.com~1gpu")
    patch = [{"op": "add", "path": path, "value": str(GPUS)} for path in paths]
    cluster.kubectl(
        "patch", "node", NODE_NAME, "--subresource=status", "--type=json", f"--patch={json.dumps(patch)}"
    )
