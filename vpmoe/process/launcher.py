"""The launcher of a stage's processes on this machine or pod: starts them, passes SIGTERM on, and ends as the first that failed.

One of our own and not torch's elastic launcher, because that one ends with 1 whatever its worker's code was; has one timeout for workers
that save a checkpoint after SIGTERM, minutes, and for those that hang in a collective because another one has failed, seconds; and needs
torch, 300 MB and some seconds, to start a process. Restarting workers, which is what it is for, is the operator's business here.

A TeacherForced stage has one process more, the teacher's, which the first pod's launcher starts beside its ranks on the GPU after theirs.

In a pod of a PyTorchJob PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT say which pod of how many this is. (RANK and
WORLD_SIZE are set there too and count pods: they mean nothing here.) Without them all ranks are started here.
"""

import ctypes
import logging
import math
import os
import random
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from vpmoe import failure
from vpmoe.api.layout import Layout
from vpmoe.failure import Failure, Permanent

log = logging.getLogger(__name__)

GRACE = 30.0
"""Seconds between the first failure and the end of the others: time to fail with words of their own, or to finish an upload."""
POLL = 0.1
TEACHER = -1
"""Stands for the teacher's process where others have their rank."""
TEACHER_PORT = 1
"""Where the teacher of pods is met: so far behind PET_MASTER_PORT, which is 23456 everywhere, at the first pod's own address."""
OWN_PORTS = range(20_000, 30_000)
"""Where processes of one machine meet. Linux gives outgoing connections those from 32768 on."""
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Placement:
    """Which ranks this launcher starts, and where rank 0 is met."""

    ranks: int
    first: int
    here: int
    address: str
    port: int
    teacher_port: int | None = None
    """Where the teacher is met, at the same address; None in a stage without one."""

    @property
    def teaches(self) -> bool:
        """Whether the teacher's process is this launcher's to start."""
        return self.teacher_port is not None and self.first == 0


def place(layout: Layout, environment: Mapping[str, str], teacher: bool = False) -> Placement:
    """Where the processes of this pod stand in the layout, and with `teacher` the teacher's.

    Raises Permanent where the pods are not those that the layout wants.
    """
    if "PET_NNODES" not in environment:
        return Placement(
            layout.ranks, 0, layout.ranks, "127.0.0.1", free_port(), free_port() if teacher else None
        )
    pods = int(environment["PET_NNODES"])
    if pods != layout.pods:
        raise Permanent(
            f"PET_NNODES: this job has {pods} pods, but {layout.ranks} ranks, {layout.processes_per_pod} a pod, are {layout.pods}. "
            "The job was made for another configuration; delete it."
        )
    node = int(environment["PET_NODE_RANK"])
    each = layout.processes_per_pod
    address, port = environment["PET_MASTER_ADDR"], int(environment["PET_MASTER_PORT"])
    return Placement(layout.ranks, node * each, each, address, port, port + TEACHER_PORT if teacher else None)


