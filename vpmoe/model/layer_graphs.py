"""The student's layers in training as CUDA graphs: two launches a layer and microbatch instead of hundreds.

A layer has a graph of its forward and one of its backward, for each shape of a microbatch. They are captured
at the first microbatch of the shape, forwards first, then backwards in their order, in one pool of memory: so
temporary tensors share it, and what a forward keeps lives exactly until its backward, as without graphs. The
pool is the same for all shapes, because a microbatch ends before the next one begins.

A graph reads and writes fixed addresses. Weights, expert biases, the routers' counts and megatron's fp32
gradients are changed in place only, and what differs between microbatches is copied into tensors of the
graphs. The backward adds to the gradients itself and then calls megatron's DDP for each parameter, as its
hooks would, so that sums over the ranks still run beside the backward. Embedding, last norm and head run
without graphs, and so does everything that takes no gradient. `unsupported` says where there are none.

With expert parallelism a layer's collectives are in its graphs. Ranks that share a set of experts have
microbatches of the same shapes, so they capture and replay at the same time. A communicator of NCCL does not
end before the graphs that use it, so `close` comes before the process groups' end.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from vpmoe.model.attention import packed_seq_params_for
from vpmoe.model.batch import Batch
from vpmoe.model.main_gradient import set_gradient_so_far
from vpmoe.model.shapes import Shape

log = logging.getLogger(__name__)

ERRORS = "thread_local"
"""What CUDA forbids during a capture: calls of the capturing thread alone. Threads of NCCL, uploads and
pinned memory go on beside it."""


def unsupported(shape: Shape, device: torch.device, *, sharded_gradients: bool = False) -> str | None:
    """Why the layers of such a student cannot be graphs; None if they can."""
    if device.type != "cuda":
        return "the device is no GPU"
    if sharded_gradients:
        return "sharded gradients have no fixed address"
    for layer in range(shape.layers):
        if shape.window(layer) is None and shape.slopes(layer) is None and not shape.softmax_offset:
            return f"layer {layer} has plain attention, whose grid depends on the number of documents"
    return None


@dataclass(eq=False)
class Inputs:
    """What a microbatch gives to the layers, at fixed addresses. Create it with `like`."""

    hidden: Tensor
    """[S, b, H], of the first layer"""
    angle: Tensor
    """[S, b, 1, D]"""
    angle_has_gradient: bool
    padding: Tensor
    """[b, S]"""
    runs: Tensor
    """[2, T]"""
    gradient: Tensor
    """[S, b, H], of what the last layer returns"""
    packed: PackedSeqParams

    @classmethod
    def like(cls, hidden_SbH: Tensor, angle_Sb1D: Tensor, batch: Batch) -> "Inputs":
        """Uninitialised, for microbatches of this one's shape."""
        runs = torch.empty_like(batch.runs)
        return cls(
            torch.empty_like(hidden_SbH, requires_grad=False),
            torch.empty_like(angle_Sb1D, requires_grad=False),
            angle_Sb1D.requires_grad,
            torch.empty_like(batch.padding),
            runs,
            torch.empty_like(hidden_SbH, requires_grad=False),
            packed_seq_params_for(None, batch.tokens.numel(), runs),
        )

    @torch.no_grad()
    def fill(self, hidden_SbH: Tensor, angle_Sb1D: Tensor, batch: Batch) -> None:
        """Copy a microbatch's. The gradient stays."""
        self.hidden.copy_(hidden_SbH)
        self.angle.copy_(angle_Sb1D)
        self.padding.copy_(batch.padding)
        self.runs.copy_(batch.runs)


