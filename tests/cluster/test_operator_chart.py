"""The Helm chart on a cluster: installation, upgrade of the CRD, security, and the roles for people.

What the chart renders is tested in tests/unit/operator/test_chart.py.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from devcluster import binaries, install
from devcluster.access import Cluster
from tests.fakes import chart
from tests.fakes.run_harness import ROOT
from tests.fakes.waiting import wait_until

CHART = str(chart.FOLDER)
DEV = ["--values", str(chart.FOLDER / "values-dev.yaml")]
CRD = "distillruns.vpmoe.dev"
PROMETHEUS_OPERATOR = "github.com/prometheus-operator/prometheus-operator@v0.85.0"
PROMETHEUS_CRDS = "example/prometheus-operator-crd"
EVERYTHING: dict[str, Any] = {
    "replicas": 2,
    "env": [{"name": "A", "value": "b"}],
    "labels": {"team": "x"},
    "annotations": {"team": "x"},
    "podLabels": {"pod": "x"},
    "serviceAccountAnnotations": {"role": "arn"},
    "imagePullSecrets": [{"name": "pull"}],
    "nodeSelector": {"kubernetes.io/os": "linux"},
    "tolerations": [
        {"key": "dedicated", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 5}
    ],
    "topologySpreadConstraints": [
        {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}
    ],
    "affinity": {
        "podAntiAffinity": {
            "preferredDuringSchedulingIgnoredDuringExecution": [
                {
                    "weight": 1,
                    "podAffinityTerm": {
                        "topologyKey": "kubernetes.io/hostname",
                        "labelSelector": {"matchLabels": {"app.kubernetes.io/name": "distill-operator"}},
                    },
                }
            ]
        }
    },
    "networkPolicy": {
        "enabled": True,
        "metricsFrom": [{"namespaceSelector": {}}],
        "apiServerCidrs": ["10.0.0.0/8"],
        "extraEgress": [{"ports": [{"port": 9000}], "to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}],
    },
    "monitoring": {"enabled": True, "alerts": True, "dashboards": True},
}
"""A value for every optional field of the objects."""


def test_installation_and_upgrade_update_a_crd_applied_by_kubectl(cluster: Cluster, tmp_path: Path) -> None:
    """The older CRD has another description and lacks a field.

    The namespace enforces the restricted pod security standard.
    """
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
    options = ["--set", f"replicas=2,watchNamespaces={{{namespace}}},networkPolicy.enabled=true"]
    arguments = ["--namespace", namespace, *options, "--wait", "--timeout", "2m"]
    cluster.kubectl("create", "namespace", namespace)
    cluster.kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
    try:
        cluster.helm("install", "second", CHART, *DEV, *arguments)
        assert "ttlAfterFinished" in crd_schema(cluster)["properties"]["spec"]["properties"]
        cluster.kubectl("apply", "--filename", str(ROOT / "manifests/crd.yaml"))
        cluster.kubectl("apply", "--filename", str(tmp_path / "old.json"))
        cluster.helm("upgrade", "second", CHART, *DEV, *arguments, "--set", "logLevel=debug")
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


@pytest.fixture
def monitors(cluster: Cluster) -> Iterator[None]:
    """The CRDs of the Prometheus operator, from its Go module. Those of a user's own cluster are kept."""
    installed = cluster.kubectl("get", "customresourcedefinitions", "--output=name")
    names = [
        f"{kind}.monitoring.coreos.com"
        for kind in ("servicemonitors", "podmonitors", "prometheusrules")
        if f"/{kind}.monitoring.coreos.com" not in installed
    ]
    for name in names:
        plural, group = name.split(".", 1)
        file = binaries.module_folder(PROMETHEUS_OPERATOR) / f"{PROMETHEUS_CRDS}/{group}_{plural}.yaml"
        cluster.kubectl("create", "--filename", str(file))
        cluster.kubectl("wait", "--for=condition=Established", f"customresourcedefinition/{name}")
    yield
    if names:
        cluster.kubectl("delete", "customresourcedefinitions", *names)


@pytest.mark.parametrize("namespaces", [[], ["default"]])
def test_the_api_server_accepts_every_object(
    cluster: Cluster, helm: Path, monitors: None, namespaces: list[str]
) -> None:
    """With strict validation: an unknown or misplaced field is an error."""
    objects = chart.Chart(helm).render({**EVERYTHING, "watchNamespaces": namespaces}, "x", "default")
    optional = {"ServiceMonitor", "PodMonitor", "PrometheusRule", "NetworkPolicy", "PodDisruptionBudget"}
    assert optional <= {obj["kind"] for obj in objects}
    cluster.kubectl(
        "create", "--dry-run=server", "--validate=strict", "--filename=-", input=yaml.safe_dump_all(objects)
    )


def test_people_with_edit_and_view_may_edit_and_read_runs(cluster: Cluster, namespace: str) -> None:
    """Kubernetes adds the chart's roles to its own. Nobody but the operator may write a status."""
    for role in ("admin", "edit", "view"):
        cluster.kubectl(
            "create",
            "rolebinding",
            f"{role}s",
            f"--clusterrole={role}",
            f"--user={role}er",
            "--namespace",
            namespace,
        )

    def may(role: str, verb: str, subresource: str = "") -> bool:
        attributes = {
            "namespace": namespace,
            "group": "vpmoe.dev",
            "resource": "distillruns",
            "subresource": subresource,
            "verb": verb,
        }
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SubjectAccessReview",
            "spec": {"user": f"{role}er", "resourceAttributes": attributes},
        }
        printed = cluster.kubectl("create", "--filename=-", "--output=json", input=json.dumps(review))
        return bool(json.loads(printed)["status"]["allowed"])

    wait_until(lambda: may("view", "get"), "Kubernetes has added the rules to its roles", 30)
    assert {
        (role, verb)
        for role in ("admin", "edit")
        for verb in ("create", "patch", "delete")
        if may(role, verb)
    } == {(role, verb) for role in ("admin", "edit") for verb in ("create", "patch", "delete")}
    assert all(may("view", verb) for verb in ("get", "list", "watch"))
    assert not any(may("view", verb) for verb in ("create", "update", "patch", "delete"))
    assert not any(
        may(role, verb, "status") for role in ("admin", "edit", "view") for verb in ("update", "patch")
    )


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
