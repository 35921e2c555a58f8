"""The students' shapes: numbers without torch, for counting parameters and checking layouts.

student.py makes modules of a shape. It also has what all shapes share: QK-norm, RMSNorm, squared ReLU without
a gate, sigmoid scores, no biases, no dropout, embeddings not tied to the output.
"""

from dataclasses import dataclass

from vpmoe.data.vocabulary import VOCABULARY_SIZE


@dataclass(frozen=True)
class Shape:
    """One architecture: a dense layer or more, then mixture-of-experts layers, all with grouped-query
    attention."""

    name: str
    layers: int
    """Number of layers, dense ones included."""
    dense_layers: int
    """The first ones; their feed-forward part is `dense_width` wide and has no router."""
    hidden: int
    heads: int
    kv_heads: int
    head_width: int
    dense_width: int
    experts: int
    experts_per_token: int
    expert_width: int
    shared_width: int
    """Width of the expert that every token of a mixture layer passes."""
    expert_groups: int
    """The router first chooses `expert_groups_per_token` groups by their best experts' scores, then experts
    inside them."""
    expert_groups_per_token: int
    vocabulary: int = VOCABULARY_SIZE
    routed_scaling: float = 2.5
    """The chosen experts' scores are normalised to a sum of 1 and multiplied by this."""
    bias_update_rate: float = 1e-3
    """How far an expert's selection bias moves a step, up for the under-used and down for the over-used."""
    aux_coefficient: float = 1e-4
    """Weight of the balance loss of each packed row; kept small, the bias does the balancing."""
    rope_base: int = 10_000
    norm_epsilon: float = 1e-6
    init_std: float = 0.02
    """Standard deviation of every matrix at the start; those that write to the residual stream get it over
    √(2·layers)."""
    embedding_std: float = 0.02
    """Standard deviation of the embeddings. If it is small, the sum that many layers add drowns the token,
    and the routers choose the same few experts for every token before anything is learned (see also arXiv
    2312.16903)."""
    recompute: bool = False
    """Compute each layer's activations again in the backward: a third more arithmetic for one stored tensor a
    layer."""

    @property
    def moe_layers(self) -> int:
        return self.layers - self.dense_layers

    def parameters(self) -> int:
        """All trainable numbers. Expert biases are not among them: the router moves those itself."""
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
        # The same code, small enough for a laptop. The vocabulary is whole, so token ids are the real ones.
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
