"""Start, stop and faults of the development cluster, in namespaces separate from this checkout's cluster.

The state that a node can leave on the machine (processes, mounts, links, packet rules, kernel settings,
cgroups) is compared before the first start and after the last stop.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from devcluster import addons, configuration, dev, host, needs

pytestmark = pytest.mark.cluster

DIES_WITH_PYTEST = ("setpriv", "--pdeathsig=KILL")
NAMESPACES = ("--mount", "--mount-proc", "--pid", "--fork", "--net", "--kill-child=SIGKILL")
FIRST_PROCESS = (
    "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN); signal.pause()"  # reaps orphans
)
KERNEL_SETTINGS = " ".join(f"/proc/sys/{name}" for name in configuration.KERNEL_SETTINGS)
STATE_COMMANDS = {
    # no pipe, because its processes would be listed
    "processes": "for p in /proc/[0-9]*; do tr '\\0' ' ' <$p/cmdline; echo; done",
    "mounts": "cut -d' ' -f1,2,3 /proc/self/mounts",
    "links and addresses": "ip -oneline address show | cut -c1-60",
    "routes": "ip route show table all",
    "packet rules": "iptables-save; ip6tables-save",
    "kernel settings": f"grep . {KERNEL_SETTINGS}",
    "folders of a node": "ls -d /var/lib/kubelet /var/lib/cni /var/lib/etcd /var/log/pods /var/log/containers"
    " /tmp/containerd* 2>/dev/null",
}


@dataclass
class Machine:
    """Namespaces with their own processes, mounts, network and /run, and a copy of the checkout."""

    checkout: Path
    first_process: int
    """The process id of its first process on the host."""
    before: dict[str, str] = field(default_factory=dict)

    def start(self, *command: str | Path, checkout: Path | None = None) -> subprocess.Popen[str]:
        enter = (
            "nsenter",
            f"--target={self.first_process}",
            "--mount",
            "--pid",
            "--net",
            f"--wd={checkout or self.checkout}",
        )
        environment = {**os.environ, "CLUSTER": "dev"}
        return subprocess.Popen(
            [*enter, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, *command: str | Path, checkout: Path | None = None) -> tuple[int, str, str]:
        process = self.start(*command, checkout=checkout)
        output, errors = process.communicate()
        return process.returncode, output, errors

    def cluster(self, command: str, checkout: Path | None = None) -> tuple[int, str, str]:
        return self.run(sys.executable, "-m", "devcluster", command, checkout=checkout)

    def up(self) -> str:
        """Bring the cluster up. Returns its messages."""
        status, output, errors = self.cluster("up")
        assert status == 0, errors
        assert output.splitlines()[-1] == f"export KUBECONFIG={self.state}/kubeconfig"
        return errors

    def kubectl(self, *arguments: str) -> tuple[int, str, str]:
        return self.run(
            "env", f"KUBECONFIG={self.state}/kubeconfig", self.state / "bin" / "kubectl", *arguments
        )

    def kill(self, argument: str) -> None:
        """Send SIGKILL to every process with this argument."""
        self.run(
            "env",
            f"killed={argument}",
            "sh",
            "-c",
            'kill -KILL $(grep -lzxF -- "$killed" /proc/[0-9]*/cmdline | cut -d/ -f3)',
        )

    def machine_state(self) -> dict[str, str]:
        found = {name: self.run("sh", "-c", command)[1] for name, command in STATE_COMMANDS.items()}
        return found | {
            "cgroups": "\n".join(
                map(str, Path("/sys/fs/cgroup").glob(f"**/{configuration.cgroup_name(str(self.state))}"))
            )
        }

    def node_process(self) -> int | None:
        """The process id of the node's first process in these namespaces; None if there is no node."""
        code = "from devcluster import host; print(getattr(host.running(), 'pid', ''))"
        output = self.run(sys.executable, "-c", code)[1].strip()
        return int(output) if output else None

    @property
    def state(self) -> Path:
        return self.checkout / ".devcluster"


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    needs.machine()  # installs and compiles what is missing: the namespaces have no network
    dev.sources()
    checkout = tmp_path_factory.mktemp("checkout")
    for name in ("devcluster", "vpmoe", "jobs", "operator", "tests"):
        shutil.copytree(host.CHECKOUT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    (checkout / "commit").write_text("c" * 40 + "\n")  # it is no git checkout
    private_run = 'mount --make-rprivate / && mount -t tmpfs tmpfs /run && ip link set lo up && exec "$@"'
    first_process = ("sh", "-c", private_run, "sh", sys.executable, "-c", FIRST_PROCESS)
    outer = subprocess.Popen([*DIES_WITH_PYTEST, "unshare", *NAMESPACES, *first_process])
    children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
    host.wait_for(
        lambda: command_line(children.read_text().strip()).startswith(sys.executable),
        "the machine's first process",
        10,
    )
    machine = Machine(checkout, int(children.read_text()))
    machine.before = machine.machine_state()
    yield machine
    machine.cluster("down")
    outer.kill()
    outer.wait()


def command_line(pid: str) -> str:
    return Path("/proc", pid, "cmdline").read_bytes().replace(b"\0", b" ").decode() if pid else ""


def test_a_subnet_in_use_is_named(machine: Machine) -> None:
    machine.cluster("down")
    machine.run("ip", "link", "add", "podman1", "type", "veth", "peer", "name", "podman1-end")
    machine.run("ip", "address", "add", configuration.SUBNET, "dev", "podman1")
    machine.run("ip", "link", "set", "podman1", "up")
    status, _, errors = machine.cluster("up")
    machine.run("ip", "link", "delete", "podman1")
    assert (status, "10.89.0.0/24 is taken by podman1" in errors) == (1, True)


def test_a_second_up_keeps_the_node(machine: Machine) -> None:
    machine.up()
    node_process = machine.node_process()
    assert node_process
    assert machine.up() == ""
    assert machine.node_process() == node_process
    status, output, _ = machine.cluster("status")
    assert (status, f"process {node_process}," in output) == (0, True)


def test_after_up_gpus_are_allocatable_and_pytorchjobs_are_validated(machine: Machine) -> None:
    machine.up()
    assert (
        machine.kubectl("get", "node", "--output=jsonpath={.items[*].status.allocatable.nvidia\\.com/gpu}")[1]
        == "8"
    )
    two_masters = machine.checkout / "two-masters.yaml"
    two_masters.write_text(addons.PROBE.replace("replicas: 1", "replicas: 2"))
    status, _, errors = machine.kubectl("create", "--dry-run=server", f"--filename={two_masters}")
    assert (status, "spec.pytorchReplicaSpecs[Master].replicas: Forbidden: must be 1" in errors) == (1, True)


@pytest.mark.parametrize("command", ["up", "down", "status"])
def test_another_checkouts_cluster_is_named_and_not_changed(machine: Machine, command: str) -> None:
    machine.up()
    node_process = machine.node_process()
    status, _, errors = machine.cluster(command, checkout=host.CHECKOUT)
    assert status == 1
    assert f"process {node_process}" in errors
    assert f"{machine.state}/kubeconfig" in errors
    assert machine.node_process() == node_process


@pytest.mark.parametrize(
    "file, old, new",
    [
        pytest.param(
            "configuration.py", '"failSwapOn": False', '"failSwapOn": True', id="settings of a daemon"
        ),
        pytest.param("configuration.py", "GPUS = 8", "GPUS = 4", id="GPUs"),
        pytest.param("image.py", "nonroot:/tmp", "nonroot:/home", id="the image"),
        pytest.param("manifests/coredns.yaml", "ttl 1", "ttl 2", id="add-ons"),
    ],
)
def test_a_cluster_started_from_other_sources_is_rejected(
    machine: Machine, file: str, old: str, new: str
) -> None:
    machine.up()
    path = machine.checkout / "devcluster" / file
    source = path.read_text()
    path.write_text(source.replace(old, new))
    status, _, errors = machine.cluster("up")
    path.write_text(source)
    assert source != source.replace(old, new)
    assert (status, "started from other sources" in errors) == (1, True)


def test_the_node_exits_with_a_killed_daemon_and_names_it(machine: Machine) -> None:
    machine.up()
    machine.kill("/run/devcluster/kube/kube-scheduler")
    host.wait_for(lambda: machine.node_process() is None, "the node's exit", 10)
    assert (machine.state / "logs" / "node.log").read_text() == "scheduler ended with status -9\n"


def test_up_restarts_after_a_killed_node_and_a_killed_up_and_keeps_the_bucket(machine: Machine) -> None:
    machine.kill("devcluster.node")  # if the previous test left one
    bucket_folder, log = machine.state / "s3" / "kept", machine.state / "logs" / "apiserver.log"
    bucket_folder.mkdir(parents=True)
    log.unlink(missing_ok=True)
    interrupted = machine.start(sys.executable, "-m", "devcluster", "up")
    host.wait_for(log.exists, "the interrupted start", 30)
    machine.kill("up")
    interrupted.communicate()
    assert "was not finished" in machine.up()
    assert bucket_folder.is_dir()
    assert machine.kubectl("get", "nodes", "--output=name") == (0, "node/node0\n", "")


def test_down_restores_the_machine(machine: Machine) -> None:
    machine.up()
    state_when_running = machine.machine_state()
    for name in ("processes", "links and addresses", "cgroups"):
        assert state_when_running[name] != machine.before[name], f"a running cluster must change the {name}"
    status, _, errors = machine.cluster("down")
    assert status == 0, errors
    assert machine.machine_state() == machine.before
    assert not machine.state.exists()
    assert machine.cluster("down") == (0, "", "no development cluster is running\n")
