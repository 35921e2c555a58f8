"""Checks the machine: Linux, root, Debian packages, disk space. Installs packages if it may, else names the
remedy.

Cgroup controllers and kernel modules are not checked: without them a program of the node ends with a message.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from devcluster import ClusterError, say

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""The node's search path. A root shell's PATH may lack the sbin folders."""

ELSEWHERE = (
    "Or use another cluster: CLUSTER=kind needs Docker, CLUSTER=current takes kubectl's current context."
)

NODE_PACKAGES = {
    "containerd": "containerd",
    "ctr": "containerd",
    "runc": "runc",
    "/usr/lib/cni/ptp": "containernetworking-plugins",
    "iptables": "iptables",
    "ip": "iproute2",
    "openssl": "openssl",
    "mount": "mount",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "setsid": "util-linux",
}
"""Program or file → its Debian package."""

COMPILER_PACKAGES = {"gcc": "gcc", "/usr/include/unistd.h": "libc6-dev"}

GO = (1, 26)
"""The version that kube/go.mod needs. Go 1.21 and later download it themselves."""


def machine() -> None:
    """Raise ClusterError unless the node can run on this machine. Installs missing packages if possible."""
    if sys.platform != "linux":
        raise ClusterError(f"the development cluster needs Linux, this is {sys.platform}. {ELSEWHERE}")
    root()
    packages(NODE_PACKAGES)


def root() -> None:
    if os.geteuid() != 0:
        raise ClusterError(
            f"the development cluster needs root for namespaces and network: run it with sudo. {ELSEWHERE}"
        )


def packages(wanted: dict[str, str]) -> None:
    """Install the Debian packages whose programs are missing, or raise ClusterError naming them."""
    missing = sorted({package for program, package in wanted.items() if not found(program)})
    if not missing:
        return
    command = f"apt-get install --yes {' '.join(missing)}"
    if os.geteuid() != 0 or not found("apt-get"):
        raise ClusterError(
            f"missing here: {', '.join(missing)}. Install them (Debian, Ubuntu: sudo {command}). {ELSEWHERE}"
        )
    say(f"installing {' '.join(missing)}")
    install = [*command.split(), "--quiet", "--no-install-recommends"]
    # First with the package lists that are there.
    if run_apt(install) and (failure := run_apt(["apt-get", "update", "--quiet"]) or run_apt(install)):
        raise ClusterError(f"{command}: {failure} {ELSEWHERE}")
    if still := sorted(program for program in wanted if not found(program)):
        raise ClusterError(f"installed {' '.join(missing)}, and {', '.join(still)} is not there. {ELSEWHERE}")


def run_apt(command: list[str]) -> str:
    """Its last lines if it failed, else nothing."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return last_lines(ended.stderr or ended.stdout) if ended.returncode else ""


def go() -> dict[str, str]:
    """The environment for Go. Raises ClusterError if Go is too old."""
    packages({"go": "golang-go"})
    version = subprocess.run(
        ["go", "env", "GOVERSION"], capture_output=True, text=True, check=True
    ).stdout.strip()
    numbers = tuple(int(part) for part in version.removeprefix("go").split(".")[:2])
    if numbers >= GO:
        return dict(os.environ)
    if numbers >= (1, 21):
        return {**os.environ, "GOTOOLCHAIN": "auto"}
    raise ClusterError(
        f"{version} is too old to compile the cluster's programs: put Go {GO[0]}.{GO[1]} or later on PATH."
    )


def disk(folder: Path, gigabytes: float) -> None:
    """Raise ClusterError unless the file system of `folder` has that much free space."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free / 1e9
    if free < gigabytes:
        raise ClusterError(f"{existing}: {free:.1f} GB free, {gigabytes:g} GB are needed. Free some space.")


def found(program: str) -> bool:
    """Whether a program is on PATH, or a file exists."""
    if program.startswith("/"):
        return Path(program).exists()
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:{PATH}") is not None


def last_lines(text: str, count: int = 3) -> str:
    """The end of a program's output on one line, for an error message."""
    lines: Iterable[str] = [line.strip() for line in text.splitlines() if line.strip()][-count:]
    return " | ".join(lines)
