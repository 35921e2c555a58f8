"""The student's architecture: size, isolated documents, padding without effect, experts, reproducible
bits."""

from dataclasses import replace

import pytest
import torch

from tests.fakes.students import (
    SMALL,
    check_isolation,
    documents,
    hidden_and_embeddings,
    learner,
    new_seed,
    ragged_batches,
)
from vpmoe.api.layout import EXPERTS
from vpmoe.data.vocabulary import VOCABULARY_SIZE
from vpmoe.model.attention import PackedAttention, packed_seq_params_for
from vpmoe.model.batch import Batch
from vpmoe.model.dispatch import Sorting
from vpmoe.model.experts import StackedExperts
from vpmoe.model.shapes import SHAPES, Shape
from vpmoe.model.student import Student, _config, build
from vpmoe.objectives.vanilla import vanilla

WITHOUT_AUX = replace(SMALL, aux_coefficient=0.0)
EVEN = {"reasoning": 1.0, "final": 1.0}


def student(device: torch.device, shape: Shape = SMALL) -> Student:
    return build(shape, device, sequence_length=256, seed=1234)


def test_vpmoe_6b_is_the_locked_student(device: torch.device) -> None:
    shape = SHAPES["vpmoe-6b"]
    assert shape.parameters() == 6_029_894_927 and shape.vocabulary == VOCABULARY_SIZE == 201_088
    with torch.device("meta"):
        built = build(shape, torch.device("meta"), sequence_length=8192, seed=0)
    assert sum(p.numel() for p in built.parameters()) == shape.parameters()
    assert len(built.decoder.layers) == 80 and built.embedding.weight is not built.output
    layers = built.decoder.layers
    layer = layers[79]
    assert layer.mlp.experts.up.shape == (
        256,
        128,
        1024,
    ) and layer.mlp.shared_experts.linear_fc1.weight.shape == (512, 1024)
    assert layers[0].mlp.linear_fc1.weight.shape == (4096, 1024)
    assert layer.self_attention.linear_qkv.weight.shape == ((8 + 2 * 2) * 128, 1024)
    with_linear_projections = [n for n in range(80) if hasattr(layers[n].self_attention, "linear_qkv")]
    assert with_linear_projections == [*range(3, 80, 4)], "global layers"
    assert shape.slopes(3) == [2.0**-head for head in range(1, 9)] and shape.slopes(2) is None
    assert [layers[n].self_attention.core_attention.window for n in (0, 2, 3)] == [128, 128, None]


def test_tiny_has_its_stated_size_and_the_same_vocabulary(device: torch.device) -> None:
    shape = SHAPES["tiny"]
    assert [shape.is_global(layer) for layer in range(shape.layers)] == [False, False, False, True, False]
    with torch.device("meta"):
        built = build(shape, torch.device("meta"), sequence_length=64, seed=0)
    assert (
        sum(p.numel() for p in built.parameters()) == shape.parameters()
        and shape.vocabulary == VOCABULARY_SIZE
    )


def test_the_api_has_every_shape_with_its_number_of_experts() -> None:
    assert {name: shape.experts for name, shape in SHAPES.items()} == EXPERTS


def test_expert_parallelism_that_does_not_divide_the_experts_is_rejected(device: torch.device) -> None:
    with pytest.raises(
        ValueError, match=r"student\.expertParallel: 3 does not divide the 8 experts of small"
    ):
        build(SMALL, device, sequence_length=8, seed=0, expert_parallel=3)


def test_a_row_longer_than_the_students_sequence_is_rejected(device: torch.device) -> None:
    row = torch.zeros(1, 300, dtype=torch.int64)
    with pytest.raises(
        ValueError,
        match=r"training\.sequenceLength: a row has 300 positions, but the student was built for 256",
    ):
        student(device)(Batch.from_rows(row, row.to(torch.uint8), row.int()))


def test_documents_are_isolated(device: torch.device) -> None:
    """The gradient of one document's loss is exactly 0 for the embeddings of other documents and padding."""
    generator = torch.Generator().manual_seed(new_seed())
    model = student(device, WITHOUT_AUX)
    lengths = [9, 1, 17, 12]
    batch = Batch.from_rows(
        *(
            torch.cat([x, y])
            for x, y in zip(documents(generator, lengths, 50), documents(generator, [20, 5], 50), strict=True)
        )
    )
    hidden, embeddings = hidden_and_embeddings(model, batch)
    check_isolation(model, hidden, embeddings, lengths)


def test_hidden_states_do_not_depend_on_the_documents_position_in_the_row(device: torch.device) -> None:
    """Alone, or after another document in a row with padding: positions restart, so only the rounding of
    another batch shape may differ."""
    generator = torch.Generator().manual_seed(new_seed())
    model = student(device)
    packed = documents(generator, [13, 21, 8], 64)
    hidden = model(Batch.from_rows(*packed))
    alone = model(Batch.from_rows(*(part[:, 13:34] for part in packed)))
    torch.testing.assert_close(hidden[13:34], alone, rtol=1e-4, atol=1e-5)


