"""The student: megatron-core's embedding and transformer layers, up to the last hidden state.

It uses neither of megatron-core's models. GPTModel is deprecated in 0.19. HybridModel, its successor,
requires Transformer Engine's norm at its end, counts attention and feed-forward as separate layers (160
instead of 80, in every parameter's name), applies one row of rotary angles to all documents, and ends in
logits, which the loss head avoids. The parts of the two are not deprecated, and this file assembles them:
VocabParallelEmbedding, TransformerBlock with TransformerLayers (MLP, MoELayer), RMSNorm. We implement the
parts that megatron-core provides only with Transformer Engine or implements incorrectly, or not at all:
self-attention inside documents, stacked experts and their dispatch, the router, and an output matrix that
only the loss head multiplies.

There is no tensor, pipeline or context parallelism. At tensor parallelism 1 the vocabulary is not padded, so
all of its ids are defined. Expert parallelism is megatron's.
"""

from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor, nn

from vpmoe.model.attention import packed_seq_params_for
from vpmoe.model.batch import Batch
from vpmoe.model.dispatch import MixtureLayer
from vpmoe.model.experts import FeedForward, SharedExpert, StackedExperts, squared_relu
from vpmoe.model.initial import (
    FREQUENCY_SCALE,
    generator_for,
    initial_std,
    initial_vector,
    log_frequencies,
)
from vpmoe.model.residual import RMSNorm, StreamNorm
from vpmoe.model.router import Router
from vpmoe.model.self_attention import Layer, SelfAttention
from vpmoe.model.shapes import Shape

if TYPE_CHECKING:
    from vpmoe.model.layer_graphs import LayerGraphs


class Student(MegatronModule):  # type: ignore[misc]
    """A call returns the normalised hidden states [T, H] of a batch; `output` [V, H] maps them to logits.

    `projection` [G, H] maps hidden states to a teacher's width G (TeacherForced); None without a teacher, or
    if the widths are equal. `log_frequency` [head width / 2] are the learned frequencies of the rotation, in
    fp32 for every dtype of the others.
    """

    def __init__(
        self, shape: Shape, config: TransformerConfig, sequence_length: int, teacher_width: int | None = None
    ) -> None:
        super().__init__(config)
        self.shape = shape
        self.sequence_length = sequence_length
        self.embedding = VocabParallelEmbedding(
            shape.vocabulary, shape.hidden, init_method=config.init_method, config=config
        )
        self.decoder = TransformerBlock(config, _layers(shape))
        place = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.output = nn.Parameter(
            torch.empty((shape.vocabulary, shape.hidden), dtype=config.params_dtype, device=place)
        )
        self.log_frequency: nn.Parameter | None = None
        if shape.learned_frequencies:
            self.log_frequency = nn.Parameter(
                torch.empty(shape.head_width // 2, dtype=torch.float32, device=place)
            )
        self.projection: nn.Parameter | None = None
        if teacher_width not in (None, shape.hidden):
            self.projection = nn.Parameter(
                torch.empty((teacher_width, shape.hidden), dtype=config.params_dtype, device=place)
            )

    def forward(self, batch: Batch, graphs: "LayerGraphs | None" = None) -> Tensor:
        """Hidden states [T, H] of the batch's T = b·S positions, in row order.

        With `graphs` these run the layers, with the same bits. Raises ValueError if a row is longer than
        `sequence_length`.
        """
        rows, positions = batch.tokens.shape
        if positions > self.sequence_length:
            raise ValueError(
                f"training.sequenceLength: a row has {positions} positions, but the student was built for "
                f"{self.sequence_length}."
            )
        hidden_SbH = self._embedded(batch.tokens)
        angle_Sb1D = self._angles(batch.position.T)
        if graphs is not None:
            hidden_SbH = self.decoder.final_layernorm(graphs(hidden_SbH, angle_Sb1D, batch))
        else:
            hidden_SbH = self.decoder(
                hidden_states=hidden_SbH,
                attention_mask=None,
                rotary_pos_emb=angle_Sb1D,
                packed_seq_params=packed_seq_params_for(batch.boundaries, batch.longest, batch.runs),
                padding_mask=batch.padding,
            )
        return cast(Tensor, hidden_SbH).transpose(0, 1).reshape(rows * positions, -1)

    def _embedded(self, tokens_bS: Tensor) -> Tensor:
        """[S, b, H]"""
        if tokens_bS.is_cuda:
            from vpmoe.model import embedding_gpu  # its kernel is Triton's, which needs a GPU

            return embedding_gpu.embedding(tokens_bS.T, self.embedding.weight)
        return cast(Tensor, self.embedding(tokens_bS)).transpose(0, 1).contiguous()

    def _angles(self, position_Sb: Tensor) -> Tensor:
        """Angles of the rotation [S, b, 1, head width], in the half-and-half order of `rotate`: position ·
        base^(−2i / width), or position · exp(log_frequency / 16) if the frequencies are learned."""
        width = self.shape.head_width
        if self.log_frequency is None:
            exponent = torch.arange(0, width, 2, dtype=torch.float32, device=position_Sb.device) / width
            frequency = self.shape.rope_base**-exponent
        else:
            frequency = (self.log_frequency / FREQUENCY_SCALE).exp()
        angle = position_Sb.float().unsqueeze(-1) * frequency
        return torch.cat([angle, angle], dim=-1).unsqueeze(2)


def build(
    shape: Shape,
    device: torch.device,
    *,
    sequence_length: int,
    seed: int,
    expert_parallel: int = 1,
    teacher_width: int | None = None,
    recomputed_layers: int = 0,
) -> Student:
    """A new student with random weights: bf16 on the GPU, fp32 on the CPU. On device "meta" it has no weights
    and serves to count them.

    `teacher_width` is the width of the teacher's hidden states with which the student's are compared; None
    without such a teacher. The first `recomputed_layers` layers keep only their input for the backward, which
    computes the rest again, with the same bits. Every rank builds the same weights from the same seed, in
    every layout. Needs the process groups of distributed.start. Raises ValueError if `expert_parallel` does
    not divide the experts."""
    if expert_parallel < 1 or shape.experts % expert_parallel:
        raise ValueError(
            f"student.expertParallel: {expert_parallel} does not divide the {shape.experts} experts of "
            f"{shape.name}."
        )
    student = Student(
        shape, _config(shape, device, expert_parallel, recomputed_layers), sequence_length, teacher_width
    )
    if device.type != "meta":
        student.to(device)  # megatron leaves the router's weight on the CPU
        _initialise(student, seed)
    return student


def _config(
    shape: Shape, device: torch.device, expert_parallel: int, recomputed_layers: int = 0
) -> TransformerConfig:
    bf16 = device.type == "cuda"
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_width,
        ffn_hidden_size=shape.dense_width,
        num_moe_experts=shape.experts,
        moe_ffn_hidden_size=shape.expert_width,
        moe_shared_expert_intermediate_size=shape.shared_width,
        moe_router_topk=shape.experts_per_token,
        moe_router_num_groups=shape.expert_groups,
        moe_router_group_topk=shape.expert_groups_per_token,
        moe_router_topk_scaling_factor=shape.routed_scaling,
        moe_router_score_function="sigmoid",
        moe_router_dtype="fp32",
        moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=shape.bias_update_rate,
        moe_router_load_balancing_type="seq_aux_loss",
        moe_aux_loss_coeff=shape.aux_coefficient,
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=expert_parallel,
        # The default follows tensor parallelism; if the two differ, experts drift apart silently.
        expert_tensor_parallel_size=1,
        # Gradients are sums; Learner.step divides them by the positions of the global batch.
        calculate_per_token_loss=True,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_epsilon,
        qk_layernorm=True,
        activation_func=squared_relu,
        gated_linear_unit=False,
        # Of the dense layer and the shared experts. Attention, experts and router create theirs themselves.
        add_bias_linear=shape.linear_biases,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        perform_initialization=False,  # see _initialise
        use_cpu_initialization=device.type == "meta",  # creates parameters on torch's default device
        recompute_granularity="full" if recomputed_layers else None,
        recompute_method="block" if recomputed_layers else None,
        recompute_num_layers=recomputed_layers or None,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
    )


