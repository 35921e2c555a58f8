"""Layers as CUDA graphs: the bits of layers without, in all microbatches; none of these waits for the GPU."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.fakes.students import copy_slices, documents, join_slices, new_seed, read_from
from vpmoe.api.stages import Confidence, LossWeights
from vpmoe.model import state
from vpmoe.model.batch import Batch
from vpmoe.model.learner import Learner
from vpmoe.model.objective import Objective
from vpmoe.model.router import ExpertLoad
from vpmoe.model.shapes import SHAPES, Shape
from vpmoe.objectives.onpolicy import on_policy
from vpmoe.objectives.rescored import rescored
from vpmoe.objectives.teacher_forced import TeacherForced
from vpmoe.objectives.vanilla import vanilla

COMPLETE = replace(SHAPES["tiny"], router_bias=True, vocabulary=2048)
EVEN = {"reasoning": 1.0, "final": 1.0}
ROW = 512
WIDTH = 96
"""Of a teacher's hidden states."""


def build(device: torch.device, *, graphs: bool, shape: Shape = COMPLETE, **options: int) -> Learner:
    return Learner.build(
        shape,
        device,
        sequence_length=ROW,
        seed=1234,
        weight_decay=0.1,
        gradient_clip=1.0,
        graphs=graphs,
        **options,
    )


def microbatches(rows: Sequence[int], seed: int) -> list[Batch]:
    """A microbatch of each number of rows, of documents that differ in number and length, and padding."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for count in rows:
        packed = []
        for _ in range(count):
            longest = int(torch.randint(2, 400, (), generator=generator))
            lengths: list[int] = []
            while (length := int(torch.randint(1, longest, (), generator=generator))) + sum(lengths) <= ROW:
                lengths.append(length)
            packed.append(documents(generator, lengths, ROW, COMPLETE.vocabulary))
        batch = Batch.from_rows(*(torch.cat(parts) for parts in zip(*packed, strict=True)))
        logp_T = torch.where(
            batch.target >= 0, -torch.rand(batch.target.shape, generator=generator), torch.nan
        )
        batches.append(replace(batch, teacher_logp=logp_T, sampler_logp=logp_T - 0.1))
    return batches


class Passed(NamedTuple):
    loss: float
    load: ExpertLoad | None
    gradients: dict[str, Tensor]


def train(it: Learner, steps: Sequence[list[Batch]], rate: float = 1e-2) -> list[Passed]:
    """The steps' results. An optimizer step follows each of them."""
    found = []
    for batches in steps:
        counts = torch.stack([batch.counts for batch in batches]).sum(0)
        outcome = it.forward_backward(batches, vanilla(counts, EVEN), int(counts[0]))
        gradients = {name: x.main_grad.clone() for name, x in it.student.named_parameters()}
        found.append(Passed(outcome.loss, outcome.load, gradients))
        it.step(rate)
    return found


def assert_same(found: Sequence[Passed], wanted: Sequence[Passed]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.load is not None and other.load is not None
        assert one.loss == other.loss
        assert one.load.tokens.equal(other.load.tokens) and one.load.aux.equal(other.load.aux)
        different = [name for name, x in other.gradients.items() if not x.equal(one.gradients[name])]
        assert not different


@pytest.mark.parametrize("recomputed", [0, 2, COMPLETE.layers])
def test_steps_have_the_bits_of_layers_without_graphs(device: torch.device, recomputed: int) -> None:
    """Three steps of several microbatches of one shape, weights and expert biases that move between them, and
    microbatches of other shapes among them."""
    seed = new_seed()
    steps = [
        microbatches(rows, seed + number) for number, rows in enumerate([(1, 1, 1), (2, 1), (1, 3, 2, 1)])
    ]
    plain, graphed = (
        train(build(device, graphs=graphs, recomputed_layers=recomputed), steps) for graphs in (False, True)
    )
    assert_same(graphed, plain)


@pytest.mark.parametrize("graphs", [False, True])
def test_gradients_of_a_step_do_not_depend_on_the_step_before(device: torch.device, graphs: bool) -> None:
    """They have the bits of gradients that are added to zeros, though no one fills the experts' buffers."""
    it, plain = (build(device, graphs=graphs) for _ in range(2))
    plain._begin_gradients = plain.ddp.zero_grad_buffer  # type: ignore[method-assign]
    assert plain._empty is not None
    plain._empty.fill_ = lambda _: None  # type: ignore[method-assign]
    steps = [microbatches((1, 1), new_seed()), microbatches((1,), new_seed())]
    for parameter in it.student.parameters():
        if hasattr(parameter, "empty_main_grad"):
            parameter.main_grad.fill_(torch.nan)
    assert_same(train(it, steps), train(plain, steps))


def test_hidden_states_are_those_of_layers_without_graphs(device: torch.device) -> None:
    it = build(device, graphs=True)
    for batch in microbatches((1, 1, 2), new_seed()):
        here = batch.to(device)
        assert it.student(here, it._graphs).equal(it.student(here))


def test_a_capture_leaves_no_trace(device: torch.device) -> None:
    """After one forward, gradients are 0 and counts and balance losses are those of this forward alone."""
    batch = microbatches((1,), new_seed())[0].to(device)
    counts = []
    for graphs in (False, True):
        it = build(device, graphs=graphs)
        it.ddp.zero_grad_buffer()
        it.student(batch, it._graphs)
        assert not any(x.main_grad.any() for x in it.student.parameters())
        counts.append([x.clone() for x in it.student.buffers()])
    assert all(x.equal(y) for x, y in zip(*counts, strict=True))


def test_graphs_train_a_restored_state(device: torch.device) -> None:
    """Weights, moments and expert biases are restored in place after a capture."""
    seed = new_seed()
    first, then = [microbatches((1, 1), seed)], [microbatches((1, 1), seed + 1)]
    it = build(device, graphs=True)
    train(it, first)
    held = join_slices([copy_slices(it)], state.sizes(it))
    wanted = train(it, then)
    train(it, first)
    state.restore(it, read_from(held), steps=1)
    assert_same(train(it, then), wanted)


def objectives(device: torch.device, kind: str, counts: Tensor) -> Objective:
    if kind == "rescored":
        return rescored(counts, EVEN, Confidence(), {"reasoning": -1.0, "final": -1.0})
    if kind == "on policy":
        return on_policy(counts, EVEN)
    if kind == "teacher forced":
        output = torch.randn(COMPLETE.vocabulary, WIDTH, device=device, dtype=torch.bfloat16)
        hidden = torch.randn(ROW, WIDTH, device=device, dtype=torch.bfloat16)
        share = [0.0, *(1 / max(int(n), 1) for n in counts[1:])]
        return TeacherForced(LossWeights(), share, output, lambda batch: hidden)
    return vanilla(counts, EVEN)


@pytest.mark.parametrize("graphs", [False, True], ids=["plain", "graphs"])
@pytest.mark.parametrize("kind", ["vanilla", "rescored", "on policy", "teacher forced"])
def test_a_microbatch_never_waits_for_the_gpu(device: torch.device, kind: str, graphs: bool) -> None:
    width = {"teacher_width": WIDTH} if kind == "teacher forced" else {}
    it = build(device, graphs=graphs, **width)
    batch = microbatches((1,), new_seed())[0]
    objective = objectives(device, kind, batch.counts)
    for strict in (False, True):  # the first one compiles and captures
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if strict else "default")
        try:
            here = batch.to(device)
            with it.ddp.no_sync():
                loss, logp_T = objective.loss(here, it.ddp(here, it._graphs), it.student, 1.0)
                loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert loss.isfinite() and logp_T[here.target_rows].isfinite().all()
