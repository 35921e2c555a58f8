"""spec.stages: the four kinds of training stage, discriminated by `kind`.

Each kind has its own defaults. The structural schema has one object for all kinds, so the API server cannot
apply them: they are applied when a run is parsed, and the CRD's descriptions name them.

The properties of StageFields answer what differs between kinds (does it sample, does it need a teacher), so
that callers need no isinstance.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, Strict

from vpmoe.api.base import ApiModel, Rule, TextPattern
from vpmoe.api.dataset import PositiveShare, Share
from vpmoe.api.quantities import Tokens
from vpmoe.api.training import Optimizer

BUILT_IN_STEPS = (
    "init",
    "preprocess",
    "rescore",
    "score",
    "teacher",
    "sampler",
    "evaluate",
    "validity",
    "export",
    "report",
    "train",
    "config",
)
"""Names that a stage cannot have, because its child objects would collide with those of built-in steps."""

STAGE_NAME = TextPattern(
    r"[a-z][a-z0-9]{0,15}",
    "must be at most 16 lowercase letters and digits, starting with a letter (it is part of pod names)",
    max_length=16,
)
ADDS_UP = 1e-6
"""Tolerance of a sum of shares around 1: decimal fractions are not exact in binary."""


def _off_one(*shares: float) -> dict[str, object] | None:
    """The sum of the shares as a message term if it differs from 1, otherwise None."""
    total = sum(shares)
    return {"total": round(total, 6)} if abs(total - 1) > ADDS_UP else None


def _cel_one(total: str) -> str:
    return f"{total} >= {1 - ADDS_UP} && {total} <= {1 + ADDS_UP}"


def _cel_rounded(total: str) -> str:
    return f"double(int({total} * 1000000.0 + 0.5)) / 1000000.0"


class Stop(ApiModel):
    """Ends a stage before all its tokens are used, when it has stopped improving."""

    evaluations: Annotated[int, Field(ge=1, le=1000)] = 5
    """Number of consecutive evaluations that must show too little improvement. Higher ends the stage
    later."""
    min_improvement: Annotated[float, Field(ge=0, lt=1)] = 0.002
    """Smallest relative improvement, between 0 and 1, that these evaluations together must show for the stage
    to continue: of the held-out loss (reasoning and final, weighted by spanWeights) or, in OnPolicy, of the
    reverse KL. Higher ends the stage earlier."""
    min_validity: Share = 0.0
    """Share of valid Harmony completions, between 0 and 1, that must be reached before the stage can end
    early. Higher ends the stage later; 0 requires nothing. In OnPolicy it is that of the rollouts since the
    evaluation before. In Vanilla and Rescored it is that of the newest checkpoint that the step
    <stage>-validity has measured, with evaluation.completions samples, on a GPU of the teacher. Where nothing
    measures it, it must be 0: in TeacherForced, and in any kind but OnPolicy if evaluation.completions
    is 0."""


class StageFields(ApiModel):
    """Fields and properties of stages of every kind."""

    name: Annotated[str, STAGE_NAME]
    """Name of the stage and of its training step: at most 16 lowercase letters and digits. It is part of the
    names of its pods and of its folder in the bucket."""
    tokens: Tokens = 1_000_000_000
    """Positions that enter the student in this stage, padding excluded, as a number or a text such as "1B".
    Higher trains longer; the learning rate schedule stretches with it."""
    optimizer: Annotated[Optimizer, Field(json_schema_extra={"inherits": "training.optimizer"})]
    """Overrides of training.optimizer for this stage; a field that is absent is taken from there. The
    learning rate schedule restarts in each stage."""
    stop: Stop | None = None
    """Ends the stage early when it no longer improves; null or absent uses all tokens."""

    samples: ClassVar[bool] = False
    """Whether the student samples while the stage trains: the stage has the steps sampler and teacher."""
    needs_teacher: ClassVar[bool] = True
    """Whether the stage uses the teacher's GPUs, or scores that the teacher made."""
    runs_teacher: ClassVar[bool] = False
    """Whether the training pods themselves run the teacher: the stage is TeacherForced. layout.py says where
    and how often."""
    needs_rescoring: ClassVar[bool] = False
    """Whether the run's step rescore must have finished before the stage."""

    @property
    def sampler_gpus(self) -> int:
        """GPUs of student.gpus that sample while the stage trains; 0 except in an OnPolicy stage."""
        return 0

    @property
    def min_validity(self) -> float:
        """Validity that the stage must have reached before it can end early; 0 without stop."""
        return self.stop.min_validity if self.stop is not None else 0.0

    @property
    def needs_measured_validity(self) -> bool:
        """Whether its stop needs a validity that only a step beside it can measure, on a GPU of the teacher:
        it does not sample, and the teacher does not run beside it."""
        return self.min_validity > 0 and not self.samples and not self.runs_teacher

    @property
    def scored_subset(self) -> "Subset | None":
        """The documents whose scores the stage trains on; None if it uses no scores."""
        return None

    @property
    def required_validity(self) -> float:
        """Validity that the stage before must have reached; 0 except in an OnPolicy stage."""
        return 0.0

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "name",
            "{name} is the name of a built-in step. Choose another name.",
            cel=f"!(self.name in {list(BUILT_IN_STEPS)})",
            broken=lambda stage, _: {"name": stage.name} if stage.name in BUILT_IN_STEPS else None,
            terms={"name": "self.name"},
        ),
    )


