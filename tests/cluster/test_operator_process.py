"""The operator's process on a real control plane: killed after every write, with a standby, without its
lease, without Kubeflow."""

import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from devcluster import install
from devcluster.access import Cluster
from tests.fakes import run_harness
from tests.fakes.api_proxy import ApiProxy, OperatorProcess, created_kinds
from tests.fakes.run_harness import STAGES, RunHarness
from tests.fakes.waiting import answers, wait_until


@pytest.fixture(scope="module")
def harness(cluster: Cluster, namespace: str) -> Iterator[RunHarness]:
    """A harness without the installed operator: these tests start their own."""
    run_harness.upgrade_operator(cluster, "--set", "replicas=0")
    cluster.kubectl(
        "wait",
        "--for=delete",
        "pod",
        "--selector=app.kubernetes.io/name=distill-operator",
        f"--namespace={install.NAMESPACE}",
    )
    yield RunHarness.create(cluster, namespace)
    run_harness.restore_operator(cluster)


@pytest.fixture
def proxy(cluster: Cluster, harness: RunHarness) -> Iterator[ApiProxy]:
    cluster.kubectl(
        "delete", "lease", "distill-operator", "--ignore-not-found", f"--namespace={install.NAMESPACE}"
    )
    with ApiProxy(cluster) as proxy:
        yield proxy


def test_an_operator_killed_after_every_write_creates_no_duplicate_and_finishes_the_run(
    harness: RunHarness, proxy: ApiProxy, tmp_path: Path
) -> None:
    """Each process makes one write and is killed before it receives the response, so that every state between
    two writes occurs."""
    operator = OperatorProcess(proxy, tmp_path, harness.namespace)
    writes_before_kill: list[str] = []

    def kill_operator(method: str, path: str) -> None:
        if "/leases" not in path:
            operator.kill()
            writes_before_kill.append(f"{method} {path}")

    three_stages = {"teacher": {"model": "s3://models/none", "gpus": 1}, "stages": STAGES}
    harness.apply(
        "mortal",
        "steps=4 every=2 pause=0 parts=2 kill=vanilla@1:2,rescore@1:-102",
        deletionPolicy="Delete",
        **three_stages,
    )
    proxy.after_write = kill_operator
    for _ in range(160):
        operator.start()
        wait_until(
            lambda: (
                operator.process.poll() is not None or harness.status("mortal").get("phase") == "Succeeded"
            ),
            "one more write",
            240,
        )
        if harness.status("mortal").get("phase") == "Succeeded":
            break
    operator.kill()
    assert harness.wait_for_phase("mortal", "Succeeded", seconds=1)["phase"] == "Succeeded", (
        writes_before_kill
    )
    expected = [
        *(f"{step}-a{attempt}" for step in ("rescore", "vanilla") for attempt in (1, 2)),
        "preprocess-a1",
        "rescored-a1",
        "teacherforced-a1",
    ]
    assert harness.child_names("mortal") == sorted(f"mortal-{child}" for child in expected)
    assert sorted(created_kinds(proxy.writes)) == ["jobs"] * 3 + ["pytorchjobs"] * 4
    assert harness.starts("mortal") == [(1, 0), (2, 2)]
    assert harness.starts("mortal", "rescore") == [(1, 0), (2, 1)]
    assert len(writes_before_kill) > 20, (
        "it was killed after writes of the status, the finalizer, Events, the ConfigMap and children"
    )
    harness.patch("mortal", deletionPolicy="Retain")
    proxy.after_write = lambda method, path: None
    operator.start()
    harness.kubectl("delete", "distillrun", "mortal", "--timeout=60s")
    assert operator.stop() == 0


def test_a_standby_is_healthy_and_takes_over_when_the_leader_is_killed(
    harness: RunHarness, proxy: ApiProxy, tmp_path: Path
) -> None:
    first, second = (
        OperatorProcess(proxy, tmp_path, harness.namespace, identity, lease_seconds=10)
        for identity in ("first", "second")
    )
    first.start()
    wait_until(first.leads, "the first operator leads")
    second.start()
    wait_until(lambda: answers(f"http://127.0.0.1:{second.port}/healthz"), "the second operator responds", 60)
    for process in (first, second):
        for probe in ("healthz", "readyz"):
            assert urllib.request.urlopen(f"http://127.0.0.1:{process.port}/{probe}").read() == b"ok\n"
    assert "vpmoe_operator_leading 0.0" in metrics(second)
    assert "vpmoe_operator_leading 1.0" in metrics(first)
    first.kill()
    wait_until(second.leads, "the second operator leads", 60)
    harness.apply("handed", "steps=1")
    harness.wait_for_phase("handed", "Succeeded")
    assert "vpmoe_operator_reconciles_total" in metrics(second)
    assert second.stop() == 0
    holder = harness.cluster.kubectl(
        "get",
        "lease",
        "distill-operator",
        f"--namespace={install.NAMESPACE}",
        "--output=jsonpath={.spec.holderIdentity}",
    )
    assert holder == "", "an operator that stops releases the lease"


def metrics(process: OperatorProcess) -> str:
    return str(urllib.request.urlopen(f"http://127.0.0.1:{process.port}/metrics").read().decode())


def test_an_operator_exits_when_it_has_lost_its_lease(
    harness: RunHarness, proxy: ApiProxy, tmp_path: Path
) -> None:
    operator = OperatorProcess(proxy, tmp_path, harness.namespace, lease_seconds=10)
    operator.start()
    wait_until(operator.leads, "the operator leads")
    new_holder = '{"spec":{"holderIdentity":"thief"}}'
    harness.cluster.kubectl(
        "patch",
        "lease",
        "distill-operator",
        f"--namespace={install.NAMESPACE}",
        "--type=merge",
        "--patch",
        new_holder,
    )
    assert operator.process.wait(timeout=30) == 70
    assert "another process has taken the lease" in operator.log.read_text()


def test_a_missing_kubeflow_is_reported_and_the_backend_is_not_changed(
    harness: RunHarness, proxy: ApiProxy, tmp_path: Path
) -> None:
    proxy.rewrite_path = lambda path: path.replace(
        "/apis/kubeflow.org/v1", "/apis/kubeflow.org/v0"
    )  # a version that no cluster serves
    operator = OperatorProcess(proxy, tmp_path, harness.namespace)
    operator.start()
    harness.apply("early", "steps=1")
    harness.apply("plain", "steps=1", runtime={"backend": "Job"})
    harness.wait_until(
        "early",
        lambda: harness.condition("early", "Stalled").get("reason") == "KubeflowMissing",
        "run early is stalled",
    )
    assert "Install the Kubeflow training operator" in harness.status("early")["message"]
    harness.wait_for_phase("plain", "Succeeded")  # created later, and not blocked
    assert harness.child_names("early") == []
    proxy.rewrite_path = lambda path: path
    harness.wait_for_phase("early", "Succeeded")
    assert harness.child_names("early") == ["early-preprocess-a1", "early-vanilla-a1"]
    assert operator.stop() == 0