def test_attention_equals_a_masked_softmax_in_float64(device: torch.device) -> None:
    torch.manual_seed(new_seed())
    attention = PackedAttention(_config(SMALL, device, 1))
    query, key, value = torch.randn(30, 2, 4, 16), torch.randn(30, 2, 2, 16), torch.randn(30, 2, 2, 16)
    boundaries = torch.tensor([0, 7, 8, 30, 41, 60], dtype=torch.int32)  # of both rows, one after the other
    got = attention(query, key, value, None, packed_seq_params=packed_seq_params_for(boundaries, 22))
    run = torch.bucketize(torch.arange(60), boundaries[1:], right=True)
    allowed = (run[:, None] == run[None, :]) & torch.ones(60, 60).tril().bool()
    q, k, v = (
        x.transpose(0, 1).reshape(60, -1, 16).double().repeat_interleave(4 // x.shape[2], 1)
        for x in (query, key, value)
    )
    scores = torch.einsum("qhd,khd->hqk", q, k) / 4
    want = (
        torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v)
        .reshape(2, 30, 64)
        .transpose(0, 1)
    )
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_stacked_experts_equal_sequential_ones_in_float64(device: torch.device) -> None:
    """Output and gradients, with experts that get no token."""
    torch.manual_seed(new_seed())
    experts = StackedExperts(6, _config(SMALL, device, 1))
    counts = torch.tensor([3, 0, 11, 1, 0, 5])
    for weight in experts.parameters():
        torch.nn.init.normal_(weight)
    inputs, weight_n = torch.randn(20, SMALL.hidden, requires_grad=True), torch.rand(20, requires_grad=True)
    rows = torch.arange(20)
    got, _ = experts(inputs, Sorting(rows, rows, counts, 1), weight_n)
    exact = [x.detach().double().requires_grad_() for x in (inputs, weight_n, experts.up, experts.down)]
    pieces = zip(
        exact[0].split(counts.tolist()), exact[1].split(counts.tolist()), exact[2], exact[3], strict=True
    )
    want = torch.cat([(((x @ up.T).relu() ** 2) * p.unsqueeze(1)) @ down.T for x, p, up, down in pieces])
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-3)
    direction = torch.randn_like(got)
    got.backward(direction)
    want.backward(direction.double())
    for actual, wanted in zip((inputs, weight_n, experts.up, experts.down), exact, strict=True):
        torch.testing.assert_close(actual.grad.double(), wanted.grad, rtol=1e-4, atol=2e-2)


def test_a_mixture_layer_is_the_weighted_sum_of_its_experts_plus_the_shared_one(device: torch.device) -> None:
    """Output and gradients equal a float64 sum over every expert for every token."""
    torch.manual_seed(new_seed())
    layer = student(device, WITHOUT_AUX).decoder.layers[1].mlp
    for weight in (layer.experts.up, layer.experts.down, layer.router.weight):
        torch.nn.init.normal_(weight, std=0.3)
    inputs = torch.randn(23, 2, SMALL.hidden, requires_grad=True)
    weights, experts = layer.router(inputs, padding_mask=torch.zeros(23, 2, dtype=torch.bool))
    chosen = torch.zeros(46, SMALL.experts).scatter(1, experts, 1.0)
    got, _ = layer(inputs, padding_mask=torch.zeros(2, 23, dtype=torch.bool))
    exact = {
        name: parameter.detach().double().requires_grad_() for name, parameter in layer.named_parameters()
    }
    x = inputs.detach().double().requires_grad_()
    rows = x.view(46, -1)
    scores = torch.sigmoid(rows @ exact["router.weight"].T) * chosen
    weights_exact = SMALL.routed_scaling * scores / scores.sum(1, keepdim=True)
    torch.testing.assert_close(weights.double(), weights_exact.gather(1, experts), rtol=1e-4, atol=1e-6)
    inner = torch.einsum("nh,ewh->new", rows, exact["experts.up"]).relu() ** 2
    routed = torch.einsum("new,ehw,ne->nh", inner, exact["experts.down"], weights_exact)
    shared = ((rows @ exact["shared_experts.linear_fc1.weight"].T).relu() ** 2) @ exact[
        "shared_experts.linear_fc2.weight"
    ].T
    want = (routed + shared).view_as(got)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    direction = torch.randn_like(got)
    got.backward(direction)
    want.backward(direction.double())
    for actual, wanted in [
        (inputs, x),
        *((parameter, exact[name]) for name, parameter in layer.named_parameters()),
    ]:
        torch.testing.assert_close(actual.grad.double(), wanted.grad, rtol=1e-3, atol=1e-3)


