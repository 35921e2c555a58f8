"""Back-pressure and drift: whether the trainer starves for long, and whether the sampler computes another student. Pure.

What a turn of a knob does to a window is vpmoe.rollout.back_pressure' and windows' business, writing it exchange.py's. Starving is watched anew by
every attempt, for what it has to wait for is recent by definition; windows beyond the bound of drift are counted in the Position.
"""

from collections import deque
from collections.abc import Mapping, Sequence

from vpmoe.api.progress import ProgressCondition
from vpmoe.data.spans import SPANS
from vpmoe.failure import Permanent
from vpmoe.rollout.back_pressure import ORDER, Adjustment, Knob

PATIENCE = 10
"""Windows in a row above maxSamplerKl after which the stage fails."""

SAID: Mapping[Knob, tuple[str, str]] = {
    "maxTokens": ("MaxTokensLowered", "completions are cut at three quarters of their length"),
    "effort": ("HighEffortLowered", "half of the prompts at high effort are asked at medium"),
    "teacher": (
        "SecondTeacherAdvised",
        "there is no knob left to turn: in a new run set teacher.gpus to 2, or sampler.gpus higher",
    ),
}
"""What each knob is called as a condition's reason, and what its turn means."""


class Starvation:
    """The share of its time for which the trainer waited, over the last windows."""

    def __init__(self, windows: int) -> None:
        self._windows = windows
        self.forget()

    def forget(self) -> None:
        """Begin anew: after a turn of a knob its effect has to be seen first."""
        self._last: deque[tuple[float, float]] = deque(maxlen=self._windows)

    def window(self, waited: float, seconds: float) -> None:
        """A window's step took so many seconds, of which it waited."""
        self._last.append((waited, seconds))

    def anchor(self, seconds: float) -> None:
        """So did an anchor step, which counts with the window before it."""
        if self._last:
            waited, before = self._last.pop()
            self._last.append((waited, before + seconds))

    @property
    def share(self) -> float | None:
        """None until it has been watched for so many windows."""
        if len(self._last) < self._windows:
            return None
        return sum(waited for waited, _ in self._last) / max(sum(seconds for _, seconds in self._last), 1e-9)


def next_turn(
    turns: Sequence[Adjustment], share: float | None, waiting: float, window: int
) -> Adjustment | None:
    """The next turn of a knob where the trainer waited more than `waiting` of its time; None where it did not, or no turn is left.

    `window` is the first that it holds for.
    """
    if share is None or share <= waiting or len(turns) >= len(ORDER):
        return None
    return Adjustment(number=len(turns) + 1, window=window, knob=ORDER[len(turns)], waiting=round(share, 3))


def starved(turn: Adjustment) -> ProgressCondition:
    """A turn as the run's status says it."""
    reason, meaning = SAID[turn.knob]
    words = f"The trainer waited {turn.waiting:.0%} of its time; from window {turn.window} on {meaning} (turn {turn.number} of {len(ORDER)})"
    return ProgressCondition(type="TrainerStarved", status="True", reason=reason, message=words)


def sampler_kl(by_span: Mapping[str, float | None], tokens: Mapping[str, int]) -> float:
    """KL(sampler‖trainer) of a window, in nats a token, whatever their span."""
    return sum((by_span[span] or 0.0) * tokens[span] for span in SPANS) / max(sum(tokens.values()), 1)


def beyond(before: int, kl: float, most: float, window: int) -> int:
    """Windows in a row above `most`, with this one. Raises Permanent where they are PATIENCE."""
    count = before + 1 if kl > most else 0
    if count >= PATIENCE:
        raise Permanent(
            f"SamplerDrift: KL(sampler‖trainer) has been above maxSamplerKl {most:g} for {count} windows in a row, {kl:.4g} nats a token "
            f"in window {window}; the weights were not touched. The sampler computes another student than the trainer, or the student "
            "moves too far between versions: in a new run, which may resumeFrom this one's last checkpoint, lower publishEvery, staleness "
            "or optimizer.learningRate, or raise maxSamplerKl."
        )
    return count
