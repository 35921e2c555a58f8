"""The student as an out-of-tree vLLM model: vLLM's attention, embeddings and logits, and the projections and
feed-forward layers of modeling_vpmoe.py.

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
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend

from vpmoe.model.configuration_vpmoe import VpmoeConfig
from vpmoe.model.modeling_vpmoe import Projections, feed_forward, rotation

MIN_HEAD_DIM = 32
"""Smallest head size of vLLM's kernels. The heads of `tiny` are padded with zeros, which change no
product."""


class SelfAttention(Projections):
    """vLLM's attention of a layer: its cache of keys and values, of a window's positions in local layers."""

    def __init__(self, config: VpmoeConfig, cache: CacheConfig | None, number: int, prefix: str) -> None:
        super().__init__(config, number)
        self.padding = max(MIN_HEAD_DIM - self.width, 0)
        sinks = {} if self.softmax_offset is None else {"sinks": self.softmax_offset.data}
        self.attn = Attention(
            self.heads,
            self.width + self.padding,
            self.width**-0.5,
            num_kv_heads=self.groups,
            alibi_slopes=self.slopes,
            cache_config=cache,
            per_layer_sliding_window=self.window,
            prefix=f"{prefix}.attn",
            attn_backend=_attention_backend(self.slopes is not None, self.softmax_offset is not None),
            **sinks,
        )

    def forward(
        self, hidden_NH: Tensor, cos_N1D: Tensor, sin_N1D: Tensor, first_value_NgD: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(output [N, H], values [N, groups, D])."""
        query, key, value = self.project(hidden_NH, cos_N1D, sin_N1D, first_value_NgD)
        return self.attend(query, key, value), value

    def attend(self, query_NhD: Tensor, key_NgD: Tensor, value_NgD: Tensor) -> Tensor:
        """Output [N, H] of attention and its projection."""
        parts = [query_NhD, key_NgD, value_NgD]
        if self.padding:  # without any, `pad` would copy
            parts = [pad(x, (0, self.padding)) for x in parts]
        out = self.attn(*(x.flatten(1) for x in parts))
        if self.padding:
            out = out.unflatten(1, (-1, self.width + self.padding))[..., : self.width].flatten(1)
        projected: Tensor = self.o_proj(out)
        return projected


def _attention_backend(alibi: bool, offset: bool) -> type[AttentionBackend] | None:
    """vLLM's backend for a layer; None where vLLM's own choice is right.

    On GPUs that choice is FlashAttention 3, which has no ALiBi and rounds the offsets to bf16.
    """
    if not current_platform.is_cuda() or not (alibi or offset):
        return None
    from vpmoe.inference import gpu_attention  # its kernels are Triton's, which needs a GPU

    if not alibi:
        window: type[AttentionBackend] = gpu_attention.WindowBackend
        return window
    gpu_attention.register()
    exact: type[AttentionBackend] = gpu_attention.ExactAlibiBackend
    return exact


class DecoderLayer(nn.Module):
    def __init__(self, config: VpmoeConfig, cache: CacheConfig | None, number: int, prefix: str) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = SelfAttention(config, cache, number, f"{prefix}.self_attn")
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = feed_forward(config, number)

    def forward(
        self, hidden_NH: Tensor, cos_N1D: Tensor, sin_N1D: Tensor, first_value_NgD: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(hidden states [N, H], values [N, groups, D]): the first layer's values are for those after it."""
        out, value = self.self_attn(self.input_layernorm(hidden_NH), cos_N1D, sin_N1D, first_value_NgD)
        hidden_NH = hidden_NH + out
        return hidden_NH + self.mlp(self.post_attention_layernorm(hidden_NH)), value


class Decoder(nn.Module):
    def __init__(self, config: VpmoeConfig, cache: CacheConfig | None, prefix: str) -> None:
        super().__init__()
        self.config = config
        self.log_frequency: nn.Parameter | None = None
        if config.learned_frequencies:
            self.log_frequency = nn.Parameter(torch.empty(config.head_dim // 2, dtype=torch.float32))
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed_tokens"
        )
        self.layers = nn.ModuleList(
            DecoderLayer(config, cache, number, f"{prefix}.layers.{number}")
            for number in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_NH: Tensor, positions_N: Tensor) -> Tensor:
        if hidden_NH.is_cuda:
            from vpmoe.inference import gpu_student  # its kernels are Triton's, which needs a GPU

            return gpu_student.forward(self, hidden_NH, positions_N)
        cos_N1D, sin_N1D = (
            part.to(hidden_NH.dtype) for part in rotation(positions_N, self.config, self.log_frequency)
        )
        first_value_NgD: Tensor | None = None
        for layer in self.layers:
            hidden_NH, value_NgD = layer(hidden_NH, cos_N1D, sin_N1D, first_value_NgD)
            first_value_NgD = value_NgD if first_value_NgD is None else first_value_NgD
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
