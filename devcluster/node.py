"""Pid 1 of the node: sets up file system and network, starts the programs, and ends when one of them ends.

host.py starts it in new mount, pid, network, uts and ipc namespaces. When it ends, the kernel kills all other
processes of the node, and mounts, addresses and iptables rules go with the namespaces. It restarts no
program: the end of one is a fault, and `up` names the program.
"""

import json
import os
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from devcluster import configuration
from devcluster.configuration import NODE, STATE


def main(state: Path) -> None:
    os.chdir("/")
    plan = json.loads((state / "config" / "node.json").read_text())
    file_system(plan["binds"])
    cgroups(plan["cgroup"])
    network()
    running: dict[int, str] = {}
    daemons = [configuration.Daemon(**daemon) for daemon in plan["daemons"]]
    start([daemon for daemon in daemons if not daemon.needs_api], running)
    wait_for(lambda: Path(configuration.CONTAINERD).exists(), running)
    load_images(running)
    wait_for(api_is_ready, running)
    start([daemon for daemon in daemons if daemon.needs_api], running)
    while True:  # pid 1 also reaps orphaned processes
        ended(*os.wait(), running)


def file_system(binds: dict[str, str]) -> None:
    """The host's root with new /run, /var and /tmp. Bind shared folders first: they may be below those."""
    run("mount", "--make-rprivate", "/")
    run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
    for source, target in binds.items():
        bind(Path(source), Path(target))
    for path, mode in (("/var", "755"), ("/tmp", "1777")):
        run("mount", "-t", "tmpfs", "-o", f"mode={mode}", "tmpfs", path)
    for name in ("netns", "lock"):
        Path("/run", name).mkdir()
    Path("/var/run").symlink_to("/run")
    # On disk, because they grow with what pods write: volumes and logs.
    bind(Path(STATE, "kubelet"), Path("/var/lib/kubelet"))
    bind(Path(STATE, "logs", "pods"), Path("/var/log/pods"))
    for name in configuration.KERNEL_SETTINGS:
        own = Path("/run/devcluster/kernel") / name.replace("/", ".")
        own.parent.mkdir(exist_ok=True)
        own.write_text(Path("/proc/sys", name).read_text())
        run("mount", "--bind", str(own), f"/proc/sys/{name}")


def bind(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    run("mount", "--rbind", str(source), str(target))


def cgroups(name: str) -> None:
    """Create the node's cgroup in every hierarchy. In version 2 the kubelet needs every controller in it."""
    for root in configuration.cgroup_roots(Path("/proc/self/mounts").read_text()):
        controllers, enabled = Path(root, "cgroup.controllers"), Path(root, "cgroup.subtree_control")
        if controllers.exists():
            try:
                enabled.write_text(
                    " ".join(f"+{controller}" for controller in controllers.read_text().split())
                )
            except OSError as error:
                sys.exit(
                    f"{enabled}: {error.strerror}: in a container, move the processes in {root} "
                    "to a cgroup below it first"
                )
        Path(root, name).mkdir(exist_ok=True)


def network() -> None:
    """Wait until the launcher has moved its end of the link here, and give it the node's address."""
    socket.sethostname(configuration.NODE_NAME)
    run("ip", "link", "set", "lo", "up")
    while "eth0" not in (name for _, name in socket.if_nameindex()):
        time.sleep(0.01)
    run("ip", "address", "add", f"{NODE}/24", "dev", "eth0")
    run("ip", "link", "set", "eth0", "up")
    run("ip", "route", "add", "default", "via", configuration.HOST)


def start(daemons: list[configuration.Daemon], running: dict[int, str]) -> None:
    for daemon in daemons:
        streams = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (
                os.POSIX_SPAWN_OPEN,
                1,
                f"{STATE}/logs/{daemon.name}.log",
                os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
                0o644,
            ),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ]
        environment = {**os.environ, **daemon.environment}
        running[os.posix_spawnp(daemon.command[0], daemon.command, environment, file_actions=streams)] = (
            daemon.name
        )


def load_images(running: dict[int, str]) -> None:
    command = (*configuration.IMPORT_IMAGES, f"{configuration.CONFIG}/{configuration.IMAGES_FILE}")
    wait_for(lambda: subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == 0, running)


def api_is_ready() -> bool:
    trusted = ssl.create_default_context(cafile=f"{configuration.PKI}/ca.crt")
    try:
        with urllib.request.urlopen("https://127.0.0.1:6443/readyz", timeout=1, context=trusted):
            return True
    except OSError:
        return False


def wait_for(true: Callable[[], bool], running: dict[int, str]) -> None:
    """Poll without a deadline: the launcher has one."""
    while not true():
        while (child := os.waitpid(-1, os.WNOHANG))[0]:
            ended(*child, running)
        time.sleep(0.05)


def ended(pid: int, status: int, running: dict[int, str]) -> None:
    """Exit if it was one of the programs."""
    if pid in running:
        sys.exit(f"{running[pid]} ended with status {os.waitstatus_to_exitcode(status)}")


def run(*command: str) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
