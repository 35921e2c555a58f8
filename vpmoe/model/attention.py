"""Attention inside documents, for packed rows, with an optional window, ALiBi and a softmax offset.

A query attends to the keys of its own document up to itself. megatron's local attention does not support
packed sequences, and its other implementation needs Transformer Engine. So we implement it: on the GPU,
FlashAttention through torch's variable-length interface, or attention_gpu.py's kernels with any of the three;
on the CPU, one product per document, or per block of queries.
"""

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

QUERIES = 256
"""Queries of one block on the CPU, which has products with QUERIES + window keys at most."""


@dataclass
class PackedRuns(PackedSeqParams):  # type: ignore[misc]
    """megatron's description of packed rows, and Batch.runs."""

    runs: Tensor | None = None


def packed_seq_params_for(boundaries: Tensor | None, longest: int, runs: Tensor | None = None) -> PackedRuns:
    """Carry a batch's boundaries, longest and runs through megatron's layers to `PackedAttention`: see
    `packed_attention` for which of them it needs.

    The format is not 'thd', because megatron would then apply RoPE document by document, with one
    synchronisation per document. Here every position has its own rotation, counted from the start of its
    document.
    """
    return PackedRuns(qkv_format="sbhd", cu_seqlens_q=boundaries, max_seqlen_q=longest, runs=runs)


