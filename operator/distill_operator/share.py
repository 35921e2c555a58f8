"""How much of a whole run is done, as one percentage for people."""

from distill_operator.children import PREPROCESS
from vpmoe.api import DistillRun, Stage
from vpmoe.api.status import Status

PREPROCESS_SHARE = 0.05
"""What preprocessing counts for; the stages share the rest by their tokens."""


def share(run: DistillRun, status: Status) -> str:
    """Done part of the whole run as a percentage, rounded down: 100% is for a finished run."""
    planned = sum(stage.tokens for stage in run.spec.stages)
    done = sum(_tokens_done(stage, status) for stage in run.spec.stages) / planned
    first = status.of(PREPROCESS)
    parts = 0.0
    if first is not None:
        parts = 1.0 if first.state == "Succeeded" else (first.parts_done or 0) / max(first.parts_total or 1, 1)
    return f"{min(99, int(100 * (PREPROCESS_SHARE * parts + (1 - PREPROCESS_SHARE) * done)))}%"


def _tokens_done(stage: Stage, status: Status) -> int:
    step = status.of(stage.name)
    if step is None:
        return 0
    return stage.tokens if step.state == "Succeeded" else min(step.tokens_done or 0, stage.tokens)
