"""The GPU's attention kernels without a GPU: in Triton's interpreter, compiled for Hopper, refusals."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vpmoe.model import attention_gpu
from vpmoe.model.attention_gpu import TILES, packed_attention


def test_kernels_equal_float64_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "tests.fakes.attention_cases"]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["tiny-local", "tiny-global"]


@pytest.mark.parametrize("kernel", ["forward", "queries", "keys"])
@pytest.mark.parametrize("window", [128, 0], ids=["local", "global"])
def test_hopper_multiplies_while_it_computes(kernel: str, window: int, tmp_path: Path) -> None:
    """ptxas makes each product wait for the one before where it cannot follow their registers, with a warning
    as the only sign; small changes of a loop do it. And two programs share a multiprocessor, but for the
    largest tiles. vpmoe-6b's shapes."""
    global_layer = window == 0
    rows, keys, warps, stages, registers = TILES[kernel][global_layer]
    block = TILES["keys"][global_layer][0]
    tiled = {
        "forward": {"key": keys, "value": keys},
        "queries": {"key": keys, "value": keys},
        "keys": {"query": block, "grad_out": block},
    }[kernel]
    numbers = {"log2_sum", "product"} if kernel == "keys" else set()
    constants = {"H": 8, "G": 2, "D": 128, "SCALE": 128**-0.5, "WINDOW": window, "ALIBI": global_layer}
    constants |= {"OFFSET": True, "M": rows, "N": keys, "P": rows, "BLOCK": block}
    if not global_layer:
        constants |= {"slopes": None, "order": None}
    name = {"forward": "_forward", "queries": "_gradient_of_queries", "keys": "_gradient_of_keys"}[kernel]
    function = getattr(attention_gpu, name)
    signature = {}
    for argument in function.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in tiled:
            signature[argument] = f"tensordesc<bf16[{tiled[argument]}, 128]>"
        elif argument in numbers:
            signature[argument] = f"tensordesc<fp32[{block}]>"
        else:
            fp32 = {"slopes", "offset", "log2_sum", "product", "grad_offset"}
            integers = {"runs": "*i32", "order": "*i32", "n": "i32"}
            signature[argument] = integers.get(argument, "*fp32" if argument in fp32 else "*bf16")
    used = {key: value for key, value in constants.items() if key in function.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, argument in enumerate(function.arg_names)
        if signature[argument].startswith("*")
    }
    compiled = triton.compile(
        ASTSource(function, signature, used, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps, "num_stages": stages, "maxnreg": registers},
    )
    ptx = tmp_path / "kernel.ptx"
    ptx.write_text(compiled.asm["ptx"])
    command = [
        triton.knobs.nvidia.ptxas.path,
        "-v",
        "--gpu-name=sm_90a",
        ptx,
        "-o",
        tmp_path / "kernel.cubin",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "wgmma" in compiled.asm["ptx"]
    assert "registers" in done.stderr
    assert "serialized" not in done.stderr
    # another program computes while one waits; of 227 KiB each takes 1 KiB for the system
    programs = 1 if (kernel, global_layer) == ("queries", True) else 2
    assert programs * (compiled.metadata.shared + 1024) <= 227 * 1024


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
    runs = torch.tensor([[0] * 5, [5] * 5], dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        packed_attention(query, key, key, runs, window=None, slopes_h=None, offset_h=None)
