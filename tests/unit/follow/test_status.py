"""`vpmoe status` and `kubectl distill`: output for pipes and terminals, watching, exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.followed_run import pods, run_object, training
from tests.fakes.run_server import RunServer, error
from tests.fakes.simulated_cluster import ERROR, SimulatedCluster, progress
from tests.fakes.terminal import Terminal
from tests.fakes.waiting import wait_until
from vpmoe.cli import status
from vpmoe.cli.main import main

ROOT = Path(__file__).parents[3]


@pytest.fixture
def cluster(server: RunServer) -> SimulatedCluster:
    """A run that trains, which the server serves."""
    cluster = training()
    server.run, server.pods = run_object(cluster), pods(cluster, "vanilla")
    return cluster


def go_on(server: RunServer, cluster: SimulatedCluster) -> None:
    """Train 200 tokens more, or succeed at the end."""
    done = cluster.step("vanilla").tokens_done or 0
    if done < 1000:
        cluster.set_progress(
            progress("vanilla", iteration=5, done=done + 200, message=f"Step {done // 200 + 1} of 5")
        )
    else:
        cluster.set_child_state("Succeeded")
    cluster.advance(10)
    cluster.reconcile_repeatedly()
    server.run = run_object(cluster)


def test_a_pipe_gets_lines_of_text(cluster: SimulatedCluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "first"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "━" not in out
    assert out.startswith("run: team/first\nphase: Running\nprogress: 43%\nmessage: vanilla: Step 2 of 5\n")


def test_json_has_everything_that_is_shown(
    cluster: SimulatedCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", "first", "--output=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["phase"], found["tokens_per_second"], found["eta"]) == (
        "Running",
        10.0,
        "2026-01-01T00:02:00+00:00",
    )
    vanilla = found["steps"][1]
    assert (vanilla["done"], vanilla["total"], vanilla["started"]) == (400, 1000, "2026-01-01T00:01:00+00:00")
    assert vanilla["pods"] == [{"name": "first-vanilla-a1-master-0", "state": "Running", "node": "node-1"}]


def test_a_watched_run_ends_the_command_when_it_succeeds(
    server: RunServer,
    cluster: SimulatedCluster,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(status, "SECONDS", 0.0)
    server.on_request = lambda server: go_on(server, cluster)
    assert main(["status", "first", "--watch"]) == 0
    lines = [
        line.partition("Z ")[2].partition(", attempt")[0] for line in capsys.readouterr().out.splitlines()
    ]
    assert [line for line in lines if line.startswith("step vanilla")] == [
        "step vanilla: Running, 60%, 600 of 1k tokens",
        "step vanilla: Running, 80%, 800 of 1k tokens",
        "step vanilla: Running, 100%, 1k of 1k tokens",
        "step vanilla: Succeeded, 100%, 1k of 1k tokens",
    ]
    assert lines[-2].startswith("Succeeded 100%: All 2 steps have succeeded")


def test_a_watched_run_that_fails_ends_with_1(
    server: RunServer,
    cluster: SimulatedCluster,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(status, "SECONDS", 0.0)
    cluster.spec["runtime"] = {"attempts": 1}
    cluster.set_child_state("Failed", ERROR)
    cluster.reconcile_repeatedly()
    server.on_request = lambda server: setattr(server, "run", run_object(cluster))
    assert main(["status", "first", "--watch", "--output=json"]) == 1
    assert json.loads(capsys.readouterr().out)["phase"] == "Failed"
    assert main(["status", "first"]) == 0, "without --watch it is only shown"


def test_watching_outlasts_an_api_server_that_is_away_and_ends_with_the_run(
    server: RunServer,
    cluster: SimulatedCluster,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(status, "SECONDS", 0.0)
    looks = iter([None, (0, b""), error(503, "starting"), error(503, "starting"), None])

    def look(path: str) -> tuple[int, bytes] | None:
        """The answers to looks at the run, which goes on meanwhile and is deleted at last."""
        if path.endswith("/pods"):
            return None
        if (cluster.step("vanilla").tokens_done or 0) < 1000:
            go_on(server, cluster)
        return next(looks, error(404, "not found", "first"))

    server.fault = look
    assert main(["status", "first", "--watch"]) == 1
    out, err = capsys.readouterr()
    assert [line.split(",")[1] for line in out.splitlines() if "step vanilla" in line] == [" 60%", " 100%"]
    away, starting, gone = err.splitlines()
    assert "cannot be reached" in away and "503: starting" in starting
    assert "there is no DistillRun first in namespace team" in gone


def test_a_reader_that_has_ended_and_ctrl_c_end_it_silently(
    server: RunServer, cluster: SimulatedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = f"{sys.executable} -m vpmoe status first --watch | head --lines=1; echo ${{PIPESTATUS[0]}}"
    monkeypatch.setattr(status, "SECONDS", 0.0)
    server.on_request = lambda server: go_on(server, cluster)
    ended = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    first, code = ended.stdout.splitlines()
    assert "Running" in first and (code, ended.stderr) == ("141", "")


def test_the_plugin_is_the_same_command_under_its_own_name(
    server: RunServer, cluster: SimulatedCluster, tmp_path: Path
) -> None:
    """A symbolic link to the installed program, as kubectl finds it on PATH."""
    program = tmp_path / "vpmoe"
    program.write_text(f"#!{sys.executable}\nimport sys\nfrom vpmoe.cli.main import main\nsys.exit(main())\n")
    program.chmod(0o755)
    plugin = tmp_path / "kubectl-distill"
    plugin.symlink_to(program)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [plugin, *arguments], env=environment, capture_output=True, text=True, timeout=60
        )

    assert run("status", "first", "-n", "team").stdout.startswith("run: team/first\n")
    assert run("--help").stdout.startswith("usage: kubectl distill ")
    wrong = run("status")
    assert (wrong.returncode, wrong.stderr.partition("\n")[0][:29]) == (64, "usage: kubectl distill status")


def in_screen(server: RunServer) -> dict[str, str]:
    """Variables of a command in a terminal."""
    return {
        "KUBECONFIG": str(server.kubeconfig),
        "PYTHONPATH": str(ROOT),
        "NO_PROXY": "*",
        "TERM": "screen",
    }


def test_in_a_terminal_the_run_is_redrawn_in_place_and_ctrl_c_ends_it(
    server: RunServer, cluster: SimulatedCluster, terminal: Terminal
) -> None:
    command = [sys.executable, "-m", "vpmoe", "status", "first", "--watch"]
    terminal.start(command, in_screen(server))
    screen = terminal.wait_for("400 of 1k tokens")
    assert screen[0].startswith("team/first  Running 43%")
    go_on(server, cluster)
    screen = terminal.wait_for("600 of 1k tokens")
    assert screen[0].startswith("team/first  Running 62%") and "team/first" not in "".join(screen[1:])
    assert [line.split()[1] for line in screen if "━" in line] == ["preprocess", "vanilla"], "drawn once"
    assert any(line.startswith("  Running  first-vanilla-a1-master-0 on node-1") for line in screen)
    server.fault = lambda path: (0, b"")
    terminal.wait_for("the API server cannot be reached")
    server.fault = lambda path: None
    wait_until(lambda: not terminal.shows("cannot be reached"), "it is reached again", seconds=60)
    terminal.press("C-c")
    screen = terminal.wait_for("ended with 130")
    assert not any("Traceback" in line or "Error" in line for line in screen)
    assert any("600 of 1k tokens" in line for line in screen), "the last view stays"
    assert terminal.cursor_is_visible()


@pytest.mark.parametrize("terminal", [40], indirect=True)
def test_in_a_narrow_terminal_the_end_of_a_run_ends_the_command(
    server: RunServer, cluster: SimulatedCluster, terminal: Terminal
) -> None:
    terminal.start([sys.executable, "-m", "vpmoe", "status", "first", "-w"], in_screen(server))
    terminal.wait_for("● vanilla")
    for _ in range(4):
        go_on(server, cluster)
    screen = terminal.wait_for("ended with 0")
    assert any(line.startswith("✓ vanilla") and line.endswith("100%") for line in screen)
