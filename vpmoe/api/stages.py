"""spec.stages: the four kinds of training stage, discriminated by `kind`.

A default here is a default of its kind: a structural schema has one object for all kinds, so the API server cannot fill these in.
They are filled in when a run is parsed, and the CRD's descriptions name them.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, Strict

from vpmoe.api.base import ApiModel, Rule, TextPattern
from vpmoe.api.dataset import PositiveShare, Share
from vpmoe.api.quantities import Tokens
from vpmoe.api.training import Optimizer

BUILT_IN_STEPS = (
    "preprocess",
    "rescore",
    "score",
    "teacher",
    "sampler",
    "evaluate",
    "report",
    "train",
    "config",
)
"""Names of steps, children and volumes that a stage may not take: its children would be called like theirs."""

STAGE_NAME = TextPattern(
    r"[a-z][a-z0-9]{0,15}",
    "must be at most 16 lowercase letters and digits, starting with a letter (it is part of pod names)",
    max_length=16,
)
ADDS_UP = 1e-6
"""How far from 1 shares may add up: decimal fractions are not exact in binary."""


def _off_one(*shares: float) -> dict[str, object] | None:
    """The sum, where it is not 1."""
    total = sum(shares)
    return {"total": round(total, 6)} if abs(total - 1) > ADDS_UP else None


def _cel_one(total: str) -> str:
    return f"{total} >= {1 - ADDS_UP} && {total} <= {1 + ADDS_UP}"


def _cel_rounded(total: str) -> str:
    return f"double(int({total} * 1000000.0 + 0.5)) / 1000000.0"


class Stop(ApiModel):
    """Ends a stage before its tokens are spent, once it has stopped improving."""

    evaluations: Annotated[int, Field(ge=1, le=1000)] = 5
    """Evaluations in a row that must bring too little. More is more patient."""
    min_improvement: Annotated[float, Field(ge=0, lt=1)] = 0.002
    """Share by which those evaluations together must improve the held-out loss (reasoning and final, weighted by spanWeights; OnPolicy:
    the reverse KL) for the stage to go on. Higher ends earlier."""
    min_validity: Share = 0.0
    """Share of valid Harmony completions that must be reached before the stage may end early; 0 does not ask. Only OnPolicy stages sample
    while they train, so only there may it be above 0."""


class StageFields(ApiModel):
    """The fields that stages of every kind have."""

    name: Annotated[str, STAGE_NAME]
    """The step's name, part of the names of its pods and of its folder in the bucket. At most 16 lowercase letters and digits."""
    tokens: Tokens = 1_000_000_000
    """Positions that enter the student in this stage, padding excluded, as a number or a text such as "1B"."""
    optimizer: Annotated[Optimizer, Field(json_schema_extra={"inherits": "training.optimizer"})]
    """What differs from training.optimizer in this stage; each field that is not given is taken from there. The schedule starts anew."""
    stop: Stop | None = None
    """Ends the stage early when it no longer improves; null or absent spends all tokens."""

    @property
    def sampler_gpus(self) -> int:
        """GPUs of student.gpus that sample while the stage trains; 0 except in an OnPolicy stage."""
        return 0

    @property
    def teacher_processes(self) -> int:
        """Processes of the first pod that run the teacher, on a GPU of their own; 0 except in a TeacherForced stage."""
        return 0

    @property
    def scored_subset(self) -> "Subset | None":
        """The documents whose scores the stage trains on; None where it trains on none."""
        return None

    @property
    def required_validity(self) -> float:
        """Share of valid completions that the stage before must have reached; 0 except in an OnPolicy stage."""
        return 0.0

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "name",
            "{name} is the name of a built-in step. Choose another.",
            cel=f"!(self.name in {list(BUILT_IN_STEPS)})",
            broken=lambda stage, _: {"name": stage.name} if stage.name in BUILT_IN_STEPS else None,
            terms={"name": "self.name"},
        ),
    )


class Vanilla(StageFields):
    """Next-token training on the data set: no teacher. The start of every recipe."""

    kind: Literal["Vanilla"]
    """How the stage trains. Vanilla: on the data set as it is. Rescored: on documents weighted by the teacher's confidence.
    TeacherForced: towards the teacher's distribution, token by token. OnPolicy: on the student's own samples, scored by the teacher."""


class Subset(ApiModel):
    """Which documents the teacher scores. Scoring costs teacher time; what is not scored is trained on as in Vanilla."""

    tokens: Tokens = 1_000_000_000
    """Assistant tokens to score at most. The smaller of this and fraction wins."""
    fraction: PositiveShare = 0.2
    """Share of the data set's assistant tokens to score at most, between 0 and 1. The smaller of this and tokens wins."""
    prefer: Literal["longReasoning", "none"] = "longReasoning"
    """Which documents come first: longReasoning, those with the most reasoning tokens; none, in a seeded order."""
    exercises: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=64)], ...], Strict(False), Field(max_length=32)
    ] = ()
    """Exercises to choose from, balanced; empty means all of them."""
    languages: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=64)], ...], Strict(False), Field(max_length=32)
    ] = ()
    """Languages to choose from, balanced; empty means all of them."""


