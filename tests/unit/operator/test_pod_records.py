"""What pods say about their step: addresses that may be asked, and termination records."""

import asyncio
import copy
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import pytest
from distill_operator.kube import JOB, Kind
from distill_operator.observe import ObservedChild, observe_child
from distill_operator.pod_records import PodAddress, advance, find_record, serving_pods

from tests.fakes.pods import report
from tests.fakes.simulated_cluster import UID, observed_run
from vpmoe.api.progress import Progress
from vpmoe.failure import failure_record, success_record

RUNNING: dict[str, Any] = {"running": {}}


def pod(
    name: str = "p", ip: str = "10.0.0.1", replica: str = "", owner: str = "uid-j", **states: Any
) -> dict[str, Any]:
    """A pod; each keyword is the state of a container."""
    labels = {"training.kubeflow.org/replica-type": replica} if replica else {}
    statuses = [{"name": key, "state": state} for key, state in states.items()]
    return {
        "metadata": {
            "name": name,
            "uid": f"uid-{name}",
            "labels": labels,
            "ownerReferences": [{"uid": owner, "controller": True}],
        },
        "status": {"phase": "Running", "podIP": ip, "containerStatuses": statuses},
    }


def on_node(pod: dict[str, Any], *addresses: str) -> dict[str, Any]:
    """The pod on a node with these addresses."""
    found = {"hostIP": addresses[0], "hostIPs": [{"ip": address} for address in addresses]}
    return {**pod, "status": {**pod["status"], **found}}


def ended(progress: Progress | None, kind: str = "Succeeded") -> dict[str, Any]:
    """The state of a container that recorded this progress."""
    record = success_record(progress) if kind == "Succeeded" else failure_record(kind, "x", progress=progress)
    return {"terminated": {"exitCode": record.exit, "message": record.to_json_line().decode()}}


@pytest.mark.parametrize(
    "found, expected",
    [
        pytest.param(pod(main=RUNNING), True, id="runs"),
        pytest.param(pod(main=RUNNING, ip="fd00::1"), True, id="runs, IPv6"),
        pytest.param(pod(main=RUNNING, replica="master"), True, id="the Master"),
        pytest.param(pod(main=RUNNING, replica="Master"), True, id="the Master, in capitals"),
        pytest.param(pod(main=RUNNING, replica="worker"), False, id="a Worker"),
        pytest.param(pod(main={"waiting": {}}), False, id="does not run yet"),
        pytest.param(pod(main=ended(None)), False, id="has ended"),
        pytest.param(pod(main=ended(None), sidecar=RUNNING), False, id="has ended beside a sidecar"),
        pytest.param(pod(sidecar=RUNNING), False, id="only a sidecar"),
        pytest.param(pod(main=RUNNING, ip=""), False, id="no address yet"),
        *(
            pytest.param(pod(main=RUNNING, ip=ip), False, id=ip)
            for ip in (
                "169.254.169.254",
                "127.0.0.1",
                "0.0.0.0",
                "224.0.0.1",
                "::1",
                "fe80::1",
                "::ffff:127.0.0.1",
                "metadata.internal",
                "10.0.0.1:80",
                "10.0.0.1/x",
                "[fd00::1]",
            )
        ),
        pytest.param(on_node(pod(main=RUNNING), "192.0.2.1", "fd00::9"), True, id="on a node"),
        pytest.param(on_node(pod(main=RUNNING), "10.0.0.1"), False, id="on the host network"),
        pytest.param(
            on_node(pod(main=RUNNING, ip="fd00::1"), "10.0.0.1", "fd00::1"), False, id="the same, IPv6"
        ),
        pytest.param({"metadata": {"name": "p"}}, False, id="no status"),
    ],
)
def test_only_a_pods_own_address_is_asked(found: dict[str, Any], expected: bool) -> None:
    assert bool(serving_pods([found], "main")) is expected


def test_the_record_of_the_pod_that_got_furthest_counts() -> None:
    pods = [
        pod("a", main=ended(report(done=3))),
        pod("b", main=ended(report(done=4, state="Succeeded", message="Complete"))),
        pod("c", main=ended(report(done=2), "Internal")),
        pod("d", main=ended(None)),
        pod("e", main={"terminated": {"exitCode": 1, "message": "Traceback"}}),
        pod("f", main=RUNNING, sidecar=ended(report(done=9))),
        {"metadata": {"name": "g"}},
    ]
    found = find_record(pods, "main")
    assert found is not None and (found.message, found.progress and found.progress.parts) == (
        "Complete",
        report(done=4).parts,
    )
    assert find_record(pods[4:], "main") is None


def test_a_progress_without_time_zone_can_be_compared() -> None:
    progress = Progress.model_validate({**report().dump(), "updated": "0001-01-01T00:00:00"})
    assert advance(progress) < advance(report())


class Cluster:
    """A Job, None if it is gone, and its pods, as a Kube returns them. Counts the lists of pods."""

    def __init__(self, job: dict[str, Any] | None, pods: list[dict[str, Any]]) -> None:
        self.job, self.pods, self.lists = job, pods, 0

    async def get(self, kind: Kind, namespace: str, name: str) -> dict[str, Any] | None:
        return self.job

    async def pages(self, kind: Kind, namespace: str, **query: str) -> AsyncIterator[list[dict[str, Any]]]:
        self.lists += 1
        yield self.pods

    async def list(self, kind: Kind, namespace: str, **query: str) -> list[dict[str, Any]]:
        return [pod async for page in self.pages(kind, namespace, **query) for pod in page]


