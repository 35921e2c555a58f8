"""The losses of a run as one SVG: held-out loss over all stages, and reverse KL of the OnPolicy windows.

The background is transparent; lines and text are readable on white and on near-black.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from demo.summary import SPANS, WINDOWS, Line, reverse_kl, windows

GREY = "#7d8590"
COLOURS = {"reasoning": "#d9730d", "final": "#2f81f7"}
KL = "#a371f7"
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vpmoe",
    "font.size": 10,
    "text.color": GREY,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titlepad": 18,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
}


def plot(stages: Mapping[str, Sequence[Line]], file: Path) -> Path:
    """Write the picture to `file` and return it. `stages` has the metrics lines of each stage, in order."""
    of_windows = [window for lines in stages.values() for window in windows(lines)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 6.4 if of_windows else 3.6), layout="constrained")
        panels = figure.subplots(2 if of_windows else 1, 1, squeeze=False)
        held_out(panels[0][0], stages)
        if of_windows:
            divergence(panels[1][0], of_windows)
        figure.savefig(file, transparent=True, metadata={"Date": None} if file.suffix == ".svg" else None)
    return file


def held_out(axes: Any, stages: Mapping[str, Sequence[Line]]) -> None:
    """Draw the held-out loss by span over the tokens of the run, and where each stage begins."""
    begins = dict(starts(stages))
    for span in SPANS:
        points = [
            (begins[stage] + line["tokens"], line["heldOut"][span])
            for stage, lines in stages.items()
            for line in lines
            if line["event"] == "evaluation" and line.get("heldOut", {}).get(span) is not None
        ]
        if points:
            tokens, losses = zip(*points, strict=True)
            axes.plot(tokens, losses, color=COLOURS[span], marker="o", markersize=4, label=span)
            axes.annotate(
                f"{losses[-1]:.2f}",
                (tokens[-1], losses[-1]),
                (6, 0),
                textcoords="offset points",
                color=COLOURS[span],
                va="center",
            )
    for stage, at in begins.items():
        axes.axvline(at, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.annotate(stage, (at, 1), (4, 3), xycoords=("data", "axes fraction"), textcoords="offset points")
    axes.set_title("Held-out loss, nats a token")
    axes.set_xlabel("tokens trained on, all stages")
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1000:.0f}k")
    axes.set_xlim(left=0)
    axes.legend(labelcolor="linecolor")


def divergence(axes: Any, of: Sequence[Line]) -> None:
    """Draw the reverse KL of each window, and the means of the first and last WINDOWS windows."""
    values = [reverse_kl(window) for window in of]
    numbers = range(1, len(of) + 1)
    axes.plot(numbers, values, color=KL, marker="o", markersize=4, linewidth=1)
    for some in (slice(0, WINDOWS), slice(-WINDOWS, None)):
        at, mean = numbers[some], fmean(values[some])
        axes.plot((at[0], at[-1]), (mean, mean), color=KL, linewidth=4, alpha=0.4, solid_capstyle="round")
        above = (fmean(at), max(values[some]))
        axes.annotate(f"{mean:.2f}", above, (0, 9), textcoords="offset points", ha="center", color=KL)
    axes.set_title("KL(student‖teacher) of what the student samples itself, nats a token")
    axes.set_xlabel("window of the OnPolicy stage")
    axes.xaxis.get_major_locator().set_params(integer=True)


def starts(stages: Mapping[str, Sequence[Line]]) -> Iterator[tuple[str, int]]:
    """Tokens trained on before each stage."""
    at = 0
    for stage, lines in stages.items():
        yield stage, at
        at += max((int(line["tokens"]) for line in lines), default=0)