class Confidence(ApiModel):
    """How far the teacher's opinion of a token may move that token's weight away from 1."""

    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Softness, in nats. At 1, a token e times likelier than the mean weighs e times more; larger is flatter."""
    min: Annotated[float, Field(gt=0, le=1000)] = 0.25
    """Lowest weight, at most 1. Raise it when saturation at the low end stays above a few per cent in the metrics."""
    max: Annotated[float, Field(gt=0, le=1000)] = 4.0
    """Highest weight, at least 1. It bounds how much one lucky token can move a step."""

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
            "1 does not lie between min {min} and max {max}, and the mean weight is always 1. Move the bound that is on the wrong side.",
            cel="self.min > self.max || (self.min <= 1.0 && self.max >= 1.0)",
            broken=lambda c, _: (
                {"min": c.min, "max": c.max} if c.min <= c.max and not c.min <= 1 <= c.max else None
            ),
            terms={"min": "self.min", "max": "self.max"},
        ),
    )


class Rescored(StageFields):
    """Next-token training in which the teacher's confidence in a token weighs it."""

    kind: Literal["Rescored"]
    """As in Vanilla."""
    tokens: Tokens = 2_000_000_000
    """As in Vanilla."""
    subset: Subset = Subset()
    """Which documents the teacher scores."""
    mix: Share = 0.65
    """Share of batches that come from the scored subset, between 0 and 1; the others are Vanilla batches. Higher follows the teacher
    more closely on fewer documents."""
    confidence: Confidence = Confidence()
    """How far the teacher's opinion may move a token's weight."""

    @property
    def scored_subset(self) -> Subset | None:
        return self.subset if self.mix > 0 else None


class LossWeights(ApiModel):
    """What a TeacherForced step minimises: a weighted sum of three terms, each a mean over its span."""

    ce: Annotated[float, Field(ge=0, le=1000)] = 0.2
    """Weight of the cross-entropy with the data set's own tokens."""
    kl: Annotated[float, Field(ge=0, le=1000)] = 0.2
    """Weight of the divergence from the teacher's distribution to the student's, both softened by temperature."""
    hidden: Annotated[float, Field(ge=0, le=1000)] = 0.6
    """Weight of one minus the cosine between the student's projected last hidden state and the teacher's."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 2.0
    """Softness of both distributions in kl. Higher shows the student more of the teacher's unlikely tokens."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "",
            "ce, kl and hidden are all 0: there is nothing to train towards. Give at least one a weight.",
            cel="self.ce + self.kl + self.hidden > 0.0",
            broken=lambda loss, _: {} if loss.ce + loss.kl + loss.hidden == 0 else None,
        ),
    )


class TeacherForced(StageFields):
    """Training towards the teacher's hidden states and distribution on the data set's documents."""

    kind: Literal["TeacherForced"]
    """As in Vanilla."""
    tokens: Tokens = 665_000_000
    """As in Vanilla."""
    loss: LossWeights = LossWeights()
    """Weights of the three terms of the loss."""

    @property
    def teacher_processes(self) -> int:
        return 1


class Require(ApiModel):
    """What a student must be able to do before it learns from its own samples."""

    validity: Share = 0.8
    """Share of valid Harmony completions, between 0 and 1. Lower starts earlier, on samples of which more are garbage; 0 starts whatever
    the student can do, and needs no evaluation."""


class SamplerSpec(ApiModel):
    """The sampler's part of the student's GPUs."""

    gpus: Annotated[int, Field(ge=1, le=1024, json_schema_extra={"inherits": "student.gpus"})]
    """GPUs that sample, out of student.gpus; the others train. More when the trainer waits for rollouts. Half of student.gpus, rounded up,
    is the default."""


class MaxTokens(ApiModel):
    """Longest completion of each reasoning effort, in tokens. The sequence's end is a bound of its own."""

    low: Annotated[int, Field(ge=1, le=1_048_576)] = 1024
    """Longest completion at low effort, in tokens. Longer ones are truncated, and trained on as they are."""
    medium: Annotated[int, Field(ge=1, le=1_048_576)] = 2048
    """Longest completion at medium effort, in tokens. Longer ones are truncated, and trained on as they are."""
    high: Annotated[int, Field(ge=1, le=1_048_576)] = 4096
    """Longest completion at high effort, in tokens. Longer ones are truncated, and trained on as they are."""


class RolloutSpec(ApiModel):
    """How much is sampled, and how long it may be."""

    prompts_per_window: Annotated[int, Field(ge=1, le=1_048_576)] = 2048
    """Prompts of one window, which is one on-policy optimizer step. More makes steps smoother and longer."""
    max_tokens: MaxTokens = MaxTokens()
    """Longest completion of each reasoning effort."""


