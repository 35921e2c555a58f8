"""`vpmoe logs`: the right pods of the right attempt, and why there is no log."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.followed_run import CREATING, KILLED, pods, run_object, training
from tests.fakes.run_server import RunServer
from tests.fakes.simulated_cluster import SimulatedCluster, manifest
from vpmoe.cli.main import main
from vpmoe.follow import log_streams
from vpmoe.follow.run_view import own_container

ROOT = Path(__file__).parents[3]
MASTER, WORKER = "first-vanilla-a1-master-0", "first-vanilla-a1-worker-0"
PAIR: dict[str, Any] = {"student": {"shape": "tiny", "gpus": 2, "gpusPerPod": 1}}


def logs(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `vpmoe logs first …`."""
    code = main(["logs", "first", *arguments])
    return (code, *capsys.readouterr())


@pytest.fixture
def cluster() -> SimulatedCluster:
    """A run whose stage trains in two pods."""
    return training(**PAIR)


@pytest.fixture
def run(server: RunServer, cluster: SimulatedCluster) -> RunServer:
    """A server with that run. Preprocessing has left its pods."""
    server.run = run_object(cluster)
    server.pods = [*pods(cluster, "vanilla"), *pods(cluster, "preprocess", {"terminated": {"exitCode": 0}})]
    server.logs = {
        pod["metadata"]["name"]: [f"of {pod['metadata']['name']}\n".encode()] for pod in server.pods
    }
    return server


