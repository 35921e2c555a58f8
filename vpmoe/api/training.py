"""spec.training: what all training stages share."""

from typing import Annotated, Literal

from pydantic import Field

from vpmoe.api.base import ApiModel
from vpmoe.api.quantities import Tokens, TokensOrNone

Weight = Annotated[float, Field(ge=0, le=1000)]


class SpanWeights(ApiModel):
    """How much each kind of token counts. Each span is a mean of its own, so the weights hold whatever the lengths are."""

    reasoning: Weight = 1.0
    """Weight of the mean loss over reasoning tokens. Higher favours how the student thinks; 0 does not train on reasoning."""
    final: Weight = 1.0
    """Weight of the mean loss over the tokens of final answers. Higher favours what the student answers; 0 does not train on them."""


class Optimizer(ApiModel):
    """Step size and its schedule: a linear warm-up to the peak, then a cosine down to the minimum at the stage's last token."""

    name: Literal["adam"] = "adam"
    """Update rule: adam, with weight decay that is decoupled from the gradient (AdamW)."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 3.0e-4
    """Peak learning rate. Halve it when the gradient norm or the loss jumps. OnPolicy stages peak at 2e-5 unless they say otherwise."""
    min_learning_rate: Annotated[float, Field(ge=0, le=1)] = 1.0e-5
    """Learning rate at the stage's end, at most learningRate."""
    warmup_tokens: TokensOrNone = 20_000_000
    """Tokens from zero to the peak, in each stage. It may exceed a stage, which then never reaches its peak."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of each weight matrix that is taken away per unit of learning rate. Norms and biases do not decay."""
    gradient_clip: Annotated[float, Field(gt=0)] = 1.0
    """Longest global gradient norm; longer gradients are scaled down to it. Lower steadies a noisy run and slows a healthy one."""


class CheckpointPolicy(ApiModel):
    """How much work a lost pod can cost, and how much of the bucket checkpoints take."""

    every_tokens: Tokens = 50_000_000
    """Tokens between checkpoints; a stage's end always makes one. Lower loses less when a pod dies, and writes more."""
    keep: Annotated[int, Field(ge=1, le=1000)] = 3
    """Latest checkpoints kept in each stage. A stage's last one is never removed. A vpmoe-6b checkpoint is about 84 GB."""


class TrainingSpec(ApiModel):
    """What all training stages share."""

    sequence_length: Annotated[int, Field(ge=16, le=1_048_576)] = 8192
    """Tokens of one packed sequence. Documents are packed into it and never attend to each other. Memory grows with it."""
    global_batch_tokens: Tokens = 1_000_000
    """Tokens of one optimizer step at most: rounded down to whole sequences on every data-parallel rank, and the result is shown in
    the training step's log. Higher is smoother and takes fewer, longer steps."""
    span_weights: SpanWeights = SpanWeights()
    """How much reasoning and final answers count."""
    optimizer: Optimizer = Optimizer()
    """Step size and its schedule, for every stage that does not override it."""
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    """When checkpoints are written and how many are kept."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 1234
    """Seed of everything random: initial weights, data order, sampling. Another seed is another run of the same recipe."""
