"""Speeds that were measured: tokens a second by role, model and card, and seconds of what the roles of an
OnPolicy stage do. The commands and conditions are in docs/benchmarks.md."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from vpmoe.api.card import GIB

Work = Literal["preprocess", "train", "sample", "score", "hidden"]
"""hidden: the teacher's hidden states for a TeacherForced stage."""
TEXT = "text"
"""What preprocessing reads, in place of a model."""
CPU = "cpu"
"""What preprocessing runs on, in place of a card."""


@dataclass(frozen=True)
class Card:
    """A kind of GPU."""

    name: str
    memory: int
    """Bytes that CUDA reports, rounded down."""


CARDS = {card.name: card for card in (Card("h100-80", 79 * GIB), Card("h200-141", 139 * GIB))}
LARGE = 100 * GIB
"""Memory from which a card counts as the larger one."""


def suggested_card(memory: int | None) -> Card:
    """The card that runtime.gpuMemory suggests, given its bytes; None if the run does not say."""
    return CARDS["h200-141" if memory and memory >= LARGE else "h100-80"]


@dataclass(frozen=True)
class Measured:
    """One measurement."""

    work: Work
    model: str
    """student.shape, or the teacher's release."""
    card: str
    tokens_per_second: float
    """Of one GPU, in preprocessing of one CPU core."""
    date: str
    source: str
    """How it was measured. "without parts": of the student without the parts of vpmoe.model.shapes."""
    engines: int = 1
    """Engines that shared the GPU; more than one only in sampling (vpmoe.plan.sampling)."""
    step_seconds: float = 0.0
    """In training: of an optimizer step without its microbatches."""
    step_tokens: int = 1
    """In training: positions of an optimizer step on each GPU."""

    @property
    def position_seconds(self) -> float:
        """Of a token; in training of a position, without its share of an optimizer step."""
        return 1 / self.tokens_per_second - self.step_seconds / self.step_tokens


MEASURED = (
    Measured(
        "preprocess", TEXT, CPU, 4_700_000, "2026-11-29", "benchmarks.preprocess, CPU time, repeated rows"
    ),
    Measured(
        "train",
        "vpmoe-6b",
        "h200-141",
        86_800,
        "2026-11-29",
        "benchmarks.step, 2 × H200, two microbatches of 32,768 tokens an optimizer step",
        step_seconds=0.05,
        step_tokens=65_536,
    ),
    Measured(
        "sample",
        "vpmoe-6b",
        "h200-141",
        35_600,
        "2026-11-29",
        "1 × H200, 1,024 completions of 256 to 2,048 tokens at a time",
    ),
    Measured(
        "sample",
        "vpmoe-6b",
        "h200-141",
        47_700,
        "2026-11-29",
        "1 × H200, 2 × 1,024 completions of 256 to 2,048 tokens at a time",
        engines=2,
    ),
    Measured("score", "gpt-oss-120b", "h100-80", 20_900, "2026-11-27", "1 × H100, random weights"),
    Measured(
        "score",
        "gpt-oss-120b",
        "h200-141",
        49_500,
        "2026-11-29",
        "benchmarks.scorer, 1 × H200, random weights",
    ),
    Measured(
        "score",
        "gpt-oss-20b",
        "h200-141",
        67_500,
        "2026-11-29",
        "benchmarks.scorer, 1 × H200, random weights",
    ),
    Measured(
        "hidden",
        "gpt-oss-120b",
        "h200-141",
        56_800,
        "2026-11-29",
        "benchmarks.teacher_forced --card 79, 1 × H200, random weights",
    ),
    Measured(
        "hidden",
        "gpt-oss-20b",
        "h200-141",
        83_600,
        "2026-11-29",
        "benchmarks.teacher_forced, 1 × H200, random weights",
    ),
)
DECODE_SECONDS = 0.013
"""Seconds of one decoding step of vpmoe-6b with 512 sequences on an H200, of one engine that has the GPU for
itself, as in an evaluation (benchmarks.decode)."""


class DecodingStep(NamedTuple):
    """Seconds of a decoding step of one of several engines that share a GPU, each with as many sequences."""

    decode: float
    """Of a step with a token per sequence, without what each adds."""
    token: float
    """What each sequence adds."""

    def tokens_per_second(self, engines: int, sequences: int) -> float:
        """Of all engines of a GPU."""
        return engines * sequences / (self.decode + sequences * self.token)


