"""The student's configuration for transformers and vLLM: the fields of config.json (model.hf_export) by
name."""

from transformers import AutoConfig
from transformers.models.qwen3 import Qwen3Config

from vpmoe.model.hf_export import MODEL_TYPE


class StudentConfig(Qwen3Config):  # type: ignore[misc]
    """Attention, norms and vocabulary are Qwen3's; the fields below describe the feed-forward layers.

    vpmoe.model.shapes explains them.
    """

    model_type = MODEL_TYPE
    first_k_dense_replace: int = 1
    n_routed_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 32
    shared_expert_intermediate_size: int = 64
    n_group: int = 4
    topk_group: int = 2
    routed_scaling_factor: float = 2.5


def register() -> None:
    """Register config.json's model_type with transformers. Idempotent."""
    AutoConfig.register(MODEL_TYPE, StudentConfig, exist_ok=True)