def free_port() -> int:
    """A port of the loopback that nobody listens on now, of those that the kernel gives to no outgoing connection.

    Rank 0 listens on it once it has imported all it needs, and many connections are made until then. Raises Permanent where there is none.
    """
    for port in random.sample(OWN_PORTS, len(OWN_PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise Permanent(
        f"no port from {OWN_PORTS.start} to {OWN_PORTS.stop - 1} is free to meet at. End some of what listens there."
    )


def launch(placement: Placement, command: Sequence[str], stopping: threading.Event) -> int:
    """Run `command` once a rank, and once for the teacher that this pod may have, until all have ended; returns the exit code to end with.

    0 where all succeeded, otherwise the code of the first that failed, whose words are in the termination message (vpmoe.failure): it has
    written them itself, unless it was killed; then the launcher does, over what those wrote that failed because of it.
    """
    with tempfile.TemporaryDirectory(prefix="vpmoe-train-") as scratch:
        workers = {}
        for local in range(placement.here + placement.teaches):
            environment = {**os.environ, **settings(placement, local, os.environ), "VPMOE_SCRATCH": scratch}
            rank = placement.first + local if local < placement.here else TEACHER
            workers[rank] = subprocess.Popen(command, env=environment)
        try:
            return supervise(workers, stopping)
        finally:
            for worker in workers.values():
                worker.kill()
                worker.wait()


def settings(placement: Placement, local: int, environment: Mapping[str, str]) -> dict[str, str]:
    """What the environment of the `local`-th process here says beside what this one's says. The teacher's is the one after the ranks'."""
    found = {
        "RANK": str(placement.first + local),
        "LOCAL_RANK": str(local),
        "WORLD_SIZE": str(placement.ranks),
        "LOCAL_WORLD_SIZE": str(placement.here),
        "MASTER_ADDR": placement.address,
        "MASTER_PORT": str(placement.port),
        # One thread wherever nothing else is asked for: sums depend on how many share them, and bits must not depend on the machine.
        "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", "1"),
        "VPMOE_LAUNCHER": str(os.getpid()),
    }
    if placement.teacher_port is not None:
        found["VPMOE_TEACHER_PORT"] = str(placement.teacher_port)
        if local == placement.here:
            found |= {"VPMOE_PART": "teacher", "RANK": ""}  # it has none among the ranks
    if environment.get("CUDA_VISIBLE_DEVICES") == "":
        # Keep memory that is freed: a chunk of logits is 256 MB, and to have each zeroed by the kernel anew is a third of a step of `tiny`.
        found |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    return found


def supervise(workers: Mapping[int, "subprocess.Popen[bytes]"], stopping: threading.Event) -> int:
    """Wait for all workers. Those that outlive the first failure by GRACE are left to the caller to kill.

    To stop is no failure: after SIGTERM the workers have as long as their checkpoint takes. The teacher is nobody's reason to wait: where
    all ranks have ended and one of them failed, or all were to stop, it gets no more than GRACE.
    """
    told, failed, deadline = False, None, math.inf
    while True:
        codes = {rank: worker.poll() for rank, worker in workers.items()}
        if failed is None and (
            ended := [rank for rank, code in codes.items() if code and not stopped(code, told)]
        ):
            failed, deadline = min(ended, key=lambda rank: (codes[rank] or 0) > 0), time.monotonic() + GRACE
            if (codes[failed] or 0) < 0:
                killed(failed, codes[failed] or 0)
        if stopping.is_set() and not told:
            told = True
            for worker in workers.values():
                worker.send_signal(signal.SIGTERM)
        if all(code is not None for rank, code in codes.items() if rank != TEACHER):
            if failed is not None:
                break
            if told:
                deadline = min(deadline, time.monotonic() + GRACE)
        if None not in codes.values() or time.monotonic() > deadline:
            break
        time.sleep(POLL)
    if failed is not None:
        return last_word(failed, codes[failed] or 0)
    if failure.EXIT["Terminated"] in codes.values():
        return failure.EXIT["Terminated"]
    if any(codes.values()):
        return say(
            Failure(
                "Terminated",
                None,
                failure.EXIT["Terminated"],
                "asked to stop before training began; nothing was lost",
            )
        )
    return 0


def stopped(code: int, told: bool) -> bool:
    """Whether a worker ended because all of them were to stop; before it listens for SIGTERM, that signal itself ends it."""
    return code == failure.EXIT["Terminated"] or (told and code == -signal.SIGTERM)


def last_word(rank: int, code: int) -> int:
    """The exit code that a failed worker means."""
    if code > 0:
        log.error("%s failed with exit code %d", called(rank).capitalize(), code)
        return code
    return failure.EXIT["Retriable"]


def killed(rank: int, code: int) -> int:
    """Say the words of a worker that was killed, in the place of what those say that miss it."""
    name = signal.Signals(-code).name
    words = f"{called(rank)} was killed by {name}. Most often the container ran out of memory: raise the limit in runtime.resources.train."
    return say(
        Failure("Retriable", None if rank == TEACHER else rank, failure.EXIT["Retriable"], words),
        instead=True,
    )


def called(rank: int) -> str:
    """A worker's name."""
    return "the teacher" if rank == TEACHER else f"rank {rank}"


def say(found: Failure, instead: bool = False) -> int:
    """Log a failure and leave it as the termination message, unless a worker has left one that it is not to replace; returns its code."""
    log.error("%s: %s", found.kind, found.message)
    path = failure.termination_log()
    if path:
        failure.record(found, path, instead)
    return found.exit


def die_with_launcher() -> None:
    """Have the kernel kill this process when its launcher dies: a worker that trains on alone would write over the next attempt's work."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if str(os.getppid()) != os.environ["VPMOE_LAUNCHER"]:
        raise SystemExit("The launcher is gone.")
