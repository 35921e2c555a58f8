"""The trainer's lines of metrics. docs/reference/metrics.md lists every field; uploader.py writes them to the
bucket."""

from collections.abc import Iterable
from typing import Literal

import numpy as np
from pydantic import Field

from vpmoe.api import pod_metrics
from vpmoe.api.base import Record
from vpmoe.api.metrics import BySpan, Measures, MetricsLine, Sample, samples_by_span
from vpmoe.api.progress import SpanLoss
from vpmoe.checkpoint.train_state import Figure, StepBatch
from vpmoe.model.router import ExpertLoad
from vpmoe.process.gpu import GpuUse

LOADS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 8.0, 16.0)
"""Bounds of the load histogram, in mean loads: experts at most at a quarter of the mean, …, above 16 times
the mean."""


class TrainerLine(MetricsLine):
    """The fields of every line of the trainer: the stage's progress when the line was written."""

    step: int
    """Optimizer steps of the stage."""
    iteration: int
    """Optimizer steps over all stages."""
    tokens: int
    """Tokens of the stage, padding excluded."""
    epoch: int
    """Pass over the data."""


class StartLine(TrainerLine):
    """The start of an attempt."""

    parts = ("of_kind",)

    event: Literal["start"] = "start"
    origin: str = Field(serialization_alias="from")
    """What the attempt starts from, for people."""
    refused: tuple[str, ...]
    """Checkpoints that were rejected, and why."""
    skipped: int
    """Steps of the stage that earlier attempts skipped."""
    ranks: int
    steps: int | None
    """Steps of the stage; None if the number is not known ahead."""
    sequences_per_step: int
    stage_tokens: int
    """Tokens of the stage after its last step."""
    centre: dict[str, float] | None
    """The log-probability of confidence weight 1 by span, of a Rescored stage."""
    of_kind: Measures | None = None
    """What only this kind of stage has."""


class LoadHistogram(Record):
    """Experts of all layers by load."""

    bounds: tuple[float, ...] = LOADS
    """In mean loads."""
    experts: tuple[int, ...]
    """Experts up to each bound, then those above the last."""


class RouterLoad(Record):
    """How the step's tokens were spread over the experts."""

    max_over_mean: dict[str, float]
    """By layer: the busiest expert's load over the mean."""
    dead: dict[str, int]
    """By layer with any: experts without a token."""
    aux_loss: float
    """Mean balance loss of the layers, 1 when balanced."""
    histogram: LoadHistogram


class StepLine(TrainerLine):
    """One optimizer step."""

    parts = ("measures", "of_kind")

    event: Literal["step"] = "step"
    kind: str
    """How the step trained."""
    loss: float
    """What it minimised: Σ c·(−log p), or TeacherForced's sum of terms. In an OnPolicy step a surrogate."""
    loss_by_span: BySpan
    """Mean −log p, in nats a token."""
    targets: dict[str, int]
    """Tokens learned, by span."""
    learning_rate: float
    gradient_norm: float
    """Before clipping."""
    seconds: float
    tokens_per_second: float
    """Over the latest steps."""
    router: RouterLoad
    exercises: dict[str, float]
    """Share of each exercise, by tokens."""
    gpu: GpuUse
    measures: Measures | None = None
    """Of the objective."""
    of_kind: Measures | None = None
    """What only this kind of stage has."""

    def samples(self) -> Iterable[Sample]:
        router = self.router
        yield Sample(pod_metrics.STEP, self.step)
        yield Sample(pod_metrics.EPOCH, self.epoch)
        yield Sample(pod_metrics.STEP_SECONDS, self.seconds, {"kind": self.kind})
        yield Sample(pod_metrics.LOSS, self.loss)
        yield from samples_by_span(pod_metrics.SPAN_LOSS, self.loss_by_span)
        yield Sample(pod_metrics.GRADIENT_NORM, self.gradient_norm)
        yield Sample(pod_metrics.LEARNING_RATE, self.learning_rate)
        yield Sample(pod_metrics.ROUTER_MAX_LOAD, max(router.max_over_mean.values()))
        yield Sample(pod_metrics.ROUTER_DEAD_EXPERTS, sum(router.dead.values()))
        yield Sample(pod_metrics.ROUTER_AUX_LOSS, router.aux_loss)
        yield from self.gpu.samples()
        for part in (self.measures, self.of_kind):
            if part is not None:
                yield from part.samples()


class SkippedLine(TrainerLine):
    """One step that was skipped, in place of its StepLine: loss or gradient were not finite, the weights did
    not move."""

    event: Literal["skipped"] = "skipped"
    number: int
    """Number among the stage's skipped steps, from 1."""
    kind: str
    """How the step would have trained."""
    batch_tokens: int
    """Tokens of its batch, padding excluded."""
    loss: Figure
    loss_by_rank: tuple[Figure, ...]
    """What each rank added to it."""
    gradient_norm: Figure
    batch: StepBatch
    """What it read."""
    seconds: float

    def samples(self) -> Iterable[Sample]:
        yield Sample(pod_metrics.STEP, self.step)
        yield Sample(pod_metrics.EPOCH, self.epoch)
        yield Sample(pod_metrics.SKIPPED_STEPS, 1)


class HeldOutLoss(Measures):
    """The held-out loss of an evaluation."""

    held_out: SpanLoss
    weighted: float
    """Spans weighted: what `stop` looks at."""
    documents: int


class EvaluationLine(TrainerLine):
    """One evaluation."""

    parts = ("loss", "of_kind")

    event: Literal["evaluation"] = "evaluation"
    seconds: float
    """How long it took."""
    loss: HeldOutLoss | None
    of_kind: Measures | None
    """What only this kind of stage has."""

    def samples(self) -> Iterable[Sample]:
        yield Sample(pod_metrics.EVALUATION_SECONDS, self.seconds)
        if self.loss is not None:
            held_out = self.loss.held_out
            by_span = {"reasoning": held_out.reasoning, "final": held_out.final}
            yield from samples_by_span(pod_metrics.HELD_OUT_LOSS, by_span)
        if self.of_kind is not None:
            yield from self.of_kind.samples()


def router_load(load: ExpertLoad) -> RouterLoad:
    """A step's load as its line has it."""
    tokens_LE = load.tokens.numpy()
    relative = tokens_LE / np.maximum(tokens_LE.mean(axis=1, keepdims=True), 1e-9)
    counts = np.bincount(np.searchsorted(LOADS, relative.flatten()), minlength=len(LOADS) + 1)
    return RouterLoad(
        max_over_mean=dict(zip(load.layers, np.round(load.max_over_mean.numpy(), 3).tolist(), strict=True)),
        dead={layer: dead for layer, dead in zip(load.layers, load.dead.tolist(), strict=True) if dead},
        aux_loss=float(load.aux.mean()),
        histogram=LoadHistogram(experts=tuple(counts.tolist())),
    )
