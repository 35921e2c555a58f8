"""The chart: it lints, asks for rights by name, installs over a CRD that kubectl applied, and brings the CRD along on upgrade."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from devcluster import install
from devcluster.access import Cluster
from tests.fakes.run_harness import ROOT, refused

CHART = ROOT / "charts/distill-operator"
GIT_SHA = ["--set-string", f"gitSha={'a' * 40}"]
DEV = ["--values", str(CHART / "values-dev.yaml"), *GIT_SHA]
CRD = "distillruns.vpmoe.dev"


def rendered(cluster: Cluster, *arguments: str) -> list[dict[str, Any]]:
    return [
        obj for obj in yaml.safe_load_all(cluster.helm("template", "x", str(CHART), *DEV, *arguments)) if obj
    ]


def test_it_lints(cluster: Cluster) -> None:
    cluster.helm("lint", "--strict", str(CHART), *DEV)


@pytest.mark.parametrize(
    "arguments, words",
    [
        pytest.param([], "gitSha is empty: pass --set gitSha=$(git rev-parse HEAD)", id="no commit"),
        pytest.param(["--set", "gitSha=main"], "gitSha", id="a branch for a commit"),
        pytest.param([*GIT_SHA, "--set", "resyncSeconds=0"], "resyncSeconds", id="never"),
        pytest.param([*GIT_SHA, "--set", "image=mine"], "image", id="unknown value"),
    ],
)
def test_values_that_are_wrong_are_refused(cluster: Cluster, arguments: list[str], words: str) -> None:
    assert words in refused(lambda: cluster.helm("template", "x", str(CHART), *arguments))


@pytest.mark.parametrize("namespaces", ["", "team-a,team-b"])
def test_rights_have_names(cluster: Cluster, namespaces: str) -> None:
    objects = rendered(cluster, *(["--set", f"watchNamespaces={{{namespaces}}}"] if namespaces else []))
    roles = [obj for obj in objects if obj["kind"] in ("Role", "ClusterRole")]
    rules = [rule for role in roles for rule in role["rules"]]
    assert "*" not in json.dumps(rules)
    everywhere = {
        resource
        for role in roles
        if role["kind"] == "ClusterRole"
        for rule in role["rules"]
        for resource in rule["resources"]
    }
    assert ("secrets" in everywhere) is (namespaces == "")
    assert everywhere >= {"nodes", "customresourcedefinitions"}
    for rule in rules:
        if "customresourcedefinitions" in rule["resources"]:
            assert rule["resourceNames"] == [CRD]


def test_the_operators_pod_satisfies_the_restricted_standard(cluster: Cluster) -> None:
    (deployment,) = [obj for obj in rendered(cluster) if obj["kind"] == "Deployment"]
    pod = deployment["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    for container in [*pod["initContainers"], *pod["containers"]]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "memory" in container["resources"]["limits"]


def test_it_installs_over_a_crd_that_kubectl_applied_and_brings_it_up_to_date(
    cluster: Cluster, tmp_path: Path
) -> None:
    """An older CRD, applied by kubectl, with a description and a field of its own day."""
    current = yaml.safe_load((ROOT / "manifests/crd.yaml").read_text())
    old = json.loads(json.dumps(current))
    schema = old["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    schema["description"] = "as it was"
    del schema["properties"]["spec"]["properties"]["ttlAfterFinished"]
    rules = schema["x-kubernetes-validations"]
    schema["x-kubernetes-validations"] = [rule for rule in rules if "ttlAfterFinished" not in rule["rule"]]
    (tmp_path / "old.json").write_text(json.dumps(old))
    cluster.kubectl(
        "apply", "--filename", str(ROOT / "manifests/crd.yaml")
    )  # of what kubectl applied itself it takes things away
    cluster.kubectl("apply", "--filename", str(tmp_path / "old.json"))
    assert "ttlAfterFinished" not in described(cluster)["properties"]["spec"]["properties"]
    namespace = "chart-test"
    place = [
        "--namespace",
        namespace,
        "--create-namespace",
        "--set",
        f"watchNamespaces={{{namespace}}}",
        "--wait",
        "--timeout",
        "2m",
    ]
    try:
        cluster.helm("install", "second", str(CHART), *DEV, *place)
        assert "ttlAfterFinished" in described(cluster)["properties"]["spec"]["properties"]
        cluster.kubectl("apply", "--filename", str(ROOT / "manifests/crd.yaml"))
        cluster.kubectl("apply", "--filename", str(tmp_path / "old.json"))
        cluster.helm("upgrade", "second", str(CHART), *DEV, *place, "--set", "logLevel=debug")
        assert (
            described(cluster)["description"]
            == current["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["description"]
        )
        cluster.helm("uninstall", "second", "--namespace", namespace, "--wait")
        assert described(cluster), "the runs of all others live on"
    finally:
        cluster.kubectl("delete", "namespace", namespace, "--ignore-not-found")
        cluster.kubectl(
            "apply", "--server-side", "--force-conflicts", "--filename", str(ROOT / "manifests/crd.yaml")
        )


def described(cluster: Cluster) -> dict[str, Any]:
    """The CRD's schema as the API server has it."""
    found = json.loads(cluster.kubectl("get", "crd", CRD, "--output=json"))
    schema: dict[str, Any] = found["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return schema


def test_the_installed_operator_runs_as_the_chart_says(cluster: Cluster) -> None:
    listed = cluster.kubectl(
        "get",
        "pods",
        "--namespace",
        install.NAMESPACE,
        "--selector",
        "app.kubernetes.io/name=distill-operator",
        "--output=json",
    )
    (pod,) = [pod for pod in json.loads(listed)["items"] if "deletionTimestamp" not in pod["metadata"]]
    statuses = pod["status"]["containerStatuses"]
    assert [(status["ready"], status["restartCount"]) for status in statuses] == [(True, 0)]
    here = "import os; print(os.getuid(), os.access('/opt/vpmoe', os.W_OK))"
    ran = cluster.kubectl(
        "exec",
        pod["metadata"]["name"],
        "--namespace",
        install.NAMESPACE,
        "--container=operator",
        "--",
        "python",
        "-c",
        here,
    )
    assert ran.split() == ["65532", "False"]
