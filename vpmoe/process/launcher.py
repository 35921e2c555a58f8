"""Launches the processes of a training stage in this pod: starts them, forwards SIGTERM, exits with the code
of the first failure.

We do not use torchrun, for three reasons. It exits with 1 whatever the worker's exit code was. It has a
single timeout for workers that save a checkpoint after SIGTERM (minutes) and workers that hang in a
collective because another one failed (seconds). It imports torch (300 MB, some seconds) only to start
processes. Workers are not restarted here; the operator retries the step.

A TeacherForced stage has further processes, its teachers. The first pod's launcher starts them, on the GPUs
after those of its ranks.

In a pod of a PyTorchJob, PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT identify the pod.
(RANK and WORLD_SIZE are set too, but count pods; they are ignored.) Without these variables all ranks are
started on this machine.
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
from vpmoe.api.termination import EXIT_CODES, TerminationRecord
from vpmoe.failure import Permanent, failure_record
from vpmoe.process.environment import MOST_PODS, TEACHER_PORTS, read_number, read_text

log = logging.getLogger(__name__)

GRACE_SECONDS = 30.0
"""Time that the other processes have to exit after the first failure: to report their own error or finish an
upload."""
POLL_SECONDS = 0.1
TEACHER = -1
"""The first teacher in mappings by rank; the others are −2, −3 and so on."""
TEACHER_PORT_OFFSET = 1
"""In pods the first teacher listens on PET_MASTER_PORT (always 23456) plus this offset, at the first pod's
address; the others on the ports after it."""
NO_GPU = "-1"
"""Value of CUDA_VISIBLE_DEVICES with which a process sees no GPU, and is not told to use the CPU."""
RENDEZVOUS_PORTS = range(20_000, 30_000)
"""Rendezvous ports on one machine, below Linux' ephemeral range, which starts at 32768."""
PR_SET_PDEATHSIG = 1
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""torch's variables of the GPU allocator. If none is set, ranks have segments that grow: microbatches of
different lengths otherwise leave gaps of gibibytes that no tensor fits into."""


@dataclass(frozen=True)
class Placement:
    """Which ranks this launcher starts, and the rendezvous address."""

    ranks: int
    """Ranks of the whole job."""
    first: int
    """The first rank of this pod."""
    here: int
    """Ranks of this pod."""
    address: str
    port: int
    teacher_ports: tuple[int, ...] = ()
    """Port of each teacher, at the same address."""

    @property
    def teachers_here(self) -> int:
        """Teachers that this launcher starts."""
        return len(self.teacher_ports) if self.first == 0 else 0


def place_ranks(layout: Layout, environment: Mapping[str, str], teachers: int = 0) -> Placement:
    """The ranks of this pod, and the ports of `teachers`.

    Raises Permanent if the number of pods is not that of the layout, or a variable is not set or malformed.
    """
    if "PET_NNODES" not in environment:
        port, *teacher_ports = free_ports(1 + teachers)
        return Placement(layout.ranks, 0, layout.ranks, "127.0.0.1", port, tuple(teacher_ports))
    remedy = "The training operator sets PET_* in the pods of a PyTorchJob; unset PET_NNODES elsewhere."
    pods = read_number("PET_NNODES", 1, MOST_PODS, remedy, environment)
    if pods != layout.pods:
        raise Permanent(
            f"PET_NNODES: this job has {pods} pods, but {layout.ranks} ranks with {layout.processes_per_pod} "
            f"per pod need {layout.pods}. The job was created for another configuration; delete it."
        )
    node = read_number("PET_NODE_RANK", 0, pods - 1, remedy, environment)
    each = layout.processes_per_pod
    address = read_text("PET_MASTER_ADDR", remedy, environment)
    port = read_number("PET_MASTER_PORT", 1, 65_535 - max(1, teachers), remedy, environment)
    first = port + TEACHER_PORT_OFFSET
    return Placement(layout.ranks, node * each, each, address, port, tuple(range(first, first + teachers)))


def free_port() -> int:
    """A free loopback port, as free_ports finds it."""
    return free_ports(1)[0]


def free_ports(number: int) -> list[int]:
    """Different free loopback ports below the ephemeral range. Raises Permanent if there are not as many.

    Rank 0 binds its port only after its imports. Until then an outgoing connection could be assigned an
    ephemeral port.
    """
    found: list[int] = []
    for port in random.sample(RENDEZVOUS_PORTS, len(RENDEZVOUS_PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == number:
            return found
    raise Permanent(
        f"of the ports from {RENDEZVOUS_PORTS.start} to {RENDEZVOUS_PORTS.stop - 1}, {len(found)} are free, "
        f"and the rendezvous needs {number}. Stop some of the processes that listen there."
    )


def launch_workers(
    placement: Placement, command: Sequence[str], teacher_command: Sequence[str], stopping: threading.Event
) -> int:
    """Run `command` for each rank of this pod, and `teacher_command` for each of its teachers, until all have
    exited; return the launcher's exit code.

    The code is 0 if all succeeded, else that of the process that failed first. That process writes the
    termination message (vpmoe.failure). If it was killed by a signal, the launcher writes the message and
    overwrites those of processes that failed later.
    """
    with tempfile.TemporaryDirectory(prefix="vpmoe-train-") as scratch:
        workers = {}
        for local in range(placement.here + placement.teachers_here):
            environment = {
                **os.environ,
                **worker_environment(placement, local, os.environ),
                "VPMOE_SCRATCH": scratch,
            }
            teacher = local - placement.here
            rank = placement.first + local if teacher < 0 else TEACHER - teacher
            workers[rank] = subprocess.Popen(command if teacher < 0 else teacher_command, env=environment)
        try:
            return supervise(workers, stopping)
        finally:
            for worker in workers.values():
                worker.kill()
                worker.wait()


def worker_environment(placement: Placement, local: int, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment variables of the `local`-th process of this pod. Teachers come after the ranks."""
    variables = {
        "RANK": str(placement.first + local),
        "LOCAL_RANK": str(local),
        "WORLD_SIZE": str(placement.ranks),
        "LOCAL_WORLD_SIZE": str(placement.here),
        "MASTER_ADDR": placement.address,
        "MASTER_PORT": str(placement.port),
        # One thread by default: sums depend on the number of threads, and results must not depend on the
        # machine.
        "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", "1"),
        "VPMOE_LAUNCHER": str(os.getpid()),
    }
    if local < placement.here:
        # Otherwise NCCL registers the memory of a CUDA graph's collectives, and fails in segments that grow.
        variables["NCCL_GRAPH_REGISTER"] = environment.get("NCCL_GRAPH_REGISTER", "0")
    if local < placement.here and not {*ALLOCATOR} & {*environment}:
        variables[ALLOCATOR[0]] = "expandable_segments:True"
    if placement.teacher_ports:
        variables[TEACHER_PORTS] = ",".join(map(str, placement.teacher_ports))
    if local >= placement.here:
        variables |= {
            "VPMOE_PART": "teacher",
            "VPMOE_TEACHER": str(local - placement.here),
            "RANK": "",  # a teacher has none
            "LOCAL_RANK": "0",
            "CUDA_VISIBLE_DEVICES": own_device(local, environment.get("CUDA_VISIBLE_DEVICES")),
        }
    return variables


