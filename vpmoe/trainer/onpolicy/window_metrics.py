"""What a window's step adds to its line of metrics."""

from collections import Counter
from collections.abc import Iterable, Sequence

from vpmoe.api import pod_metrics
from vpmoe.api.base import Record
from vpmoe.api.metrics import Measures, Sample
from vpmoe.rollout.validity import VALID
from vpmoe.trainer.onpolicy.window_batch import ScoredWindow
from vpmoe.trainer.onpolicy.window_wait import Waits, WindowBuffer


class Lengths(Record):
    """Lengths of completions, in tokens."""

    mean: float
    max: int


class WindowMetrics(Measures):
    """What a window held, and how long the trainer waited for it."""

    window: int
    version: int
    """The policy version that it was sampled from."""
    phase: int
    """The curriculum's phase, from 0."""
    turns: int
    """Adjustments of back-pressure that applied to it."""
    staleness: int
    """Windows trained since that version."""
    prompts: int
    rollouts: dict[str, int]
    """By effort."""
    validity: dict[str, dict[str, float]]
    """By effort the share of rollouts of each validity."""
    lengths: dict[str, Lengths]
    """By effort."""
    wait_rollouts: float
    """Seconds of waiting for its rollouts."""
    wait_scores: float
    """Seconds of waiting for its scores after that."""
    wait_upload: float
    """Seconds of waiting after its step, until the version before was in the bucket. Not part of the step's
    seconds; 0 if no version was due."""
    buffer: WindowBuffer

    def samples(self) -> Iterable[Sample]:
        yield Sample(pod_metrics.WINDOW, self.window)
        yield Sample(pod_metrics.WINDOW_PHASE, self.phase)
        yield Sample(pod_metrics.WINDOW_STALENESS, self.staleness)
        yield Sample(pod_metrics.READY_WINDOWS, self.buffer.sampled, {"state": "sampled"})
        yield Sample(pod_metrics.READY_WINDOWS, self.buffer.scored, {"state": "scored"})
        for effort, shares in self.validity.items():
            yield Sample(pod_metrics.WINDOW_VALID, shares.get(VALID, 0), {"effort": effort})
        for effort, lengths in self.lengths.items():
            yield Sample(pod_metrics.WINDOW_LENGTH, lengths.mean, {"effort": effort})


class FirstWindow(Measures):
    """Where an attempt at an OnPolicy stage starts, for its start line."""

    windows: int
    """Windows trained so far."""
    first_prompt: int
    """Prompts that the stages before have used."""


def window_metrics(
    window: ScoredWindow, waits: Waits, wait_upload: float, buffer: WindowBuffer
) -> WindowMetrics:
    """The metrics of a window that was waited for, and after whose step an upload was."""
    header, rollouts = window.sampled.header, window.rollouts
    by_effort = {
        effort: [one for one in rollouts if one.effort == effort]
        for effort in sorted({one.effort for one in rollouts})
    }
    return WindowMetrics(
        window=header.window,
        version=header.version,
        phase=header.phase,
        turns=header.turns,
        staleness=header.window - header.version,
        prompts=len({one.prompt for one in rollouts}),
        rollouts={effort: len(of) for effort, of in by_effort.items()},
        validity={effort: _shares([one.validity for one in of]) for effort, of in by_effort.items()},
        lengths={effort: _lengths([len(one.logp_C) for one in of]) for effort, of in by_effort.items()},
        wait_rollouts=waits.rollouts,
        wait_scores=waits.scores,
        wait_upload=wait_upload,
        buffer=buffer,
    )


def _shares(names: Sequence[str]) -> dict[str, float]:
    return {name: count / len(names) for name, count in sorted(Counter(names).items())}


def _lengths(sizes: Sequence[int]) -> Lengths:
    return Lengths(mean=sum(sizes) / len(sizes), max=max(sizes))