class Vanilla(StageFields):
    """Next-token training on the dataset, without a teacher. The first stage of every recipe."""

    needs_teacher: ClassVar[bool] = False

    kind: Literal["Vanilla"]
    """How the stage trains. Vanilla: on the dataset as it is. Rescored: on documents weighted by the
    teacher's confidence. TeacherForced: towards the teacher's distribution, token by token. OnPolicy: on the
    student's own samples, scored by the teacher."""


class Subset(ApiModel):
    """Which documents the teacher scores. A larger subset takes more teacher time."""

    tokens: Tokens = 1_000_000_000
    """Most assistant tokens to score. The smaller of this and fraction applies."""
    fraction: PositiveShare = 0.2
    """Largest share of the dataset's assistant tokens to score, between 0 and 1. The smaller of this and
    tokens applies."""
    prefer: Literal["longReasoning", "none"] = "longReasoning"
    """Which documents are scored first: longReasoning, those with the most reasoning tokens; none, in an
    order that training.seed decides."""
    exercises: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=64)], ...], Strict(False), Field(max_length=32)
    ] = ()
    """Exercises to choose documents from, in equal shares; empty means all exercises."""
    languages: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=64)], ...], Strict(False), Field(max_length=32)
    ] = ()
    """Languages to choose documents from, in equal shares; empty means all languages."""


class Confidence(ApiModel):
    """How the teacher's confidence in a token becomes the token's weight in the loss."""

    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Softness, in nats. At 1, a token e times likelier than the mean weighs e times more; higher makes the
    weights more equal."""
    min: Annotated[float, Field(gt=0, le=1000)] = 0.25
    """Lowest weight, at most 1. Raise it when the metrics show saturation at the low end above a few per
    cent."""
    max: Annotated[float, Field(gt=0, le=1000)] = 4.0
    """Highest weight, at least 1. It bounds how much a single token can move a step."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "",
            "min {min} is above max {max}. Swap them.",
            cel="self.min <= self.max",
            broken=lambda c, _: {"min": c.min, "max": c.max} if c.min > c.max else None,
            terms={"min": "self.min", "max": "self.max"},
        ),
        Rule(
            "",
            "1 is not between min {min} and max {max}, but the mean weight is always 1. Set min to at most 1 "
            "and max to at least 1.",
            cel="self.min > self.max || (self.min <= 1.0 && self.max >= 1.0)",
            broken=lambda c, _: (
                {"min": c.min, "max": c.max} if c.min <= c.max and not c.min <= 1 <= c.max else None
            ),
            terms={"min": "self.min", "max": "self.max"},
        ),
    )


class Rescored(StageFields):
    """Next-token training in which each token is weighted by the teacher's confidence in it."""

    needs_rescoring: ClassVar[bool] = True

    kind: Literal["Rescored"]
    """As in Vanilla."""
    tokens: Tokens = 2_000_000_000
    """As in Vanilla."""
    subset: Subset = Subset()
    """Which documents the teacher scores."""
    mix: Share = 0.65
    """Share of batches that come from the scored subset, between 0 and 1; the others are Vanilla batches.
    Higher follows the teacher more closely on fewer documents."""
    confidence: Confidence = Confidence()
    """How the teacher's confidence in a token becomes the token's weight in the loss."""

    @property
    def scored_subset(self) -> Subset | None:
        return self.subset if self.mix > 0 else None


