"""The students' shapes: numbers without torch, for counting parameters and checking layouts.

The modules of a shape are in student.py, with the properties that all shapes share: QK-norm, RMSNorm, squared
ReLU without a gate, sigmoid scores, no biases, no dropout, embeddings not tied to the output.
"""

from dataclasses import dataclass

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
    recompute: bool = False
    """Recompute each layer's activations in the backward: a third more arithmetic, but only one stored tensor
    per layer."""

    @property
    def moe_layers(self) -> int:
        return self.layers - self.dense_layers

    def parameters(self) -> int:
        """Number of trainable parameters, without the expert biases, which the router updates itself."""
        attention = (
            self.hidden * self.head_width * (2 * self.heads + 2 * self.kv_heads)
            + 2 * self.head_width
            + self.hidden
        )
        dense = 2 * self.hidden * self.dense_width + self.hidden
        mixture = (
            2 * self.hidden * (self.experts * self.expert_width + self.shared_width)
            + self.hidden * self.experts
            + self.hidden
        )
        ends = 2 * self.vocabulary * self.hidden + self.hidden
        return self.layers * attention + self.dense_layers * dense + self.moe_layers * mixture + ends

    def expert_parameters(self) -> int:
        """Number of the parameters that expert parallelism divides."""
        return self.moe_layers * 2 * self.hidden * self.experts * self.expert_width

    def layer_bytes(self) -> int:
        """Bytes of a position that a mixture layer's forward computes in bf16, and the router in fp32.

        Without recomputation PyTorch keeps them for the backward. By counting tensors, so an estimate: for
        vpmoe-6b 44 kB, where 41 kB were measured (20 layers, sequences of 32,768 tokens).
        """
        attention = (self.heads + 2 * self.kv_heads) * self.head_width  # queries, keys and values
        attention += 2 * (self.heads + self.kv_heads) * self.head_width  # normalised; rotated, and the result
        experts = 2 * self.experts_per_token * (self.hidden + self.expert_width)
        return 2 * (6 * self.hidden + attention + experts + 2 * self.shared_width) + 12 * self.experts

    def saved_bytes(self) -> int:
        """Bytes of a position that a forward keeps for the backward."""
        return self.layers * (2 * self.hidden if self.recompute else self.layer_bytes())

    def cached_bytes(self) -> int:
        """Bytes of a position's keys and values in bf16."""
        return self.layers * 2 * 2 * self.kv_heads * self.head_width


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
            recompute=True,
        ),
        # Small enough for a laptop; the same code and the full vocabulary, so token ids are the real ones.
        Shape(
            name="tiny",
            layers=3,
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
        ),
    )
}