def own_device(local: int, visible: str | None) -> str:
    """CUDA_VISIBLE_DEVICES of a process that is to see the `local`-th GPU alone: vLLM has no other way to
    choose one. `visible`: the variable of this pod."""
    if visible is None:
        return str(local)
    return visible and (visible.split(",")[local:] or [NO_GPU])[0]


def supervise(workers: Mapping[int, "subprocess.Popen[bytes]"], stopping: threading.Event) -> int:
    """Wait for all workers and return the exit code. The caller kills workers still alive GRACE_SECONDS after
    the first failure.

    Stopping is not a failure: after SIGTERM the ranks have as much time as their checkpoint takes. The
    launcher does not wait for teachers: once all ranks have exited and one failed, it returns; after SIGTERM
    teachers have at most GRACE_SECONDS.
    """
    signalled, failed, deadline = False, None, math.inf
    while True:
        codes = {rank: worker.poll() for rank, worker in workers.items()}
        if failed is None and (
            ended := [rank for rank, code in codes.items() if code and not was_stopped(code, signalled)]
        ):
            failed, deadline = (
                min(ended, key=lambda rank: (codes[rank] or 0) > 0),
                time.monotonic() + GRACE_SECONDS,
            )
            if (codes[failed] or 0) < 0:
                record_killed(failed, codes[failed] or 0)
        if stopping.is_set() and not signalled:
            signalled = True
            for worker in workers.values():
                worker.send_signal(signal.SIGTERM)
        if all(code is not None for rank, code in codes.items() if rank > TEACHER):
            if failed is not None:
                break
            if signalled:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if None not in codes.values() or time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)
    if failed is not None:
        return exit_code_of(failed, codes[failed] or 0)
    if EXIT_CODES["Terminated"] in codes.values():
        return EXIT_CODES["Terminated"]
    if any(codes.values()):
        message = "The stage was asked to stop before training began; no progress was lost."
        return record_failure(failure_record("Terminated", message))
    return 0


def was_stopped(code: int, signalled: bool) -> bool:
    """Whether a worker exited because of SIGTERM to all workers. Before it installs its handler, the signal
    itself ends it."""
    return code == EXIT_CODES["Terminated"] or (signalled and code == -signal.SIGTERM)


def exit_code_of(rank: int, code: int) -> int:
    """The launcher's exit code for a failed worker; a worker that was killed is Retriable."""
    if code > 0:
        log.error("%s failed with exit code %d", worker_name(rank).capitalize(), code)
        return code
    return EXIT_CODES["Retriable"]


def record_killed(rank: int, code: int) -> int:
    """Report a worker that was killed by a signal. Overwrites the messages of workers that failed because of
    it."""
    name = signal.Signals(-code).name
    message = (
        f"{worker_name(rank)} was killed by {name}. The usual cause is that the container ran out of memory: "
        "raise the limit in runtime.resources.train."
    )
    of_rank = None if rank <= TEACHER else rank
    return record_failure(failure_record("Retriable", message, of_rank), overwrite=True)


def worker_name(rank: int) -> str:
    """A worker's name in messages."""
    return f"rank {rank}" if rank > TEACHER else f"teacher {TEACHER - rank}"


def record_failure(found: TerminationRecord, overwrite: bool = False) -> int:
    """Log a failure, write it as the termination record (see write_record) and return its exit code."""
    log.error("%s: %s", found.kind, found.message)
    failure.write_record(found, overwrite)
    return EXIT_CODES[found.kind]


def set_parent_death_signal() -> None:
    """Have the kernel kill this process when its launcher dies. An orphaned worker would overwrite the next
    attempt's objects."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    launcher = os.environ.get("VPMOE_LAUNCHER")
    if launcher is not None and str(os.getppid()) != launcher:
        raise SystemExit("The launcher has exited.")