class LossWeights(ApiModel):
    """Weights of the three terms that a TeacherForced stage minimises. Each term is a mean over its span."""

    ce: Annotated[float, Field(ge=0, le=1000)] = 0.2
    """Weight of the cross-entropy with the dataset's tokens, in nats. Higher follows the dataset more than
    the teacher; 0 turns the term off."""
    kl: Annotated[float, Field(ge=0, le=1000)] = 0.2
    """Weight of KL(teacher‖student) in nats, both distributions softened by temperature. Higher follows the
    teacher's predictions more closely; 0 turns the term off."""
    hidden: Annotated[float, Field(ge=0, le=1000)] = 0.6
    """Weight of 1 − cosine(student's projected last hidden state, teacher's last hidden state). Higher
    follows the teacher's hidden states more closely; 0 turns the term off."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 2.0
    """Softness of both distributions in kl. Higher gives the teacher's unlikely tokens more influence."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "",
            "ce, kl and hidden are all 0: there is nothing to minimise. Set at least one above 0.",
            cel="self.ce + self.kl + self.hidden > 0.0",
            broken=lambda loss, _: {} if loss.ce + loss.kl + loss.hidden == 0 else None,
        ),
    )


class TeacherForced(StageFields):
    """Training towards the teacher's hidden states and distribution on the dataset's documents."""

    runs_teacher: ClassVar[bool] = True

    kind: Literal["TeacherForced"]
    """As in Vanilla."""
    tokens: Tokens = 665_000_000
    """As in Vanilla."""
    loss: LossWeights = LossWeights()
    """Weights of the three terms of the loss."""

    rules: ClassVar[tuple[Rule, ...]] = (
        *StageFields.rules,
        Rule(
            "stop.minValidity",
            "{validity} is not measured while a TeacherForced stage trains. Set it to 0: then stop looks at "
            "the held-out loss alone.",
            cel="!has(self.stop) || self.stop.minValidity == 0.0",
            broken=lambda stage, _: {"validity": stage.min_validity} if stage.min_validity else None,
            terms={"validity": "self.stop.minValidity"},
            at_apply=True,
        ),
    )


class Require(ApiModel):
    """What the student must be able to do before it trains on its own samples."""

    validity: Share = 0.8
    """Smallest share of valid Harmony completions, between 0 and 1. Lower starts with less valid samples; 0
    starts in any case and needs no evaluation."""


class SamplerSpec(ApiModel):
    """The sampler's share of the student's GPUs."""

    gpus: Annotated[int, Field(ge=1, le=1024, json_schema_extra={"inherits": "student.gpus"})]
    """GPUs of student.gpus that sample; the others train. Raise it when the trainer waits for rollouts. The
    default is half of student.gpus, rounded up."""


class MaxTokens(ApiModel):
    """Longest completion at each reasoning effort, in tokens. training.sequenceLength bounds prompt and
    completion."""

    low: Annotated[int, Field(ge=1, le=1_048_576)] = 1024
    """Longest completion at low effort, in tokens. Longer completions are truncated and trained on as they
    are."""
    medium: Annotated[int, Field(ge=1, le=1_048_576)] = 2048
    """Longest completion at medium effort, in tokens. Longer completions are truncated and trained on as they
    are."""
    high: Annotated[int, Field(ge=1, le=1_048_576)] = 4096
    """Longest completion at high effort, in tokens. Longer completions are truncated and trained on as they
    are."""


class RolloutSpec(ApiModel):
    """How many prompts are sampled, and the longest completions."""

    prompts_per_window: Annotated[int, Field(ge=1, le=1_048_576)] = 2048
    """Prompts of one window, which is one on-policy optimizer step. More makes the gradient less noisy and
    each step longer."""
    max_tokens: MaxTokens = MaxTokens()
    """Longest completion at each reasoning effort, in tokens."""


class EffortShares(ApiModel):
    """How often each reasoning effort is drawn. The shares must add up to 1."""

    low: Share = 0.0
    """Share of prompts at low effort, between 0 and 1."""
    medium: Share = 0.0
    """Share of prompts at medium effort, between 0 and 1."""
    high: Share = 0.0
    """Share of prompts at high effort, between 0 and 1."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "",
            "low, medium and high add up to {total}, not 1. Change them to add up to 1.",
            cel=_cel_one("self.low + self.medium + self.high"),
            broken=lambda effort, _: _off_one(effort.low, effort.medium, effort.high),
            terms={"total": _cel_rounded("(self.low + self.medium + self.high)")},
        ),
    )


class CurriculumPhase(ApiModel):
    """One phase of the curriculum, which leads from short reasoning to long."""

    share: PositiveShare
    """Share of the stage's tokens, between 0 and 1. The shares of all phases must add up to 1."""
    effort: EffortShares
    """How often each reasoning effort is drawn in this phase."""
    rollouts_per_prompt: Annotated[int, Field(ge=1, le=64)] = 1
    """Completions sampled for each prompt. Higher covers each prompt better, and fewer prompts in the same
    number of tokens."""
    rollouts_per_prompt_at_end: Annotated[int, Field(ge=1, le=64)] | None = None
    """Completions for each prompt at the end of the phase; the number moves there over the last quarter of
    the phase. null keeps rolloutsPerPrompt."""


