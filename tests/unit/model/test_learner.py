"""Learner on one process: rejected steps, gradient clipping, weight decay, saved and restored state, and bf16
weights that equal their rounded fp32 main parameters."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.fakes.students import (
    COMPLETE,
    SMALL,
    copy_slices,
    join_slices,
    learner,
    new_seed,
    ragged_batches,
    read_from,
)
from vpmoe.api.memory import OPTIMIZER
from vpmoe.model import head, state
from vpmoe.model.batch import Batch
from vpmoe.model.learner import BETAS, EPSILON, Learner, NotFinite
from vpmoe.model.main_gradient import main_gradient
from vpmoe.model.objective import Objective, Weighted
from vpmoe.model.shapes import Shape
from vpmoe.model.student import Student, _config, _initialise
from vpmoe.objectives.vanilla import vanilla

EVEN = {"reasoning": 1.0, "final": 1.0}


@pytest.fixture
def batches() -> list[Batch]:
    return ragged_batches(torch.Generator().manual_seed(new_seed()), 2)


def objective_of(batches: list[Batch]) -> tuple[Objective, int]:
    counts = torch.stack([batch.counts for batch in batches]).sum(0)
    return vanilla(counts, EVEN), int(counts[0])


def bf16_learner(device: torch.device, shape: Shape) -> Learner:
    """A learner on the CPU with the precision of a GPU: bf16 weights, fp32 main parameters."""
    student = Student(shape, _config(shape, torch.device("cuda"), 1), sequence_length=64)
    _initialise(student, 1)
    return Learner(student, device, weight_decay=0.1, gradient_clip=1.0)


def after_one_step(it: Learner) -> Learner:
    """The learner after one step on random gradients. The head cannot multiply bf16 on a CPU."""
    it.ddp.zero_grad_buffer()
    for parameter in it.student.parameters():
        parameter.main_grad.normal_(generator=torch.Generator().manual_seed(3))
    it._positions = torch.tensor(1)
    it.step(1e-2)
    return it


def test_a_second_step_without_new_gradients_is_rejected(device: torch.device, batches: list[Batch]) -> None:
    it = learner(device)
    it.forward_backward(batches, *objective_of(batches))
    it.step(1e-3)
    with pytest.raises(RuntimeError, match="there was none since the last step"):
        it.step(1e-3)


def test_a_microbatch_that_is_given_twice_counts_twice(device: torch.device, batches: list[Batch]) -> None:
    """As two equal ones do, in two steps. On a GPU only the first of a step stores gradients."""
    first = batches[0]
    results = []
    for given in ([first, first], [first, replace(first)]):
        it, empty = learner(device), []
        it._empty = SimpleNamespace(fill_=empty.append)  # type: ignore[assignment]
        norms = []
        for _ in range(2):
            it.forward_backward(given, *objective_of(given))
            norms.append(it.step(1e-3))
        assert empty == [True, False] * 2
        results.append(norms)
    assert results[0] == results[1]


def test_a_wrong_number_of_positions_is_rejected(device: torch.device, batches: list[Batch]) -> None:
    objective, positions = objective_of(batches)
    with pytest.raises(
        ValueError, match=f"positions is {positions + 1}, but the global batch has {positions}"
    ):
        learner(device).forward_backward(batches, objective, positions + 1)


def test_gradients_are_clipped_and_the_returned_norm_is_unclipped(
    device: torch.device, batches: list[Batch]
) -> None:
    """Adam's first update does not depend on the gradient's norm, but its first moment does: it is a tenth of
    the clipped gradient."""
    it = learner(device)
    counts = torch.stack([batch.counts for batch in batches]).sum(0)
    positions = int(counts[0])
    it.forward_backward(batches, vanilla(counts, {"reasoning": 9.0, "final": 9.0}), positions)
    gradient = torch.cat([p.main_grad.flatten() for p in it.student.parameters()]) / positions
    norm = it.step(1e-3)
    moments = torch.cat([shard.moments["exp_avg"] for shard in state.shards(it)])
    assert norm == pytest.approx(gradient.norm().item(), rel=1e-5) and norm > 1
    assert moments.norm().item() == pytest.approx(0.1 * min(norm, 1.0), rel=1e-4)


def test_the_norm_has_the_bits_of_megatrons(device: torch.device, batches: list[Batch]) -> None:
    it = learner(device)
    it.forward_backward(batches, *objective_of(batches))
    it.ddp.finish_grad_sync()
    it.optimizer.prepare_grads()
    assert it._norm(it._update.divide(torch.tensor(1))) == it.optimizer.get_grad_norm() > 0


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_gradients_that_the_head_adds_in_the_forward_are_the_same(
    device: torch.device, batches: list[Batch], monkeypatch: pytest.MonkeyPatch, sharded: bool
) -> None:
    """As on a GPU: the output matrix's buffer gets them before the backward, and megatron's hook only learns
    of it. After a rejected step, and an evaluation, nothing of them is left."""
    wanted = learner(device)
    wanted.forward_backward(batches, *objective_of(batches))
    norm = wanted.step(1e-2)
    monkeypatch.setattr(
        head,
        "gradients_in_forward",
        lambda weight: main_gradient(weight) if torch.is_grad_enabled() else None,
    )
    it = learner(device, sharded_gradients=sharded)
    nan = Weighted(lambda batch: lambda logp_t, rows_t: logp_t * torch.nan)
    it.forward_backward(batches, nan, objective_of(batches)[1])
    assert it.student.output.grad_added_to_main_grad  # type: ignore[attr-defined]
    with pytest.raises(NotFinite):
        it.step(1e-2)
    it.evaluate(batches)
    it.ddp.zero_grad_buffer()
    assert not any(x.grad_added_to_main_grad for x in it.student.parameters())
    it.forward_backward(batches, *objective_of(batches))
    assert it.step(1e-2) == pytest.approx(norm, rel=1e-5)  # fp32 sums in another order
    torch.testing.assert_close(it.student.output, wanted.student.output, rtol=1e-4, atol=1e-6)


def test_an_update_has_the_bits_of_torchs_adamw(device: torch.device) -> None:
    """Two steps of random gradients, as they are after they were divided and clipped."""
    it = bf16_learner(device, COMPLETE)
    groups = [
        {"params": [p.detach().clone() for p in group["params"]], "weight_decay": 0.1 * group["wd_mult"]}
        for group in it.optimizer.param_groups
    ]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    wanted = [parameter for group in groups for parameter in group["params"]]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=BETAS, eps=EPSILON, fused=True)
    for _ in range(2):
        after_one_step(it)
        for parameter, gradient in zip(wanted, it._update._gradients, strict=True):
            parameter.grad = gradient.clone()
        reference.step()
    assert all(map(torch.equal, it.optimizer.get_parameters(), wanted))


def test_weight_decay_applies_to_matrices_and_not_to_norms(device: torch.device) -> None:
    """With zero gradients, decay multiplies matrices by 1 − rate · decay and leaves norms unchanged."""
    it = learner(device)
    before = {name: parameter.detach().clone() for name, parameter in it.student.named_parameters()}
    it.ddp.zero_grad_buffer()
    it._positions = torch.tensor(1)
    assert it.step(0.5) == 0
    for name, parameter in it.student.named_parameters():
        torch.testing.assert_close(parameter, before[name] * (1 if parameter.dim() == 1 else 1 - 0.5 * 0.1))


def test_evaluation_changes_no_state(device: torch.device, batches: list[Batch]) -> None:
    it, untouched = learner(device), learner(device)
    it.evaluate(batches)
    results = []
    for each in (it, untouched):
        results.append((each.forward_backward(batches, *objective_of(batches)).loss, each.step(1e-2)))
    assert results[0] == results[1] and it.evaluate([]).cross_entropy == {"reasoning": None, "final": None}


@pytest.mark.parametrize("shape", [SMALL, COMPLETE], ids=lambda shape: shape.name)
def test_bf16_weights_are_their_main_parameters_rounded(device: torch.device, shape: Shape) -> None:
    """After a step and after a restore. The next step of the restored learner has the same bits, because the
    main parameters keep what bf16 rounds off. Frequencies, offsets and λ are fp32 themselves."""
    it = after_one_step(bf16_learner(device, shape))
    tensors = join_slices([copy_slices(it)], state.sizes(it))
    parameters = sum(weight.numel() for weight in it.student.parameters())
    checkpoint = sum(tensor.nbytes for name, tensor in tensors.items() if not name.startswith("buffer/"))
    assert checkpoint == OPTIMIZER * parameters, "the plan's bytes of a checkpoint: no bf16 weights"
    restored = bf16_learner(device, shape)
    state.restore(restored, read_from(tensors), steps=1)
    for each in (it, restored):
        for name, weight in each.student.named_parameters():
            main = tensors[f"main/{name}"]
            kept = name.endswith(("log_frequency", ".offset", ".value_mix"))
            assert weight.dtype == (torch.float32 if kept else torch.bfloat16) and main.dtype == torch.float32
            assert torch.equal(weight.flatten(), main.to(weight.dtype))
    assert any(
        not torch.equal(main, main.bfloat16().float())
        for name, main in tensors.items()
        if name.startswith("main/")
    )
    next_states = [
        join_slices([copy_slices(after_one_step(each))], state.sizes(each)) for each in (it, restored)
    ]
    assert (
        all(torch.equal(tensor, next_states[1][name]) for name, tensor in next_states[0].items())
        and restored.steps == 2
    )


def test_weights_restored_without_moments_start_at_step_0(device: torch.device, batches: list[Batch]) -> None:
    it = learner(device)
    it.forward_backward(batches, *objective_of(batches))
    it.step(1e-2)
    tensors = join_slices([copy_slices(it)], state.sizes(it))
    fresh = learner(device)
    state.restore(
        fresh,
        read_from(
            {name: tensor for name, tensor in tensors.items() if name.startswith(("main/", "buffer/"))}
        ),
        1,
        moments=False,
    )
    assert fresh.steps == 0 and fresh.evaluate(batches).cross_entropy == it.evaluate(batches).cross_entropy
    assert all(shard.moments["exp_avg"].eq(0).all() for shard in state.shards(fresh))
    assert any(
        bias.ne(0).any() for name, bias in fresh.student.named_buffers() if name.endswith("expert_bias")
    )


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda read: lambda name, start, stop: read(name, start, stop - 1), id="too-short"),
        pytest.param(
            lambda read: lambda name, start, stop: read(name, start, stop).bfloat16(), id="another-type"
        ),
    ],
)
def test_a_slice_of_another_length_or_type_is_rejected(
    device: torch.device, damage: Callable[[state.ReadTensor], state.ReadTensor]
) -> None:
    it = learner(device)
    with pytest.raises(ValueError, match=r"main/.* \[0, \d+\): read torch\."):
        state.restore(it, damage(read_from(join_slices([copy_slices(it)], state.sizes(it)))), steps=0)


def test_random_state_is_restored(device: torch.device) -> None:
    kept = state.random_state()
    first = torch.rand(3)
    state.set_random_state(kept)
    assert torch.equal(torch.rand(3), first)
