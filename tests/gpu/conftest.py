"""What tests of a whole student on a GPU share."""

from collections.abc import Iterator

import pytest
import torch

from vpmoe.model import device as devices
from vpmoe.model import distributed


@pytest.fixture(scope="module")
def device(gpu: torch.device) -> Iterator[torch.device]:
    """The first GPU, with the process group that a student needs."""
    chosen = devices.choose()
    distributed.start(chosen)
    yield chosen
    distributed.stop()
