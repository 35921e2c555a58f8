"""Storage that no store can accept, on a real kubelet: the run has a condition that names the field, and its
deletion ends."""

import base64
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from distill_operator.kube import JOB

from devcluster import install
from devcluster.access import Cluster
from tests.fakes import run_harness
from tests.fakes.run_harness import RunHarness

GOOD = {"AWS_ACCESS_KEY_ID": b"key", "AWS_SECRET_ACCESS_KEY": b"hunter2"}


@dataclass(frozen=True)
class Malformed:
    """A storage with a malformed part, and what the run's message says of it."""

    message: str
    storage: Mapping[str, str] = field(default_factory=dict)
    secret: Mapping[str, bytes] | None = None
    authority: bytes | None = None
    starts: bool = True
    """Whether the kubelet starts its pods."""


CASES = {
    "region": Malformed("storage.region 'eu-west-3\\\\n' is not the name", {"region": "eu-west-3\n"}),
    "host": Malformed(
        "'http://under_score:9000' is not the address", {"endpoint": "http://under_score:9000"}
    ),
    "port": Malformed("'127.0.0.1:0' is not the address", {"endpoint": "http://me:hunter2@127.0.0.1:0"}),
    "newline": Malformed(
        "AWS_SECRET_ACCESS_KEY contains", secret={**GOOD, "AWS_SECRET_ACCESS_KEY": b"hunter2\n"}
    ),
    "bytes": Malformed(
        "AWS_SECRET_ACCESS_KEY contains", secret={**GOOD, "AWS_SECRET_ACCESS_KEY": b"\xff\xfe"}
    ),
    "keyless": Malformed(
        "couldn't find key AWS_SECRET_ACCESS_KEY", secret={"AWS_ACCESS_KEY_ID": b"key"}, starts=False
    ),
    "authority": Malformed("storage.caSecret", authority=b"\x30\x82\x03\x0b\xff"),
}


@pytest.fixture(scope="module")
def harness(cluster: Cluster, namespace: str) -> Iterator[RunHarness]:
    """All runs start at once, so that their pods start in parallel."""
    run_harness.upgrade_operator(cluster, *run_harness.FAST)
    harness = RunHarness.create(cluster, namespace)
    for name, case in CASES.items():
        storage: dict[str, Any] = {**harness.storage(install.SECRET), **case.storage}
        if case.secret is not None:
            storage["credentialsSecret"] = create_secret(harness, f"{name}-keys", case.secret)
        if case.authority is not None:
            storage["caSecret"] = create_secret(harness, f"{name}-ca", {"ca.crt": case.authority})
        runtime = {"stalledAfter": "20s"}
        harness.apply(name, "steps=1", deletionPolicy="Delete", storage=storage, runtime=runtime)
    yield harness
    run_harness.restore_operator(cluster)


def create_secret(harness: RunHarness, name: str, data: Mapping[str, bytes]) -> str:
    encoded = {key: base64.b64encode(value).decode() for key, value in data.items()}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": encoded}
    harness.kubectl("apply", "--filename", "-", input=json.dumps(secret))
    return name


@pytest.mark.parametrize("name", CASES)
def test_malformed_storage_is_named_and_the_runs_deletion_ends(harness: RunHarness, name: str) -> None:
    case = CASES[name]
    if case.starts:
        status = harness.wait_for_phase(name, "Failed", "Succeeded")
        assert harness.condition(name, "Failed")["reason"] == "PermanentFailure", status["message"]
        assert harness.step(name, "preprocess")["attempt"] == 1
    else:
        harness.wait_until(
            name, lambda: harness.condition(name, "Stalled").get("status") == "True", "the run is stalled"
        )
        status = harness.status(name)
        assert harness.condition(name, "Stalled")["reason"] == "PodPending"
    assert case.message in status["message"]
    assert "hunter2" not in json.dumps(harness.get(name)["status"])
    harness.kubectl("delete", "distillrun", name, "--wait=false")
    if not case.starts:  # its Job ends at its deadline, which is shortened here
        harness.wait_until(name, lambda: bool(harness.clear_jobs(name)), "a Job is to delete its folder")
        (job,) = harness.clear_jobs(name)
        soon = json.dumps({"spec": {"activeDeadlineSeconds": 1}})
        harness.kubectl("patch", JOB.plural, job["metadata"]["name"], "--type=merge", "--patch", soon)
    harness.kubectl("wait", "--for=delete", f"distillrun/{name}", "--timeout=120s")
    assert "hunter2" not in harness.events(name)["BucketKept"]
