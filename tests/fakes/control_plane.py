"""A control plane of Kubernetes as local processes: etcd, API server, controller manager, and scheduler.

It has no nodes: hollow_node.py adds some. Ports are free ones, state is below a folder of the caller, so
several run at once, beside the development cluster too. Its programs are those of the development cluster.
"""

import contextlib
import ctypes
import json
import os
import signal
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from devcluster import binaries, certificates, needs
from devcluster.access import call
from vpmoe.process.launcher import PR_SET_PDEATHSIG, free_port

ROOT = Path(__file__).parents[2]
START_SECONDS = 120
SERVICES = "10.96.0.0/16"
CONTROLLERS = (
    "garbage-collector-controller",
    "job-controller",
    "namespace-controller",
    "node-lifecycle-controller",
    "pod-garbage-collector-controller",
    "serviceaccount-controller",
    "taint-eviction-controller",
    "ttl-after-finished-controller",
)
"""What runs and nodes need of the controller manager."""
CONTROLLER_FLAGS = (
    "--kube-api-qps=2000",
    "--kube-api-burst=4000",
    "--concurrent-job-syncs=20",
    "--concurrent-gc-syncs=20",
)
"""Its default of 20 requests a second limits a cluster to a few Jobs a second."""
SCHEDULER_FLAGS = ("--kube-api-qps=2000", "--kube-api-burst=4000")


class ControlPlaneError(RuntimeError):
    """A program did not start, or has ended. The message has the end of its log."""


