"""The student as an out-of-tree vLLM model: vLLM's attention, embeddings and logits, and the feed-forward
layers of modeling_vpmoe.py.

A model runs on one device. The student fits, and more throughput comes from more engine processes. vLLM's
fused experts support squared ReLU without a gate on GPUs only; modeling_vpmoe.feed_forward is the place to
choose them. On the CPU vLLM repacks the weights of its own linear layers and experts when it loads them, and
a later load then silently has no effect; the plain torch layers used here do not have this problem.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AutoConfig
from vllm import ModelRegistry
from vllm.config import CacheConfig, VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from vpmoe.model.configuration_vpmoe import VpmoeConfig
from vpmoe.model.modeling_vpmoe import feed_forward

MIN_HEAD_DIM = 32
"""Smallest head size of vLLM's kernels. The heads of `tiny` are padded with zeros, which change no
product."""


class SelfAttention(nn.Module):
    def __init__(self, config: VpmoeConfig, cache: CacheConfig | None, prefix: str) -> None:
        super().__init__()
        self.width = config.head_dim
        self.padding = max(MIN_HEAD_DIM - self.width, 0)
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(config.hidden_size, heads * self.width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, groups * self.width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, groups * self.width, bias=False)
        self.o_proj = nn.Linear(heads * self.width, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(self.width, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(self.width, eps=config.rms_norm_eps)
        self.attn = Attention(
            heads,
            self.width + self.padding,
            self.width**-0.5,
            num_kv_heads=groups,
            cache_config=cache,
            prefix=f"{prefix}.attn",
        )

    def forward(self, hidden_NH: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> Tensor:
        query, key, value = (
            project(hidden_NH).unflatten(1, (-1, self.width))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = (_apply_rotary(x, cos_ND, sin_ND) for x in (self.q_norm(query), self.k_norm(key)))
        out = self.attn(*(pad(x, (0, self.padding)).flatten(1) for x in (query, key, value)))
        heads = out.unflatten(1, (-1, self.width + self.padding))[..., : self.width]
        projected: Tensor = self.o_proj(heads.flatten(1))
        return projected


def _apply_rotary(x_NhD: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> Tensor:
    first, second = x_NhD.chunk(2, dim=-1)
    return x_NhD * cos_ND.unsqueeze(1) + torch.cat([-second, first], dim=-1) * sin_ND.unsqueeze(1)


class DecoderLayer(nn.Module):
    def __init__(self, config: VpmoeConfig, cache: CacheConfig | None, number: int, prefix: str) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = SelfAttention(config, cache, f"{prefix}.self_attn")
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = feed_forward(config, number)

    def forward(self, hidden_NH: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> Tensor:
        hidden_NH = hidden_NH + self.self_attn(self.input_layernorm(hidden_NH), cos_ND, sin_ND)
        out: Tensor = hidden_NH + self.mlp(self.post_attention_layernorm(hidden_NH))
        return out


class Decoder(nn.Module):
    def __init__(self, config: VpmoeConfig, cache: CacheConfig | None, prefix: str) -> None:
        super().__init__()
        self.width, self.base = config.head_dim, config.rope_parameters["rope_theta"]
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed_tokens"
        )
        self.layers = nn.ModuleList(
            DecoderLayer(config, cache, number, f"{prefix}.layers.{number}")
            for number in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_NH: Tensor, positions_N: Tensor) -> Tensor:
        exponent = torch.arange(0, self.width, 2, dtype=torch.float32, device=positions_N.device) / self.width
        angle = positions_N.float().unsqueeze(1) * self.base**-exponent
        cos_ND, sin_ND = (torch.cat([x, x], dim=1).to(hidden_NH.dtype) for x in (angle.cos(), angle.sin()))
        for layer in self.layers:
            hidden_NH = layer(hidden_NH, cos_ND, sin_ND)
        out: Tensor = self.norm(hidden_NH)
        return out


class VpmoeForCausalLM(nn.Module):
    """Implements vLLM's VllmModelForTextGeneration. Raises ValueError if vLLM runs on several devices."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        ranks = vllm_config.parallel_config.world_size
        if ranks != 1:
            raise ValueError(
                f"the student runs on one device, and vLLM was started on {ranks}. Set its parallel sizes "
                "to 1."
            )
        config: VpmoeConfig = vllm_config.model_config.hf_config
        self.model = Decoder(config, vllm_config.cache_config, f"{prefix}.model" if prefix else "model")
        self.lm_head = ParallelLMHead(
            config.vocab_size, config.hidden_size, prefix=f"{prefix}.lm_head" if prefix else "lm_head"
        )
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        embedded: Tensor = self.model.embed_tokens(input_ids)
        return embedded

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [N, H] of the step's tokens; `positions` [N] count within each sequence."""
        out: Tensor = self.model(
            self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds, positions
        )
        return out

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        logits: Tensor | None = self.logits_processor(self.lm_head, hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copy all weights by name.

        Raises ValueError with the name if one is missing, unknown or of another shape.
        """
        parameters = dict(self.named_parameters())
        loaded = set()
        for name, tensor in weights:
            if name not in parameters:
                raise ValueError(f"{name} is not a part of this student.")
            if parameters[name].shape != tensor.shape:
                raise ValueError(f"{name} is {list(tensor.shape)}, wanted {list(parameters[name].shape)}.")
            parameters[name].data.copy_(tensor)
            loaded.add(name)
        if missing := sorted(set(parameters) - loaded):
            raise ValueError(f"{missing[0]} is missing.")
        # On the CPU vLLM computes logits with a repacked copy of the weight, which a later load would not
        # update.
        self.lm_head.quant_method.process_weights_after_loading(self.lm_head)
        return loaded


def register() -> None:
    """Register the student with vLLM. Idempotent.

    Call it in the process that creates the engine. If this package is installed, vLLM's plugin loader calls
    it.
    """
    AutoConfig.register(VpmoeConfig.model_type, VpmoeConfig, exist_ok=True)
    architecture = VpmoeForCausalLM.__name__
    if architecture not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(architecture, VpmoeForCausalLM)
