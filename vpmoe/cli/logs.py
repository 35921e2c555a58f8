"""Print the log of a step of a run in a cluster: of all pods of its latest attempt.

If there are several pods, each line begins with its pod's name. Without STEP it is the step that runs or ran
last.
"""

import argparse
import re
import sys
from collections.abc import Callable

from vpmoe.api import labels
from vpmoe.cli.in_cluster import add_cluster_arguments, open_cluster, run_in_cluster

HELP = "print the log of a step of a run in the cluster"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="the DistillRun")
    parser.add_argument("step", metavar="STEP", nargs="?", help="such as preprocess, or a stage's name")
    parser.add_argument(
        "-f", "--follow", action="store_true", help="go on until the pods end; Ctrl-C stops it"
    )
    parser.add_argument(
        "--attempt", type=whole_number(1), metavar="N", help="an earlier attempt (default: the latest)"
    )
    parser.add_argument(
        "--pod",
        type=whole_number(0),
        metavar="N",
        help="only pod N of the attempt: 0 is the Master of a PyTorchJob, its Workers are 1, 2, …",
    )
    parser.add_argument("--tail", type=whole_number(0), metavar="N", help="only the last N lines of each log")
    add_cluster_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Returns 0, or 1 if there is no such log."""
    return run_in_cluster("logs", lambda: print_logs(arguments))


def print_logs(arguments: argparse.Namespace) -> int:
    """Print the logs. Raises ClusterError."""
    from vpmoe.follow.log_streams import follow_logs, read_logs
    from vpmoe.follow.pod_logs import choose_pods

    cluster = open_cluster(arguments)
    found = cluster.run(arguments.name)
    pods = cluster.pods(f"{labels.RUN}={arguments.name}")
    chosen = choose_pods(found, pods, arguments.step, arguments.attempt, arguments.pod)
    lines = (follow_logs if arguments.follow else read_logs)(cluster, chosen, arguments.tail)
    for pod, line in lines:
        sys.stdout.write(f"{pod}: {line}\n" if len(chosen) > 1 else f"{line}\n")
        if arguments.follow:
            sys.stdout.flush()
    return 0


def whole_number(least: int) -> Callable[[str], int]:
    """A converter of whole numbers from `least` on."""

    def convert(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} on")
        return int(text)

    return convert
