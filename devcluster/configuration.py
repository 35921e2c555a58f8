"""What every program of the node is told: addresses, command lines and configuration files. Pure: it reads and writes nothing.

Paths here are those that the node sees. It has /run, /var and /tmp of its own, and finds all that it shares with the host below
/run/devcluster, so nothing depends on where the checkout and the cache lie. Keys and certificates are certificates.py's.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HOST, NODE, SUBNET = "10.89.0.1", "10.89.0.2", "10.89.0.0/24"
"""The two ends of the link between host and node. Host and pods use the node's for both the API and S3."""
PODS, SERVICES, DNS = "10.244.0.0/24", "10.96.0.0/16", "10.96.0.10"
API = f"https://{NODE}:6443"
S3_ENDPOINT, S3_ACCESS_KEY, S3_SECRET_KEY = f"http://{NODE}:9000", "devcluster", "devcluster-secret"
NODE_NAME = "node0"
GPUS = 8

ROOT = "/run/devcluster"
STATE = f"{ROOT}/state"
CONFIG, PKI = f"{STATE}/config", f"{STATE}/pki"
CONTAINERD = "/run/containerd/containerd.sock"

USERS = {
    "admin": ("kubernetes-admin", "system:masters"),
    "kubelet": (f"system:node:{NODE_NAME}", "system:nodes"),
    "controllers": ("system:kube-controller-manager", "system:masters"),
    "scheduler": ("system:kube-scheduler", ""),
    "proxy": ("system:kube-proxy", ""),
    "apiserver-kubelet-client": ("kube-apiserver-kubelet-client", "system:masters"),
}
"""File name → the name and group in its client certificate, as Kubernetes' RBAC bootstrap expects them.

The controllers share one identity with all rights: with an account for each, as elsewhere, they take five seconds more to start.
"""

STUB = "docker.io/devcluster"
IMAGES = (
    *(f"docker.io/vpmoe/{name}:dev" for name in ("operator", "trainer", "inference")),
    *(f"{STUB}/{name}:dev" for name in ("coredns", "training-operator", "training-operator-init", "pause")),
)
"""Every name that the stub image carries."""

STANDIN_IMAGE, STANDIN = "docker.io/vpmoe/standin:dev", "tests/fakes/standin"
"""The same image with another PYTHONPATH: this folder's package `jobs` comes first. Tests of the operator run it instead of training."""

KERNEL_SETTINGS = (
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
)
"""What a kubelet sets for the whole machine. The node gets files of its own in their place, so that the host's stay as they are."""


@dataclass(frozen=True)
class Mount:
    """A folder or file of the host that containers see read-only."""

    source: str
    target: str


@dataclass(frozen=True)
class Daemon:
    """A program that lives as long as the node; the node dies with it."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    needs_api: bool
    """Started once the API server is ready: before that it would fail or back off."""


@dataclass(frozen=True)
class Folders:
    """Where things lie on the host."""

    state: str
    kube: str
    versitygw: str
    kubeflow: str


def render(folders: Folders, mounts: tuple[Mount, ...], oci_spec: Mapping[str, Any]) -> dict[str, str]:
    """Every file below .devcluster/config that the node reads, by name. `oci_spec` is containerd's own default."""
    cgroup = cgroup_name(folders.state)
    shared = {mount.source: f"{ROOT}/shared/{number}" for number, mount in enumerate(mounts)}
    binds = {
        folders.state: STATE,
        folders.kube: f"{ROOT}/kube",
        folders.versitygw: f"{ROOT}/versitygw",
        folders.kubeflow: f"{ROOT}/kubeflow",
    }
    inside = tuple(Mount(shared[mount.source], mount.target) for mount in mounts)
    return {
        "node.json": as_json(
            {"binds": binds | shared, "cgroup": cgroup, "daemons": [asdict(daemon) for daemon in daemons()]}
        ),
        "spec.json": as_json(container_spec(oci_spec, inside)),
        "containerd.toml": containerd(),
        "cni/10-devcluster.conflist": as_json(cni()),
        "kubelet.yaml": as_json(kubelet(cgroup)),
        "proxy.yaml": as_json(proxy()),
        "resolv.conf": "# No resolver: names outside the cluster are not for its pods.\n",
        **{
            f"{user}.kubeconfig": as_json(node_kubeconfig(user))
            for user in ("kubelet", "controllers", "scheduler", "proxy")
        },
    }


