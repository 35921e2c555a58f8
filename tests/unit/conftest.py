"""What the unit tests of the student share: the CPU as device and a world of one rank, started once a session."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch


@pytest.fixture(scope="session")
def device() -> "Iterator[torch.device]":
    """The CPU, with megatron-core's process groups for one rank."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from vpmoe.model import distributed
    from vpmoe.model.device import choose

    chosen = choose()
    distributed.start(chosen)
    yield chosen
    distributed.stop()
    del os.environ["CUDA_VISIBLE_DEVICES"]
    if before is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = before
