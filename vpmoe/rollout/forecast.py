"""A forecast of an OnPolicy stage, phase by phase, before a GPU is spent on it.

It runs the same curriculum as the roles (curriculum.py) with assumed lengths, because the length of the
student's answers is unknown until it answers. It uses no bucket and does not estimate durations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vpmoe.api.layout import layout
from vpmoe.api.quantities import format_count
from vpmoe.api.spec import Spec
from vpmoe.api.stages import OnPolicy
from vpmoe.rollout.curriculum import EFFORTS, Curriculum
from vpmoe.rollout.windows import completion_limit

COLUMNS = (
    "phase",
    "windows",
    "on-policy",
    "anchor",
    "a window",
    "prompts",
    "rollouts",
    *EFFORTS,
    "longest",
    "versions",
)


@dataclass(frozen=True)
class Assumptions:
    """Lengths that are unknown before the stage has run, in tokens."""

    prompt: int
    completion: Mapping[str, int]
    """By effort. Longer completions than the effort allows are truncated."""


@dataclass
class Forecast:
    """The expected totals of a phase, or of the whole stage."""

    windows: int = 0
    on_policy: int = 0
    """Tokens of the windows, prompts included."""
    anchor: int = 0
    """Tokens of the anchor steps."""
    prompts: int = 0
    rollouts: int = 0
    effort: dict[str, float] = field(default_factory=lambda: dict.fromkeys(EFFORTS, 0.0))
    """Prompts at each effort."""
    longest: int = 0
    """Length at which the longest completions are truncated, in tokens. Among a window's hundreds, one is
    expected to reach it."""
    versions: set[int] = field(default_factory=set)
    """Policy versions that the windows are sampled from."""

    def __add__(self, other: "Forecast") -> "Forecast":
        return Forecast(
            self.windows + other.windows,
            self.on_policy + other.on_policy,
            self.anchor + other.anchor,
            self.prompts + other.prompts,
            self.rollouts + other.rollouts,
            {name: self.effort[name] + other.effort[name] for name in EFFORTS},
            max(self.longest, other.longest),
            self.versions | other.versions,
        )


def forecast_phases(spec: Spec, stage: OnPolicy, assumed: Assumptions) -> list[Forecast]:
    """One forecast per phase. An anchor step counts for the phase of the window before it.

    Raises Permanent if the stage has no windows, ValueError if the assumed prompt leaves no room for an
    answer.
    """
    curriculum = Curriculum(stage)
    phases = [Forecast() for _ in stage.curriculum]
    bounds = {
        name: completion_limit(assumed.prompt, name, stage.rollout.max_tokens, spec.training.sequence_length)
        for name in EFFORTS
    }
    each = [assumed.prompt + min(assumed.completion[name], bounds[name]) for name in EFFORTS]
    anchor_tokens = layout(spec.student, spec.training, stage).tokens_per_step
    prompts = stage.rollout.prompts_per_window
    window, seen, published = 0, 0, {0: 0}
    while seen < stage.tokens:
        level = curriculum.level_at(published[curriculum.version_of(window)])
        phase = phases[level.phase]
        sampled = int(prompts * level.rollouts)
        tokens = round(
            sampled * sum(share * length for share, length in zip(level.effort, each, strict=True))
        )
        phase.windows += 1
        phase.on_policy += tokens
        phase.prompts += prompts
        phase.rollouts += sampled
        phase.versions.add(curriculum.version_of(window))
        for name, share in zip(EFFORTS, level.effort, strict=True):
            phase.effort[name] += float(share) * prompts
            phase.longest = max(phase.longest, bounds[name] if share else 0)
        window += 1
        published[window] = seen = seen + tokens
        anchors = min(
            curriculum.anchor_steps_before(window) - curriculum.anchor_steps_before(window - 1),
            -(-max(0, stage.tokens - seen) // anchor_tokens),
        )
        phase.anchor += anchors * anchor_tokens
        seen += anchors * anchor_tokens
    return phases


def forecast_table(phases: Sequence[Forecast]) -> str:
    """A table of the phases and their sum. Numbers are rounded to three digits."""
    rows = [
        COLUMNS,
        *(_row(str(place), phase) for place, phase in enumerate(phases, 1)),
        _row("all", sum(phases, Forecast())),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
    )


def _row(name: str, of: Forecast) -> tuple[str, ...]:
    shares = [f"{of.effort[name] / of.prompts:.0%}" if of.prompts else "–" for name in EFFORTS]
    a_window = format_count(of.on_policy // of.windows) if of.windows else "–"
    counts = (
        format_count(of.on_policy),
        format_count(of.anchor),
        a_window,
        format_count(of.prompts),
        format_count(of.rollouts),
    )
    return (name, f"{of.windows:,}", *counts, *shares, f"{of.longest:,}", f"{len(of.versions):,}")
