"""What a run learned, from its metrics lines (docs/reference/metrics.md). Pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

Line = Mapping[str, Any]
SPANS = ("reasoning", "final")
KL = "KL(student‖teacher)"
WINDOWS = 3
"""Windows averaged at either end, because the reverse KL of one window varies with its sampled tokens."""


@dataclass(frozen=True)
class Change:
    """A measure before and after a stage, in nats a token; lower is better."""

    stage: str
    measure: str
    before: float
    after: float


def held_out(stages: Mapping[str, Sequence[Line]]) -> list[Change]:
    """Held-out loss of each stage before its first step and at its end, by span; none without evaluations."""
    found = []
    for stage, lines in stages.items():
        measured = [line["heldOut"] for line in lines if line["event"] == "evaluation" and "heldOut" in line]
        for span in SPANS:
            values = [loss[span] for loss in measured if loss[span] is not None]
            if values:
                found.append(Change(stage, span, values[0], values[-1]))
    return found


def windows(lines: Sequence[Line]) -> list[Line]:
    """Lines of the steps that trained windows, in order."""
    found = (line for line in lines if line["event"] == "step" and line["kind"] == "OnPolicy")
    return sorted(found, key=lambda line: int(line["window"]))


def reverse_kl(window: Line) -> float:
    """KL(student‖teacher) of a window, in nats a token: the mean over its sampled tokens."""
    tokens: dict[str, int] = {span: window["targets"][span] for span in SPANS if window["targets"][span]}
    divergence: dict[str, float] = window["reverseKl"]
    nats = sum(divergence[span] * count for span, count in tokens.items())
    return nats / sum(tokens.values())


def on_policy(stages: Mapping[str, Sequence[Line]]) -> list[Change]:
    """Mean reverse KL over the first and the last WINDOWS windows of each OnPolicy stage."""
    found = []
    for stage, lines in stages.items():
        if measured := [reverse_kl(window) for window in windows(lines)]:
            found.append(Change(stage, KL, fmean(measured[:WINDOWS]), fmean(measured[-WINDOWS:])))
    return found


def summary(stages: Mapping[str, Sequence[Line]]) -> list[str]:
    """The summary as lines of text. `stages` has the metrics lines of each stage, in order."""
    text = ["Held-out loss, nats a token          before    after"]
    text += [_row(f"{change.stage:<12} {change.measure}", change) for change in held_out(stages)]
    if divergence := on_policy(stages):
        text += ["", f"KL(student‖teacher), nats a token    first {WINDOWS}   last {WINDOWS} windows"]
        text += [_row(change.stage, change) for change in divergence]
    for stage, lines in stages.items():
        if trained := windows(lines):
            versions = {window["version"] for window in trained}
            tokens = sum(sum(window["targets"].values()) for window in trained)
            text += [
                "",
                f"{stage}: {len(trained)} windows, {tokens:,} sampled tokens, "
                f"{len(versions)} policy versions",
            ]
    return text


def _row(name: str, change: Change) -> str:
    """One line of the table, with the difference."""
    return f"  {name:<32} {change.before:>8.3f} {change.after:>8.3f}  {change.after - change.before:+.3f}"
