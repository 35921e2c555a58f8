"""Starts the operator's process in milliseconds, so that a test can kill it hundreds of times.

The program `python -m tests.fakes.chaos.warm_operator` imports the operator and then forks a process of it
for each line of its stdin (its arguments and log, as JSON). WarmOperator is its client: one replica, which is
started and killed again and again. Its wall clock can be set.
"""

import asyncio
import contextlib
import ctypes
import gc
import json
import os
import signal
import struct
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fakes import run_harness
from vpmoe.process.launcher import PR_SET_PDEATHSIG

SOURCE = Path(__file__).parent / "shifted_clock.c"


def serve() -> None:
    """Fork for each line of stdin. Reports on stdout: `started PID`, and `ended PID STATUS`."""
    from distill_operator import executor
    from distill_operator.__main__ import main

    executor.UNANSWERED_SECONDS = 3.0  # the proxy carries out no request that much later
    gc.freeze()  # less is copied
    parent = os.getpid()

    def reap(*_: object) -> None:
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                os.write(1, f"ended {found[0]} {os.waitstatus_to_exitcode(found[1])}\n".encode())

    signal.signal(signal.SIGCHLD, reap)
    for line in sys.stdin:
        wanted = json.loads(line)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)
            log = os.open(wanted["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            null = os.open(os.devnull, os.O_RDONLY)
            for descriptor, source in ((0, null), (1, log), (2, log)):
                os.dup2(source, descriptor)
            sys.argv = ["distill_operator", *wanted["arguments"]]
            os._exit(main())
        os.write(1, f"started {pid}\n".encode())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})


@dataclass
class WarmOperator:
    """One replica. `async with WarmOperator(…):` ends its processes at the end."""

    folder: Path
    identity: str
    settings: dict[str, Any]
    kubeconfig: dict[str, Any]
    namespace: str
    """Of the Lease."""
    pid: int = 0
    """0 while no process runs."""
    starts: int = 0
    exits: list[int] = field(default_factory=list)
    """Exit codes of the processes; minus the signal of those that were killed."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def __aenter__(self) -> "WarmOperator":
        for name, content in (("kubeconfig", self.kubeconfig), ("settings", self.settings)):
            (self.folder / f"{self.identity}-{name}.json").write_text(json.dumps(content))
        self.clock = self.folder / f"{self.identity}-clock"
        self.set_clock(0)
        environment = {
            **os.environ,
            "PYTHONPATH": ".:operator",
            "KUBECONFIG": str(self.folder / f"{self.identity}-kubeconfig.json"),
            "LD_PRELOAD": str(shifted_clock(self.folder)),
            "SHIFTED_CLOCK": str(self.clock),
        }
        self._server = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.fakes.chaos.warm_operator",
            cwd=run_harness.ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._reader = asyncio.create_task(self._read())
        self._started = asyncio.Event()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
        self._server.kill()
        await self._server.wait()
        await self._reader

    @property
    def log(self) -> Path:
        return self.folder / f"{self.identity}.log"

    def set_clock(self, seconds: int) -> None:
        """Shift the wall clock of its processes, those that run too, by so much from the real one."""
        with self.clock.open("r+b" if self.clock.exists() else "wb") as file:
            file.write(struct.pack("q", seconds))

    async def start(self) -> None:
        """Start a process, and wait until it exists."""
        self._started.clear()
        self.ended.clear()
        settings = str(self.folder / f"{self.identity}-settings.json")
        arguments = ["--config", settings, "--namespace", self.namespace, "--identity", self.identity]
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps({"arguments": arguments, "log": str(self.log)}).encode() + b"\n")
        await self._started.wait()
        self.starts += 1

    def kill(self) -> None:
        """SIGKILL. It has run no further instruction when this returns."""
        self._signal(signal.SIGKILL)

    def freeze(self) -> None:
        """SIGSTOP."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def _read(self) -> None:
        assert self._server.stdout is not None
        async for line in self._server.stdout:
            what, pid, *code = line.decode().split()
            if what == "started":
                self.pid = int(pid)
                self._started.set()
            elif int(pid) == self.pid:
                self.pid = 0
                self.exits.append(int(code[0]))
                self.ended.set()


def shifted_clock(folder: Path) -> Path:
    """The library of shifted_clock.c, compiled in this folder."""
    library = folder / "shifted_clock.so"
    if not library.exists():
        subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-o", library, SOURCE, "-ldl"], check=True)
    return library


if __name__ == "__main__":
    serve()