class LayerChain:
    """The layers' forwards and backwards as one step each. Every step reads what the steps before it wrote,
    so captured steps can be replayed in their order."""

    def __init__(self, layers: Sequence[nn.Module], recomputed: int, inputs: Inputs) -> None:
        """`recomputed`: how many of the first layers keep only their input."""
        self._layers = layers
        self._recomputed = recomputed
        self.inputs = inputs
        self._passes: list[_Pass] = []
        """Layers whose backward is still to come."""
        self._context: Tensor | None = None
        """The first layer's values; None without value residual."""
        self._grad_context: Tensor | None = None
        self.hidden = inputs.hidden
        """[S, b, H], what the latest forward returned"""
        self.gradient = inputs.gradient
        """[S, b, H], of the hidden states that the latest backward's layer was given"""
        self.grad_angle: Tensor | None = None
        """The sum over the backwards so far; None without a gradient."""

    def forward(self) -> None:
        """Of the next layer."""
        number = len(self._passes)
        layer = self._layers[number]
        one = _Pass(layer, _leaves(layer), self.hidden, self._context, self.inputs)
        if number < self._recomputed:
            with torch.no_grad():
                out, made = one.run()
        else:
            out, made = one.forward()
        self.hidden = out.detach()
        if self._context is None and made is not None:
            self._context = made.detach()
        self._passes.append(one)

    def backward(self) -> None:
        """Of the latest layer without one: adds to the `main_grad` of its parameters, and frees what its
        forward kept."""
        one = self._passes.pop()
        if len(self._passes) < self._recomputed:
            one.forward()
        self.gradient, self._grad_context, self.grad_angle = one.backward(
            self.gradient, self._grad_context, self.grad_angle
        )

    def warm_up(self) -> None:
        """Run each layer's steps, one layer after the other, so that kernels are compiled and loaded and
        libraries have their workspaces. Leaves no trace but in `inputs.gradient`."""
        counts = [buffer for layer in self._layers for buffer in layer.buffers()]
        before = [buffer.clone() for buffer in counts]
        context = None
        for number, layer in enumerate(self._layers):
            weights = _leaves(layer)
            for weight in weights.values():
                weight.main_grad = torch.zeros_like(weight.main_grad)
            one = _Pass(layer, weights, self.inputs.hidden, context, self.inputs)
            if number < self._recomputed:
                with torch.no_grad():
                    one.run()
            grad_context = grad_angle = None
            for _ in range(2):  # the second time with gradients so far, for which kernels differ
                _, made = one.forward()
                if made is not None:
                    grad_context = torch.zeros_like(made)
                gradient = self.inputs.gradient.zero_()
                _, grad_context, grad_angle = one.backward(gradient, grad_context, grad_angle)
            if context is None and made is not None:
                context = made.detach()
        with torch.no_grad():
            for buffer, value in zip(counts, before, strict=True):
                buffer.copy_(value)


@dataclass(eq=False)
class _Shape:
    """The graphs of one shape of microbatches."""

    chain: LayerChain
    forwards: list[torch.cuda.CUDAGraph]
    """The first layer's first."""
    backwards: list[torch.cuda.CUDAGraph]
    """The last layer's first."""


class LayerGraphs:
    """Runs a student's layers in training, for Student.forward."""

    def __init__(
        self,
        layers: Sequence[nn.Module],
        recomputed: int,
        ready: Callable[[nn.Parameter], None],
        wait: Callable[[nn.Module | None], None],
    ) -> None:
        """`recomputed`: how many of the first layers keep only their input. `ready` is called in the
        backward for each of the layers' parameters, once its gradient was added to its `main_grad`. `wait` is
        called before a layer's forward, and with None before a capture: the stream waits for the weights of
        this layer, or of all."""
        self._layers = list(layers)
        self._parameters = [list(layer.parameters()) for layer in layers]
        self._recomputed = recomputed
        self._ready = ready
        self._wait = wait
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._shapes: dict[tuple[int, ...], _Shape] = {}
        self._forwards = 0
        """How many there were."""

    def __call__(self, hidden_SbH: Tensor, angle_Sb1D: Tensor, batch: Batch) -> Tensor:
        """What the last layer returns [S, b, H], before the last norm. The arguments are those of the first
        layer. Its backward must run before the next call.

        The first call for a shape captures, which takes a few seconds. Raises RuntimeError if that fails.
        """
        key = tuple(batch.tokens.shape)
        if key not in self._shapes:
            began = time.monotonic()
            self._wait(None)  # a graph cannot wait for what began before it
            try:
                self._shapes[key] = self._capture(hidden_SbH, angle_Sb1D, batch)
            except Exception as error:
                raise RuntimeError(
                    f"the student's layers could not be captured as CUDA graphs for microbatches of {key[0]} "
                    f"× {key[1]} positions: {error.__context__ or error}. The usual causes are an operation "
                    "that waits for the GPU, and too little memory. Learner.build(graphs=False) has none."
                ) from error
            log.info(
                "Captured CUDA graphs of %d layers for microbatches of %d × %d positions in %.1f s",
                len(self._layers),
                *key,
                time.monotonic() - began,
            )
        shape = self._shapes[key]
        shape.chain.inputs.fill(hidden_SbH, angle_Sb1D, batch)
        out: Tensor = _Replay.apply(hidden_SbH, angle_Sb1D, self, shape)  # type: ignore[no-untyped-call]
        return out

    def close(self) -> None:
        """Destroy the graphs."""
        for shape in self._shapes.values():
            for graph in shape.forwards + shape.backwards:
                graph.reset()
        self._shapes.clear()

    def _capture(self, hidden_SbH: Tensor, angle_Sb1D: Tensor, batch: Batch) -> _Shape:
        chain = LayerChain(self._layers, self._recomputed, Inputs.like(hidden_SbH, angle_Sb1D, batch))
        chain.inputs.fill(hidden_SbH, angle_Sb1D, batch)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            chain.warm_up()
        torch.cuda.current_stream().wait_stream(self._stream)
        forwards, backwards = (
            [self._captured(step) for _ in self._layers] for step in (chain.forward, chain.backward)
        )
        return _Shape(chain, forwards, backwards)

    def _captured(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode=ERRORS):
            step()
        return graph

    def replay_forward(self, shape: _Shape) -> tuple[Tensor, int]:
        """(what the last layer returns, the number of this forward)."""
        for layer, graph in zip(self._layers, shape.forwards, strict=True):
            self._wait(layer)
            graph.replay()
        self._forwards += 1
        return shape.chain.hidden.detach(), self._forwards

    def replay_backward(self, shape: _Shape, number: int, gradient_SbH: Tensor) -> None:
        """The backward of forward `number`, from the gradient of what it returned."""
        if number != self._forwards:
            raise RuntimeError(
                "the backward of a microbatch was called after the forward of another one, which has "
                "overwritten what it needs. Call it before."
            )
        shape.chain.inputs.gradient.copy_(gradient_SbH)
        for graph, parameters in zip(shape.backwards, reversed(self._parameters), strict=True):
            graph.replay()
            for parameter in parameters:
                self._ready(parameter)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_SbH: Tensor, angle_Sb1D: Tensor, graphs: LayerGraphs, shape: _Shape
    ) -> Tensor:
        ctx.graphs, ctx.shape = graphs, shape
        out, ctx.number = graphs.replay_forward(shape)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_SbH: Tensor) -> tuple[Tensor | None, ...]:
        chain: LayerChain = ctx.shape.chain
        ctx.graphs.replay_backward(ctx.shape, ctx.number, gradient_SbH)
        grad_angle = None if chain.grad_angle is None else chain.grad_angle.detach()
        return chain.gradient.detach(), grad_angle, None, None


