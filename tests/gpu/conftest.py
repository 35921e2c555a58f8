"""What tests of a whole student on a GPU share."""

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from vpmoe.model import device as devices
from vpmoe.model import distributed
from vpmoe.process.launcher import Placement, free_port, launch_workers


@pytest.fixture(scope="module")
def device(gpu: torch.device) -> Iterator[torch.device]:
    """The first GPU, with the process group that a student needs."""
    chosen = devices.choose()
    distributed.start(chosen)
    yield chosen
    distributed.stop()


@pytest.fixture(scope="module")
def on_two_gpus(
    gpu: torch.device, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], list[dict[Any, Any]]]:
    """Runs a module as two ranks, each with a GPU, and returns what each saved as FOLDER/rank-<r>.pt."""

    def run(module: str) -> list[dict[Any, Any]]:
        if torch.cuda.device_count() < 2:
            pytest.fail(f"needs two GPUs; torch finds {torch.cuda.device_count()}")
        folder = tmp_path_factory.mktemp("ranks")
        placement = Placement(2, 0, 2, "127.0.0.1", free_port())
        command = [sys.executable, "-m", module, str(folder)]
        assert launch_workers(placement, command, [], threading.Event()) == 0
        return [torch.load(folder / f"rank-{rank}.pt") for rank in range(2)]

    return run
