"""The student with every part of the architecture is the same in the trainer, in transformers and in vLLM."""

import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.fakes import policy_versions
from tests.fakes.complete_engine import COMPLETION
from tests.fakes.policy_versions import COMPLETE_TINY, TINY, trainer_logp
from tests.fakes.students import COMPLETE, WITHOUT, documents, learner, new_seed
from vpmoe.failure import Permanent
from vpmoe.inference import hf_model
from vpmoe.model import hf_export, state
from vpmoe.model.batch import Batch
from vpmoe.model.learner import Learner
from vpmoe.model.shapes import PARTS
from vpmoe.objectives.vanilla import vanilla

ROOT = Path(__file__).parents[3]
TOLERANCE = 1e-4
"""Nats, as in test_student.py."""
LENGTHS = (3, 127, 128, 129, 300, 600)
"""Of documents around the window of 128 and past vLLM's batch of 512 tokens."""


def sequences(seed: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, TINY.vocabulary, length).astype(np.int32) for length in LENGTHS]


@pytest.fixture(scope="module")
def complete(device: torch.device) -> Learner:
    return policy_versions.learner(device, new_seed(), COMPLETE_TINY)


@pytest.fixture(scope="module")
def exported(complete: Learner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return policy_versions.export(tmp_path_factory.mktemp("complete"), complete)


def test_transformers_agrees_at_every_position(complete: Learner, exported: Path) -> None:
    given = sequences(new_seed())
    model = hf_model.load_student(exported, COMPLETE_TINY)
    for ids_T, expected in zip(given, trainer_logp(complete, given), strict=True):
        ids = torch.from_numpy(ids_T.astype(np.int64))
        with torch.no_grad():
            logits_TV = model(ids[None]).logits[0]
        got = logits_TV[:-1].double().log_softmax(1).gather(1, ids[1:, None])[:, 0].numpy()
        assert np.abs(got - expected).max() <= TOLERANCE
    assert expected.std() > 0.5, "log-probabilities differ between tokens"


def test_a_cache_and_padding_change_nothing_past_the_window(exported: Path) -> None:
    """Two sequences, the shorter padded on the left: a prompt of 140, then three tokens one by one."""
    model = hf_model.load_student(exported, COMPLETE_TINY)
    ids = torch.from_numpy(sequences(new_seed())[4].astype(np.int64))[:143][None]
    padded = torch.cat([ids, torch.nn.functional.pad(ids[:, :130], (13, 0))])
    seen = torch.ones_like(padded)
    seen[1, :13] = 0
    positions = (seen.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        whole, short = model(ids).logits[0], model(ids[:, :130]).logits[0]
        step = model(
            padded[:, :140], attention_mask=seen[:, :140], position_ids=positions[:, :140], use_cache=True
        )
        found = [step.logits]
        for at in range(140, 143):
            step = model(
                padded[:, at : at + 1],
                attention_mask=seen[:, : at + 1],
                position_ids=positions[:, at : at + 1],
                past_key_values=step.past_key_values,
                use_cache=True,
            )
            found.append(step.logits)
    both = torch.cat(found, 1)
    torch.testing.assert_close(both[0], whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both[1, 13:], short, rtol=1e-4, atol=1e-4)


@pytest.mark.engine
def test_vllm_agrees_before_and_past_the_window(complete: Learner, exported: Path, tmp_path: Path) -> None:
    """Scored prompts, and completions that decoding made one token at a time. Local layers cache the keys and
    values of a window, the global one all of them."""
    given = sequences(new_seed())
    prompts = [given[0], given[1], given[4]]
    np.savez(
        tmp_path / "given.npz",
        **{f"sequence{n}": ids_T for n, ids_T in enumerate(given)},
        **{f"prompt{n}": ids_P for n, ids_P in enumerate(prompts)},
    )
    subprocess.run(
        [
            *(sys.executable, "-m", "tests.fakes.complete_engine"),
            *(exported, tmp_path / "given.npz", tmp_path / "out.pickle"),
        ],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        check=True,
    )
    scored, sampled, cached, layers = pickle.loads((tmp_path / "out.pickle").read_bytes())
    for got, expected in zip(scored, trainer_logp(complete, given), strict=True):
        assert np.abs(got - expected).max() <= TOLERANCE
    whole = [np.concatenate([ids_P, one.ids_C]) for ids_P, one in zip(prompts, sampled, strict=True)]
    for one, expected in zip(sampled, trainer_logp(complete, whole), strict=True):
        assert len(one.ids_C) == COMPLETION
        assert np.abs(one.logp_C - expected[-COMPLETION:]).max() <= TOLERANCE
    windows = [128, 128, 128, None, 128]
    assert cached == {f"model.layers.{n}.self_attn.attn": window for n, window in enumerate(windows)}
    assert layers == [("CPU_ATTN", window) for window in windows]


@pytest.mark.parametrize(
    "change", [{}, {"alibi": False}, {"tensor_product_ranks": None}, {"global_every": None}]
)
def test_the_trainers_gradients_are_those_of_transformers(
    device: torch.device, tmp_path: Path, change: dict[str, None]
) -> None:
    """Of every parameter, for three packed documents, with recomputation. Both compute in float32, in other
    orders: 1e-3 of a tensor's largest."""
    shape = replace(COMPLETE, aux_coefficient=0.0, **change)
    it = learner(device, shape)
    torch.manual_seed(new_seed())
    with torch.no_grad():
        for name, parameter in it.student.named_parameters():
            moved = 0.3 if parameter.dim() == 1 else 0.15
            parameter.add_(torch.randn_like(parameter), alpha=moved if name != "log_frequency" else 1)
    lengths = [30, 9, 20]
    batch = Batch.from_rows(*documents(torch.Generator().manual_seed(new_seed()), lengths, 64))
    it.forward_backward(
        [batch], vanilla(batch.counts, {"reasoning": 1.0, "final": 1.0}), positions := int(batch.counts[0])
    )
    sizes = state.sizes(it)
    hf_export.export_student(tmp_path, shape, 64, sizes, state.copy_weights(it), torch.float32)
    model = hf_model.load_student(tmp_path, shape)
    loss = torch.zeros((), dtype=torch.float64)
    start = 0
    counts = batch.counts[1:].tolist()
    for length in lengths:
        ids, spans = batch.tokens[0, start : start + length], batch.span[start : start + length]
        logp = model(ids[None]).logits[0].log_softmax(1)
        for span, count in enumerate(counts, 1):
            at = (spans == span).nonzero()[:, 0]
            loss = loss - logp[at, batch.target[start + at]].sum() / count
        start += length
    loss.backward()
    gradient_of = {name: parameter.grad for name, parameter in model.named_parameters()}
    flat = {
        f"main/{name}": parameter.main_grad.flatten() / positions
        for name, parameter in it.student.named_parameters()
    }
    for name, part in hf_export.exported_tensors(shape).items():
        if not part.source.startswith("main/"):
            continue
        got, want = part.cut_from(flat[part.source]).double(), gradient_of[name]
        assert want.abs().max() > 0, name
        assert (got - want).abs().max() <= 1e-3 * want.abs().max(), name


@pytest.mark.parametrize("name", PARTS)
def test_a_folder_of_other_parts_is_rejected_with_their_names(
    device: torch.device, tmp_path: Path, name: str
) -> None:
    """Also if no tensor tells the two students apart."""
    it = learner(device, COMPLETE)
    hf_export.export_student(tmp_path, COMPLETE, 64, state.sizes(it), state.copy_weights(it), torch.float32)
    with pytest.raises(
        Permanent, match=rf"its student has other parts than complete: {name} \(.*, here off\)\. "
    ):
        hf_model.load_student(tmp_path, replace(COMPLETE, **{name: WITHOUT[name]}))


def test_a_bf16_export_keeps_offsets_frequencies_and_mixes_in_float32(
    device: torch.device, tmp_path: Path
) -> None:
    it = learner(device, COMPLETE)
    hf_export.export_student(tmp_path, COMPLETE, 64, state.sizes(it), state.copy_weights(it), torch.bfloat16)
    model = hf_model.load_student(tmp_path, COMPLETE)
    kept = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {"softmax_offset", "value_mix", "log_frequency", "e_score_correction_bias"}
    assert torch.equal(model.model.log_frequency, it.student.log_frequency)