def test_the_log_of_the_step_that_runs_has_the_names_of_its_pods(
    run: RunServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert logs(capsys) == (0, f"{MASTER}: of {MASTER}\n{WORKER}: of {WORKER}\n", "")
    assert logs(capsys, "vanilla", "--pod", "1") == (0, f"of {WORKER}\n", "")
    assert run.requests[-1].endswith(f"{WORKER}/log?container=pytorch&follow=false")
    assert logs(capsys, "preprocess", "--pod=0") == (0, "of first-preprocess-a1-0-x7k2p\n", "")
    assert run.requests[-1].endswith("/log?container=preprocess&follow=false")
    assert "labelSelector=vpmoe.dev%2Frun%3Dfirst" in run.requests[-2]


def test_the_own_container_is_read_whatever_others_a_policy_adds(cluster: SimulatedCluster) -> None:
    pod = pods(cluster, "vanilla")[0]
    pod["spec"]["containers"] = [
        {"name": "agent", "command": ["python", "-c", "jobs.train"]},
        *pod["spec"]["containers"],
    ]
    assert own_container(pod) == "pytorch"


def test_an_earlier_attempt_can_be_chosen(
    run: RunServer, cluster: SimulatedCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    run.run["status"]["steps"][1]["attempt"] = 2
    second = pods(cluster, "vanilla", attempt=2)
    run.pods += second
    run.logs |= {pod["metadata"]["name"]: [b"second\n"] for pod in second}
    assert logs(capsys)[1].startswith("first-vanilla-a2-master-0: second\n")
    assert logs(capsys, "--attempt=1", "--pod=0")[1] == f"of {MASTER}\n"
    code, out, err = logs(capsys, "--attempt=3")
    assert (code, out) == (1, "") and "has no attempt 3: the latest is 2. Leave --attempt out for it." in err


def test_pods_that_are_gone_are_explained(
    run: RunServer, cluster: SimulatedCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    run.run["status"]["steps"][1] |= {"attempt": 3}
    run.pods = pods(cluster, "vanilla", KILLED, attempt=2)
    code, _, err = logs(capsys)
    assert code == 1
    assert err == (
        "vpmoe logs: attempt 3 of step vanilla of run first has no pods now (Step 2 of 5). "
        "`vpmoe status first --watch` shows when it has. Attempts with pods: 2; choose one with --attempt.\n"
    )
    _, _, err = logs(capsys, "--attempt=1")
    assert "the pods of attempt 1 of step vanilla of run first are gone, and their logs with them" in err
    assert err.endswith("Its metrics are in s3://vpmoe/here/runs/team/first-0a1b2c3d/steps/vanilla.\n")


@pytest.mark.parametrize(
    "arguments, said",
    [
        pytest.param(("vanila",), "run first has no step vanila. It has preprocess, vanilla.", id="step"),
        pytest.param(
            ("vanilla", "--pod=7"), "attempt 1 of step vanilla has no pod 7. It has 0, 1.", id="pod"
        ),
    ],
)
def test_what_does_not_exist_is_named_with_what_does(
    run: RunServer, arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert logs(capsys, *arguments) == (1, "", f"vpmoe logs: {said}\n")


def test_a_step_that_has_not_started_says_what_it_waits_for(
    server: RunServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.run = manifest()
    assert "has no steps yet, because the operator has not seen it" in logs(capsys)[2]
    cluster = SimulatedCluster()
    cluster.reconcile()
    server.run = run_object(cluster)
    code, _, err = logs(capsys, "vanilla")
    assert code == 1 and err.startswith("vpmoe logs: step vanilla of run first has not started (Pending")
    assert "`vpmoe status first --watch` shows when it does." in err


@pytest.mark.parametrize(
    "state, said",
    [
        pytest.param(
            {}, "(Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu)", id="unschedulable"
        ),
        pytest.param(
            {"waiting": {"reason": "ErrImagePull", "message": "not found:\n tag x"}},
            "(ErrImagePull: not found: tag x)",
            id="image",
        ),
    ],
)
def test_a_container_that_has_not_started_says_why(
    run: RunServer,
    cluster: SimulatedCluster,
    state: dict[str, Any],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run.pods = pods(cluster, "vanilla", state)
    code, _, err = logs(capsys)
    assert code == 1
    assert f"pod {MASTER} has no log, because its container has not started {said}." in err
    assert err.endswith(f"`kubectl describe pod {MASTER}` shows its events; --follow waits for it.\n")


def test_of_several_pods_those_are_read_that_have_started(
    run: RunServer, cluster: SimulatedCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    run.pods = [pods(cluster, "vanilla")[0], pods(cluster, "vanilla", CREATING)[1]]
    assert logs(capsys) == (0, f"{MASTER}: of {MASTER}\n", "")


def test_logs_are_followed_at_once_and_a_pod_is_waited_for(
    run: RunServer,
    cluster: SimulatedCluster,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The Master's log does not end before the Worker's has begun, and the Worker starts later."""
    monkeypatch.setattr(log_streams, "SECONDS", 0.01)
    worker_said = threading.Event()

    def master() -> Iterator[bytes]:
        yield b"waits\n"
        assert worker_said.wait(30)
        yield b"ends\n"

    def worker() -> Iterator[bytes]:
        yield b"starts\n"
        worker_said.set()

    first, second = pods(cluster, "vanilla")
    _, later = pods(cluster, "vanilla", CREATING)
    run.pods, run.logs = [first, later], {MASTER: master(), WORKER: worker()}
    looks = iter(range(100))

    def start_later(path: str) -> None:
        if path.endswith(WORKER) and next(looks) == 3:
            run.pods = [first, second]

    run.fault = start_later
    code, out, err = logs(capsys, "--follow", "--tail=7")
    assert (code, err) == (0, "")
    assert sorted(out.splitlines()) == [f"{MASTER}: ends", f"{MASTER}: waits", f"{WORKER}: starts"]
    assert sum("follow=true&tailLines=7" in path for path in run.requests) == 2


def test_ctrl_c_ends_following(run: RunServer) -> None:
    ended = threading.Event()

    def endless() -> Iterator[bytes]:
        yield b"one\n"
        ended.wait(60)

    run.logs = {MASTER: endless(), WORKER: endless()}
    command = [sys.executable, "-m", "vpmoe", "logs", "first", "--follow"]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # The tests themselves may run where Ctrl-C is ignored, as in a background job of a shell.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert {process.stdout.readline(), process.stdout.readline()} == {
            f"{MASTER}: one\n",
            f"{WORKER}: one\n",
        }
        process.send_signal(signal.SIGINT)
        assert (process.wait(60), process.stdout.read(), process.stderr.read()) == (130, "", "")
        ended.set()


def test_a_pod_that_never_starts_ends_the_wait(
    run: RunServer,
    cluster: SimulatedCluster,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, second = pods(cluster, "vanilla", CREATING)
    second["status"] = {"phase": "Failed", "reason": "Evicted", "message": "The node was low on memory."}
    run.pods = [pods(cluster, "vanilla")[0], second]
    code, out, err = logs(capsys, "--follow")
    assert (code, out) == (1, f"{MASTER}: of {MASTER}\n")
    assert (
        f"pod {WORKER} has no log, because its container has not started (Evicted: The node was low on" in err
    )
    assert "--follow" not in err


@pytest.mark.parametrize("wrong", [("--pod=-1",), ("--attempt=0",), ("--tail=x",), ("a", "b")])
def test_a_wrong_command_line_ends_with_64(
    wrong: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["logs", "first", *wrong])
    assert ended.value.code == 64
