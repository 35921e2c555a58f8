"""Compiles the cluster's programs from pinned Go modules into a cache that checkouts share.

A target's folder is named by the hash of its inputs (sources or module versions, and flags). It appears by
rename, so an interrupted build never counts as done. No binary is downloaded. Old builds stay until they are
deleted by hand.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from devcluster import ClusterError, needs, say

SOURCES = Path(__file__).parent / "kube"
VERSITYGW = "github.com/versity/versitygw/cmd/versitygw@v1.8.0"
TRAINING_OPERATOR = "github.com/kubeflow/training-operator/cmd/training-operator.v1@v1.9.3"
KUEUE_MANAGER = "sigs.k8s.io/kueue/cmd/kueue@v0.17.0"
KIND_PROGRAM = "sigs.k8s.io/kind@v0.33.0"
FLAGS = ("-v", "-trimpath", "-ldflags")


@dataclass(frozen=True)
class Target:
    """Programs that are compiled together."""

    name: str
    programs: tuple[str, ...]
    """File names in the target's folder. The folder exists only with all of them."""
    inputs: Callable[[], bytes]
    """Everything that determines the result. Its hash names the folder."""
    build: Callable[[Path, Path], None]
    """Compiles into a folder and logs to a file."""
    minutes: int
    """Duration of a first compilation on two cores. The user is told."""


def path(name: str) -> Path:
    """The file of a program, compiled now if missing. Raises KeyError for an unknown name."""
    target = next((target for target in TARGETS if name in target.programs), None)
    if target is None:
        raise KeyError(f"{name}: none of {', '.join(name for target in TARGETS for name in target.programs)}")
    return folder(target) / name


def folder(target: Target) -> Path:
    """The folder of a target, compiled now if missing. Raises ClusterError with the compiler's last lines."""
    done = cache() / f"{target.name}-{hashlib.sha256(target.inputs()).hexdigest()[:16]}"
    if done.exists():
        return done
    cache().mkdir(parents=True, exist_ok=True)
    with (cache() / f"{target.name}.lock").open("w") as lock:
        if not try_lock(lock.fileno()):
            say(f"{target.name} is being compiled by another process; waiting")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            compile_whole(target, done)
    return done


def compile_whole(target: Target, done: Path) -> None:
    """Compile beside `done`, then rename. The caller holds the target's lock.

    Removes what interrupted builds left. Their compilers may still write, so each build has its own folder.
    """
    for left in cache().glob(f"{done.name}.building-*"):
        shutil.rmtree(left, ignore_errors=True)
    building, log = cache() / f"{done.name}.building-{os.getpid()}", done.with_suffix(".log")
    log.unlink(missing_ok=True)
    building.mkdir()
    needs.disk(cache(), 1)
    say(
        f"compiling {target.name}, about {target.minutes} min if Go's cache does not have it yet (log: {log})"
    )
    started = time.monotonic()
    target.build(building, log)
    if missing := [program for program in target.programs if not (building / program).exists()]:
        raise ClusterError(f"compiling {target.name} made no {', '.join(missing)}: see {log}")
    building.rename(done)
    say(f"compiled {target.name} in {time.monotonic() - started:.0f} s")


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vpmoe" / "devcluster"


def kubernetes_version() -> str:
    """The version in kube/go.mod, such as 1.36.3."""
    found = re.search(r"k8s\.io/kubernetes v(\S+)", (SOURCES / "go.mod").read_text())
    assert found, "kube/go.mod requires k8s.io/kubernetes"
    return found[1]


def kube_linker_flags() -> str:
    """Strip symbols, and set the version that `kubectl version` and the node's status show."""
    version = kubernetes_version()
    major, minor, _ = version.split(".")
    stamp = {
        "k8s.io/component-base/version.gitVersion": f"v{version}",
        "k8s.io/component-base/version.gitMajor": major,
        "k8s.io/component-base/version.gitMinor": minor,
        "k8s.io/client-go/pkg/version.gitVersion": f"v{version}",
    }
    return " ".join(["-s -w", *(f"-X {name}={value}" for name, value in stamp.items())])


def kube_inputs() -> bytes:
    files = [(SOURCES / name).read_bytes() for name in ("main.go", "go.mod", "go.sum")]
    return b"\0".join([*files, kube_linker_flags().encode()])


