"""The parts of the architecture: each equals a float64 reference, with its gradients, and is counted."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.fakes.students import (
    COMPLETE,
    SMALL,
    WITHOUT,
    check_isolation,
    documents,
    hidden_and_embeddings,
    learner,
    new_seed,
    perturbed,
    ragged_batches,
)
from vpmoe.model.attention import QUERIES, packed_attention
from vpmoe.model.batch import Batch
from vpmoe.model.dispatch import Sorting
from vpmoe.model.experts import StackedExperts
from vpmoe.model.self_attention import TensorProduct, mix_values, rotate
from vpmoe.model.shapes import LOCKED_PARTS, PARTS, SHAPES
from vpmoe.model.student import _config, build
from vpmoe.model.tensor_product import tensor_product
from vpmoe.objectives.vanilla import vanilla

EVEN = {"reasoning": 1.0, "final": 1.0}


def assert_gradients(got: Tensor, want: Tensor, pairs: list[tuple[Tensor, Tensor]], tolerance: float) -> None:
    """The gradients of got and want in one random direction agree, relative to the largest."""
    direction = torch.randn_like(got)
    got.backward(direction)
    want.backward(direction.to(want.dtype))
    for actual, wanted in pairs:
        assert actual.grad is not None and wanted.grad is not None
        scale = wanted.grad.abs().max()
        assert scale > 0
        assert (actual.grad.double() - wanted.grad.double()).abs().max() <= tolerance * scale


def dense_attention(
    q_nhD: Tensor,
    k_ngD: Tensor,
    v_ngD: Tensor,
    boundaries: Tensor,
    window: int | None,
    slopes_h: Tensor | None,
    offset_h: Tensor | None,
) -> Tensor:
    """The definition over all pairs of positions: exponentials, their sums, no block and no softmax."""
    n, heads, width = q_nhD.shape
    position = torch.arange(n)
    run = torch.bucketize(position, boundaries[1:], right=True)
    distance = position[:, None] - position[None, :]
    allowed = (run[:, None] == run[None, :]) & (distance >= 0)
    if window is not None:
        allowed &= distance < window
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k_ngD, v_ngD))
    logits = torch.einsum("qhd,khd->hqk", q_nhD, k) / width**0.5
    if slopes_h is not None:
        logits = logits - slopes_h[:, None, None] * distance
    weights = torch.where(allowed, logits, -torch.inf).exp()
    total = weights.sum(2, keepdim=True)
    if offset_h is not None:
        total = total + offset_h.exp()[:, None, None]
    return torch.einsum("hqk,khd->qhd", weights / total, v)


@pytest.mark.parametrize("offset", [False, True], ids=["", "offset"])
@pytest.mark.parametrize("alibi", [False, True], ids=["", "alibi"])
@pytest.mark.parametrize("window", [None, 1, 8, 1000])
def test_attention_equals_its_definition_in_float64(window: int | None, alibi: bool, offset: bool) -> None:
    """Output and gradients, for documents shorter and longer than the window and than a block of queries.
    float32 sums over up to 270 keys: 1e-5 of the largest value."""
    torch.manual_seed(new_seed())
    boundaries = torch.tensor([0, 1, 6, 14, QUERIES + 28], dtype=torch.int32)
    n = int(boundaries[-1])
    inputs = [torch.randn(n, 4, 16), torch.randn(n, 2, 16), torch.randn(n, 2, 16)]
    parts = [torch.tensor([0.25, 0.0625, 0.015625, 0.00390625]) if alibi else None]
    parts += [torch.randn(4) if offset else None]
    leaves = [x.requires_grad_() for x in inputs] + (
        [parts[1].requires_grad_()] if parts[1] is not None else []
    )
    exact = [x.detach().double().requires_grad_() for x in leaves]
    got = packed_attention(
        *inputs, boundaries, int(boundaries.diff().max()), window=window, slopes_h=parts[0], offset_h=parts[1]
    )
    want = dense_attention(
        exact[0],
        exact[1],
        exact[2],
        boundaries,
        window,
        None if parts[0] is None else parts[0].double(),
        exact[3] if offset else None,
    )
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    moved = list(zip(leaves, exact, strict=True))
    if window == 1 and not offset:  # a position that sees itself alone has weight 1, whatever its logit is
        moved = moved[2:]
    assert_gradients(got, want, moved, 1e-5)


def test_a_very_negative_offset_changes_nothing_and_a_very_large_one_leaves_nothing() -> None:
    torch.manual_seed(new_seed())
    query, key, value = torch.randn(20, 4, 16), torch.randn(20, 2, 16), torch.randn(20, 2, 16)
    boundaries = torch.tensor([0, 20], dtype=torch.int32)
    plain, closed, none = (
        packed_attention(query, key, value, boundaries, 20, offset_h=offset)
        for offset in (None, torch.full((4,), -1e4), torch.full((4,), 1e4))
    )
    torch.testing.assert_close(closed, plain)
    assert (none == 0).all()


def test_tensor_products_equal_sums_over_ranks_in_float64(device: torch.device) -> None:
    """Outputs, the bias over all three, and gradients, in fp32: 1e-5 of the largest value."""
    torch.manual_seed(new_seed())
    module = TensorProduct(_config(COMPLETE, device, 1), COMPLETE)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    hidden = torch.randn(7, 2, COMPLETE.hidden, requires_grad=True)
    exact = [x.detach().double().requires_grad_() for x in (hidden, module.weight, module.bias)]
    x, weight, bias = exact
    rows = iter((x @ weight.T).split([4 * 4, 4 * 16, 2 * 2, 2 * 16, 2 * 2, 2 * 16], -1))
    want = []
    for heads, rank in ((4, 4), (2, 2), (2, 2)):
        a, b = next(rows).reshape(7, 2, heads, rank), next(rows).reshape(7, 2, rank, 16)
        want.append(sum(a[..., r, None] * b[..., r, None, :] for r in range(rank)) / rank)
    wanted = torch.cat(want, 2).flatten(2) + bias
    got = torch.cat(module(hidden), 2).flatten(2)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-4)
    assert_gradients(got, wanted, list(zip((hidden, *module.parameters()), exact, strict=True)), 1e-5)


def test_tensor_products_have_the_gradients_of_finite_differences() -> None:
    torch.manual_seed(new_seed())
    factors = torch.randn(2, 3 * (2 + 4) + 2 * 2 * (1 + 4), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: tensor_product(x, 2, 1, 4, (3, 2)), factors)


def test_learned_rotation_equals_complex_products_in_float64(device: torch.device) -> None:
    """Angles of learned frequencies, rotated vectors, and the gradients of both."""
    built = perturbed(COMPLETE, device)
    position = torch.randint(0, 50, (9, 2))
    x = torch.randn(9, 2, 3, 16, requires_grad=True)
    exact = [part.detach().double().requires_grad_() for part in (x, built.log_frequency)]
    angle = built._angles(position)
    got = rotate(x, angle.cos(), angle.sin())
    turn = torch.exp(1j * position[:, :, None, None] * (exact[1] / 16).exp())
    turned = torch.complex(exact[0][..., :8], exact[0][..., 8:]) * turn
    want = torch.cat([turned.real, turned.imag], -1)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)  # angles of up to 50 rad in fp32
    assert_gradients(got, want, list(zip((x, built.log_frequency), exact, strict=True)), 1e-4)


def test_learned_frequencies_start_at_those_of_rope(device: torch.device) -> None:
    position = torch.arange(200).view(100, 2)
    learned = build(COMPLETE, device, sequence_length=256, seed=1)._angles(position)
    fixed = build(SMALL, device, sequence_length=256, seed=1)._angles(position)
    torch.testing.assert_close(learned, fixed, rtol=1e-6, atol=1e-6)


def test_mixed_values_equal_their_definition_in_float64() -> None:
    torch.manual_seed(new_seed())
    given = [torch.randn(5, 2, 2, 16), torch.randn(5, 2, 2, 16), torch.randn(1)]
    exact = [x.double().requires_grad_() for x in given]
    got = mix_values(*(x.requires_grad_() for x in given))
    share = 1 / (1 + (-exact[2]).exp())
    want = exact[1] + share * (exact[0] - exact[1])
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    assert_gradients(got, want, list(zip(given, exact, strict=True)), 1e-5)


def test_biased_experts_equal_sequential_ones_in_float64(device: torch.device) -> None:
    """Output and gradients, with experts that get no token."""
    torch.manual_seed(new_seed())
    experts = StackedExperts(6, _config(COMPLETE, device, 1))
    counts = torch.tensor([3, 0, 11, 1, 0, 5])
    for weight in experts.parameters():
        torch.nn.init.normal_(weight)
    leaves = [torch.randn(20, COMPLETE.hidden, requires_grad=True), torch.rand(20, requires_grad=True)]
    leaves += [experts.up, experts.down, experts.up_bias, experts.down_bias]
    rows = torch.arange(20)
    got, _ = experts(leaves[0], Sorting(rows, rows, counts, 1), leaves[1])
    exact = [x.detach().double().requires_grad_() for x in leaves]
    x, p, up, down, up_bias, down_bias = exact
    expert = torch.arange(6).repeat_interleave(counts)
    inner = torch.einsum("nh,nwh->nw", x, up[expert]) + up_bias.view(6, -1)[expert]
    outer = torch.einsum("nw,nhw->nh", inner.relu() ** 2, down[expert]) + down_bias.view(6, -1)[expert]
    want = p.unsqueeze(1) * outer
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-3)
    assert_gradients(got, want, list(zip(leaves, exact, strict=True)), 1e-5)


def test_the_routers_bias_is_added_before_the_sigmoid(device: torch.device) -> None:
    router = perturbed(COMPLETE, device).decoder.layers[1].mlp.router
    x = torch.randn(6, 1, COMPLETE.hidden)
    want = x.double() @ router.weight.double().T + router.bias.double()
    torch.testing.assert_close(router.gating(x).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", PARTS)
def test_every_part_changes_the_output(device: torch.device, part: str) -> None:
    """Left out of a complete student with the same other weights. Otherwise agreement with transformers and
    vLLM would not show that they have it."""
    complete = perturbed(COMPLETE, device)
    without = perturbed(replace(COMPLETE, **{part: WITHOUT[part]}), device)
    with torch.no_grad():
        for name, parameter in without.named_parameters():
            kept = dict(complete.named_parameters()).get(name)
            if kept is not None and kept.shape == parameter.shape:
                parameter.copy_(kept)
        batch = Batch.from_rows(*documents(torch.Generator().manual_seed(3), [40, 20], 64))
        # fp32 rounds by 1e-6; learned frequencies that move no choice of experts change it by 8e-3 at times
        assert (complete(batch) - without(batch)).abs().max() > 1e-3


CLASSES = {
    "embeddings": r"embedding\.weight",
    "output": r"output",
    "norms": r".*norm\.weight",
    "attention": r".*(linear_qkv|linear_proj|tensor_product)\.weight",
    "dense feed-forward": r".*mlp\.linear_fc.\.weight",
    "routers": r".*router\.weight",
    "experts": r".*experts\.(up|down)",
    "shared experts": r".*shared_experts\.linear_fc.\.weight",
    "linear biases": r".*(linear_qkv|linear_proj|tensor_product|linear_fc.)\.bias",
    "experts' biases": r".*experts\.(up|down)_bias",
    "routers' biases": r".*router\.bias",
    "rotation frequencies": r"log_frequency",
    "softmax offsets": r".*core_attention\.offset",
    "value residual": r".*value_mix",
}
"""Pattern of the names of each line of `vpmoe count`."""


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({}, id="complete"),
        *(pytest.param({name: WITHOUT[name]}, id=f"without {name}") for name in PARTS),
        *(
            pytest.param({**WITHOUT, name: {**LOCKED_PARTS, "router_bias": True}[name]}, id=f"only {name}")
            for name in PARTS
        ),
    ],
)
def test_the_count_by_part_is_that_of_the_modules(device: torch.device, change: dict[str, object]) -> None:
    shape = replace(SHAPES["tiny"], **{"layers": 9, "router_bias": True, **change})
    with torch.device("meta"):
        built = build(shape, torch.device("meta"), sequence_length=64, seed=0)
    found = dict.fromkeys(CLASSES, 0)
    for name, parameter in built.named_parameters():
        (part,) = [part for part, pattern in CLASSES.items() if re.fullmatch(pattern, name)]
        found[part] += parameter.numel()
    assert found == shape.parameters_by_part()


def test_documents_are_isolated_with_every_part(device: torch.device) -> None:
    """The gradient of one document's loss is exactly 0 for the embeddings of other documents and padding."""
    model = perturbed(replace(COMPLETE, aux_coefficient=0.0), device, recomputed_layers=0)
    lengths = [9, 1, 17, 12]
    packed = documents(torch.Generator().manual_seed(new_seed()), lengths, 50)
    hidden, embeddings = hidden_and_embeddings(model, Batch.from_rows(*packed))
    check_isolation(model, hidden, embeddings, lengths)


