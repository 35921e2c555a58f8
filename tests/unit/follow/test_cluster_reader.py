"""One line with a remedy, and exit code 1, whatever the cluster does instead of answering as it should."""

import json
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fakes.followed_run import pods, run_object, training
from tests.fakes.run_server import TOKEN, RunServer, error
from vpmoe.cli.main import main
from vpmoe.follow.cluster_error import ClusterError
from vpmoe.follow.cluster_reader import ClusterReader
from vpmoe.process.launcher import free_port

FORBIDDEN = 'User "jane" cannot {verb} resource "{kind}" in API group "" in the namespace "team"'
LOG = "/api/v1/namespaces/team/pods/first-vanilla-a1-master-0/log"
PODS = "/api/v1/namespaces/team/pods"


@pytest.fixture
def run(server: RunServer) -> RunServer:
    """A server with a run that trains."""
    cluster = training()
    server.run, server.pods = run_object(cluster), pods(cluster, "vanilla")
    server.logs = {"first-vanilla-a1-master-0": [b"one\ntw", b"o\n", "drei…\n".encode()[:-2], b"\n"]}
    return server


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The line on standard error of a command that ends with 1."""
    assert main(list(arguments)) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err.rstrip("\n")


@pytest.mark.parametrize(
    "answer, said",
    [
        pytest.param(
            error(404, 'distillruns.vpmoe.dev "first" not found', "first"),
            "there is no DistillRun first in namespace team. `kubectl get distillruns --all-namespaces`",
            id="no-run",
        ),
        pytest.param(
            (404, b"404 page not found\n"),
            "the cluster has no DistillRuns (vpmoe.dev/v1alpha1). Install the operator with its chart",
            id="no-crd",
        ),
        pytest.param(
            error(403, FORBIDDEN.format(verb="get", kind="distillruns"), "first"),
            "user jane may not get distillruns.vpmoe.dev in namespace team. Ask for a RoleBinding",
            id="forbidden",
        ),
        pytest.param(
            error(401, "Unauthorized"),
            "does not accept your credentials (401): they are missing or have expired. Log in again",
            id="expired",
        ),
        pytest.param(
            error(403, 'User "system:anonymous" cannot get resource "distillruns"'),
            "does not accept your credentials (403): they are missing or have expired. Log in again",
            id="anonymous",
        ),
        pytest.param(
            error(500, "etcdserver: leader\nchanged"),
            "answered get distillruns.vpmoe.dev in namespace team with 500: etcdserver: leader changed.",
            id="broken",
        ),
        pytest.param(
            (302, b""), "answered get distillruns.vpmoe.dev in namespace team with 302", id="redirect"
        ),
        pytest.param((404, b"<html>"), "in namespace team with 404: <html>. Try again", id="gateway"),
        pytest.param(
            (200, b"<html>"), "is no API server. Check the server's address in the kubeconfig", id="portal"
        ),
        pytest.param((200, b"[]"), "is no API server", id="list"),
        pytest.param((0, b""), "cannot be reached to get distillruns.vpmoe.dev in namespace team:", id="cut"),
    ],
)
def test_an_answer_that_is_no_run_is_explained(
    run: RunServer, answer: tuple[int, bytes], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run.fault = lambda path: answer if "distillruns" in path else None
    for command in ("status", "logs", "report"):
        found = error_of(capsys, command, "first")
        assert found.startswith(f"vpmoe {command}: context here: ") and said in found


def test_what_is_missing_to_read_logs_is_named(run: RunServer, capsys: pytest.CaptureFixture[str]) -> None:
    forbidden = {PODS: ("list", "pods"), LOG: ("get", "pods/log")}
    for path, (verb, kind) in forbidden.items():
        answer = error(403, FORBIDDEN.format(verb=verb, kind=kind))
        run.fault = lambda asked, path=path, answer=answer: answer if asked == path else None
        assert f"user jane may not {verb} {kind} in namespace team." in error_of(capsys, "logs", "first")


def test_a_run_is_shown_to_who_may_not_see_its_pods(
    run: RunServer, capsys: pytest.CaptureFixture[str]
) -> None:
    run.fault = lambda path: error(403, FORBIDDEN.format(verb="list", kind="pods")) if path == PODS else None
    assert main(["status", "first"]) == 0
    out, err = capsys.readouterr()
    assert "step vanilla: Running, 40%" in out and "pod first" not in out
    assert err.startswith(
        "vpmoe status: Pods are not shown. context here: user jane may not list pods in namespace team."
    )


def test_no_cluster_is_explained(run: RunServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        run.write_kubeconfig(f"http://127.0.0.1:{closed.getsockname()[1]}")
        found = error_of(capsys, "status", "first")
    assert "cannot be reached to get distillruns.vpmoe.dev" in found and "Connection refused" in found
    assert found.endswith("Check that the cluster runs and that `kubectl version` reaches it.")
    run.write_kubeconfig("http://no-such-host.invalid")
    assert "cannot be reached to get" in error_of(capsys, "status", "first")


def test_a_certificate_of_an_unknown_authority_is_named(
    run: RunServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server does not speak TLS, which the client reports in the same way."""
    url = yaml.safe_load(run.kubeconfig.read_text())["clusters"][0]["cluster"]["server"]
    run.write_kubeconfig(url.replace("http:", "https:"))
    found = error_of(capsys, "status", "first")
    assert (
        "certificate is not accepted" in found
        and "certificate-authority and server in the kubeconfig" in found
    )


