"""Servers that tests share, each started once a session by the first test that needs it, and test markers.

A test is marked by what its fixtures start; no test is marked by hand. `make check` runs the unit tests
without the markers server, engine and cluster; `make test` runs all tests but gpu; `make test-gpu` runs only
those.
"""

import contextlib
import os
import secrets
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from botocore.loaders import JSONFileLoader

from devcluster import binaries, install
from devcluster import cluster as selected
from devcluster.cluster import Cluster, up
from tests.fakes import browser, prometheus, terminal
from tests.fakes.control_plane import ControlPlane
from tests.fakes.store import S3, small_run
from tests.fakes.waiting import answers, wait_until
from vpmoe.api.storage import StorageSpec
from vpmoe.process.launcher import free_port
from vpmoe.process.memory import no_collection
from vpmoe.storage import Bucket

if TYPE_CHECKING:
    import torch

# Tests and their processes compute with one thread, because tests run in parallel.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test asserts a duration: test machines are busy.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

LANES = {
    "s3": "server",
    "browser": "server",
    "promtool": "server",
    "terminal": "server",
    "teacher_address": "engine",
    "engines": "engine",
    "recipe": "engine",
    "helm": "cluster",
    "cluster": "cluster",
    "control_plane": "cluster",
    "gpu": "gpu",
}
"""Fixture → the marker of every test that uses it, directly or through other fixtures."""
DESELECTED_GPU_TESTS = pytest.StashKey[int]()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collect no garbage among what test modules import, neither while they do nor later: it stays."""
    with no_collection():
        return (yield)


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests by what their fixtures start. Tests that need a GPU run only with `-m gpu`."""
    for item in items:
        for fixture in LANES.keys() & set(getattr(item, "fixturenames", ())):
            item.add_marker(LANES[fixture])
    if "gpu" in config.option.markexpr:
        return
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    config.stash[DESELECTED_GPU_TESTS] = len(gpu_tests)
    config.hook.pytest_deselected(items=gpu_tests)
    items[:] = [item for item in items if item not in gpu_tests]


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Compile what the tests start before the first of them: a test's timeout would include it."""
    if session.config.option.collectonly:
        return
    lanes = {marker.name for item in session.items for marker in item.iter_markers()}
    programs = {"versitygw"} if "server" in lanes else set()
    packages = {"browser": browser.program, "promtool": prometheus.install, "terminal": terminal.program}
    for fixture, install_package in packages.items():
        if any(fixture in getattr(item, "fixturenames", ()) for item in session.items):
            install_package()
    if "cluster" in lanes and selected.choice() != "current":
        programs |= {"versitygw", "kube-apiserver", "training-operator"}
    capture = session.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
        for program in sorted(programs):
            binaries.path(program)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if count := config.stash.get(DESELECTED_GPU_TESTS, 0):
        terminalreporter.write_line(f"Not run: {count} tests that need a GPU. `make test-gpu` runs them.")


@pytest.fixture(scope="session")
def gpu() -> "torch.device":
    """The first GPU. A test without one fails: it is not skipped."""
    import torch

    if not torch.cuda.is_available():
        pytest.fail(
            f"needs an NVIDIA GPU and PyTorch for CUDA: torch {torch.__version__} finds no CUDA device"
        )
    return torch.device("cuda")


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """The S3 store: versitygw on loopback."""
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
    # Each new client reads botocore's files again, the largest of 2 MB, and changes nothing of what it reads.
    read, read_once = JSONFileLoader.load_file, cache(JSONFileLoader().load_file)
    JSONFileLoader.load_file = lambda self, path: read_once(path)  # type: ignore[method-assign]
    try:
        wait_until(lambda: answers(server.endpoint), "versitygw answers")
        yield server
    finally:
        JSONFileLoader.load_file = read  # type: ignore[method-assign]
        process.kill()
        process.wait()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@pytest.fixture
def run_spec(s3: S3) -> dict[str, Any]:
    """A small valid DistillRun as a dict, with a bucket of its own. Change it, then DistillRun.parse it."""
    return small_run(s3)


@pytest.fixture(scope="session")
def store(s3: S3) -> Bucket:
    """One client for all tests: to create one takes longer than most tests."""
    return Bucket.open(StorageSpec(endpoint=s3.endpoint, bucket="none"))


@pytest.fixture
def bucket(run_spec: dict[str, Any], store: Bucket) -> Bucket:
    """The bucket of `run_spec`."""
    return store.other(run_spec["spec"]["storage"]["bucket"])


@pytest.fixture(scope="session")
def sample_parquet(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The repository's sample of SYNTH-like rows as three parquet shards."""
    from demo import sample

    return sample.write(tmp_path_factory.mktemp("sample"), shards=3)


@pytest.fixture(scope="session")
def real_parquet() -> list[Path]:
    """Further parquet files of SYNTH rows: the paths in VPMOE_TEST_PARQUET, colon-separated."""
    return [Path(name) for name in os.environ.get("VPMOE_TEST_PARQUET", "").split(":") if name]


@pytest.fixture(scope="session")
def promtool() -> Callable[..., str]:
    """prometheus.promtool, for tests that use it or start a Prometheus."""
    return prometheus.promtool


@pytest.fixture(scope="session")
def helm() -> Path:
    """The helm of the selected cluster, compiled if needed. It renders the chart without a cluster."""
    return selected.helm()


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    """The selected cluster, running, with the operator of this checkout installed by its chart."""
    running = up()
    install.operator(running)
    return running


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane without nodes and without the operator, beside the development cluster."""
    with ControlPlane(tmp_path_factory.mktemp("control-plane")) as running:
        yield running


@pytest.fixture(scope="module")
def namespace(cluster: Cluster) -> Iterator[str]:
    """A namespace for the test module, with the storage Secret. It is deleted at the end, with its
    contents."""
    name = f"test-{secrets.token_hex(4)}"
    cluster.kubectl("create", "namespace", name)
    install.credentials(cluster, name)
    yield name
    cluster.kubectl("delete", "distillruns", "--all", "--namespace", name, "--timeout=120s")
    cluster.kubectl("delete", "namespace", name, "--timeout=360s")  # a trainer's grace period is 300 s