def build_kube(into: Path, log: Path) -> None:
    """Kubernetes, etcd, CoreDNS, kubeadm, kubectl and helm as one file with many names; and Kubernetes'
    static `pause`."""
    needs.packages(needs.COMPILER_PACKAGES)
    run_go(["build", *FLAGS, kube_linker_flags(), "-o", str(into / "kube"), "."], log, cwd=SOURCES)
    for name in KUBE_PROGRAMS:
        (into / name).symlink_to("kube")
    source = (
        module_folder(f"k8s.io/kubernetes@v{kubernetes_version()}") / "build" / "pause" / "linux" / "pause.c"
    )
    run_logged(
        ["gcc", "-Os", "-static", "-DVERSION=dev", "-o", str(into / "pause"), str(source)],
        log,
        dict(os.environ),
    )


def build_versitygw(into: Path, log: Path) -> None:
    run_go(["install", *FLAGS, "-s -w", VERSITYGW], log, GOBIN=str(into))


def build_training_operator(into: Path, log: Path) -> None:
    run_go(["install", *FLAGS, "-s -w", TRAINING_OPERATOR], log, GOBIN=str(into))
    (into / "training-operator.v1").rename(into / "training-operator")
    copy_folder(TRAINING_OPERATOR, "manifests", into / "manifests")


def build_kueue(into: Path, log: Path) -> None:
    run_go(["install", *FLAGS, "-s -w", KUEUE_MANAGER], log, GOBIN=str(into))
    copy_folder(KUEUE_MANAGER, "config", into / "manifests")


def build_kind(into: Path, log: Path) -> None:
    """kind, and the files that a node image needs."""
    run_go(["install", *FLAGS, "-s -w", KIND_PROGRAM], log, GOBIN=str(into))
    copy_folder(KIND_PROGRAM, "images/base/files", into / "files")


def copy_folder(program: str, folder: str, into: Path) -> None:
    """Copy a folder of a program's module: its use then needs neither Go nor its module cache."""
    path, _, version = program.partition("@")
    shutil.copytree(module_folder(f"{path.split('/cmd/')[0]}@{version}") / folder, into)
    for copied in (into, *into.rglob("*")):
        copied.chmod(0o755 if copied.is_dir() else 0o644)  # Go's module cache is read-only


def module_folder(module: str) -> Path:
    """The folder of a Go module, downloaded now if missing."""
    found = subprocess.run(
        ["go", "mod", "download", "-json", module],
        env=needs.go(),
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode != 0:
        raise ClusterError(f"go mod download {module}: {needs.last_lines(found.stdout + found.stderr, 6)}")
    return Path(json.loads(found.stdout)["Dir"])


def run_go(arguments: list[str], log: Path, cwd: Path = Path("/"), **variables: str) -> None:
    needs.disk(cache(), 6)  # modules and compiled packages of a first build
    run_logged(["go", *arguments], log, {**needs.go(), **variables}, cwd)


def run_logged(command: list[str], log: Path, environment: dict[str, str], cwd: Path = Path("/")) -> None:
    """Run a compiler, its output in `log`, with a progress line a minute. Raises ClusterError with its last
    lines."""
    compiled, said, started = 0, time.monotonic(), time.monotonic()
    with (
        log.open("a") as file,
        subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=file, stderr=subprocess.PIPE, text=True
        ) as process,
    ):
        for line in process.stderr or ():
            file.write(line)
            compiled += not line.startswith("go: ")
            if time.monotonic() - said > 60:
                said = time.monotonic()
                say(f"  {compiled} packages so far, {(said - started) / 60:.1f} min")
    if process.returncode != 0:
        end = needs.last_lines(log.read_text(), 6)
        raise ClusterError(
            f"{command[0]} {command[1]} failed with status {process.returncode}: {end} (whole log: {log})"
        )


def try_lock(descriptor: int) -> bool:
    """Take the lock if it is free. Returns whether it was."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


CONTROL_PLANE = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")
KUBE_PROGRAMS = (*CONTROL_PLANE, "kubelet", "kube-proxy", "kubeadm", "coredns", "kubectl", "helm")
KUBE = Target("kube", ("kube", "pause", *KUBE_PROGRAMS), kube_inputs, build_kube, minutes=6)
S3 = Target("versitygw", ("versitygw",), lambda: VERSITYGW.encode(), build_versitygw, minutes=1)
KUBEFLOW = Target(
    "training-operator",
    ("training-operator", "manifests"),
    lambda: TRAINING_OPERATOR.encode(),
    build_training_operator,
    minutes=2,
)
KUEUE = Target("kueue", ("kueue", "manifests"), lambda: KUEUE_MANAGER.encode(), build_kueue, minutes=5)
KIND = Target("kind", ("kind", "files"), lambda: KIND_PROGRAM.encode(), build_kind, minutes=1)
TARGETS = (KUBE, S3, KUBEFLOW, KUEUE, KIND)