@dataclass
class ControlPlane:
    """The processes. `with ControlPlane(folder):` starts them, and ends them.

    `audits` are rules of an audit policy; the log is audit_log.
    """

    folder: Path
    scheduler: bool = True
    controllers: Sequence[str] = CONTROLLERS
    controller_flags: Sequence[str] = CONTROLLER_FLAGS
    scheduler_flags: Sequence[str] = SCHEDULER_FLAGS
    audits: Sequence[dict[str, Any]] = ()
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.url = f"https://127.0.0.1:{free_port()}"

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def kubeconfig(self) -> Path:
        """Kubeconfig of an administrator."""
        return self.folder / "admin.kubeconfig"

    @property
    def audit_log(self) -> Path:
        """One JSON object a line."""
        return self.folder / "audit.log"

    def kubectl(self, *arguments: str, input: str | None = None) -> str:
        """Run kubectl as the administrator. Returns its stdout. Raises ClusterError."""
        return call([str(binaries.path("kubectl")), *arguments], self.kubeconfig, input)

    def start(self) -> None:
        """Start all programs, apply the CRD, and wait until both answer."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._pki = self.folder / "pki"
        certificates.make(self._pki)
        for user in ("admin", "controllers", "scheduler"):
            self._write_kubeconfig(user)
        etcd, peers = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
        self._spawn(
            "etcd",
            f"--data-dir={self.folder / 'etcd'}",
            "--unsafe-no-fsync",
            f"--listen-client-urls={etcd}",
            f"--advertise-client-urls={etcd}",
            f"--listen-peer-urls={peers}",
            f"--initial-advertise-peer-urls={peers}",
            f"--initial-cluster=default={peers}",
            "--log-level=warn",
        )
        self._spawn("kube-apiserver", f"--etcd-servers={etcd}", *self._api_server_flags())
        self._wait_until_ready()
        self._spawn(
            "kube-controller-manager",
            *self._client_flags("controllers"),
            f"--service-account-private-key-file={self._pki}/service-accounts.key",
            f"--root-ca-file={self._pki}/ca.crt",
            f"--controllers={','.join(self.controllers)}",
            *self.controller_flags,
        )
        if self.scheduler:
            self._spawn("kube-scheduler", *self._client_flags("scheduler"), *self.scheduler_flags)
        self.kubectl("apply", "--server-side", "--filename", str(ROOT / "manifests/crd.yaml"))
        self.kubectl("wait", "--for=condition=Established", "--timeout=60s", "crd/distillruns.vpmoe.dev")
        self._wait_for_service_accounts("default")

    def create_namespace(self, name: str) -> None:
        """Create a namespace, and wait until pods can be created there."""
        self.kubectl("create", "namespace", name)
        self._wait_for_service_accounts(name)

    def stop(self) -> None:
        """Kill the processes. Nothing of their state is kept, and the API server would wait for watches."""
        for process in reversed(self.processes.values()):
            process.kill()
            process.wait()
        self.processes.clear()

    def usage(self) -> dict[str, float]:
        """CPU seconds of each process so far."""
        return {name: cpu_seconds(process.pid) for name, process in self.processes.items()}

    def _api_server_flags(self) -> Iterator[str]:
        yield from (
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            f"--secure-port={self.url.rpartition(':')[2]}",
            "--endpoint-reconciler-type=none",
            f"--service-cluster-ip-range={SERVICES}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={self._pki}/service-accounts.crt",
            f"--service-account-signing-key-file={self._pki}/service-accounts.key",
            f"--client-ca-file={self._pki}/ca.crt",
            f"--tls-cert-file={self._pki}/apiserver.crt",
            f"--tls-private-key-file={self._pki}/apiserver.key",
            f"--requestheader-client-ca-file={self._pki}/ca.crt",
            "--requestheader-allowed-names=aggregator",
            "--requestheader-username-headers=X-Remote-User",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=OwnerReferencesPermissionEnforcement",
            "--profiling=false",
        )
        if self.audits:
            policy = {
                "apiVersion": "audit.k8s.io/v1",
                "kind": "Policy",
                "omitStages": ["RequestReceived"],
                "rules": [*self.audits, {"level": "None"}],
            }
            (self.folder / "audit.yaml").write_text(json.dumps(policy))
            yield f"--audit-policy-file={self.folder}/audit.yaml"
            yield f"--audit-log-path={self.audit_log}"
            yield "--audit-log-maxsize=4000"

    def _client_flags(self, user: str) -> list[str]:
        kubeconfig = self.folder / f"{user}.kubeconfig"
        names = ("kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig")
        return [*(f"--{name}={kubeconfig}" for name in names), "--leader-elect=false", "--secure-port=0"]

    def _write_kubeconfig(self, user: str) -> None:
        certificate = {
            "client-certificate": f"{self._pki}/{user}.crt",
            "client-key": f"{self._pki}/{user}.key",
        }
        self.write_kubeconfig(self.folder / f"{user}.kubeconfig", certificate)

    def write_kubeconfig(self, path: Path, user: dict[str, str], server: str = "") -> Path:
        """Write a kubeconfig with these credentials, for a proxy at `server` or the API server itself."""
        cluster = {"server": server or self.url}
        if cluster["server"].startswith("https:"):
            cluster["certificate-authority"] = str(self._pki / "ca.crt")
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "local",
            "clusters": [{"name": "local", "cluster": cluster}],
            "users": [{"name": "local", "user": user}],
            "contexts": [{"name": "local", "context": {"cluster": "local", "user": "local"}}],
        }
        path.touch(mode=0o600)
        path.write_text(json.dumps(config))
        return path

    def _spawn(self, program: str, *flags: str) -> None:
        log = (self.folder / f"{program}.log").open("wb")
        with log:
            self.processes[program] = subprocess.Popen(
                [str(binaries.path(program)), *flags],
                cwd=self.folder,
                stdout=log,
                stderr=log,
                env={**os.environ, "NO_PROXY": "127.0.0.1"},
                preexec_fn=end_with_parent,
            )

    def _wait_until_ready(self) -> None:
        trusted = urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=self._pki / "ca.crt"))
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), trusted)
        self._wait(lambda: _answers(opener, f"{self.url}/readyz"), "the API server is ready")

    def _wait_for_service_accounts(self, namespace: str) -> None:
        """Without its default account a namespace takes no pods."""
        account = (
            "get",
            "serviceaccount",
            "default",
            "--namespace",
            namespace,
            "--ignore-not-found",
            "-oname",
        )
        self._wait(lambda: bool(self.kubectl(*account)), f"namespace {namespace} has its service account")

    def _wait(self, true: Any, what: str) -> None:
        end = time.monotonic() + START_SECONDS
        while not true():
            self.check()
            if time.monotonic() > end:
                raise ControlPlaneError(f"not within {START_SECONDS} s: {what} (logs: {self.folder})")
            time.sleep(0.1)

    def check(self) -> None:
        """Raise ControlPlaneError if a process has ended."""
        for name, process in self.processes.items():
            if process.poll() is not None:
                end = needs.last_lines((self.folder / f"{name}.log").read_text(errors="replace"), 5)
                raise ControlPlaneError(f"{name} has ended with status {process.returncode}: {end}")


def end_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _answers(opener: urllib.request.OpenerDirector, url: str) -> bool:
    try:
        opener.open(url, timeout=2).close()
    except (urllib.error.HTTPError, OSError):
        return False
    return True


def cpu_seconds(pid: int) -> float:
    """CPU time of a process, its user and system time. 0 if it does not exist."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def peak_mib(pid: int) -> float:
    """Peak resident memory of a process in MiB. 0 if it does not exist."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return 0.0


if __name__ == "__main__":  # for a look at it by hand
    with ControlPlane(Path(sys.argv[1]).resolve()) as plane:
        print(f"export KUBECONFIG={plane.kubeconfig}")
        with contextlib.suppress(KeyboardInterrupt):
            plane.processes["kube-apiserver"].wait()
