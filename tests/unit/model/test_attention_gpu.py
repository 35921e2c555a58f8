"""The GPU's attention kernels without a GPU: in Triton's interpreter, and what they refuse."""

import os
import subprocess
import sys

import pytest
import torch

from vpmoe.model.attention_gpu import packed_attention


def test_kernels_equal_float64_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "tests.fakes.attention_cases"]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["tiny-local", "tiny-global"]


@pytest.mark.parametrize(
    "heads, width, dtype, message",
    [
        pytest.param(4, 16, torch.float32, "queries are torch.float32; .* Cast them", id="fp32"),
        pytest.param(4, 24, torch.bfloat16, "head width is 24; .* one of .16, 32, 64, 128", id="width"),
        pytest.param(6, 16, torch.bfloat16, "query heads a key-value head is 3; .*1, 2, 4", id="heads"),
    ],
)
def test_refuses(heads: int, width: int, dtype: torch.dtype, message: str) -> None:
    query, key = (torch.zeros(5, count, width, dtype=dtype) for count in (heads, 2))
    boundaries = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        packed_attention(query, key, key, boundaries, window=None, slopes_h=None, offset_h=None)
