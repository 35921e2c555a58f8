"""The teacher in vLLM on a GPU against the same checkpoint in transformers, in float32: weights in the format
of OpenAI's releases, and not quantised.

vLLM runs in a process of its own (tests/fakes/scored_teacher.py). The sequences together are longer than a
forward, so one of them is computed in two.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, Mxfp4Config, PreTrainedModel

from tests.fakes import mxfp4_teacher, tiny_teacher
from tests.fakes.students import new_seed
from vpmoe.data.tokenizer import Ids
from vpmoe.data.vocabulary import VOCABULARY_SIZE

ROOT = Path(__file__).parents[2]
LENGTHS = (2, 3, 17, 127, 128, 129, 300, 2000, 4000, 4000, 4000, 3000)
"""Around the window of 128, and together past MOST_TOKENS, the most of a forward."""
FLOAT32 = 1e-4
"""Allowed difference of log p in nats in float32, as on the CPU (tests/fakes/reference_scores.py)."""
BF16 = 2.0
"""Allowed median error in bf16, as a multiple of the one that transformers makes in bf16: two that round
differently, but equally often. The median, as the few tokens for which rounding chooses another expert differ
by a nat."""
MATTERS = 3.0
"""A part that is left out must change log p by at least this multiple of transformers' error in bf16, or the
test would not see it. On a CPU, the factors are 4.3 and more."""


def sequences() -> list[Ids]:
    random = np.random.default_rng(new_seed())
    return [random.integers(0, VOCABULARY_SIZE, length).astype(np.int32) for length in LENGTHS]


def vllm_logp(folder: Path, given: list[Ids], scratch: Path) -> NDArray[np.float32]:
    """All log-probabilities but each sequence's first, one sequence after the other."""
    torch.cuda.empty_cache()
    np.savez(scratch / "given.npz", *given)
    subprocess.run(
        [sys.executable, "-m", "tests.fakes.scored_teacher"]
        + [str(path) for path in (folder, scratch / "given.npz", scratch / "out.npz")],
        # Triton's products of float32 are otherwise TF32's
        env=os.environ | {"TRITON_F32_DEFAULT": "ieee"},
        cwd=ROOT,
        check=True,
    )
    found = dict(np.load(scratch / "out.npz"))
    forward = int(found.pop("forward"))
    assert forward < sum(LENGTHS), "else no sequence would be computed in two forwards"
    assert all(np.isnan(logp_T[0]) for logp_T in found.values())
    return np.concatenate([logp_T[1:] for logp_T in found.values()])


@torch.no_grad()
def transformers_logp(model: PreTrainedModel, given: list[Ids]) -> NDArray[np.float64]:
    """The same by transformers, the softmax in float64."""
    found = []
    for ids_T in given:
        ids = torch.from_numpy(ids_T.astype(np.int64)).cuda()
        hidden_TH = model.model(ids[None]).last_hidden_state[0, :-1]
        for rows_tH, targets_t in zip(hidden_TH.split(512), ids[1:].split(512), strict=True):
            logp_tV = model.lm_head(rows_tH).double().log_softmax(1)
            found.append(logp_tV.gather(1, targets_t[:, None])[:, 0].cpu().numpy())
    return np.concatenate(found)


def load(folder: Path, dtype: torch.dtype, packed: bool) -> PreTrainedModel:
    """The checkpoint in transformers; MXFP4 is widened, which bf16 represents exactly."""
    quantization = {"quantization_config": Mxfp4Config(dequantize=True)} if packed else {}
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16 if packed else dtype,
        attn_implementation="eager",
        experts_implementation="eager",
        **quantization,
    )
    return model.to(dtype).cuda().eval()


def without(model: PreTrainedModel, name: str) -> Callable[[], None]:
    """Fill all parameters whose name ends with `name` with zeros. Returns what restores them."""
    chosen = {each: weights for each, weights in model.named_parameters() if each.endswith(name)}
    assert chosen
    before: dict[str, Tensor] = {each: weights.detach().clone() for each, weights in chosen.items()}
    with torch.no_grad():
        for weights in chosen.values():
            weights.zero_()

    def restore() -> None:
        with torch.no_grad():
            for each, weights in chosen.items():
                weights.copy_(before[each])

    return restore


@pytest.mark.timeout(400)
def test_the_released_format_is_scored_as_its_widened_weights(gpu: torch.device, tmp_path: Path) -> None:
    folder = mxfp4_teacher.write(tmp_path / "teacher", seed=new_seed())
    given = sequences()
    found = vllm_logp(folder, given, tmp_path)
    exact = load(folder, torch.float32, packed=True)
    expected = transformers_logp(exact, given)
    rounded = transformers_logp(load(folder, torch.bfloat16, packed=True), given)
    error, usual = (np.median(np.abs(one - expected)) for one in (found, rounded))
    print(
        f"AGREE mxfp4: {len(found)} scored, median error {error:.2e}, transformers' in bf16 {usual:.2e}, "
        f"mean {np.abs(found - expected).mean():.2e} and {np.abs(rounded - expected).mean():.2e}, "
        f"spread of log p {expected.std():.2f}"
    )
    assert error <= BF16 * usual
    changed = {}
    for part in ("sinks", "gate_up_proj", "gate_up_proj_bias", "down_proj_bias", "router.bias"):
        restore = without(exact, part)
        changed[part] = transformers_logp(exact, given)
        restore()
    rope = {**mxfp4_teacher.SMALL["rope_scaling"], "factor": 2.0}
    (folder / "config.json").write_text(json.dumps({**mxfp4_teacher.SMALL, "rope_scaling": rope}))
    changed["YaRN"] = transformers_logp(load(folder, torch.float32, packed=True), given)
    for part, logp in changed.items():
        assert np.median(np.abs(logp - expected)) > MATTERS * usual, part


@pytest.mark.timeout(400)
def test_weights_in_float32_are_scored_as_by_transformers(gpu: torch.device, tmp_path: Path) -> None:
    folder = tiny_teacher.write(tmp_path / "teacher", new_seed())
    given = sequences()
    found = vllm_logp(folder, given, tmp_path)
    error = np.abs(found - transformers_logp(load(folder, torch.float32, packed=False), given))
    print(f"AGREE float32: mean error {error.mean():.2e}, largest {error.max():.2e}")
    assert error.max() <= FLOAT32
