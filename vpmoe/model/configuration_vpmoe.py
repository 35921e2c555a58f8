"""The student's configuration for transformers and vLLM: the fields of config.json (hf_export.py) by name.

This file is copied into every exported model folder, so it imports nothing but transformers.
"""

from transformers.models.qwen3 import Qwen3Config


class VpmoeConfig(Qwen3Config):  # type: ignore[misc]
    """Norms and vocabulary are Qwen3's; the fields below describe the feed-forward layers, and the parts of
    the architecture that a student can have or lack. Without any, attention is Qwen3's too."""

    model_type = "vpmoe"
    first_k_dense_replace: int = 1
    """Number of dense layers, which come first; the others are mixtures of experts."""
    n_routed_experts: int = 8
    num_experts_per_tok: int = 2
    """Experts that each token is sent to."""
    moe_intermediate_size: int = 32
    """Width of an expert."""
    shared_expert_intermediate_size: int = 64
    """Width of the expert that every token passes through."""
    n_group: int = 4
    """Groups of experts. The router chooses `topk_group` groups first, then experts inside them."""
    topk_group: int = 2
    routed_scaling_factor: float = 2.5
    """The chosen experts' scores are normalised to a sum of 1 and multiplied by this."""
    global_every: int | None = None
    """Every n-th layer is global, the others are local. None: all are local."""
    local_window: int | None = None
    """Positions that a query of a local layer attends to, itself included. None: all before it."""
    tensor_product_ranks: list[int] | None = None
    """Ranks of the tensor products that are a local layer's queries, and its keys and values. None: linear
    projections."""
    learned_frequencies: bool = False
    """Whether the frequencies of the rotation are parameters. False: those of rope_theta."""
    alibi: bool = False
    """Whether global layers have ALiBi's bias instead of rotation."""
    softmax_offset: bool = False
    """Whether exp of a number per head is added to the softmax's denominator."""
    value_residual: bool = False
    """Whether layers after the first mix their values with the first layer's."""
    linear_biases: bool = False
    """Whether all linear maps but the router's have biases."""
    router_bias: bool = False
    """Whether the router's logits have a bias, before the sigmoid."""

    def is_global(self, layer: int) -> bool:
        """Whether `layer`, counted from 0, is a global one."""
        return self.global_every is not None and (layer + 1) % self.global_every == 0

    def window(self, layer: int) -> int | None:
        """Positions that a query of this layer attends to; None without a limit."""
        return None if self.is_global(layer) else self.local_window

    def ranks(self, layer: int) -> tuple[int, int] | None:
        """Ranks of this layer's tensor products; None if its projections are linear."""
        if self.is_global(layer) or self.tensor_product_ranks is None:
            return None
        query, key_value = self.tensor_product_ranks
        return query, key_value

    def slopes(self, layer: int) -> list[float] | None:
        """ALiBi's slope of each query head; None if the layer rotates."""
        if not (self.alibi and self.is_global(layer)):
            return None
        heads: int = self.num_attention_heads
        return [2.0 ** (-8 * (head + 1) / heads) for head in range(heads)]
