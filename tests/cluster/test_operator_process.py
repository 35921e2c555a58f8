"""The operator's process on a real control plane: killed after every write, with a standby, without its
lease, without Kubeflow."""

import contextlib
import random
import re
import secrets
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import pytest
import yaml

from devcluster import install
from devcluster.access import Cluster
from tests.fakes import run_harness
from tests.fakes.api_proxy import ApiProxy, OperatorProcess, WatchFault, created_kinds
from tests.fakes.run_harness import STAGES, RunHarness
from tests.fakes.waiting import answers, wait_until


@pytest.fixture(scope="module")
def harness(cluster: Cluster, namespace: str) -> Iterator[RunHarness]:
    """A harness without the installed operator: these tests start their own."""
    run_harness.stop_operator(cluster)
    yield RunHarness.create(cluster, namespace)
    run_harness.restore_operator(cluster)


@pytest.fixture
def proxy(cluster: Cluster, harness: RunHarness) -> Iterator[ApiProxy]:
    run_harness.delete_lease(cluster)
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


def test_leaders_that_are_killed_or_frozen_after_any_write_hand_over_without_a_duplicate(
    harness: RunHarness, cluster: Cluster, proxy: ApiProxy, tmp_path: Path
) -> None:
    """Each leader makes one or two writes and is then killed, or frozen until its standby leads: when it is
    continued, it must not write any more."""
    seed = secrets.randbelow(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    operators: list[OperatorProcess] = []
    interrupted: dict[str, str] = {}

    def succeeded() -> bool:
        return harness.status("passed").get("phase") == "Succeeded"

    with contextlib.ExitStack() as proxies:

        def start_operator() -> OperatorProcess:
            own_proxy = proxies.enter_context(ApiProxy(cluster))
            identity = f"operator-{len(operators)}"
            operator = OperatorProcess(own_proxy, tmp_path, harness.namespace, identity, lease_seconds=6)
            interrupt = operator.freeze if len(operators) % 2 else operator.kill
            interrupt_after_writes(operator, rng.choice((1, 1, 2)), interrupt, interrupted)
            operator.start()
            operators.append(operator)
            return operator

        leader = start_operator()
        wait_until(leader.leads, "the first operator leads", 60)
        three_stages = {"teacher": {"model": "s3://models/none", "gpus": 1}, "stages": STAGES}
        harness.apply("passed", "steps=4 every=2 pause=0 parts=2", deletionPolicy="Delete", **three_stages)
        while True:
            standby = start_operator()
            wait_until(lambda who=leader.identity: who in interrupted or succeeded(), "a write", 240)  # type: ignore[misc]
            if succeeded():
                break
            wait_until(standby.leads, f"the standby leads; {interrupted}", 60)
            if leader.process.poll() is None:
                before = writes_of_runs(leader)
                leader.thaw()
                assert leader.process.wait(timeout=60) == 70
                assert writes_of_runs(leader) == before, "it wrote after it had lost the lease"
            leader = standby
        for operator in operators:
            if operator.process.poll() is None:
                operator.kill()
    assert harness.child_names("passed") == sorted(
        f"passed-{step}-a1" for step in ("preprocess", "rescore", "vanilla", "rescored", "teacherforced")
    )
    created = [kind for operator in operators for kind in created_kinds(operator.proxy.writes)]
    assert sorted(created) == ["jobs"] * 2 + ["pytorchjobs"] * 3
    assert len(interrupted) > 8, interrupted
    harness.patch("passed", deletionPolicy="Retain")
    harness.kubectl(
        "patch", "distillrun", "passed", "--type=merge", "--patch", '{"metadata":{"finalizers":[]}}'
    )


def interrupt_after_writes(
    operator: OperatorProcess, count: int, interrupt: Callable[[], None], interrupted: dict[str, str]
) -> None:
    """Interrupt the operator after that many writes, before the last is answered. Then `interrupted` has that
    write, by the operator's identity."""
    written: list[str] = []

    def after_write(method: str, path: str) -> None:
        if "/leases" in path or len(written) == count:
            return
        written.append(f"{method} {path}")
        if len(written) == count:
            interrupt()
            interrupted[operator.identity] = written[-1]

    operator.proxy.after_write = after_write


def writes_of_runs(operator: OperatorProcess) -> int:
    """The number of writes that the operator has sent, without those of the lease."""
    return sum(method != "GET" and "/leases" not in path for method, path in operator.proxy.requests)


@pytest.mark.parametrize(
    "other", ["/version", "/api/v1/nodes", "/healthz", "/nothing"], ids=["object", "list", "text", "error"]
)
def test_nobody_leads_without_the_lease(
    harness: RunHarness, proxy: ApiProxy, tmp_path: Path, other: str
) -> None:
    """Whatever the response to a request for the lease is."""
    proxy.rewrite_path = lambda path: other if "/leases" in path else path
    operator = OperatorProcess(proxy, tmp_path, harness.namespace)
    operator.start()
    wait_until(
        lambda: len(proxy.requests) > 2 or operator.process.poll() is not None,
        "it asks several times, or ends",
        60,
    )
    assert operator.process.poll() in (None, 70)
    assert not operator.leads()
    assert {path for _, path in proxy.requests} == {other}, "it asks for nothing else"
    operator.kill()


def test_watches_that_break_in_each_way_work_again(
    harness: RunHarness, cluster: Cluster, proxy: ApiProxy, tmp_path: Path
) -> None:
    """Each fault breaks the watches of a namespace of its own, and leaves those of another alone. The resync,
    which would find the runs too, comes once an hour."""
    faults: dict[str, WatchFault] = {
        f"{harness.namespace}-{fault.lower().replace(' ', '-')}": fault for fault in get_args(WatchFault)
    }
    ends_kopf = [name for name, fault in faults.items() if fault in ("404", "410", "ERROR 500")]
    namespaces = [harness.namespace, *faults]
    for namespace in faults:
        cluster.kubectl("create", "namespace", namespace)

    def apply(run: str) -> None:
        manifest = yaml.safe_dump(harness.manifest(run, suspend=True))
        for namespace in namespaces:
            cluster.kubectl("apply", "--filename=-", f"--namespace={namespace}", input=manifest)

    def wait_until_seen(run: str, namespace: str) -> None:
        query = ["get", "distillrun", run, f"--namespace={namespace}", "--output=jsonpath={.status.phase}"]
        wait_until(lambda: bool(cluster.kubectl(*query)), f"{run} is seen in {namespace}", 90, 1)

    def restarted(namespace: str) -> bool:
        named = rf'^vpmoe_operator_watch_restarts_total{{[^}}]*run_namespace="{namespace}"'
        return re.search(named, metrics(operator), re.MULTILINE) is not None

    operator = OperatorProcess(
        proxy,
        tmp_path,
        harness.namespace,
        settings={"resyncSeconds": 3600, "watchNamespaces": namespaces},
    )
    operator.start()
    wait_until(operator.leads, "the operator leads")
    apply("before")
    for namespace in namespaces:
        wait_until_seen("before", namespace)
    proxy.watch_fault = lambda path: faults.get(path.partition("/namespaces/")[2].partition("/")[0])
    wait_until(lambda: all(map(restarted, ends_kopf)), "watches are started again", 120, 1)
    apply("during")
    wait_until_seen("during", harness.namespace)
    proxy.watch_fault = lambda path: None
    apply("after")
    for namespace in namespaces:
        wait_until_seen("after", namespace)
    assert not restarted(harness.namespace)
    for probe in ("healthz", "readyz"):
        assert urllib.request.urlopen(f"http://127.0.0.1:{operator.port}/{probe}").read() == b"ok\n"
    assert operator.stop() == 0
    for namespace in faults:
        cluster.kubectl("delete", "namespace", namespace, "--wait=false")


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
