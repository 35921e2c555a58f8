"""What of the layers' CUDA graphs needs no GPU: where there are some, and the steps that they capture, which
run here without a capture, beside autograd's own backward through all layers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fakes.students import COMPLETE, SMALL, learner, new_seed, ragged_batches
from vpmoe.model.attention import packed_seq_params_for
from vpmoe.model.batch import Batch
from vpmoe.model.layer_graphs import Inputs, LayerChain, LayerGraphs, _Shape, unsupported
from vpmoe.model.learner import Learner
from vpmoe.model.shapes import SHAPES, Shape
from vpmoe.objectives.vanilla import vanilla

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    "shape, device, more, reason",
    [
        pytest.param("vpmoe-6b", GPU, {}, None, id="supported"),
        pytest.param("vpmoe-6b", torch.device("cpu"), {}, "no GPU", id="cpu"),
        pytest.param("vpmoe-6b", GPU, {"sharded_gradients": True}, "no fixed address", id="sharded"),
    ],
)
def test_where_layers_are_graphed(
    shape: str, device: torch.device, more: dict[str, Any], reason: str | None
) -> None:
    found = unsupported(SHAPES[shape], device, **more)
    assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize("layer, part", [(0, {"local_window": None}), (3, {"alibi": False})])
def test_a_layer_of_plain_attention_is_not_graphed(layer: int, part: dict[str, Any]) -> None:
    shape = replace(SHAPES["tiny"], softmax_offset=False)
    assert unsupported(shape, GPU) is None
    found = unsupported(replace(shape, **part), GPU)
    assert found is not None and found.startswith(f"layer {layer} has plain attention")


@dataclass
class Step:
    """In the place of a captured graph: its replay runs the step."""

    replay: Callable[[], None]
    reset: Callable[[], None] = lambda: None


class Uncaptured(LayerGraphs):
    """Everything but the capture: the steps are run anew for each microbatch."""

    def __init__(self, it: Learner, recomputed: int) -> None:
        self._layers = list(it.student.decoder.layers)
        self._parameters = [list(layer.parameters()) for layer in self._layers]
        self._recomputed = recomputed
        self._ready = it._gradient_ready
        self._wait = it.gather.wait
        self._shapes = {}
        self._forwards = 0

    def __call__(self, hidden_SbH: Tensor, angle_Sb1D: Tensor, batch: Batch) -> Tensor:
        inputs = Inputs.like(hidden_SbH, angle_Sb1D, batch)
        # attention on the CPU reads what graphs do not have
        inputs.packed = packed_seq_params_for(batch.boundaries, batch.longest)
        chain = LayerChain(self._layers, self._recomputed, inputs)
        inputs.fill(hidden_SbH, angle_Sb1D, batch)
        chain.warm_up()
        forwards: list[Any] = [Step(chain.forward) for _ in self._layers]
        backwards: list[Any] = [Step(chain.backward) for _ in self._layers]
        self._shapes[tuple(batch.tokens.shape)] = _Shape(chain, forwards, backwards)
        return super().__call__(hidden_SbH, angle_Sb1D, batch)


@pytest.mark.parametrize(
    "shape, recomputed",
    [(COMPLETE, 0), (COMPLETE, 2), (COMPLETE, COMPLETE.layers), (SMALL, 0), (SMALL, 1)],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_the_steps_of_a_chain_give_the_bits_of_a_whole_backward(
    device: torch.device, shape: Shape, recomputed: int
) -> None:
    """Losses, loads and gradients of three microbatches. On the CPU sums over positions, the gradients of
    vectors, are added in the order of memory, which the copy of a gradient changes: fp32 rounding, 2⁻²⁴
    each."""
    batches = ragged_batches(torch.Generator().manual_seed(new_seed()), 3)
    counts = torch.stack([batch.counts for batch in batches]).sum(0)
    results = []
    for graphed in (False, True):
        it = learner(device, shape, recomputed_layers=recomputed)
        if graphed:
            it._graphs = Uncaptured(it, recomputed)
        objective = vanilla(counts, {"reasoning": 1.0, "final": 1.0})
        outcome = it.forward_backward(batches, objective, int(counts[0]))
        results.append((outcome, {name: p.main_grad for name, p in it.student.named_parameters()}))
    (wanted, wanted_gradients), (found, gradients) = results
    assert found.loss == wanted.loss and found.cross_entropy == wanted.cross_entropy
    assert found.load is not None and wanted.load is not None
    assert found.load.tokens.equal(wanted.load.tokens) and found.load.aux.equal(wanted.load.aux)
    for name, gradient in wanted_gradients.items():
        assert gradient.any(), name
        error = (gradients[name] - gradient).norm() / gradient.norm()
        assert error <= (0 if gradient.dim() > 1 else 1e-5), name


class Uncapturable(Uncaptured):
    __call__ = LayerGraphs.__call__

    def _capture(self, hidden_SbH: Tensor, angle_Sb1D: Tensor, batch: Batch) -> _Shape:
        raise RuntimeError("operation not permitted when stream is capturing")


def test_a_failed_capture_names_shape_cause_and_remedy(device: torch.device) -> None:
    it = learner(device, SMALL)
    batch = ragged_batches(torch.Generator().manual_seed(new_seed()), 1)[0]
    rows, positions = batch.tokens.shape
    message = (
        f"graphs for microbatches of {rows} × {positions} positions: operation not permitted when stream"
    )
    graphs, waited = Uncapturable(it, 0), []
    graphs._wait = waited.append
    with pytest.raises(RuntimeError, match=message + r".*graphs=False"):
        it.student(batch, graphs)
    assert waited == [None], "for all weights, before the capture"


def test_a_layer_waits_for_its_weights_before_its_graph(device: torch.device) -> None:
    graphs = Uncaptured(learner(device, SMALL), 0)
    events: list[Any] = []
    graphs._wait = events.append
    replays: list[Any] = [Step(lambda n=number: events.append(n)) for number in range(SMALL.layers)]  # type: ignore[misc]
    chain: Any = SimpleNamespace(hidden=torch.zeros(1))
    graphs.replay_forward(_Shape(chain, replays, []))
    assert events == [one for number, layer in enumerate(graphs._layers) for one in (layer, number)]


def test_closing_a_learner_destroys_its_graphs(device: torch.device) -> None:
    """Of all shapes: NCCL would wait for those that are left."""
    it = learner(device, SMALL)
    it.close()  # without graphs
    it._graphs = Uncaptured(it, 0)
    destroyed: list[int] = []
    graphs: list[Any] = [Step(lambda: None, lambda n=number: destroyed.append(n)) for number in range(4)]  # type: ignore[misc]
    it._graphs._shapes = {
        (1, 8): _Shape(SimpleNamespace(), graphs[:1], graphs[1:2]),  # type: ignore[arg-type]
        (2, 8): _Shape(SimpleNamespace(), graphs[2:3], graphs[3:]),  # type: ignore[arg-type]
    }
    it.close()
    assert destroyed == [0, 1, 2, 3] and not it._graphs._shapes
    it.close()
    assert len(destroyed) == 4


def test_a_backward_after_the_next_forward_is_rejected(device: torch.device) -> None:
    it = learner(device, SMALL)
    graphs = Uncaptured(it, 0)
    batch = ragged_batches(torch.Generator().manual_seed(new_seed()), 1)[0]
    first = it.student(batch, graphs).sum()
    it.student(batch, graphs)
    with pytest.raises(RuntimeError, match="after the forward of another one"):
        first.backward()
