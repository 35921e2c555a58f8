"""Builds a node image of kind without a container registry: KIND_NODE=built.

It has Debian's packages (debootstrap), kind's own files from its Go module, and the programs that this
package compiles. Inside are the images of Kubernetes, the training operator and the store, which are all the
same file system under many names. The image's name is a hash of all that it is made from.
"""

import hashlib
import os
import shutil
import tempfile
import time
from pathlib import Path

from devcluster import ClusterError, binaries, configuration, docker, needs, say

SOURCES = Path(__file__).parent / "kind_node"
RELEASE = "bookworm"
PACKAGES = (
    "systemd",
    "systemd-sysv",
    "ca-certificates",
    "conntrack",
    "containerd",
    "containernetworking-plugins",
    "curl",
    "e2fsprogs",
    "ethtool",
    "iproute2",
    "iptables",
    "jq",
    "kmod",
    "libseccomp2",
    "mount",
    "nftables",
    "pigz",
    "procps",
    "runc",
    "util-linux",
)
"""Debian packages of the node: those of kind's own node image that a single node needs, and jq."""
UNUSED = (
    "var/cache/apt/*",
    "var/lib/apt/lists/*",
    "usr/share/doc/*",
    "usr/share/locale/*",
    "usr/share/man/*",
)
"""What the node does not need of these packages: it imports its images at each first start."""
PROGRAMS = ("kube", "pause", "versitygw", "training-operator")
STUB_IMAGES = tuple(
    f"{configuration.STUB}/{name}:dev"
    for name in ("training-operator", "training-operator-init", "versitygw")
)
"""Names in manifests/compiled-images.yaml."""


def is_built() -> bool:
    """The value of KIND_NODE. Raises ClusterError for an unknown one."""
    chosen = os.environ.get("KIND_NODE") or "stock"
    if chosen not in ("stock", "built"):
        raise ClusterError(
            f"KIND_NODE={chosen}: choose stock (images are pulled, the default) or built (they are made "
            "here, without a registry)."
        )
    return chosen == "built"


def name() -> str:
    """The node image, built now if Docker does not have it. Raises ClusterError with the last lines."""
    image = f"vpmoe-kind-node:{key()}"
    if docker.image_id(image) is None:
        began = time.monotonic()
        base = debian()
        with tempfile.TemporaryDirectory() as folder:
            build(image, base, Path(folder))
        say(f"built {image} in {time.monotonic() - began:.0f} s")
    return image


def key() -> str:
    """16 hex digits that depend on all of the image's sources."""
    targets = (binaries.KUBE, binaries.S3, binaries.KUBEFLOW, binaries.KIND)
    files = [path for path in sorted(SOURCES.rglob("*")) if path.is_file()]
    parts = [
        RELEASE,
        *PACKAGES,
        *UNUSED,
        *(binaries.folder(target).name for target in targets),
        *(f"{path.relative_to(SOURCES)}\0{path.read_text()}" for path in files),
        *STUB_IMAGES,
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def debian() -> str:
    """The base image with Debian's packages, made now if Docker does not have it."""
    image = (
        f"vpmoe-kind-base:{hashlib.sha256(' '.join((RELEASE, *PACKAGES, *UNUSED)).encode()).hexdigest()[:16]}"
    )
    if docker.image_id(image):
        return image
    if os.geteuid() != 0:
        raise ClusterError("KIND_NODE=built needs root for debootstrap: run it with sudo.")
    needs.packages({"debootstrap": "debootstrap"})
    say(f"installing {len(PACKAGES)} packages of Debian {RELEASE} into {image}, about a minute")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        docker.run("debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", RELEASE, root)
        for pattern in UNUSED:
            for path in root.glob(pattern):
                remove(path)
        archive = Path(folder) / "root.tar"
        docker.run("tar", "--create", "--directory", root, "--file", archive, ".")
        docker.run("docker", "import", archive, image)
    return image


def remove(path: Path) -> None:
    """Remove a file, a folder, or a link, never what a link points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def build(image: str, base: str, context: Path) -> None:
    """Build the images of Kubernetes, and the node image that has them inside."""
    shutil.copytree(SOURCES, context, dirs_exist_ok=True)
    shutil.copytree(binaries.path("kind").parent / "files", context / "files")
    for program in PROGRAMS:
        shutil.copy(binaries.path(program), context)
    kubeadm = binaries.path("kubeadm")
    version = docker.run(kubeadm, "version", "--output=short").strip()
    images = docker.run(kubeadm, "config", "images", "list", f"--kubernetes-version={version}").split()
    (pause,) = (name for name in images if "/pause:" in name)
    inside = {name: stage(name) for name in (*images, *STUB_IMAGES)}
    for target in sorted(set(inside.values())):
        names = [f"--tag={name}" for name, of in inside.items() if of == target]
        docker_build(context, target, f"BASE={base}", names)
    try:
        docker.run("docker", "save", "--output", context / "images.tar", *inside)
    finally:
        docker.run("docker", "image", "rm", *inside)
    arguments = (f"--build-arg=VERSION={version}", f"--build-arg=PAUSE={pause}", f"--tag={image}")
    docker_build(context, "node", f"BASE={base}", arguments)


def stage(image: str) -> str:
    """The Dockerfile's stage of an image that the node has inside."""
    return next((name for name in ("pause", "coredns") if f"/{name}:" in image), "components")


def docker_build(context: Path, target: str, base: str, arguments: tuple[str, ...] | list[str]) -> None:
    docker.run("docker", "build", "--quiet", f"--target={target}", f"--build-arg={base}", *arguments, context)
