"""spec.training: settings of all training stages."""

from typing import Annotated, Literal

from pydantic import Field

from vpmoe.api.base import ApiModel
from vpmoe.api.quantities import Duration, Tokens, TokensOrNone

Weight = Annotated[float, Field(ge=0, le=1000)]


class SpanWeights(ApiModel):
    """Weights of the spans in the loss. The loss of each span is its own mean, so the weights do not depend
    on lengths."""

    reasoning: Weight = 1.0
    """Weight of the mean loss over reasoning tokens. Higher favours reasoning; 0 does not train on it."""
    final: Weight = 1.0
    """Weight of the mean loss over the tokens of final answers. Higher favours answers; 0 does not train on
    them."""


class Optimizer(ApiModel):
    """The optimizer and its learning rate schedule: linear warm-up to the peak, then cosine decay to the
    minimum at the last token of the stage."""

    name: Literal["adam"] = "adam"
    """Update rule: adam, with decoupled weight decay (AdamW)."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 3.0e-4
    """Peak learning rate. Halve it when the gradient norm or the loss jumps. OnPolicy stages use 2e-5 unless
    they set their own."""
    min_learning_rate: Annotated[float, Field(ge=0, le=1)] = 1.0e-5
    """Learning rate at the end of the stage, at most learningRate."""
    warmup_tokens: TokensOrNone = 20_000_000
    """Tokens of the warm-up from 0 to the peak, in each stage. Higher is safer at the start of training. If
    it exceeds the stage's tokens, the stage never reaches the peak."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Weight decay per unit of learning rate. Higher keeps weights smaller. It does not apply to norms and
    biases."""
    gradient_clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it. Lower stabilises a noisy run and
    slows a stable one."""


class CheckpointPolicy(ApiModel):
    """How often checkpoints are written and how many are kept. Whichever of everyTokens and interval is
    reached first makes one; a checkpoint that is due while another is being written waits for its end, and
    training goes on."""

    every_tokens: Tokens = 50_000_000
    """Tokens between two checkpoints; the end of a stage always writes one. Lower loses less work when a pod
    fails, and writes more bytes."""
    interval: Duration = 1800
    """Time between two checkpoints, such as "30m", from the beginning of one to that of the next. It bounds
    the work that a failure loses in a slow stage; "0s" sets no bound. What is trained does not depend on
    it."""
    keep: Annotated[int, Field(ge=1, le=1000)] = 3
    """Number of latest checkpoints to keep in each stage. The last checkpoint of a stage is never removed.
    Higher uses more of the bucket: a vpmoe-6b checkpoint is 72 GB."""


class TrainingSpec(ApiModel):
    """Settings of all training stages."""

    sequence_length: Annotated[int, Field(ge=16, le=1_048_576)] = 8192
    """Tokens of one packed sequence. Documents in one sequence do not attend to each other. Memory grows with
    it."""
    global_batch_tokens: Tokens = 1_000_000
    """Most tokens of one optimizer step. It is rounded down to whole sequences on every data-parallel rank;
    the log of the training step shows the result. Higher makes gradients less noisy, and steps fewer and
    longer."""
    span_weights: SpanWeights = SpanWeights()
    """Weights of reasoning and final answers in the loss."""
    optimizer: Optimizer = Optimizer()
    """The optimizer of every stage that does not override it."""
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    """How often checkpoints are written and how many are kept."""
    max_collapsed_steps: Annotated[int, Field(ge=0, le=1_000_000_000)] = 1000
    """Optimizer steps in a row for which the router of a layer may be collapsed: an expert gets no token, or
    the busiest gets more than 16 times the mean. The stage then fails, with a checkpoint and the layer's
    name. Lower stops a stage that wastes its GPUs sooner, and may stop one that would recover: balancing
    moves an expert's bias by 0.001 a step against scores between 0 and 1, so with the default only a stage
    stops in which it has failed. 0 never stops a stage. An attempt counts from its own start. The run has the
    condition RouterCollapse after 100 such steps in any case."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 1234
    """Seed of everything random: initial weights, data order, sampling. Change it to repeat a run with other
    random numbers."""
