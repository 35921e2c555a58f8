"""A layer's self-attention with the parts of its shape, and the layer that carries the first layer's values.

megatron-core's SelfAttention has linear projections only, rotates in every layer, and passes nothing from one
layer to the next. This one has the same parameters under the same names in the same order where a shape has
no parts, so that checkpoints and bits are the same. Attention itself is in attention.py; the GPU's kernels
are in tensor_product_gpu.py (local layers), qk_norm_gpu.py (norms and rotation of linear projections),
self_attention_gpu.py (their value residual) and linear_gpu.py (products).
"""

from typing import Any, cast

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from vpmoe.model.attention import PackedAttention
from vpmoe.model.shapes import Shape
from vpmoe.model.tensor_product import tensor_product


class SelfAttention(MegatronModule):  # type: ignore[misc]
    """Projections, norms of queries and keys, rotation, value residual, attention and the output's projection
    of one layer."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        layer_number: int,
        shape: Shape,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        super().__init__(config)
        self.layer, self.shape = layer_number - 1, shape
        self.rotates = shape.slopes(self.layer) is None
        place = None if config.use_cpu_initialization else torch.cuda.current_device()
        linear: dict[str, Any] = {
            "config": config,
            "init_method": config.init_method,
            "tp_group": pg_collection.tp,
        }
        self.core_attention = PackedAttention(
            config,
            window=shape.window(self.layer),
            slopes=shape.slopes(self.layer),
            offset=shape.softmax_offset,
        )
        self.linear_proj = RowParallelLinear(
            shape.heads * shape.head_width,
            shape.hidden,
            bias=shape.linear_biases,
            input_is_parallel=True,
            skip_bias_add=True,
            **linear,
        )
        if shape.ranks(self.layer) is None:
            self.linear_qkv = ColumnParallelLinear(
                shape.hidden, shape.qkv_width, bias=shape.linear_biases, gather_output=False, **linear
            )
        else:
            self.tensor_product = TensorProduct(config, shape)
        self.q_layernorm, self.k_layernorm = (
            nn.RMSNorm(shape.head_width, eps=shape.norm_epsilon, dtype=config.params_dtype, device=place)
            for _ in range(2)
        )
        self.value_mix: nn.Parameter | None = None
        if shape.value_residual and self.layer > 0:
            self.value_mix = nn.Parameter(torch.empty(1, dtype=torch.float32, device=place))

    def forward(
        self,
        hidden_SbH: Tensor,
        angle_Sb1D: Tensor,
        first_value: Tensor | None,
        packed_seq_params: PackedSeqParams,
    ) -> tuple[tuple[Tensor, Tensor | None], Tensor]:
        """((output [S, b, H], its bias), values [S, b, groups, D] that attention used).

        `angle_Sb1D`: angles of the rotation. `first_value`: the first layer's values; None in the first layer
        and without value residual.
        """
        assert first_value is not None or self.value_mix is None, (
            "the first layer's come with the hidden states"
        )
        if hidden_SbH.is_cuda:
            query, key, value = self._on_gpu(hidden_SbH, angle_Sb1D, first_value)
        else:
            query, key, value = self._projections(hidden_SbH)
            query, key = self._norm_and_rotate(query, key, angle_Sb1D)
            if self.value_mix is not None:
                value = mix_values(value, cast(Tensor, first_value), self.value_mix)
        out = self.core_attention(query, key, value, None, packed_seq_params=packed_seq_params)
        if out.is_cuda:
            return (_linear_on_gpu(self.linear_proj, out), None), value
        return self.linear_proj(out), value

    def _projections(self, hidden_SbH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [S, b, heads, D], keys and values [S, b, groups, D]."""
        shape = self.shape
        if shape.ranks(self.layer) is not None:
            return cast(tuple[Tensor, Tensor, Tensor], self.tensor_product(hidden_SbH))
        # megatron's order: for each key-value head its queries, its key, its value
        mixed = cast(Tensor, self.linear_qkv(hidden_SbH)[0])
        width, share = shape.head_width, shape.heads // shape.kv_heads
        query, key, value = mixed.unflatten(-1, (shape.kv_heads, -1)).split(  # type: ignore[no-untyped-call]
            [share * width, width, width], dim=-1
        )
        return query.reshape(*query.shape[:2], -1, width), key, value

    def _norm_and_rotate(self, query: Tensor, key: Tensor, angle_Sb1D: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's norms of queries and keys, and its rotation if it has one."""
        query, key = self.q_layernorm(query), self.k_layernorm(key)
        if self.rotates:
            cos, sin = (part.to(query.dtype) for part in (angle_Sb1D.cos(), angle_Sb1D.sin()))
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        return query, key

    def _on_gpu(
        self, hidden_SbH: Tensor, angle_Sb1D: Tensor, first_value: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What attention reads: `_projections`, `_norm_and_rotate` and `mix_values`, in one or two kernels
        after the product."""
        # Triton's, which needs a GPU
        from vpmoe.model import linear_gpu, qk_norm_gpu, self_attention_gpu, tensor_product_gpu

        shape, norms = self.shape, (self.q_layernorm.weight, self.k_layernorm.weight)
        ranks, mix = shape.ranks(self.layer), self.value_mix
        if ranks is not None:
            return tensor_product_gpu.projections(
                linear_gpu.linear(hidden_SbH, self.tensor_product.weight, None),
                self.tensor_product.bias,
                *norms,
                shape.norm_epsilon,
                angle_Sb1D,
                tensor_product_gpu.Heads(shape.heads, shape.kv_heads, *ranks, shape.head_width),
                None if mix is None else first_value,
                mix,
            )
        mixed = _linear_on_gpu(self.linear_qkv, hidden_SbH).unflatten(-1, (shape.kv_heads, -1))  # type: ignore[no-untyped-call]
        query, key, value = qk_norm_gpu.norm_and_rotate_projections(
            mixed, *norms, shape.norm_epsilon, angle_Sb1D if self.rotates else None, shape.heads
        )
        if mix is not None and first_value is not None:
            value = self_attention_gpu.mix_values(value, first_value, mix)
        return query, key, value


def _linear_on_gpu(layer: nn.Module, x: Tensor) -> Tensor:
    """x times the weight of one of megatron's linear layers, plus its bias."""
    from vpmoe.model import linear_gpu  # its kernels are Triton's, which needs a GPU

    return linear_gpu.linear(x, cast(Tensor, layer.weight), cast(Tensor | None, layer.bias))


class TensorProduct(MegatronModule):  # type: ignore[misc]
    """Queries, keys and values of a position as tensor_product.py defines them, plus one bias over all three.

    `weight` [F, H] makes the factors of a hidden state; `bias` is flat: queries, keys, values.
    """

    def __init__(self, config: TransformerConfig, shape: Shape) -> None:
        super().__init__(config)
        self.shape = shape
        place = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(
            torch.empty((shape.factors_width, shape.hidden), dtype=config.params_dtype, device=place)
        )
        self.bias: nn.Parameter | None = None
        if shape.linear_biases:
            self.bias = nn.Parameter(torch.empty(shape.qkv_width, dtype=config.params_dtype, device=place))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries […, heads, D], keys and values […, groups, D] of hidden states […, H]."""
        shape = self.shape
        assert shape.tensor_product_ranks is not None, "only such layers have this module"
        heads, groups, width = shape.heads, shape.kv_heads, shape.head_width
        factors = nn.functional.linear(hidden, self.weight)
        parts = tensor_product(factors, heads, groups, width, shape.tensor_product_ranks)
        if self.bias is None:
            return parts
        biases = torch.split(self.bias.view(-1, width), [heads, groups, groups])
        query, key, value = (part + bias for part, bias in zip(parts, biases, strict=True))
        return query, key, value


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of […, D] in the half-and-half order: component i and i + D/2 are a pair. cos and sin […, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def mix_values(value: Tensor, first_value: Tensor, value_mix: Tensor) -> Tensor:
    """λ · value + (1 − λ) · first_value, λ = sigmoid(value_mix), in fp32."""
    share = value_mix.sigmoid()
    return (share * value + (1 - share) * first_value).to(value.dtype)


class Layer(TransformerLayer):  # type: ignore[misc]
    """megatron's layer with two more rules: attention also gets the first layer's values, and a norm adds to
    the residual stream what the part before it returned (residual.py).

    The values travel as megatron's `context`, which the block passes from layer to layer and through
    recomputation; it is None without value residual, and before the first layer.
    """

    def forward(
        self,
        hidden_states: Tensor,
        *,
        context: Tensor | None,
        rotary_pos_emb: Tensor,
        packed_seq_params: PackedSeqParams,
        padding_mask: Tensor,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(hidden states [S, b, H], `context` for the next layer). `padding_mask` [b, S]."""
        stream, normed = self.input_layernorm(hidden_states)
        (out, bias), value = self.self_attention(normed, rotary_pos_emb, context, packed_seq_params)
        attended = out if bias is None else out + bias
        stream, *normed = self.pre_mlp_layernorm(stream, attended, readers=self.mlp.readers)
        if context is None and self.self_attention.shape.value_residual:
            context = value
        return self.mlp.added_to(stream, *normed, padding_bS=padding_mask), context
