"""On a real API server: a namespace that is gone, a status and a CRD of a newer version. Everything else goes
on."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from devcluster.access import Cluster
from tests.fakes import run_harness
from tests.fakes.api_proxy import ApiProxy, OperatorProcess
from tests.fakes.run_harness import ROOT, RunHarness
from tests.fakes.waiting import wait_until
from vpmoe.api.crd import RELEASE_ANNOTATION

CHART = "charts/distill-operator"
CRD = "distillruns.vpmoe.dev"
NEWER = "999.0.0"


@pytest.fixture(scope="module")
def harness(cluster: Cluster, namespace: str) -> Iterator[RunHarness]:
    """A harness without the installed operator: these tests start their own."""
    run_harness.stop_operator(cluster)
    run_harness.delete_lease(cluster)
    yield RunHarness.create(cluster, namespace)
    run_harness.restore_operator(cluster)


@pytest.fixture
def newer_crd(cluster: Cluster) -> Iterator[None]:
    """The CRD of a newer release: it knows one phase more, one field of the status more, and says so."""
    body = json.loads(cluster.kubectl("get", "crd", CRD, "--output=json"))
    body["metadata"].setdefault("annotations", {})[RELEASE_ANNOTATION] = NEWER
    status = crd_schema(body)["properties"]["status"]["properties"]
    status["phase"]["enum"].append("Archived")
    status["energy"] = {"type": "number", "description": "Joules."}
    cluster.kubectl("replace", "--filename", "-", input=json.dumps(body))
    yield
    manifest = str(ROOT / "manifests/crd.yaml")
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "--filename", manifest)


def crd_schema(body: dict[str, Any]) -> dict[str, Any]:
    schema: dict[str, Any] = body["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return schema


def test_a_deleted_namespace_stops_no_other_and_is_watched_again_when_it_is_back(
    cluster: Cluster, harness: RunHarness
) -> None:
    """The operator has a Role in each watched namespace, which is deleted with it."""
    home, gone = f"{harness.namespace}-operator", f"{harness.namespace}-gone"
    cluster.kubectl("create", "namespace", gone)
    arguments = [
        "isolated",
        CHART,
        "--values",
        f"{CHART}/values-dev.yaml",
        *run_harness.FAST,
        "--set",
        f"watchNamespaces={{{gone},{harness.namespace}}}",
        "--namespace",
        home,
        "--wait",
        "--timeout",
        "2m",
    ]
    try:
        cluster.helm("install", *arguments, "--create-namespace")
        cluster.kubectl("delete", "namespace", gone, "--timeout=60s")
        harness.apply("left", "steps=1")
        harness.wait_for_phase("left", "Succeeded")
        log = operator_log(cluster, home)
        assert log.count(f"namespace {gone} cannot be read: ") == 1
        assert "Traceback" not in log
        assert restarts(cluster, home) == 0
        cluster.kubectl("create", "namespace", gone)
        cluster.helm("upgrade", *arguments)  # grants the Role again
        body = harness.manifest("back", "steps=1")
        cluster.kubectl("create", "--namespace", gone, "--filename", "-", input=yaml.safe_dump(body))
        cluster.kubectl(
            "wait",
            "--for=jsonpath={.status.phase}=Running",
            "distillrun/back",
            "--namespace",
            gone,
            "--timeout=60s",
        )
        # The watch may have told of the run before the next resync lists the namespace.
        wait_until(
            lambda: f"namespace {gone} can be read again" in operator_log(cluster, home), "it is logged"
        )
        assert restarts(cluster, home) == 0
    finally:
        cluster.kubectl("delete", "namespace", gone, "--ignore-not-found", "--timeout=120s")
        cluster.helm("uninstall", "isolated", "--namespace", home, "--ignore-not-found", "--wait")
        cluster.kubectl("delete", "namespace", home, "--ignore-not-found", "--timeout=120s")


def operator_log(cluster: Cluster, namespace: str) -> str:
    return cluster.kubectl(
        "logs", "--namespace", namespace, "--selector=app.kubernetes.io/name=distill-operator", "--tail=-1"
    )


def restarts(cluster: Cluster, namespace: str) -> int:
    listed = cluster.kubectl(
        "get",
        "pods",
        "--namespace",
        namespace,
        "--selector=app.kubernetes.io/name=distill-operator",
        "--output=json",
    )
    statuses = [
        status for pod in json.loads(listed)["items"] for status in pod["status"]["containerStatuses"]
    ]
    return sum(status["restartCount"] for status in statuses)


@pytest.mark.usefixtures("newer_crd")
def test_a_status_of_a_newer_version_stops_only_its_run(
    cluster: Cluster, harness: RunHarness, tmp_path: Path
) -> None:
    newer = {
        "phase": "Archived",
        "energy": 5,
        "started": "2026-01-01T00:00:00Z",
        "steps": [{"name": "preprocess", "state": "Succeeded", "started": "2026-01-01T00:00:00Z"}],
    }
    harness.apply("newer", "steps=1")
    set_status(harness, "newer", newer)
    harness.apply("kept", "steps=1")
    set_status(harness, "kept", {"energy": 7})
    with ApiProxy(cluster) as proxy:
        operator = OperatorProcess(proxy, tmp_path, harness.namespace)
        operator.start()
        assert harness.wait_for_phase("kept", "Succeeded")["energy"] == 7
        harness.wait_until(
            "newer",
            lambda: harness.condition("newer", "Stalled").get("reason") == "StatusUnreadable",
            "the condition says so",
        )
        assert {key: harness.status("newer")[key] for key in newer} == newer
        assert "StatusUnreadable" in harness.events("newer")
        set_status(harness, "newer", {"phase": "Pending", "started": None, "steps": None})
        harness.wait_for_phase("newer", "Succeeded")
        assert harness.condition("newer", "Stalled")["status"] == "False"
        assert operator.stop() == 0, operator.log.read_text()


def set_status(harness: RunHarness, name: str, status: dict[str, Any]) -> None:
    harness.kubectl(
        "patch",
        "distillrun",
        name,
        "--subresource=status",
        "--type=merge",
        "--patch",
        json.dumps({"status": status}),
    )


@pytest.mark.usefixtures("newer_crd")
def test_an_older_operator_leaves_a_newer_crd_alone(cluster: Cluster) -> None:
    before = cluster.kubectl("get", "crd", CRD, "--output=jsonpath={.metadata.generation}")
    log = apply_crd(cluster)
    assert f"is of release {NEWER}, newer than this operator's" in log
    assert cluster.kubectl("get", "crd", CRD, "--output=jsonpath={.metadata.generation}") == before


@pytest.mark.parametrize("stored", [None, "0.0.1"], ids=["without a release", "older"])
def test_an_operator_replaces_an_older_crd_that_kubectl_applied(cluster: Cluster, stored: str | None) -> None:
    body = yaml.safe_load((ROOT / "manifests/crd.yaml").read_text())
    body["metadata"]["annotations"] = {RELEASE_ANNOTATION: stored} if stored else {}
    crd_schema(body)["description"] = "as it was"
    cluster.kubectl("annotate", "crd", CRD, f"{RELEASE_ANNOTATION}-")
    cluster.kubectl(
        "apply", "--server-side", "--force-conflicts", "--filename", "-", input=yaml.safe_dump(body)
    )
    assert "stays as it is" not in apply_crd(cluster)
    installed = json.loads(cluster.kubectl("get", "crd", CRD, "--output=json"))
    current = yaml.safe_load((ROOT / "manifests/crd.yaml").read_text())
    assert crd_schema(installed)["description"] == crd_schema(current)["description"]
    release = current["metadata"]["annotations"][RELEASE_ANNOTATION]
    assert installed["metadata"]["annotations"][RELEASE_ANNOTATION] == release


def apply_crd(cluster: Cluster) -> str:
    """What the chart's init container runs. Returns its log."""
    environment = {**os.environ, "PYTHONPATH": ".:operator", "KUBECONFIG": str(cluster.kubeconfig)}
    command = [sys.executable, "-m", "distill_operator.crd"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stderr
