"""The student's configuration for transformers and vLLM: the fields of config.json (hf_export.py) by name.

This file is copied into every exported model folder, so it imports nothing but transformers.
"""

from transformers.models.qwen3 import Qwen3Config


class VpmoeConfig(Qwen3Config):  # type: ignore[misc]
    """Attention, norms and vocabulary are Qwen3's; the fields below describe the feed-forward layers."""

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
