"""Addresses, command lines and configuration files of the node's programs. Pure: no I/O.

Paths are those inside the node. The node has its own /run, /var and /tmp; everything shared with the host is
below /run/devcluster, so no path depends on the checkout. Keys and certificates are in certificates.py.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HOST, NODE, SUBNET = "10.89.0.1", "10.89.0.2", "10.89.0.0/24"
"""Both ends of the link. The host and pods use the node's address for the API and S3."""
PODS, SERVICES, DNS = "10.244.0.0/24", "10.96.0.0/16", "10.96.0.10"
API = f"https://{NODE}:6443"
S3_ENDPOINT, S3_ACCESS_KEY, S3_SECRET_KEY = f"http://{NODE}:9000", "devcluster", "devcluster-secret"
NODE_NAME = "node0"
GPUS = 8
OPERATOR_NAMESPACE = "vpmoe-system"

ROOT = "/run/devcluster"
STATE = f"{ROOT}/state"
CONFIG, PKI = f"{STATE}/config", f"{STATE}/pki"
CONTAINERD = "/run/containerd/containerd.sock"
AUDIT_LOG = "audit.log"
"""File in logs/ with the operator's requests, one JSON object a line. A full one gets a time in its name."""

USERS = {
    "admin": ("kubernetes-admin", "system:masters"),
    "kubelet": (f"system:node:{NODE_NAME}", "system:nodes"),
    "controllers": ("system:kube-controller-manager", "system:masters"),
    "scheduler": ("system:kube-scheduler", ""),
    "proxy": ("system:kube-proxy", ""),
    "apiserver-kubelet-client": ("kube-apiserver-kubelet-client", "system:masters"),
}
"""File name → name and group in the client certificate, as Kubernetes' RBAC bootstrap expects them.

All controllers have one identity with all rights: with one account each they start five seconds later.
"""

STUB = "localhost/devcluster"
IMAGES = (
    *(f"localhost/vpmoe/{name}:dev" for name in ("operator", "trainer", "inference")),
    *(f"{STUB}/{name}:dev" for name in ("coredns", "training-operator", "training-operator-init", "pause")),
)
"""All names of the stub image."""

STANDIN_IMAGE, STANDIN = "localhost/vpmoe/standin:dev", "tests/fakes/standin"
"""The same image with this folder's package `jobs` first on PYTHONPATH. The operator's tests run it."""
OTHER_IMAGE, OTHER_COMMIT = "localhost/vpmoe/standin:other", "0123456789" * 4
"""The stand-in image as if it had been built from another commit."""
UNMARKED_IMAGE = "localhost/vpmoe/standin:unmarked"
"""The stand-in image built without the file that holds its commit."""

IMAGES_FILE = "images.tar"
"""File in config/ with the images that the node has loaded."""
IMPORT_IMAGES = ("ctr", "--address", CONTAINERD, "--namespace", "k8s.io", "images", "import")
"""Command that loads the images of an archive, to be run in the node."""

KERNEL_SETTINGS = (
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
)
"""Settings that a kubelet changes for the whole machine. The node gets copies, so the host keeps its own."""


@dataclass(frozen=True)
class Mount:
    """A folder or file of the host, read-only in containers."""

    source: str
    target: str


@dataclass(frozen=True)
class Daemon:
    """A program of the node. The node ends when it ends."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    needs_api: bool
    """Start it only once the API server is ready: otherwise it fails or backs off."""


@dataclass(frozen=True)
class Folders:
    """Folders on the host."""

    state: str
    kube: str
    versitygw: str
    kubeflow: str


def render(folders: Folders, mounts: tuple[Mount, ...], oci_spec: Mapping[str, Any]) -> dict[str, str]:
    """The files below .devcluster/config, by name. `oci_spec` is containerd's default."""
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
        "audit.yaml": as_json(audit_policy()),
        "resolv.conf": "# No resolver: names outside the cluster are not for its pods.\n",
        **{
            f"{user}.kubeconfig": as_json(node_kubeconfig(user))
            for user in ("kubelet", "controllers", "scheduler", "proxy")
        },
    }


def fingerprint(files: Mapping[str, str]) -> str:
    """Hex sha256 of the files: equal for equal clusters."""
    return hashlib.sha256(as_json(dict(files)).encode()).hexdigest()