def fingerprint(files: Mapping[str, str]) -> str:
    """Hex sha256 that changes whenever a cluster with these files would be another one."""
    return hashlib.sha256(as_json(dict(files)).encode()).hexdigest()


def daemons() -> tuple[Daemon, ...]:
    """In the order in which they are started."""
    kube, etcd = f"{ROOT}/kube", "http://127.0.0.1:2379"
    apiserver = (
        f"{kube}/kube-apiserver",
        f"--etcd-servers={etcd}",
        f"--advertise-address={NODE}",
        f"--service-cluster-ip-range={SERVICES}",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={PKI}/service-accounts.crt",
        f"--service-account-signing-key-file={PKI}/service-accounts.key",
        f"--client-ca-file={PKI}/ca.crt",
        f"--tls-cert-file={PKI}/apiserver.crt",
        f"--tls-private-key-file={PKI}/apiserver.key",
        # Without these two, `kubectl logs` and `exec` are answered 401 by the kubelet.
        f"--kubelet-client-certificate={PKI}/apiserver-kubelet-client.crt",
        f"--kubelet-client-key={PKI}/apiserver-kubelet-client.key",
        "--kubelet-preferred-address-types=InternalIP",
        # No API is aggregated; without these the controllers and the scheduler log an error every few seconds.
        f"--requestheader-client-ca-file={PKI}/ca.crt",
        "--requestheader-allowed-names=aggregator",
        "--requestheader-username-headers=X-Remote-User",
        "--authorization-mode=Node,RBAC",
        "--allow-privileged=true",
    )
    # Nothing is kept over a restart of the node, so etcd need not wait for a disk.
    store = (
        "--data-dir=/var/lib/etcd",
        "--unsafe-no-fsync",
        f"--listen-client-urls={etcd}",
        f"--advertise-client-urls={etcd}",
    )
    controllers = (
        f"{kube}/kube-controller-manager",
        *identity("controllers"),
        f"--service-account-private-key-file={PKI}/service-accounts.key",
        f"--root-ca-file={PKI}/ca.crt",
    )
    node = (
        f"--kubeconfig={CONFIG}/kubelet.kubeconfig",
        f"--hostname-override={NODE_NAME}",
        f"--node-ip={NODE}",
    )
    return (
        Daemon("etcd", (f"{kube}/etcd", *store), {}, needs_api=False),
        Daemon("apiserver", apiserver, {}, needs_api=False),
        Daemon("containerd", ("containerd", "--config", f"{CONFIG}/containerd.toml"), {}, needs_api=False),
        Daemon(
            "s3",
            (f"{ROOT}/versitygw/versitygw", "--port", "0.0.0.0:9000", "posix", f"{STATE}/s3"),
            {"ROOT_ACCESS_KEY": S3_ACCESS_KEY, "ROOT_SECRET_KEY": S3_SECRET_KEY},
            needs_api=False,
        ),
        Daemon("kubelet", (f"{kube}/kubelet", f"--config={CONFIG}/kubelet.yaml", *node), {}, needs_api=True),
        Daemon("controllers", controllers, {}, needs_api=True),
        Daemon("scheduler", (f"{kube}/kube-scheduler", *identity("scheduler")), {}, needs_api=True),
        Daemon("proxy", (f"{kube}/kube-proxy", f"--config={CONFIG}/proxy.yaml"), {}, needs_api=True),
    )


def identity(user: str) -> tuple[str, ...]:
    """Flags that the controller manager and the scheduler share."""
    kubeconfig = f"{CONFIG}/{user}.kubeconfig"
    names = ("kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig")
    return (*(f"--{name}={kubeconfig}" for name in names), "--leader-elect=false", "--bind-address=127.0.0.1")


def kubelet(cgroup: str) -> dict[str, Any]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": f"unix://{CONTAINERD}",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{cgroup}",
        "failCgroupV1": False,  # from 1.35 on it refuses such machines by default
        "failSwapOn": False,
        "enforceNodeAllocatable": [],
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": f"{PKI}/ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "clusterDNS": [DNS],
        "clusterDomain": "cluster.local",
        "resolvConf": f"{CONFIG}/resolv.conf",
        "evictionHard": {
            "memory.available": "100Mi",
            "nodefs.available": "500Mi",
            "imagefs.available": "10Mi",
        },
        "imageGCHighThresholdPercent": 100,  # the stub image cannot be pulled again
    }