class _Pass:
    """A forward and a backward of one layer, with everything in place of autograd that connects it to others:
    the layer's inputs and parameters are leaves of their own."""

    def __init__(
        self,
        layer: nn.Module,
        weights: dict[str, Any],
        hidden: Tensor,
        context: Tensor | None,
        inputs: Inputs,
    ) -> None:
        """`context`: the first layer's values; None in the first layer and without value residual."""
        self._layer = layer
        self._weights = weights
        self._hidden = hidden.detach().requires_grad_()
        self._context = None if context is None else context.detach().requires_grad_()
        self._angle = inputs.angle.detach().requires_grad_(inputs.angle_has_gradient)
        self._inputs = inputs
        self._out: Tensor | None = None
        self._made: Tensor | None = None

    def run(self) -> tuple[Tensor, Tensor | None]:
        """(what the layer returns, its values if it is the first and there is a value residual)."""
        out, context = functional_call(
            self._layer,
            self._weights,
            (),
            {
                "hidden_states": self._hidden,
                "attention_mask": None,
                "context": self._context,
                "rotary_pos_emb": self._angle,
                "packed_seq_params": self._inputs.packed,
                "padding_mask": self._inputs.padding,
            },
        )
        return out, context if self._context is None else None

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """`run`, of which everything is kept that a backward needs."""
        with torch.enable_grad():
            self._out, self._made = self.run()
        return self._out, self._made

    def backward(
        self, gradient: Tensor, grad_context: Tensor | None, grad_angle: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Add the gradients of the parameters to their `main_grad`. Returns those of hidden states, first
        values and angles; of the last two the sums over this layer and those after it, which are given, and
        None if there are none.

        Frees what the forward kept.
        """
        out, made, self._out, self._made = self._out, self._made, None, None
        assert out is not None
        outputs, gradients = [out], [gradient]
        if made is not None and grad_context is not None:
            outputs.append(made)
            gradients.append(grad_context)
        for x, total in ((self._context, grad_context), (self._angle, grad_angle)):
            if x is not None:
                set_gradient_so_far(x, total)
        leaves = [self._hidden, *self._weights.values()]
        optional = [x for x in (self._context, self._angle) if x is not None and x.requires_grad]
        found = list(torch.autograd.grad(outputs, leaves + optional, gradients, allow_unused=True))
        del out, made, outputs
        for x in optional:
            own = found.pop(len(leaves))
            if x is self._context:
                grad_context = _sum(grad_context, own)
            else:
                grad_angle = _sum(grad_angle, own)
            set_gradient_so_far(x, None)
        for (name, weight), own in zip(self._weights.items(), found[1:], strict=True):
            if own is None:
                raise RuntimeError(f"the layer's parameter {name} has no gradient")
            if not weight.grad_added_to_main_grad:
                weight.main_grad.add_(own)
        return found[0], grad_context, grad_angle


def _leaves(layer: nn.Module) -> dict[str, Any]:
    """The layer's parameters as other leaves of the same memory, by name.

    megatron's DDP has hooks on its own, which were made on another stream; a capture must not wait for one.
    """
    leaves: dict[str, Any] = {}
    for name, parameter in layer.named_parameters():
        leaf: Any = nn.Parameter(parameter.detach())
        leaf.main_grad, leaf.grad_added_to_main_grad = cast(Any, parameter).main_grad, False
        if hasattr(parameter, "empty_main_grad"):
            leaf.empty_main_grad = parameter.empty_main_grad
        leaves[name] = leaf
    return leaves


def _sum(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    """`more` may be `total`, to which a kernel has added."""
    if total is None or more is None:
        return more if total is None else total
    return total if more.data_ptr() == total.data_ptr() else total + more
