"""Parts of the development cluster: compiling its programs, checking the machine, configuration."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from devcluster import (
    ClusterError,
    access,
    binaries,
    certificates,
    cluster,
    configuration,
    dev,
    host,
    image,
    needs,
)
from tests.fakes.go_target import HELLO, small

pytestmark = pytest.mark.cluster


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of compiled programs. Go's own cache is kept."""
    go = subprocess.run(["go", "env", "GOCACHE"], capture_output=True, text=True, check=True).stdout.strip()
    monkeypatch.setenv("GOCACHE", go)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "vpmoe" / "devcluster"


def test_a_target_is_compiled_again_only_when_its_sources_change(cache: Path) -> None:
    first = binaries.folder(small(HELLO))
    compiled = (first / "small").stat()
    assert binaries.folder(small(HELLO)) == first
    assert (first / "small").stat() == compiled
    assert binaries.folder(small(HELLO + "\n")) != first


def test_a_killed_build_is_repeated(cache: Path) -> None:
    code = (
        "from devcluster import binaries; from tests.fakes.go_target import small; "
        f"binaries.folder(small({HELLO!r}))"
    )
    killed = subprocess.Popen([sys.executable, "-c", code], cwd=host.CHECKOUT, stderr=subprocess.DEVNULL)
    host.wait_for(lambda: any(cache.glob("*.building-*/main.go")), "the build", 20)
    killed.kill()
    killed.wait()
    assert [path.name for path in cache.iterdir() if path.is_dir() and ".building-" not in path.name] == []
    assert (binaries.folder(small(HELLO)) / "small").exists()
    assert not any(cache.glob("*.building-*"))


def test_an_error_of_the_compiler_is_reported_with_its_log(cache: Path) -> None:
    with pytest.raises(ClusterError, match=r"go build failed with status 1: .*undefined: missing.*\.log"):
        binaries.folder(small("package main\n\nfunc main() { missing() }\n"))


def test_openssl_of_a_killed_start_does_not_write_into_the_files_of_the_next_one(tmp_path: Path) -> None:
    slow = tmp_path / "openssl"
    slow.write_text(f'#!/bin/sh\ntouch {tmp_path}/started\nsleep 1\nexec {shutil.which("openssl")} "$@"\n')
    slow.chmod(0o755)
    folder = tmp_path / "state" / "webhook"
    folder.parent.mkdir()
    code = (
        "from devcluster import certificates; "
        f"certificates.make_webhook(certificates.Path({str(folder)!r}), 'ca', 'service', 'namespace')"
    )
    killed = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=host.CHECKOUT,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    host.wait_for((tmp_path / "started").exists, "openssl", 20)
    killed.kill()
    killed.wait()
    certificates.make_webhook(folder, "ca", "service", "namespace")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    time.sleep(2)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    # the training operator reads only this format
    assert files["ca.key"].startswith(b"-----BEGIN RSA PRIVATE KEY-----")


def test_an_unknown_program_is_rejected_by_name() -> None:
    with pytest.raises(KeyError, match=r"docker: none of kube, pause, etcd"):
        binaries.path("docker")


@pytest.mark.parametrize(
    "patch, message",
    [
        pytest.param(
            ("sys.platform", "darwin"),
            "needs Linux, this is darwin. Or use another cluster: CLUSTER=kind needs Docker, CLUSTER=current",
            id="not Linux",
        ),
        pytest.param(
            ("os.geteuid", lambda: 1000), "needs root .* run it with sudo. .*CLUSTER=current", id="not root"
        ),
    ],
)
def test_an_unsuitable_machine_is_rejected_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, patch: tuple[str, object], message: str
) -> None:
    monkeypatch.setattr(*patch)
    with pytest.raises(ClusterError, match=message):
        needs.machine()