def proxy() -> dict[str, Any]:
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "iptables",
        "hostnameOverride": NODE_NAME,
        "clusterCIDR": PODS,
        "clientConnection": {"kubeconfig": f"{CONFIG}/proxy.kubeconfig"},
        "conntrack": {"maxPerCore": 0},  # the limit is the whole machine's
    }


def containerd() -> str:
    """Version 2 of the format is read by containerd 1.6 to 2.x."""
    return f"""version = 2
[grpc]
  address = "{CONTAINERD}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{STUB}/pause:dev"
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{CONFIG}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    base_runtime_spec = "{CONFIG}/spec.json"
"""


def cni() -> dict[str, Any]:
    """Each pod on a routed link of its own: through a bridge, services would need the kernel module br_netfilter.

    ipMasq: the host has no route to pod addresses, it answers to the node's.
    """
    routes = {"ranges": [[{"subnet": PODS}]], "routes": [{"dst": "0.0.0.0/0"}]}
    pods = {"type": "ptp", "ipMasq": True, "ipam": {"type": "host-local", **routes}}
    return {
        "cniVersion": "0.4.0",
        "name": "devcluster",
        "plugins": [pods, {"type": "portmap", "capabilities": {"portMappings": True}}],
    }


def container_spec(default: Mapping[str, Any], mounts: tuple[Mount, ...]) -> dict[str, Any]:
    """containerd's default container with the host's programs and the checkout's code in place of an image's own files."""
    programs = (
        Mount("/usr", "/usr"),
        Mount("/etc/ssl", "/etc/ssl"),
        Mount(f"{ROOT}/kube/kube", "/coredns"),
        Mount(f"{ROOT}/kubeflow/training-operator", "/manager"),
    )
    read_only = [
        {
            "type": "bind",
            "source": mount.source,
            "destination": mount.target,
            "options": ["ro", "rbind", "rprivate"],
        }
        for mount in (*programs, *mounts)
    ]
    process = {
        key: value for key, value in default["process"].items() if key != "rlimits"
    }  # 1024 files; without it the node's limits hold
    return {**default, "process": process, "mounts": [*default["mounts"], *read_only]}


def mounts(checkout: Path, environment: Path, interpreter: Path) -> tuple[Mount, ...]:
    """What containers see of a checkout and its virtual environment. The interpreter lies outside and must be found at its own path."""
    code = ("vpmoe", "jobs", "operator/distill_operator", STANDIN)
    shared = [
        *(Mount(str(checkout / name), f"/opt/vpmoe/{name}") for name in code),
        Mount(str(environment), "/opt/vpmoe/.venv"),
    ]
    if not interpreter.is_relative_to("/usr"):
        shared.append(Mount(str(interpreter), str(interpreter)))
    return tuple(shared)


def node_kubeconfig(user: str) -> dict[str, Any]:
    """For the node's own programs, which read the files that it names."""
    certificate = {"client-certificate": f"{PKI}/{user}.crt", "client-key": f"{PKI}/{user}.key"}
    return kubeconfig(user, {"certificate-authority": f"{PKI}/ca.crt"}, certificate)


def kubeconfig(user: str, authority: Mapping[str, str], certificate: Mapping[str, str]) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "devcluster", "cluster": {"server": API, **authority}}],
        "users": [{"name": user, "user": dict(certificate)}],
        "contexts": [{"name": "devcluster", "context": {"cluster": "devcluster", "user": user}}],
        "current-context": "devcluster",
    }


def cgroup_name(state: str) -> str:
    """The node's own cgroup, below each hierarchy's root: what lies in it is this checkout's to remove, a real kubelet's is not."""
    return f"vpmoe-devcluster-{hashlib.sha256(state.encode()).hexdigest()[:8]}"


def cgroup_roots(mounts: str) -> list[str]:
    """Where the cgroup hierarchies are mounted, given /proc/self/mounts: one in version 2, one a controller in version 1, or both."""
    fields = [line.split() for line in mounts.splitlines()]
    return [field[1] for field in fields if field[2] in ("cgroup", "cgroup2")]


def as_json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"
