"""Tokens a second that were measured, by role, model and card. The commands and conditions are in
docs/benchmarks.md."""

from dataclasses import dataclass
from typing import Literal

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


MEASURED = (
    Measured(
        "preprocess", TEXT, CPU, 4_700_000, "2026-11-29", "benchmarks.preprocess, CPU time, repeated rows"
    ),
    Measured(
        "train",
        "vpmoe-6b",
        "h200-141",
        70_200,
        "2026-11-29",
        "benchmarks.step, 2 × H200, two microbatches of 32,768 tokens an optimizer step",
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


def measured(work: Work, model: str, card: str, engines: int = 1) -> Measured | None:
    """The measurement on this card, or else on another one; None if there is none. Of several: with
    `engines` engines on a GPU, or else with the most of fewer."""
    found = [one for one in MEASURED if (one.work, one.model) == (work, model) and one.engines <= engines]
    here = [one for one in found if one.card == card] or [one for one in found if one.card == found[0].card]
    return max(here, key=lambda one: one.engines, default=None)
