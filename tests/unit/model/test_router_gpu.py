"""The GPU's kernels of router and dispatch without a GPU: in Triton's interpreter, and what they refuse."""

import os
import subprocess
import sys

import pytest
import torch

from vpmoe.model.router_gpu import Rule, route


def test_kernels_equal_float64_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "tests.fakes.router_cases"]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "dtype, choices, message",
    [
        pytest.param(
            torch.float32, 2, "hidden states are torch.float32.* have to be bf16. Cast them", id="fp32"
        ),
        pytest.param(torch.bfloat16, 3, "choices of the router is 3; .* power of 2", id="choices"),
    ],
)
def test_refuses(dtype: torch.dtype, choices: int, message: str) -> None:
    hidden, weight = torch.zeros(5, 16, dtype=dtype), torch.zeros(8, 16, dtype=dtype)
    padding = torch.zeros(5, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        route(
            hidden, weight, None, torch.zeros(8), padding, Rule(8, choices, 4, 1, 1.0), None, coefficient=None
        )
