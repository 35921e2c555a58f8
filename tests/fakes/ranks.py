"""Starts ranks by forking a process that has imported torch and megatron-core: the import takes six seconds.

In all other respects they are independent processes: environment, signals, exit code.
"""

import multiprocessing
import os
from collections.abc import Callable, Mapping
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

from vpmoe.process.launcher import free_port

RANKS = ("tests.fakes.model_ranks", "tests.fakes.onpolicy_ranks", "tests.fakes.checkpoint_ranks")


def run_ranks(
    main: Callable[[Path], None], folder: Path, ranks: int = 2, timeout: float = 240, **variables: str
) -> list[int]:
    """Call `main(folder)` in `ranks` processes on the CPU; returns their exit codes, −n for signal n.

    `variables` are environment variables. Raises AssertionError if a process has not ended after `timeout`
    seconds.
    """
    context = _context()
    environment = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **variables}
    processes = [
        context.Process(target=_run, args=(main, folder, {**os.environ, **environment, "RANK": str(rank)}))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(timeout)
        codes = [process.exitcode for process in processes]
        assert None not in codes, f"after {timeout} s: {codes}"
        return [code for code in codes if code is not None]
    finally:
        for process in processes:
            process.kill()


@cache
def _context() -> ForkServerContext:
    """All contexts share one server. One that other code started has not imported the ranks: end it, once."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(RANKS))
    forkserver.ensure_running()
    return context


def _run(main: Callable[[Path], None], folder: Path, environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    main(folder)
