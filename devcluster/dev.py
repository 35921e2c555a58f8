"""Starts and ends the development cluster: requirements, programs, configuration, node, add-ons.

A lock serializes concurrent callers. `ready.json` in the state folder is written last. A node without it
comes from an interrupted `up`; the next `up` starts over.
"""

import contextlib
import fcntl
import hashlib
import json
import shutil
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from devcluster import ClusterError, addons, binaries, certificates, configuration, host, image, needs, say
from devcluster.access import S3, Cluster
from vpmoe.provenance import git_sha

STATE = host.CHECKOUT / ".devcluster"
LOCK = Path("/run/vpmoe-devcluster.lock")
CLUSTER = Cluster(
    STATE / "kubeconfig",
    STATE / "bin" / "kubectl",
    STATE / "bin" / "helm",
    S3(
        configuration.S3_ENDPOINT,
        configuration.S3_ACCESS_KEY,
        configuration.S3_SECRET_KEY,
        pod_endpoint=configuration.S3_ENDPOINT,
    ),
    chart_arguments=("--values", "charts/distill-operator/values-dev.yaml"),
)
START_SECONDS = 60
"""Time limit for the API server and the store. They usually take 3 s."""


def up() -> Cluster:
    """Start the cluster unless it is running. Raises ClusterError with the remedy."""
    needs.machine()
    folders, mounts = sources()
    with exclusively():
        files = configuration.render(folders, mounts, default_container())
        pause = Path(folders.kube, "pause").read_bytes()
        images = image.archive(pause, git_sha() or "")
        # Without the commit: a new one needs other images, and no other cluster.
        unmarked = hashlib.sha256(image.archive(pause, "")).hexdigest()
        fingerprint = configuration.fingerprint({**files, **addons.sources(), "images": unmarked})
        if is_running(fingerprint):
            update_images(images)
        else:
            began = time.monotonic()
            begin(folders, files, images, fingerprint)
            say(f"the development cluster is ready after {time.monotonic() - began:.0f} s")
    sources_of_operator = rf"podAnnotations.vpmoe\.dev/sources={operator_hash()[:16]}"
    return replace(CLUSTER, chart_arguments=(*CLUSTER.chart_arguments, "--set-string", sources_of_operator))