def test_a_document_alone_has_the_hidden_states_that_it_has_in_a_row(device: torch.device) -> None:
    model = perturbed(COMPLETE, device)
    packed = documents(torch.Generator().manual_seed(new_seed()), [13, 21, 8], 64)
    with torch.no_grad():
        hidden = model(Batch.from_rows(*packed))
        alone = model(Batch.from_rows(*(part[:, 13:34] for part in packed)))
    torch.testing.assert_close(hidden[13:34], alone, rtol=1e-3, atol=1e-4)


def test_local_layers_alone_see_no_further_than_their_windows_reach(device: torch.device) -> None:
    """Two layers with a window of 8 reach 14 positions back, and not one further."""
    shape = replace(COMPLETE, layers=2, global_every=None, aux_coefficient=0.0)
    hidden, embeddings = hidden_and_embeddings(
        perturbed(shape, device, recomputed_layers=0),
        Batch.from_rows(*documents(torch.Generator().manual_seed(new_seed()), [40], 40)),
    )
    (gradient,) = torch.autograd.grad(hidden[30].sum(), embeddings)
    reached = (gradient[0] != 0).any(1)
    assert not reached[:16].any() and reached[16:31].all() and not reached[31:].any()


def gradients(device: torch.device, batches: list[Batch], recomputed_layers: int) -> list[Tensor]:
    counts = torch.stack([batch.counts for batch in batches]).sum(0)
    it = learner(device, COMPLETE, recomputed_layers=recomputed_layers)
    outcome = it.forward_backward(batches, vanilla(counts, EVEN), int(counts[0]))
    return [
        torch.tensor(outcome.loss),
        *(parameter.main_grad.clone() for parameter in it.student.parameters()),
    ]


