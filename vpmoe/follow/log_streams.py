"""Reads the logs of one or several pods: after each other, or all at once while they go on."""

import queue
import threading
import time
from collections.abc import Iterator, Sequence

from vpmoe.follow.cluster_error import ClusterError
from vpmoe.follow.cluster_reader import ClusterReader
from vpmoe.follow.pod_logs import has_ended, has_started, not_started, source
from vpmoe.follow.run_view import Json

SECONDS = 1.0
"""Between two looks at a pod that has not started."""


def read_logs(cluster: ClusterReader, pods: Sequence[Json], tail: int | None) -> Iterator[tuple[str, str]]:
    """Pod and line of each log, pod by pod, of those that have started. Raises ClusterError if none has."""
    started = [pod for pod in pods if has_started(pod)]
    if not started:
        raise not_started(pods[0])
    for pod in started:
        log = source(pod)
        for line in cluster.log(log.pod, log.container, tail=tail):
            yield log.pod, line


def follow_logs(cluster: ClusterReader, pods: Sequence[Json], tail: int | None) -> Iterator[tuple[str, str]]:
    """Pod and line of all logs as they come, until all containers have ended. A pod that has not started is
    waited for. Raises the first ClusterError after the lines of the others."""
    lines: queue.Queue[tuple[str, str] | ClusterError | None] = queue.Queue()

    def follow(pod: Json) -> None:
        try:
            log = source(_wait_for(cluster, pod))
            for line in cluster.log(log.pod, log.container, follow=True, tail=tail):
                lines.put((log.pod, line))
            lines.put(None)
        except ClusterError as error:
            lines.put(error)

    for pod in pods:
        threading.Thread(target=follow, args=(pod,), daemon=True).start()
    failed: ClusterError | None = None
    open_logs = len(pods)
    while open_logs:
        found = lines.get()
        if isinstance(found, tuple):
            yield found
        else:
            open_logs -= 1
            failed = failed or found
    if failed is not None:
        raise failed


def _wait_for(cluster: ClusterReader, pod: Json) -> Json:
    """The pod once its container has started."""
    while not has_started(pod):
        if has_ended(pod):
            raise not_started(pod)
        time.sleep(SECONDS)
        pod = cluster.pod(pod["metadata"]["name"])
    return pod