def operator_hash() -> str:
    """sha256 of the operator's sources. Pods mount the checkout, so an edit must restart the operator."""
    digest = hashlib.sha256()
    for folder in ("operator/distill_operator", "vpmoe/api", "vpmoe/plan"):
        for path in sorted((host.CHECKOUT / folder).rglob("*.py")):
            digest.update(path.relative_to(host.CHECKOUT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def helm() -> Path:
    """The compiled helm. It is compiled now if it is missing, without a cluster."""
    return binaries.path("helm")


def update_images(images: bytes) -> None:
    """Load these images into the running node, unless it has them. Pods that start later report their
    commit.
    """
    loaded, new = STATE / "config" / configuration.IMAGES_FILE, STATE / "config" / "new-images.tar"
    node = host.running()
    if node is None or loaded.read_bytes() == images:
        return
    new.write_bytes(images)
    host.load_images(node, new.name)
    new.replace(loaded)
    say("loaded images with the present commit")


def begin(folders: configuration.Folders, files: Mapping[str, str], images: bytes, fingerprint: str) -> None:
    """Start a cluster when none is running, and write `ready.json` when all of it answers."""
    needs.disk(STATE, 2)
    host.sweep(STATE)
    host.subnet_is_free()
    prepare(folders, files, images)
    try:
        node = host.start(STATE)
        manifests = addons.render(
            CLUSTER,
            Path(folders.kubeflow) / "manifests",
            STATE / "config" / "kubeflow",
            [addons.MANIFESTS / "coredns.yaml"],
            compiled_images=True,
        )
        host.wait_for(ended_or_answers, "the API server and the store", START_SECONDS)
        addons.install(CLUSTER, manifests)
    except ClusterError as error:
        raise ClusterError(f"{cause_of_end() or error} (logs: {STATE / 'logs'})") from error
    (STATE / "ready.json").write_text(json.dumps({"pid": node.pid, "configuration": fingerprint}))


def down() -> None:
    """End this checkout's cluster and remove its state, the store's data included.

    Raises ClusterError if another checkout's cluster is running.
    """
    node = host.running()
    if node is None and not STATE.exists() and not host.link_exists():
        say("no development cluster is running")
        return
    needs.root()
    with exclusively():
        if node := host.running():
            if not abandoned(node) and node.state != STATE:
                raise ClusterError(other_checkout(node))
            host.end(node)
            host.sweep(node.state)
        host.sweep(STATE)
        if STATE.exists():
            shutil.rmtree(STATE)
    say("the development cluster and its state are gone")


def status() -> list[str]:
    """Status lines. Raises ClusterError if this checkout's cluster is not running."""
    node = host.running()
    if node is None:
        raise ClusterError("no development cluster is running: start it with `make cluster`")
    if node.state != STATE:
        raise ClusterError(other_checkout(node))
    if ready(node) is None:
        raise ClusterError(f"process {node.pid} is starting, or its start failed (logs: {STATE / 'logs'})")
    api, store = (answers(url) for url in (f"{configuration.API}/readyz", configuration.S3_ENDPOINT))
    return [
        f"node   process {node.pid}, state and logs in {STATE}",
        f"API    {configuration.API} {'answers' if api else 'does not answer'}",
        f"S3     {configuration.S3_ENDPOINT} {'answers' if store else 'does not answer'}"
        f" (access key {configuration.S3_ACCESS_KEY}, secret key {configuration.S3_SECRET_KEY})",
    ]


def is_running(fingerprint: str) -> bool:
    """Whether the cluster of this configuration is ready.

    Ends an unfinished or abandoned cluster. Raises ClusterError if another one is running.
    """
    node = host.running()
    if node is None:
        return False
    if abandoned(node):
        say(f"ending process {node.pid}: the checkout of this cluster is gone ({node.state})")
        host.end(node)
        host.sweep(node.state)
        return False
    if node.state != STATE:
        raise ClusterError(other_checkout(node))
    built = ready(node)
    if built is None:
        say(f"ending process {node.pid}: the start of this cluster was not finished")
        host.end(node)
        return False
    if built != fingerprint:
        raise ClusterError(
            "the running cluster was started from other sources. End it with `make down` "
            "(this deletes its runs and buckets), then try again."
        )
    if not answers(f"{configuration.API}/readyz", seconds=20):
        raise ClusterError(
            f"the cluster is running (process {node.pid}) but its API does not answer: "
            f"see {STATE / 'logs'}, then `make down`."
        )
    return True


def abandoned(node: host.Node) -> bool:
    return not node.state.exists()


def other_checkout(node: host.Node) -> str:
    return (
        f"the development cluster of another checkout is running (process {node.pid}); there can be one. "
        f"Use it with export KUBECONFIG={node.state}/kubeconfig, "
        f"or end it with `make down` in {node.state.parent}."
    )


def ready(node: host.Node) -> str | None:
    """The fingerprint of the configuration of this node, or None if its start was not finished."""
    path = STATE / "ready.json"
    if not path.exists():
        return None
    built = json.loads(path.read_text())
    return str(built["configuration"]) if built["pid"] == node.pid else None


def sources() -> tuple[configuration.Folders, tuple[configuration.Mount, ...]]:
    """Folders of the programs, compiled if needed, and the mounts of the checkout.

    Raises ClusterError if pods could not read a part of the checkout.
    """
    if sys.prefix == sys.base_prefix:
        raise ClusterError(
            f"{sys.executable} is in no virtual environment, and pods need one: use .venv/bin/python"
        )
    mounts = configuration.mounts(host.CHECKOUT, Path(sys.prefix), Path(sys.base_prefix))
    for mount in mounts:
        path = Path(mount.source)
        if not path.is_dir() or path.stat().st_mode & 0o005 != 0o005:
            raise ClusterError(
                f"{path}: pods run as another user and need to read this folder. Run chmod -R o+rX on it."
            )
    built = [binaries.folder(target) for target in (binaries.KUBE, binaries.S3, binaries.KUBEFLOW)]
    return configuration.Folders(str(STATE), *(str(folder.resolve()) for folder in built)), mounts


def default_container() -> dict[str, object]:
    """containerd's default OCI specification. Needs no daemon."""
    return dict(
        json.loads(
            subprocess.run(
                ["ctr", "oci", "spec"], check=True, capture_output=True, text=True, env=host.ENVIRONMENT
            ).stdout
        )
    )


def prepare(folders: configuration.Folders, files: Mapping[str, str], images: bytes) -> None:
    """Write the node's files, the kubeconfig, and links to kubectl and helm."""
    if (STATE / "logs").exists():  # kept until now: logs of a node that was killed
        shutil.rmtree(STATE / "logs")
    for name in ("bin", "logs/pods", "kubelet", "config/cni", "s3"):
        (STATE / name).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (STATE / "config" / name).write_text(text)
    (STATE / "config" / configuration.IMAGES_FILE).write_bytes(images)
    certificates.make(STATE / "pki")
    CLUSTER.kubeconfig.touch(mode=0o600)
    CLUSTER.kubeconfig.write_text(certificates.admin_kubeconfig(STATE / "pki"))
    for name in ("kubectl", "helm"):
        link = STATE / "bin" / name
        link.unlink(missing_ok=True)
        link.symlink_to(Path(folders.kube) / name)


def ended_or_answers() -> bool:
    return host.running() is None or (
        answers(f"{configuration.API}/readyz") and answers(configuration.S3_ENDPOINT)
    )


def cause_of_end() -> str | None:
    """The program whose end stopped the node, with its last log line; None if the node is running."""
    if host.running():
        return None
    last = host.log_of(STATE, "node")
    return ": ".join(filter(None, ("the node died", last, host.log_of(STATE, last.split(" ")[0]))))


def answers(url: str, seconds: float = 1) -> bool:
    """Whether an HTTP server answers there, with any status below 500."""
    trusted = urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=STATE / "pki" / "ca.crt"))
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}), trusted)
    try:
        direct.open(url, timeout=seconds).close()
    except urllib.error.HTTPError as refusal:
        return refusal.code < 500
    except OSError:
        return False
    return True


@contextlib.contextmanager
def exclusively() -> Iterator[None]:
    """Hold the machine's lock on the development cluster."""
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
