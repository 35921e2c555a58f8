"""The students' shapes: numbers without torch, for counting parameters and checking layouts.

The modules of a shape are in student.py, with the properties that all shapes share: QK-norm, RMSNorm, squared
ReLU without a gate, sigmoid scores, no dropout, embeddings not tied to the output. What a shape can have or
lack are its parts (PARTS); those of SHAPES have LOCKED_PARTS.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vpmoe.api.memory import StudentSize
from vpmoe.data.vocabulary import VOCABULARY_SIZE


@dataclass(frozen=True)
class Shape:
    """One architecture: one or more dense layers, then mixture-of-experts layers, all with grouped-query
    attention."""

    name: str
    layers: int
    """Number of layers, dense ones included."""
    dense_layers: int
    """Number of dense layers, which come first. Their feed-forward part is `dense_width` wide and has no
    router."""
    hidden: int
    heads: int
    kv_heads: int
    head_width: int
    dense_width: int
    experts: int
    experts_per_token: int
    expert_width: int
    shared_width: int
    """Width of the shared expert, which every token of a mixture layer passes through."""
    expert_groups: int
    """The router first chooses `expert_groups_per_token` groups by their best experts' scores, then experts
    inside them."""
    expert_groups_per_token: int
    vocabulary: int = VOCABULARY_SIZE
    routed_scaling: float = 2.5
    """The chosen experts' scores are normalised to a sum of 1 and multiplied by this."""
    bias_update_rate: float = 1e-3
    """Change of an expert's selection bias per step: up if the expert is under-used, down if over-used."""
    aux_coefficient: float = 1e-4
    """Weight of the balance loss of each packed row; small, because the bias does the balancing."""
    rope_base: int = 10_000
    norm_epsilon: float = 1e-6
    init_std: float = 0.02
    """Initial standard deviation of every matrix; divided by √(2·layers) for those that write to the residual
    stream."""
    embedding_std: float = 0.02
    """Initial standard deviation of the embeddings. If it is small, the sum of many layers' outputs outweighs
    the token's embedding, and the routers choose the same few experts for every token before anything is
    learned (see also arXiv 2312.16903)."""
    global_every: int | None = None
    """Every n-th layer is global, the others are local: 4 makes layers 4, 8, … global. None: all are local.
    The window, the tensor product and ALiBi depend on it."""
    local_window: int | None = None
    """Positions that a query of a local layer attends to, itself included, inside its document. None: all
    before it. A sampler keeps the keys and values of that many positions."""
    tensor_product_ranks: tuple[int, int] | None = None
    """Ranks of the tensor products that are a local layer's queries, and its keys and values (TPA): all heads
    of a position mix so many vectors. None: linear projections, as in global layers."""
    learned_frequencies: bool = False
    """Learn the frequencies of the rotation, one set for all layers that rotate; they start at those of
    `rope_base`. False: they stay there."""
    alibi: bool = False
    """Positions in global layers are a bias that falls linearly with the distance, with a fixed slope per
    head. False: they rotate queries and keys, as in local layers."""
    softmax_offset: bool = False
    """A learned number s per query head and layer: exp(s) is added to the softmax's denominator, so that a
    head can attend to nothing."""
    value_residual: bool = False
    """Layers after the first mix their values with the first layer's, in a learned proportion per layer."""
    linear_biases: bool = False
    """Biases of all linear maps but the router's: projections of attention (of a tensor product: on its
    queries, keys and values), feed-forward layers, experts."""
    router_bias: bool = False
    """A learned bias of the router's logits, before the sigmoid; the selection bias is another. The locked
    number of parameters, 6,029,894,927, has none: with it there are 20,224 more."""

    @property
    def moe_layers(self) -> int:
        return self.layers - self.dense_layers

    @property
    def global_layers(self) -> int:
        return self.layers // self.global_every if self.global_every else 0

    def is_global(self, layer: int) -> bool:
        """Whether `layer`, counted from 0, is a global one."""
        return self.global_every is not None and (layer + 1) % self.global_every == 0

    def window(self, layer: int) -> int | None:
        """Positions that a query of this layer attends to; None without a limit."""
        return None if self.is_global(layer) else self.local_window

    def ranks(self, layer: int) -> tuple[int, int] | None:
        """Ranks of this layer's tensor products; None if its projections are linear."""
        return None if self.is_global(layer) else self.tensor_product_ranks

    def slopes(self, layer: int) -> list[float] | None:
        """ALiBi's slope of each query head, as in arXiv 2108.12409: 2^(−8/heads), 2^(−16/heads), … None if
        the layer rotates."""
        if not (self.alibi and self.is_global(layer)):
            return None
        return [2.0 ** (-8 * (head + 1) / self.heads) for head in range(self.heads)]

    @property
    def parts(self) -> dict[str, Any]:
        """The parts that are on, as JSON has them: field of PARTS → value."""
        values = {name: getattr(self, name) for name in PARTS if getattr(self, name) != getattr(Shape, name)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @property
    def qkv_width(self) -> int:
        """Width of queries, keys and values of a position together."""
        return (self.heads + 2 * self.kv_heads) * self.head_width

    @property
    def factors_width(self) -> int:
        """Width of what a tensor product is made of: of each head its mixture of `rank` vectors, and the
        vectors; for queries, keys and values."""
        query_rank, kv_rank = self.tensor_product_ranks or (0, 0)
        return query_rank * (self.heads + self.head_width) + 2 * kv_rank * (self.kv_heads + self.head_width)

    def parameters_by_part(self) -> dict[str, int]:
        """Number of trainable parameters by part, without the expert biases, which the router updates
        itself."""
        products = 0 if self.tensor_product_ranks is None else self.layers - self.global_layers
        projections = self.hidden * (
            (self.layers - products) * self.qkv_width
            + products * self.factors_width
            + self.layers * self.heads * self.head_width
        )
        rows = self.expert_width + self.hidden  # outputs of an expert's two matrices
        biases = (
            self.layers * (self.qkv_width + self.hidden)
            + self.dense_layers * (self.dense_width + self.hidden)
            + self.moe_layers * (self.shared_width + self.hidden)
        )
        return {
            "embeddings": self.vocabulary * self.hidden,
            "output": self.vocabulary * self.hidden,
            "norms": self.layers * (2 * self.hidden + 2 * self.head_width) + self.hidden,
            "attention": projections,
            "dense feed-forward": self.dense_layers * 2 * self.hidden * self.dense_width,
            "routers": self.moe_layers * self.hidden * self.experts,
            "experts": self.moe_layers * 2 * self.hidden * self.experts * self.expert_width,
            "shared experts": self.moe_layers * 2 * self.hidden * self.shared_width,
            "linear biases": biases * self.linear_biases,
            "experts' biases": self.moe_layers * self.experts * rows * self.linear_biases,
            "routers' biases": self.moe_layers * self.experts * self.router_bias,
            "rotation frequencies": self.head_width // 2 * self.learned_frequencies,
            "softmax offsets": self.layers * self.heads * self.softmax_offset,
            "value residual": (self.layers - 1) * self.value_residual,
        }

    def parameters(self) -> int:
        """Number of trainable parameters, without the expert biases, which the router updates itself."""
        return sum(self.parameters_by_part().values())

    def expert_parameters(self) -> int:
        """Number of the parameters that expert parallelism divides."""
        by_part = self.parameters_by_part()
        return by_part["experts"] + by_part["experts' biases"]

    def active_parameters(self) -> int:
        """Number of the parameters that a token passes through; all of embeddings and output counts."""
        unused = self.experts - self.experts_per_token
        return self.parameters() - self.expert_parameters() // self.experts * unused

    def kept_bytes(self, layer: int) -> int:
        """Bytes of a position that a forward on a GPU keeps of `layer` (from 0) for the backward, without
        recomputation. H is the hidden width, D a head's, K a token's experts, W an expert's width.

        A bf16 number has two bytes. What is kept, and by which autograd function:
          norm_gpu: the residual stream before each of the two parts, 2·H
          linear_gpu, router_gpu: what the two norms return, as input of the products, 2·H
          tensor_product_gpu: the factors of a tensor product, in a local layer
          qk_norm_gpu: linear projections: queries and keys before their norms, values before they are mixed
          attention_gpu: queries, keys, values, output; in four bytes a head's log of the sum
          a dense layer's and the shared expert's feed-forward (activation_gpu): before and after the square
          router_gpu: logits in fp32, and in four bytes a number each choice's expert
          experts_gpu: a choice's weight in fp32, its place in the sorted order and back in int64, and its
            row after the first product, W
        Sums of residuals, biases, rows that enter or leave the experts and their activations are not kept.
        With expert parallelism there are shared_bytes too.
        """
        projected = self.qkv_width if self.ranks(layer) is None else self.factors_width
        numbers = 4 * self.hidden + projected + self.qkv_width + self.heads * self.head_width
        found = 2 * numbers + 4 * self.heads
        if layer < self.dense_layers:
            return found + 2 * 2 * self.dense_width
        choice = 2 * self.expert_width + 4 + 4 + 8 + 8
        return found + 2 * 2 * self.shared_width + 4 * self.experts + self.experts_per_token * choice

    def mean_kept_bytes(self) -> int:
        """kept_bytes of the mean layer, rounded up."""
        return -(-sum(map(self.kept_bytes, range(self.layers))) // self.layers)

    def stem_bytes(self) -> int:
        """Bytes of a position that are kept once, however many layers there are and are recomputed: the first
        layer's values; the rotation's angles in fp32; the input of the last norm, what it returns, and the
        gradient of that, which the loss head computes in the forward; and the batch itself."""
        # tokens, positions, targets and their places; where runs begin and end; span and padding; log p
        batch = 4 * 8 + 2 * 4 + 1 + 1 + 4
        first_values = 2 * self.kv_heads * self.head_width * self.value_residual
        return first_values + 4 * self.head_width + 3 * 2 * self.hidden + batch

    def backward_bytes(self) -> int:
        """Bytes of a position that the backward of a mixture layer holds at the same time beside what the
        forward kept: gradients of a choice's row after the first product, of its input and of its weight
        in fp32, and of the residual stream and what was added to it."""
        choice = 2 * (self.hidden + self.expert_width) + 4
        return self.experts_per_token * choice + 2 * 4 * self.hidden

    def backward_weights(self) -> int:
        """Bytes of the gradients of a mixture layer's two stacks of matrices in bf16. Beside fp32 buffers
        they are memory that only megatron's hook sees (main_gradient.py)."""
        return 2 * 2 * self.experts * self.hidden * self.expert_width

    def graphed_bytes(self) -> int:
        """Bytes of a position that are inputs of the layers' CUDA graphs: hidden states of the first layer,
        gradient of the last one's, the rotation's angles in fp32, padding, begin and end of the run."""
        return 2 * 2 * self.hidden + 4 * self.head_width + 1 + 2 * 4

    def shared_bytes(self) -> int:
        """Bytes that a mixture layer keeps of a position of another rank that shares its experts: of a choice
        its weight, its place in the sorted order and back, and its row after the first product (experts_gpu;
        the row may be any rank's, so there is room for it on all). Gathered tokens are not kept."""
        return self.experts_per_token * (2 * self.expert_width + 4 + 8 + 8)

    def shared_backward_bytes(self) -> int:
        """Bytes of such a position that the backward holds beside that: gradients of a choice as in
        backward_bytes, and of the token."""
        choice = 2 * (self.hidden + self.expert_width) + 4
        return self.experts_per_token * choice + 2 * self.hidden

    def size(self) -> StudentSize:
        """What the arithmetic of memory needs of the shape."""
        return StudentSize(
            parameters=self.parameters(),
            expert_parameters=self.expert_parameters(),
            layers=self.layers,
            hidden=self.hidden,
            kept=self.mean_kept_bytes(),
            stem=self.stem_bytes(),
            backward=self.backward_bytes(),
            backward_weights=self.backward_weights(),
            graphed=self.graphed_bytes(),
            shared=self.shared_bytes(),
            shared_backward=self.shared_backward_bytes(),
            cached=self.cached_bytes(),
            window=self.window_bytes(),
        )

    def cached_bytes(self) -> int:
        """Bytes of a position's keys and values in bf16, in the layers that keep those of all positions."""
        layers = self.layers if self.local_window is None else self.global_layers
        return layers * 2 * 2 * self.kv_heads * self.head_width

    def window_bytes(self) -> int:
        """Bytes of a sequence's keys and values in bf16 in the layers that keep those of a window only."""
        if self.local_window is None:
            return 0
        local_layers = self.layers - self.global_layers
        return local_layers * self.local_window * 2 * 2 * self.kv_heads * self.head_width


LOCKED_PARTS: dict[str, Any] = {
    "global_every": 4,
    "local_window": 128,
    "tensor_product_ranks": (4, 2),
    "learned_frequencies": True,
    "alibi": True,
    "softmax_offset": True,
    "value_residual": True,
    "linear_biases": True,
    "router_bias": False,
}
"""The parts of the registered shapes. Each can be switched alone (dataclasses.replace)."""

PARTS = tuple(LOCKED_PARTS)
"""Fields of a Shape that are its parts; a student without any has their defaults."""


def other_parts(found: Mapping[str, Any], shape: Shape) -> str | None:
    """How a student with the parts `found`, as in Shape.parts, differs from one of `shape`; None if it does
    not."""
    own = shape.parts
    differing = [name for name in PARTS if found.get(name) != own.get(name)]
    differing += sorted({*found} - {*PARTS})
    if not differing:
        return None
    listed = ", ".join(
        f"{name} ({found.get(name, 'off')}, here {own.get(name, 'off')})" for name in differing
    )
    return f"its student has other parts than {shape.name}: {listed}"


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            name="vpmoe-6b",
            layers=80,
            dense_layers=1,
            hidden=1024,
            heads=8,
            kv_heads=2,
            head_width=128,
            dense_width=4096,
            experts=256,
            experts_per_token=4,
            expert_width=128,
            shared_width=512,
            expert_groups=8,
            expert_groups_per_token=4,
            embedding_std=1.0,
            **LOCKED_PARTS,
        ),
        # Small enough for a laptop; the same code and the full vocabulary, so token ids are the real ones.
        # Layer 4 is global, and a local one follows it.
        Shape(
            name="tiny",
            layers=5,
            dense_layers=1,
            hidden=64,
            heads=4,
            kv_heads=2,
            head_width=16,
            dense_width=256,
            experts=8,
            experts_per_token=2,
            expert_width=32,
            shared_width=64,
            expert_groups=4,
            expert_groups_per_token=2,
            **LOCKED_PARTS,
        ),
    )
}