class EffortShares(ApiModel):
    """How often each reasoning effort is drawn. The shares add up to 1."""

    low: Share = 0.0
    """Share of prompts at low effort, between 0 and 1."""
    medium: Share = 0.0
    """Share of prompts at medium effort, between 0 and 1."""
    high: Share = 0.0
    """Share of prompts at high effort, between 0 and 1."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "",
            "low, medium and high add up to {total}, not 1.",
            cel=_cel_one("self.low + self.medium + self.high"),
            broken=lambda effort, _: _off_one(effort.low, effort.medium, effort.high),
            terms={"total": _cel_rounded("(self.low + self.medium + self.high)")},
        ),
    )


class CurriculumPhase(ApiModel):
    """One phase of the curriculum. Phases follow each other, from short reasoning to long."""

    share: PositiveShare
    """Share of the stage's tokens, between 0 and 1. The shares of all phases add up to 1."""
    effort: EffortShares
    """How often each reasoning effort is drawn."""
    rollouts_per_prompt: Annotated[int, Field(ge=1, le=64)] = 1
    """Completions sampled for each prompt. More see more of what the student does with one prompt, and fewer prompts."""
    rollouts_per_prompt_at_end: Annotated[int, Field(ge=1, le=64)] | None = None
    """Completions for each prompt at the phase's end; the number goes there over its last quarter. null: as rolloutsPerPrompt."""


CURRICULUM = tuple(
    CurriculumPhase.model_validate(phase)
    for phase in (
        {"share": 0.3, "effort": {"low": 0.7, "medium": 0.3}},
        {"share": 0.4, "effort": {"low": 0.2, "medium": 0.6, "high": 0.2}, "rolloutsPerPromptAtEnd": 2},
        {"share": 0.3, "effort": {"low": 0.1, "medium": 0.3, "high": 0.6}, "rolloutsPerPrompt": 2},
    )
)
"""The phases of an OnPolicy stage that names none."""


class BackPressure(ApiModel):
    """When less is asked of the sampler because the trainer waits: first shorter completions, then fewer at high effort."""

    waiting: PositiveShare = 0.5
    """Share of its time, between 0 and 1, above which a trainer that waits for rollouts or scores turns a knob. 1 turns none."""
    windows: Annotated[int, Field(ge=1, le=1_000_000)] = 50
    """Windows over which that share is taken, and after which the next knob may be turned. Lower reacts sooner, to chance too."""


class OnPolicy(StageFields):
    """Training on what the student itself samples, each token moved by how much likelier the teacher finds it."""

    kind: Literal["OnPolicy"]
    """As in Vanilla."""
    tokens: Tokens = 8_000_000_000
    """As in Vanilla."""
    anchor: Share = 0.15
    """Share of plain Vanilla batches among the on-policy ones, between 0 and 1. Higher holds the student closer to the data set."""
    staleness: Annotated[int, Field(ge=0, le=64)] = 2
    """Windows that sampling may run ahead of training. 0 makes sampler and trainer take turns; higher keeps both busy with older
    samples."""
    publish_every: Annotated[int, Field(ge=1, le=64)] = 2
    """Windows trained for each version of the weights that the sampler is given. Lower is fresher and moves more bytes."""
    require: Require = Require()
    """What must hold before the stage starts, as the evaluation of the stage before has found it."""
    max_sampler_kl: Annotated[float, Field(gt=0, le=100)] = 0.1
    """KL(sampler‖trainer) of a window's tokens, in nats a token, that ten windows in a row must not be above: then the sampler computes
    another student than the trainer, and the stage fails. What the student has learned since the sampled version is part of it."""
    back_pressure: BackPressure = BackPressure()
    """When less is asked of the sampler because the trainer waits."""
    sampler: Annotated[SamplerSpec, Field(json_schema_extra={"inherits": "student.gpus"})]
    """The sampler's part of the student's GPUs."""
    rollout: RolloutSpec = RolloutSpec()
    """How much is sampled, and how long it may be."""
    curriculum: Annotated[tuple[CurriculumPhase, ...], Strict(False), Field(min_length=1, max_length=8)] = (
        CURRICULUM
    )
    """Phases from short reasoning to long, in this order. Their shares add up to 1."""

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
            "1 leaves no step that trains on a rollout. Lower it, or make the stage Vanilla.",
            cel="!has(self.anchor) || self.anchor < 1.0",
            broken=lambda stage, _: {} if stage.anchor >= 1 else None,
        ),
        Rule(
            "curriculum",
            "the shares of the phases add up to {total}, not 1.",
            cel=f"!has(self.curriculum) || ({_cel_one('self.curriculum.map(p, p.share).sum()')})",
            broken=lambda stage, _: _off_one(*(phase.share for phase in stage.curriculum)),
            terms={"total": _cel_rounded("self.curriculum.map(p, p.share).sum()")},
        ),
    )


Stage = Annotated[Vanilla | Rescored | TeacherForced | OnPolicy, Field(discriminator="kind")]
KINDS: tuple[type[StageFields], ...] = (Vanilla, Rescored, TeacherForced, OnPolicy)

OPTIMIZER_OF_KIND: dict[str, dict[str, object]] = {"OnPolicy": {"learningRate": 2.0e-5}}
"""What a kind changes in training.optimizer before the stage's own words."""
