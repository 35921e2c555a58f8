"""The Helm chart: values, permissions, security, installation and upgrade of the CRD."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from devcluster import install
from devcluster.access import Cluster
from tests.fakes.run_harness import ROOT, rejection

CHART = ROOT / "charts/distill-operator"
APP_VERSION = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
GIT_SHA = ["--set", f"gitSha={'a' * 40}"]
REGISTRY = ["--set", "images.registry=r.example.com/vpmoe"]
DEV = ["--values", str(CHART / "values-dev.yaml"), *GIT_SHA]
CRD = "distillruns.vpmoe.dev"


def render_chart(cluster: Cluster, *arguments: str) -> list[dict[str, Any]]:
    return [
        obj for obj in yaml.safe_load_all(cluster.helm("template", "x", str(CHART), *DEV, *arguments)) if obj
    ]


def test_the_chart_passes_lint(cluster: Cluster) -> None:
    cluster.helm("lint", "--strict", str(CHART), *DEV)


@pytest.mark.parametrize(
    "arguments, message",
    [
        pytest.param([], "--set gitSha=$(git rev-parse HEAD)", id="no commit"),
        pytest.param([], "--set images.registry=registry.example.com/vpmoe", id="no images"),
        pytest.param(["--set", "gitSha=main"], 'gitSha is "main", not a commit', id="a branch as commit"),
        pytest.param(GIT_SHA, "images.registry is empty", id="only the commit"),
        pytest.param(
            [*GIT_SHA, "--set", "images.trainer=mine"], "images.registry is empty", id="one image of three"
        ),
        pytest.param(
            [*GIT_SHA, *REGISTRY, "--set", "resyncSeconds=0"], "resyncSeconds", id="an interval of 0"
        ),
        pytest.param([*GIT_SHA, *REGISTRY, "--set", "image=mine"], "image", id="unknown value"),
    ],
)
def test_invalid_values_are_rejected_with_the_remedy(
    cluster: Cluster, arguments: list[str], message: str
) -> None:
    assert message in rejection(lambda: cluster.helm("template", "x", str(CHART), *arguments))


@pytest.mark.parametrize(
    "arguments, images",
    [
        pytest.param([], ["r.example.com/vpmoe/{}:" + APP_VERSION] * 3, id="appVersion"),
        pytest.param(["--set", "images.tag=dev"], ["r.example.com/vpmoe/{}:dev"] * 3, id="tag"),
        pytest.param(
            ["--set", "images.trainer=other/train:2"],
            [
                "r.example.com/vpmoe/{}:" + APP_VERSION,
                "other/train:2",
                "r.example.com/vpmoe/{}:" + APP_VERSION,
            ],
            id="one full reference",
        ),
    ],
)
def test_the_command_of_the_readme_sets_the_images(
    cluster: Cluster, arguments: list[str], images: list[str]
) -> None:
    printed = cluster.helm("template", "distill-operator", str(CHART), *GIT_SHA, *REGISTRY, *arguments)
    objects = {obj["kind"]: obj for obj in yaml.safe_load_all(printed) if obj}
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    settings = yaml.safe_load(objects["ConfigMap"]["data"]["operator.yaml"])
    operator, trainer, inference = images
    for container in [*pod["initContainers"], *pod["containers"]]:
        assert container["image"] == operator.format("operator")
    assert settings["images"] == {
        "trainer": trainer.format("trainer"),
        "inference": inference.format("inference"),
    }


@pytest.mark.parametrize("namespaces", ["", "team-a,team-b"])
def test_permissions_name_their_resources(cluster: Cluster, namespaces: str) -> None:
    objects = render_chart(cluster, *(["--set", f"watchNamespaces={{{namespaces}}}"] if namespaces else []))
    roles = [obj for obj in objects if obj["kind"] in ("Role", "ClusterRole")]
    rules = [rule for role in roles for rule in role["rules"]]
    assert "*" not in json.dumps(rules)
    cluster_resources = {
        resource
        for role in roles
        if role["kind"] == "ClusterRole"
        for rule in role["rules"]
        for resource in rule["resources"]
    }
    assert ("secrets" in cluster_resources) is (namespaces == "")
    assert cluster_resources >= {"nodes", "customresourcedefinitions"}
    for rule in rules:
        if "customresourcedefinitions" in rule["resources"]:
            assert rule["resourceNames"] == [CRD]


def test_the_operators_pod_satisfies_the_restricted_standard(cluster: Cluster) -> None:
    (deployment,) = [obj for obj in render_chart(cluster) if obj["kind"] == "Deployment"]
    pod = deployment["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    for container in [*pod["initContainers"], *pod["containers"]]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "memory" in container["resources"]["limits"]


def test_installation_and_upgrade_update_a_crd_applied_by_kubectl(cluster: Cluster, tmp_path: Path) -> None:
    """The older CRD has another description and lacks a field."""
    current = yaml.safe_load((ROOT / "manifests/crd.yaml").read_text())
    old = json.loads(json.dumps(current))
    schema = old["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    schema["description"] = "as it was"
    del schema["properties"]["spec"]["properties"]["ttlAfterFinished"]
    rules = schema["x-kubernetes-validations"]
    schema["x-kubernetes-validations"] = [rule for rule in rules if "ttlAfterFinished" not in rule["rule"]]
    (tmp_path / "old.json").write_text(json.dumps(old))
    # kubectl apply removes only what it applied itself: apply the whole CRD first.
    cluster.kubectl("apply", "--filename", str(ROOT / "manifests/crd.yaml"))
    cluster.kubectl("apply", "--filename", str(tmp_path / "old.json"))
    assert "ttlAfterFinished" not in crd_schema(cluster)["properties"]["spec"]["properties"]
    namespace = "chart-test"
    arguments = [
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
        cluster.helm("install", "second", str(CHART), *DEV, *arguments)
        assert "ttlAfterFinished" in crd_schema(cluster)["properties"]["spec"]["properties"]
        cluster.kubectl("apply", "--filename", str(ROOT / "manifests/crd.yaml"))
        cluster.kubectl("apply", "--filename", str(tmp_path / "old.json"))
        cluster.helm("upgrade", "second", str(CHART), *DEV, *arguments, "--set", "logLevel=debug")
        assert (
            crd_schema(cluster)["description"]
            == current["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["description"]
        )
        cluster.helm("uninstall", "second", "--namespace", namespace, "--wait")
        assert crd_schema(cluster), "the CRD and therefore all runs remain"
    finally:
        cluster.kubectl("delete", "namespace", namespace, "--ignore-not-found")
        cluster.kubectl(
            "apply", "--server-side", "--force-conflicts", "--filename", str(ROOT / "manifests/crd.yaml")
        )


def crd_schema(cluster: Cluster) -> dict[str, Any]:
    """The schema of the CRD in the cluster."""
    found = json.loads(cluster.kubectl("get", "crd", CRD, "--output=json"))
    schema: dict[str, Any] = found["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return schema


def test_the_installed_operator_is_ready_and_unprivileged(cluster: Cluster) -> None:
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
    script = "import os; print(os.getuid(), os.access('/opt/vpmoe', os.W_OK))"
    printed = cluster.kubectl(
        "exec",
        pod["metadata"]["name"],
        "--namespace",
        install.NAMESPACE,
        "--container=operator",
        "--",
        "python",
        "-c",
        script,
    )
    assert printed.split() == ["65532", "False"]