def test_recomputing_activations_changes_no_bit_and_no_token_count(device: torch.device) -> None:
    batches = ragged_batches(torch.Generator().manual_seed(new_seed()), 2)
    counts = torch.stack([batch.counts for batch in batches]).sum(0)
    results = []
    for recomputed_layers in (0, 2, 3):
        it = learner(device, recomputed_layers=recomputed_layers)
        outcome = it.forward_backward(batches, vanilla(counts, EVEN), int(counts[0]))
        norm = it.step(1e-3)
        results.append((outcome.loss, norm, outcome.load.tokens, *it.student.parameters()))
    for stored, *recomputed in zip(*results, strict=True):
        assert all(torch.equal(torch.as_tensor(stored), torch.as_tensor(one)) for one in recomputed)


def test_the_same_steps_give_the_same_bits(device: torch.device) -> None:
    batches = ragged_batches(torch.Generator().manual_seed(new_seed()), 3)
    counts = torch.stack([batch.counts for batch in batches]).sum(0)
    runs = []
    for _ in range(2):
        it = learner(device)
        numbers = []
        for _ in range(3):
            numbers += [
                it.forward_backward(batches, vanilla(counts, EVEN), int(counts[0])).loss,
                it.step(1e-2),
            ]
        runs.append((torch.tensor(numbers), *it.student.parameters()))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_training_lowers_the_loss_of_both_spans(device: torch.device) -> None:
    batches = ragged_batches(torch.Generator().manual_seed(new_seed()), 2)
    counts = torch.stack([batch.counts for batch in batches]).sum(0)
    it = learner(device)
    before = it.evaluate(batches).cross_entropy
    for _ in range(20):
        it.forward_backward(batches, vanilla(counts, EVEN), int(counts[0]))
        it.step(1e-2)
    after = it.evaluate(batches).cross_entropy
    assert all(after[name] < before[name] - 1 for name in EVEN)


def test_initial_weights_depend_only_on_the_seed(device: torch.device) -> None:
    torch.manual_seed(1)
    first = student(device)
    torch.manual_seed(2)
    again, other = student(device), build(SMALL, device, sequence_length=8, seed=4321)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
        assert parameter.dim() == 1 or not torch.equal(parameter, other.get_parameter(name))
        std = (
            SMALL.init_std / 6**0.5
            if name.endswith(("linear_proj.weight", "linear_fc2.weight", "experts.down"))
            else SMALL.init_std
        )
        assert parameter.dim() == 1 or parameter.std().item() == pytest.approx(std, rel=0.2)


def test_nothing_is_compiled(device: torch.device) -> None:
    """megatron-core wraps some functions in torch.compile. Compiling needs a C compiler in the image, and
    minutes for 79 routers."""
    import torch._dynamo.utils

    assert not torch._dynamo.utils.counters["frames"]


def test_expert_tensor_parallelism_is_pinned(device: torch.device) -> None:
    """If it followed tensor parallelism, experts would silently diverge between ranks."""
    assert _config(SMALL, device, 1).expert_tensor_parallel_size == 1


def test_padding_changes_neither_loss_nor_gradient(device: torch.device) -> None:
    """A row with padding has the same loss, gradient and expert counts as without it, up to rounding."""
    generator = torch.Generator().manual_seed(new_seed())
    packed = documents(generator, [19, 21], 64)
    results = []
    for row in (packed, tuple(part[:, :40] for part in packed)):
        batch = Batch.from_rows(*row)
        it = learner(device)
        outcome = it.forward_backward([batch], vanilla(batch.counts, EVEN), int(batch.counts[0]))
        results.append((outcome, torch.cat([p.main_grad.flatten() for p in it.student.parameters()])))
    (padded, padded_gradient), (cut, cut_gradient) = results
    assert padded.loss == pytest.approx(cut.loss, rel=1e-6) and torch.equal(
        padded.load.tokens, cut.load.tokens
    )
    assert padded.load.aux.tolist() == pytest.approx(cut.load.aux.tolist(), rel=1e-6)
    torch.testing.assert_close(padded_gradient, cut_gradient, rtol=1e-3, atol=1e-5)


def test_a_batch_of_padding_contributes_nothing(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(new_seed())
    batch = Batch.from_rows(*documents(generator, [19, 21], 64))
    all_padding = Batch.from_rows(*documents(generator, [], 64))
    results = []
    for batches in ([batch], [batch, all_padding]):
        it = learner(device)
        outcome = it.forward_backward(batches, vanilla(batch.counts, EVEN), int(batch.counts[0]))
        results.append((outcome, it.step(1e-3)))
    (one, norm), (both, same_norm) = results
    assert one.loss == both.loss and norm == same_norm and torch.equal(one.load.tokens, both.load.tokens)
    assert all_padding.counts.tolist() == [0, 0, 0]
