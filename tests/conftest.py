"""The real servers that tests talk to, started once a session: an S3 store on loopback, and the development cluster.

What a test asks for by name it gets running; a test that names no fixture starts nothing.
"""

import os
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from devcluster import install
from devcluster.cluster import Cluster, up
from tests.fakes.store import S3, small_run
from tests.fakes.waiting import answers, wait_until
from vpmoe.api.storage import StorageSpec
from vpmoe.process.launcher import free_port
from vpmoe.storage import Bucket

# No test asserts a time: test machines are busy.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

LANES = {"s3": "server", "teacher_address": "engine", "engines": "engine", "cluster": "cluster", "gpu": "gpu"}
"""Fixture → the marker of every test that uses it, directly or through other fixtures."""
LEFT_TO_GPU = pytest.StashKey[int]()


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests by what their fixtures start. Tests that need a GPU run only where `-m` names the marker gpu."""
    for item in items:
        for fixture in LANES.keys() & set(getattr(item, "fixturenames", ())):
            item.add_marker(LANES[fixture])
    if "gpu" in config.option.markexpr:
        return
    left = [item for item in items if item.get_closest_marker("gpu")]
    config.stash[LEFT_TO_GPU] = len(left)
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if count := config.stash.get(LEFT_TO_GPU, 0):
        terminalreporter.write_line(f"Not run: {count} tests that need a GPU. `make test-gpu` runs them.")


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    from devcluster import binaries

    folder = tmp_path_factory.mktemp("s3")
    port = free_port()
    server = S3(f"http://127.0.0.1:{port}", "test", "test-secret", folder)
    process = subprocess.Popen(
        [binaries.path("versitygw"), "--port", f"127.0.0.1:{port}", "posix", folder],
        env={**os.environ, "ROOT_ACCESS_KEY": server.access_key, "ROOT_SECRET_KEY": server.secret_key},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    before = {
        name: os.environ.get(name)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL")
    }
    os.environ.update(
        AWS_ACCESS_KEY_ID=server.access_key,
        AWS_SECRET_ACCESS_KEY=server.secret_key,
        AWS_ENDPOINT_URL=server.endpoint,
    )
    try:
        wait_until(lambda: answers(server.endpoint), "versitygw answers")
        yield server
    finally:
        process.kill()
        process.wait()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@pytest.fixture
def run_spec(s3: S3) -> dict[str, Any]:
    """A small valid DistillRun as a dict, on a bucket of this test's own; change what the test is about, then DistillRun.parse it."""
    return small_run(s3)


@pytest.fixture(scope="session")
def store(s3: S3) -> Bucket:
    """One connection for all tests: making a client costs more than most tests do."""
    return Bucket.open(StorageSpec(endpoint=s3.endpoint, bucket="none"))


@pytest.fixture
def bucket(run_spec: dict[str, Any], store: Bucket) -> Bucket:
    """The bucket of `run_spec`."""
    return store.other(run_spec["spec"]["storage"]["bucket"])


@pytest.fixture(scope="session")
def sample_parquet(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The repository's own sample of SYNTH-like rows as three parquet shards."""
    from demo import sample

    return sample.write(tmp_path_factory.mktemp("sample"), shards=3)


@pytest.fixture(scope="session")
def real_parquet() -> list[Path]:
    """Further parquet files of real SYNTH rows, named in VPMOE_TEST_PARQUET (colon-separated); none where it is unset."""
    return [Path(name) for name in os.environ.get("VPMOE_TEST_PARQUET", "").split(":") if name]


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    """The development cluster, up, with the operator installed from this checkout as its users install it."""
    running = up()
    install.operator(running)
    return running


@pytest.fixture(scope="module")
def namespace(cluster: Cluster) -> Iterator[str]:
    """A namespace of this test module's own with the storage Secret in it; it goes with all that is in it."""
    name = f"test-{secrets.token_hex(4)}"
    cluster.kubectl("create", "namespace", name)
    install.credentials(cluster, name)
    yield name
    cluster.kubectl("delete", "distillruns", "--all", "--namespace", name, "--timeout=120s")
    cluster.kubectl("delete", "namespace", name, "--timeout=120s")