def _norm(kind: type[RMSNorm], config: TransformerConfig, hidden_size: int, eps: float) -> RMSNorm:
    return kind(hidden_size, eps=eps, dtype=config.params_dtype)


def _layers(shape: Shape) -> TransformerBlockSubmodules:
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    dense = partial(FeedForward.as_mlp_submodule, submodules=linears)
    mixture = partial(
        MixtureLayer,
        submodules=MoESubmodules(
            router=partial(Router, bias=shape.router_bias),
            experts=StackedExperts,
            shared_experts=partial(SharedExpert, submodules=linears),
        ),
    )
    attention = ModuleSpec(module=SelfAttention, params={"shape": shape})

    def layer(feed_forward: object) -> ModuleSpec:
        return ModuleSpec(
            module=Layer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=partial(_norm, StreamNorm),
                self_attention=attention,
                pre_mlp_layernorm=partial(_norm, StreamNorm),
                mlp=feed_forward,
            ),
        )

    layers = [layer(dense)] * shape.dense_layers + [layer(mixture)] * shape.moe_layers
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=partial(_norm, RMSNorm))


@torch.no_grad()
def _initialise(student: Student, seed: int) -> None:
    """Set norms to 1, biases and softmax offsets to 0, and draw matrices from a normal distribution.

    A parameter's numbers depend on (seed, name) only (initial.py).
    """
    shape = student.shape
    for name, parameter in student.named_parameters():
        if name == "log_frequency":
            parameter.copy_(log_frequencies(shape.head_width, shape.rope_base))
            continue
        if parameter.dim() == 1:
            parameter.fill_(initial_vector(name))
            continue
        std, generator = initial_std(name, shape), generator_for(name, seed, parameter.device)
        if parameter.dim() < 3:
            parameter.normal_(0, std, generator=generator)
        else:  # this rank's share of the stacked experts
            whole = torch.empty(
                (shape.experts, *parameter.shape[1:]), dtype=parameter.dtype, device=parameter.device
            )
            first = parallel_state.get_expert_model_parallel_rank() * len(parameter)
            parameter.copy_(whole.normal_(0, std, generator=generator)[first : first + len(parameter)])
