"""Back-pressure: whether the trainer has waited for windows too long, and which adjustment follows. Pure.

What an adjustment changes in a window is in vpmoe.rollout (back_pressure.py, windows.py); coordinator.py
writes it. Each attempt measures its waiting from the start, because only recent waiting counts.
"""

from collections import deque
from collections.abc import Mapping, Sequence

from vpmoe.api.progress import ProgressCondition
from vpmoe.rollout.back_pressure import ADJUSTMENTS, AdjustedSetting, Adjustment

REASONS: Mapping[AdjustedSetting, tuple[str, str]] = {
    "maxTokens": ("MaxTokensLowered", "completions are cut at three quarters of their length"),
    "effort": ("HighEffortLowered", "half of the prompts at high effort are sampled at medium"),
    "teacher": (
        "SecondTeacherAdvised",
        "no setting is left to adjust: in a new run set teacher.gpus to 2, or raise sampler.gpus",
    ),
}
"""Of each setting the condition's reason, and what its adjustment means."""


class Starvation:
    """Share of the trainer's time that it waited for windows, over the latest windows."""

    def __init__(self, windows: int) -> None:
        self._latest: deque[tuple[float, float]] = deque(maxlen=windows)

    def reset(self) -> None:
        """Begin again: the effect of an adjustment has to show first."""
        self._latest.clear()

    def add_window(self, waited: float, seconds: float) -> None:
        """Add the step of a window: `seconds`, of which it `waited`."""
        self._latest.append((waited, seconds))

    def add_anchor(self, seconds: float) -> None:
        """Add an anchor step, which counts with the window before it."""
        if self._latest:
            waited, before = self._latest.pop()
            self._latest.append((waited, before + seconds))

    @property
    def share(self) -> float | None:
        """0 to 1; None until enough windows were added."""
        if len(self._latest) < (self._latest.maxlen or 0):
            return None
        waited = sum(waited for waited, _ in self._latest)
        return waited / max(sum(seconds for _, seconds in self._latest), 1e-9)


def next_adjustment(
    made: Sequence[Adjustment], share: float | None, waiting: float, window: int
) -> Adjustment | None:
    """The next adjustment if the trainer waited more than `waiting` of its time and one is left, else None.

    It applies from `window` on. `made` are the adjustments so far.
    """
    if share is None or share <= waiting or len(made) >= len(ADJUSTMENTS):
        return None
    return Adjustment(
        number=len(made) + 1, window=window, setting=ADJUSTMENTS[len(made)], waiting=round(share, 3)
    )


def starvation_condition(adjustment: Adjustment) -> ProgressCondition:
    """An adjustment as a condition of the run's status."""
    reason, meaning = REASONS[adjustment.setting]
    return ProgressCondition(
        type="TrainerStarved",
        status="True",
        reason=reason,
        message=f"The trainer waited {adjustment.waiting:.0%} of its time; "
        f"from window {adjustment.window} on {meaning} "
        f"(adjustment {adjustment.number} of {len(ADJUSTMENTS)})",
    )