def test_recomputing_activations_changes_no_gradient(device: torch.device) -> None:
    """The first layer's values and the frequencies reach every layer through the recomputation. Their
    gradients are summed over the layers in another order: 1e-5 of the largest."""
    batches = ragged_batches(torch.Generator().manual_seed(new_seed()), 2)
    stored, some, recomputed = (gradients(device, batches, layers) for layers in (0, 3, COMPLETE.layers))
    for number, (one, *others) in enumerate(zip(stored, some, recomputed, strict=True)):
        for other in others:
            assert (one - other).abs().max() <= 1e-5 * one.abs().max(), number
    assert all((gradient != 0).any() for gradient in recomputed)


def test_training_a_complete_student_lowers_the_loss(device: torch.device) -> None:
    batches = ragged_batches(torch.Generator().manual_seed(new_seed()), 2)
    counts = torch.stack([batch.counts for batch in batches]).sum(0)
    it = learner(device, COMPLETE)
    initial = {name: parameter.detach().clone() for name, parameter in it.student.named_parameters()}
    before = it.evaluate(batches).cross_entropy
    for _ in range(12):
        it.forward_backward(batches, vanilla(counts, EVEN), int(counts[0]))
        it.step(1e-2)
    after = it.evaluate(batches).cross_entropy
    assert all(after[name] < before[name] - 1 for name in EVEN)
    assert all((parameter != initial[name]).any() for name, parameter in it.student.named_parameters())


def test_vectors_have_their_initial_values_and_no_weight_decay(device: torch.device) -> None:
    """Weight decay would pull λ to ½ and the frequencies to 1."""
    it = learner(device, COMPLETE)
    starts: dict[str, Callable[[Tensor], bool]] = {
        ".value_mix": lambda x: bool((x == 4).all()),
        "bias": lambda x: bool((x == 0).all()),
        ".offset": lambda x: bool((x == 0).all()),
        "norm.weight": lambda x: bool((x == 1).all()),
    }
    for name, parameter in it.student.named_parameters():
        for ending, holds in starts.items():
            assert not name.endswith(ending) or holds(parameter), name
    decayed = {
        parameter.numel()
        for group in it.optimizer.param_groups
        if group["wd_mult"]
        for parameter in group["params"]
    }
    matrices = {parameter.numel() for parameter in it.student.parameters() if parameter.dim() > 1}
    assert decayed == matrices
