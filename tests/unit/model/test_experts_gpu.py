"""The GPU's kernels of the experts without a GPU: in Triton's interpreter, and what they refuse."""

import os
import subprocess
import sys

import pytest
import torch

from vpmoe.model.experts_gpu import mixture


def test_kernels_equal_float64_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "tests.fakes.expert_cases"]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "hidden, width, message",
    [
        pytest.param(64, 24, "experts' width is 24; .* take 16, 32, 64 or 128", id="width"),
        pytest.param(96, 16, "hidden width is 96; .* take multiples of 64", id="hidden"),
    ],
)
def test_refuses(hidden: int, width: int, message: str) -> None:
    up, down = torch.zeros(2, width, hidden), torch.zeros(2, hidden, width)
    x, share, order, tokens = torch.zeros(3, hidden), torch.zeros(3), torch.arange(3), torch.tensor([1, 2])
    with pytest.raises(ValueError, match=message):
        mixture(x, share, up, down, None, None, order, order, tokens, 1)
