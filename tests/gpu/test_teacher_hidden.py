"""The hidden states of a TeacherForced teacher by vLLM on a GPU against the same checkpoint in transformers,
in float32: not quantised, and with experts in MXFP4.

vLLM runs in a process of its own (tests/fakes/hidden_states.py). The documents together are longer than a
forward, so one of them is computed in two.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Client
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GptOssForCausalLM, Mxfp4Config

from tests.fakes import mxfp4_teacher, tiny_teacher
from tests.fakes.students import new_seed
from tests.fakes.waiting import wait_until
from vpmoe.data.tokenizer import Ids
from vpmoe.data.vocabulary import VOCABULARY_SIZE
from vpmoe.inference.teacher_hidden import FORWARD_TOKENS

ROOT = Path(__file__).parents[2]
LENGTHS = (1, 2, 17, 127, 128, 129, 300, 2000, 4000, 4000, 4000, 3000)
LONGEST = 4000
assert sum(LENGTHS[:-1]) < FORWARD_TOKENS["cuda"] < sum(LENGTHS)
FLOAT32 = 1e-3
"""Allowed difference in float32, of numbers of magnitude 1 to 10."""
BF16 = 2.0
"""Allowed error in bf16, as a multiple of the error that transformers makes in bf16: two that round
differently, but equally often."""


def documents() -> list[Ids]:
    random = np.random.default_rng(new_seed())
    return [random.integers(0, VOCABULARY_SIZE, length).astype(np.int32) for length in LENGTHS]


@contextmanager
def engine(directory: Path, scratch: Path) -> Iterator[Callable[[Sequence[Ids]], NDArray[np.float32]]]:
    """A function that asks a process with the engine for hidden states."""
    torch.cuda.empty_cache()
    address = str(scratch / "socket")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fakes.hidden_states", address, str(directory), str(LONGEST)],
        # Triton's products of float32 are otherwise TF32's
        env=os.environ | {"TRITON_F32_DEFAULT": "ieee"},
        cwd=ROOT,
    )
    try:
        wait_until(lambda: Path(address).exists() or process.poll() is not None, "the engine", 240, every=0.2)
        with Client(address) as connection:

            def hidden_states(given: Sequence[Ids]) -> NDArray[np.float32]:
                connection.send({"documents": given})
                found: NDArray[np.float32] = connection.recv()
                return found

            yield hidden_states
    finally:
        process.kill()
        process.wait()


@torch.no_grad()
def reference(directory: Path, dtype: torch.dtype, packed: bool, given: Sequence[Ids]) -> NDArray[np.float64]:
    """The same by transformers, one document a forward; MXFP4 is widened, which bf16 represents exactly."""
    quantization = {"quantization_config": Mxfp4Config(dequantize=True)} if packed else {}
    model = GptOssForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager", **quantization
    )
    body = model.model.cuda()
    return np.concatenate(
        [
            body(torch.from_numpy(ids.astype(np.int64)).cuda()[None])
            .last_hidden_state[0]
            .double()
            .cpu()
            .numpy()
            for ids in given
        ]
    )


def test_every_position_agrees_in_float32(gpu: torch.device, tmp_path: Path) -> None:
    given = documents()
    directory = tiny_teacher.write(tmp_path / "teacher", seed=new_seed())
    with engine(directory, tmp_path) as hidden_states:
        found = hidden_states(given)
    wanted = reference(directory, torch.float32, False, given)
    difference = np.abs(found - wanted)
    print(f"float32: largest difference {difference.max():.2e} of {np.abs(wanted).max():.1f}")
    assert found.shape == wanted.shape and difference.max() <= FLOAT32


def test_experts_in_mxfp4_agree_as_well_as_bf16_can(gpu: torch.device, tmp_path: Path) -> None:
    given = documents()
    directory = mxfp4_teacher.write(tmp_path / "released", seed=new_seed())
    with engine(directory, tmp_path) as hidden_states:
        found = hidden_states(given)
    exact = reference(directory, torch.float32, True, given)
    rounded = reference(directory, torch.bfloat16, True, given)
    error, allowed = (float(np.square(one - exact).mean() ** 0.5) for one in (found, rounded))
    print(f"MXFP4: error {error:.4f}, transformers' in bf16 {allowed:.4f}, magnitude {exact.std():.2f}")
    assert error <= BF16 * allowed < 0.5 * exact.std()
