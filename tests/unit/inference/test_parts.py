"""The parts of the architecture in transformers: gradients, and folders of students that have other parts."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.fakes.students import COMPLETE, WITHOUT, documents, learner, new_seed
from vpmoe.failure import Permanent
from vpmoe.inference import hf_model
from vpmoe.model import hf_export, state
from vpmoe.model.batch import Batch
from vpmoe.model.shapes import PARTS
from vpmoe.objectives.vanilla import vanilla


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
