"""Installs Kueue on the running development cluster, on request, and removes it again.

Its manifests come with its Go module; manifests/kueue patches them. A cluster with Kueue treats objects with
a queue in another way than one without, so a test that has installed it removes it.
"""

import json
import os
import shutil
import time
from pathlib import Path

from devcluster import ClusterError, addons, binaries, certificates, dev, say
from devcluster.access import Cluster

VERSION = binaries.KUEUE_MANAGER.rpartition("@")[2]
NAMESPACE = "kueue-system"
QUEUES = ("clusterqueues", "cohorts", "resourceflavors", "topologies", "admissionchecks")
"""Resources of the cluster whose objects Kueue must release before it goes."""
PROBE = """
apiVersion: kueue.x-k8s.io/v1beta2
kind: ResourceFlavor
metadata: {name: probe}
"""


def install(cluster: Cluster) -> None:
    """Install Kueue, compiled if needed, and wait until the cluster accepts its objects.

    Raises ClusterError with the remedy; also for a cluster that is not the development cluster.
    """
    refuse_other(cluster)
    began = time.monotonic()
    manifests = render(cluster, binaries.folder(binaries.KUEUE))
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "--filename=-", input=manifests)
    cluster.kubectl(
        "--namespace", NAMESPACE, "rollout", "status", "deployment/kueue-controller-manager", "--timeout=300s"
    )
    addons.wait_until_accepted(cluster, PROBE, time.monotonic() + 60)
    say(f"Kueue {VERSION} is ready after {time.monotonic() - began:.0f} s")


def remove(cluster: Cluster) -> None:
    """Remove Kueue with all of its objects. Raises ClusterError if objects with a queue exist."""
    refuse_other(cluster)
    workloads = ("workloads.kueue.x-k8s.io", "--all", "--all-namespaces")
    cluster.kubectl("wait", "--for=delete", *workloads, "--timeout=60s")
    for resource in QUEUES:
        cluster.kubectl("delete", f"{resource}.kueue.x-k8s.io", "--all", "--timeout=60s")
    manifests = (dev.STATE / "config" / "kueue.yaml").read_text()
    cluster.kubectl("delete", "--ignore-not-found", "--timeout=120s", "--filename=-", input=manifests)


def render(cluster: Cluster, built: Path) -> str:
    """Kueue's manifests as one YAML stream. Puts it and the program into the state folder, which the node
    mounts."""
    program, folder = dev.STATE / "kueue", dev.STATE / "config" / "kueue"
    if not folder.exists():  # else it is installed, or was, and keeps its certificates
        certificates.make_webhook(folder, "kueue-ca", "kueue-webhook-service", NAMESPACE)
    if not (program / "kueue").exists():  # a running program cannot be overwritten
        program.mkdir(exist_ok=True)
        shutil.copy(built / "kueue", program / "copy")
        (program / "copy").rename(program / "kueue")
    # kustomize requires a relative path
    overlay = os.path.relpath((built / "manifests" / "default").resolve(), folder.resolve())
    patches = (addons.MANIFESTS / "kueue" / "kustomization.yaml").read_text()
    (folder / "kustomization.yaml").write_text(f"{patches}resources: [{json.dumps(overlay)}]\n")
    shutil.copy(addons.MANIFESTS / "kueue" / "controller_manager_config.yaml", folder)
    manifests = cluster.kubectl("kustomize", str(folder))
    (folder.parent / "kueue.yaml").write_text(manifests)
    return manifests


def refuse_other(cluster: Cluster) -> None:
    """Raise ClusterError for a cluster that is not the development cluster."""
    if cluster.kubeconfig != dev.CLUSTER.kubeconfig:
        raise ClusterError("Kueue is added to the development cluster only. Install it in yours yourself.")
