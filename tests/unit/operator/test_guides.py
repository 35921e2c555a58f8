"""The guide's NetworkPolicy opens what the operator and the pods of runs need."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from distill_operator.attempt import Attempt, Origin
from distill_operator.children import build_child
from distill_operator.clear_job import build_clear_job
from distill_operator.pod_template import POD_PORT

from tests.fakes.simulated_cluster import SETTINGS, manifest, pod_templates
from vpmoe.api import DistillRun

GUIDE = (Path(__file__).parents[3] / "docs/guides/install.md").read_text()
RUN = DistillRun.parse(manifest())
ORIGIN = Origin("b" * 64, None)


def policy() -> dict[str, Any]:
    blocks = re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)
    found: dict[str, Any] = next(obj for obj in map(yaml.safe_load, blocks) if obj["kind"] == "NetworkPolicy")
    return found


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    terms = selector.get("matchExpressions", [])
    assert all(term["operator"] == "Exists" for term in terms)
    wanted = selector.get("matchLabels", {})
    return all(term["key"] in labels for term in terms) and wanted.items() <= labels.items()


PODS = {
    "a step": pod_templates(build_child(Attempt(RUN, "vanilla", 1, ORIGIN, SETTINGS)))[0][1],
    "the deletion of a folder": build_clear_job(RUN, SETTINGS)["spec"]["template"],
}


@pytest.mark.parametrize("pod", PODS)
def test_the_policy_selects_the_pods_of_runs_and_lets_them_reach_each_other(pod: str) -> None:
    spec, labels = policy()["spec"], PODS[pod]["metadata"]["labels"]
    assert selects(spec["podSelector"], labels)
    assert any(selects(peer["podSelector"], labels) for rule in spec["ingress"][1:] for peer in rule["from"])
    assert any(
        selects(peer["podSelector"], labels)
        for rule in spec["egress"]
        for peer in rule.get("to", [])
        if "podSelector" in peer
    )
    assert not selects(spec["podSelector"], {"app": "another"})


def test_the_policy_lets_the_operator_reach_the_port_of_progress_and_no_other() -> None:
    rule = policy()["spec"]["ingress"][0]
    assert rule["ports"] == [{"protocol": "TCP", "port": POD_PORT}]
    namespace = re.search(r"--namespace (\S+) --create-namespace", GUIDE)
    assert namespace is not None
    assert rule["from"] == [
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace[1]}}}
    ]


def test_the_guide_names_the_port_and_the_label_for_a_mesh() -> None:
    mesh = GUIDE.split("**A service mesh**")[1].split("\n## ")[0]
    assert {int(port) for port in re.findall(r'"(\d+)"|\{(\d+): ', mesh) for port in port if port} == {
        POD_PORT
    }
    label = re.search(r"for the label\s+`([^:]+): ([^`]+)`", mesh)
    assert label is not None
    assert PODS["a step"]["metadata"]["labels"][label[1]] == label[2]