DECODE = {1: DecodingStep(0.0071, 2.1e-5), 2: DecodingStep(0.0099, 3.2e-5)}
"""Of vpmoe-6b on an H200, by engines on a GPU: the straight line through the steps of 512 and 1,024 sequences
that benchmarks.decode measures while completions grow and are replaced, so with the prompts' steps."""
PREFILL = 1.6
"""Time of a prompt's token relative to that of a sampled one of full engines. An assumption."""
COPY_RATE = 12.06e9 / 0.92
"""Bytes of a policy version by the seconds for which training waits while it is copied and probed:
benchmarks.publication --shape vpmoe-6b, 1 × H200, 2026-11-30."""
VOLUME_RATE, VOLUME_LOAD_RATE = 12.06e9 / 2.74, 12.06e9 / 2.67
"""By the seconds from then until it is on a volume, and by those in which the sampler verifies it and loads
it into two engines from there: same source, where it can be sampled 6.33 s after the optimizer step."""
SCRATCH_RATE = 1.2e9
"""Bytes a second of exporting a version to scratch disk, and of loading it into engines from there: an export
by one thread, 1 × H100. Without a volume a version is exported and uploaded, then downloaded and loaded."""

POLL = 1.0
"""Seconds between two looks of a role for an object in the bucket. Half of it is lost at each, on average."""


@dataclass(frozen=True)
class RoleTimes:
    """Seconds of what the roles of an OnPolicy stage do; each on one GPU, unless noted."""

    position: float
    """The trainer computes a position forward and backward, in a microbatch of microbatch.MOST positions
    without recomputed layers."""
    step: float
    """An optimizer step, without its positions, on all GPUs."""
    engines: int
    """Number of engines on each GPU of the sampler."""
    decode: float
    """One of these engines makes a step with a token per sequence, without what each adds."""
    decode_token: float
    """What each sequence adds to a step."""
    prefill: float
    """The sampler computes a token of a prompt."""
    score: float
    """The teacher scores a token."""
    copy: float
    """Training waits while a policy version is copied and probed."""
    publish: float
    """From then until it is in the bucket."""
    volume: float | None
    """From then until it is on the volume (runtime.weightsVolume); None without one."""
    load: float
    """The sampler fetches a version, from the volume if there is one, loads it into all engines and verifies
    it."""

    @property
    def step_to_sampling(self) -> float:
        """From an optimizer step until its weights can be sampled from, with half of the time between two
        looks for them in the bucket."""
        found = self.publish + POLL / 2 if self.volume is None else self.volume
        return self.copy + found + self.load


def role_times(
    train: Measured,
    sample: Measured,
    score: Measured,
    engines: int,
    sequences: int,
    version: int,
    disk_speed: float,
    volume: bool,
) -> RoleTimes:
    """The seconds of what the roles do at these speeds.

    Decoding steps are those that were measured with `engines` engines on a GPU, or with the most of fewer,
    scaled so that engines with `sequences` sequences each have the speed of `sample`. `version`: bytes of a
    policy version. `disk_speed`: bytes a second of a pod to and from the bucket. `volume`: whether versions
    go by a volume, too.
    """
    known = DECODE[max(number for number in DECODE if number <= engines)]
    scale = known.tokens_per_second(engines, sequences) / sample.tokens_per_second
    through = version / disk_speed + version / SCRATCH_RATE
    return RoleTimes(
        position=train.position_seconds,
        step=train.step_seconds,
        engines=engines,
        decode=known.decode * scale,
        decode_token=known.token * scale,
        prefill=PREFILL / sample.tokens_per_second,
        score=score.position_seconds,
        copy=version / COPY_RATE,
        publish=through,
        volume=version / VOLUME_RATE if volume else None,
        load=version / VOLUME_LOAD_RATE if volume else through,
    )


def measured(work: Work, model: str, card: str, engines: int = 1) -> Measured | None:
    """The measurement on this card, or else on another one; None if there is none. Of several: with
    `engines` engines on a GPU, or else with the most of fewer."""
    found = [one for one in MEASURED if (one.work, one.model) == (work, model) and one.engines <= engines]
    here = [one for one in found if one.card == card] or [one for one in found if one.card == found[0].card]
    return max(here, key=lambda one: one.engines, default=None)