def test_too_little_disk_space_is_named_at_the_start(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free / 1e9
    with pytest.raises(ClusterError, match=rf"{tmp_path}: .* GB free, .* GB are needed"):
        needs.disk(tmp_path / "not" / "there" / "yet", free * 2)


def test_missing_packages_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(
        ClusterError,
        match=r"missing here: containerd, runc\. .*sudo apt-get install --yes containerd runc\).*=current",
    ):
        needs.packages({"no-such-containerd": "containerd", "no-such-runc": "runc", "/usr": "base-files"})


@pytest.mark.parametrize(
    "chosen, message",
    [
        pytest.param("minikube", "CLUSTER=minikube: choose dev .* kind .* or current", id="unknown"),
        pytest.param("current", "AWS_ENDPOINT_URL", id="current without a store"),
    ],
)
def test_an_invalid_value_of_cluster_is_rejected_with_the_choices(
    monkeypatch: pytest.MonkeyPatch, chosen: str, message: str
) -> None:
    monkeypatch.setenv("CLUSTER", chosen)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.setenv("PATH", f"{dev.up().kubectl_path.parent}:{os.environ['PATH']}")
    with pytest.raises(ClusterError, match=message):
        cluster.up()


def test_the_users_own_cluster_is_named_used_and_never_stopped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    running = dev.up()
    monkeypatch.setenv("CLUSTER", "current")
    monkeypatch.setenv("KUBECONFIG", str(running.kubeconfig))
    monkeypatch.setenv("PATH", f"{running.kubectl_path.parent}:{os.environ['PATH']}")
    for name, value in (("ENDPOINT_URL", "http://store"), ("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("REGISTRY", "registry.example.com/vpmoe")
    monkeypatch.setenv("TAG", "v1")
    users = cluster.up()
    assert "CLUSTER=current: context devcluster at https://10.89.0.2:6443" in capsys.readouterr().err
    assert users.s3 == access.S3("http://store", "a", "b", pod_endpoint="http://store")
    assert "images.registry=registry.example.com/vpmoe" in users.chart_arguments
    assert users.kubectl("get", "nodes", "--output=name") == "node/node0\n"
    assert cluster.status()[0].startswith("NAME")
    with pytest.raises(ClusterError, match="your own cluster, down does not touch it"):
        cluster.down()
    assert host.running()


@pytest.mark.parametrize(
    "mounts, roots",
    [
        pytest.param("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0", ["/sys/fs/cgroup"], id="version 2"),
        pytest.param(
            "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\nproc /proc proc rw 0 0",
            ["/sys/fs/cgroup/cpu"],
            id="version 1",
        ),
        pytest.param(
            "cgroup /c/cpu cgroup rw 0 0\ncgroup2 /c/unified cgroup2 rw 0 0",
            ["/c/cpu", "/c/unified"],
            id="hybrid",
        ),
    ],
)
def test_every_cgroup_hierarchy_is_found(mounts: str, roots: list[str]) -> None:
    assert configuration.cgroup_roots(mounts) == roots


def test_containers_mount_only_programs_and_code_of_the_host() -> None:
    mounts = configuration.mounts(Path("/checkout"), Path("/checkout/.venv"), Path("/opt/python"))
    assert {mount.source: mount.target for mount in mounts} == {
        "/checkout/vpmoe": "/opt/vpmoe/vpmoe",
        "/checkout/jobs": "/opt/vpmoe/jobs",
        "/checkout/operator/distill_operator": "/opt/vpmoe/operator/distill_operator",
        "/checkout/tests/fakes/standin": "/opt/vpmoe/tests/fakes/standin",
        "/checkout/.venv": "/opt/vpmoe/.venv",
        "/opt/python": "/opt/python",
    }
    spec = configuration.container_spec({"process": {"rlimits": []}, "mounts": []}, mounts)
    assert [mount["destination"] for mount in spec["mounts"][:4]] == [
        "/usr",
        "/etc/ssl",
        "/coredns",
        "/manager",
    ]
    assert all("ro" in mount["options"] for mount in spec["mounts"])


def test_the_interpreter_of_the_system_needs_no_mount() -> None:
    assert "/usr" not in [
        mount.source
        for mount in configuration.mounts(Path("/checkout"), Path("/checkout/.venv"), Path("/usr"))
    ]


def test_building_the_image_again_gives_the_same_bytes() -> None:
    first = image.archive(b"pause", "a" * 40)
    time.sleep(0.01)
    assert image.archive(b"pause", "a" * 40) == first
    assert image.archive(b"pause", "b" * 40) != first
