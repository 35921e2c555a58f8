"""The commands that the demonstration ends with are those of `vpmoe`."""

import shlex
from pathlib import Path

import pytest

from demo.__main__ import (
    NAMESPACE,
    QUESTION,
    REMOVAL,
    RUN,
    chat_command,
    export_command,
    follow_command,
    look_around,
    typed,
)
from demo.sample import rows
from devcluster.access import S3, Cluster
from devcluster.cluster import PROVIDERS, choice
from vpmoe.cli.main import command_line

MODEL = Path("some/model")


def test_the_student_is_exported_and_asked_a_question_of_the_sample() -> None:
    folder = "s3://vpmoe/runs/default/demo-0a1b2c3d"
    export, chat = (
        command_line(command[3:4]).parse_args(command[3:])
        for command in (export_command(folder, MODEL), chat_command(MODEL))
    )
    assert (export.subcommand, export.url, export.to) == ("export", folder, MODEL)
    assert (chat.subcommand, chat.folder, chat.question, chat.effort) == ("chat", MODEL, QUESTION, "high")
    assert QUESTION in {row["query"] for row in rows()}
    assert typed(chat_command(MODEL))[:4] == [".venv/bin/python", "-m", "vpmoe", "chat"]


def test_the_run_is_followed_as_by_a_user() -> None:
    command = typed(follow_command())[3:]
    watched = command_line(command[:1]).parse_args(command)
    assert (watched.subcommand, watched.name, watched.namespace, watched.watch) == (
        "status",
        RUN,
        NAMESPACE,
        True,
    )


FOLDER = "s3://vpmoe/runs/default/demo-0a1b2c3d"
CLUSTER = Cluster(
    Path("/checkout/.kind/kubeconfig"),
    Path("/usr/bin/kubectl"),
    Path("/usr/bin/helm"),
    S3("http://127.0.0.1:30900", "key", "secret", "http://s3:9000"),
    (),
)


@pytest.mark.parametrize("cluster", ["dev", "kind"])
def test_the_last_command_removes_the_cluster_of_the_demonstration(
    cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLUSTER", cluster)
    last = look_around(CLUSTER, FOLDER)[-1]
    monkeypatch.delenv("CLUSTER")  # as in the shell in which the user types it
    make, target, *variables = shlex.split(last)
    for variable in variables:
        monkeypatch.setenv(*variable.split("="))
    assert (make, target, choice()) == ("make", "down", cluster)


def test_a_cluster_of_the_users_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTER", "current")
    assert look_around(CLUSTER, FOLDER)[-1] == f"kubectl delete distillrun {RUN} --namespace {NAMESPACE}"
    assert REMOVAL.keys() == PROVIDERS.keys()


def test_the_bucket_is_verified_with_the_stores_keys() -> None:
    (verify,) = [command for command in look_around(CLUSTER, FOLDER) if "verify" in command]
    *variables, python, dash, module, subcommand, url = shlex.split(verify)
    assert dict(variable.split("=", 1) for variable in variables) == {
        "AWS_ENDPOINT_URL": CLUSTER.s3.endpoint,
        "AWS_ACCESS_KEY_ID": CLUSTER.s3.access_key,
        "AWS_SECRET_ACCESS_KEY": CLUSTER.s3.secret_key,
    }
    assert (python, dash, module) == (".venv/bin/python", "-m", "vpmoe")
    parsed = command_line([subcommand]).parse_args([subcommand, url])
    assert (parsed.subcommand, parsed.url) == ("verify", FOLDER)
