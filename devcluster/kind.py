"""CLUSTER=kind: a single-node Kubernetes in Docker, with the operator's and the jobs' images as users have
them.

`make images VARIANT=cpu` builds these images; they are loaded into the node. The store and the training
operator are Deployments in the cluster. The environment variable KIND_NODE says where their images and the
node's come from: `stock` (the default) pulls the projects' own, `built` makes them from compiled programs on
this machine, for which no registry is needed (node_image.py).
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from devcluster import ClusterError, addons, binaries, docker, host, needs, node_image, say
from devcluster.access import S3, Cluster, program

NAME = "vpmoe"
NODE = f"{NAME}-control-plane"
STATE = host.CHECKOUT / ".kind"
READY = STATE / "ready.json"
"""Written last when the cluster is created: what it was made from."""
LOADED = STATE / "images.json"
"""Name → id of the images that were loaded last."""
CONFIGURATION = addons.MANIFESTS / "kind" / "cluster.yaml"
STORE = S3(
    # The node port of manifests/kind/s3.yaml, which cluster.yaml opens on the host.
    "http://127.0.0.1:30900",
    "devcluster",
    "devcluster-secret",
    pod_endpoint="http://s3.s3.svc.cluster.local:9000",
)
LOCK = Path("/tmp") / f"vpmoe-kind-{os.getuid()}.lock"


def up() -> Cluster:
    """Create the cluster unless it exists, and load the images of this checkout's commit."""
    docker.check_engine()
    images = product_images()
    with exclusively():
        wanted = fingerprint()
        if not exists():
            create(wanted)
        elif made_from() != wanted:
            raise ClusterError(
                f"there is a kind cluster {NAME} of another checkout, of other sources, or one that was not "
                f"finished. Remove it with its runs and buckets: {kind()} delete cluster --name {NAME}"
            )
        else:
            addons.advertise_gpus(connect(), NODE)  # the kubelet forgets them if the node was restarted
        load(images)
    return connect(list(images))


def down() -> None:
    """Delete the cluster, its store's data included."""
    with exclusively():
        if exists():
            docker.run(kind(), "delete", "cluster", "--name", NAME)
        if STATE.exists():
            shutil.rmtree(STATE)
    say(f"the kind cluster {NAME} is gone")


def status() -> list[str]:
    docker.check_engine()
    if not exists():
        raise ClusterError(f"there is no kind cluster {NAME}: create it with `make cluster CLUSTER=kind`")
    return [
        connect().kubectl("get", "nodes", "--output=wide").rstrip(),
        f"S3     {STORE.endpoint}, from pods {STORE.pod_endpoint}"
        f" (access key {STORE.access_key}, secret key {STORE.secret_key})",
    ]


def helm() -> Path:
    return binaries.path("helm") if node_image.is_built() else program("helm")


def kubectl() -> Path:
    return binaries.path("kubectl") if node_image.is_built() else program("kubectl")


def kind() -> Path:
    """kind of the pinned version, compiled if needed: it decides the version of the node."""
    return binaries.path("kind")


def create(wanted: str) -> None:
    """Create the cluster with the training operator and the store, and write READY."""
    began = time.monotonic()
    needs.disk(host.CHECKOUT, 10)
    if STATE.exists():
        shutil.rmtree(STATE)
    STATE.mkdir()
    image = ("--image", node_image.name()) if node_image.is_built() else ()
    command = (kind(), "create", "cluster", "--name", NAME, "--config", CONFIGURATION, *image)
    shown = subprocess.run(
        [*command, "--kubeconfig", STATE / "kubeconfig", "--wait", "120s"], stdout=sys.stderr, check=False
    )
    if shown.returncode != 0:
        raise ClusterError(f"kind create cluster: status {shown.returncode}, see above")
    cluster = connect()
    manifests = addons.render(
        cluster,
        training_operator_manifests(),
        STATE / "addons",
        [CONFIGURATION.with_name("s3.yaml")],
        compiled_images=node_image.is_built(),
    )
    addons.install(cluster, manifests, NODE, (*addons.DEPLOYMENTS, ("s3", "s3")))
    READY.write_text(json.dumps({"configuration": wanted}))
    say(f"the kind cluster {NAME} is ready after {time.monotonic() - began:.0f} s")


def connect(images: Sequence[str] = ()) -> Cluster:
    """The existing cluster, for a chart with these images."""
    registry, _, tag = images[0].partition("/operator:") if images else ("", "", "")
    arguments = ("--set", f"images.registry={registry}", "--set", f"images.tag={tag}") if images else ()
    return Cluster(STATE / "kubeconfig", kubectl(), helm(), STORE, arguments)


def product_images() -> dict[str, str]:
    """Name → id of the images operator, trainer and inference, which Docker must have.

    REGISTRY and TAG in the environment choose others than those of the checkout's commit.
    """
    names = docker.run(host.CHECKOUT / "docker" / "images.sh", "names", VARIANT="cpu").split()
    found = {name: docker.image_id(name) for name in names}
    if missing := [name for name, identity in found.items() if identity is None]:
        raise ClusterError(
            f"Docker has no image {', '.join(missing)}: build the images with `make images VARIANT=cpu`"
        )
    return {name: identity for name, identity in found.items() if identity}


def load(images: Mapping[str, str]) -> None:
    """Load images into the node, unless they were loaded last."""
    if LOADED.exists() and json.loads(LOADED.read_text()) == images:
        return
    began = time.monotonic()
    # As `kind load docker-image` does, but without an archive on the disk, and only this machine's platform.
    docker.pipe(
        ("docker", "save", *images),
        ("docker", "exec", "--interactive", NODE, "ctr", "--namespace=k8s.io", "images", "import", "-"),
    )
    LOADED.write_text(json.dumps(images))
    say(f"loaded the images into the node in {time.monotonic() - began:.0f} s")


def training_operator_manifests() -> Path:
    """The manifests that come with the training operator's module."""
    if node_image.is_built():
        return binaries.path("training-operator").parent / "manifests"
    module, _, version = binaries.TRAINING_OPERATOR.partition("@")
    return binaries.module_folder(f"{module.split('/cmd/')[0]}@{version}") / "manifests"


def fingerprint() -> str:
    """Hex sha256 of all that determines the cluster, except the images of the operator and of the jobs."""
    parts = {
        **addons.sources(),
        **{path.name: path.read_text() for path in sorted(CONFIGURATION.parent.glob("*.yaml"))},
        "kind": binaries.KIND_PROGRAM,
        "node": node_image.name() if node_image.is_built() else "stock",
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def made_from() -> str | None:
    """The fingerprint of this checkout's running cluster; None if it has none that is finished."""
    return str(json.loads(READY.read_text())["configuration"]) if READY.exists() else None


def exists() -> bool:
    return NAME in docker.run(kind(), "get", "clusters").split()


@contextmanager
def exclusively() -> Iterator[None]:
    """Hold this user's lock on the kind cluster."""
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
