"""What an OnPolicy stage is expected to do, phase by phase, before a GPU is spent on it.

The very windows, versions and anchor steps that its roles will work out (curriculum.py), run with lengths that are assumed: how long the
student's answers are is known only when it answers. Nothing here touches the bucket, or knows how long anything takes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vpmoe.api.layout import layout
from vpmoe.api.quantities import format_tokens
from vpmoe.api.spec import Spec
from vpmoe.api.stages import OnPolicy
from vpmoe.rollout.curriculum import EFFORTS, Curriculum
from vpmoe.rollout.windows import longest

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
    """What is not known before the stage has run, in tokens."""

    prompt: int
    completion: Mapping[str, int]
    """By effort; a longer one than the effort allows is cut there."""


@dataclass
class Forecast:
    """What is expected of one phase, or of the whole stage."""

    windows: int = 0
    on_policy: int = 0
    """Tokens of its windows, prompts included."""
    anchor: int = 0
    """Tokens of its anchor steps."""
    prompts: int = 0
    rollouts: int = 0
    effort: dict[str, float] = field(default_factory=lambda: dict.fromkeys(EFFORTS, 0.0))
    """Prompts at each effort."""
    longest: int = 0
    """Tokens at which its longest completions are cut: of some hundred a window, one is expected to get there."""
    versions: set[int] = field(default_factory=set)
    """Policy versions that its windows are sampled from."""

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


def expect(spec: Spec, stage: OnPolicy, assumed: Assumptions) -> list[Forecast]:
    """One entry a phase. An anchor step counts with the window before it. Raises Permanent where the stage has no windows, ValueError
    where the assumed prompt leaves no room for an answer."""
    curriculum = Curriculum(stage)
    phases = [Forecast() for _ in stage.curriculum]
    bounds = {
        name: longest(assumed.prompt, name, stage.rollout.max_tokens, spec.training.sequence_length)
        for name in EFFORTS
    }
    each = [assumed.prompt + min(assumed.completion[name], bounds[name]) for name in EFFORTS]
    anchor_tokens = layout(spec.student, spec.training, stage).tokens_per_step
    prompts = stage.rollout.prompts_per_window
    window, seen, published = 0, 0, {0: 0}
    while seen < stage.tokens:
        level = curriculum.at(published[curriculum.version_of(window)])
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
            curriculum.anchors(window) - curriculum.anchors(window - 1),
            -(-max(0, stage.tokens - seen) // anchor_tokens),
        )
        phase.anchor += anchors * anchor_tokens
        seen += anchors * anchor_tokens
    return phases


def table(phases: Sequence[Forecast]) -> str:
    """The phases and their sum, a line each; numbers are rounded to three digits."""
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
    a_window = short(of.on_policy // of.windows) if of.windows else "–"
    counts = (short(of.on_policy), short(of.anchor), a_window, short(of.prompts), short(of.rollouts))
    return (name, f"{of.windows:,}", *counts, *shares, f"{of.longest:,}", f"{len(of.versions):,}")


def short(count: int) -> str:
    """A count to three digits: 1234567 is 1.23M."""
    return format_tokens(int(float(f"{count:.3g}")))
