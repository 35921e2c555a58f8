"""Finds, starts and kills the node from the host, and removes what remains of a node that has ended.

The node is one process (node.py). Its namespaces end with it. The kernel may keep the network link for
minutes, and cgroups and files remain: `sweep` removes them.
"""

import functools
import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from devcluster import ClusterError, configuration, needs

CHECKOUT = Path(__file__).resolve().parents[1]
LINK = "vpmoe-dev"
NAMESPACES = ("--mount", "--mount-proc", "--pid", "--fork", "--net", "--uts", "--ipc", "--kill-child=SIGKILL")
ENVIRONMENT = {"PATH": needs.PATH, "LANG": "C.UTF-8", "HOME": "/"}
"""Environment of the node's programs. They inherit no variable of the caller: no proxy, no credential."""


@dataclass(frozen=True)
class Node:
    """A running node: the host's process id of its pid 1, and its state folder."""

    pid: int
    state: Path


def running() -> Node | None:
    """The node on this machine, started from any checkout; None if there is none.

    Its addresses are fixed, so there is at most one. A node inside a container of this machine is ignored:
    the pid namespace of the node is directly below the caller's.
    """
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if arguments[1:3] == ["-m", "devcluster.node"] and len(status_of(folder, "NSpid")) == 2:
                return Node(int(folder.name), Path(arguments[3]))
        except (FileNotFoundError, ProcessLookupError):  # the process has just ended
            continue
    return None


def status_of(process: Path, key: str) -> list[str]:
    """The values of one line of /proc/PID/status, split at white space."""
    return next(
        line for line in (process / "status").read_text().splitlines() if line.startswith(f"{key}:")
    ).split()[1:]


def start(state: Path) -> Node:
    """Start the node with the configuration in `state` and connect it to the host.

    Returns while its programs are still starting. Raises ClusterError if the node does not start.
    """
    command = [
        "setsid",
        "--fork",
        "unshare",
        *NAMESPACES,
        sys.executable,
        "-m",
        "devcluster.node",
        str(state),
    ]
    with (state / "logs" / "node.log").open("wb") as log:
        subprocess.run(
            command,
            cwd=CHECKOUT,
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            check=True,
        )
    wait_for(lambda: running() is not None or log_of(state, "node") != "", "the node's first process", 10)
    node = running()
    if node is None:
        raise ClusterError(f"the node did not start: {log_of(state, 'node')}")
    ip("link", "add", LINK, "type", "veth", "peer", "name", "eth0", "netns", str(node.pid))
    ip("address", "add", f"{configuration.HOST}/24", "dev", LINK)
    ip("link", "set", LINK, "up")
    return node


def load_images(node: Node, name: str) -> None:
    """Load the images of an archive in config/. Raises ClusterError with containerd's message."""
    enter = ("nsenter", f"--target={node.pid}", "--mount")
    command = [*enter, *configuration.IMPORT_IMAGES, f"{configuration.CONFIG}/{name}"]
    ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise ClusterError(f"the images could not be loaded: {needs.last_lines(ended.stderr)}")


def end(node: Node) -> None:
    """Kill the node and wait until its last process, which created its namespaces, has ended."""
    process = Path("/proc", str(node.pid))
    try:
        maker = Path("/proc", status_of(process, "PPid")[0])
        os.kill(node.pid, signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError):  # the node has just ended
        return
    wait_for(lambda: not alive(process) and not alive(maker), f"the end of process {node.pid}", 120)


def alive(process: Path) -> bool:
    """Whether a process exists and is not a zombie, which only its parent can remove."""
    try:
        return status_of(process, "State")[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def sweep(state: Path) -> None:
    """Remove what remains of a node that has ended: its link, its cgroups and its files.

    The bucket's data and the logs are kept.
    """
    remove_link()
    for root in configuration.cgroup_roots(Path("/proc/self/mounts").read_text()):
        remove_cgroup(Path(root, configuration.cgroup_name(str(state))))
    for path in (*(state / name for name in ("kubelet", "config", "ready.json")), *state.glob("pki*")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def remove_link() -> None:
    """Remove the link to the node, if it exists. The kernel may remove it at the same time."""
    try:
        if link_exists():
            ip("link", "delete", LINK)
    except ClusterError:
        if link_exists():
            raise


def remove_cgroup(top: Path) -> None:
    """Remove a cgroup and all below it. The kernel may keep them for a moment after their processes ended."""
    folders = sorted(
        (Path(folder) for folder, _, _ in os.walk(top)), key=lambda path: len(path.parts), reverse=True
    )
    for folder in folders:
        wait_for(functools.partial(removed, folder), f"{folder} to become empty", 60)


def removed(folder: Path) -> bool:
    """Try to remove an empty folder. Returns whether it no longer exists."""
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:  # busy
        return False
    return True


def subnet_is_free() -> None:
    """Raise ClusterError if another link of this machine uses the node's subnet."""
    wanted = ipaddress.IPv4Network(configuration.SUBNET)
    for route in json.loads(ip("-json", "-4", "route")):
        if route["dst"] == "default" or route.get("dev") == LINK:
            continue
        there = ipaddress.IPv4Network(route["dst"])
        if there.subnet_of(wanted):  # the node's route has precedence over a wider one
            link = route.get("dev")
            raise ClusterError(
                f"{configuration.SUBNET} is taken by {link} ({there}). Remove it, or use CLUSTER=current."
            )


def link_exists() -> bool:
    return LINK in (name for _, name in socket.if_nameindex())


def ip(*arguments: str) -> str:
    """The output of the command `ip`. Raises ClusterError with its message if it fails."""
    ended = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise ClusterError(f"ip {' '.join(arguments)}: {needs.last_lines(ended.stderr)}")
    return ended.stdout


def log_of(state: Path, name: str) -> str:
    """The last line of a log of the node; empty if there is none."""
    path = state / "logs" / f"{name}.log"
    return needs.last_lines(path.read_text(errors="replace"), 1) if path.exists() else ""


def wait_for(true: Callable[[], bool], what: str, seconds: float) -> None:
    """Return once `true` does. Raises ClusterError, naming `what`, after `seconds`."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise ClusterError(f"waited {seconds:g} s for {what}")
        time.sleep(0.02)