def job(*conditions: str, **status: Any) -> dict[str, Any]:
    return {
        "kind": "Job",
        "metadata": {
            "name": "j",
            "uid": "uid-j",
            "resourceVersion": "1",
            "ownerReferences": [{"uid": UID, "controller": True}],
        },
        "spec": {"parallelism": 1},
        "status": {"conditions": [{"type": one, "status": "True"} for one in conditions], **status},
    }


@pytest.mark.parametrize("wanted", [True, False])
def test_pods_of_a_running_child_are_listed_only_if_their_addresses_are_wanted(wanted: bool) -> None:
    cluster = Cluster(job(ready=1), [pod(main=RUNNING), pod("foreign", owner="another", main=RUNNING)])
    asked = []

    def wants_pods(uid: str) -> bool:
        asked.append(uid)
        return wanted

    found = asyncio.run(observe_child(cluster, observed_run(), JOB, "j", "c", "main", wants_pods)).child
    assert found is not None and (found.state, asked, cluster.lists) == ("Running", ["uid-j"], int(wanted))
    assert found.pods == ((PodAddress("p", "10.0.0.1"),) if wanted else None)


def test_pods_that_others_create_with_the_label_of_a_child_take_no_memory() -> None:
    class Crowd(Cluster):
        async def pages(
            self, kind: Kind, namespace: str, **query: str
        ) -> AsyncIterator[list[dict[str, Any]]]:
            for page in range(40):
                owner = "uid-j" if page % 2 else "another"
                foreign = pod(f"p-{page}", owner=owner, main=RUNNING)
                foreign["metadata"]["annotations"] = {"note": "x" * 2**18 + str(page)}
                foreign["spec"] = {"containers": [{"name": "main", "args": ["y" * 2**18 + str(page)]}]}
                yield [foreign]

    async def observe() -> int:
        tracemalloc.start()
        found = await observe_child(
            Crowd(job(ready=1), []), observed_run(), JOB, "j", "c", "main", lambda uid: True
        )
        assert found.child is not None and found.child.pods is not None and len(found.child.pods) == 20
        return tracemalloc.get_traced_memory()[1]

    assert asyncio.run(observe()) < 4 * 2**20
    tracemalloc.stop()


def test_a_pod_on_the_host_network_is_named() -> None:
    own = on_node(pod(main=RUNNING), "192.0.2.1")
    on_host = on_node(pod("h", ip="192.0.2.1", main=RUNNING), "192.0.2.1")
    cluster = Cluster(job(ready=1), [own, on_host])
    found = asyncio.run(observe_child(cluster, observed_run(), JOB, "j", "c", "main", lambda uid: True)).child
    assert found is not None
    assert (found.pods, found.host_network) == ((PodAddress("p", "10.0.0.1"),), "h")
    cluster.pods = [own]
    found = asyncio.run(observe_child(cluster, observed_run(), JOB, "j", "c", "main", lambda uid: True)).child
    assert found is not None and found.host_network == ""


def test_the_record_of_a_succeeded_child_is_read_from_its_pods() -> None:
    cluster = Cluster(job("Complete"), [pod(main=ended(report(done=9, state="Succeeded")))])
    found = asyncio.run(
        observe_child(cluster, observed_run(), JOB, "j", "c", "main", lambda uid: False)
    ).child
    assert found is not None and found.record is not None and cluster.lists == 1
    assert (found.state, found.record.progress) == ("Succeeded", report(done=9, state="Succeeded"))
    cluster.pods = []
    found = asyncio.run(
        observe_child(cluster, observed_run(), JOB, "j", "c", "main", lambda uid: False)
    ).child
    assert found is not None and (found.state, found.record) == ("Succeeded", None)


@pytest.mark.parametrize(
    ("terminating", "owner", "message"),
    [(True, "uid-j", "is terminating"), (False, "", "is still alive")],
    ids=["deleted in the background", "deleted without its pods"],
)
def test_a_child_that_is_gone_is_ending_until_its_pods_have_ended(
    terminating: bool, owner: str, message: str
) -> None:
    """Otherwise the next attempt would write to the bucket beside them, and hold their GPUs twice."""
    left = pod(owner=owner, main=RUNNING)
    left["spec"] = {"volumes": [{"name": "config", "configMap": {"name": "c"}}]}
    if terminating:
        left["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    foreign = copy.deepcopy(left)
    foreign["spec"] = {"volumes": [{"name": "config", "configMap": {"name": "of-an-earlier-run"}}]}
    cluster = Cluster(None, [foreign, left])

    def observe() -> ObservedChild | None:
        found = observe_child(cluster, observed_run(), JOB, "j", "c", "main", lambda uid: False)
        return asyncio.run(found).child

    found = observe()
    assert found is not None
    assert (found.state, found.deleting, found.alive, found.uid) == ("Ending", True, True, owner)
    assert found.message == f"Job j was deleted, and its pod p {message}"
    left["status"]["phase"] = "Failed"
    assert observe() is None