def test_kubeconfigs_that_do_not_fit_are_explained(
    run: RunServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = error_of(capsys, "status", "first", "--context", "prod")
    assert "has no context prod. Choose one with --context: here, other." in found
    missing = str(tmp_path / "none")
    assert f"there is no kubeconfig at {missing}. Set KUBECONFIG" in error_of(
        capsys, "status", "first", "--kubeconfig", missing
    )
    run.kubeconfig.write_text("a: [")
    assert "It needs clusters, users and contexts" in error_of(capsys, "status", "first")
    run.kubeconfig.write_text("")
    assert "It needs clusters, users and contexts" in error_of(capsys, "status", "first")
    run.write_kubeconfig("")
    assert "It needs a server and a user" in error_of(capsys, "status", "first")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KUBECONFIG")
    assert "there is no kubeconfig at" in error_of(capsys, "status", "first")


def test_the_context_gives_namespace_and_user(run: RunServer, capsys: pytest.CaptureFixture[str]) -> None:
    first = "/apis/vpmoe.dev/v1alpha1/namespaces/{}/distillruns/first"
    for arguments, namespace in (
        ((), "team"),
        (("--context", "other"), "default"),
        (("--context", "other", "-n", "mine"), "mine"),
        (("--namespace=a/b",), "a%2Fb"),
    ):
        run.requests.clear()
        assert main(["status", "first", *arguments]) == 0
        assert run.requests[0] == first.format(namespace)
    assert set(run.tokens) == {f"Bearer {TOKEN}"}


def test_several_files_of_kubeconfig_are_merged(
    run: RunServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = yaml.safe_load(run.kubeconfig.read_text())
    parts = ({"current-context": whole.pop("current-context"), "contexts": whole.pop("contexts")}, whole)
    files = [tmp_path / "contexts", tmp_path / "rest"]
    for file, part in zip(files, parts, strict=True):
        file.write_text(yaml.safe_dump(part))
    monkeypatch.setenv("KUBECONFIG", ":".join(map(str, files)))
    assert main(["status", "first"]) == 0


def test_the_environments_proxy_is_for_other_machines_and_that_of_the_kubeconfig_for_all(
    run: RunServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As kubectl does. Nothing listens at the proxy."""
    proxy = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("HTTP_PROXY", proxy)
    assert main(["status", "first"]) == 0
    capsys.readouterr()
    config = yaml.safe_load(run.kubeconfig.read_text())
    config["clusters"][0]["cluster"]["proxy-url"] = proxy
    run.kubeconfig.write_text(yaml.safe_dump(config))
    assert "cannot be reached" in error_of(capsys, "status", "first")
    run.write_kubeconfig("http://192.0.2.1")
    assert "cannot be reached" in error_of(capsys, "status", "first")


@pytest.mark.parametrize("works", [True, False])
def test_a_program_gives_the_credentials(
    run: RunServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], works: bool
) -> None:
    version = "client.authentication.k8s.io/v1"
    given = {"apiVersion": version, "kind": "ExecCredential", "status": {"token": "of-the-program"}}
    program = tmp_path / "login"
    program.write_text(f"#!/bin/sh\n{'cat <<E' if works else 'exit 3 <<E'}\n{json.dumps(given)}\nE\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    user = {"exec": {"apiVersion": version, "command": str(program), "interactiveMode": "Never"}}
    run.write_kubeconfig(
        yaml.safe_load(run.kubeconfig.read_text())["clusters"][0]["cluster"]["server"], user=user
    )
    if works:
        assert main(["status", "first"]) == 0
        assert set(run.tokens) == {"Bearer of-the-program"}
    else:
        found = error_of(capsys, "status", "first")
        assert "the kubeconfig's program gave no credentials:" in found and "Log in again" in found


def test_pods_of_all_pages_are_read(run: RunServer) -> None:
    first = {
        "metadata": {"continue": "more"},
        "items": [{"metadata": {"name": "b", "creationTimestamp": "2"}}],
    }
    second = {"metadata": {}, "items": [{"metadata": {"name": "a", "creationTimestamp": "1"}}]}
    pages = iter([first, second])
    run.fault = lambda path: (200, json.dumps(next(pages)).encode())
    found = ClusterReader.open().pods("vpmoe.dev/run=first")
    assert [pod["metadata"]["name"] for pod in found] == ["a", "b"]
    assert run.requests[0] == f"{PODS}?labelSelector=vpmoe.dev%2Frun%3Dfirst&limit=500"
    assert run.requests[1] == f"{run.requests[0]}&continue=more"


def test_a_log_is_read_by_lines_whatever_its_pieces(run: RunServer) -> None:
    found = list(ClusterReader.open().log("first-vanilla-a1-master-0", "pytorch"))
    assert found == ["one", "two", "drei\N{REPLACEMENT CHARACTER}"]
    run.logs = {"first-vanilla-a1-master-0": [b"no end of line"]}
    assert list(ClusterReader.open().log("first-vanilla-a1-master-0", "pytorch", tail=5)) == [
        "no end of line"
    ]
    assert run.requests[-1] == f"{LOG}?container=pytorch&follow=false&tailLines=5"


def test_a_log_that_breaks_off_is_an_error_after_its_lines(run: RunServer) -> None:
    def broken() -> Any:
        yield b"one\n"
        raise OSError("the kubelet is gone")

    run.logs = {"first-vanilla-a1-master-0": broken()}
    lines = ClusterReader.open().log("first-vanilla-a1-master-0", "pytorch")
    assert next(lines) == "one"
    with pytest.raises(ClusterError, match="cannot be reached to get pods/log in namespace team") as error:
        next(lines)
    assert error.value.passing