def daemons() -> tuple[Daemon, ...]:
    """All programs, in start order."""
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
        # Without these two, the kubelet answers `kubectl logs` and `exec` with 401.
        f"--kubelet-client-certificate={PKI}/apiserver-kubelet-client.crt",
        f"--kubelet-client-key={PKI}/apiserver-kubelet-client.key",
        "--kubelet-preferred-address-types=InternalIP",
        # Without these, controllers and scheduler log an error every few seconds. No API is aggregated.
        f"--requestheader-client-ca-file={PKI}/ca.crt",
        "--requestheader-allowed-names=aggregator",
        "--requestheader-username-headers=X-Remote-User",
        "--authorization-mode=Node,RBAC",
        # As in OpenShift: a controller needs a right of its own to block the deletion of an owner.
        "--enable-admission-plugins=OwnerReferencesPermissionEnforcement",
        f"--audit-policy-file={CONFIG}/audit.yaml",
        f"--audit-log-path={STATE}/logs/{AUDIT_LOG}",
        "--audit-log-maxsize=100",
        "--audit-log-maxbackup=1",
        "--allow-privileged=true",
    )
    # The data does not survive the node, so etcd need not wait for the disk.
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
    """Flags of both the controller manager and the scheduler."""
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
        "failCgroupV1": False,  # 1.35 and later refuse version 1 by default
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
        "imageGCHighThresholdPercent": 100,  # the stub image cannot be pulled
    }


def proxy() -> dict[str, Any]:
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "iptables",
        "hostnameOverride": NODE_NAME,
        "clusterCIDR": PODS,
        "clientConnection": {"kubeconfig": f"{CONFIG}/proxy.kubeconfig"},
        "conntrack": {"maxPerCore": 0},  # do not change the machine's limit
    }


def audit_policy() -> dict[str, Any]:
    """Record who asked for what in requests of the operator, without bodies.

    Tests compare the requests with the permissions that the chart grants.
    """
    return {
        "apiVersion": "audit.k8s.io/v1",
        "kind": "Policy",
        "omitStages": ["RequestReceived"],
        "rules": [
            {"level": "Metadata", "userGroups": [f"system:serviceaccounts:{OPERATOR_NAMESPACE}"]},
            {"level": "None"},
        ],
    }


def containerd() -> str:
    """Configuration format version 2, for containerd 1.6 to 2.x."""
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
    """One routed link per pod: with a bridge, services would need the kernel module br_netfilter.

    ipMasq, because the host has no route to pod addresses.
    """
    routes = {"ranges": [[{"subnet": PODS}]], "routes": [{"dst": "0.0.0.0/0"}]}
    pods = {"type": "ptp", "ipMasq": True, "ipam": {"type": "host-local", **routes}}
    return {
        "cniVersion": "0.4.0",
        "name": "devcluster",
        "plugins": [pods, {"type": "portmap", "capabilities": {"portMappings": True}}],
    }


def container_spec(default: Mapping[str, Any], mounts: tuple[Mount, ...]) -> dict[str, Any]:
    """containerd's default container, with the host's programs and the checkout's code mounted."""
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
    # The default limits allow 1024 open files; without them the node's limits hold.
    process = {key: value for key, value in default["process"].items() if key != "rlimits"}
    return {**default, "process": process, "mounts": [*default["mounts"], *read_only]}


def mounts(checkout: Path, environment: Path, interpreter: Path) -> tuple[Mount, ...]:
    """A checkout's code, virtual environment and interpreter, as containers see them.

    The virtual environment refers to the interpreter by its path on the host.
    """
    code = ("vpmoe", "jobs", "operator/distill_operator", STANDIN)
    shared = [
        *(Mount(str(checkout / name), f"/opt/vpmoe/{name}") for name in code),
        Mount(str(environment), "/opt/vpmoe/.venv"),
    ]
    if not interpreter.is_relative_to("/usr"):
        shared.append(Mount(str(interpreter), str(interpreter)))
    return tuple(shared)


def node_kubeconfig(user: str) -> dict[str, Any]:
    """For the node's programs. It refers to files of keys and certificates."""
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
    """The node's cgroup below each hierarchy's root, different from a real kubelet's: cleaning up is safe."""
    return f"vpmoe-devcluster-{hashlib.sha256(state.encode()).hexdigest()[:8]}"


def cgroup_roots(mounts: str) -> list[str]:
    """Mount points of the cgroup hierarchies, from /proc/self/mounts: version 2, version 1, or both."""
    fields = [line.split() for line in mounts.splitlines()]
    return [field[1] for field in fields if field[2] in ("cgroup", "cgroup2")]


def as_json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"