CURRICULUM = tuple(
    CurriculumPhase.model_validate(phase)
    for phase in (
        {"share": 0.3, "effort": {"low": 0.7, "medium": 0.3}},
        {"share": 0.4, "effort": {"low": 0.2, "medium": 0.6, "high": 0.2}, "rolloutsPerPromptAtEnd": 2},
        {"share": 0.3, "effort": {"low": 0.1, "medium": 0.3, "high": 0.6}, "rolloutsPerPrompt": 2},
    )
)
"""Default of OnPolicy.curriculum."""


class BackPressure(ApiModel):
    """When the trainer reduces the sampler's work because it waits: first shorter completions, then fewer at
    high effort."""

    waiting: PositiveShare = 0.5
    """Share of time, between 0 and 1, that the trainer may wait for rollouts or scores before it makes an
    adjustment. Higher adjusts later; 1 never adjusts."""
    windows: Annotated[int, Field(ge=1, le=1_000_000)] = 50
    """Number of windows that the share is measured over, and the least number between two adjustments. Lower
    reacts sooner, also to chance."""


class OnPolicy(StageFields):
    """Training on the student's own samples, where each token is weighted by how much likelier the teacher
    finds it."""

    samples: ClassVar[bool] = True

    kind: Literal["OnPolicy"]
    """As in Vanilla."""
    tokens: Tokens = 8_000_000_000
    """As in Vanilla."""
    anchor: Share = 0.15
    """Share of Vanilla batches among all batches, between 0 and 1; it must be below 1. Higher keeps the
    student closer to the dataset."""
    staleness: Annotated[int, Field(ge=0, le=64)] = 2
    """Number of windows that sampling may run ahead of training. 0 makes sampler and trainer take turns;
    higher keeps both busy, with samples of older weights."""
    publish_every: Annotated[int, Field(ge=1, le=64)] = 2
    """Number of windows trained between two policy versions, which are the weights that the sampler loads.
    Lower samples with newer weights and transfers more bytes."""
    require: Require = Require()
    """What the evaluation of the stage before must have found before this stage starts."""
    max_sampler_kl: Annotated[float, Field(gt=0, le=100)] = 0.1
    """Limit of KL(sampler‖trainer) over a window's tokens, in nats per token. The stage fails when ten
    consecutive windows exceed it, because the sampler then computes another student than the trainer. The
    value includes what the student has learned since the sampled version. Lower detects a mismatch sooner,
    and false alarms too."""
    back_pressure: BackPressure = BackPressure()
    """When the trainer reduces the sampler's work because it waits."""
    sampler: Annotated[SamplerSpec, Field(json_schema_extra={"inherits": "student.gpus"})]
    """The sampler's share of the student's GPUs."""
    rollout: RolloutSpec = RolloutSpec()
    """How many prompts are sampled, and the longest completions."""
    curriculum: Annotated[tuple[CurriculumPhase, ...], Strict(False), Field(min_length=1, max_length=8)] = (
        CURRICULUM
    )
    """Phases from short reasoning to long, in this order. Their shares must add up to 1."""

    @property
    def sampler_gpus(self) -> int:
        return self.sampler.gpus

    @property
    def required_validity(self) -> float:
        return self.require.validity

    rules: ClassVar[tuple[Rule, ...]] = (
        *StageFields.rules,
        Rule(
            "anchor",
            "1 leaves no batch of rollouts. Lower it, or use a stage of kind Vanilla.",
            cel="!has(self.anchor) || self.anchor < 1.0",
            broken=lambda stage, _: {} if stage.anchor >= 1 else None,
        ),
        Rule(
            "curriculum",
            "the shares of the phases add up to {total}, not 1. Change them to add up to 1.",
            cel=f"!has(self.curriculum) || ({_cel_one('self.curriculum.map(p, p.share).sum()')})",
            broken=lambda stage, _: _off_one(*(phase.share for phase in stage.curriculum)),
            terms={"total": _cel_rounded("self.curriculum.map(p, p.share).sum()")},
        ),
    )


Stage = Annotated[Vanilla | Rescored | TeacherForced | OnPolicy, Field(discriminator="kind")]
KINDS: tuple[type[StageFields], ...] = (Vanilla, Rescored, TeacherForced, OnPolicy)

OPTIMIZER_OF_KIND: dict[str, dict[str, object]] = {"OnPolicy": {"learningRate": 2.0e-5}}
"""What a stage kind overrides in training.optimizer. The stage's own optimizer overrides both."""
