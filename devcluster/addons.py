"""What is installed on the fresh control plane: cluster DNS, the Kubeflow training operator, eight advertised GPUs; and waiting for them.

The training operator's manifests are its module's own, patched by manifests/kubeflow.yaml. The product's chart is not installed here.
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
    """All that decides what is installed, by name, apart from the programs."""
    return {path.name: path.read_text() for path in sorted(MANIFESTS.iterdir())} | {"gpus": str(GPUS)}


def render(cluster: Cluster, kubeflow: Path, folder: Path) -> str:
    """All manifests as one YAML stream. `kubeflow` is the module's manifests folder; kustomize wants it relative to `folder`."""
    folder.mkdir()
    overlay = os.path.relpath((kubeflow / "overlays" / "standalone").resolve(), folder.resolve())
    patches = (MANIFESTS / "kubeflow.yaml").read_text()
    (folder / "kustomization.yaml").write_text(f"{patches}resources: [{json.dumps(overlay)}]\n")
    shutil.copy(MANIFESTS / "initContainer.yaml", folder)
    certificates.make_webhook(folder)
    return f"{cluster.kubectl('kustomize', str(folder))}---\n{(MANIFESTS / 'coredns.yaml').read_text()}"


def install(cluster: Cluster, manifests: str) -> None:
    """Create everything, and wait until a PyTorchJob could be applied and would find its GPUs."""
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
    """Return once the webhook lets a PyTorchJob pass. Its pod is ready a moment before the way to its service is laid."""
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
    """As the Kubernetes documentation has it for extended resources, but allocatable too: the kubelet would copy it seconds later."""
    paths = ("/status/capacity/nvidia.com~1gpu", "/status/allocatable/nvidia.com~1gpu")
    patch = [{"op": "add", "path": path, "value": str(GPUS)} for path in paths]
    cluster.kubectl(
        "patch", "node", NODE_NAME, "--subresource=status", "--type=json", f"--patch={json.dumps(patch)}"
    )
