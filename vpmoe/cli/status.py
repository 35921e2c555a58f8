"""Show a run of a cluster: what it does or waits for, how far each stage is, how fast, and until when.

With --watch it is shown until the run ends: exit code 0 if it has succeeded, 1 if it has failed. Where
standard output is no terminal, lines of text are printed; with --watch only what changes.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from vpmoe.api import labels
from vpmoe.cli.in_cluster import FAILED, add_cluster_arguments, open_cluster, run_in_cluster

if TYPE_CHECKING:
    from vpmoe.follow.cluster_reader import ClusterReader
    from vpmoe.follow.run_view import RunView

HELP = "show what a run in the cluster does, and how far it is"
SECONDS = 2.0
"""Between two looks at a run that is watched."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="the DistillRun")
    parser.add_argument("-w", "--watch", action="store_true", help="until the run ends; Ctrl-C stops it")
    parser.add_argument(
        "-o",
        "--output",
        choices=("plain", "json"),
        help="lines of text, or JSON (default: a drawing in a terminal)",
    )
    add_cluster_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Returns 0, or 1 if a watched run has failed or the run cannot be shown."""
    return run_in_cluster("status", lambda: show(arguments))


def show(arguments: argparse.Namespace) -> int:
    """Show the run once, or until it ends. Raises ClusterError."""
    cluster = open_cluster(arguments)
    looks = watch(cluster, arguments.name) if arguments.watch else iter([look(cluster, arguments.name)])
    if arguments.output == "json":
        view = print_json(looks)
    elif arguments.output == "plain" or not sys.stdout.isatty():
        view = print_changes(looks) if arguments.watch else print_whole(looks)
    else:
        view = draw_each(looks) if arguments.watch else draw_once(looks)
    return FAILED if arguments.watch and view.phase == "Failed" else 0


def look(cluster: "ClusterReader", name: str) -> "tuple[RunView, str]":
    """The run now, and what is missing in the view. Raises ClusterError.

    A user may have the right to read runs and not pods: ClusterRole -viewer of the chart has no more.
    """
    from vpmoe.follow.cluster_error import ClusterError
    from vpmoe.follow.run_view import view_run

    found = cluster.run(name)
    try:
        return view_run(found, cluster.pods(f"{labels.RUN}={name}")), ""
    except ClusterError as error:
        if not error.forbidden:
            raise
        return view_run(found, []), f"Pods are not shown. {error}"


def watch(cluster: "ClusterReader", name: str) -> "Iterator[tuple[RunView, str]]":
    """The run every few seconds, until it has ended. While the API server does not answer, the last view with
    the reason. Raises ClusterError for what does not pass, such as a run that was deleted."""
    from vpmoe.follow.cluster_error import ClusterError

    view, notice = look(cluster, name)
    while True:
        yield view, notice
        if view.ended:
            return
        time.sleep(SECONDS)
        try:
            view, notice = look(cluster, name)
        except ClusterError as error:
            if not error.passing:
                raise
            notice = str(error)


def print_whole(looks: "Iterator[tuple[RunView, str]]") -> "RunView":
    """Print the only view as text."""
    from vpmoe.follow.plain_text import whole

    view, notice = next(looks)
    write_lines(whole(view, datetime.now(UTC)))
    write_notice(notice)
    return view


def print_changes(looks: "Iterator[tuple[RunView, str]]") -> "RunView":
    """Print what changes as text. Returns the last view."""
    from vpmoe.follow.plain_text import changes

    before: RunView | None = None
    notices = {""}
    for view, notice in looks:
        write_lines(changes(view, before, datetime.now(UTC)))
        if notice not in notices:
            write_notice(notice)
            notices.add(notice)
        before = view
    assert before is not None, "a run is looked at at least once"
    return before


def print_json(looks: "Iterator[tuple[RunView, str]]") -> "RunView":
    """Print each view that differs from the one before as a line of JSON. Returns the last one."""
    before: RunView | None = None
    for view, notice in looks:
        if view != before:
            write_lines([json.dumps(dataclasses.asdict(view), default=datetime.isoformat)])
            write_notice(notice)
        before = view
    assert before is not None, "a run is looked at at least once"
    return before


def write_lines(lines: Sequence[str]) -> None:
    """Write lines to standard output now: whoever reads them may wait for the next one."""
    sys.stdout.writelines(f"{line}\n" for line in lines)
    sys.stdout.flush()


def write_notice(notice: str) -> None:
    """Write what is missing, if anything is, to standard error."""
    if notice:
        sys.stderr.write(f"vpmoe status: {notice}\n")


def draw_once(looks: "Iterator[tuple[RunView, str]]") -> "RunView":
    """Draw the only view."""
    from rich.console import Console

    from vpmoe.follow.drawing import draw

    view, notice = next(looks)
    console = Console(highlight=False)
    console.print(draw(view, datetime.now(UTC), console, notice))
    return view


def draw_each(looks: "Iterator[tuple[RunView, str]]") -> "RunView":
    """Draw the views over each other. Returns the last one."""
    from rich.console import Console
    from rich.live import Live

    from vpmoe.follow.drawing import draw

    console = Console(highlight=False)
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        for view, notice in looks:
            live.update(draw(view, datetime.now(UTC), console, notice, fit=True), refresh=True)
    return view
