"""The GPU's AdamW without a GPU: in Triton's interpreter, and what it refuses."""

import os
import subprocess
import sys

import pytest
import torch

from vpmoe.model.adamw_gpu import AdamW, Updated


def test_steps_equal_float64_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "tests.fakes.adamw_cases"]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "weight, message",
    [
        pytest.param(torch.zeros(5), "here of torch.bfloat16, not torch.float32 .5.", id="type"),
        pytest.param(torch.zeros(4, dtype=torch.bfloat16), r"\[4\] beside \[5\]", id="length"),
        pytest.param(torch.zeros(10, dtype=torch.bfloat16)[::2], "flat contiguous", id="stride"),
    ],
)
def test_refuses(weight: torch.Tensor, message: str) -> None:
    x = torch.zeros(5)
    with pytest.raises(ValueError, match=message):
        AdamW([Updated(x, x, x, x, weight, decays=True)], (0.9, 0.95), 1e-8)
