"""The operator's process on a real control plane: killed at every write, two at a time, cut off from its lease, without Kubeflow."""

import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from devcluster import install
from devcluster.access import Cluster
from tests.fakes import run_harness as teams
from tests.fakes.api_proxy import Gate, Process, children
from tests.fakes.run_harness import STAGES, Team
from tests.fakes.waiting import answers, wait_until


@pytest.fixture(scope="module")
def team(cluster: Cluster, namespace: str) -> Iterator[Team]:
    """The installed operator steps aside: these tests run their own."""
    teams.operator(cluster, "--set", "replicas=0")
    cluster.kubectl(
        "wait",
        "--for=delete",
        "pod",
        "--selector=app.kubernetes.io/name=distill-operator",
        f"--namespace={install.NAMESPACE}",
    )
    yield Team.create(cluster, namespace)
    teams.restore(cluster)


@pytest.fixture
def gate(cluster: Cluster, team: Team) -> Iterator[Gate]:
    cluster.kubectl(
        "delete", "lease", "distill-operator", "--ignore-not-found", f"--namespace={install.NAMESPACE}"
    )
    with Gate(cluster) as gate:
        yield gate


def test_killed_at_every_write_of_a_run_it_never_makes_a_duplicate_and_always_finishes(
    team: Team, gate: Gate, tmp_path: Path
) -> None:
    """Each process makes one write, which takes effect, and dies before it hears so: the state before and after every write is met."""
    operator = Process(gate, tmp_path, team.namespace)
    died: list[str] = []

    def die(method: str, path: str) -> None:
        if "/leases" not in path:
            operator.kill()
            died.append(f"{method} {path}")

    two = {"teacher": {"model": "s3://models/none", "gpus": 1}, "stages": STAGES}
    team.apply(
        "mortal",
        "steps=4 every=2 pause=0 parts=2 kill=vanilla@1:2,rescore@1:-102",
        deletionPolicy="Delete",
        **two,
    )
    gate.after_write = die
    for _ in range(160):
        operator.start()
        wait_until(
            lambda: operator.process.poll() is not None or team.status("mortal").get("phase") == "Succeeded",
            "one more write",
            240,
        )
        if team.status("mortal").get("phase") == "Succeeded":
            break
    operator.kill()
    assert team.phase("mortal", "Succeeded", seconds=1)["phase"] == "Succeeded", died
    made = [
        *(f"{step}-a{attempt}" for step in ("rescore", "vanilla") for attempt in (1, 2)),
        "preprocess-a1",
        "rescored-a1",
        "teacherforced-a1",
    ]
    assert team.children("mortal") == sorted(f"mortal-{child}" for child in made)
    assert sorted(children(gate.written)) == ["jobs"] * 3 + ["pytorchjobs"] * 4
    assert team.starts("mortal") == [(1, 0), (2, 2)]
    assert team.starts("mortal", "rescore") == [(1, 0), (2, 1)]
    assert len(died) > 20, (
        "it wrote its status, its finalizer, Events, a ConfigMap and children, and died each time"
    )
    team.patch("mortal", deletionPolicy="Retain")
    gate.after_write = lambda method, path: None
    operator.start()
    team.kubectl("delete", "distillrun", "mortal", "--timeout=60s")
    assert operator.stop() == 0


def test_a_standby_is_healthy_and_takes_over_when_the_holder_dies(
    team: Team, gate: Gate, tmp_path: Path
) -> None:
    first, second = (
        Process(gate, tmp_path, team.namespace, identity, lease_seconds=10)
        for identity in ("first", "second")
    )
    first.start()
    wait_until(first.leads, "the first leads")
    second.start()
    wait_until(lambda: answers(f"http://127.0.0.1:{second.port}/healthz"), "the second answers", 60)
    for process in (first, second):
        for probe in ("healthz", "readyz"):
            assert urllib.request.urlopen(f"http://127.0.0.1:{process.port}/{probe}").read() == b"ok\n"
    assert "vpmoe_operator_leading 0.0" in metrics(second)
    assert "vpmoe_operator_leading 1.0" in metrics(first)
    first.kill()
    wait_until(second.leads, "the second leads", 60)
    team.apply("handed", "steps=1")
    team.phase("handed", "Succeeded")
    assert "vpmoe_operator_reconciles_total" in metrics(second)
    assert second.stop() == 0
    holder = team.cluster.kubectl(
        "get",
        "lease",
        "distill-operator",
        f"--namespace={install.NAMESPACE}",
        "--output=jsonpath={.spec.holderIdentity}",
    )
    assert holder == "", "asked to stop, it lets the next one in at once"


def metrics(process: Process) -> str:
    return str(urllib.request.urlopen(f"http://127.0.0.1:{process.port}/metrics").read().decode())


def test_an_operator_that_has_lost_its_lease_ends_on_the_spot(team: Team, gate: Gate, tmp_path: Path) -> None:
    operator = Process(gate, tmp_path, team.namespace, lease_seconds=10)
    operator.start()
    wait_until(operator.leads, "it leads")
    thief = '{"spec":{"holderIdentity":"thief"}}'
    team.cluster.kubectl(
        "patch",
        "lease",
        "distill-operator",
        f"--namespace={install.NAMESPACE}",
        "--type=merge",
        "--patch",
        thief,
    )
    assert operator.process.wait(timeout=30) == 70
    assert "another process has taken it" in operator.log.read_text()


def test_a_missing_kubeflow_is_said_and_never_worked_around(team: Team, gate: Gate, tmp_path: Path) -> None:
    gate.rename = lambda path: path.replace(
        "/apis/kubeflow.org/v1", "/apis/kubeflow.org/v0"
    )  # which no cluster has
    operator = Process(gate, tmp_path, team.namespace)
    operator.start()
    team.apply("early", "steps=1")
    team.apply("plain", "steps=1", runtime={"backend": "Job"})
    team.until(
        "early",
        lambda: team.condition("early", "Stalled").get("reason") == "KubeflowMissing",
        "early says what is missing",
    )
    assert "install the Kubeflow training operator" in team.status("early")["message"]
    team.phase("plain", "Succeeded")  # younger, and not held up
    assert team.children("early") == []
    gate.rename = lambda path: path
    team.phase("early", "Succeeded")
    assert team.children("early") == ["early-preprocess-a1", "early-vanilla-a1"]
    assert operator.stop() == 0
