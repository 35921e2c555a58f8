"""`kubectl distill` on a real API server, with real pods that run stand-in jobs: status, logs, rights."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from distill_operator.kube import POD

from devcluster import ClusterError, install
from devcluster.access import Cluster, environment
from tests.fakes import run_harness
from tests.fakes.control_plane import ControlPlane
from tests.fakes.run_harness import ROOT, RunHarness
from tests.fakes.terminal import terminal
from tests.fakes.waiting import wait_until

PAIR = {"shape": "tiny", "gpus": 2, "gpusPerPod": 1}
VIEWER = f"{install.NAMESPACE}-distill-operator-viewer"


@pytest.fixture(scope="module")
def harness(cluster: Cluster, namespace: str) -> Iterator[RunHarness]:
    """Three runs: one is killed once, one fails for good, one waits for a Secret that does not exist."""
    run_harness.upgrade_operator(cluster, *run_harness.FAST)
    harness = RunHarness.create(cluster, namespace)
    harness.apply("killed", "steps=12 every=2 pause=0.5 kill=1:4", student=PAIR)
    harness.apply("refusing", "refuse=1:0")
    harness.apply("keyless", "steps=1", storage=harness.storage("to-come"))
    yield harness
    run_harness.restore_operator(cluster)


def vpmoe(
    harness: RunHarness, *arguments: str, kubeconfig: Path | None = None, code: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run `vpmoe …` in the namespace, as the cluster's administrator or another user."""
    ended = subprocess.run(
        [sys.executable, "-m", "vpmoe", *arguments, "--namespace", harness.namespace],
        cwd=ROOT,
        env=environment(kubeconfig or harness.cluster.kubeconfig),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == code, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    return ended


def test_a_run_is_watched_until_it_succeeds_and_its_logs_are_followed(harness: RunHarness) -> None:
    """The log of the second attempt is followed from before its pods run."""
    harness.wait_until(
        "killed", lambda: harness.step("killed").get("attempt") == 2, "the second attempt is made"
    )
    selector = "vpmoe.dev/run=killed,vpmoe.dev/step=vanilla,vpmoe.dev/attempt=2"
    harness.wait_until(
        "killed",
        lambda: len(harness.get_object(POD, labelSelector=selector)["items"]) == 2,
        "its pods exist",
    )
    followed = vpmoe(harness, "logs", "killed", "vanilla", "--follow").stdout.splitlines()
    pods = {f"killed-vanilla-a2-{role}-0" for role in ("master", "worker")}
    assert {line.partition(": ")[0] for line in followed} == pods
    watched = vpmoe(harness, "status", "killed", "--watch").stdout
    assert "Z Succeeded 100%: All 2 steps have succeeded" in watched
    assert re.search(r"step vanilla: Succeeded, 100%, .* of 6k tokens, attempt 2", watched)
    items = harness.get_object(POD, labelSelector=selector)["items"]
    left = {one["metadata"]["name"] for one in items if "deletionTimestamp" not in one["metadata"]}
    assert "killed-vanilla-a2-master-0" in left, "a worker that still ran at the end is deleted"
    for pod in pods & left:
        number = "0" if "master" in pod else "1"
        own = harness.kubectl("logs", pod)
        assert vpmoe(harness, "logs", "killed", "vanilla", "--pod", number).stdout == own
        assert [f"{pod}: {line}" for line in own.splitlines()] == [
            line for line in followed if line.startswith(pod)
        ]
    first = harness.kubectl("logs", "killed-vanilla-a1-master-0", "--tail=2")
    assert vpmoe(harness, "logs", "killed", "vanilla", "--attempt=1", "--pod=0", "--tail=2").stdout == first


def test_a_watched_run_that_fails_ends_with_1_and_says_where_to_look(harness: RunHarness) -> None:
    watched = vpmoe(harness, "status", "refusing", "--watch", code=1)
    assert "Failed" in watched.stdout and "stand-in refuses at step 0" in watched.stdout
    assert "`vpmoe logs refusing vanilla` shows its log" in watched.stdout
    assert "stand-in refuses at step 0" in vpmoe(harness, "logs", "refusing").stdout
    view = json.loads(vpmoe(harness, "status", "refusing", "--output=json").stdout)
    failed = next(step for step in view["steps"] if step["state"] == "Failed")
    assert [pod["state"] for pod in failed["pods"]] == ["Error, exit 65"]


def test_a_pod_that_cannot_start_is_shown_with_its_reason(harness: RunHarness) -> None:
    harness.wait_until(
        "keyless",
        lambda: "CreateContainerConfigError" in vpmoe(harness, "status", "keyless").stdout,
        "the Secret is missed",
    )
    error = vpmoe(harness, "logs", "keyless", code=1).stderr
    assert 'its container has not started (CreateContainerConfigError: secret "to-come" not found)' in error
    error = vpmoe(harness, "logs", "keyless", "vanilla", code=1).stderr
    assert "step vanilla of run keyless has not started (Pending" in error


def test_the_plugin_runs_under_kubectl(harness: RunHarness, tmp_path: Path) -> None:
    program = tmp_path / "kubectl-distill"
    program.write_text(f"#!{sys.executable}\nimport sys\nfrom vpmoe.cli.main import main\nsys.exit(main())\n")
    program.chmod(0o755)
    variables = environment(harness.cluster.kubeconfig)
    variables |= {"PATH": f"{tmp_path}{os.pathsep}{variables['PATH']}", "PYTHONPATH": str(ROOT)}
    command = [harness.cluster.kubectl_path, "distill", "status", "refusing", "-n", harness.namespace]
    ended = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith(f"run: {harness.namespace}/refusing\n")


def test_rights_are_named_and_view_is_enough(harness: RunHarness, tmp_path: Path) -> None:
    harness.kubectl("create", "serviceaccount", "jane")
    kubeconfig = of_user(harness, tmp_path, harness.kubectl("create", "token", "jane").strip())
    user = f"system:serviceaccount:{harness.namespace}:jane"
    error = vpmoe(harness, "status", "refusing", kubeconfig=kubeconfig, code=1).stderr
    assert f"user {user} may not get distillruns.vpmoe.dev in namespace {harness.namespace}." in error
    account = f"--serviceaccount={harness.namespace}:jane"
    harness.kubectl("create", "rolebinding", "jane-runs", f"--clusterrole={VIEWER}", account)
    wait_until(lambda: may(harness, user, "get", "distillruns"), "the first RoleBinding holds")
    shown = vpmoe(harness, "status", "refusing", kubeconfig=kubeconfig)
    assert "phase: " in shown.stdout and f"user {user} may not list pods in namespace" in shown.stderr
    error = vpmoe(harness, "logs", "refusing", kubeconfig=kubeconfig, code=1).stderr
    assert f"user {user} may not list pods in namespace {harness.namespace}." in error
    harness.kubectl("create", "rolebinding", "jane", "--clusterrole=view", account)
    wait_until(lambda: may(harness, user, "get", "pods/log"), "the second RoleBinding holds")
    assert vpmoe(harness, "status", "refusing", kubeconfig=kubeconfig).stderr == ""
    assert vpmoe(harness, "logs", "refusing", kubeconfig=kubeconfig).stdout


def test_credentials_that_are_not_valid_and_unknown_runs_are_explained(
    harness: RunHarness, tmp_path: Path
) -> None:
    kubeconfig = of_user(harness, tmp_path, "not-a-token")
    error = vpmoe(harness, "status", "refusing", kubeconfig=kubeconfig, code=1).stderr
    assert "does not accept your credentials (401): they are missing or have expired. Log in again" in error
    error = vpmoe(harness, "status", "nobody", code=1).stderr
    assert f"there is no DistillRun nobody in namespace {harness.namespace}." in error


def may(harness: RunHarness, user: str, verb: str, resource: str) -> bool:
    """Whether the API server knows of the right already."""
    try:
        harness.kubectl("auth", "can-i", verb, resource, f"--as={user}")
    except ClusterError:
        return False
    return True


def of_user(harness: RunHarness, folder: Path, token: str) -> Path:
    """The cluster's kubeconfig with a token in the place of the administrator's certificate."""
    config = yaml.safe_load(harness.cluster.kubeconfig.read_text())
    for user in config["users"]:
        user["user"] = {"token": token}
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    return path


def test_a_cluster_without_the_crd_is_told_how_to_get_it(tmp_path: Path) -> None:
    with ControlPlane(tmp_path, scheduler=False) as bare:
        bare.kubectl("delete", "crd", "distillruns.vpmoe.dev", "--timeout=60s")
        ended = subprocess.run(
            [sys.executable, "-m", "vpmoe", "status", "first"],
            cwd=ROOT,
            env=environment(bare.kubeconfig),
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1
    assert (
        "the cluster has no DistillRuns (vpmoe.dev/v1alpha1). Install the operator with its chart"
        in ended.stderr
    )


def test_a_run_that_waits_is_drawn_in_a_terminal(harness: RunHarness, tmp_path: Path) -> None:
    variables = environment(harness.cluster.kubeconfig)
    shell = {"PYTHONPATH": str(ROOT), **{name: variables[name] for name in ("KUBECONFIG", "NO_PROXY")}}
    with terminal(tmp_path / "tmux.socket") as it:
        it.start([sys.executable, "-m", "vpmoe", "status", "keyless", "-w", "-n", harness.namespace], shell)
        screen = it.wait_for("CreateContainerConfigError")
        assert screen[0].startswith(f"{harness.namespace}/keyless  ")
        it.press("C-c")
        it.wait_for("ended with 130")