class PackedAttention(MegatronModule):  # type: ignore[misc]
    """`packed_attention` of megatron's tensors, without dropout. Its only parameter is the softmax `offset`
    [heads], in fp32 for every dtype of the others; None without one."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        window: int | None = None,
        slopes: list[float] | None = None,
        offset: bool = False,
    ) -> None:
        super().__init__(config)
        place = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.window = window
        self.slopes_h = None if slopes is None else torch.tensor(slopes, dtype=torch.float32, device=place)
        self.offset: nn.Parameter | None = None
        if offset:
            heads = config.num_attention_heads
            self.offset = nn.Parameter(torch.empty(heads, dtype=torch.float32, device=place))

    def forward(
        self,
        query_SbhD: Tensor,
        key_SbgD: Tensor,
        value_SbgD: Tensor,
        _: None,
        *,
        packed_seq_params: PackedRuns,
    ) -> Tensor:
        """[S, b, heads·width] from queries [S, b, heads, width] and keys and values [S, b, groups, width]."""
        positions, rows = query_SbhD.shape[:2]
        query, key, value = (x.transpose(0, 1).flatten(0, 1) for x in (query_SbhD, key_SbgD, value_SbgD))
        out = packed_attention(
            query,
            key,
            value,
            packed_seq_params.cu_seqlens_q,
            packed_seq_params.max_seqlen_q,
            packed_seq_params.runs,
            window=self.window,
            slopes_h=self.slopes_h,
            offset_h=self.offset,
        )
        return out.reshape(rows, positions, -1).transpose(0, 1)


def packed_attention(
    query_nhD: Tensor,
    key_ngD: Tensor,
    value_ngD: Tensor,
    boundaries: Tensor | None,
    longest: int,
    runs_2n: Tensor | None = None,
    *,
    window: int | None = None,
    slopes_h: Tensor | None = None,
    offset_h: Tensor | None = None,
) -> Tensor:
    """[n, heads, width]: Σ_j P_ij v_j inside each run, with

        P_ij = exp(l_ij) / (exp(offset) + Σ_j exp(l_ij)),  l_ij = q_i·k_j / √width − slope · (i − j),
        i − window < j ≤ i

    n positions of all runs, one run after the other; `boundaries` [runs + 1] int32, `longest` the length of
    the longest, `runs_2n` int32 as batch.runs_of. A GPU reads only `runs_2n` if there is a window, a bias or
    an offset; otherwise, and on the CPU, only `boundaries` and `longest` are read. Query head h uses the
    key-value head h // (heads / groups). `window` counts the query's own position. Without `slopes_h` [heads]
    there is no bias; without `offset_h` [heads] its exp is 0. Both are fp32.
    """
    parts = window is not None or slopes_h is not None or offset_h is not None
    if query_nhD.is_cuda:
        if parts:
            from vpmoe.model import attention_gpu  # its kernels are Triton's, which needs a GPU

            assert runs_2n is not None, "a batch has them"
            return attention_gpu.packed_attention(
                query_nhD,
                key_ngD,
                value_ngD,
                runs_2n,
                window=window,
                slopes_h=slopes_h,
                offset_h=offset_h,
            )
        assert boundaries is not None, "plain attention is in no CUDA graph"
        causal = (-1, 0)
        out = varlen_attn(
            query_nhD,
            key_ngD,
            value_ngD,
            boundaries,
            boundaries,
            longest,
            longest,
            window_size=causal,
            enable_gqa=True,
        )
        assert isinstance(out, Tensor), "no auxiliary results were requested"
        return out
    assert boundaries is not None, "a batch has them"
    lengths = boundaries.diff().tolist()
    runs = zip(*(torch.split(x, lengths) for x in (query_nhD, key_ngD, value_ngD)), strict=True)
    if parts:
        return torch.cat(
            [_run_in_blocks(query, key, value, window, slopes_h, offset_h) for query, key, value in runs]
        )
    return torch.cat([_run(*qkv) for qkv in runs])


def _run(query_nhD: Tensor, key_ngD: Tensor, value_ngD: Tensor) -> Tensor:
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query_nhD, key_ngD, value_ngD))
    return (
        scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        .squeeze(0)
        .transpose(0, 1)
    )


def _run_in_blocks(
    query_nhD: Tensor,
    key_ngD: Tensor,
    value_ngD: Tensor,
    window: int | None,
    slopes_h: Tensor | None,
    offset_h: Tensor | None,
) -> Tensor:
    """One run, block by block of queries, each with the keys that one of its queries attends to."""
    positions = len(query_nhD)
    blocks = []
    for start in range(0, positions, QUERIES):
        stop = min(start + QUERIES, positions)
        first = 0 if window is None else max(0, start - window + 1)
        blocks.append(
            _block(
                query_nhD[start:stop],
                key_ngD[first:stop],
                value_ngD[first:stop],
                start - first,
                window,
                slopes_h,
                offset_h,
            )
        )
    return torch.cat(blocks)


def _block(
    query_qhD: Tensor,
    key_kgD: Tensor,
    value_kgD: Tensor,
    ahead: int,
    window: int | None,
    slopes_h: Tensor | None,
    offset_h: Tensor | None,
) -> Tensor:
    """Attention of consecutive queries, the first of which is at the position of key `ahead`."""
    queries, heads, width = query_qhD.shape
    share = heads // key_kgD.shape[1]
    key_hkD, value_hkD = (x.transpose(0, 1).repeat_interleave(share, 0) for x in (key_kgD, value_kgD))
    logit_hqk = query_qhD.transpose(0, 1) @ key_hkD.transpose(1, 2) / width**0.5
    distance_qk = (
        torch.arange(ahead, ahead + queries).unsqueeze(1) - torch.arange(len(key_kgD)).unsqueeze(0)
    ).to(query_qhD.device)
    if slopes_h is not None:
        logit_hqk = logit_hqk - slopes_h[:, None, None].to(logit_hqk.dtype) * distance_qk
    hidden_qk = distance_qk < 0
    if window is not None:
        hidden_qk |= distance_qk >= window
    logit_hqk = logit_hqk.masked_fill(hidden_qk, -torch.inf)
    if offset_h is not None:
        offset_hq1 = offset_h.to(logit_hqk.dtype)[:, None, None].expand(-1, queries, 1)
        logit_hqk = torch.cat([offset_hq1, logit_hqk], dim=2)  # a key that every query sees, of value 0
        weight_hqk = logit_hqk.softmax(2)[..., 1:]
    else:
        weight_hqk = logit_hqk.softmax(2)
    return (weight_hqk @ value_hkD).transpose(0, 1)
