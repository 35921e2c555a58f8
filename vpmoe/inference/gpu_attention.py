"""The student's attention in vLLM on a GPU: vLLM's Triton attention, with a kernel of our own where many
sequences decode, with buffers for padded heads, and, in global layers, with exact ALiBi.

vLLM 0.32's Triton kernel adds slope · (key − first query of the step) to the logits of all queries that a
sequence has in a step. That is ALiBi up to a number per query, which a softmax without an offset cancels, and
with one does not. For a sequence's only query the number is 0. So where a step holds more than one query of a
sequence (prompts), each query becomes a sequence of its own: the keys before it, its own included, in the
same blocks of the cache. Steps that only decode are left as they are.
"""

from dataclasses import replace
from typing import Any

import torch
from vllm.utils.math_utils import next_power_of_2
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadata,
    TritonAttentionMetadataBuilder,
)

from vpmoe.inference.decode_attention import decode_attention

MANY = 64
"""Sequences from which on decode_attention.py computes a step. With fewer, vLLM's kernel also splits the keys
of a sequence (as many as two groups need to have a program for each of an H100's processors)."""


def one_query_each(metadata: TritonAttentionMetadata) -> TritonAttentionMetadata:
    """The metadata of the same attention with every query in a sequence of its own."""
    queries = metadata.num_actual_tokens
    ends = metadata.query_start_loc[1 : len(metadata.seq_lens) + 1]
    query = torch.arange(queries + 1, dtype=torch.int32, device=ends.device)
    # int32 of both: another dtype would be converted first. Padding after the last sequence belongs to it.
    sequence = torch.searchsorted(ends, query[:-1], right=True).clamp_(max=len(ends) - 1)
    after = (ends[sequence] - 1 - query[:-1]).clamp_(min=0)
    return replace(
        metadata,
        max_query_len=1,
        query_start_loc=query,
        seq_lens=metadata.seq_lens[sequence] - after,
        block_table=metadata.block_table[sequence],
    )


class MetadataBuilder(TritonAttentionMetadataBuilder):  # type: ignore[misc]
    """vLLM's, with a buffer for partial outputs that is as wide as the layers' heads.

    vLLM takes the width from the model's configuration, and vllm_model.py pads the heads of `tiny`: its
    kernel would write past the end of the buffer.
    """

    softmax_segm_output: torch.Tensor
    """[sequences, heads, segments, width]."""

    def __init__(self, kv_cache_spec: Any, *others: Any) -> None:
        super().__init__(kv_cache_spec, *others)
        width = next_power_of_2(kv_cache_spec.head_size)
        self.softmax_segm_output = self.softmax_segm_output.new_empty(
            *self.softmax_segm_output.shape[:-1], width
        )


class Implementation(TritonAttentionImpl):  # type: ignore[misc]
    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TritonAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        metadata = attn_metadata
        if metadata is None or metadata.max_query_len > 1 or len(metadata.seq_lens) < MANY:
            out: torch.Tensor = super().forward(
                *(layer, query, key, value, kv_cache, metadata, output, output_scale, output_block_scale)
            )
            return out
        sequences = metadata.num_actual_tokens
        decode_attention(
            query[:sequences],
            kv_cache,
            metadata.block_table,
            metadata.seq_lens,
            scale=self.scale,
            window=self.sliding_window[0] + 1 if self.sliding_window[0] >= 0 else None,
            slope_h=self.alibi_slopes,
            offset_h=self.sinks,
            out=output[:sequences],
        )
        return output


class WindowBackend(TritonAttentionBackend):  # type: ignore[misc]
    """Of local layers."""

    @staticmethod
    def get_impl_cls() -> type[Any]:
        return Implementation

    @staticmethod
    def get_builder_cls() -> type[Any]:
        return MetadataBuilder


class ExactAlibiMetadataBuilder(MetadataBuilder):
    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> TritonAttentionMetadata:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        return metadata if metadata.max_query_len == 1 else one_query_each(metadata)


class ExactAlibiBackend(TritonAttentionBackend):  # type: ignore[misc]
    """Of global layers."""

    @staticmethod
    def get_name() -> str:
        """vLLM's name for a third-party backend."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[Any]:
        return Implementation

    @staticmethod
    def get_builder_cls() -> type[Any]:
        return ExactAlibiMetadataBuilder


def register() -> None:
    """Register the backend of global layers with vLLM, which knows the backends of its layers by name.
    Idempotent."""
    register_backend(AttentionBackendEnum.CUSTOM, f"{__name__}.{ExactAlibiBackend.__name__}")
