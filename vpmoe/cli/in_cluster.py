"""What subcommands that read a cluster have in common: kubectl's options that choose it, and how errors end.

They end with 1, as kubectl does, if the cluster or the run is not what the command needs.
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vpmoe.follow.cluster_reader import ClusterReader

FAILED = 1
INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT."""
READER_GONE = 141
"""Exit code if the reader of a pipe, such as head, has ended: 128 + SIGPIPE."""


def add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of kubectl that choose cluster and namespace."""
    parser.add_argument("-n", "--namespace", help="the run's namespace (default: the context's)")
    parser.add_argument("--context", help="a context of the kubeconfig (default: the current one)")
    parser.add_argument(
        "--kubeconfig", metavar="FILE", help="the kubeconfig (default: KUBECONFIG, or ~/.kube/config)"
    )


def open_cluster(arguments: argparse.Namespace) -> "ClusterReader":
    """The cluster and the namespace that the options choose. Raises ClusterError."""
    from vpmoe.follow.cluster_reader import ClusterReader

    return ClusterReader.open(arguments.kubeconfig, arguments.context, arguments.namespace)


def run_in_cluster(subcommand: str, work: Callable[[], int]) -> int:
    """The exit code of `work`, or that of the error which ended it, after a line on standard error."""
    from vpmoe.follow.cluster_error import ClusterError

    try:
        code = work()
        sys.stdout.flush()
    except ClusterError as error:
        sys.stderr.write(f"vpmoe {subcommand}: {error}\n")
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would flush it again
        return READER_GONE
    return code
