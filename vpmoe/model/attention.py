"""Attention inside documents: the core attention that megatron-core's layers call, for packed rows.

A query attends to the keys of its own document up to itself. megatron's local attention does not support
packed sequences, and its other implementation needs Transformer Engine. So we implement it: FlashAttention
through torch's variable-length interface on the GPU, one product per document on the CPU. Neither
materialises a [positions, positions] mask.
"""

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention


def packed_seq_params_for(boundaries: Tensor, longest: int) -> PackedSeqParams:
    """Carry Batch.boundaries and Batch.longest through megatron's layers to `PackedAttention`.

    The format is not 'thd', because megatron would then apply RoPE document by document, with one
    synchronisation per document. Here every position has its own rotation, counted from the start of its
    document.
    """
    return PackedSeqParams(qkv_format="sbhd", cu_seqlens_q=boundaries, max_seqlen_q=longest)


class PackedAttention(MegatronModule):  # type: ignore[misc]
    """softmax(q·k/√width)·v, causal, inside each run of Batch.boundaries; without parameters or dropout."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__(config)

    def forward(
        self,
        query_SbhD: Tensor,
        key_SbgD: Tensor,
        value_SbgD: Tensor,
        _: None,
        *,
        packed_seq_params: PackedSeqParams,
        **__: Any,
    ) -> Tensor:
        """[S, b, heads·width] from queries [S, b, heads, width] and keys and values [S, b, groups, width]."""
        positions, rows = query_SbhD.shape[:2]
        query, key, value = (x.transpose(0, 1).flatten(0, 1) for x in (query_SbhD, key_SbgD, value_SbgD))
        boundaries, longest = packed_seq_params.cu_seqlens_q, packed_seq_params.max_seqlen_q
        if query.is_cuda:
            causal = (-1, 0)
            out = varlen_attn(
                query,
                key,
                value,
                boundaries,
                boundaries,
                longest,
                longest,
                window_size=causal,
                enable_gqa=True,
            )
            assert isinstance(out, Tensor), "no auxiliary results were requested"
        else:
            lengths = boundaries.diff().tolist()
            out = torch.cat(
                [
                    _document(*qkv)
                    for qkv in zip(*(torch.split(x, lengths) for x in (query, key, value)), strict=True)
                ]
            )
        return out.reshape(rows, positions, -1).transpose(0, 1)


def _document(query_nhD: Tensor, key_ngD: Tensor, value_ngD: Tensor) -> Tensor:
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query_nhD, key_ngD, value_ngD))
    return (
        scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        .squeeze(0)
        .transpose(0, 1)
    )
