"""The commands that the demonstration ends with are those of `vpmoe`."""

from pathlib import Path

from demo.__main__ import NAMESPACE, QUESTION, RUN, chat_command, export_command, follow_command, typed
from demo.sample import rows
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
