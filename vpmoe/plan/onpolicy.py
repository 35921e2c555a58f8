"""Totals of an OnPolicy stage for assumed lengths, in closed form.

`python -m vpmoe.rollout plan` counts window by window what this integrates; a test compares the two.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from vpmoe.api.layout import layout
from vpmoe.api.spec import Spec
from vpmoe.api.stages import CurriculumPhase, OnPolicy

EFFORTS = ("low", "medium", "high")
RAMP = 0.25
"""Share of a phase, at its end, over which the rollouts of a prompt go to rolloutsPerPromptAtEnd."""


@dataclass(frozen=True)
class RolloutTotals:
    """What a stage samples."""

    windows: float
    tokens: float
    """Tokens of all rollouts, prompts included."""
    completions: float
    """Sampled tokens."""
    rollouts: float
    versions: float
    """Policy versions that are published."""


def rollout_totals(spec: Spec, stage: OnPolicy, prompt: int, completion: Mapping[str, int]) -> RolloutTotals:
    """The totals if prompts have `prompt` tokens and completions those of `completion`, by effort, or as many
    as there is room for."""
    anchor_tokens = layout(spec.student, spec.training, stage).tokens_per_step
    anchors = stage.anchor / (1 - stage.anchor) * anchor_tokens  # tokens of anchor steps for each window
    room = spec.training.sequence_length - prompt
    lengths = {name: min(completion[name], getattr(stage.rollout.max_tokens, name), room) for name in EFFORTS}
    windows = tokens = completions = rollouts = 0.0
    total = sum(phase.share for phase in stage.curriculum)
    for phase in stage.curriculum:
        share = stage.tokens * phase.share / total
        answer = sum(getattr(phase.effort, name) * lengths[name] for name in EFFORTS)
        of_phase = _windows(phase, share, stage.rollout.prompts_per_window * (prompt + answer), anchors)
        sampled = share - anchors * of_phase
        windows += of_phase
        tokens += sampled
        rollouts += sampled / (prompt + answer)
        completions += sampled * answer / (prompt + answer)
    return RolloutTotals(windows, tokens, completions, rollouts, windows / stage.publish_every)


def _windows(phase: CurriculumPhase, tokens: float, one: float, anchors: float) -> float:
    """Windows in `tokens` tokens of a phase. `one`: tokens of a window with one rollout for each prompt."""
    start = phase.rollouts_per_prompt
    end = phase.rollouts_per_prompt_at_end or start
    first = tokens / (one * start + anchors)
    if end == start:
        return first
    ramp = math.log((one * end + anchors) / (one * start + anchors)) / (one * (end - start))
    return (1 - RAMP) * first + RAMP * tokens * ramp
